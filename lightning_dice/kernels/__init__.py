"""The sums over pixels on which every overlap loss and metric of this library is built.

`overlap_sums` checks its input and calls an implementation; `reference` defines what an implementation returns.
"""

from lightning_dice.kernels.inputs import Activation, check_values, overlap_sums
from lightning_dice.kernels.sums import OverlapSums

__all__ = ["Activation", "OverlapSums", "check_values", "overlap_sums"]
