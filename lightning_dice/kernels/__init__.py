"""The sums over pixels on which every overlap loss and metric of this library is built.

`overlap_sums` checks its input and calls an implementation; `reference` defines what an implementation returns.
"""

from lightning_dice.kernels.inputs import Activation, check_logits, check_values, checked_pixels, overlap_sums
from lightning_dice.kernels.pixels import Pixels
from lightning_dice.kernels.reference import total
from lightning_dice.kernels.regions import region_sums
from lightning_dice.kernels.sums import Focal, OverlapSums, Wanted, wide_dtype

__all__ = [
    "Activation",
    "Focal",
    "OverlapSums",
    "Pixels",
    "Wanted",
    "check_logits",
    "check_values",
    "checked_pixels",
    "overlap_sums",
    "region_sums",
    "total",
    "wide_dtype",
]
