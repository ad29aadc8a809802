"""NIfTI volumes as a source of cases, and masks that lie on them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_dice.data.batch import Sample
from lightning_dice.data.errors import DataError, DataProblem, combined_error
from lightning_dice.data.interfaces import Split
from lightning_dice.data.label_map import LabelMap
from lightning_dice.data.volumes.dataset_summary import (
    Inspected,
    VolumeSurvey,
    inspect,
    read_channels,
    read_mask,
    relative,
)
from lightning_dice.data.volumes.file_layout import VolumeLayout, VolumePair, scan_folders
from lightning_dice.data.volumes.fingerprint import CaseFacts, Fingerprint, changed
from lightning_dice.data.volumes.nifti import read_geometry
from lightning_dice.data.volumes.normalization import Intensities, check_schemes
from lightning_dice.data.volumes.prediction_io import Preparation, VolumePredictionIO
from lightning_dice.data.volumes.resampling import Interpolation, zoomed_mask

Spacing = str | Sequence[float | None] | None


@dataclass(frozen=True)
class VolumeCases:
    """The cases of one split; each is read when it is asked for.

    Attributes:
        pairs: the files.
        sizes: the space axes of each image as the network sees it.
        mask_sizes: those of each mask: the same in training, else the file's own.
        labels: the classes.
        preparation: what is done to images.
        training: masks are resampled with their images.
        check_affine: whether the affine of a mask must be its image's.
    """

    pairs: Sequence[VolumePair]
    sizes: Sequence[tuple[int, ...]]
    mask_sizes: Sequence[tuple[int, ...]]
    labels: LabelMap
    preparation: Preparation
    training: bool
    check_affine: bool

    @property
    def shapes(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Sizes of image and mask: cases can be stacked if both agree."""
        return list(zip(self.sizes, self.mask_sizes, strict=True))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        channels, geometry = read_channels(pair.images)
        stored = [read_mask(path, geometry, check_affine=self.check_affine) for path in pair.masks]
        try:
            mask = self.labels.encode(stored)
        except ValueError as wrong:
            raise DataProblem(
                str(wrong), ", ".join(map(str, pair.masks)), "Set data.label_map or data.classes."
            ) from wrong
        image = self.preparation.image(channels, pair.images, geometry)
        spacing = geometry.spacing
        if self.training and self.preparation.spacing is not None:
            mask = zoomed_mask(mask, image.shape[1:], self.labels.activation == "sigmoid")
            spacing = self.preparation.spacing
        return Sample(image, mask, pair.case, spacing)

    def stored(self, case: str, path: Path) -> NDArray[Any]:
        """The label values of a file, which must lie where a case's image does, as its mask must.

        Raises:
            DataError: it does not, or cannot be read.
        """
        image = next(pair.images[0] for pair in self.pairs if pair.case == case)
        return read_mask(path, read_geometry(image), check_affine=self.check_affine)

    def stamp(self, index: int) -> str:
        """What the sample depends on: files with their sizes and times, and settings."""
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self._files(index)]
        return repr((files, self.labels, self.preparation, self.training))

    def _files(self, index: int) -> tuple[Path, ...]:
        return (*self.pairs[index].images, *self.pairs[index].masks)


