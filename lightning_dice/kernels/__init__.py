"""The sums over pixels on which every overlap loss and metric of this library is built.

`overlap_sums` checks its input and calls an implementation, chosen by `choice`; `reference` defines what each returns.
`native` (C++), `blocked` (PyTorch, by cache-sized blocks) and `gpu` (Triton) are its faster twins, reached through
`operator`. `counts` are the same sums of hard predictions.
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
