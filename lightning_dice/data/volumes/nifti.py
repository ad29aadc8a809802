"""Reading NIfTI files into canonical orientation, and writing them in the geometry of the original file.

In memory the axes of a volume run from left to right, posterior to anterior and inferior to superior (RAS+), as closely
as the file's affine allows: axes are permuted and flipped, never interpolated, and writing undoes this exactly.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_dice.data.errors import DataProblem
from lightning_dice.extras import require
from lightning_dice.io import write_atomically

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

EXTENSIONS = (".nii.gz", ".nii")
MAX_VOXELS = 2**31  # in one file: 8 GiB of float32; a damaged header may claim any number
GRID_TOLERANCE = 0.1  # voxels, by which the corners of two matching files may differ
_RAS = np.array([[0, 1], [1, 1], [2, 1]])
INTEGER_TOLERANCE = 1e-3  # of labels stored as floats: the slope and intercept of a header are rounded
_MILLIMETERS = {1: 1000.0, 3: 0.001}  # by unit code: metres, micrometres; all others are mm or unknown


@dataclass(frozen=True)
class Geometry:
    """The position of a file's voxels in the world.

    Attributes:
        path: the file.
        shape: its three space axes, as stored.
        affine: maps stored voxel indices to world coordinates; 4x4, row by row.
        unit: length of a world unit in mm.
        kind: the type of the stored values, such as `int16`.

    >>> geometry = Geometry(Path("a.nii"), (4, 5, 6), ((0, -2, 0, 9), (1, 0, 0, 0), (0, 0, 3, 0), (0, 0, 0, 1)))
    >>> geometry.axes, geometry.size, geometry.spacing
    ('ALS', (5, 4, 6), (2.0, 1.0, 3.0))
    """

    path: Path
    shape: tuple[int, ...]
    affine: tuple[tuple[float, ...], ...]
    unit: float = 1.0
    kind: str = ""

    @cached_property
    def orientation(self) -> NDArray[Any]:
        """How the stored axes are permuted and flipped relative to RAS+, in nibabel's form."""
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
        """The directions of the stored axes: `LPS` run to the left, to the back and up."""
        from nibabel.orientations import ornt2axcodes

        return "".join(ornt2axcodes(self.orientation))

    def describe_difference(self, other: Geometry) -> str:
        """Describe how this voxel grid differs from `other`; empty if they match in the world.

        Axes that are stored in another order or direction match if the affines account for it.
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
        return f"is not aligned with {other.path.name}: their affines put its corners {voxels:.3g} voxels apart"


def read_geometry(path: Path) -> Geometry:
    """Read the geometry of a file from its header.

    Raises:
        DataError: names the file and what is wrong with it.

    >>> import nibabel, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.nii"
    ...     nibabel.save(nibabel.Nifti1Image(np.zeros((2, 3, 4), np.uint8), np.diag([1, 1, 2, 1])), path)
    ...     read_geometry(path).size, read_geometry(path).spacing, read_geometry(path).kind
    ((2, 3, 4), (1.0, 1.0, 2.0), 'uint8')
    """
    return _header(path)[0]


def read_volume(path: Path, channels: bool = False) -> tuple[NDArray[Any], Geometry]:
    """Read the values of a file in canonical orientation, scaled by its header, and its geometry.

    Compressed files are read to the end, so that gzip verifies the checksum.

    Args:
        path: the file.
        channels: whether to allow a fourth axis, of channels.

    Returns:
        Integers or floats, `(*space)`, or `(channels, *space)` with `channels`; and the geometry.

    Raises:
        DataError: the file is empty, truncated, damaged, not NIfTI, without three axes or too large; names the file.

    >>> import nibabel, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.nii.gz"
    ...     stored = np.arange(8, dtype=np.int16).reshape(2, 2, 2)
    ...     nibabel.save(nibabel.Nifti1Image(stored, np.diag([-1, 1, 2, 1])), path)
    ...     values, geometry = read_volume(path)
    >>> values.tolist(), geometry.spacing, geometry.axes
    ([[[4, 5], [6, 7]], [[0, 1], [2, 3]]], (1.0, 1.0, 2.0), 'LAS')
    """
    from nibabel.orientations import apply_orientation

    geometry, image = _header(path, channels)
    proxy: Any = image.dataobj
    wanted = proxy.offset + int(np.prod(image.shape)) * image.get_data_dtype().itemsize
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            data = file.read(wanted)
            if len(data) == wanted:
                file.read(1)  # gzip verifies the checksum at the end of the file.
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
    """Read integer labels `(*space)` and the geometry of a mask, which may be stored as floats of whole numbers.

    Raises:
        DataError: as for `read_volume`, or labels are not whole numbers.

    >>> import nibabel, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.nii"
    ...     nibabel.save(nibabel.Nifti1Image(np.ones((2, 2, 2), np.float32), np.eye(4)), path)
    ...     read_labels(path)[0].flatten()
    array([1, 1, 1, 1, 1, 1, 1, 1])
    """
    values, geometry = read_volume(path)
    if values.dtype.kind == "f":
        whole = np.rint(np.nan_to_num(values))
        strange = ~np.isfinite(values) | (np.abs(values - whole) > INTEGER_TOLERANCE)
        if strange.any():
            shown = ", ".join(f"{value:.9g}" for value in np.unique(values[strange])[:4])
            what = f"holds {int(strange.sum())} voxels that are not whole numbers ({shown}), but labels are required"
            raise DataProblem(what, path, "Resample masks by nearest neighbour, and save whole numbers.")
        values = whole.astype(np.int64)
    return values, geometry


def read_channels(files: Sequence[Path]) -> tuple[list[NDArray[np.float32]], Geometry]:
    """Read the channels of a case in canonical orientation, and the geometry that they share.

    Raises:
        DataError: a file cannot be read, holds NaN or infinite values, or has another voxel grid than the first.

    >>> import nibabel, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files = [Path(folder) / f"a_{number:04d}.nii" for number in range(2)]
    ...     for path in files:
    ...         nibabel.save(nibabel.Nifti1Image(np.zeros((2, 3, 4), np.int16), np.eye(4)), path)
    ...     [channel.shape for channel in read_channels(files)[0]]
    [(2, 3, 4), (2, 3, 4)]
    """
    channels: list[NDArray[np.float32]] = []
    first: Geometry | None = None
    for path in files:
        values, geometry = read_volume(path)
        if first is not None and (what := geometry.describe_difference(first)):
            raise DataProblem(what, path, "Resample the channels of a case to one grid.")
        first = first or geometry
        with np.errstate(over="ignore"):  # A float64 beyond float32 becomes inf, which is refused.
            channel = np.ascontiguousarray(values, dtype=np.float32)
        count = channel.size - int(np.isfinite(channel).sum())
        if count:
            raise DataProblem(f"holds {count} voxels that are not finite (NaN or infinite)", path, "Fill them first.")
        channels.append(channel)
    if first is None:
        raise ValueError("files must name at least one")
    return channels, first


def read_mask(path: Path, geometry: Geometry, *, check_affine: bool = True) -> NDArray[Any]:
    """Read the stored label values of a mask, in the orientation of its image.

    Args:
        path: the mask.
        geometry: the image's geometry.
        check_affine: require that the affines match. If not, masks of the image's shape get the image's affine.

    Raises:
        DataError: it cannot be read, holds fractions, or has another voxel grid than the image.

    >>> import nibabel, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     image, mask = Path(folder) / "image.nii", Path(folder) / "mask.nii"
    ...     nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)), image)
    ...     nibabel.save(nibabel.Nifti1Image(np.ones((2, 2, 2), np.uint8), np.eye(4)), mask)
    ...     int(read_mask(mask, read_geometry(image)).sum())
    8
    """
    values, own = read_labels(path)
    what = own.describe_difference(geometry)
    if what and not check_affine and own.shape == geometry.shape:
        return reorient(values, own, geometry)
    if what:
        remedy = "Resample the mask to its image by nearest neighbour."
        if own.shape == geometry.shape:
            remedy = "Give the mask its image's affine; if they match voxel by voxel, set data.check_affine=false."
        raise DataProblem(what, path, remedy)
    return values


def reorient(values: NDArray[Any], source: Geometry, target: Geometry) -> NDArray[Any]:
    """Return values read with the affine of `source` as they would be read with that of `target`.

    The stored shapes must be equal.

    >>> ras = Geometry(Path("a.nii"), (2, 2, 2), ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)))
    >>> las = Geometry(Path("b.nii"), (2, 2, 2), ((-1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)))
    >>> reorient(np.arange(8).reshape(2, 2, 2), ras, las).tolist()
    [[[4, 5], [6, 7]], [[0, 1], [2, 3]]]
    """
    from nibabel.orientations import apply_orientation, ornt_transform

    stored = apply_orientation(values, ornt_transform(_RAS, source.orientation))
    return np.asarray(apply_orientation(stored, target.orientation))


def write_volume(path: Path, values: NDArray[Any], geometry: Geometry) -> None:
    """Write values in the geometry of another file and with its header, atomically.

    Args:
        path: `.nii.gz` or `.nii`.
        values: `(*space)` or `(*space, channels)` in canonical orientation; stored in their own type, without scaling.
        geometry: the other file's geometry; that file must still exist.

    Raises:
        DataError: the other file cannot be read any more, or has changed.

    >>> import nibabel, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     image, mask = Path(folder) / "image.nii", Path(folder) / "mask.nii"
    ...     nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.diag([-1, 1, 1, 1])), image)
    ...     write_volume(mask, np.arange(8, dtype=np.uint8).reshape(2, 2, 2), read_geometry(image))
    ...     np.asarray(nibabel.load(mask).dataobj).tolist()
    [[[4, 5], [6, 7]], [[0, 1], [2, 3]]]
    """
    from nibabel.orientations import apply_orientation, ornt_transform

    now, image = _header(geometry.path)
    if (now.shape, now.affine) != (geometry.shape, geometry.affine):
        raise DataProblem("has changed since it was read", geometry.path, "Keep the images in their place.")
    stored = apply_orientation(values, ornt_transform(_RAS, geometry.orientation))
    header = image.header.copy()
    header.extensions.clear()  # They describe the image's intensities, or its patient.
    header.set_data_dtype(stored.dtype)
    header["cal_min"] = header["cal_max"] = 0
    written = type(image)(np.ascontiguousarray(stored), np.array(geometry.affine), header)
    data = written.to_bytes()

    def write(part: Path) -> None:
        # Without a time in the file, equal masks are equal bytes.
        part.write_bytes(gzip.compress(data, compresslevel=4, mtime=0) if path.name.endswith(".gz") else data)

    write_atomically(path, write)


def volume_files(folder: Path) -> list[Path]:
    """Return the NIfTI files directly in a folder, sorted, without hidden ones.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("b.nii.gz", "a.NII", "._b.nii.gz", "notes.txt"):
    ...         Path(folder, name).touch()
    ...     [path.name for path in volume_files(Path(folder))]
    ['a.NII', 'b.nii.gz']
    """
    names = sorted(
        entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(EXTENSIONS) and entry.name[0] != "."
    )
    return [path for path in (folder / name for name in names) if not path.is_dir()]


def _header(path: Path, channels: bool = False) -> tuple[Geometry, Nifti1Image]:
    require("nibabel", needed_by=str(path))
    import nibabel
    from nibabel.nifti1 import Nifti1Image

    try:
        if path.stat().st_size == 0:
            raise DataProblem("is empty (0 bytes)", path, "Copy it again or remove it.")
        image = nibabel.load(path)
    except FileNotFoundError as error:
        target = f"; it is a link to {os.readlink(path)}" if path.is_symlink() else ""
        raise DataProblem(f"does not exist{target}", path, "Copy the file there.") from error
    except DataProblem:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    if not isinstance(image, Nifti1Image):  # Nifti2Image is one, too.
        raise DataProblem(f"is a {type(image).__name__}, but NIfTI is required", path, "Save it as .nii.gz.")
    shape = tuple(int(length) for length in image.shape)
    shown = "x".join(map(str, shape))
    space = shape[:3]
    if len(shape) < 3 or any(length != 1 for length in shape[3 + channels :]):
        remedy = "Save each channel or time point as a separate file: case_0000.nii.gz, case_0001.nii.gz."
        raise DataProblem(f"has {len(shape)} axes ({shown}), but a volume of 3 is required", path, remedy)
    if min(space) < 2:
        remedy = "Stack the slices to a volume, or save them as PNG or TIFF for data=folder."
        raise DataProblem(f"is a single slice ({shown}), but a volume is required", path, remedy)
    if np.prod(shape, dtype=np.float64) > MAX_VOXELS:
        remedy = "If it is correct, cut it into parts or raise lightning_dice.data.volumes.nifti.MAX_VOXELS."
        raise DataProblem(f"may be a decompression bomb: {shown} voxels, more than {MAX_VOXELS}", path, remedy)
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        what = f"holds {dtype} values, but integers or floats are required"
        raise DataProblem(what, path, "Save each part separately.")
    affine = np.asarray(image.affine, np.float64)
    geometry = Geometry(
        path,
        space,
        tuple(tuple(row) for row in affine.tolist()),
        _MILLIMETERS.get(int(image.header["xyzt_units"]) & 7, 1.0),
        str(dtype.newbyteorder("=")),
    )
    invertible = np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 0
    if not invertible or not np.isfinite(geometry.orientation).all():
        what = f"has an affine whose axes span no volume: {affine[:3].round(3).tolist()}"
        raise DataProblem(what, path, "Write the correct one, for instance with nibabel.")
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
        what = f"is named .gz but is not compressed: it begins with {start[:8]!r}"
        return DataProblem(what, path, "Name it .nii if it is NIfTI.")
    reason = " ".join(str(error).split())
    return DataProblem(
        f"cannot be read as NIfTI ({type(error).__name__}: {reason})", path, "Copy it again or remove it."
    )
