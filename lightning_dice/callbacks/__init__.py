"""Callbacks of the Trainer: tables, pictures, guards and resuming."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dice.callbacks.best_checkpoint import BestCheckpoint
    from lightning_dice.callbacks.case_table import CaseTable
    from lightning_dice.callbacks.collapse_guard import CollapseError, CollapseGuard
    from lightning_dice.callbacks.ema import WeightEMA
    from lightning_dice.callbacks.exact_resume import ExactResume
    from lightning_dice.callbacks.freeze import FreezeSchedule
    from lightning_dice.callbacks.gradient_guard import GradientGuard, NonFiniteError
    from lightning_dice.callbacks.history import History
    from lightning_dice.callbacks.input_check import InputCheck
    from lightning_dice.callbacks.loss_schedule import LossSchedule
    from lightning_dice.callbacks.overlays import Overlays
    from lightning_dice.callbacks.picture_logging import log_picture
    from lightning_dice.callbacks.progress_bar import ProgressBar
    from lightning_dice.callbacks.pruning import MedianPruner
    from lightning_dice.callbacks.save_on_interrupt import SaveOnInterrupt, exit_with_signal_status

# Imported on first use: Lightning alone takes seconds.
_MODULES = {
    "BestCheckpoint": "best_checkpoint",
    "CaseTable": "case_table",
    "ExactResume": "exact_resume",
    "CollapseError": "collapse_guard",
    "CollapseGuard": "collapse_guard",
    "FreezeSchedule": "freeze",
    "GradientGuard": "gradient_guard",
    "History": "history",
    "InputCheck": "input_check",
    "LossSchedule": "loss_schedule",
    "MedianPruner": "pruning",
    "NonFiniteError": "gradient_guard",
    "Overlays": "overlays",
    "ProgressBar": "progress_bar",
    "SaveOnInterrupt": "save_on_interrupt",
    "WeightEMA": "ema",
    "exit_with_signal_status": "save_on_interrupt",
    "log_picture": "picture_logging",
}

__all__ = [
    "BestCheckpoint",
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
    "exit_with_signal_status",
    "log_picture",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
