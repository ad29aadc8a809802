"""NIfTI volumes as a source of cases."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_dice.data.batch import Sample
from lightning_dice.data.errors import DataError, DataProblem, combined_error
from lightning_dice.data.interfaces import Split
from lightning_dice.data.label_map import LabelMap
from lightning_dice.data.splits import SplitSettings
from lightning_dice.data.volumes.dataset_summary import InspectedCase, VolumeSurvey, inspect_case, is_unchanged
from lightning_dice.data.volumes.file_layout import VolumeLayout, VolumePair, find_pairs
from lightning_dice.data.volumes.fingerprint import CaseFacts, Fingerprint, describe_changes
from lightning_dice.data.volumes.nifti import read_channels, read_geometry, read_mask
from lightning_dice.data.volumes.normalization import Intensities
from lightning_dice.data.volumes.prediction_io import VolumePredictionIO
from lightning_dice.data.volumes.preprocessing import Preprocessor, VolumePreprocessing
from lightning_dice.data.volumes.resampling import resample_mask
from lightning_dice.extras import require


@dataclass(frozen=True)
class VolumeCases:
    """The cases of one split; files are read on access.

    Attributes:
        pairs: the files of each case.
        sizes: the space axes of each image as the network sees it.
        mask_sizes: the space axes of each mask: the image's in training, otherwise the file's.
        labels: the classes.
        preprocessor: for the images.
        training: masks are resampled with their images.
        check_affine: require that the affine of a mask matches its image's.
    """

    pairs: Sequence[VolumePair]
    sizes: Sequence[tuple[int, ...]]
    mask_sizes: Sequence[tuple[int, ...]]
    labels: LabelMap
    preprocessor: Preprocessor
    training: bool
    check_affine: bool

    @property
    def shapes(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Sizes of image and mask; cases can be stacked if both are equal."""
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
            where = ", ".join(map(str, pair.masks))
            raise DataProblem(str(wrong), where, "Set data.label_map or data.classes.") from wrong
        image = self.preprocessor(channels, pair.images, geometry)
        spacing = geometry.spacing
        if self.training and self.preprocessor.spacing is not None:
            mask = resample_mask(mask, image.shape[1:], self.labels.activation == "sigmoid")
            spacing = self.preprocessor.spacing
        return Sample(image, mask, pair.case, spacing)

    def read_mask(self, case: str, path: Path) -> NDArray[Any]:
        """Read the label values of a file that must match a case's image as its mask must.

        Raises:
            DataError: it does not match, or cannot be read.
        """
        image = next(pair.images[0] for pair in self.pairs if pair.case == case)
        return read_mask(path, read_geometry(image), check_affine=self.check_affine)

    def stamp(self, index: int) -> str:
        """Return a text that changes with the sample: the files with their sizes and times, and the settings."""
        paths = (*self.pairs[index].images, *self.pairs[index].masks)
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        return repr((files, self.labels, self.preprocessor, self.training))


