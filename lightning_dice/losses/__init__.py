"""Overlap losses: settings, and one formula each on the sums over pixels."""

from lightning_dice.losses.dice import DiceLoss
from lightning_dice.losses.overlap import OverlapLoss

__all__ = ["DiceLoss", "OverlapLoss"]
