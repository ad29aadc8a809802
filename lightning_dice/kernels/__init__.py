"""Sums over pixels, from which every overlap loss and metric of this library is computed.

`overlap_sums` checks its input, picks a backend and returns the sums, differentiable in the logits:

- `overlap_sums`: the entry point.
- `sums`: the result, `OverlapSums`, and the request, `RequiredSums`.
- `checks`: the shapes, dtypes and values that are accepted.
- `pixels`: flattened input with ignored pixels blanked, and its probabilities.
- `reference`: the sums in plain PyTorch. They define what every backend returns.
- `backend`: the interface of the faster implementations, and the gradient that they compute.
- `native` (C++ on the CPU), `torch_blocked` (PyTorch on the CPU, without a compiler), `triton_backend` with
  `triton_kernels` (CUDA): the backends.
- `dispatch`: selects the backend, by device or by force.
- `autograd`: makes the backends differentiable, in eager calls and under `torch.compile`.
- `counts`: the sums of hard predictions, for metrics.
- `regions`: the sums of each region of an image, for lesion-wise losses.
- `huge_pages`: faster allocation of large gradients on Linux.
"""

from lightning_dice.kernels.checks import Activation, check_logits, check_values
from lightning_dice.kernels.dispatch import available, check_forced, forced
from lightning_dice.kernels.overlap_sums import checked_pixels, overlap_sums
from lightning_dice.kernels.pixels import Pixels
from lightning_dice.kernels.reference import total
from lightning_dice.kernels.regions import region_sums
from lightning_dice.kernels.sums import Focal, OverlapSums, RequiredSums, wide_dtype

__all__ = [
    "Activation",
    "Focal",
    "OverlapSums",
    "Pixels",
    "RequiredSums",
    "available",
    "check_forced",
    "check_logits",
    "check_values",
    "checked_pixels",
    "forced",
    "overlap_sums",
    "region_sums",
    "total",
    "wide_dtype",
]
