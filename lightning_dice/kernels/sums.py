"""The sums as a value, `OverlapSums`, and the request for some of them, `RequiredSums`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

# A sigmoid or a softmax is above 0, but underflows, in each backend at another logit. Sums are at least those of
# probabilities that the backends compute alike.
LEAST = 2.0**-100


class Focal(NamedTuple):
    """The focal factor of a cross-entropy (Lin et al., ICCV 2017).

    Attributes:
        gamma: exponent of 1 - p, with p the probability of the true class.
        alpha: weight of the foreground; the background has the weight 1 - alpha. `None` gives both the weight 1. Used
            only if classes do not exclude each other.

    >>> Focal(gamma=1.5)
    Focal(gamma=1.5, alpha=None)
    """

    gamma: float = 2.0
    alpha: float | None = None


@dataclass(frozen=True)
class RequiredSums:
    """The sums that a loss requires beyond the four that are always computed; `OverlapSums` defines them.

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
        """Return the sums that either requires.

        Raises:
            ValueError: both require a focal sum, with different factors. Check `agrees` first.
        """
        if not self.agrees(other):
            raise ValueError(f"sums from one pass must share one focal factor, got {self.focal} and {other.focal}")
        return RequiredSums(
            self.squares or other.squares,
            self.minimum or other.minimum,
            self.nll or other.nll,
            self.all_nll or other.all_nll,
            self.absent_nll or other.absent_nll,
            self.focal or other.focal,
        )

    def agrees(self, other: RequiredSums) -> bool:
        """Whether one pass can compute both.

        >>> RequiredSums(focal=Focal(1.0)).agrees(RequiredSums(focal=Focal(2.0)))
        False
        """
        return self.focal is None or other.focal is None or self.focal == other.focal


def wide_dtype(values: Tensor) -> torch.dtype:
    """Return the dtype in which sums over pixels accumulate: float64, or float32 on devices without it.

    >>> wide_dtype(torch.zeros(1))
    torch.float64
    """
    return torch.float32 if values.device.type == "mps" else torch.float64


def holds_label(target: Tensor, ignore_index: int | None) -> bool:
    """Whether the dtype of a target can hold the ignored label.

    If it cannot, no pixel is ignored; a comparison would wrap around, as torch finds uint8 255 equal to -1.

    >>> holds_label(torch.zeros(2, dtype=torch.uint8), 255), holds_label(torch.zeros(2, dtype=torch.uint8), -1)
    (True, False)
    """
    if ignore_index is None or target.dtype == torch.bool:
        return False
    if target.is_floating_point():
        return True
    limits = torch.iinfo(target.dtype)
    return limits.min <= ignore_index <= limits.max


def at_least(sums: Tensor, number: Tensor) -> Tensor:
    """Raise sums to those of `number` probabilities of `LEAST`; the gradient stays that of the original sums.

    >>> at_least(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 4.0])) > 0
    tensor([True, True])
    """
    # Detached first, so that autograd records the addition alone.
    return sums + (LEAST * number.detach() - sums.detach()).clamp(min=0)


def valid_pixels(target: Tensor, ignore_index: int | None) -> Tensor | None:
    """Return a mask of the pixels that are not ignored; `None` if the target cannot hold the ignored label.

    >>> valid_pixels(torch.tensor([0, 1, 255]), 255)
    tensor([ True,  True, False])
    """
    if not holds_label(target, ignore_index):
        return None
    return target.ne(ignore_index)  # type: ignore[arg-type]


@dataclass(frozen=True)
class OverlapSums:
    r"""Sums over the pixels of each class in each image, each of shape `(images, classes)`.

    With the pixel weight `w` (0 at ignored pixels), the probability `p` and the target `t`; a sigmoid or softmax whose
    sum is below that of probabilities of 2^-100, at logits of about -69, counts as those:

    Attributes:
        overlap: :math:`\sum w p t`.
        predicted: :math:`\sum w p`.
        actual: :math:`\sum w t`.
        count: :math:`\sum w`, in pixels.
        predicted_squares: :math:`\sum w p^2`; this and the following are `None` unless required, as by
            `RequiredSums(squares=True)`.
        actual_squares: :math:`\sum w t^2`.
        minimum: :math:`\sum w \min(p, t)`; equals the overlap if every label is 0 or 1.
        nll: the cross-entropy. If classes exclude each other, :math:`\sum w t\,(-\log p)`, so that each pixel is part
            of the sum of its true class; otherwise the binary cross-entropy of each class.
        all_nll: :math:`\sum w\,(-\log p)`, whatever the target. If classes exclude each other and only some are
            annotated, it is that of the pixels of these, times the number of classes over that of these, so that the
            mean over all classes is the mean over these.
        absent_nll: :math:`\sum w\,(-\log(1 - p))`, the cross-entropy of a class that is absent.
        focal: `nll` with each term multiplied by the focal factor.
        exclusive: whether classes exclude each other, as with class ids or a softmax.

    >>> field = torch.tensor([[2.0]])
    >>> sums = OverlapSums(overlap=field, predicted=2 * field, actual=field, count=5 * field)
    >>> 2 * sums.overlap / (sums.predicted + sums.actual)
    tensor([[0.6667]])
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
        """The sums that are not `None`, by name."""
        return {name: value for name in _NAMES if (value := getattr(self, name)) is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> OverlapSums:
        """Apply `function` to each sum.

        >>> OverlapSums(*torch.ones(4, 1, 2)).map(lambda field: field.sum(1, keepdim=True)).count
        tensor([[2.]])
        """
        return self.replace(**{name: function(value) for name, value in self.fields.items()})

    def replace(self, **fields: Tensor) -> OverlapSums:
        """Return these sums with some replaced by name.

        >>> OverlapSums(*torch.ones(4, 1, 1)).replace(count=torch.zeros(1, 1)).count
        tensor([[0.]])
        """
        return dataclasses.replace(self, **fields)  # type: ignore[arg-type]

    @staticmethod
    def cat(batches: Sequence[OverlapSums]) -> OverlapSums:
        """Concatenate the images of several batches, such as accumulated micro-batches.

        >>> OverlapSums.cat([OverlapSums(*torch.ones(4, 1, 2)), OverlapSums(*torch.ones(4, 3, 2))]).count.shape
        torch.Size([4, 2])
        """
        first = batches[0]
        return first.replace(**{name: torch.cat([batch.fields[name] for batch in batches]) for name in first.fields})


_NAMES = tuple(name for name in OverlapSums.__dataclass_fields__ if name != "exclusive")
