"""NIfTI files to arrays in canonical orientation, and back into the file's own geometry.

In memory the axes of a volume run from left to right, posterior to anterior and inferior to superior (RAS+), as nearly
as the file's affine says: an exact permutation and flip of axes, without interpolation, which writing undoes. nibabel
reads and writes.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_dice.data.errors import DataProblem
from lightning_dice.io import write_atomically

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

EXTENSIONS = (".nii.gz", ".nii")
MAX_VOXELS = 2**31  # in one file: 8 GiB of float32; a header may ask for any number
GRID_TOLERANCE = 0.1  # voxels, by which the corners of two files that lie on each other may differ
_RAS = np.array([[0, 1], [1, 1], [2, 1]])
WHOLE = 1e-3  # by which a label may miss a whole number: a header's slope and intercept are rounded
_MILLIMETERS = {1: 1000.0, 3: 0.001}  # by the unit's code: metres, micrometres; all others are mm, or not known


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a file lie.

    Attributes:
        path: the file.
        shape: its three space axes, as stored.
        affine: voxel indices, as stored, to world coordinates, 4x4, row by row.
        unit: length of a world unit in mm.
        kind: the type of the stored values in words, such as `int16`.
    """

    path: Path
    shape: tuple[int, ...]
    affine: tuple[tuple[float, ...], ...]
    unit: float = 1.0
    kind: str = ""

    @cached_property
    def orientation(self) -> NDArray[Any]:
        """Nibabel's description of how the stored axes are permuted and flipped against RAS+."""
        from nibabel.orientations import io_orientation

        return np.asarray(io_orientation(np.array(self.affine)))

    @cached_property
    def _canonical_affine(self) -> NDArray[np.float64]:
        from nibabel.orientations import inv_ornt_aff

        return np.asarray(np.array(self.affine) @ inv_ornt_aff(self.orientation, self.shape))

    @cached_property
    def size(self) -> tuple[int, ...]:
        """The space axes in canonical orientation."""
        size = np.zeros(3, int)
        size[self.orientation[:, 0].astype(int)] = self.shape
        return tuple(int(length) for length in size)

    @cached_property
    def spacing(self) -> tuple[float, ...]:
        """Distance between neighbouring voxels along each canonical axis, in mm, to a nanometre."""
        lengths = np.sqrt(np.square(self._canonical_affine[:3, :3]).sum(0)) * self.unit
        return tuple(round(float(length), 6) for length in lengths)

    @property
    def axes(self) -> str:
        """The stored axes in letters: `LPS` run to the left, to the back and up."""
        from nibabel.orientations import ornt2axcodes

        return "".join(ornt2axcodes(self.orientation))

    def differs(self, other: Geometry) -> str:
        """In words, how this grid of voxels is another than `other`; empty where they lie on each other.

        Axes stored in another order, or the other way round, make no difference where the affine tells of it.
        """
        if self.size != other.size and self.shape == other.shape:
            return f"has axes along {self.axes} by its affine, but {other.path.name} along {other.axes}"
        if self.size != other.size:
            mine, its = "x".join(map(str, self.shape)), "x".join(map(str, other.shape))
            return f"is {mine}, but {other.path.name} is {its}"
        corners = np.array(np.meshgrid(*[(0, length - 1) for length in self.size], indexing="ij")).reshape(3, -1)
        corners = np.vstack([corners, np.ones(corners.shape[1])])
        apart = np.abs((self._canonical_affine - other._canonical_affine) @ corners)[:3].max()
        voxels = float(apart * self.unit / min(self.spacing))
        if voxels <= GRID_TOLERANCE:
            return ""
        return f"lies elsewhere than {other.path.name}: the affines put its corners {voxels:.3g} voxels apart"


def read_geometry(path: Path) -> Geometry:
    """The geometry, from the header alone.

    Raises:
        DataError: names the file and what is wrong with it.
    """
    return _header(path)[0]


