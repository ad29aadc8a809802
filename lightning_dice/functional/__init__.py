"""Scores, reductions and absent-class policy on sums; hard labels; maps and resizing of targets."""

from lightning_dice.functional.absent_classes import AbsentPolicy, AbsentRule
from lightning_dice.functional.activations import probabilities
from lightning_dice.functional.components import RegionMap, Regions, component_regions
from lightning_dice.functional.hard_labels import hard_prediction, hard_sums, hard_target, label_sums
from lightning_dice.functional.micro_batches import micro_batched
from lightning_dice.functional.model_outputs import pad_to_multiple, read_logits
from lightning_dice.functional.reduction import (
    DeferredReduction,
    Pool,
    finish_reductions,
    pool_and_reduce,
    pool_sums,
    weighted_mean,
)
from lightning_dice.functional.scores import (
    ClassWeighting,
    dice_score,
    generalized_dice_score,
    jaccard_score,
    minus_log,
    power,
    tversky_score,
)
from lightning_dice.functional.target_maps import BoundaryWeight, SignedDistance, TubedSkeleton
from lightning_dice.functional.target_resizing import coarser_target, coarser_weight, pad_target

__all__ = [
    "AbsentPolicy",
    "AbsentRule",
    "BoundaryWeight",
    "ClassWeighting",
    "DeferredReduction",
    "Pool",
    "RegionMap",
    "Regions",
    "SignedDistance",
    "TubedSkeleton",
    "coarser_target",
    "coarser_weight",
    "component_regions",
    "dice_score",
    "finish_reductions",
    "generalized_dice_score",
    "hard_prediction",
    "hard_sums",
    "hard_target",
    "jaccard_score",
    "label_sums",
    "micro_batched",
    "minus_log",
    "pad_target",
    "pad_to_multiple",
    "pool_and_reduce",
    "pool_sums",
    "power",
    "probabilities",
    "read_logits",
    "tversky_score",
    "weighted_mean",
]
