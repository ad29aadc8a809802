"""Scores of whole cases, as they are published: from hard labels, in the masks' own geometry.

`score_case` makes those of one case, `table` writes them down, `summary` sums them up with intervals, `paired` compares
two tables case by case. Nothing here knows a Trainer or a config.
"""

from lightning_dice.scoring.calibration import Reliability, reliability
from lightning_dice.scoring.case import CaseScore, ClassScore, score_case
from lightning_dice.scoring.lesions import LesionScores, lesion_scores
from lightning_dice.scoring.settings import Scoring
from lightning_dice.scoring.surfaces import SurfaceScores, surface_scores

__all__ = [
    "CaseScore",
    "ClassScore",
    "LesionScores",
    "Reliability",
    "Scoring",
    "SurfaceScores",
    "lesion_scores",
    "reliability",
    "score_case",
    "surface_scores",
]
