"""Losses of logits and target: settings, and one formula each on the sums over pixels."""

from lightning_dice.losses.base import PixelMeanLoss, SegmentationLoss, SumsLoss
from lightning_dice.losses.compound import CompoundLoss, DiceCELoss, DiceFocalLoss, OnProbabilities
from lightning_dice.losses.dice import DiceLoss, GeneralizedDiceLoss, LogCoshDiceLoss, LogDiceLoss
from lightning_dice.losses.entropy import CrossEntropyLoss, FocalLoss, TopKCrossEntropyLoss
from lightning_dice.losses.overlap import OverlapLoss
from lightning_dice.losses.tversky import FocalTverskyLoss, JaccardLoss, TverskyLoss

__all__ = [
    "CompoundLoss",
    "CrossEntropyLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "GeneralizedDiceLoss",
    "JaccardLoss",
    "LogCoshDiceLoss",
    "LogDiceLoss",
    "OnProbabilities",
    "OverlapLoss",
    "PixelMeanLoss",
    "SegmentationLoss",
    "SumsLoss",
    "TopKCrossEntropyLoss",
    "TverskyLoss",
]
