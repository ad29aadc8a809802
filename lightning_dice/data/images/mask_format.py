"""How the values of a mask file become class ids or planes; `label_map` does the same for volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.images.image_reader import DecodedImage, read_image
from lightning_dice.data.images.windowed_tiff import WindowedTiff, open_windowed_tiff
from lightning_dice.data.label_map import count_values, label_dtype, list_unknown, look_up
from lightning_dice.text import join_some

CLEAN_GAP = 16  # JPEG shifts values by less than this in masks that survive it at all


class SizedImage(Protocol):
    """The properties of an image that its mask needs: a `DecodedImage` or a `WindowedTiff`."""

    @property
    def path(self) -> Path:
        """The image file."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        ...

    @property
    def turned(self) -> bool:
        """Whether the image was turned or flipped according to its orientation tag."""
        ...


class StoredMask(Protocol):
    """A mask that is not an image file, such as one drawn from outlines."""

    def __str__(self) -> str:
        """Its place, for messages."""
        ...

    def values(self, image: SizedImage, mask_format: MaskFormat, rows: slice, columns: slice) -> list[NDArray[Any]]:
        """Return the stored values of a window, each `(height, width)`: ids, or an array for each class.

        Raises:
            DataError: it does not fit the image.
        """
        ...


MaskFile = Path | StoredMask