class VolumeSet:
    """Cases of NIfTI files, wherever they lie: what `VolumeSource` and `NnunetSource` share.

    Args:
        root: the folder.
        scan: finds the cases.
        labels: the classes.
        normalization: a scheme or a channel's name for all channels, or one for each; see
            `lightning_dice.data.volumes.normalization.normalized`.
        channels: of an image.
        spacing: mm along each axis (left-right, back-front, foot-head) that images are resampled to: `"median"`, that
            of the training cases (`Fingerprint.median_spacing`); numbers, with `None` for an axis whose median is
            taken; `None`: not resampled. Scores are in the original geometry in any case.
        interpolation: `"linear"` or `"cubic"`, of images; see `lightning_dice.data.volumes.resampling`.
        fingerprint: the file that keeps what `check` finds. Once there it is not written again: the training cases'
            spacing and intensities are facts of the network. Without one, or where its folder does not exist, it is
            kept in memory.
        check_affine: whether the affine of a mask must be its image's; if not, the image's holds for every mask of its
            shape.
        workers: threads that `check` reads with, each of which holds a volume; by default up to 4.

    Raises:
        ValueError: for settings that cannot be.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        scan: Callable[[], VolumeLayout],
        labels: LabelMap,
        normalization: str | Sequence[str],
        channels: int,
        spacing: Spacing = "median",
        interpolation: Interpolation = "linear",
        fingerprint: str | Path | None = None,
        check_affine: bool = True,
        workers: int | None = None,
    ) -> None:
        if not root:
            raise ValueError(f"root must name a folder, got {root!r}; set data.root=/path/to/folder")
        if channels < 1:
            raise ValueError(f"channels must be 1 or more, got {channels}")
        if interpolation not in ("linear", "cubic"):
            raise ValueError(f"interpolation must be linear or cubic, got {interpolation!r}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be None or 1 or more, got {workers}")
        self.root = Path(root).expanduser()
        self.labels = labels
        self.channels = channels
        self.schemes = check_schemes(normalization, channels)
        self.spacing = _checked_spacing(spacing)
        self.interpolation: Interpolation = interpolation
        self.fingerprint_file = None if fingerprint is None else Path(fingerprint).expanduser()
        self.check_affine = check_affine
        self.workers = workers or max(min(4, os.cpu_count() or 1), 1)
        self._scan = scan
        self._found: VolumeLayout | None = None
        self._fingerprint: Fingerprint | None = None
        self._cases: dict[Split, VolumeCases] = {}

    @cached_property
    def reader(self) -> VolumePredictionIO:
        """What prediction reads and writes with; makes no use of the training's files but the fingerprint."""
        return VolumePredictionIO(self.labels, self.channels, self.preparation)

    def check(self) -> str:
        """Read everything once, but for cases that the fingerprint knows unchanged.

        Returns:
            Cases, sizes, spacings of each split, each class's share of voxels and the cases it occurs in, warnings.

        Raises:
            DataError: with everything that is wrong: file, reason, remedy.
        """
        return self.survey().report(self.root)

    def survey(self) -> VolumeSurvey:
        """What `check` finds, in numbers; makes the fingerprint, if there is none yet.

        Raises:
            DataError: as in `check`.
        """
        layout = self._layout()
        stored = self._stored()
        known = {(facts.split, facts.case): facts for facts in stored.cases} if stored is not None else {}

        def facts_of(job: tuple[Split, VolumePair]) -> Inspected:
            split, pair = job
            before = known.get((split, pair.case))
            if before is not None and _unchanged(before, pair, self.root) and self._fits(before, layout.planes):
                return Inspected(before)
            return inspect(pair, split, self.root, self.labels, layout.planes, self.check_affine)

        jobs = [(split, pair) for split, pairs in layout.pairs.items() for pair in pairs]
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(pool.map(facts_of, jobs))
        problems = [*layout.problems, *(problem for one in found for problem in one.problems)]
        if problems:
            raise combined_error(self.root, problems)
        cases = tuple(one.facts for one in found if one.facts is not None)
        notes = list(layout.notes)
        if stored is None:
            stored = self._made(cases, found)
        elif different := changed(stored.cases, cases):
            notes.append(
                f"the training cases are not those of {self.fingerprint_file}: {'; '.join(different)}. Its spacing and "
                "intensities are kept, as the network was trained with them; a new run makes its own"
            )
        self._fingerprint = stored
        parts = {split: [facts for facts in cases if facts.split == split] for split in layout.pairs}
        return VolumeSurvey(parts, self.labels, layout.planes, self.preparation().spacing, tuple(notes))

    def split(self, name: Split) -> VolumeCases | None:
        """The cases of a split, or `None` where there is no such split.

        Raises:
            DataError: where images and masks do not pair, a header cannot be read, or the fingerprint is needed and
                cannot be made.
        """
        layout = self._layout()
        if layout.problems:
            raise combined_error(self.root, layout.problems)
        if name not in layout.pairs:
            return None
        if name not in self._cases:
            pairs, preparation = layout.pairs[name], self.preparation()
            with ThreadPoolExecutor(self.workers) as pool:
                geometries = list(pool.map(lambda pair: read_geometry(pair.images[0]), pairs))
            sizes = [preparation.size(geometry.size, geometry.spacing) for geometry in geometries]
            own = sizes if name == "train" else [geometry.size for geometry in geometries]
            training = name == "train"
            self._cases[name] = VolumeCases(pairs, sizes, own, self.labels, preparation, training, self.check_affine)
        return self._cases[name]

    def readable(self, name: Split) -> VolumeCases | None:
        """The cases of a split whose files belong together, as they are stored; each may fail when it is read."""
        pairs = self._layout().pairs.get(name)
        if not pairs:
            return None
        with ThreadPoolExecutor(self.workers) as pool:
            sizes = list(pool.map(lambda pair: _size(pair.images[0]), pairs))
        as_stored = Preparation(("nonorm",) * self.channels)
        return VolumeCases(pairs, sizes, sizes, self.labels, as_stored, False, self.check_affine)

    def kinds(self) -> dict[tuple[Split, str], str]:
        """Type and orientation of the image of each case that can be read, by split and case."""
        found = {}
        for split, pairs in self._layout().pairs.items():
            for pair in pairs:
                with suppress(DataError):
                    geometry = read_geometry(pair.images[0])
                    found[split, pair.case] = f"{geometry.kind} {geometry.axes}"
        return found

    def fingerprint(self) -> Fingerprint:
        """What the training cases are like: from its file, or by reading them.

        Raises:
            DataError: what is wrong with them.
        """
        if self._fingerprint is None:
            self._fingerprint = self._stored()
        if self._fingerprint is None:
            if not self.root.is_dir():
                where = self.fingerprint_file or "no file (data.fingerprint)"
                raise DataError(
                    f"the spacing and intensities of the training cases are needed, and neither their fingerprint, "
                    f"{where}, nor the cases themselves, {self.root}, are there: restore one of them"
                )
            self.survey()
        if self._fingerprint is None:
            raise RuntimeError("a survey makes the fingerprint")
        return self._fingerprint

    def preparation(self) -> Preparation:
        """What is done to images."""
        intensities: tuple[Intensities, ...] = ()
        if "ct" in self.schemes:
            intensities = self.fingerprint().intensities
            if len(intensities) != self.channels:
                raise DataError(
                    f"data.normalization=CT needs the intensities of the training cases' foreground in "
                    f"{self.channels} channels, and there are those of {len(intensities)}: are all masks empty?"
                )
        spacing: tuple[float, ...] | None = None
        if self.spacing is not None:
            own = self.spacing
            median = self.fingerprint().median_spacing() if None in own else (0.0,) * len(own)
            spacing = tuple(found if wanted is None else wanted for wanted, found in zip(own, median, strict=True))
        return Preparation(self.schemes, intensities, spacing, self.interpolation)

    def _layout(self) -> VolumeLayout:
        if self._found is None:
            self._found = self._scan()
        return self._found

    def _stored(self) -> Fingerprint | None:
        if self.fingerprint_file is None or not self.fingerprint_file.is_file():
            return None
        stored = Fingerprint.load(self.fingerprint_file)
        if len(stored.channels) != self.channels:
            raise DataError(
                f"{self.fingerprint_file} is of {len(stored.channels)} channels, data.channels={self.channels} was "
                "asked for: it belongs to another data set"
            )
        return stored

    def _made(self, cases: tuple[CaseFacts, ...], found: Sequence[Inspected]) -> Fingerprint:
        voxels = [one.voxels for one in found if one.voxels is not None and one.voxels.size]
        together = np.concatenate(voxels, axis=1) if voxels else np.zeros((0, 0), np.float32)
        made = Fingerprint(self.schemes, tuple(Intensities.of(channel) for channel in together), cases)
        if self.fingerprint_file is not None and self.fingerprint_file.parent.is_dir():
            try:
                made.save(self.fingerprint_file)
            except OSError as refused:
                raise DataError(f"cannot write {self.fingerprint_file}: {refused.strerror}") from refused
        return made

    def _fits(self, facts: CaseFacts, planes: bool) -> bool:
        return not any(self.labels.describe(counts, planes) for counts in facts.counts)


