"""Networks of other libraries, adapted where necessary. All other networks are used unchanged, by `_target_`."""

from lightning_dice.models.dynunet import DynUNet

__all__ = ["DynUNet"]
