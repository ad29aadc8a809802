"""What a faster twin of the reference is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from lightning_dice.kernels.sums import RequiredSums


@dataclass(frozen=True)
class SumsSpec:
    """The sums of one call, apart from its tensors.

    Attributes:
        activation: what turns logits into probabilities.
        planes: whether the target has the shape of logits, or is class ids.
        soft: whether the target's planes are floating point; those of integers hold 0 and 1.
        ignore_index: the label of pixels that count as nothing; `None` also where the target's dtype cannot hold it.
        wanted: sums beyond overlap, predicted, actual and count.
        rows: names of the sums, in the order of a twin's result. With hard labels there is no `minimum`, which is the
            overlap, and no `actual_squares`, which is actual.
    """

    activation: Literal["sigmoid", "softmax"] | None
    planes: bool
    soft: bool
    ignore_index: int | None = None
    wanted: RequiredSums = RequiredSums()  # noqa: RUF009  (frozen)
    rows: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        wanted = self.wanted
        rows = ["overlap", "predicted", "actual", "count"]
        rows += ["predicted_squares"] if wanted.squares else []
        rows += ["actual_squares"] if wanted.squares and self.soft else []
        rows += ["minimum"] if wanted.minimum and self.soft else []
        rows += [name for name in ("nll", "all_nll", "absent_nll") if getattr(wanted, name)]
        rows += ["focal"] if wanted.focal else []
        object.__setattr__(self, "rows", tuple(rows))


class OutOfRange(Exception):
    """A twin has met a label or a weight outside its range; the checks of `inputs` can name it."""


class Backend(Protocol):
    """An implementation of the sums: a module with these functions. None of them sees a gradient's graph.

    Tensors are as `overlap_sums` takes them, of any strides: logits `(images, classes, *space)`; target `(images,
    *space)` or of the shape of logits, of any dtype; weight floating point, `(images, *space)` or of the shape of
    logits.
    """

    # Whether `forward` raises `OutOfRange` on the CPU; otherwise the values are checked before.
    CHECKS_VALUES: bool

    def missing(self) -> str | None:
        """Why it cannot run here, such as `"no C++ compiler"`; `None`: it can."""

    def takes(self, work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
        """Whether it can do this work on these tensors."""

    def forward(self, work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """The sums, float64 `(rows, images, classes)`; may raise `OutOfRange`."""

    def backward(self, work: SumsSpec, grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """The gradient of logits, of their shape, dtype and memory format, from that of the sums."""
