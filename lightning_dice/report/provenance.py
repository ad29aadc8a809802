"""What was evaluated, how, and with which versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from lightning_dice.scoring.summary import CONFIDENCE, N_RESAMPLES

INTERVAL = f"{CONFIDENCE:.0%} percentile bootstrap over cases, {N_RESAMPLES} resamples, seed 0"


class ScoreProvenance(NamedTuple):
    """What was evaluated, and how.

    Attributes:
        title: the report's title.
        details: the run, the checkpoint, the data and so on, in the order in which they are listed.
        settings: the scores' settings, by their names in `lightning_dice.scoring.Scoring`.

    >>> ScoreProvenance("Evaluation of my_run", {"run": "runs/my_run"}, {"tolerance": 2.0, "lesion_iou": 0.0}).title
    'Evaluation of my_run'
    """

    title: str
    details: Mapping[str, str]
    settings: Mapping[str, Any]


def package_versions() -> str:
    """Return the versions of Python, this package and the packages that compute the scores.

    >>> package_versions().partition(" ")[0]
    'Python'
    """
    versions = [f"Python {platform.python_version()}"]
    for name in ("lightning-dice", "torch", "lightning", "monai", "scipy"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(versions)