class VolumeSource(VolumeSet):
    """NIfTI volumes in two folders, `images` and `masks`, with or without `train`, `val` and `test` in them.

    A mask has its image's name, up to customary endings such as `_seg`. Several channels are files of their own,
    `<case>_0000.nii.gz`, `<case>_0001.nii.gz` ... With split folders for train and test alone, val is drawn from train;
    with none, all splits are drawn. With `activation="sigmoid"`, a folder of masks may hold one folder for each class.

    Args:
        root: the folder.
        classes: names of the ids 0, 1 ... (softmax), or of 1, 2 ... (sigmoid).
        activation: of the network's logits, `"softmax"` or `"sigmoid"`.
        ignore_index: the label of voxels that count as nothing; `None` for none.
        label_map: stored value -> id, where they differ: `{205: 1}`.
        channels: of an image.
        images: where the images are, under `root`.
        masks: the same for the masks.
        fractions: of the cases for train, val and test, where there are no folders for them.
        seed: of this draw.
        normalization: see `VolumeSet`, as for all other settings.
        settings: of `VolumeSet`.

    Raises:
        ValueError: for settings that cannot be.
    """

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str],
        activation: Literal["softmax", "sigmoid"] = "softmax",
        ignore_index: int | None = 255,
        label_map: Mapping[int, int] | None = None,
        channels: int = 1,
        images: str = "images",
        masks: str = "masks",
        fractions: Sequence[float] = (0.7, 0.15, 0.15),
        seed: int = 0,
        normalization: str | Sequence[str] = "zscore",
        **settings: Any,
    ) -> None:
        labels = LabelMap.of_ids(classes, activation, ignore_index, label_map)
        shares = checked_fractions(fractions)
        planes = labels.classes if activation == "sigmoid" else ()

        def scan() -> VolumeLayout:
            return scan_folders(self.root, str(images), str(masks), planes, channels, shares, seed)

        super().__init__(root, scan=scan, labels=labels, normalization=normalization, channels=channels, **settings)


