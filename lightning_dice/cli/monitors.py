"""Check the metrics that callbacks and schedules watch, before any data are read."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from lightning_dice.cli.errors import UserError
from lightning_dice.metrics import DiceScore
from lightning_dice.module import SegmentationModule

# What this package's callbacks log.
_CALLBACKS = ("train/grad_norm", "images_per_second", "memory_gb")
_KNOWN = ("lightning_dice", "lightning")  # packages whose callbacks log nothing else


def watched(config: DictConfig) -> dict[str, str]:
    """Return the settings that name a metric to watch, and the metric.

    >>> from omegaconf import OmegaConf
    >>> watched(OmegaConf.create({"callbacks": {"checkpoint": {"monitor": "val/dice"}}, "module": {"scheduler": None}}))
    {'callbacks.checkpoint.monitor': 'val/dice'}
    """
    found = {
        f"callbacks.{name}.monitor": str(callback["monitor"])
        for name, callback in (config.get("callbacks") or {}).items()
        if isinstance(callback, DictConfig) and callback.get("monitor") is not None
    }
    if found.get("callbacks.history.monitor") in ("val/dice", found.get("callbacks.checkpoint.monitor")):
        del found["callbacks.history.monitor"]  # The default, which follows that of the checkpoint.
    scheduler = config.module.get("scheduler")
    if scheduler is not None and str(scheduler.get("_target_", "")).endswith(".ReduceLROnPlateau"):
        found["module.monitor"] = str(config.module.get("monitor") or "val/dice")
    return found


def check_monitors(config: DictConfig, module: SegmentationModule, trainer: L.Trainer) -> None:
    """Check that each watched metric will be logged.

    What a subclass or a callback of your own logs is known only when it runs: with one, only `explain_missing_monitor`
    checks the other names.

    Raises:
        UserError: names the setting, the metric and the nearest ones.
    """
    if _logs_other_names(module, trainer):
        return
    for setting, metric in watched(config).items():
        if not _is_logged(metric, module):
            raise UserError(_message(setting, metric, sorted(_names(module))))


def check_modes(config: DictConfig, module: SegmentationModule) -> None:
    """Check that the best value of each watched metric is not taken for the worst, as that of a loss with `mode=max`.

    Raises:
        UserError: names the setting.
    """
    for setting, metric in watched(config).items():
        owner = "scheduler" if setting == "module.monitor" else setting.removesuffix(".monitor")
        mode, best = OmegaConf.select(config, f"{owner}.mode"), _best_mode(metric, module)
        if mode in ("max", "min") and best is not None and mode != best:
            value = "largest" if best == "max" else "smallest"
            raise UserError(
                f"{owner}.mode={mode}, but the best {metric} is the {value}: give {owner}.mode={best} with "
                f"{setting}={metric}"
            )


def _best_mode(metric: str, module: SegmentationModule) -> str | None:
    """Return the mode of a metric; `None` where it is not known."""
    if metric == "loss" or metric.startswith(("train/loss", "val/loss")):
        return "min"
    for collection in (module.train_metrics, module.val_metrics):
        for name, one in collection.items(copy_state=False):
            higher = getattr(one, "higher_is_better", None)
            if isinstance(higher, bool) and (metric == name or metric.startswith(f"{name}/")):
                return "max" if higher else "min"
    return None


def check_validation(config: DictConfig, trainer: L.Trainer, *, has_split: bool) -> None:
    """Check that there is a validation, if early stopping, pruning or a schedule needs one.

    The best checkpoint needs none: then `fit` scores the last one.

    Raises:
        UserError: names the setting that needs it, and what turns it off.
    """
    if has_split and trainer.limit_val_batches != 0:
        return
    for setting, metric in watched(config).items():
        if metric.startswith("val/") and not setting.startswith(("callbacks.checkpoint.", "callbacks.history.")):
            reason = (
                "the data have no validation split" if not has_split else "trainer.limit_val_batches=0 turns it off"
            )
            user = "scheduler=plateau" if setting == "module.monitor" else setting.removesuffix(".monitor")
            raise UserError(
                f"{user} follows {metric}, which needs a validation, and {reason}: leave {user} out, or watch a metric "
                f"of the training, {setting}=train/loss"
            )


@contextmanager
def explain_missing_monitor(config: DictConfig, trainer: L.Trainer) -> Iterator[None]:
    """Turn the errors of a callback or schedule whose metric was never logged into a message with the nearest names.

    Raises:
        UserError: in place of Lightning's errors; all others remain.
    """
    try:
        yield
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        logged = dict.fromkeys(map(str, trainer.callback_metrics))
        for setting, metric in watched(config).items():
            if metric not in logged and metric in str(error):
                raise UserError(_message(setting, metric, sorted(logged))) from error
        raise


def _message(setting: str, metric: str, known: list[str]) -> str:
    close = difflib.get_close_matches(metric, known, 3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{setting}={metric} is not a logged metric: {hint}This run logs {', '.join(known) or 'nothing'}"


def _logs_other_names(module: SegmentationModule, trainer: L.Trainer) -> bool:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    own = [one for one in callbacks if type(one).__module__.partition(".")[0] not in _KNOWN]
    return bool(own) or type(module) is not SegmentationModule


def _names(module: SegmentationModule) -> set[str]:
    """Return the names that the module and this package's callbacks log in a training, but for those of classes."""
    names = {"loss", "train/loss", "train/loss_step", "val/loss", *_CALLBACKS}
    for collection in (module.train_metrics, module.val_metrics):
        names |= {str(name) for name in collection}
    names |= {str(name).removeprefix("train/") for name in module.train_metrics}
    scored = [*module.train_metrics, *module.val_metrics]
    return names | {f"{name}/{one}" for name in scored for one in module.class_names or []}


def _is_logged(metric: str, module: SegmentationModule) -> bool:
    if metric in _names(module) or metric.startswith("loss/"):  # of a `LossSchedule`
        return True
    if metric.startswith(("train/loss/", "val/loss/")):
        return hasattr(module.loss, "values") or metric == "train/loss/auxiliary"
    for collection in (module.train_metrics, module.val_metrics):
        for name, one in collection.items(copy_state=False):
            # The values of other metrics may have names of any kind.
            if not isinstance(one, DiceScore) and metric.startswith((f"{name}/", f"{name}_")):
                return True
    return False
