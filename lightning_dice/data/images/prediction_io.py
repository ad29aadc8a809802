"""Pictures in, masks out: what prediction and evaluation from files ask of 2D data."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_dice.data.errors import DataError, DataProblem, FileWarning, SkippedWarning
from lightning_dice.data.file_names import EXTENSIONS
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import FORMATS, NUMPY, PNG, TIFF, Picture, read_bytes, read_picture
from lightning_dice.data.images.mask_format import MaskFormat
from lightning_dice.data.images.windowed_tiff import LARGE, open_large
from lightning_dice.data.interfaces import LoadedImage, PredictionItem
from lightning_dice.io import write_atomically

SUFFIXES = {"png": ".png", "tiff": ".tif"}
KINDS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "NumPy": (".npy",),
}
TILE = 512  # pixels


class Origin(NamedTuple):
    """What a mask is written by, of the picture it belongs to.

    Attributes:
        path: of the picture.
        large: it is read by windows.
    """

    path: Path
    large: bool


@dataclass(frozen=True)
class ImagePredictionIO:
    """Reads PNG, JPEG, BMP, TIFF and NumPy files as training does, and writes masks that training could read.

    **Geometry.** A mask lies on the picture as it is shown: where an EXIF or TIFF orientation tag turns a picture, the
    mask is written turned, without a tag, as masks of training images are expected to be.

    **Values.** A written mask is one that the training's settings read back: gray values or, with colours, the colours
    that stand for the ids. Where several values mean one id, the first of `values` is written; of the background 0.
    Classes that may overlap (sigmoid, more than one) have a folder each, named as the class, with masks of
    two values; those that exclude each other are ids in one file, even where training's have a file for each.

    **Large pictures.** A TIFF of more than `large` pixels is not decoded: `LoadedImage.image` is then a
    `lightning_dice.data.images.windowed_tiff.LargeImage`, and its mask is written as a tiled TIFF unless another format
    is asked for.

    Args:
        mask_format: the classes, and how the training's masks are stored.
        image_format: what the network gets of a picture.
        follow_symlinks: whether `find` reads what links that lead out of the folder point to. Those that it does not read
            are told as `SkippedWarning`, links to folders that are read already as `FileWarning`.
        large: pixels, beyond which a TIFF is read by windows; at most `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        DataError: a class has no value in the training's masks, so that none can be written.

    >>> import tempfile
    >>> import torch
    >>> reader = ImagePredictionIO(MaskFormat(["lesion"], "sigmoid", label_map={255: 1}), ImageFormat(channels=1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("L", (3, 2), 128).save(Path(folder) / "a.png")
    ...     (item,) = reader.find(Path(folder))
    ...     scan = reader.read(item)
    ...     labels = torch.tensor([[[True, False, False], [False, False, True]]])
    ...     reader.write(Path(folder) / "masks", item.case, labels, scan)
    ...     stored = np.asarray(Image.open(Path(folder) / "masks" / "a.png"))
    ...     same = torch.equal(reader.load(Path(folder) / "masks", "a").bool(), labels)
    >>> item.case, scan.size, stored.tolist(), same
    ('a', (2, 3), [[255, 0, 0], [0, 0, 255]], True)
    """

    mask_format: MaskFormat
    image_format: ImageFormat
    follow_symlinks: bool = False
    large: int = LARGE

    def __post_init__(self) -> None:
        _ = self._stored

    @property
    def planes(self) -> bool:
        """Whether masks are a file for each class."""
        return self.mask_format.activation == "sigmoid" and len(self.mask_format.classes) > 1

    def find(self, path: Path) -> list[PredictionItem]:
        """The pictures of a folder and its sub-folders, sorted; hidden ones are passed over. Or a file as the only one.

        Raises:
            DataError: there are none, or two would have masks of one name.
        """
        if path.is_file():
            return [PredictionItem(path.stem, (path,))]
        if not path.is_dir():
            raise DataProblem("is neither a file nor a folder", path)
        files = sorted(_walk(path, self.follow_symlinks))
        if not files:
            inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise DataProblem(f"holds no PNG, JPEG, BMP, TIFF or NumPy file; there is {inside}", path)
        items: dict[str, PredictionItem] = {}
        for file in files:
            case = file.relative_to(path).with_suffix("").as_posix()
            if case in items:
                both = f"{items[case].files[0].name} and {file.name}"
                raise DataProblem(f"{both} would have masks of one name", file.parent, "Rename one.")
            items[case] = PredictionItem(case, (file,))
        return list(items.values())

    def read(self, item: PredictionItem) -> LoadedImage:
        """A picture, as in training; one whose name tells another format than its content is told as `FileWarning`.

        Raises:
            DataError: it cannot be read.
        """
        (path,) = item.files
        large = open_large(path, self.image_format, self.large)
        if large is not None:
            image: Any = large
        else:
            data = read_bytes(path)
            image = self.image_format.image(read_picture(path, data))
            _tell_kind(path, data)
        return LoadedImage(image, tuple(image.shape[1:]), None, Origin(path, large is not None))

    def names(self, case: str, format: str | None = None) -> list[Path]:
        """`<case>.png` or `.tif`; with classes that may overlap, one in a folder for each.

        Raises:
            DataError: for a case whose files would lie elsewhere, or another format.
        """
        if format is not None and format not in SUFFIXES:
            raise DataError(f"format must be png or tiff for pictures, got {format}")
        file = _place(case, SUFFIXES[format or "png"])
        # A class may be named `a/b`; its folder is one all the same.
        folders = [name.replace("/", "_").replace("\\", "_") for name in self.mask_format.classes]
        return [folder / file for folder in map(Path, folders)] if self.planes else [file]

    def write(self, folder: Path, case: str, labels: Tensor, scan: LoadedImage, format: str | None = None) -> None:
        """Write a mask, with the values that training's masks have.

        Args:
            folder: below which the files go.
            case: as in `PredictionItem`.
            labels: class ids `(height, width)` or bool planes `(classes, height, width)`.
            scan: what `read` gave.
            format: `"png"`, `"tiff"`, or `None`: PNG, and TIFF for a picture that was read by windows.

        Raises:
            DataError: PNG cannot hold the values.
            ValueError: the labels are of another size than the picture.
        """
        if tuple(labels.shape[-2:]) != tuple(scan.size):
            raise ValueError(f"labels must have the picture's size {scan.size}, got {tuple(labels.shape)}")
        if format is None:
            format = "tiff" if scan.origin.large else "png"
        array = labels.cpu().numpy()
        parts = [array] if self.mask_format.activation == "softmax" else list(array)
        for name, part in zip(self.names(case, format), parts, strict=True):
            ids = part.view(np.uint8) if part.dtype == bool else part
            save = partial(_save_png if format == "png" else _save_tiff, ids, self._stored)
            write_atomically(folder / name, save)

    def write_probabilities(self, folder: Path, case: str, probs: Tensor, scan: LoadedImage) -> list[Path]:
        """Write `<case>.tif`: float32, a plane for each class, in tiles where it is large."""
        path = folder / _place(case, ".tif")
        array = probs.float().cpu().numpy()

        def save(part: Path) -> None:
            tifffile.imwrite(
                part,
                array,
                photometric="minisblack",
                planarconfig="separate" if len(array) > 1 else None,
                tile=(TILE, TILE) if min(array.shape[1:]) > TILE else None,
                compression="zlib",
                predictor=True,
                bigtiff=array.nbytes > 2**31,
                metadata=None,
            )

        write_atomically(path, save)
        return [path]

    def load_probabilities(self, folder: Path, case: str) -> Tensor | None:
        """What `write_probabilities` wrote, float32 `(classes, height, width)`; `None`: nothing.

        Raises:
            DataError: it cannot be decoded, or has another number of classes.
        """
        path = folder / _place(case, ".tif")
        if not path.is_file():
            return None
        try:
            stored = tifffile.imread(path)
        except Exception as error:  # tifffile raises whatever a damaged file brings up.
            raise DataProblem(
                f"cannot be decoded ({type(error).__name__}: {error})", path, "Predict it again."
            ) from error
        planes = stored.reshape(-1, *stored.shape[-2:])
        if len(planes) != len(self.mask_format.classes):
            raise DataProblem(f"holds {len(planes)} planes, {len(self.mask_format.classes)} are required", path)
        return torch.from_numpy(np.ascontiguousarray(planes, np.float32))

    def load(self, folder: Path, case: str) -> Tensor:
        """A mask that `write` wrote: class ids `(height, width)` or planes `(classes, height, width)`.

        Raises:
            DataError: it is not there, is there in two formats, or holds what no class has.
        """
        found = [self.names(case, name) for name in SUFFIXES if (folder / self.names(case, name)[0]).is_file()]
        if len(found) != 1:
            wanted = " or ".join(str(self.names(case, name)[0]) for name in SUFFIXES)
            what = "is there twice" if found else "is not there"
            raise DataProblem(f"the mask of the case {case} {what}: {wanted}", folder)
        paths = [folder / name for name in found[0]]
        stored = [self.mask_format.read(_read_written(path)) for path in paths]
        sizes = {part.shape for part in stored}
        if len(sizes) > 1:
            raise DataProblem(f"the planes of {case} differ in size: {sizes}", folder)
        try:
            return self.mask_format.encode(stored, self.planes)
        except ValueError as error:
            raise DataProblem(str(error), ", ".join(map(str, paths))) from error

    @cached_property
    def _stored(self) -> NDArray[Any]:
        """What each id is stored as: `(ids,)` values, or `(ids, 3)` colours."""
        form = self.mask_format
        listed = range(len(form.colors)) if form.colors is not None else ()
        stored = []
        for label in range(2) if self.planes else form.ids:
            # What the data set says of its masks goes first, but for the background: a value that is mapped to it may
            # be one to be left out. An id that nothing is said of stands for itself.
            said = [v for v, to in (form.label_map or {}).items() if to == label]
            candidates = [label, *said, *listed] if label == 0 else [*said, *listed, label]
            known = [v for v in candidates if form.label(v, self.planes) == label and (not listed or v in listed)]
            if not known:
                name = (
                    "background"
                    if form.activation == "sigmoid" and label == 0
                    else form.classes[label - form.class_ids[0]]
                )
                what = f"no value of the masks means {name!r} (id {label}), so that it cannot be written"
                raise DataError(f"{what}: give it one in data.{'colors' if listed else 'values'}")
            stored.append(known[0])
        if form.colors is not None:
            return np.asarray([form.colors[value] for value in stored], np.uint8)
        return np.asarray(
            stored, np.result_type(np.uint8, np.min_scalar_type(max(stored)), np.min_scalar_type(min(stored)))
        )


def _place(case: str, suffix: str) -> Path:
    place = PurePosixPath(case)
    if place.is_absolute() or ".." in place.parts or not place.name:
        raise DataError(f"the case {case!r} would have a file outside the folder")
    return Path(f"{case}{suffix}")


def _walk(folder: Path, follow_symlinks: bool) -> Iterator[Path]:
    """The picture files below a folder, each once; links that are not followed are told."""
    root = folder.resolve()
    seen = {root}
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            warnings.warn(SkippedWarning(str(DataProblem(f"cannot be read ({error.strerror})", place))), stacklevel=3)
            continue
        for entry in found:
            path, target = Path(entry.path), None
            if entry.name.startswith("."):
                continue
            with suppress(OSError, RuntimeError):  # A link to itself leads nowhere, as one to nothing does.
                target = path.resolve(strict=True)
            if target is not None and target.is_dir():
                if not (entry.is_symlink() and _skipped(path, target, root, seen, follow_symlinks)):
                    seen.add(target)
                    waiting.append(path)
            elif path.suffix.lower() not in EXTENSIONS or not (target is None or target.is_file()):
                continue
            # A link to nothing is an image that cannot be read, and will be told as one.
            elif not (target and entry.is_symlink() and _skipped(path, target, root, seen, follow_symlinks)):
                yield path


def _skipped(path: Path, target: Path, root: Path, seen: set[Path], follow_symlinks: bool) -> bool:
    """Whether a link is not followed, which is then told."""
    inside = target.is_relative_to(root)
    if target in seen or (inside and target.is_dir()):
        told = FileWarning(str(DataProblem(f"is a link to {target}, which is read already", path)))
    elif not inside and not follow_symlinks:
        what, remedy = (
            f"is a link out of the folder, to {target}; it was skipped",
            "Set follow_symlinks=true to read it.",
        )
        told = SkippedWarning(str(DataProblem(what, path, remedy)))
    else:
        return False
    warnings.warn(told, stacklevel=4)
    return True


def _tell_kind(path: Path, data: bytes) -> None:
    """Warn of a file whose name tells another format than its content."""
    if data[:4] in TIFF:
        kind = "TIFF"
    elif data.startswith(NUMPY):
        kind = "NumPy"
    else:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            kind = image.format or "?"
    if path.suffix.lower() not in KINDS.get(kind, ()):
        what = f"is a {kind} file by its content, and was read as one"
        warnings.warn(FileWarning(str(DataProblem(what, path, "Rename it."))), stacklevel=3)


def _save_png(ids: NDArray[Any], stored: NDArray[Any], path: Path) -> None:
    if stored.dtype not in (np.uint8, np.uint16):
        raise DataProblem(f"PNG cannot hold the values {stored.min()} to {stored.max()}", path, "Set format=tiff.")
    Image.fromarray(stored[ids]).save(path, format="PNG")


def _save_tiff(ids: NDArray[Any], stored: NDArray[Any], path: Path) -> None:
    """Deflated; in tiles where it is large, which are made one by one."""
    height, width = ids.shape
    tiled = min(height, width) > TILE
    colors = stored.shape[1:]
    dtype = np.dtype(np.uint8) if ids.dtype == bool else stored.dtype
    data: Any = stored[ids] if not tiled else _tiles(ids, stored)
    tifffile.imwrite(
        path,
        data,
        shape=(height, width, *colors),
        dtype=dtype,
        photometric="rgb" if colors else "minisblack",
        tile=(TILE, TILE) if tiled else None,
        compression="zlib",
        # What deflate makes of it is not known before; a classic TIFF ends at 4 GiB.
        bigtiff=ids.size * dtype.itemsize * (colors or (1,))[0] > 2**31,
        metadata=None,
    )


def _tiles(ids: NDArray[Any], stored: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for top in range(0, ids.shape[0], TILE):
        for left in range(0, ids.shape[1], TILE):
            yield np.ascontiguousarray(stored[ids[top : top + TILE, left : left + TILE]])


def _read_written(path: Path) -> Picture:
    """A mask, of whatever size: it is ours, and no bomb."""
    data = read_bytes(path)
    try:
        size = 0
        if data[:4] in TIFF:
            with tifffile.TiffFile(BytesIO(data)) as tiff:
                size = tiff.pages.first.imagelength * tiff.pages.first.imagewidth
        elif data.startswith(PNG):
            size = int.from_bytes(data[16:20], "big") * int.from_bytes(data[20:24], "big")
        if Image.MAX_IMAGE_PIXELS is None or size <= Image.MAX_IMAGE_PIXELS:
            return read_picture(path, data)
        pixels = tifffile.imread(BytesIO(data)) if data[:4] in TIFF else imagecodecs.png_decode(data)
    except DataError:
        raise
    except Exception as error:  # Decoders raise whatever their format brings up.
        raise DataProblem(f"cannot be decoded ({type(error).__name__}: {error})", path, "Predict it again.") from error
    max_value = int(np.iinfo(pixels.dtype).max) if pixels.dtype in (np.uint8, np.uint16) else None
    return Picture(pixels[..., None] if pixels.ndim == 2 else pixels, path, max_value=max_value)