def checked_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    """Shares of train, val and test.

    Raises:
        ValueError: they are not three, or do not sum to 1.
    """
    shares = tuple(float(part) for part in fractions)
    if len(shares) != 3 or min(shares) < 0 or shares[0] == 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(
            f"fractions must be the shares of train, val and test, which sum to 1, got {list(shares)}; "
            "for instance 'data.fractions=[0.7,0.15,0.15]'"
        )
    return shares


def _checked_spacing(spacing: Spacing) -> tuple[float | None, ...] | None:
    if spacing is None:
        return None
    if spacing == "median":
        return (None, None, None)
    wanted = "spacing must be median, null or mm along three axes such as [1,1,null]"
    if isinstance(spacing, str) or not isinstance(spacing, Sequence) or len(spacing) != 3:
        raise ValueError(f"{wanted}, got {spacing!r}")
    if not all(length is None or (isinstance(length, (int, float)) and 0 < length < math.inf) for length in spacing):
        raise ValueError(f"{wanted}, got {list(spacing)}")
    return tuple(None if length is None else float(length) for length in spacing)


def _size(path: Path) -> tuple[int, ...]:
    try:
        return read_geometry(path).size
    except DataError:
        return (0, 0, 0)


def _unchanged(facts: CaseFacts, pair: VolumePair, root: Path) -> bool:
    paths = {relative(path, root): path for path in (*pair.images, *pair.masks)}
    return paths.keys() == facts.files.keys() and all(facts.files[name].is_of(path) for name, path in paths.items())
