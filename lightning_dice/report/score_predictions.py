"""Score predicted masks that are stored in files, whichever program wrote them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_dice.callbacks import CaseTable, Overlays
from lightning_dice.data import DataError, SegmentationData, Split
from lightning_dice.data.images.datasets import TiledCases
from lightning_dice.data.interfaces import PredictionIO

FORMATS = (None, "png", "tiff", "nifti")
PROBABILITIES = "probabilities"
NO_MASKS = {PROBABILITIES, "overlays"}  # folders that `predict` writes beside the masks
SUFFIXES = (".nii.gz", ".nii", ".png", ".tif", ".tiff")
MAX_LISTED = 50  # cases in an error message


class ScoringResult(NamedTuple):
    """Which cases had a prediction to score.

    Attributes:
        cases: number of scored cases.
        missing: cases of the split without a prediction.
        unmatched: mask files that belong to no case of the split.
    """

    cases: int
    missing: list[str]
    unmatched: list[str]


def score_predictions(
    data: SegmentationData,
    reader: PredictionIO,
    folder: Path,
    split: Split,
    table: CaseTable,
    overlays: Overlays | None = None,
    *,
    skip_missing: bool = False,
    on_case: Callable[[], Any] = lambda: None,
) -> ScoringResult:
    """Score the predicted mask of every case of a split against its true mask.

    After the first problem no more cases are scored, but the remaining files are still checked, so that one error
    names all problems. Write the scores with `table.write` afterwards.

    Args:
        data: the data module; its data have been checked.
        reader: reads the predictions.
        folder: their folder, laid out as by `predict`. If it has probabilities beside the masks, they are used
            for the calibration error.
        split: the split to score.
        table: receives the scores.
        overlays: receives the cases to draw, if given.
        skip_missing: skip cases without a prediction instead of raising an error.
        on_case: called after every case, for a progress bar.

    Raises:
        DataError: cases have no prediction, or one that cannot be read or differs in size; all are named.
    """
    data.setup("test" if split == "test" else "validate")
    batches: Any = data.test_dataloader() if split == "test" else data.val_dataloader()
    mask_files = _find_masks(folder)
    present = {_without_suffix(name) for name in mask_files}
    files = _PredictionFiles(reader, folder, data.source.split(split))
    expected: set[str] = set()
    missing: list[str] = []
    errors: list[str] = []
    scored = 0
    for batch in batches:
        for index, case in enumerate(batch.case):
            stems = {_without_suffix(path.as_posix()) for path in files.possible_paths(case)}
            expected |= stems
            try:
                predicted, probs = files.load(case, batch.mask[index])
            except DataError as error:
                if stems & present:
                    errors.append(str(error))
                elif (name := files.image_of(case)) not in missing:
                    missing.append(name)
            else:
                if not errors and (skip_missing or not missing):
                    table.add(case, predicted, batch.mask[index], batch.spacing[index], probs=probs)
                    if overlays is not None:
                        overlays.offer(case, batch.image[index], batch.mask[index], predicted)
                    scored += 1
            on_case()
    if errors or (missing and not skip_missing):
        raise DataError(_error_message(folder, split, errors, [] if skip_missing else missing))
    if not scored:
        raise DataError(f"{folder} has no prediction of any of the {len(missing)} {split} cases")
    return ScoringResult(scored, missing, [name for name in mask_files if _without_suffix(name) not in expected])


class _PredictionFiles:
    """Loads the predictions of cases; for a tile, the corresponding part of the prediction of its image."""

    def __init__(self, reader: PredictionIO, folder: Path, cases: Any) -> None:
        self.reader, self.folder = reader, folder
        self._tiles = cases if isinstance(cases, TiledCases) else None
        self._last: tuple[str, Tensor, Tensor | None] | None = None

    def image_of(self, case: str) -> str:
        """Return the image that a tile belongs to; any other case is its own."""
        return case if self._tiles is None else self._tiles.locate(case)[0]

    def possible_paths(self, case: str) -> list[Path]:
        """Return the files of a case's prediction in all formats."""
        files = []
        for format in FORMATS:
            try:
                files += self.reader.names(self.image_of(case), format)
            except DataError:
                continue  # Masks of this kind cannot be written in this format.
        return files

    def load(self, case: str, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Load labels in the shape of the mask, and probabilities if there are any.

        Raises:
            DataError: they cannot be read, or differ in size.
        """
        if self._tiles is None:
            return self._load_image(case, mask.shape)
        name, size, window = self._tiles.locate(case)
        if self._last is None or self._last[0] != name:  # Tiles of one image come one after another.
            self._last = name, *self._load_image(name, (*mask.shape[: mask.ndim - len(size)], *size))
        _, labels, probs = self._last
        inside: tuple[Any, ...] = (..., *window)
        return labels[inside], None if probs is None else probs[inside]

    def _load_image(self, case: str, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        labels = self.reader.load(self.folder, case)
        if tuple(labels.shape) != tuple(shape):
            raise DataError(
                f"the prediction of {case} has size {_size(labels.shape)}, but its mask has {_size(shape)}: "
                "predictions must have the geometry of the images"
            )
        probs = self.reader.load_probabilities(self.folder / PROBABILITIES, case)
        if probs is not None and tuple(probs.shape[1:]) != tuple(shape[1 - probs.ndim :]):
            raise DataError(
                f"the probabilities of {case} have size {_size(probs.shape)}, but its mask has {_size(shape)}"
            )
        return labels, probs


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _error_message(folder: Path, split: Split, errors: list[str], missing: list[str]) -> str:
    parts = []
    if missing:
        subfolder = folder / split
        hint = f", or predictions={subfolder}" if subfolder.is_dir() else ""
        listed = "\n  ".join(missing[:MAX_LISTED])
        more = f"\n  and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        parts.append(
            f"{folder} lacks the predictions of {len(missing)} {split} cases; missing=skip scores the others{hint}:"
            f"\n  {listed}{more}"
        )
    if errors:
        parts.append(f"{len(errors)} predictions cannot be scored:\n  " + "\n  ".join(errors[:MAX_LISTED]))
    return "\n".join(parts)


def _find_masks(folder: Path) -> list[str]:
    """Return the files below a folder that may be masks, relative to it."""
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or inside.parts[0] in NO_MASKS or not path.name.endswith(SUFFIXES) or not path.is_file():
            continue
        found.append(inside.as_posix())
    return found


def _without_suffix(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
