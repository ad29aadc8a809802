"""Read images to predict, and write their masks and probabilities."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from lightning_dice.data.errors import DataError, DataProblem, FileWarning, SkippedWarning
from lightning_dice.data.file_names import EXTENSIONS
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import (
    FORMATS,
    NUMPY,
    PNG,
    TIFF,
    DecodedImage,
    default_max_value,
    read_bytes,
    read_image,
    with_channels,
)
from lightning_dice.data.images.mask_format import MaskFormat
from lightning_dice.data.images.tiff_library import require_tiff_library, tifffile_for
from lightning_dice.data.images.windowed_tiff import LARGE, LargeImage, open_large_image
from lightning_dice.data.interfaces import Cases, LoadedImage, PredictionIO, PredictionItem
from lightning_dice.extras import MissingExtra, require
from lightning_dice.io import write_atomically
from lightning_dice.text import join_some

WRITTEN_EXTENSIONS = {"png": ".png", "tiff": ".tif"}
EXTENSIONS_OF_FORMAT = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "NumPy": (".npy",),
}
TILE = 512  # pixels


class Origin(NamedTuple):
    """The facts about an image that are needed to write its mask.

    Attributes:
        path: the image file.
        large: the image is read by windows.
    """

    path: Path
    large: bool


@dataclass(frozen=True)
class ImagePredictionIO(PredictionIO):
    """Reads PNG, JPEG, BMP, TIFF and NumPy files as training does, and writes masks that training could read.

    **Geometry.** A mask fits the image as it is displayed: if an EXIF or TIFF orientation tag turns the image, the mask
    is written turned and without a tag, as the masks of training images must be.

    **Values.** The training's settings read a written mask back: it holds gray values, or the colours of the ids. If
    several values map to an id, the first of `label_map` is written; for the background 0. Classes that may overlap
    (sigmoid, more than one) have a folder each, named as the class, with masks of two values; classes that exclude each
    other are ids in one file, even if the training masks have a file for each.

    **Large images.** A TIFF of more than `large` pixels is not decoded: `LoadedImage.image` is then a `LargeImage`, and
    its mask is written as a tiled TIFF, unless another format is requested.

    Args:
        mask_format: the classes, and how the training masks are stored.
        image_format: how images are stored, and how they become the network's input.
        follow_symlinks: whether `find` follows links out of the folder. It warns of those that it does not follow
            (`SkippedWarning`), and of links to folders that it has read already (`FileWarning`).
        large: pixels; larger TIFFs are read by windows. At most `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        DataError: no value of the training masks means a certain class, so that it could not be written.

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
        _ = self._stored_values

    def with_options(self, *, follow_symlinks: bool, large: int) -> ImagePredictionIO:
        """Return a copy with these options: whether to follow links, and above how many pixels to read by windows."""
        return replace(self, follow_symlinks=follow_symlinks, large=large)

    def for_cases(self, cases: Cases) -> ImagePredictionIO:
        """Return `self`: masks of images carry no geometry that is checked."""
        return self

    def preprocessing(self) -> ImageFormat:
        """Return which channels an image has, and which value becomes 1."""
        return self.image_format

    @property
    def planes(self) -> bool:
        """Whether a mask is a file for each class."""
        return self.mask_format.activation == "sigmoid" and len(self.mask_format.classes) > 1

    def find(self, path: Path) -> list[PredictionItem]:
        """Find the images in a folder and its sub-folders, sorted, except hidden ones; or take a single file.

        Raises:
            DataError: there are none, or two would have masks of the same name.
            MissingExtra: there are TIFFs, and the libraries that read them are not installed.
        """
        if path.is_file():
            require_tiff_library([path])
            return [PredictionItem(path.stem, (path,))]
        if not path.is_dir():
            raise DataProblem("is neither a file nor a folder", path)
        files = sorted(_find_images(path, self.follow_symlinks))
        if not files:
            inside = join_some(sorted(entry.name for entry in path.iterdir())) or "nothing"
            raise DataProblem(f"holds no PNG, JPEG, BMP, TIFF or NumPy file; there is {inside}", path)
        items: dict[str, PredictionItem] = {}
        for file in files:
            case = file.relative_to(path).with_suffix("").as_posix()
            if case in items:
                both = f"{items[case].files[0].name} and {file.name}"
                raise DataProblem(f"{both} would have masks of the same name", file.parent, "Rename one.")
            items[case] = PredictionItem(case, (file,))
        require_tiff_library(files)
        return list(items.values())

    def read(self, item: PredictionItem) -> LoadedImage:
        """Read an image as training does. Warn (`FileWarning`) if its name suggests another format than its content.

        Raises:
            DataError: it cannot be read.
        """
        (path,) = item.files
        large = open_large_image(path, self.image_format, self.large)
        image: Tensor | LargeImage
        if large is not None:
            image = large
        else:
            data = read_bytes(path)
            image = self.image_format.to_tensor(read_image(path, data))
            _warn_if_misnamed(path, data)
        return LoadedImage(image, tuple(image.shape[1:]), None, Origin(path, large is not None))

    def names(self, case: str, format: str | None = None) -> list[Path]:
        """Return `<case>.png` or `.tif`; if classes may overlap, one in the folder of each class.

        Raises:
            DataError: a file would be outside the folder, or the format is unknown.
        """
        if format is not None and format not in WRITTEN_EXTENSIONS:
            raise DataError(f"format must be png or tiff for images, got {format}")
        file = _file_of_case(case, WRITTEN_EXTENSIONS[format or "png"])
        # A class may be named `a/b`; its folder is a single one all the same.
        folders = [name.replace("/", "_").replace("\\", "_") for name in self.mask_format.classes]
        return [folder / file for folder in map(Path, folders)] if self.planes else [file]

    def check_output(self, format: str | None, *, probabilities: bool) -> None:
        """Check that files of a format, and of probabilities, can be written.

        Raises:
            DataError: the format is unknown.
            MissingExtra: they are TIFFs, and the libraries that write them are not installed.
        """
        super().check_output(format, probabilities=probabilities)
        if format == "tiff" or probabilities:
            needed_by = "format=tiff" if format == "tiff" else "probabilities=true"
            require("tifffile", "imagecodecs", needed_by=needed_by)

    def write(self, folder: Path, case: str, labels: Tensor, scan: LoadedImage, format: str | None = None) -> None:
        """Write a mask, with the values that the training masks have.

        Args:
            folder: where the files go.
            case: as in `PredictionItem`.
            labels: class ids `(height, width)` or bool planes `(classes, height, width)`.
            scan: the image, from `read`.
            format: `"png"`, `"tiff"`, or `None`: TIFF for an image that was read by windows, else PNG.

        Raises:
            DataError: PNG cannot hold the values.
            ValueError: the labels do not have the size of the image.
        """
        if tuple(labels.shape[-2:]) != tuple(scan.size):
            raise ValueError(f"labels must have the image's size {scan.size}, got {tuple(labels.shape)}")
        if format is None:
            format = "tiff" if scan.origin.large else "png"
        array = labels.cpu().numpy()
        parts = [array] if self.mask_format.activation == "softmax" else list(array)
        for name, part in zip(self.names(case, format), parts, strict=True):
            ids = part.view(np.uint8) if part.dtype == bool else part
            save = partial(_save_png if format == "png" else _save_tiff, ids, self._stored_values)
            write_atomically(folder / name, save)

    def write_probabilities(self, folder: Path, case: str, probs: Tensor, scan: LoadedImage) -> list[Path]:
        """Write `<case>.tif`: float32, a plane for each class, in tiles if it is large; return the file."""
        path = folder / _file_of_case(case, ".tif")
        array = probs.float().cpu().numpy()

        def save(part: Path) -> None:
            tifffile_for(path).imwrite(
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
        """Load what `write_probabilities` wrote, float32 `(classes, height, width)`; `None` if there is no file.

        Raises:
            DataError: it cannot be decoded, or has another number of classes.
        """
        path = folder / _file_of_case(case, ".tif")
        if not path.is_file():
            return None
        try:
            stored = tifffile_for(path).imread(path)
        except MissingExtra:
            raise
        except Exception as error:  # tifffile raises anything for a damaged file.
            raise DataProblem(
                f"cannot be decoded ({type(error).__name__}: {error})", path, "Predict it again."
            ) from error
        planes = stored.reshape(-1, *stored.shape[-2:])
        if len(planes) != len(self.mask_format.classes):
            raise DataProblem(f"holds {len(planes)} planes, but {len(self.mask_format.classes)} are required", path)
        return torch.from_numpy(np.ascontiguousarray(planes, np.float32))

    def load(self, folder: Path, case: str) -> Tensor:
        """Load a mask that `write` wrote: class ids `(height, width)` or planes `(classes, height, width)`.

        Raises:
            DataError: it does not exist, exists in two formats, or holds values of no class.
        """
        found = [
            self.names(case, name) for name in WRITTEN_EXTENSIONS if (folder / self.names(case, name)[0]).is_file()
        ]
        if len(found) != 1:
            wanted = " or ".join(str(self.names(case, name)[0]) for name in WRITTEN_EXTENSIONS)
            what = "exists twice" if found else "does not exist"
            raise DataProblem(f"the mask of the case {case} {what}: {wanted}", folder)
        paths = [folder / name for name in found[0]]
        stored = [self.mask_format.read(_read_own_mask(path)) for path in paths]
        sizes = {part.shape for part in stored}
        if len(sizes) > 1:
            raise DataProblem(f"the planes of {case} differ in size: {sizes}", folder)
        try:
            return self.mask_format.encode(stored, self.planes)
        except ValueError as error:
            raise DataProblem(str(error), ", ".join(map(str, paths))) from error

    @cached_property
    def _stored_values(self) -> NDArray[Any]:
        """The stored value of each id, `(ids,)`, or its colour, `(ids, 3)`."""
        mask_format = self.mask_format
        listed = range(len(mask_format.colors)) if mask_format.colors is not None else ()
        stored = []
        for label in range(2) if self.planes else mask_format.ids:
            # Prefer mapped values, as in the training masks; but for the background 0, since a value that is mapped to
            # it may be a structure that was merged into it. An unmapped id is written unchanged.
            mapped = [value for value, to in (mask_format.label_map or {}).items() if to == label]
            candidates = [label, *mapped, *listed] if label == 0 else [*mapped, *listed, label]
            means_label = (value for value in candidates if mask_format.label(value, self.planes) == label)
            value = next((value for value in means_label if not listed or value in listed), None)
            if value is None:
                name = "background"
                if mask_format.activation == "softmax" or label != 0:
                    name = mask_format.classes[label - mask_format.class_ids[0]]
                what = f"no value of the masks means {name!r} (id {label}), so that it cannot be written"
                raise DataError(f"{what}: give it one in data.{'colors' if listed else 'label_map'}")
            stored.append(value)
        if mask_format.colors is not None:
            return np.asarray([mask_format.colors[value] for value in stored], np.uint8)
        smallest, largest = np.min_scalar_type(min(stored)), np.min_scalar_type(max(stored))
        return np.asarray(stored, np.result_type(np.uint8, largest, smallest))


def _file_of_case(case: str, suffix: str) -> Path:
    place = PurePosixPath(case)
    if place.is_absolute() or ".." in place.parts or not place.name:
        raise DataError(f"the case {case!r} would have a file outside the folder")
    return Path(f"{case}{suffix}")


def _find_images(folder: Path, follow_symlinks: bool) -> Iterator[Path]:
    """Yield the image files below a folder, each once; warn of links that are not followed."""
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
            with suppress(OSError, RuntimeError):  # A broken link, or one to itself, has no target.
                target = path.resolve(strict=True)
            if target is not None and target.is_dir():
                if not (entry.is_symlink() and _warn_of_link(path, target, root, seen, follow_symlinks)):
                    seen.add(target)
                    waiting.append(path)
            elif path.suffix.lower() not in EXTENSIONS or not (target is None or target.is_file()):
                continue
            # A broken link is an image that cannot be read, and will be reported as one.
            elif not (target and entry.is_symlink() and _warn_of_link(path, target, root, seen, follow_symlinks)):
                yield path


def _warn_of_link(path: Path, target: Path, root: Path, seen: set[Path], follow_symlinks: bool) -> bool:
    """Return whether a link is not followed, after a warning."""
    inside = target.is_relative_to(root)
    if target in seen or (inside and target.is_dir()):
        warning = FileWarning(str(DataProblem(f"is a link to {target}, which is read already", path)))
    elif not inside and not follow_symlinks:
        what = f"is a link out of the folder, to {target}; it was skipped"
        warning = SkippedWarning(str(DataProblem(what, path, "Set follow_symlinks=true to read it.")))
    else:
        return False
    warnings.warn(warning, stacklevel=4)
    return True


def _warn_if_misnamed(path: Path, data: bytes) -> None:
    """Warn of a file whose name suggests another format than its content."""
    if data[:4] in TIFF:
        kind = "TIFF"
    elif data.startswith(NUMPY):
        kind = "NumPy"
    else:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            kind = image.format or "?"
    if path.suffix.lower() not in EXTENSIONS_OF_FORMAT.get(kind, ()):
        what = f"is a {kind} file by its content, and was read as one"
        warnings.warn(FileWarning(str(DataProblem(what, path, "Rename it."))), stacklevel=3)


def _save_png(ids: NDArray[Any], stored: NDArray[Any], path: Path) -> None:
    if stored.dtype not in (np.uint8, np.uint16):
        raise DataProblem(f"PNG cannot hold the values {stored.min()} to {stored.max()}", path, "Set format=tiff.")
    Image.fromarray(stored[ids]).save(path, format="PNG")


def _save_tiff(ids: NDArray[Any], stored: NDArray[Any], path: Path) -> None:
    """Write a deflated TIFF; if it is large, in tiles that are made one by one."""
    height, width = ids.shape
    tiled = min(height, width) > TILE
    colors = stored.shape[1:]
    dtype = np.dtype(np.uint8) if ids.dtype == bool else stored.dtype
    data: Any = stored[ids] if not tiled else _tiles(ids, stored)
    tifffile_for(path).imwrite(
        path,
        data,
        shape=(height, width, *colors),
        dtype=dtype,
        photometric="rgb" if colors else "minisblack",
        tile=(TILE, TILE) if tiled else None,
        compression="zlib",
        # The compressed size is not known in advance, and a classic TIFF ends at 4 GiB.
        bigtiff=ids.size * dtype.itemsize * (colors or (1,))[0] > 2**31,
        metadata=None,
    )


def _tiles(ids: NDArray[Any], stored: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for top in range(0, ids.shape[0], TILE):
        for left in range(0, ids.shape[1], TILE):
            yield np.ascontiguousarray(stored[ids[top : top + TILE, left : left + TILE]])


def _read_own_mask(path: Path) -> DecodedImage:
    """Read a mask of any size: we wrote it, so it is not a decompression bomb."""
    data = read_bytes(path)
    try:
        size = 0
        if data[:4] in TIFF:
            with tifffile_for(path).TiffFile(BytesIO(data)) as tiff:
                size = tiff.pages.first.imagelength * tiff.pages.first.imagewidth
        elif data.startswith(PNG):
            size = int.from_bytes(data[16:20], "big") * int.from_bytes(data[20:24], "big")
        if Image.MAX_IMAGE_PIXELS is None or size <= Image.MAX_IMAGE_PIXELS:
            return read_image(path, data)
        if data[:4] in TIFF:
            pixels = tifffile_for(path).imread(BytesIO(data))
        else:
            # Not Image.open, which refuses large images. Before Pillow 10.3, 16-bit PNGs were read as 32-bit integers.
            pixels = np.asarray(PngImageFile(BytesIO(data)))
            pixels = pixels.astype(np.uint16) if pixels.dtype == np.int32 else pixels
    except (DataError, MissingExtra):
        raise
    except Exception as error:  # Decoders may raise anything.
        raise DataProblem(f"cannot be decoded ({type(error).__name__}: {error})", path, "Predict it again.") from error
    return DecodedImage(with_channels(pixels), path, default_max_value(pixels.dtype))
