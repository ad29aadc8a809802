"""Map the stored values of a mask to classes, and back; `images.mask_format` does the same for 2D masks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.argument_checks import check_label
from lightning_dice.text import join_some

MAX_SPAN = 2**20  # stored values; a wider range is searched instead of tabulated


@dataclass(frozen=True)
class LabelMap:
    """Classes as sets of the label values that are stored in a mask.

    Args:
        classes: names of the channels of the logits.
        values: the stored values of each class. With `activation="softmax"` a value belongs to one class at most, and
            the first class is the background; with `"sigmoid"` classes may share values (regions).
        activation: for the logits: `"softmax"` makes a mask a map of ids, `"sigmoid"` a plane for each class.
        background: with `"sigmoid"`, the stored values that belong to no class.
        ignored: stored values of voxels that neither loss nor score counts.
        ignore_index: the label that these get.
        written: the value that each class is written as; by default its first. Where classes overlap, later ones
            overwrite earlier ones (nnU-Net's `regions_class_order`).
        folders: write each class into a folder of its own, since one file cannot hold classes that overlap.

    Raises:
        ValueError: a stored value has two meanings, or a class has no value.

    >>> labels = LabelMap(("whole", "core"), ((1, 2), (2,)), "sigmoid", written=(1, 2))
    >>> planes = labels.encode([np.array([0, 1, 2])])
    >>> planes
    tensor([[0, 1, 1],
            [0, 0, 1]], dtype=torch.uint8)
    >>> labels.decode(planes.bool())
    [array([0, 1, 2], dtype=uint8)]
    """

    classes: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    activation: Literal["softmax", "sigmoid"] = "softmax"
    background: tuple[int, ...] = (0,)
    ignored: tuple[int, ...] = ()
    ignore_index: int | None = 255
    written: tuple[int, ...] | None = None
    folders: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ("softmax", "sigmoid"):
            raise ValueError(f"activation must be 'softmax' or 'sigmoid' to read masks, got {self.activation!r}")
        softmax = self.activation == "softmax"
        if len(self.classes) < 1 + softmax or len(set(self.classes)) < len(self.classes):
            raise ValueError(
                f"classes must be {'at least two' if softmax else 'one or more'} different names"
                f"{', the first the background' if softmax else ''}, got {list(self.classes)}"
            )
        if len(self.values) != len(self.classes) or not all(self.values):
            raise ValueError(f"values must have some for each of the {len(self.classes)} classes, got {self.values}")
        owners: dict[int, str] = dict.fromkeys(self.ignored, "the ignored label")
        parts = list(zip(self.classes, self.values, strict=True))
        parts = parts if softmax else [("background", self.background), ("foreground", tuple(sorted(self.foreground)))]
        for name, values in parts:
            for value in values:
                if value in owners:
                    raise ValueError(f"values must mean one thing each, got {value} for {owners[value]} and {name!r}")
                owners[value] = repr(name)
        ids = range(len(self.classes) if softmax else 2)
        check_label("ignore_index", self.ignore_index)
        if self.ignore_index is not None and self.ignore_index in ids:
            raise ValueError(f"ignore_index must be no class's id, got {self.ignore_index}; keep it at 255 or so")
        if self.ignored and self.ignore_index is None:
            raise ValueError(f"ignore_index must be set, as the stored values {list(self.ignored)} are to be ignored")
        if self.written is not None and len(self.written) != len(self.classes):
            raise ValueError(
                f"regions_class_order must have a value for each of the {len(self.classes)} classes, "
                f"got {list(self.written)}"
            )

    @classmethod
    def of_ids(
        cls,
        classes: Sequence[str],
        activation: Literal["softmax", "sigmoid"] = "softmax",
        ignore_index: int | None = 255,
        label_map: Mapping[int, int] | None = None,
    ) -> LabelMap:
        """Make the map of masks that hold ids, as in `MaskFormat`: 0, 1, 2 ... (softmax), or 1, 2 ... (sigmoid).

        Args:
            classes: their names.
            activation: see the class.
            ignore_index: the ignored label, as stored or as a target of `label_map`.
            label_map: stored value -> id, where they differ.

        Raises:
            ValueError: `label_map` has another target.

        >>> LabelMap.of_ids(["background", "lesion"], label_map={205: 1}).values
        ((0,), (205, 1))
        """
        names = tuple(str(name) for name in classes)
        mapped = {int(key): int(value) for key, value in (label_map or {}).items()}
        first = int(activation == "sigmoid")
        ids = range(first + len(names))
        extra = [label for label in mapped.values() if label not in ids and label != ignore_index]
        if extra:
            raise ValueError(
                f"label_map must map to the ids 0 to {ids[-1]} or ignore_index={ignore_index}, got {extra[0]}"
            )

        def stored(label: int) -> tuple[int, ...]:
            own = (label,) if mapped.get(label, label) == label else ()
            others = tuple(value for value, to in mapped.items() if to == label and value != label)
            # The first one is written: the mapped value, as in the masks; for the background 0, since the values that
            # are mapped to it may be structures that were merged into it.
            return own + others if label == 0 else others + own

        return cls(
            names,
            tuple(stored(first + index) for index in range(len(names))),
            activation,
            background=stored(0),
            ignored=() if ignore_index is None else stored(ignore_index),
            ignore_index=ignore_index,
            folders=activation == "sigmoid" and len(names) > 1,
        )

    @property
    def foreground(self) -> frozenset[int]:
        """The stored values of all classes but the background."""
        kept = self.values[1:] if self.activation == "softmax" else self.values
        return frozenset(value for values in kept for value in values)

    @property
    def known(self) -> frozenset[int]:
        """All stored values that have a meaning."""
        background = self.values[0] if self.activation == "softmax" else self.background
        return self.foreground | frozenset(background) | frozenset(self.ignored)

    def describe_unknown(self, counts: Mapping[int, int], planes: bool = False) -> str:
        """Describe the values without a meaning among `counts`; empty if all have one.

        >>> LabelMap.of_ids(["background", "lesion"]).describe_unknown({0: 9, 7: 2})
        'the values 7 (2 voxels), which belong to no class: known are [0, 1, 255]'
        """
        known = frozenset(self._plane_table) if planes else self.known
        unknown = list_unknown(counts, known, "voxels")
        return unknown and f"{unknown}, which belong to no class: known are {sorted(known)}"

    def encode(self, stored: Sequence[NDArray[Any]]) -> Tensor:
        """Return class ids `(*space)` (softmax) or planes `(classes, *space)` (sigmoid), uint8 if they fit, else int32.

        Args:
            stored: the values of one file, or of one file for each class. The latter hold the values of the first
                class, 1 and those that are mapped to it, where their class is.

        Raises:
            ValueError: a value belongs to no class.
        """
        dtype = label_dtype(len(self.classes) - 1, self.ignore_index)
        describe = partial(self.describe_unknown, planes=len(stored) > 1)
        if len(stored) > 1:
            return torch.from_numpy(np.stack([look_up(part, self._plane_table, dtype, describe) for part in stored]))
        ignored = dict.fromkeys(self.ignored, self.ignore_index or 0)
        if self.activation == "softmax":
            table = {value: index for index, values in enumerate(self.values) for value in values} | ignored
            return torch.from_numpy(look_up(stored[0], table, dtype, describe))
        background = dict.fromkeys(self.known, 0)
        tables = [background | dict.fromkeys(values, 1) | ignored for values in self.values]
        return torch.from_numpy(np.stack([look_up(stored[0], table, dtype, describe) for table in tables]))

    def decode(self, labels: Tensor) -> list[NDArray[Any]]:
        """Return the values to store: in one file, or with `folders` in a file for each class.

        Args:
            labels: ids `(*space)` or bool planes `(classes, *space)`.
        """
        array = labels.cpu().numpy()
        background = self.values[0][0] if self.activation == "softmax" else (self.background or (0,))[0]
        values = self.written if self.written is not None else tuple(values[0] for values in self.values)
        largest, least = max(*values, background), min(*values, background)
        dtype: Any = np.uint8 if least >= 0 and largest < 256 else np.int16 if largest < 2**15 else np.int32
        if self.activation == "softmax":
            return [np.asarray(values, dtype)[array]]
        if self.folders:
            return [np.where(plane, values[0], background).astype(dtype) for plane in array != 0]
        painted = np.full(array.shape[1:], background, dtype)
        for plane, value in zip(array != 0, values, strict=True):
            painted[plane] = value
        return [painted]

    def counts(self, stored: Mapping[int, int], planes: int | None = None) -> dict[str | None, int]:
        """Count the voxels of each class, and under `None` the ignored ones.

        Args:
            stored: how many voxels of a file have each value.
            planes: the index of the file's class, if each class has a file.

        >>> LabelMap.of_ids(["background", "lesion"]).counts({0: 5, 1: 3, 255: 2})
        {'background': 5, 'lesion': 3, None: 2}
        """
        parts = list(zip(self.classes, self.values, strict=True))
        parts = parts if planes is None else [(self.classes[planes], self.values[0])]
        found: dict[str | None, int] = {name: sum(stored.get(value, 0) for value in values) for name, values in parts}
        found[None] = sum(stored.get(value, 0) for value in self.ignored)
        return found

    @property
    def _plane_table(self) -> dict[int, int]:
        """The label of each value in a file of one class."""
        ignored = dict.fromkeys(self.ignored, self.ignore_index or 0)
        return {**dict.fromkeys(self.background, 0), **dict.fromkeys(self.values[0], 1), **ignored}


def label_dtype(largest: int, ignore_index: int | None) -> type[np.generic]:
    """Return uint8 if the ids up to `largest` and `ignore_index` fit, else int32.

    >>> label_dtype(3, ignore_index=255).__name__, label_dtype(3, ignore_index=-1).__name__
    ('uint8', 'int32')
    """
    ignored = ignore_index or 0
    return np.uint8 if ignored >= 0 and max(largest, ignored) <= 255 else np.int32


def look_up(
    stored: NDArray[Any], table: Mapping[int, int], dtype: Any, describe: Callable[[Mapping[int, int]], str]
) -> NDArray[Any]:
    """Replace each stored value by its label.

    Args:
        stored: integers of any shape.
        table: stored value -> label.
        dtype: the labels' dtype.
        describe: describes the values without a label for the message, from how often each value is stored.

    Raises:
        ValueError: a value has no label.

    >>> look_up(np.array([0, 128, 0]), {0: 0, 128: 1}, np.uint8, describe=str)
    array([0, 1, 0], dtype=uint8)
    """
    known_values = np.array(sorted(table), np.int64)
    least, largest = int(known_values[0]), int(known_values[-1])
    if stored.dtype in (np.uint8, np.uint16):  # A table of all values needs no check of the range.
        least, largest = 0, int(np.iinfo(stored.dtype).max)
        positions, outside = stored, None
    elif largest - least < MAX_SPAN:
        positions = stored.astype(np.int64) - least
        outside = (positions < 0) | (positions > largest - least)
        np.clip(positions, 0, largest - least, out=positions)
    else:
        positions = np.searchsorted(known_values, stored).clip(max=len(known_values) - 1)
        outside = known_values[positions] != stored
        table, least, largest = {i: table[int(v)] for i, v in enumerate(known_values)}, 0, len(known_values) - 1
    labels = np.zeros(largest - least + 1, dtype)
    known = np.zeros(largest - least + 1, bool)
    for value, label in table.items():
        if least <= value <= largest:
            labels[value - least], known[value - least] = label, True
    if not known[positions].all() or (outside is not None and outside.any()):
        raise ValueError(f"holds {describe(count_values(stored))}")
    return np.asarray(labels[positions])


def list_unknown(counts: Mapping[int, int], known: Collection[int], unit: str) -> str:
    """List the values that are not among the known ones, with how often they occur; empty if there are none.

    >>> list_unknown({0: 50, 7: 2, 9: 1}, known=[0, 1], unit="pixels")
    'the values 7 (2 pixels), 9 (1 pixels)'
    """
    unknown = [f"{value} ({count} {unit})" for value, count in counts.items() if value not in known]
    return f"the values {join_some(unknown)}" if unknown else ""


def suggest_label_map(values: Collection[int], ids: range, ignore_index: int | None) -> str:
    """Return a remedy for values without an id: the `data.label_map` that maps them, if it is obvious.

    >>> suggest_label_map({0, 128, 255}, range(3), 255)
    "Set 'data.label_map={128:1,255:2}'."
    >>> suggest_label_map({0, 100, 255}, range(2), 255)
    "Set 'data.label_map={100:1}'."
    """
    ordered = sorted(values)
    if len(ordered) == len(ids) + 1 and ordered[-1] == ignore_index:
        ordered = ordered[:-1]
    if 0 in values and len(ordered) == len(ids):
        pairs = ",".join(f"{value}:{label}" for label, value in zip(ids, ordered, strict=True) if value != label)
        return f"Set 'data.label_map={{{pairs}}}'."
    unknown = [value for value in ordered if value not in ids and value != ignore_index]
    example = f"{(unknown or ordered)[0]}:{ids[-1] if ignore_index is None else ignore_index}"
    ignore = "" if ignore_index is None else f", or to {ignore_index} to ignore them"
    return f"Name all classes in data.classes, or map values to ids{ignore}: 'data.label_map={{{example}}}'."


def count_values(stored: NDArray[Any]) -> dict[int, int]:
    """Count how often each value is stored.

    >>> count_values(np.array([[0, 7, 7]], dtype=np.uint8))
    {0: 1, 7: 2}
    """
    if stored.dtype in (np.uint8, np.uint16):
        counts = np.bincount(stored.ravel())
        values = np.flatnonzero(counts)
        counts = counts[values]
    else:
        values, counts = np.unique(stored, return_counts=True)
    return {int(value): int(count) for value, count in zip(values, counts, strict=True)}
