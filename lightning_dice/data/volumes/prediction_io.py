"""Reading NIfTI files for prediction, and writing masks in their geometry."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.data.errors import DataError, DataProblem, SkippedWarning, combined_error
from lightning_dice.data.file_names import file_stem
from lightning_dice.data.interfaces import Cases, LoadedImage, PredictionIO, PredictionItem
from lightning_dice.data.label_map import LabelMap
from lightning_dice.data.volumes.file_layout import group_channels
from lightning_dice.data.volumes.nifti import (
    EXTENSIONS,
    read_channels,
    read_labels,
    read_volume,
    volume_files,
    write_volume,
)
from lightning_dice.data.volumes.preprocessing import Preprocessor


def _read_any_mask(case: str, path: Path) -> NDArray[Any]:
    return read_labels(path)[0]


@dataclass(frozen=True)
class VolumePredictionIO(PredictionIO):
    """Reads NIfTI files as training does, and writes masks that match them in any viewer.

    Arrays in memory are in canonical orientation (RAS+). Written files have the axes, the affine and the header of the
    image, and hold integers without scaling.

    Args:
        labels: the classes, and the values that they are written as.
        channels: number of files of a case.
        make_preprocessor: returns the preprocessor of images; called when the first image is read, since it may need
            the fingerprint.
        read_mask: reads the label values of a file, for `load`; takes the case and the file. By default it accepts
            any geometry.

    >>> import nibabel, tempfile
    >>> labels = LabelMap.of_ids(["background", "liver"])
    >>> reader = VolumePredictionIO(labels, 1, lambda: Preprocessor(("zscore",)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     nibabel.save(nibabel.Nifti1Image(np.eye(3)[None] * np.ones((3, 1, 1)), np.eye(4)), Path(folder, "a.nii"))
    ...     (item,) = reader.find(Path(folder))
    ...     loaded = reader.read(item)
    ...     reader.write(Path(folder, "masks"), item.case, (loaded.image[0] > 0).byte(), loaded)
    ...     reader.load(Path(folder, "masks"), item.case)[0]
    tensor([[1, 0, 0],
            [0, 1, 0],
            [0, 0, 1]], dtype=torch.uint8)
    """

    labels: LabelMap
    channels: int
    make_preprocessor: Callable[[], Preprocessor]
    read_mask: Callable[[str, Path], NDArray[Any]] = _read_any_mask

    def with_options(self, *, follow_symlinks: bool, large: int) -> VolumePredictionIO:
        """Return `self`: links are not followed, and volumes are read whole."""
        return self

    def for_cases(self, cases: Cases) -> VolumePredictionIO:
        """Return a copy whose `load` refuses masks with another affine than the case's image."""
        read_mask = getattr(cases, "read_mask", None)
        return self if read_mask is None else replace(self, read_mask=read_mask)

    def preprocessing(self) -> Preprocessor:
        """Return how volumes are normalized and resampled, which may read the fingerprint of the training cases."""
        return self.make_preprocessor()

    def find(self, path: Path) -> list[PredictionItem]:
        """Find the cases of a folder and its sub-folders, or the case of a file, with the other channels beside it.

        Links to folders are skipped, with a `SkippedWarning`.

        Raises:
            DataError: there are none, or two would have masks of the same name.
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
                    SkippedWarning(str(DataProblem(what, link, "Predict its volumes separately."))), stacklevel=2
                )
            group, problems = group_channels(volume_files(Path(place)), self.channels)
            below = Path(place).relative_to(path)
            items += [PredictionItem((below / case).as_posix(), files) for case, files in group.items()]
            wrong += [one for one in problems if self.channels == 1]
            # Incomplete cases fail when they are read, so that the others are predicted.
            partial = [Path(one.where) for one in problems if self.channels > 1]
            items += [PredictionItem((below / file_stem(one, EXTENSIONS)).as_posix(), (one,)) for one in partial]
        if wrong:
            raise combined_error(path, wrong)
        if not items:
            raise _no_volume(path)
        return items

    def read(self, item: PredictionItem) -> LoadedImage:
        """Read an image, normalized and at the network's spacing.

        Raises:
            DataError: names the file, what is wrong with it and the remedy.
        """
        if len(item.files) != self.channels:
            names = ", ".join(path.name for path in item.files)
            what = f"its case has {len(item.files)} of {self.channels} channels: {names}"
            raise DataProblem(what, item.files[0], "Name them <case>_0000, <case>_0001 ...")
        channels, geometry = read_channels(item.files)
        image = self.make_preprocessor()(channels, item.files, geometry)
        return LoadedImage(image, geometry.size, geometry.spacing, geometry)

    def names(self, case: str, format: str | None = None) -> list[Path]:
        """Return `<case>.nii.gz`, or `<class>/<case>.nii.gz` for each of several overlapping classes.

        Raises:
            DataError: the format cannot hold a volume with its geometry.
        """
        if format not in (None, "nifti"):
            raise DataError(f"format must be nifti for volumes, got {format}: leave it out")
        folders = self.labels.classes if self.labels.folders else ("",)
        return [Path(folder, f"{case}.nii.gz") for folder in folders]

    def write(self, folder: Path, case: str, labels: Tensor, scan: LoadedImage, format: str | None = None) -> None:
        """Write a mask in the geometry of its image, with the values that the training masks had."""
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
        """Load what `write_probabilities` wrote, in canonical orientation; `None` if there is no such file.

        Returns:
            Float32 `(classes, *size)`.

        Raises:
            DataError: it cannot be read, or has another number of classes.
        """
        path = folder / f"{case}.nii.gz"
        if not path.is_file():
            return None
        values, _ = read_volume(path, channels=True)
        if len(values) != len(self.labels.classes):
            raise DataProblem(f"holds {len(values)} classes, but {len(self.labels.classes)} are required", path)
        return torch.from_numpy(np.ascontiguousarray(values, np.float32))

    def load(self, folder: Path, case: str) -> Tensor:
        """Load a mask that `write` wrote: class ids or planes, in canonical orientation.

        Raises:
            DataError: it does not exist, exists as `.nii` and as `.nii.gz`, holds values of no class, or `read_mask`
                refuses it.
        """
        stored = []
        for name in self.names(case):
            found = [folder / name.with_name(Path(case).name + ending) for ending in EXTENSIONS]
            there = [path for path in found if path.exists()]
            if len(there) > 1:
                twice = ", ".join(path.name for path in there)
                raise DataProblem(f"exists twice: {twice}", there[0], "Keep one of them.")
            path = there[0] if there else folder / name
            stored.append(self.read_mask(case, path))
        try:
            return self.labels.encode(stored)
        except ValueError as wrong:
            raise DataProblem(str(wrong), folder / self.names(case)[0], "Is it a mask of this run?") from wrong


def _check_size(name: str, tensor: Tensor, scan: LoadedImage) -> None:
    if tuple(tensor.shape[-len(scan.size) :]) != tuple(scan.size):
        raise ValueError(f"{name} must have the space axes of the image, {tuple(scan.size)}, got {tuple(tensor.shape)}")


def _no_volume(path: Path) -> DataProblem:
    inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) if path.is_dir() else ""
    there = f"; it holds {inside or 'nothing'}" if path.is_dir() else ""
    return DataProblem(f"holds no NIfTI file ({' '.join(EXTENSIONS)}){there}", path, "Name a folder of volumes.")
