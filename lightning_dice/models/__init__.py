"""Networks of other libraries, adapted where necessary. All other networks are used unchanged, by `_target_`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_dice.extras import require

if TYPE_CHECKING:
    from lightning_dice.models.dynunet import DynUNet

__all__ = ["DynUNet"]


def __getattr__(name: str) -> Any:
    # On first use, as it needs MONAI, and `models.planner` does not.
    if name == "DynUNet":
        require("monai", needed_by="DynUNet")
        from lightning_dice.models.dynunet import DynUNet

        return DynUNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
