"""The sums in plain PyTorch over blocks that fit a processor's cache: what the CPU has where nothing can be compiled.

Does what Dice and cross-entropy need. Peak memory is the gradient and a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.kernels.backend import SumsSpec
from lightning_dice.kernels.pages import ask_for_large_pages
from lightning_dice.kernels.pixels import read_pixels

_BLOCK = 1 << 19  # logits: few enough for the cache, and enough to keep all threads at work for a while
CHECKS_VALUES = False
_DICE_AND_CE = {"overlap", "predicted", "actual", "count", "nll"}


def missing() -> str | None:
    """It runs wherever PyTorch does."""
    return None


def takes(work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Softmax with class ids and sigmoid, with the sums of Dice and cross-entropy."""
    shared = weight is None or weight.shape != logits.shape
    form = work.activation == "sigmoid" if work.planes else work.activation == "softmax" and shared
    return form and set(work.rows) <= _DICE_AND_CE and logits.device.type != "mps"


def forward(work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """The sums, float64 `(rows, images, classes)`."""
    sums = logits.new_zeros((len(work.rows), *logits.shape[:2]), dtype=torch.float64)
    for image, _, read in _blocks(work, logits, target, weight):
        fields = _sigmoid_sums(read, work) if work.planes else _softmax_sums(read, work)
        sums[:, image] += torch.stack([fields[name].double() for name in work.rows])
    return sums


def backward(work: SumsSpec, grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient of logits, of their shape, dtype and memory format, from that of the sums."""
    slope = torch.empty_like(logits)
    ask_for_large_pages(slope)
    flat = slope.flatten(2)
    for image, run, read in _blocks(work, logits, target, weight):
        rows = dict(zip(work.rows, grad[:, image].to(read.z.dtype), strict=True))
        make = _sigmoid_slope if work.planes else _softmax_slope
        flat[image, :, run] = make(read, rows)
    # Where the space axes are not one axis of one stride, flattening has made a copy.
    return slope if flat.data_ptr() == slope.data_ptr() else slope.copy_(flat.view(slope.shape))


def _blocks(
    work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None
) -> Iterator[tuple[int, slice, _Read]]:
    """Runs of pixels of one image: its number, which pixels, and what they hold."""
    images, classes = logits.shape[:2]
    length = max(_BLOCK // max(classes, 1), 1024)
    z, t = logits.flatten(2), target.flatten(2 if work.planes else 1)
    w = None if weight is None else weight.flatten(2 if weight.shape == logits.shape else 1)
    for image in range(images):
        one = slice(image, image + 1)
        for start in range(0, z.shape[2], length):
            run = slice(start, start + length)
            read = read_pixels(
                z[one, :, run],
                t[one, ..., run],
                activation=work.activation,
                ignore_index=work.ignore_index,
                weight=None if w is None else w[one, ..., run],
            )
            yield image, run, _Read(read.logits[0], read.target[0], None if read.weight is None else read.weight[0])


@dataclass(frozen=True)
class _Read:
    """Without harm in ignored pixels: `(classes, pixels)`, the others `(1 or classes, pixels)`."""

    z: Tensor
    target: Tensor
    weight: Tensor | None

    @property
    def count(self) -> Tensor:
        if self.weight is None:
            return self.z.new_full((self.z.shape[0],), self.z.shape[1], dtype=torch.float64)
        return self.weight.sum(1, dtype=torch.float64).expand(self.z.shape[0])


@dataclass(frozen=True)
class _Softened:
    """With x = exp(z - max): what of it is the own class's, and what is everything else, apart.

    1 - p of the own class is others/(others + own), and its -log p is log1p(others/own): both keep their digits where p
    is near 1.
    """

    x: Tensor
    top: Tensor
    own: Tensor
    others: Tensor
    inv: Tensor

    @staticmethod
    def of(z: Tensor, ids: Tensor, top: Tensor) -> _Softened:
        x = (z - top).exp_()
        own = x.gather(0, ids)
        others = x.scatter_(0, ids, 0).sum(0, keepdim=True)
        x.scatter_(0, ids, own)
        return _Softened(x, top, own, others, (others + own).reciprocal_())


def _softmax_sums(read: _Read, work: SumsSpec) -> dict[str, Tensor]:
    z, ids = read.z, read.target.long()
    soft = _Softened.of(z, ids, z.amax(0, keepdim=True))
    share = soft.inv if read.weight is None else soft.inv * read.weight
    fields = {
        "count": read.count,
        "overlap": _by_class(soft.own * share, ids, len(z)),
        "actual": _by_class(torch.ones_like(share) if read.weight is None else read.weight, ids, len(z)),
    }
    fields["predicted"] = soft.x.mul_(share).sum(1)  # Not by BLAS, which adds all in one number.
    if "nll" in work.rows:
        near = torch.log1p(soft.others / soft.own.clamp(min=0.5))
        nll = torch.where(soft.own > 0.5, near, soft.top - z.gather(0, ids) - soft.inv.log())
        fields["nll"] = _by_class(nll if read.weight is None else nll * read.weight, ids, len(z))
    return fields


def _softmax_slope(read: _Read, grad: dict[str, Tensor]) -> Tensor:
    """With B_c the gradient of p_c and m the greatest class: dz_c = p_c (D_c - s), D_c = B_c - B_m, s = sum p_k D_k.

    D_m = 0, so that s has only terms of the size of 1 - p_m: nothing cancels where p_m is near 1.
    """
    z, ids = read.z, read.target.long()
    soft = _Softened.of(z, ids, z.amax(0, keepdim=True))
    slope = grad["predicted"].unsqueeze(1).expand_as(z).contiguous()
    slope.scatter_(0, ids, grad["predicted"][ids] + grad["overlap"][ids])
    # Of the greatest class, without asking for its number, for which torch takes several times as long.
    slope -= slope.masked_fill(soft.x < 1, -torch.inf).amax(0, keepdim=True)
    mine = slope.gather(0, ids)
    s = slope.mul_(soft.x).sum(0, keepdim=True).mul_(soft.inv)
    mine = soft.own * soft.inv * (mine - s)
    if "nll" in grad:
        falling = grad["nll"][ids]
        mine -= falling * soft.others * soft.inv
        s -= falling
    slope.addcmul_(soft.x, s, value=-1).mul_(soft.inv).scatter_(0, ids, mine)
    return slope if read.weight is None else slope.mul_(read.weight)


def _by_class(values: Tensor, ids: Tensor, classes: int) -> Tensor:
    return values.new_zeros(classes, dtype=torch.float64).scatter_add_(0, ids[0], values[0].double())


def _sigmoid_sums(read: _Read, work: SumsSpec) -> dict[str, Tensor]:
    z, t, w = read.z, read.target.to(read.z.dtype), read.weight
    p = z.sigmoid()
    fields = {"count": read.count}
    if "nll" in work.rows:
        nll = F.binary_cross_entropy_with_logits(z, t, reduction="none")
        fields["nll"] = (nll if w is None else nll.mul_(w)).sum(1)
    p = p if w is None else p.mul_(w)
    fields["predicted"], fields["overlap"] = p.sum(1), p.mul_(t).sum(1)
    fields["actual"] = (t if w is None else t * w).sum(1)
    return fields


def _sigmoid_slope(read: _Read, grad: dict[str, Tensor]) -> Tensor:
    z, t = read.z, read.target.to(read.z.dtype)
    p, q = z.sigmoid(), z.neg().sigmoid_()
    slope = torch.addcmul(grad["predicted"].unsqueeze(1), t, grad["overlap"].unsqueeze(1)).mul_(p).mul_(q)
    if "nll" in grad:
        # p - t, without the cancellation at p near t = 1.
        slope += grad["nll"].unsqueeze(1) * p.mul_(1 - t).sub_(q.mul_(t))
    return slope if read.weight is None else slope.mul_(read.weight)