def read_volume(path: Path, channels: bool = False) -> tuple[NDArray[Any], Geometry]:
    """The values of a file, scaled as its header says, in canonical orientation, and its geometry.

    A compressed file is read to its end, so that its checksum is compared.

    Args:
        path: of the file.
        channels: it may have a fourth axis.

    Returns:
        Integers or floats, `(*space)`, with channels `(channels, *space)`, and the geometry.

    Raises:
        DataError: names the file, where it is empty, truncated, damaged, no NIfTI, not of three axes or too large.
    """
    from nibabel.orientations import apply_orientation

    geometry, image = _header(path, channels)
    proxy: Any = image.dataobj
    wanted = proxy.offset + int(np.prod(image.shape)) * image.get_data_dtype().itemsize
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            data = file.read(wanted)
            if len(data) == wanted:
                file.read(1)  # At its end, gzip compares the checksum.
        if len(data) < wanted:
            raise DataProblem(
                f"is truncated: {wanted} bytes of data expected, {len(data)} found", path, "Copy it again."
            )
        values = np.asanyarray(type(image).from_bytes(data).dataobj).reshape(*geometry.shape, -1)
    except DataProblem:
        raise
    except Exception as error:  # zlib.error, EOFError, OSError ...
        raise _unreadable(path, error) from error
    values = np.moveaxis(apply_orientation(values, geometry.orientation), -1, 0)
    return np.asarray(values if channels else values[0]), geometry


def read_labels(path: Path) -> tuple[NDArray[Any], Geometry]:
    """Label values, which may be stored as floats if they are whole numbers: integers `(*space)`, and the geometry.

    Raises:
        DataError: as for `read_volume`, and for fractions.
    """
    values, geometry = read_volume(path)
    if values.dtype.kind == "f":
        whole = np.rint(np.nan_to_num(values))
        strange = ~np.isfinite(values) | (np.abs(values - whole) > WHOLE)
        if strange.any():
            shown = ", ".join(f"{value:.9g}" for value in np.unique(values[strange])[:4])
            what = f"holds {int(strange.sum())} voxels that are no whole numbers ({shown}), labels are required"
            raise DataProblem(what, path, "Resample masks by nearest neighbour, and save whole numbers.")
        values = whole.astype(np.int64)
    return values, geometry


def turned(values: NDArray[Any], own: Geometry, other: Geometry) -> NDArray[Any]:
    """Values of a file of geometry `own`, in canonical orientation, as they would be read with the affine of `other`.

    The shapes, as stored, must be equal.
    """
    from nibabel.orientations import apply_orientation, ornt_transform

    stored = apply_orientation(values, ornt_transform(_RAS, own.orientation))
    return np.asarray(apply_orientation(stored, other.orientation))


def write_volume(path: Path, values: NDArray[Any], geometry: Geometry) -> None:
    """Write values in the geometry of the file that they were made from, with its header, whole or not at all.

    Args:
        path: `.nii.gz` or `.nii`.
        values: `(*space)` or `(*space, channels)` in canonical orientation; stored in their own type, without scaling.
        geometry: of a file that is still there, for the rest of its header.

    Raises:
        DataError: the file that `geometry` is of cannot be read any more, or is another one now.
    """
    from nibabel.orientations import apply_orientation, ornt_transform

    now, image = _header(geometry.path)
    if (now.shape, now.affine) != (geometry.shape, geometry.affine):
        raise DataProblem("has changed since it was read", geometry.path, "Keep the images in their place.")
    stored = apply_orientation(values, ornt_transform(_RAS, geometry.orientation))
    header = image.header.copy()
    header.extensions.clear()  # They tell of the image's intensities, or its patient.
    header.set_data_dtype(stored.dtype)
    header["cal_min"] = header["cal_max"] = 0
    written = type(image)(np.ascontiguousarray(stored), np.array(geometry.affine), header)
    data = written.to_bytes()

    def write(part: Path) -> None:
        # No time in the file: the same mask gives the same bytes.
        part.write_bytes(gzip.compress(data, compresslevel=4, mtime=0) if path.name.endswith(".gz") else data)

    write_atomically(path, write)


