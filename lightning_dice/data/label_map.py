"""Which label values of a mask file make up which class, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHOWN = 8  # values in one message


@dataclass(frozen=True)
class LabelMap:
    """Classes as sets of the label values that are stored in a mask.

    Args:
        classes: names of the logits' channels.
        values: the stored values of each class. With `activation="softmax"` no value belongs to two, and the first
            class is the background; with `"sigmoid"` classes may share values (regions), and what belongs to none of
            them is background.
        activation: of the logits, by which a mask is a map of ids or a plane for each class.
        background: with `"sigmoid"`, the stored values of no class.
        ignored: stored values of voxels that count as nothing.
        ignore_index: what these become.
        written: the value that a class is written as; by default its first. Where classes share a voxel, the last one
            in this order stays (nnU-Net's `regions_class_order`).
        folders: overlapping classes are written into a folder each, as they cannot be in one file.

    Raises:
        ValueError: a stored value means two things, or nothing is left of a class.

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
            raise ValueError(f"values must hold some for each of the {len(self.classes)} classes, got {self.values}")
        owners: dict[int, str] = dict.fromkeys(self.ignored, "the ignored label")
        parts = list(zip(self.classes, self.values, strict=True))
        parts = parts if softmax else [("background", self.background), ("foreground", tuple(sorted(self.foreground)))]
        for name, values in parts:
            for value in values:
                if value in owners:
                    raise ValueError(f"values must mean one thing each, got {value} for {owners[value]} and {name!r}")
                owners[value] = repr(name)
        ids = range(len(self.classes) if softmax else 2)
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
        """Masks of ids, as `MaskFormat` has them: 0, 1, 2 ... (softmax), or 1, 2 ... above a background of 0 (sigmoid).

        Args:
            classes: their names.
            activation: see the class.
            ignore_index: stored, or mapped to by `label_map`.
            label_map: stored value -> id, where they differ.
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
            # The first one is written: what is said of the masks, but what became background is none of it again.
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
        """All stored values that mean something."""
        background = self.values[0] if self.activation == "softmax" else self.background
        return self.foreground | frozenset(background) | frozenset(self.ignored)

    def describe(self, counts: Mapping[int, int], planes: bool = False) -> str:
        """The values without a meaning among `counts`, in words; empty if there is none."""
        known = frozenset(self._plane) if planes else self.known
        strange = {value: count for value, count in counts.items() if value not in known}
        if not strange:
            return ""
        shown = ", ".join(f"{value} ({count} voxels)" for value, count in list(strange.items())[:SHOWN])
        more = f" and {len(strange) - SHOWN} more" if len(strange) > SHOWN else ""
        return f"the values {shown}{more}, which belong to no class: known are {sorted(known)}"

    def encode(self, stored: Sequence[NDArray[Any]]) -> Tensor:
        """Class ids `(*space)` (softmax) or planes `(classes, *space)` (sigmoid), uint8 where they fit, else int32.

        Args:
            stored: label values of one file; or of a file for each class, where the values of the first class, 1 and
                those that are mapped to it, say where a class is.

        Raises:
            ValueError: a value belongs to no class.
        """
        ids = range(len(self.classes))
        dtype: Any = (
            np.uint8 if max(ids[-1], self.ignore_index or 0) < 256 and (self.ignore_index or 0) >= 0 else np.int32
        )
        if len(stored) > 1:
            return torch.from_numpy(np.stack([_looked_up(part, self._plane, dtype) for part in stored]))
        ignored = dict.fromkeys(self.ignored, self.ignore_index or 0)
        if self.activation == "softmax":
            table = {value: index for index in ids for value in self.values[index]} | ignored
            return torch.from_numpy(_looked_up(stored[0], table, dtype))
        planes = []
        for values in self.values:
            table = dict.fromkeys(self.known, 0) | dict.fromkeys(values, 1) | ignored
            planes.append(_looked_up(stored[0], table, dtype))
        return torch.from_numpy(np.stack(planes))

    def decode(self, labels: Tensor) -> list[NDArray[Any]]:
        """What is stored in the one file of a mask, or in that of each class with `folders`.

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
        """Voxels of each class, and under `None` the ignored ones, from those of each stored value.

        Args:
            stored: voxels of each value in a file.
            planes: the class that the file is of, where each has one.
        """
        parts = list(zip(self.classes, self.values, strict=True))
        parts = parts if planes is None else [(self.classes[planes], self.values[0])]
        found: dict[str | None, int] = {name: sum(stored.get(value, 0) for value in values) for name, values in parts}
        found[None] = sum(stored.get(value, 0) for value in self.ignored)
        return found

    @property
    def _plane(self) -> dict[int, int]:
        """What the values of a file that is of one class become."""
        ignored = dict.fromkeys(self.ignored, self.ignore_index or 0)
        return {**dict.fromkeys(self.background, 0), **dict.fromkeys(self.values[0], 1), **ignored}


def _looked_up(stored: NDArray[Any], table: Mapping[int, int], dtype: Any) -> NDArray[Any]:
    least, largest = min(table), max(table)
    labels = np.zeros(largest - least + 1, dtype)
    known = np.zeros(largest - least + 1, bool)
    for value, label in table.items():
        labels[value - least], known[value - least] = label, True
    places = stored.astype(np.int64) - least
    strange = (places < 0) | (places >= len(labels))
    np.clip(places, 0, len(labels) - 1, out=places)
    strange |= ~known[places]
    if strange.any():
        values, counts = np.unique(stored[strange], return_counts=True)
        shown = ", ".join(
            f"{value} ({count} voxels)" for value, count in list(zip(values, counts, strict=True))[:SHOWN]
        )
        raise ValueError(f"holds the values {shown}, which belong to no class: known are {sorted(table)}")
    return np.asarray(labels[places])


def count_values(stored: NDArray[Any]) -> dict[int, int]:
    """Pixels of each value.

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
