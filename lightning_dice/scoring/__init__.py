"""Scores of whole cases, as they are published: from hard labels, in the masks' own geometry.

`score_case` scores one case, `table` formats the scores as a table, `summary` computes means with intervals, and
`comparison` compares two tables case by case. Nothing here depends on a Trainer or a config.
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
