"""The sums themselves, as a value, and which of them a loss wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Focal(NamedTuple):
    """The focal factor of a cross-entropy (Lin et al., ICCV 2017).

    Attributes:
        gamma: exponent of 1 - p of the true class.
        alpha: weight of the foreground, 1 - alpha that of the background; `None`: 1 for both. Only where each class
            has a plane of its own.
    """

    gamma: float = 2.0
    alpha: float | None = None


@dataclass(frozen=True)
class RequiredSums:
    """Sums beyond the four that are always there; see `OverlapSums` for what each is.

    >>> RequiredSums(nll=True) | RequiredSums(squares=True)
    RequiredSums(squares=True, minimum=False, nll=True, all_nll=False, absent_nll=False, focal=None)
    """

    squares: bool = False
    minimum: bool = False
    nll: bool = False
    all_nll: bool = False
    absent_nll: bool = False
    focal: Focal | None = None

    def __or__(self, other: RequiredSums) -> RequiredSums:
        """What either wants.

        Raises:
            ValueError: both want a focal sum, with different factors; `agrees` tells before.
        """
        if not self.agrees(other):
            raise ValueError(f"one pass has one focal factor, got {self.focal} and {other.focal}")
        return RequiredSums(
            self.squares or other.squares,
            self.minimum or other.minimum,
            self.nll or other.nll,
            self.all_nll or other.all_nll,
            self.absent_nll or other.absent_nll,
            self.focal or other.focal,
        )

    def agrees(self, other: RequiredSums) -> bool:
        """Whether one pass can serve both."""
        return self.focal is None or other.focal is None or self.focal == other.focal


def wide_dtype(values: Tensor) -> torch.dtype:
    """The dtype in which sums over pixels are taken: float64, but on devices that have none."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def holds_label(target: Tensor, ignore_index: int | None) -> bool:
    """Whether a target's dtype can hold the ignored label: compared with uint8, torch takes -1 for 255."""
    if ignore_index is None or target.dtype == torch.bool:
        return False
    if target.is_floating_point():
        return True
    limits = torch.iinfo(target.dtype)
    return limits.min <= ignore_index <= limits.max


def valid_pixels(target: Tensor, ignore_index: int | None) -> Tensor | None:
    """Where the target does not hold the ignored label; `None` if that is everywhere."""
    if not holds_label(target, ignore_index):
        return None
    return target.ne(ignore_index)  # type: ignore[arg-type]


@dataclass(frozen=True)
class OverlapSums:
    r"""Sums over the pixels of each class in each image, every one of shape `(images, classes)`.

    With the pixel weight `w` (0 at ignored pixels), the probability `p` and the target `t`:

    Attributes:
        overlap: :math:`\sum w p t`.
        predicted: :math:`\sum w p`.
        actual: :math:`\sum w t`.
        count: :math:`\sum w`, in pixels.
        predicted_squares: :math:`\sum w p^2`; this and the following are `None` unless wanted (a loss says so by its
            `wanted`: `RequiredSums(squares=True)`).
        actual_squares: :math:`\sum w t^2`.
        minimum: :math:`\sum w \min(p, t)`; the overlap, where every label is 0 or 1.
        nll: :math:`\sum w\,(-\log p)` over the pixels of the true class, in the sum of that class, where classes
            exclude each other; otherwise the binary cross-entropy.
        all_nll: :math:`\sum w\,(-\log p)`, whatever the target is.
        absent_nll: :math:`\sum w\,(-\log(1 - p))`, the cross-entropy of a class that should not be there.
        focal: as `nll`, each term times the focal factor.
        exclusive: whether the classes exclude each other (ids, or a softmax).
    """

    overlap: Tensor
    predicted: Tensor
    actual: Tensor
    count: Tensor
    predicted_squares: Tensor | None = None
    actual_squares: Tensor | None = None
    minimum: Tensor | None = None
    nll: Tensor | None = None
    all_nll: Tensor | None = None
    absent_nll: Tensor | None = None
    focal: Tensor | None = None
    exclusive: bool = field(default=False, kw_only=True)

    @property
    def fields(self) -> dict[str, Tensor]:
        """The sums that are there, by name."""
        return {name: value for name in _NAMES if (value := getattr(self, name)) is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> OverlapSums:
        """The same sums with `function` applied to each tensor."""
        return self.having({name: function(value) for name, value in self.fields.items()})

    def having(self, fields: Mapping[str, Tensor]) -> OverlapSums:
        """The same sums, but for those given by name."""
        return replace(self, **fields)  # type: ignore[arg-type]

    @staticmethod
    def cat(parts: Sequence[OverlapSums]) -> OverlapSums:
        """The images of several batches, one after the other: what accumulated micro-batches have together."""
        return parts[0].having({name: torch.cat([part.fields[name] for part in parts]) for name in parts[0].fields})


_NAMES = tuple(name for name in OverlapSums.__dataclass_fields__ if name != "exclusive")
