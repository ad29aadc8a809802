"""Trainer hooks: pictures, tables and guards."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dice.callbacks.averaging import WeightEMA
    from lightning_dice.callbacks.cases import CaseTable
    from lightning_dice.callbacks.checks import InputCheck
    from lightning_dice.callbacks.freeze import FreezeSchedule
    from lightning_dice.callbacks.guards import CollapseError, CollapseGuard, GradientGuard, NonFiniteError
    from lightning_dice.callbacks.history import History
    from lightning_dice.callbacks.interrupt import SaveOnInterrupt, honest_exit
    from lightning_dice.callbacks.loggers import log_picture
    from lightning_dice.callbacks.overlays import Overlays
    from lightning_dice.callbacks.progress import ProgressBar
    from lightning_dice.callbacks.pruning import MedianPruner
    from lightning_dice.callbacks.resume import ExactResume
    from lightning_dice.callbacks.schedule import LossSchedule
    from lightning_dice.callbacks.summary import summary_table

# Imported on first use: Lightning alone takes seconds.
_MODULES = {
    "CaseTable": "cases",
    "ExactResume": "resume",
    "CollapseError": "guards",
    "CollapseGuard": "guards",
    "FreezeSchedule": "freeze",
    "GradientGuard": "guards",
    "History": "history",
    "InputCheck": "checks",
    "LossSchedule": "schedule",
    "MedianPruner": "pruning",
    "NonFiniteError": "guards",
    "Overlays": "overlays",
    "ProgressBar": "progress",
    "SaveOnInterrupt": "interrupt",
    "WeightEMA": "averaging",
    "honest_exit": "interrupt",
    "log_picture": "loggers",
    "summary_table": "summary",
}

__all__ = [
    "CaseTable",
    "CollapseError",
    "CollapseGuard",
    "ExactResume",
    "FreezeSchedule",
    "GradientGuard",
    "History",
    "InputCheck",
    "LossSchedule",
    "MedianPruner",
    "NonFiniteError",
    "Overlays",
    "ProgressBar",
    "SaveOnInterrupt",
    "WeightEMA",
    "honest_exit",
    "log_picture",
    "summary_table",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