def stem(path: Path) -> str:
    """A file's name without `.nii` or `.nii.gz`.

    >>> stem(Path("scans/case.1.nii.gz"))
    'case.1'
    """
    name = path.name
    ending = next((end for end in EXTENSIONS if name.lower().endswith(end)), "")
    return name[: len(name) - len(ending)] if ending else path.stem


def volume_files(folder: Path) -> list[Path]:
    """The NIfTI files right in a folder, sorted; hidden files, and others, are passed over."""
    names = sorted(
        entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(EXTENSIONS) and entry.name[0] != "."
    )
    return [path for path in (folder / name for name in names) if not path.is_dir()]


def _header(path: Path, channels: bool = False) -> tuple[Geometry, Nifti1Image]:
    import nibabel
    from nibabel.nifti1 import Nifti1Image

    try:
        if path.stat().st_size == 0:
            raise DataProblem("is empty (0 bytes)", path, "Copy it again or remove it.")
        image = nibabel.load(path)
    except FileNotFoundError as error:
        target = f"; it is a link to {os.readlink(path)}" if path.is_symlink() else ""
        raise DataProblem(f"is not there{target}", path, "Copy the file there.") from error
    except DataProblem:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    if not isinstance(image, Nifti1Image):  # Nifti2Image is one, too.
        raise DataProblem(f"is a {type(image).__name__}, NIfTI is required", path, "Save it as .nii.gz.")
    shape = tuple(int(length) for length in image.shape)
    shown = "x".join(map(str, shape))
    space = shape[:3]
    if len(shape) < 3 or any(length != 1 for length in shape[3 + channels :]):
        remedy = "Save each channel or time as a file of its own: case_0000.nii.gz, case_0001.nii.gz."
        raise DataProblem(f"has {len(shape)} axes ({shown}), a volume of 3 is required", path, remedy)
    if min(space) < 2:
        remedy = "Stack the slices to a volume, or save them as PNG or TIFF for data=folder."
        raise DataProblem(f"is a single slice ({shown}), a volume is required", path, remedy)
    if np.prod(shape, dtype=np.float64) > MAX_VOXELS:
        remedy = "If it is what it should be, cut it into parts or raise lightning_dice.data.volumes.nifti.MAX_VOXELS."
        raise DataProblem(f"may be a decompression bomb: {shown} voxels, more than {MAX_VOXELS}", path, remedy)
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise DataProblem(f"holds {dtype} values, integers or floats are required", path, "Save each part by itself.")
    affine = np.asarray(image.affine, np.float64)
    geometry = Geometry(
        path,
        space,
        tuple(tuple(row) for row in affine.tolist()),
        _MILLIMETERS.get(int(image.header["xyzt_units"]) & 7, 1.0),
        str(dtype.newbyteorder("=")),
    )
    fine = np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 0
    if not fine or not np.isfinite(geometry.orientation).all():
        what = f"has an affine by which its axes span no volume: {affine[:3].round(3).tolist()}"
        raise DataProblem(what, path, "Write the right one, for instance with nibabel.")
    return geometry, image


def _unreadable(path: Path, error: Exception) -> DataProblem:
    try:
        with path.open("rb") as file:
            start = file.read(40)
    except OSError as refused:
        return DataProblem(f"cannot be opened ({refused.strerror})", path)
    if start.startswith(b"version https://git-lfs"):
        return DataProblem("is a Git LFS pointer, not the volume", path, "Fetch the volumes with `git lfs pull`.")
    if path.name.lower().endswith(".gz") and start[:2] != b"\x1f\x8b":
        what = f"is not compressed, though it is named .gz: it begins with {start[:8]!r}"
        return DataProblem(what, path, "Name it .nii if it is NIfTI.")
    reason = " ".join(str(error).split())
    return DataProblem(
        f"cannot be read as NIfTI ({type(error).__name__}: {reason})", path, "Copy it again or remove it."
    )
