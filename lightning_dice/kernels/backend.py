r"""The interface of a backend: a faster implementation of the sums of `reference`, with a gradient of its own.

The gradient that every backend computes. At one pixel let :math:`B_c`, :math:`H_c` and :math:`K_c` be the gradients of
the loss by :math:`p_c`, :math:`-\log p_c` and :math:`-\log(1 - p_c)`, pixel weights included, and :math:`q = 1 - p`,
computed without subtraction where `p` is near 1. A focal term :math:`q^\gamma L` with :math:`L = -\log p` has the
derivative :math:`q^\gamma (1 + \gamma p L / q)` by :math:`L`, as :math:`dq/dL = p`, and is part of `H`; that of the
background, with `p` and `q` exchanged, is part of `K`.

Sigmoid: :math:`dp/dz = p q`, :math:`d(-\log p)/dz = -q` and :math:`d(-\log q)/dz = p`, so
:math:`dz = B p q - H q + K p`.

Probabilities: :math:`dp = B - H/p + K/q`, with 0 for a term whose logarithm is clamped.

Softmax: :math:`dp_c/dz_k = p_c (\delta_{ck} - p_k)`. Let `m` be the class with the greatest logit. Rounding
:math:`p_m` to 1 must not lose a gradient of the order of :math:`q_m`, so each part is written without terms of the
order of 1 that cancel:

- By `p`: :math:`p_k (B_k - \sum_c p_c B_c)`. As the :math:`p_c` sum to 1, :math:`B_m` can be subtracted from every
  `B`. With :math:`D = B - B_m` it is :math:`p_k (D_k - \sum_c p_c D_c)`, where :math:`D_m = 0`; for `m` itself that is
  :math:`p_m (B_m q_m - \sum_{c \ne m} p_c B_c)`.
- By :math:`-\log p`: :math:`p_k \sum_{c \ne k} H_c - H_k q_k`.
- By :math:`-\log q`: the derivative of :math:`-\log q_c` is :math:`p_c` by :math:`z_c`, and :math:`-p_k r_c` by another
  :math:`z_k`, with :math:`r = p / q`. If :math:`p_m > 1/2`, :math:`r_m` may overflow; then :math:`-p_k r_m` is
  :math:`-p_m u_k`, with :math:`u_k` the softmax over the classes other than `m`. With
  :math:`R = \sum_{c \ne m} K_c r_c` it is :math:`p_k (K_k + K_k r_k - R) - K_m p_m u_k` for :math:`k \ne m`, as `R`
  includes `k`, and :math:`p_m (K_m - R)` for `m`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from lightning_dice.kernels.sums import RequiredSums


@dataclass(frozen=True)
class SumsSpec:
    """Everything that a call for sums specifies, apart from its tensors.

    Attributes:
        activation: maps logits to probabilities.
        planes: whether the target has the shape of the logits, rather than holding class ids.
        soft: whether the planes of the target are floating point; integer planes hold 0 and 1.
        ignore_index: label of the pixels to ignore; `None` also if the target's dtype cannot hold it.
        required: sums beyond overlap, predicted, actual and count.
        rows: names of the sums, in the order in which a backend returns them. Hard labels have neither `minimum`, which
            equals the overlap, nor `actual_squares`, which equals actual.

    >>> SumsSpec("softmax", planes=False, soft=False, required=RequiredSums(nll=True)).rows
    ('overlap', 'predicted', 'actual', 'count', 'nll')
    """

    activation: Literal["sigmoid", "softmax"] | None
    planes: bool
    soft: bool
    ignore_index: int | None = None
    required: RequiredSums = RequiredSums()  # noqa: RUF009  (frozen)
    rows: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        required = self.required
        rows = ["overlap", "predicted", "actual", "count"]
        rows += ["predicted_squares"] if required.squares else []
        rows += ["actual_squares"] if required.squares and self.soft else []
        rows += ["minimum"] if required.minimum and self.soft else []
        rows += [name for name in ("nll", "all_nll", "absent_nll") if getattr(required, name)]
        rows += ["focal"] if required.focal else []
        object.__setattr__(self, "rows", tuple(rows))


class OutOfRange(Exception):
    """Raised by a backend on a label or weight outside its range, which `checks.check_values` then names."""


class Backend(Protocol):
    """A module with these functions. None of them takes part in autograd.

    Tensors are those of `overlap_sums`, with any strides: logits `(images, classes, *space)`; target
    `(images, *space)` or of the shape of the logits, of any dtype; weight floating point, `(images, *space)` or of the
    shape of the logits.
    """

    # Whether `forward` raises `OutOfRange` on the CPU; if not, the values are checked before it is called.
    CHECKS_VALUES: bool

    def unavailable_reason(self) -> str | None:
        """Why the backend cannot run here, such as `"no C++ compiler"`; `None` if it can."""

    def supports(self, spec: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
        """Whether the backend can compute these sums of these tensors."""

    def forward(self, spec: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Return the sums, float64 `(rows, images, classes)`. May raise `OutOfRange`.

        With an activation, `predicted` and `predicted_squares` are at least `LEAST` times `count`, and `overlap` and
        `minimum` at least `LEAST` times `actual`, so that whether a class counts does not depend on the logit at which
        the backend's exponential becomes 0. The gradient ignores this limit.
        """

    def backward(self, spec: SumsSpec, grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Return the gradient of the logits, in their shape, dtype and memory format, from the gradient of the sums."""
