"""How a mask's pixels become class ids or planes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.images.image_reader import Picture, read_picture
from lightning_dice.data.images.windowed_tiff import LargePicture, open_windows
from lightning_dice.data.label_map import count_values

SHOWN = 8  # values or colours in one message
CLEAN_GAP = 16  # JPEG's errors are smaller where it is harmless at all


class Sized(Protocol):
    """A picture, decoded or not, as far as its mask must fit: `Picture` or `LargePicture`."""

    @property
    def path(self) -> Path:
        """Where it came from."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        ...

    @property
    def turned(self) -> bool:
        """Its orientation tag asked for a turn or a flip, which was made."""
        ...


class StoredMask(Protocol):
    """A mask that is no picture file, such as one drawn from outlines."""

    def __str__(self) -> str:
        """Where it is, for messages."""
        ...

    def values(self, image: Sized, mask_format: MaskFormat, rows: slice, columns: slice) -> list[NDArray[Any]]:
        """The stored values of a window, `(height, width)`: ids, or those of each class.

        Raises:
            DataError: it does not fit the image.
        """
        ...


MaskFile = Path | StoredMask


@dataclass(frozen=True)
class MaskFormat:
    """How masks are stored, and what they shall become.

    A mask's *values* are its samples as stored: gray levels, palette indices, or with `colors` the position of each
    colour in that list. `label_map` maps some of them to ids; the others are ids already.

    Args:
        classes: with `activation="softmax"` the names of the ids 0, 1, 2 ...; with `"sigmoid"` the names of the
            foreground classes alone, whose ids are 1, 2, 3 ... (0 is background).
        activation: the activation of the net's logits: `"softmax"` makes a map of ids, `"sigmoid"` one 0/1 plane for
            each class.
        ignore_index: the label of pixels to be left out of loss and metric; `None` for none.
        label_map: stored value -> id, such as `{255: 1}`, or `{11: 255}` to ignore the label 11.
        colors: `[red, green, blue]` of each value, in order, for masks painted in colours.
        multichannel_masks: a mask file has a channel for each class, which holds 1 where the class is; with a softmax the
            background may do without.

    Raises:
        ValueError: where the settings contradict each other.

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
        # Hydra gives containers of its own, which neither hash nor pickle cheaply.
        names = tuple(str(name) for name in self.classes)
        if len(set(names)) != len(names):
            raise ValueError(f"classes must differ from each other, got {list(names)}")
        if self.activation == "softmax" and len(names) < 2:
            raise ValueError(
                f"classes must name every id for activation='softmax', the background too, got {list(names)}; "
                f"set 'data.classes=[background,{names[0]}]', or data.activation=sigmoid for foreground classes alone"
            )
        ignored = None if self.ignore_index is None else _integer(self.ignore_index, "ignore_index")
        pairs = self.label_map if self.label_map is not None else {}
        if not isinstance(pairs, Mapping):
            example = "for instance 'data.label_map={255:1}'"
            raise ValueError(f"label_map must map stored values to ids, got {pairs!r}; {example}")
        mapped = {_integer(key, "label_map"): _integer(value, "label_map") for key, value in pairs.items()}
        if self.multichannel_masks and self.colors is not None:
            raise ValueError("stacked masks have a channel for each class and no colors: set one of the two")
        object.__setattr__(self, "classes", names)
        object.__setattr__(self, "ignore_index", ignored)
        object.__setattr__(self, "label_map", mapped)
        object.__setattr__(self, "colors", None if self.colors is None else _colors(self.colors))
        self._check_ids()

    def _check_ids(self) -> None:
        if self.ignore_index is not None and self.ignore_index in self.ids:
            name = {**dict(zip(self.class_ids, self.classes, strict=True)), 0: "background"}[self.ignore_index]
            raise ValueError(
                f"ignore_index must be no class's id, got {self.ignore_index}, the id of {name!r}; "
                f"keep it at 255 or so and set 'data.label_map={{{self.ignore_index}:255}}'"
            )
        allowed = f"the ids 0 to {len(self.ids) - 1} or ignore_index={self.ignore_index}"
        for value, label in self._values.items():
            if label not in self.ids and label != self.ignore_index:
                raise ValueError(f"label_map must map to {allowed}, got {value}:{label}")
        if self.colors is None:
            return
        labels = [self._values.get(value, value) for value in range(len(self.colors))]
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
        """The ids an id mask may hold, the background's included."""
        return range(len(self.classes) + (self.activation == "sigmoid"))

    @property
    def class_ids(self) -> range:
        """The id of each class of `classes`, in an id mask."""
        return self.ids[-len(self.classes) :]

    @property
    def _values(self) -> dict[int, int]:
        return dict(self.label_map or {})

    def label(self, value: int, planes: bool = False) -> int | None:
        """The id of a stored value, or `None` where it has none; a plane of its own holds the ids 0 and 1."""
        label = self._values.get(value, value)
        return label if label in (range(2) if planes else self.ids) or label == self.ignore_index else None

    @property
    def background(self) -> str | None:
        """The class that is where no other one is, and needs no plane of its own."""
        return self.classes[0] if self.activation == "softmax" else None

    def read_planes(self, picture: Picture) -> list[NDArray[Any]]:
        """The stored values of a mask file: of ids as one array, of stacked classes as one for each.

        Raises:
            DataError: as in `read`; for stacked classes, another number of channels.
        """
        if not self.multichannel_masks:
            return [self.read(picture)]
        pixels = picture.colors() if picture.palette is not None else picture.pixels
        channels, classes = pixels.shape[2], len(self.classes)
        if channels not in (classes, classes - (self.background is not None)):
            less = f", or {classes - 1} without the background" if self.background is not None else ""
            what = f"has {channels} channels ({picture.kind}), data.multichannel_masks=true needs one for each of {classes} classes"
            raise DataProblem(
                what + less,
                picture.path,
                "Set data.classes to what the channels are, or data.multichannel_masks=false.",
            )
        plain = replace(picture, alpha=False, palette=None)
        return [self.read(replace(plain, pixels=pixels[..., index : index + 1])) for index in range(channels)]

    def read(self, picture: Picture) -> NDArray[Any]:
        """The stored values of a mask file, `(height, width)`.

        Raises:
            DataError: for colours without `colors`, a colour that is not among them, fractions, and lossy compression
                that has blurred the values.
        """
        try:
            stored = self._positions(picture) if self.colors is not None else _samples(picture)
        except DataProblem as problem:
            raise _lossy(picture) if picture.lossy else problem from None
        if picture.lossy and self.colors is None:
            found = np.unique(stored).astype(np.int64)
            if (np.diff(found) < CLEAN_GAP).any():
                raise _lossy(picture, found.tolist())
        return stored

    def _positions(self, picture: Picture) -> NDArray[Any]:
        pixels = picture.colors()
        pixels = pixels[..., :-1] if picture.alpha else pixels
        if pixels.dtype == bool:
            pixels = pixels * np.uint8(255)
        if pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3):
            raise DataProblem(f"is {picture.kind}, data.colors needs 8-bit RGB", picture.path, "Save it as 8-bit RGB.")
        codes = _codes(np.broadcast_to(pixels, (*picture.size, 3)))
        listed = _codes(np.asarray(self.colors, dtype=np.uint8))
        order = np.argsort(listed)
        nearest = np.searchsorted(listed[order], codes).clip(max=len(listed) - 1)
        positions = order[nearest]
        strange = codes[listed[positions] != codes]
        if strange.size:
            what = f"holds colours that data.colors does not list: {_count_colors(strange)}"
            raise DataProblem(what, picture.path, "List them, in the order of the ids.")
        return np.asarray(positions, dtype=np.uint8 if len(listed) <= 256 else np.int32)

    def encode(self, stored: Sequence[NDArray[Any]], planes: bool = False) -> Tensor:
        """Make a mask of what `read` gave: of one file with ids, or with `planes` of one for each class.

        Returns:
            Class ids `(height, width)` for softmax, planes `(classes, height, width)` for sigmoid; uint8 where ids and
            `ignore_index` fit, else int32.

        Raises:
            ValueError: for a value without an id; for softmax, pixels of several planes, or of none where the
                background has one too.
        """
        labels = [self._labels(part, planes) for part in stored]
        if planes:
            return torch.from_numpy(self._exclusive(labels) if self.activation == "softmax" else np.stack(labels))
        if self.activation == "softmax":
            return torch.from_numpy(labels[0])
        mask = (labels[0] == np.asarray(self.class_ids).reshape(-1, 1, 1)).astype(labels[0].dtype)
        if self.ignore_index is not None:
            mask[:, labels[0] == self.ignore_index] = self.ignore_index
        return torch.from_numpy(mask)

    def _exclusive(self, labels: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Ids of planes of which each pixel has at most one; ignored where any plane says so."""
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

    def _labels(self, stored: NDArray[Any], planes: bool) -> NDArray[Any]:
        if stored.dtype in (np.uint8, np.uint16):  # One look-up per pixel, no sorting.
            keys, inverse = np.arange(int(np.iinfo(stored.dtype).max) + 1), stored
        else:
            keys, inverse = np.unique(stored, return_inverse=True)
        largest = max(len(self.ids) - 1, self.ignore_index or 0)
        small = largest <= 255 and (self.ignore_index or 0) >= 0
        table = np.zeros(len(keys), np.uint8 if small else np.int32)
        strange = np.ones(len(keys), bool)
        for index in self._candidates(keys):
            label = self.label(int(keys[index]), planes)
            if label is not None:
                table[index], strange[index] = label, False
        if strange[inverse].any():
            found = count_values(stored)
            raise ValueError(f"holds {self.describe(found, planes)}")
        return np.asarray(table[inverse].reshape(stored.shape))

    def _candidates(self, keys: NDArray[Any]) -> list[int]:
        """Where the values stand that can have an id at all: few, even if `keys` are all 65536 of 16 bit."""
        possible = np.asarray([*self.ids, *self._values, *([] if self.ignore_index is None else [self.ignore_index])])
        return [int(index) for index in np.flatnonzero(np.isin(keys, possible))]

    def describe(self, counts: Mapping[int, int], planes: bool = False) -> str:
        """The values without an id among `counts`, in words; empty if each has one."""
        strange = {value: count for value, count in counts.items() if self.label(value, planes) is None}
        if not strange:
            return ""
        shown = ", ".join(f"{value} ({count} pixels)" for value, count in list(strange.items())[:SHOWN])
        more = f" and {len(strange) - SHOWN} more" if len(strange) > SHOWN else ""
        ids = range(2) if planes else self.ids
        ignored = "" if self.ignore_index is None else f" or {self.ignore_index} (ignored)"
        return f"the values {shown}{more}, which are not ids: required 0 to {ids[-1]}{ignored}"


class OpenMask:
    """A mask of which windows are read: a file with ids or with one class, or what is no picture file.

    Args:
        image: what the mask belongs to, whose size it must have.
        file: where it is.
        mask_format: how masks are stored.
        whole: decode it now, whatever its size; else of a large TIFF windows are decoded as they are asked for.

    Raises:
        DataError: naming the mask.
    """

    def __init__(self, image: Sized, file: MaskFile, mask_format: MaskFormat, whole: bool = False) -> None:
        self.image, self.mask_format = image, mask_format
        self._source: Picture | LargePicture | StoredMask
        if isinstance(file, Path):
            large = None if whole else open_windows(file)
            self._source = read_picture(file) if large is None else large
            check_size(self._source.size, image, file)
        else:
            self._source = file

    def planes(self, rows: slice, columns: slice) -> list[NDArray[Any]]:
        """The stored values of a window, `(height, width)`: of ids as one array, of several classes as one for each.

        Raises:
            DataError: as by `MaskFormat.read_planes`, or `StoredMask.values`.
        """
        if isinstance(self._source, (Picture, LargePicture)):
            return self.mask_format.read_planes(self._source.window(rows, columns))
        return self._source.values(self.image, self.mask_format, rows, columns)

    @property
    def nbytes(self) -> int:
        """What is kept in memory."""
        return self._source.nbytes if isinstance(self._source, (Picture, LargePicture)) else 0

    def forget(self) -> None:
        """Free what the last windows have left."""
        if isinstance(self._source, (Picture, LargePicture)):
            self._source.forget()


def check_size(size: tuple[int, int], image: Sized, where: Path | str) -> None:
    """See that a mask has its image's size.

    Raises:
        DataError: naming the mask.
    """
    if size == image.size:
        return
    (height, width), (tall, wide) = size, image.size
    turned = " after the turn that its orientation tag asks for" if image.turned else ""
    swapped = ", transposed" if (height, width) == (wide, tall) else ""
    its = f"its image {image.path.name} is {tall}x{wide}{turned}{swapped}"
    remedy = "Give the mask the image's size; resize with nearest neighbour."
    raise DataProblem(f"is {height}x{width} (height x width), but {its}", where, remedy)


def suggest(values: set[int], ids: range, ignore_index: int | None) -> str:
    """The `data.label_map` that would make ids of these stored values, where that is plain; else what to look at.

    >>> suggest({0, 128, 255}, range(3), 255)
    "Set 'data.label_map={128:1,255:2}'."
    >>> suggest({0, 100, 255}, range(2), 255)
    "Set 'data.label_map={100:1}'."
    """
    ordered = sorted(values)
    if len(ordered) == len(ids) + 1 and ordered[-1] == ignore_index:
        ordered = ordered[:-1]
    if 0 in values and len(ordered) == len(ids):
        pairs = ",".join(f"{value}:{label}" for label, value in zip(ids, ordered, strict=True) if value != label)
        return f"Set 'data.label_map={{{pairs}}}'."
    strange = [value for value in ordered if value not in ids and value != ignore_index]
    example = f"{(strange or ordered)[0]}:{ids[-1] if ignore_index is None else ignore_index}"
    ignore = "" if ignore_index is None else f", or to {ignore_index} to ignore them"
    return f"Name all classes in data.classes, or map values to ids{ignore}: 'data.label_map={{{example}}}'."


def _samples(picture: Picture) -> NDArray[Any]:
    pixels = picture.pixels
    pixels = pixels[..., :-1] if picture.alpha else pixels
    if pixels.shape[2] > 1 and (pixels != pixels[..., :1]).any():
        found = f" ({_count_colors(_codes(pixels))})" if pixels.dtype == np.uint8 and pixels.shape[2] == 3 else ""
        remedy = "List the colours in the order of the ids: 'data.colors=[[0,0,0],[255,0,0]]'."
        raise DataProblem(f"is painted in colours{found}, ids are required", picture.path, remedy)
    stored = pixels[..., 0]
    if stored.dtype.kind == "f":
        whole = np.nan_to_num(stored, nan=0.5, posinf=0.5, neginf=0.5)
        if (whole != np.rint(whole)).any():
            raise DataProblem("holds fractions, ids are required", picture.path, "Threshold it and save whole numbers.")
        return np.asarray(whole.astype(np.int64))
    return stored.view(np.uint8) if stored.dtype == bool else stored


def _lossy(picture: Picture, values: Sequence[int] = ()) -> DataProblem:
    found = f" ({', '.join(str(value) for value in values[:SHOWN])} ...)" if values else ""
    what = f"is compressed with loss (JPEG), which blurs ids into their neighbours{found}"
    return DataProblem(what, picture.path, "Save masks as PNG, from the original and not from the JPEG.")


def _codes(colors: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.asarray(colors.astype(np.int64) @ np.array([65536, 256, 1]))


def _count_colors(codes: NDArray[np.int64]) -> str:
    counts = sorted(count_values(codes).items(), key=lambda pair: -pair[1])
    shown = ", ".join(f"[{code >> 16},{code >> 8 & 255},{code & 255}] {count} pixels" for code, count in counts[:SHOWN])
    return shown + (f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")


def _integer(value: object, name: str) -> int:
    """An integer, or a string of one: a YAML key may be either."""
    try:
        number = int(str(value))
    except ValueError:
        raise ValueError(f"{name} must hold whole numbers, got {value!r}") from None
    return number


def _colors(colors: object) -> tuple[tuple[int, ...], ...]:
    example = "for instance 'data.colors=[[0,0,0],[255,0,0]]'"
    if isinstance(colors, str) or not isinstance(colors, Sequence):
        raise ValueError(f"colors must be a list of [red, green, blue], got {colors!r}; {example}")
    rows = [tuple(row) if isinstance(row, Sequence) and not isinstance(row, str) else (row,) for row in colors]
    listed = tuple(tuple(_integer(part, "colors") for part in row) for row in rows)
    for color in listed:
        if len(color) != 3 or not all(0 <= part <= 255 for part in color):
            raise ValueError(f"colors must be [red, green, blue] of 0 to 255 each, got {list(color)}; {example}")
    if len(set(listed)) != len(listed):
        raise ValueError(f"colors must differ from each other, got {[list(color) for color in listed]}")
    return listed
