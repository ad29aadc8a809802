"""Train any segmentation network on the Dice score."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dice.losses import DiceLoss
    from lightning_dice.metrics import DiceScore
    from lightning_dice.module import SegmentationModule

    __version__: str

__all__ = ["DiceLoss", "DiceScore", "SegmentationModule"]

_HOMES = {"DiceLoss": "losses", "DiceScore": "metrics", "SegmentationModule": "module"}


def __getattr__(name: str) -> Any:
    # On first use: `python -m lightning_dice.fit --help` should not wait for torch.
    if name == "__version__":
        return import_module("importlib.metadata").version("lightning-dice")
    if name in _HOMES:
        return getattr(import_module(f"lightning_dice.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lightning_dice' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
