"""The sums of Dice and cross-entropy in plain PyTorch, for a CPU without a compiler.

Pixels are processed in blocks that fit the cache. Peak memory is the gradient plus one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.kernels.backend import SumsSpec
from lightning_dice.kernels.huge_pages import advise_huge_pages
from lightning_dice.kernels.pixels import read_pixels
from lightning_dice.kernels.sums import LEAST

_BLOCK = 1 << 19  # logits: few enough for the cache, enough to keep all threads busy
CHECKS_VALUES = False
_DICE_AND_CE = {"overlap", "predicted", "actual", "count", "nll"}


def unavailable_reason() -> str | None:
    """Return `None`, as this backend runs wherever PyTorch does."""
    return None


def supports(spec: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether these are sums of Dice and cross-entropy, of a sigmoid with planes or a softmax with class ids."""
    shared = weight is None or weight.shape != logits.shape
    form = spec.activation == "sigmoid" if spec.planes else spec.activation == "softmax" and shared
    return form and set(spec.rows) <= _DICE_AND_CE and logits.device.type != "mps"


def forward(spec: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Return the sums, float64 `(rows, images, classes)`."""
    sums = logits.new_zeros((len(spec.rows), *logits.shape[:2]), dtype=torch.float64)
    for image, _, block in _blocks(spec, logits, target, weight):
        fields = _sigmoid_sums(block, spec) if spec.planes else _softmax_sums(block, spec)
        sums[:, image] += torch.stack([fields[name].double() for name in spec.rows])
    # Of overlap and predicted, by actual and count.
    torch.maximum(sums[:2], LEAST * sums[2:4], out=sums[:2])
    return sums


def backward(spec: SumsSpec, grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Return the gradient of the logits, in their shape, dtype and memory format, from the gradient of the sums."""
    gradient = torch.empty_like(logits)
    advise_huge_pages(gradient)
    flat = gradient.flatten(2)
    for image, run, block in _blocks(spec, logits, target, weight):
        rows = dict(zip(spec.rows, grad[:, image].to(block.z.dtype), strict=True))
        flat[image, :, run] = _sigmoid_gradient(block, rows) if spec.planes else _softmax_gradient(block, rows)
    # Flattening has copied if the space axes cannot be viewed as one.
    return gradient if flat.data_ptr() == gradient.data_ptr() else gradient.copy_(flat.view(gradient.shape))


def _blocks(
    spec: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None
) -> Iterator[tuple[int, slice, _Block]]:
    """Yield an image's index, a run of its pixels and their contents."""
    images, classes = logits.shape[:2]
    length = max(_BLOCK // max(classes, 1), 1024)
    z, t = logits.flatten(2), target.flatten(2 if spec.planes else 1)
    w = None if weight is None else weight.flatten(2 if weight.shape == logits.shape else 1)
    for image in range(images):
        one = slice(image, image + 1)
        for start in range(0, z.shape[2], length):
            run = slice(start, start + length)
            pixels = read_pixels(
                z[one, :, run],
                t[one, ..., run],
                activation=spec.activation,
                ignore_index=spec.ignore_index,
                weight=None if w is None else w[one, ..., run],
            )
            w_run = None if pixels.weight is None else pixels.weight[0]
            yield image, run, _Block(pixels.logits[0], pixels.target[0], w_run)


@dataclass(frozen=True)
class _Block:
    """Logits `(classes, pixels)`, target and weight `(1 or classes, pixels)`, with ignored pixels blanked."""

    z: Tensor
    target: Tensor
    weight: Tensor | None

    @property
    def count(self) -> Tensor:
        if self.weight is None:
            return self.z.new_full((self.z.shape[0],), self.z.shape[1], dtype=torch.float64)
        return self.weight.sum(1, dtype=torch.float64).expand(self.z.shape[0])


@dataclass(frozen=True)
class _Softmax:
    """A softmax with the true class kept apart from the others, so that 1 - p and -log p are exact near p = 1.

    With x = exp(z - max), p of the true class is own/(others + own), 1 - p is others/(others + own), and -log p is
    log1p(others/own).
    """

    x: Tensor
    top: Tensor
    own: Tensor
    others: Tensor
    inv: Tensor

    @staticmethod
    def of(z: Tensor, ids: Tensor, top: Tensor) -> _Softmax:
        x = (z - top).exp_()
        own = x.gather(0, ids)
        others = x.scatter_(0, ids, 0).sum(0, keepdim=True)
        x.scatter_(0, ids, own)
        return _Softmax(x, top, own, others, (others + own).reciprocal_())


def _softmax_sums(block: _Block, spec: SumsSpec) -> dict[str, Tensor]:
    z, ids = block.z, block.target.long()
    soft = _Softmax.of(z, ids, z.amax(0, keepdim=True))
    share = soft.inv if block.weight is None else soft.inv * block.weight
    fields = {
        "count": block.count,
        "overlap": _by_class(soft.own * share, ids, len(z)),
        "actual": _by_class(torch.ones_like(share) if block.weight is None else block.weight, ids, len(z)),
    }
    fields["predicted"] = soft.x.mul_(share).sum(1)  # BLAS would add all pixels in one float32.
    if "nll" in spec.rows:
        near = torch.log1p(soft.others / soft.own.clamp(min=0.5))
        nll = torch.where(soft.own > 0.5, near, soft.top - z.gather(0, ids) - soft.inv.log())
        fields["nll"] = _by_class(nll if block.weight is None else nll * block.weight, ids, len(z))
    return fields


def _softmax_gradient(block: _Block, grad: dict[str, Tensor]) -> Tensor:
    """Return the gradient derived in `backend`: `gradient` holds B, then D and D·x, and `s` is the sum of p·D."""
    z, ids = block.z, block.target.long()
    soft = _Softmax.of(z, ids, z.amax(0, keepdim=True))
    gradient = grad["predicted"].unsqueeze(1).expand_as(z).contiguous()
    gradient.scatter_(0, ids, grad["predicted"][ids] + grad["overlap"][ids])
    # B of the greatest class, by a maximum: its argmax takes torch several times as long.
    gradient -= gradient.masked_fill(soft.x < 1, -torch.inf).amax(0, keepdim=True)
    own = gradient.gather(0, ids)
    s = gradient.mul_(soft.x).sum(0, keepdim=True).mul_(soft.inv)
    own = soft.own * soft.inv * (own - s)
    if "nll" in grad:
        by_nll = grad["nll"][ids]
        own -= by_nll * soft.others * soft.inv
        s -= by_nll
    gradient.addcmul_(soft.x, s, value=-1).mul_(soft.inv).scatter_(0, ids, own)
    return gradient if block.weight is None else gradient.mul_(block.weight)


def _by_class(values: Tensor, ids: Tensor, classes: int) -> Tensor:
    return values.new_zeros(classes, dtype=torch.float64).scatter_add_(0, ids[0], values[0].double())


def _sigmoid_sums(block: _Block, spec: SumsSpec) -> dict[str, Tensor]:
    z, t, w = block.z, block.target.to(block.z.dtype), block.weight
    p = z.sigmoid()
    fields = {"count": block.count}
    if "nll" in spec.rows:
        nll = F.binary_cross_entropy_with_logits(z, t, reduction="none")
        fields["nll"] = (nll if w is None else nll.mul_(w)).sum(1)
    p = p if w is None else p.mul_(w)
    fields["predicted"], fields["overlap"] = p.sum(1), p.mul_(t).sum(1)
    fields["actual"] = (t if w is None else t * w).sum(1)
    return fields


def _sigmoid_gradient(block: _Block, grad: dict[str, Tensor]) -> Tensor:
    z, t = block.z, block.target.to(block.z.dtype)
    p, q = z.sigmoid(), z.neg().sigmoid_()
    gradient = torch.addcmul(grad["predicted"].unsqueeze(1), t, grad["overlap"].unsqueeze(1)).mul_(p).mul_(q)
    if "nll" in grad:
        # p - t, without cancellation near p = t = 1.
        gradient += grad["nll"].unsqueeze(1) * p.mul_(1 - t).sub_(q.mul_(t))
    return gradient if block.weight is None else gradient.mul_(block.weight)