@dataclass(frozen=True)
class MaskFormat:
    """How masks are stored, and how they become class ids or planes.

    The *values* of a mask are its samples as stored: gray levels, palette indices, or with `colors` the position of
    each colour in that list. `label_map` maps some values to ids; the others are ids already.

    Args:
        classes: with `activation="softmax"` the names of the ids 0, 1, 2 ...; with `"sigmoid"` the names of the
            foreground classes only, whose ids are 1, 2, 3 ... (0 is background).
        activation: for the network's logits: `"softmax"` makes a map of ids, `"sigmoid"` one 0/1 plane for each class.
        ignore_index: the label of pixels that neither loss nor score counts; `None` for none.
        label_map: stored value -> id, such as `{255: 1}`, or `{11: 255}` to ignore the label 11.
        colors: `[red, green, blue]` of each value, in order, for masks painted in colours.
        multichannel_masks: each channel of a mask file is a class, and holds 1 where the class is; with `"softmax"`
            the background needs no channel.

    Raises:
        ValueError: the settings contradict each other.

    >>> mask_format = MaskFormat(["background", "lesion"], label_map={128: 255, 255: 1})
    >>> mask_format.encode([np.array([[0, 128, 255]], dtype=np.uint8)])
    tensor([[  0, 255,   1]], dtype=torch.uint8)
    >>> MaskFormat(["artery", "vein"], "sigmoid").encode([np.array([[0, 1, 2, 255]], dtype=np.uint8)])
    tensor([[[  0,   1,   0, 255]],
    <BLANKLINE>
            [[  0,   0,   1, 255]]], dtype=torch.uint8)
    """

    classes: Sequence[str]
    activation: Literal["softmax", "sigmoid"] = "softmax"
    ignore_index: int | None = 255
    label_map: Mapping[int, int] | None = None
    colors: Sequence[Sequence[int]] | None = None
    multichannel_masks: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ("softmax", "sigmoid"):
            raise ValueError(f"activation must be 'softmax' or 'sigmoid' to read masks, got {self.activation!r}")
        if isinstance(self.classes, str) or not isinstance(self.classes, Sequence) or not len(self.classes):
            raise ValueError(
                f"classes must be a list of names, got {self.classes!r}; "
                "for instance 'data.classes=[background,lesion]'"
            )
        # Hydra passes its own containers, which neither hash nor pickle cheaply.
        names = tuple(str(name) for name in self.classes)
        if len(set(names)) != len(names):
            raise ValueError(f"classes must differ from each other, got {list(names)}")
        if self.activation == "softmax" and len(names) < 2:
            raise ValueError(
                f"classes must name every id for activation='softmax', the background too, got {list(names)}; "
                f"set 'data.classes=[background,{names[0]}]', or data.activation=sigmoid for foreground classes only"
            )
        ignored = None if self.ignore_index is None else _to_integer(self.ignore_index, "ignore_index")
        pairs = self.label_map if self.label_map is not None else {}
        if not isinstance(pairs, Mapping):
            example = "for instance 'data.label_map={255:1}'"
            raise ValueError(f"label_map must map stored values to ids, got {pairs!r}; {example}")
        mapped = {_to_integer(key, "label_map"): _to_integer(value, "label_map") for key, value in pairs.items()}
        if self.multichannel_masks and self.colors is not None:
            raise ValueError("multichannel_masks=true needs masks without colors: set one of the two")
        object.__setattr__(self, "classes", names)
        object.__setattr__(self, "ignore_index", ignored)
        object.__setattr__(self, "label_map", mapped)
        object.__setattr__(self, "colors", None if self.colors is None else _check_colors(self.colors))
        self._check_ids()

    def _check_ids(self) -> None:
        if self.ignore_index is not None and self.ignore_index in self.ids:
            name = {**dict(zip(self.class_ids, self.classes, strict=True)), 0: "background"}[self.ignore_index]
            raise ValueError(
                f"ignore_index must be no class's id, got {self.ignore_index}, the id of {name!r}; "
                f"keep it at 255 or so and set 'data.label_map={{{self.ignore_index}:255}}'"
            )
        label_map = self.label_map or {}
        allowed = f"the ids 0 to {len(self.ids) - 1} or ignore_index={self.ignore_index}"
        for value, label in label_map.items():
            if label not in self.ids and label != self.ignore_index:
                raise ValueError(f"label_map must map to {allowed}, got {value}:{label}")
        if self.colors is None:
            return
        labels = [label_map.get(value, value) for value in range(len(self.colors))]
        extra = [value for value, label in enumerate(labels) if label not in self.ids and label != self.ignore_index]
        if extra:
            raise ValueError(
                f"colors must have one entry for each of {allowed}, got {len(labels)} entries; to ignore one, map its "
                f"position: 'data.label_map={{{extra[0]}:{self.ignore_index}}}'"
            )
        missing = [label for label in self.ids if label not in labels]
        if missing and self.activation == "softmax":
            raise ValueError(f"colors must have one entry for each class, got none for {self.classes[missing[0]]!r}")

    @property
    def ids(self) -> range:
        """The ids that an id mask may hold, the background's included."""
        return range(len(self.classes) + (self.activation == "sigmoid"))

    @property
    def class_ids(self) -> range:
        """The id of each class of `classes`, in an id mask."""
        return self.ids[-len(self.classes) :]

    @property
    def background(self) -> str | None:
        """With a softmax, the class of pixels in no other class, which needs no plane; else `None`."""
        return self.classes[0] if self.activation == "softmax" else None

    def label(self, value: int, planes: bool = False) -> int | None:
        """Return the id of a stored value, or `None` if it has none.

        Args:
            value: as stored.
            planes: the mask has a file or channel for each class, with the ids 0 and 1.

        >>> mask_format = MaskFormat(["background", "lesion"], label_map={128: 1})
        >>> mask_format.label(128), mask_format.label(255), mask_format.label(2)
        (1, 255, None)
        """
        label = (self.label_map or {}).get(value, value)
        return label if label in (range(2) if planes else self.ids) or label == self.ignore_index else None

    def read_planes(self, image: DecodedImage) -> list[NDArray[Any]]:
        """Return the stored values of a mask file: one array of ids, or with `multichannel_masks` one for each channel.

        Raises:
            DataError: as by `read`; with `multichannel_masks`, for another number of channels.
        """
        if not self.multichannel_masks:
            return [self.read(image)]
        pixels = image.apply_palette() if image.palette is not None else image.pixels
        channels, classes = pixels.shape[2], len(self.classes)
        if channels not in (classes, classes - (self.background is not None)):
            less = f", or {classes - 1} without the background" if self.background is not None else ""
            raise DataProblem(
                f"has {channels} channels ({image.kind}), data.multichannel_masks=true needs one for each of "
                f"{classes} classes{less}",
                image.path,
                "Set data.classes to the classes of the channels, or data.multichannel_masks=false.",
            )
        plain = replace(image, alpha=False, palette=None)
        return [self.read(replace(plain, pixels=pixels[..., index : index + 1])) for index in range(channels)]

    def read(self, image: DecodedImage) -> NDArray[Any]:
        """Return the stored values of a mask file, `(height, width)`.

        Raises:
            DataError: the mask is in colours and `colors` is not set or lacks one, holds fractions, or lossy
                compression has blurred its values.
        """
        try:
            stored = self._color_positions(image) if self.colors is not None else _gray_values(image)
        except DataProblem as problem:
            raise _lossy_problem(image) if image.lossy else problem from None
        if image.lossy and self.colors is None:
            found = np.unique(stored).astype(np.int64)
            if (np.diff(found) < CLEAN_GAP).any():
                raise _lossy_problem(image, found.tolist())
        return stored

    def _color_positions(self, image: DecodedImage) -> NDArray[Any]:
        pixels = image.apply_palette()
        pixels = pixels[..., :-1] if image.alpha else pixels
        if pixels.dtype == bool:
            pixels = pixels * np.uint8(255)
        if pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3):
            raise DataProblem(f"is {image.kind}, but data.colors needs 8-bit RGB", image.path, "Save it as 8-bit RGB.")
        codes = _color_codes(np.broadcast_to(pixels, (*image.size, 3)))
        listed = _color_codes(np.asarray(self.colors, dtype=np.uint8))
        order = np.argsort(listed)
        nearest = np.searchsorted(listed[order], codes).clip(max=len(listed) - 1)
        positions = order[nearest]
        unlisted = codes[listed[positions] != codes]
        if unlisted.size:
            what = f"holds colours that data.colors does not list: {_count_colors(unlisted)}"
            raise DataProblem(what, image.path, "List them, in the order of the ids.")
        return np.asarray(positions, dtype=np.uint8 if len(listed) <= 256 else np.int32)

    def encode(self, stored: Sequence[NDArray[Any]], planes: bool = False) -> Tensor:
        """Make a mask of stored values.

        Args:
            stored: from `read` or `read_planes`.
            planes: `stored` has an array for each class, instead of one with ids.

        Returns:
            Class ids `(height, width)` for softmax, planes `(classes, height, width)` for sigmoid; uint8 if ids and
            `ignore_index` fit, else int32.

        Raises:
            ValueError: a value has no id; for softmax, a pixel belongs to several classes, or to none although the
                background has a plane too.
        """
        dtype = label_dtype(len(self.ids) - 1, self.ignore_index)
        candidates = {*self.ids, *(self.label_map or {}), *([] if self.ignore_index is None else [self.ignore_index])}
        table = {value: label for value in candidates if (label := self.label(value, planes)) is not None}
        describe = partial(self.describe_unknown, planes=planes)
        labels = [look_up(part, table, dtype, describe) for part in stored]
        if planes:
            return torch.from_numpy(self._exclusive(labels) if self.activation == "softmax" else np.stack(labels))
        if self.activation == "softmax":
            return torch.from_numpy(labels[0])
        mask = (labels[0] == np.asarray(self.class_ids).reshape(-1, 1, 1)).astype(labels[0].dtype)
        if self.ignore_index is not None:
            mask[:, labels[0] == self.ignore_index] = self.ignore_index
        return torch.from_numpy(mask)

    def _exclusive(self, labels: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the ids of planes that exclude each other; a pixel is ignored if it is so in any plane."""
        planes = np.stack(labels)
        claims = np.count_nonzero(planes == 1, axis=0)
        ignored = np.zeros(claims.shape, bool)
        if self.ignore_index is not None:
            ignored = (planes == self.ignore_index).any(0)
        required = "a softmax needs exactly one for each pixel"
        if several := int((claims[~ignored] > 1).sum()):
            hint = "for classes that overlap set data.activation=sigmoid"
            raise ValueError(f"holds {several} pixels of several classes, {required}; {hint}")
        if len(planes) == len(self.classes) and (none := int((claims[~ignored] < 1).sum())):
            raise ValueError(f"holds {none} pixels of no class, {required}")
        ids = np.asarray(planes.argmax(0) + len(self.classes) - len(planes), dtype=planes.dtype)
        ids[claims < 1] = 0
        ids[ignored] = self.ignore_index if self.ignore_index is not None else 0
        return ids

    def describe_unknown(self, counts: Mapping[int, int], planes: bool = False) -> str:
        """Describe the values without an id among `counts`; empty if all have one.

        >>> MaskFormat(["background", "lesion"]).describe_unknown({0: 9, 7: 2})
        'the values 7 (2 pixels), which are not ids: required 0 to 1 or 255 (ignored)'
        """
        known = [value for value in counts if self.label(value, planes) is not None]
        unknown = list_unknown(counts, known, "pixels")
        ids = range(2) if planes else self.ids
        ignored = "" if self.ignore_index is None else f" or {self.ignore_index} (ignored)"
        return unknown and f"{unknown}, which are not ids: required 0 to {ids[-1]}{ignored}"


class OpenMask:
    """A mask whose windows are read on demand.

    Args:
        image: the image that the mask belongs to; their sizes must agree.
        file: the mask.
        mask_format: how masks are stored.
        whole: decode the mask now, whatever its size; otherwise windows of a large TIFF are decoded when they are read.

    Raises:
        DataError: naming the mask.
    """

    def __init__(self, image: SizedImage, file: MaskFile, mask_format: MaskFormat, whole: bool = False) -> None:
        self.image, self.mask_format = image, mask_format
        self._source: DecodedImage | WindowedTiff | StoredMask
        if isinstance(file, Path):
            windowed = None if whole else open_windowed_tiff(file)
            self._source = read_image(file) if windowed is None else windowed
            check_size(self._source.size, image, file)
        else:
            self._source = file

    def planes(self, rows: slice, columns: slice) -> list[NDArray[Any]]:
        """Return the stored values of a window, each `(height, width)`: ids, or an array for each class.

        Raises:
            DataError: as by `MaskFormat.read_planes` or `StoredMask.values`.
        """
        if isinstance(self._source, (DecodedImage, WindowedTiff)):
            return self.mask_format.read_planes(self._source.window(rows, columns))
        return self._source.values(self.image, self.mask_format, rows, columns)

    @property
    def nbytes(self) -> int:
        """Bytes kept in memory."""
        return self._source.nbytes if isinstance(self._source, (DecodedImage, WindowedTiff)) else 0

    def clear_cache(self) -> None:
        """Free the tiles that the last windows needed."""
        if isinstance(self._source, (DecodedImage, WindowedTiff)):
            self._source.clear_cache()


def check_size(size: tuple[int, int], image: SizedImage, where: Path | str) -> None:
    """Check that a mask has the size of its image.

    Raises:
        DataError: naming the mask.

    >>> image = DecodedImage(np.zeros((2, 3, 1), np.uint8), Path("a.png"), max_value=255)
    >>> check_size((3, 2), image, "a_mask.png")
    Traceback (most recent call last):
    lightning_dice.data.errors.DataProblem: a_mask.png: is 3x2 (height x width), but its image a.png is 2x3, ...
    """
    if size == image.size:
        return
    (height, width), (tall, wide) = size, image.size
    turned = " after the turn that its orientation tag asks for" if image.turned else ""
    swapped = ", transposed" if (height, width) == (wide, tall) else ""
    its = f"its image {image.path.name} is {tall}x{wide}{turned}{swapped}"
    remedy = "Give the mask the image's size; resize with nearest neighbour."
    raise DataProblem(f"is {height}x{width} (height x width), but {its}", where, remedy)


def _gray_values(image: DecodedImage) -> NDArray[Any]:
    pixels = image.pixels
    pixels = pixels[..., :-1] if image.alpha else pixels
    if pixels.shape[2] > 1 and (pixels != pixels[..., :1]).any():
        found = f" ({_count_colors(_color_codes(pixels))})" if pixels.dtype == np.uint8 and pixels.shape[2] == 3 else ""
        remedy = "List the colours in the order of the ids: 'data.colors=[[0,0,0],[255,0,0]]'."
        raise DataProblem(f"is painted in colours{found}, but ids are required", image.path, remedy)
    stored = pixels[..., 0]
    if stored.dtype.kind == "f":
        whole = np.nan_to_num(stored, nan=0.5, posinf=0.5, neginf=0.5)
        if (whole != np.rint(whole)).any():
            remedy = "Threshold it and save whole numbers."
            raise DataProblem("holds fractions, but ids are required", image.path, remedy)
        return np.asarray(whole.astype(np.int64))
    return stored.view(np.uint8) if stored.dtype == bool else stored


def _lossy_problem(image: DecodedImage, values: Sequence[int] = ()) -> DataProblem:
    found = f" ({', '.join(str(value) for value in values[:8])} ...)" if values else ""
    what = f"is compressed with loss (JPEG), which blurs ids into their neighbours{found}"
    return DataProblem(what, image.path, "Save masks as PNG, from the original and not from the JPEG.")


def _color_codes(colors: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.asarray(colors.astype(np.int64) @ np.array([65536, 256, 1]))


def _count_colors(codes: NDArray[np.int64]) -> str:
    counts = sorted(count_values(codes).items(), key=lambda pair: -pair[1])
    return join_some([f"[{code >> 16},{code >> 8 & 255},{code & 255}] {count} pixels" for code, count in counts])


def _to_integer(value: object, name: str) -> int:
    """Convert an integer, or a string of one: a YAML key may be either."""
    try:
        number = int(str(value))
    except ValueError:
        raise ValueError(f"{name} must hold whole numbers, got {value!r}") from None
    return number


def _check_colors(colors: object) -> tuple[tuple[int, ...], ...]:
    example = "for instance 'data.colors=[[0,0,0],[255,0,0]]'"
    if isinstance(colors, str) or not isinstance(colors, Sequence):
        raise ValueError(f"colors must be a list of [red, green, blue], got {colors!r}; {example}")
    rows = [tuple(row) if isinstance(row, Sequence) and not isinstance(row, str) else (row,) for row in colors]
    listed = tuple(tuple(_to_integer(part, "colors") for part in row) for row in rows)
    for color in listed:
        if len(color) != 3 or not all(0 <= part <= 255 for part in color):
            raise ValueError(f"colors must be [red, green, blue] of 0 to 255 each, got {list(color)}; {example}")
    if len(set(listed)) != len(listed):
        raise ValueError(f"colors must differ from each other, got {[list(color) for color in listed]}")
    return listed