class BaseVolumeSource(ABC):
    """A source of cases in NIfTI files; subclasses find the files.

    Args:
        root: the folder.
        labels: the classes.
        channels: an image's channels.
        preprocessing: normalization and resampling of images; by default z-scores at the median spacing.
        fingerprint: a file for the `Fingerprint` of the data, which `check` makes. An existing file is never
            overwritten, because a trained network depends on the spacing and intensities in it. `None`, or a file in
            a folder that does not exist: it is kept in memory.
        check_affine: require that the affine of a mask matches its image's. If not, masks of the image's shape get the
            image's affine.
        workers: threads for reading, each of which holds a volume; `None`: up to 4.

    Raises:
        ValueError: for a setting out of its range.
    """

    def __init__(
        self,
        root: str | Path,
        labels: LabelMap,
        channels: int,
        preprocessing: VolumePreprocessing | None = None,
        fingerprint: str | Path | None = None,
        check_affine: bool = True,
        workers: int | None = None,
    ) -> None:
        require("nibabel", needed_by=type(self).__name__)
        if not root:
            raise ValueError(f"root must name a folder, got {root!r}; set data.root=/path/to/folder")
        if channels < 1:
            raise ValueError(f"channels must be 1 or more, got {channels}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be None or 1 or more, got {workers}")
        self.root = Path(root).expanduser()
        self.labels = labels
        self.channels = channels
        self.preprocessing = preprocessing or VolumePreprocessing()
        self.schemes = self.preprocessing.schemes(channels)
        self.fingerprint_file = None if fingerprint is None else Path(fingerprint).expanduser()
        self.check_affine = check_affine
        self.workers = workers or max(min(4, os.cpu_count() or 1), 1)
        self._fingerprint: Fingerprint | None = None
        self._cases: dict[Split, VolumeCases] = {}

    @abstractmethod
    def _find_files(self) -> VolumeLayout:
        """Find the files of all cases."""

    @cached_property
    def _layout(self) -> VolumeLayout:
        return self._find_files()

    @cached_property
    def reader(self) -> VolumePredictionIO:
        """Reads and writes files for prediction; of the training data it needs the fingerprint only."""
        return VolumePredictionIO(self.labels, self.channels, self.preprocessor)

    def check(self) -> str:
        """Read all cases once, except those that the fingerprint knows and that are unchanged.

        Returns:
            A report of cases, sizes and spacings of each split, each class's share of voxels and the cases it occurs
            in, and warnings.

        Raises:
            DataError: lists every problem with its file, reason and remedy.
        """
        return self.survey().report(self.root)

    def survey(self) -> VolumeSurvey:
        """Return the findings of `check` as numbers; make the fingerprint if there is none yet.

        Raises:
            DataError: as in `check`.
        """
        layout = self._layout
        stored = self._load_fingerprint()
        known = {(facts.split, facts.case): facts for facts in stored.cases} if stored is not None else {}

        def inspect(job: tuple[Split, VolumePair]) -> InspectedCase:
            split, pair = job
            facts = known.get((split, pair.case))
            if facts is not None and is_unchanged(facts, pair, self.root) and self._accepts(facts, layout.planes):
                return InspectedCase(facts)
            return inspect_case(pair, split, self.root, self.labels, layout.planes, self.check_affine)

        jobs = [(split, pair) for split, pairs in layout.pairs.items() for pair in pairs]
        with ThreadPoolExecutor(self.workers) as pool:
            found = list(pool.map(inspect, jobs))
        problems = [*layout.problems, *(problem for one in found for problem in one.problems)]
        if problems:
            raise combined_error(self.root, problems)
        cases = tuple(one.facts for one in found if one.facts is not None)
        notes = list(layout.notes)
        if stored is None:
            stored = self._make_fingerprint(cases, found)
        elif changes := describe_changes(stored.cases, cases):
            notes.append(
                f"the training cases are not those of {self.fingerprint_file}: {'; '.join(changes)}. Its spacing and "
                "intensities are kept, as the network was trained with them; a new run makes its own"
            )
        self._fingerprint = stored
        parts = {split: [facts for facts in cases if facts.split == split] for split in layout.pairs}
        return VolumeSurvey(parts, self.labels, layout.planes, self.preprocessor().spacing, tuple(notes))

    def split(self, name: Split) -> VolumeCases | None:
        """Return the cases of a split, or `None` if there is no such split.

        Raises:
            DataError: images and masks do not match, a header cannot be read, or the fingerprint is needed and cannot
                be made.
        """
        if self._layout.problems:
            raise combined_error(self.root, self._layout.problems)
        if name not in self._layout.pairs:
            return None
        if name not in self._cases:
            pairs, preprocessor = self._layout.pairs[name], self.preprocessor()
            with ThreadPoolExecutor(self.workers) as pool:
                geometries = list(pool.map(lambda pair: read_geometry(pair.images[0]), pairs))
            sizes = [preprocessor.output_size(geometry.size, geometry.spacing) for geometry in geometries]
            training = name == "train"
            own = sizes if training else [geometry.size for geometry in geometries]
            self._cases[name] = VolumeCases(pairs, sizes, own, self.labels, preprocessor, training, self.check_affine)
        return self._cases[name]

    def readable(self, name: Split) -> VolumeCases | None:
        """Return the cases of a split whose files match, without preprocessing; reading one may still fail."""
        pairs = self._layout.pairs.get(name)
        if not pairs:
            return None
        with ThreadPoolExecutor(self.workers) as pool:
            sizes = list(pool.map(lambda pair: _size_if_readable(pair.images[0]), pairs))
        as_stored = Preprocessor(("nonorm",) * self.channels)
        return VolumeCases(pairs, sizes, sizes, self.labels, as_stored, False, self.check_affine)

    def kinds(self) -> dict[tuple[Split, str], str]:
        """Return type and orientation of each readable image, by split and case."""
        found = {}
        for split, pairs in self._layout.pairs.items():
            for pair in pairs:
                with suppress(DataError):
                    geometry = read_geometry(pair.images[0])
                    found[split, pair.case] = f"{geometry.kind} {geometry.axes}"
        return found

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint from its file, or make it by reading the cases.

        Raises:
            DataError: the cases have problems, or neither they nor the file exist.
        """
        if self._fingerprint is None:
            self._fingerprint = self._load_fingerprint()
        if self._fingerprint is None:
            if not self.root.is_dir():
                where = self.fingerprint_file or "no file (data.fingerprint)"
                raise DataError(
                    f"the spacing and intensities of the training cases are needed, but neither their fingerprint, "
                    f"{where}, nor the cases themselves, {self.root}, exist: restore one of them"
                )
            self.survey()
        if self._fingerprint is None:
            raise RuntimeError("a survey makes the fingerprint")
        return self._fingerprint

    def preprocessor(self) -> Preprocessor:
        """Return the preprocessor of images; makes the fingerprint if it is needed.

        Raises:
            DataError: the fingerprint cannot be made, or has no intensities for CT.
        """
        return self.preprocessing.preprocessor(self.channels, self.fingerprint)

    def _load_fingerprint(self) -> Fingerprint | None:
        if self.fingerprint_file is None or not self.fingerprint_file.is_file():
            return None
        stored = Fingerprint.load(self.fingerprint_file)
        if len(stored.channels) != self.channels:
            raise DataError(
                f"{self.fingerprint_file} has {len(stored.channels)} channels, but data.channels={self.channels}: "
                "it belongs to another data set"
            )
        return stored

    def _make_fingerprint(self, cases: tuple[CaseFacts, ...], inspected: Sequence[InspectedCase]) -> Fingerprint:
        voxels = [one.voxels for one in inspected if one.voxels is not None and one.voxels.size]
        channels = np.concatenate(voxels, axis=1) if voxels else np.zeros((0, 0), np.float32)
        made = Fingerprint(self.schemes, tuple(Intensities.from_voxels(channel) for channel in channels), cases)
        if self.fingerprint_file is not None and self.fingerprint_file.parent.is_dir():
            try:
                made.save(self.fingerprint_file)
            except OSError as refused:
                raise DataError(f"cannot write {self.fingerprint_file}: {refused.strerror}") from refused
        return made

    def _accepts(self, facts: CaseFacts, planes: bool) -> bool:
        """Return whether all stored values of a case have a meaning in `labels`."""
        return not any(self.labels.describe_unknown(counts, planes) for counts in facts.counts)


class VolumeSource(BaseVolumeSource):
    """NIfTI volumes in two folders, `images` and `masks`, with or without `train`, `val` and `test` in them.

    A mask has the name of its image, apart from endings such as `_seg`. Several channels are separate files,
    `<case>_0000.nii.gz`, `<case>_0001.nii.gz` ... If there are split folders for train and test only, val is drawn
    from train; if there are none, all splits are drawn. With `activation="sigmoid"`, a folder of masks may hold one
    folder for each class.

    Args:
        root: the folder.
        labels: the classes, such as `LabelMap.of_ids(["background", "liver"])`.
        channels: an image's channels.
        images: the folder of images below `root`.
        masks: the folder of masks below `root`.
        split_settings: the names of the split folders, and how splits without a folder are drawn.
        preprocessing: as for `BaseVolumeSource`, like the arguments below.
        fingerprint: the same.
        check_affine: the same.
        workers: the same.

    Raises:
        ValueError: for a setting out of its range.

    >>> source = VolumeSource(
    ...     "data/liver",
    ...     LabelMap.of_ids(["background", "liver"]),
    ...     preprocessing=VolumePreprocessing("CT", spacing=[1.0, 1.0, None]),
    ... )
    >>> source.channels, source.schemes
    (1, ('ct',))
    """

    def __init__(
        self,
        root: str | Path,
        labels: LabelMap,
        channels: int = 1,
        images: str = "images",
        masks: str = "masks",
        split_settings: SplitSettings | None = None,
        preprocessing: VolumePreprocessing | None = None,
        fingerprint: str | Path | None = None,
        check_affine: bool = True,
        workers: int | None = None,
    ) -> None:
        super().__init__(root, labels, channels, preprocessing, fingerprint, check_affine, workers)
        self.images, self.masks = str(images), str(masks)
        self.split_settings = split_settings or SplitSettings()
        if self.split_settings.split_files is not None:
            raise ValueError(f"split_files must be None for volumes, got {self.split_settings.split_files!r}")

    def _find_files(self) -> VolumeLayout:
        planes = self.labels.classes if self.labels.activation == "sigmoid" else ()
        return find_pairs(self.root, self.images, self.masks, planes, self.channels, self.split_settings)


def _size_if_readable(path: Path) -> tuple[int, ...]:
    try:
        return read_geometry(path).size
    except DataError:
        return (0, 0, 0)
