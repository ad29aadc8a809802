"""Networks of other libraries whose outputs need another form. All others are used as they are, by `_target_`."""

from lightning_dice.models.dynunet import DynUNet

__all__ = ["DynUNet"]
