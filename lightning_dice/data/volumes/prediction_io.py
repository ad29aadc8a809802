"""NIfTI files as a network sees them, and masks that lie on them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.data.errors import DataError, DataProblem, SkippedWarning, combined_error
from lightning_dice.data.interfaces import LoadedImage, PredictionItem
from lightning_dice.data.label_map import LabelMap
from lightning_dice.data.volumes.dataset_summary import read_channels
from lightning_dice.data.volumes.file_layout import group_channels
from lightning_dice.data.volumes.nifti import (
    EXTENSIONS,
    Geometry,
    read_labels,
    read_volume,
    stem,
    volume_files,
    write_volume,
)
from lightning_dice.data.volumes.normalization import Intensities, normalized
from lightning_dice.data.volumes.resampling import Interpolation, zoomed_image, zoomed_size


@dataclass(frozen=True)
class Preparation:
    """How volumes become what the network sees: normalized, then at its spacing.

    Attributes:
        schemes: of normalization, for each channel.
        intensities: of each channel of the training cases; empty where no scheme needs them.
        spacing: mm along each axis; `None`: as they are.
        interpolation: of images.
    """

    schemes: tuple[str, ...]
    intensities: tuple[Intensities, ...] = ()
    spacing: tuple[float, ...] | None = None
    interpolation: Interpolation = "linear"

    def size(self, size: Sequence[int], spacing: Sequence[float]) -> tuple[int, ...]:
        """That of the image which the network sees."""
        return tuple(size) if self.spacing is None else zoomed_size(size, spacing, self.spacing)

    def image(self, channels: Sequence[NDArray[np.float32]], files: Sequence[Path], geometry: Geometry) -> Tensor:
        """Float32 `(channels, *space)` of what the files hold."""
        parts = []
        for index, (values, path) in enumerate(zip(channels, files, strict=True)):
            statistics = self.intensities[index] if self.intensities else None
            try:
                parts.append(torch.from_numpy(normalized(values, self.schemes[index], statistics)))
            except ValueError as refused:
                raise DataProblem(str(refused), path, "Choose another data.normalization.") from refused
        return zoomed_image(torch.stack(parts), self.size(geometry.size, geometry.spacing), self.interpolation)


def _wherever(case: str, path: Path) -> NDArray[Any]:
    return read_labels(path)[0]


@dataclass(frozen=True)
class VolumePredictionIO:
    """Reads NIfTI files as training does, and writes masks that lie on them in any viewer.

    Arrays in memory are in canonical orientation (RAS+); what is written has the axes, the affine and the header of the
    image, integers without scaling.

    Args:
        labels: the classes, and the values that they are written as.
        channels: files of a case.
        prepare: gives what is done to an image; called when the first is read, as it may need the fingerprint.
        stored: reads the label values of a case's mask that `load` asks for; by default wherever the mask lies.
    """

    labels: LabelMap
    channels: int
    prepare: Callable[[], Preparation]
    stored: Callable[[str, Path], NDArray[Any]] = _wherever

    def find(self, path: Path) -> list[PredictionItem]:
        """The cases of a folder and its sub-folders, or of a file, whose further channels are looked for beside it.

        Links to folders are told as `SkippedWarning`.

        Raises:
            DataError: there are none, or two would have masks of one name.
        """
        if path.is_file():
            group, problems = group_channels([path] if self.channels == 1 else volume_files(path.parent), self.channels)
            chosen = {case: files for case, files in group.items() if path in files}
            if not chosen:
                raise combined_error(
                    path.parent, [one for one in problems if one.where == path] or problems or [_no_volume(path)]
                )
            return [PredictionItem(case, files) for case, files in chosen.items()]
        if not path.is_dir():
            raise DataProblem("is neither a file nor a folder", path, "Name a NIfTI file, or a folder of them.")
        items: list[PredictionItem] = []
        wrong: list[DataProblem] = []
        for place, folders, _ in os.walk(path):
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
            for link in (Path(place, folder) for folder in folders if os.path.islink(Path(place, folder))):
                what = f"is a link to the folder {os.readlink(link)}; it was skipped"
                warnings.warn(
                    SkippedWarning(str(DataProblem(what, link, "Predict its volumes by themselves."))), stacklevel=2
                )
            group, problems = group_channels(volume_files(Path(place)), self.channels)
            below = Path(place).relative_to(path)
            items += [PredictionItem((below / case).as_posix(), files) for case, files in group.items()]
            wrong += [one for one in problems if self.channels == 1]
            # An incomplete case is told of when it is read, and does not keep the others from being predicted.
            partial = [Path(one.where) for one in problems if self.channels > 1]
            items += [PredictionItem((below / stem(one)).as_posix(), (one,)) for one in partial]
        if wrong:
            raise combined_error(path, wrong)
        if not items:
            raise _no_volume(path)
        return items

    def read(self, item: PredictionItem) -> LoadedImage:
        """An image, normalized and at the network's spacing.

        Raises:
            DataError: names the file, what is wrong with it and the remedy.
        """
        if len(item.files) != self.channels:
            names = ", ".join(path.name for path in item.files)
            what = f"its case has {len(item.files)} of {self.channels} channels: {names}"
            raise DataProblem(what, item.files[0], "Name them <case>_0000, <case>_0001 ...")
        channels, geometry = read_channels(item.files)
        image = self.prepare().image(channels, item.files, geometry)
        return LoadedImage(image, geometry.size, geometry.spacing, geometry)

    def names(self, case: str, format: str | None = None) -> list[Path]:
        """`<case>.nii.gz`, or `<class>/<case>.nii.gz` for classes that may overlap.

        Raises:
            DataError: for a format that cannot hold a volume with its geometry.
        """
        if format not in (None, "nifti"):
            raise DataError(f"format must be nifti for volumes, got {format}: leave it out")
        folders = self.labels.classes if self.labels.folders else ("",)
        return [Path(folder, f"{case}.nii.gz") for folder in folders]

    def write(self, folder: Path, case: str, labels: Tensor, scan: LoadedImage, format: str | None = None) -> None:
        """Write a mask in the geometry of its image, with the values that the training's masks had."""
        _check_size("labels", labels, scan)
        for name, values in zip(self.names(case, format), self.labels.decode(labels), strict=True):
            write_volume(folder / name, values, scan.origin)

    def write_probabilities(self, folder: Path, case: str, probs: Tensor, scan: LoadedImage) -> list[Path]:
        """Write probabilities `(classes, *size)` as the fourth axis of a NIfTI file, float32."""
        _check_size("probs", probs, scan)
        path = folder / f"{case}.nii.gz"
        write_volume(path, np.moveaxis(probs.cpu().numpy().astype(np.float32), 0, -1), scan.origin)
        return [path]

    def load_probabilities(self, folder: Path, case: str) -> Tensor | None:
        """What `write_probabilities` wrote, in canonical orientation: float32 `(classes, *size)`; `None`: nothing.

        Raises:
            DataError: it cannot be read, or has another number of classes.
        """
        path = folder / f"{case}.nii.gz"
        if not path.is_file():
            return None
        values, _ = read_volume(path, channels=True)
        if len(values) != len(self.labels.classes):
            raise DataProblem(f"holds {len(values)} classes, {len(self.labels.classes)} are required", path)
        return torch.from_numpy(np.ascontiguousarray(values, np.float32))

    def load(self, folder: Path, case: str) -> Tensor:
        """A mask that `write` wrote: class ids or planes, in canonical orientation.

        Raises:
            DataError: it is not there, is there twice, holds what no class is written as, or `stored` refuses it.
        """
        stored = []
        for name in self.names(case):
            found = [folder / name.with_name(Path(case).name + ending) for ending in EXTENSIONS]
            there = [path for path in found if path.exists()]
            if len(there) > 1:
                raise DataProblem(
                    f"is there twice: {', '.join(path.name for path in there)}", there[0], "Keep one of them."
                )
            path = there[0] if there else folder / name
            stored.append(self.stored(case, path))
        try:
            return self.labels.encode(stored)
        except ValueError as wrong:
            raise DataProblem(str(wrong), folder / self.names(case)[0], "Is it a mask of this run?") from wrong


def _check_size(name: str, tensor: Tensor, scan: LoadedImage) -> None:
    if tuple(tensor.shape[-len(scan.size) :]) != tuple(scan.size):
        raise ValueError(f"{name} must have the space axes of the scan, {tuple(scan.size)}, got {tuple(tensor.shape)}")


def _no_volume(path: Path) -> DataProblem:
    inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) if path.is_dir() else ""
    there = f"; there is {inside or 'nothing'}" if path.is_dir() else ""
    return DataProblem(f"holds no NIfTI file ({' '.join(EXTENSIONS)}){there}", path, "Name a folder of volumes.")
