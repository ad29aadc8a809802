"""Losses of logits and target; most are one formula on the sums over pixels."""

from lightning_dice.losses.base import PixelMeanLoss, SegmentationLoss, SumsLoss
from lightning_dice.losses.boundary import BoundaryLoss, BoundaryWeightedLoss, HausdorffLoss
from lightning_dice.losses.compound import CompoundLoss, DiceCELoss, DiceFocalLoss
from lightning_dice.losses.cross_entropy import CrossEntropyLoss, FocalLoss, TopKCrossEntropyLoss
from lightning_dice.losses.deep_supervision import DeepSupervision
from lightning_dice.losses.dice import DiceLoss, GeneralizedDiceLoss, LogCoshDiceLoss, LogDiceLoss
from lightning_dice.losses.lesion_wise import LesionWiseLoss
from lightning_dice.losses.on_probabilities import OnProbabilities
from lightning_dice.losses.overlap import OverlapLoss
from lightning_dice.losses.skeleton import ClDiceLoss, SkeletonRecallLoss
from lightning_dice.losses.tversky import FocalTverskyLoss, JaccardLoss, LogJaccardLoss, LogTverskyLoss, TverskyLoss

__all__ = [
    "BoundaryLoss",
    "BoundaryWeightedLoss",
    "ClDiceLoss",
    "CompoundLoss",
    "CrossEntropyLoss",
    "DeepSupervision",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "GeneralizedDiceLoss",
    "HausdorffLoss",
    "JaccardLoss",
    "LesionWiseLoss",
    "LogCoshDiceLoss",
    "LogDiceLoss",
    "LogJaccardLoss",
    "LogTverskyLoss",
    "OnProbabilities",
    "OverlapLoss",
    "PixelMeanLoss",
    "SegmentationLoss",
    "SkeletonRecallLoss",
    "SumsLoss",
    "TopKCrossEntropyLoss",
    "TverskyLoss",
]
