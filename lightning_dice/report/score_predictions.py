"""Scores of masks that lie in files, whoever made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_dice.callbacks import CaseTable, Overlays
from lightning_dice.data import DataError, SegmentationData, Split
from lightning_dice.data.interfaces import PredictionIO

FORMATS = (None, "png", "tiff", "nifti")
# What `predict` writes beside the masks, and what no mask is called.
PROBABILITIES = "probabilities"
BESIDE = {PROBABILITIES, "overlays"}
SUFFIXES = (".nii.gz", ".nii", ".png", ".tif", ".tiff")
LISTED = 50


class Scored(NamedTuple):
    """What there was to score.

    Attributes:
        cases: that were scored.
        missing: cases of the split that have no prediction.
        leftover: files that belong to no case of the split.
    """

    cases: int
    missing: list[str]
    leftover: list[str]


def score_predictions(
    data: SegmentationData,
    reader: PredictionIO,
    folder: Path,
    split: Split,
    table: CaseTable,
    overlays: Overlays | None = None,
    *,
    skip_missing: bool = False,
    each: Callable[[], Any] = lambda: None,
) -> Scored:
    """Score every case of a split by its prediction's file, against its mask; to be written by `table.write`.

    As soon as something is wrong, no more cases are scored, but all are looked at, so that one message names them all.

    Args:
        data: the data set, checked.
        reader: of the predictions.
        folder: of the predictions, as `predict` writes it. Where it wrote probabilities beside the masks, the
            calibration error is of these.
        split: of the data.
        table: gets the scores.
        overlays: gets the pictures.
        skip_missing: leave cases without a prediction out, instead of refusing.
        each: called after every case, for a progress bar.

    Raises:
        DataError: names every case without a prediction, or with one that cannot be read or is of another size.
    """
    data.setup("test" if split == "test" else "validate")
    batches: Any = data.test_dataloader() if split == "test" else data.val_dataloader()
    present = {_stem(name) for name in _masks(folder)}
    files = _Files(reader, folder, data.source.split(split))
    expected: set[str] = set()
    missing: list[str] = []
    wrong: list[str] = []
    scored = 0
    for batch in batches:
        for index, case in enumerate(batch.case):
            stems = {_stem(name.as_posix()) for name in files.names(case)}
            expected |= stems
            try:
                predicted, probs = files.load(case, batch.mask[index])
            except DataError as error:
                if stems & present:
                    wrong.append(str(error))
                elif (name := files.whole(case)) not in missing:
                    missing.append(name)
            else:
                if not wrong and (skip_missing or not missing):
                    _add(table, overlays, case, batch, index, predicted, probs)
                    scored += 1
            each()
    if wrong or (missing and not skip_missing):
        raise DataError(_message(folder, split, wrong, [] if skip_missing else missing))
    if not scored:
        raise DataError(f"{folder} holds no prediction of any of the {len(missing)} {split} cases")
    return Scored(scored, missing, _leftover(folder, expected))


def _add(
    table: CaseTable,
    overlays: Overlays | None,
    case: str,
    batch: Any,
    index: int,
    predicted: Tensor,
    probs: Tensor | None,
) -> None:
    table.add(case, predicted, batch.mask[index], batch.spacing[index], probs=probs)
    if overlays is not None:
        overlays.offer(case, batch.image[index], batch.mask[index], predicted)


class _Files:
    """The predictions of cases; of a tile, its part of the prediction of the whole image."""

    def __init__(self, reader: PredictionIO, folder: Path, cases: Any) -> None:
        self.reader, self.folder = reader, folder
        self._part = getattr(cases, "part", None)
        self._last: tuple[str, Tensor, Tensor | None] | None = None

    def whole(self, case: str) -> str:
        """The case whose prediction holds this one's."""
        return case if self._part is None else str(self._part(case)[0])

    def names(self, case: str) -> list[Path]:
        """All files that a case's prediction may lie in."""
        files = []
        for format in FORMATS:
            try:
                files += self.reader.names(self.whole(case), format)
            except DataError:
                continue  # A format that these masks are not written in.
        return files

    def load(self, case: str, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Labels of the mask's shape, and probabilities, where there are any.

        Raises:
            DataError: they cannot be read, or are of another size.
        """
        if self._part is None:
            return self._whole(case, mask.shape)
        name, size, window = self._part(case)
        if self._last is None or self._last[0] != name:  # Tiles of one image come one after the other.
            self._last = name, *self._whole(name, (*mask.shape[: mask.ndim - len(size)], *size))
        _, labels, probs = self._last
        return labels[(..., *window)], None if probs is None else probs[(..., *window)]

    def _whole(self, case: str, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        labels = self.reader.load(self.folder, case)
        if tuple(labels.shape) != tuple(shape):
            raise DataError(
                f"the prediction of {case} is of the size {_size(labels.shape)}, its mask of {_size(shape)}: "
                "predictions must be in the geometry of the images"
            )
        probs = self.reader.load_probabilities(self.folder / PROBABILITIES, case)
        if probs is not None and tuple(probs.shape[1:]) != tuple(shape[1 - probs.ndim :]):
            raise DataError(
                f"the probabilities of {case} are of the size {_size(probs.shape)}, its mask of {_size(shape)}"
            )
        return labels, probs


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _message(folder: Path, split: Split, wrong: list[str], missing: list[str]) -> str:
    parts = []
    if missing:
        inside = folder / split
        hint = f", or predictions={inside}" if inside.is_dir() else ""
        listed = "\n  ".join(missing[:LISTED])
        more = f"\n  and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        parts.append(
            f"{folder} lacks the predictions of {len(missing)} {split} cases; missing=skip scores the others{hint}:"
            f"\n  {listed}{more}"
        )
    if wrong:
        parts.append(f"{len(wrong)} predictions cannot be scored:\n  " + "\n  ".join(wrong[:LISTED]))
    return "\n".join(parts)


def _leftover(folder: Path, expected: set[str]) -> list[str]:
    return [name for name in _masks(folder) if _stem(name) not in expected]


def _masks(folder: Path) -> list[str]:
    """The files that may be masks, below the folder."""
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or inside.parts[0] in BESIDE or not path.name.endswith(SUFFIXES) or not path.is_file():
            continue
        found.append(inside.as_posix())
    return found


def _stem(name: str) -> str:
    """A file's name without the suffix of a mask."""
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
