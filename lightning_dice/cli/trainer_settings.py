"""Check the settings of the Trainer, which checks some of them late, and others never."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_dice.cli.errors import UserError

# Whole numbers -> the smallest that is allowed; -1 is also allowed in those of `_UNLIMITED`.
_COUNTS = {
    **{"max_epochs": 1, "min_epochs": 0, "max_steps": 1, "min_steps": 0, "accumulate_grad_batches": 1},
    **{"check_val_every_n_epoch": 1, "log_every_n_steps": 0, "num_nodes": 1, "num_sanity_val_steps": 0},
    "reload_dataloaders_every_n_epochs": 0,
}
_UNLIMITED = ("max_epochs", "max_steps", "num_sanity_val_steps")
_SHARES = (
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches"),
    "val_check_interval",
)


def check_trainer_settings(settings: Mapping[str, Any]) -> None:
    """Check the settings that a Trainer takes without a word, or refuses with a message that does not name them.

    Args:
        settings: the config of the Trainer.

    Raises:
        UserError: a number is of another type or out of its range, or nothing would be trained.

    >>> check_trainer_settings({"limit_train_batches": 0.5})
    >>> check_trainer_settings({"max_epochs": 0})
    Traceback (most recent call last):
    lightning_dice.cli.errors.UserError: trainer.max_epochs=0 trains nothing: it must be a whole number >= 1, or -1 ...
    """
    for name, least in _COUNTS.items():
        value = settings.get(name)
        if value is None:
            continue
        rule = f"a whole number >= {least}" + (", or -1 for no limit" if name in _UNLIMITED else "")
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"trainer.{name} must be {rule}, got {value}")
        if value < least and not (value == -1 and name in _UNLIMITED):
            if value == 0 and name in ("max_epochs", "max_steps"):
                raise UserError(
                    f"trainer.{name}=0 trains nothing: it must be {rule}; to score a trained run, use "
                    "python -m lightning_dice.evaluate run=<folder>"
                )
            raise UserError(f"trainer.{name} must be {rule}, got {value}")
    for name in _SHARES:
        value = settings.get(name)
        if value is None or (name == "val_check_interval" and isinstance(value, (str, Mapping))):
            continue  # The interval may be a time.
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or value < 0 or (isinstance(value, float) and value > 1):  # NaN is found by the Trainer.
            raise UserError(
                f"trainer.{name} must be a whole number of batches, or a fraction of them from 0.0 to 1.0, got {value}"
            )
    clip = settings.get("gradient_clip_val")
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip >= 0):
        raise UserError(f"trainer.gradient_clip_val must be a number >= 0, or null for no clipping, got {clip}")
    if settings.get("val_check_interval") == 0:
        raise UserError("trainer.val_check_interval must be more than 0; trainer.limit_val_batches=0 omits validation")
    if settings.get("limit_train_batches") == 0:
        raise UserError("trainer.limit_train_batches=0 trains nothing: it must be more")


def check_shares_of_batches(settings: Mapping[str, Any], counts: Mapping[str, int]) -> None:
    """Check that a share of the batches of a split is at least one.

    Args:
        settings: the config of the Trainer.
        counts: split -> the number of its batches.

    Raises:
        UserError: it is less.
    """
    batches = counts.get("train", 0)
    for split, count in {**counts, "overfit": batches}.items():
        name = "overfit_batches" if split == "overfit" else f"limit_{split}_batches"
        share = settings.get(name)
        if count and isinstance(share, float) and 0 < share < 1 and int(count * share) < 1:
            raise UserError(
                f"trainer.{name}={share} of {count} {'batch' if count == 1 else 'batches'} is less than one: give at "
                f"least {-(-100 // count) / 100:g}, or a whole number of batches"
            )
    interval = settings.get("val_check_interval")
    if isinstance(interval, int) and interval > batches and settings.get("check_val_every_n_epoch", 1) is not None:
        raise UserError(
            f"trainer.val_check_interval={interval} is more than the {batches} batches of an epoch: give fewer, or let "
            "it count through all epochs by trainer.check_val_every_n_epoch=null"
        )
