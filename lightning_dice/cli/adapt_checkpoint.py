"""Adapt a checkpoint to a run that is resumed with other settings, or from another folder.

Settings are not state: optimizers, schedules, callbacks and losses keep some of their settings in a checkpoint, and
would silently use the old ones. `lightning_dice.cli.setting_rules` lists what each setting does.
"""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_dice.callbacks import ExactResume
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.setting_rules import BATCHES, BEST, changed_settings, rule_of
from lightning_dice.data import SegmentationData
from lightning_dice.data.samplers import seeded
from lightning_dice.library_internals.lightning import read_optimizers, saved_loop_state
from lightning_dice.loading import build_module

# Counters of a plateau; everything else in its state is a setting.
_PLATEAU_COUNTERS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
_GROWTH = ("growth_factor", "backoff_factor", "growth_interval")  # settings of a scaler of float16

Changes = Mapping[str, tuple[Any, Any]]


def changes_since(checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that have changed since a checkpoint was written: key -> old and new value.

    A folder that was moved changes nothing, and a checkpoint without a config has none to compare with.
    """
    saved = checkpoint.get("config")
    return {} if not saved else changed_settings(_moved(saved, saved.get("folder"), config["folder"]), config)


def check_changes(checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Check that a run can be resumed from a checkpoint with this config.

    Raises:
        UserError: a setting cannot change; the message names it, with its old and new value.
    """
    changes = changes_since(checkpoint, config)
    trained = saved_loop_state(dict(checkpoint), "epoch_progress")["current"]["processed"]
    epochs = config["trainer"].get("max_epochs")
    if epochs is not None and 0 <= epochs < trained:
        raise UserError(f"trainer.max_epochs={epochs}, but {trained} epochs are trained already")
    steps, done = config["trainer"].get("max_steps"), int(checkpoint.get("global_step", 0))
    if steps is not None and 0 <= steps < done:
        raise UserError(f"trainer.max_steps={steps}, but {done} steps are trained already")
    for key, (old, new) in sorted(changes.items(), key=lambda change: change[0].startswith(("data.datamodule", "mod"))):
        rule = rule_of(key)
        reason = rule.effect if rule is not None and rule.refused else None
        if key in BEST and _has_best(checkpoint):
            reason = "best.ckpt was chosen by the old value, and the weights of the other epochs are gone"
        if key in BATCHES and any(rank and "gradients" in rank for rank in checkpoint.get("ranks") or []):
            reason = (
                "the checkpoint was written between two optimizer steps, and holds gradients of the old batches; "
                "resume without the change, and change it at the end of an epoch"
            )
        if reason is not None:
            raise UserError(f"{key} was {old} and cannot become {new} when a run is resumed: {reason}")


def _has_best(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether the callback named `checkpoint` has saved a best checkpoint."""
    monitor = checkpoint["config"]["callbacks"]["checkpoint"].get("monitor")
    states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
    return any(state.get("best_model_path") and state.get("monitor") == monitor for state in states)


def adapt_checkpoint(checkpoint: dict[str, Any], trainer: L.Trainer, config: dict[str, Any]) -> list[str]:
    """Replace the settings that a checkpoint holds by those of the run's config, before a training resumes from it.

    Lightning has loaded the weights and the position in the data already, and will load all else.

    Args:
        checkpoint: changed in place.
        trainer: with the module and the data.
        config: the config of the run.

    Returns:
        Lines to print: what does not simply continue with the new settings.

    Raises:
        UserError: the schedule cannot be continued.
    """
    module: Any = trainer.lightning_module
    changes = changes_since(checkpoint, config)
    saved = checkpoint.get("config") or {}
    notes: list[str] = []
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if "current_model_state" in checkpoint and not any(isinstance(one, WeightAveraging) for one in callbacks):
        module.load_state_dict(checkpoint["current_model_state"])
        notes.append("weights: training continues with its own, as they are no longer averaged")
    apply_callback_settings(checkpoint, callbacks, changes)
    if "seed" in changes:
        _change_seed(checkpoint, trainer, int(config["seed"]))
        notes.append(f"seed    {config['seed']}, for the order of the cases from the next epoch on")
    if any(key.startswith("metrics") for key in changes):
        _forget_metrics(checkpoint)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    state = checkpoint.get(type(trainer.precision_plugin).__qualname__)
    if scaler is not None and state and any(key.startswith("trainer.plugins") for key in changes):
        state.update({name: value for name, value in scaler.state_dict().items() if name in _GROWTH})
    scaled = config.get("module", {}).get("lr_scaling") and len(checkpoint.get("ranks") or []) != trainer.world_size
    if not saved or scaled or any(_concerns_optimizer(key) for key in changes):
        notes += apply_optimizer_settings(checkpoint, module, changes if saved else None, rate_changed=bool(scaled))
    return notes


def _concerns_optimizer(key: str) -> bool:
    # The Trainer's settings too: the length of a schedule may follow from them.
    return key.startswith(("optimizer", "scheduler", "trainer.")) or key in (
        *("module.interval", "module.monitor", "module.lr_scaling", "data.batch_size", "data.datamodule.batch_size"),
    )


def update_checkpoint_paths(checkpoint: dict[str, Any], old: str | None, new: str) -> None:
    """Update the callbacks' paths after the run's folder has moved; else ModelCheckpoint forgets its best score."""
    checkpoint["callbacks"] = _moved(checkpoint.get("callbacks", {}), old, new)


def _moved(value: Any, old: str | None, new: str) -> Any:
    """Replace the folder `old` by `new` in all paths within a value."""
    if old is None or old == new:
        return value
    if isinstance(value, dict):
        return {_moved(key, old, new): _moved(entry, old, new) for key, entry in value.items()}
    if isinstance(value, list):
        return [_moved(entry, old, new) for entry in value]
    inside = isinstance(value, str) and (value == old or value.startswith(old + os.sep))
    return new + value[len(old) :] if inside else value


def apply_callback_settings(checkpoint: dict[str, Any], callbacks: Iterable[Callback], changes: Changes) -> None:
    """Replace the changed settings that callbacks keep in their states, such as the patience of `EarlyStopping`.

    The arguments of a callback's constructor are its settings.
    """
    names = {key.rpartition(".")[2] for key in changes if key.startswith("callbacks.")}
    for callback in callbacks:
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if isinstance(state, dict):
            taken = names & set(inspect.signature(type(callback).__init__).parameters) & set(state)
            state.update({name: getattr(callback, name) for name in taken if hasattr(callback, name)})


def _change_seed(checkpoint: dict[str, Any], trainer: L.Trainer, seed: int) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ExactResume) and callback.state_key in checkpoint.get("callbacks", {}):
            checkpoint["callbacks"][callback.state_key] = {"seed": seed}
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, SegmentationData):
        data.change_seed(seed)


def _forget_metrics(checkpoint: dict[str, Any]) -> None:
    """Remove what metrics with other settings have counted and logged."""
    for rank in checkpoint.get("ranks") or []:
        if rank is not None:
            rank["logged"] = {name: value for name, value in rank["logged"].items() if "/loss" in name}
            if "metrics" in rank:
                rank["metrics"] = {}
            rank.pop("remembered", None)


def apply_optimizer_settings(
    checkpoint: dict[str, Any], module: L.LightningModule, changes: Changes | None = None, *, rate_changed: bool = False
) -> list[str]:
    """Replace the settings of optimizer and schedule in a checkpoint by the module's.

    The schedule continues as if it had been the new one from the start; one that follows a metric keeps its counters.
    An optimizer of another class, or one that needs a state which the checkpoint lacks, starts with an empty state.

    Args:
        checkpoint: changed in place.
        module: creates the new optimizer and schedule.
        changes: the settings that have changed; `None`: they are not known.
        rate_changed: whether the learning rate was changed by something else than `changes`; if it was not, a rate that
            a plateau has lowered stays.

    Returns:
        Lines to print.

    Raises:
        UserError: the schedule cannot be continued.
    """
    known: Changes = {} if changes is None else changes
    rate_changed = rate_changed or changes is None or "optimizer.lr" in known or "module.lr_scaling" in known
    optimizers, schedulers = read_optimizers(module.configure_optimizers())
    former = checkpoint["lr_schedulers"]
    # Before the schedules, which change the rates in the groups.
    fresh = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    states: list[dict[str, Any]] = []
    keep_rate = False
    for index, described in enumerate(schedulers):
        scheduler = described["scheduler"] if isinstance(described, dict) else described
        state = former[index] if index < len(former) else None
        if isinstance(scheduler, ReduceLROnPlateau):
            # Only its own state has counters.
            kept = state is not None and "num_bad_epochs" in state
            states.append(_plateau_state(scheduler, state if kept else None, known))
            if kept and state is not None and not rate_changed:
                keep_rate = True
                states[-1]["_last_lr"] = state["_last_lr"]
            continue
        interval = described.get("interval", "epoch") if isinstance(described, dict) else "epoch"
        # A plateau may have its last step before it, and another interval counts otherwise.
        again = state is None or "num_bad_epochs" in state or "module.interval" in known
        counted = None if state is None or again else state["last_epoch"]
        _replay(scheduler, _steps_of(checkpoint, interval) if counted is None else counted)
        states.append(scheduler.state_dict())
    checkpoint["lr_schedulers"] = states
    if len(optimizers) != len(checkpoint["optimizer_states"]):
        raise UserError(
            f"the checkpoint is of {len(checkpoint['optimizer_states'])} optimizers, and the module has "
            f"{len(optimizers)}: this cannot change when a run is resumed"
        )
    notes = []
    for index, (optimizer, state) in enumerate(zip(optimizers, checkpoint["optimizer_states"], strict=True)):
        reason = _why_empty(optimizer, state, known)
        if reason is not None:
            rates = [group["lr"] for group in state["param_groups"]]
            checkpoint["optimizer_states"][index] = state = {**fresh[index], "state": {}}
            for group, rate in zip(state["param_groups"], rates, strict=False):
                group["lr"] = rate  # A plateau's; replaced below otherwise.
            notes.append(f"{type(optimizer).__name__} starts with an empty state: {reason}")
        names = {"params", "lr"} if keep_rate else {"params"}
        for group, new in zip(state["param_groups"], optimizer.param_groups, strict=True):
            own = {name: group[name] for name in names}
            group.clear()  # Also what only the old schedule had noted there.
            group.update({**new, **own})
    return notes


def _plateau_state(scheduler: ReduceLROnPlateau, saved: dict[str, Any] | None, changes: Changes) -> dict[str, Any]:
    state: dict[str, Any] = scheduler.state_dict()
    if saved is None:
        return state
    counters = {name: saved[name] for name in _PLATEAU_COUNTERS if name in saved}
    if saved.get("mode") != scheduler.mode or "module.monitor" in changes:
        # Its best value is of another metric, or not the best any more.
        counters = {"last_epoch": saved["last_epoch"]}
    return {**state, **counters}


def _steps_of(checkpoint: dict[str, Any], interval: str) -> int:
    """Return how often a schedule with this interval has stepped when a checkpoint was written."""
    if interval == "step":
        return int(checkpoint["global_step"])
    epochs = saved_loop_state(checkpoint, "epoch_progress")["current"]
    batches = saved_loop_state(checkpoint, "epoch_loop.batch_progress")
    # Schedules step after an epoch's last batch, before the epoch counts as processed.
    ends = batches["is_last_batch"] and batches["current"]["processed"] == batches["current"]["ready"]
    return int(epochs["processed"]) + int(ends and epochs["processed"] < epochs["ready"])


def _replay(scheduler: Any, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The optimizer has not stepped, which is fine here.
        try:
            for _ in range(steps):
                scheduler.step()
        except ValueError as error:
            name = type(scheduler).__name__
            raise UserError(f"scheduler: {name} has fewer steps than are trained: {error}") from None


def _why_empty(optimizer: Optimizer, saved: dict[str, Any], changes: Changes) -> str | None:
    """Return why the saved state cannot be continued; `None` if it can."""
    if "optimizer._target_" in changes:
        return f"the checkpoint is of {str(changes['optimizer._target_'][0]).rpartition('.')[2]}"
    if not any(key.startswith("optimizer") for key in changes):
        return None
    sizes = [[len(group["params"]) for group in groups] for groups in (saved["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        return "its groups of parameters have changed"
    lacking = set.union(set(), *(_state_names(optimizer) - set(state) for state in saved["state"].values()))
    return f"the checkpoint has no {', '.join(sorted(lacking))}" if lacking else None


def _state_names(optimizer: Optimizer) -> set[str]:
    """Return the names in the state of a parameter after a step of a copy; empty if that cannot be tried."""
    probe, parameter = copy.copy(optimizer), nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.ones(2, 2)
    probe.param_groups = [{**optimizer.param_groups[0], "params": [parameter]}]
    probe.state = defaultdict(dict)
    try:
        probe.step()
    except Exception:  # Of any type: one that needs a closure, or a GPU.
        return set()
    return {str(name) for name in probe.state[parameter]}


def prefer_settings(module: nn.Module, checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> None:
    """Let the buffers of a module that are settings, such as the weights of classes, win over those of checkpoints.

    A buffer is a setting if training has not changed it: if it equals the one of the module that the checkpoint's
    config describes. It holds for all checkpoints that are loaded into the module from now on.

    Args:
        module: built from `config`.
        checkpoint: its config describes the former module; its weights are changed in place.
        config: the run's config; `None`: the checkpoint's.
    """
    former = (checkpoint.get("config") or {}).get("module")
    names = {name for name, _ in module.named_buffers()}
    stale = [key for key in checkpoint["state_dict"] if not key.startswith("net.") and key not in module.state_dict()]
    changed = config is not None and any(
        config["module"].get(part) != (former or {}).get(part) for part in ("_target_", "net", "loss", "metrics")
    )
    if former is None or not (changed or stale) or not (names or stale):
        return
    try:
        with seeded(0):
            before = {name: value.detach() for name, value in build_module(former).named_buffers()}
    except Exception:  # A class that the old config names may be gone; then the weights must fit as they are.
        return

    # Not a closure, so that a module can be sent to the processes of ddp_spawn.
    module.register_load_state_dict_pre_hook(partial(_replace_settings, before))  # type: ignore[no-untyped-call]
    for states in (checkpoint["state_dict"], checkpoint.get("current_model_state")):
        if states is not None:
            _replace_settings(before, module, states, "")


def _replace_settings(
    before: Mapping[str, Tensor], module: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Replace the buffers that are settings in a state that is about to be loaded.

    Args:
        before: the buffers of the former module when it was new.
        module: loads the state.
        state: changed in place.
        prefix: of the module's names in the state.
    """
    persistent = module.state_dict()
    for name, value in before.items():
        if prefix + name in state and _same(value, state[prefix + name]):
            if name in persistent:
                state[prefix + name] = persistent[name]
            elif not name.startswith("net."):
                del state[prefix + name]
    for name, _value in module.named_buffers():
        # A setting that the former module did not have. Statistics of a network's norm are none.
        if name in persistent and name not in before and not name.startswith("net."):
            state.setdefault(prefix + name, persistent[name])


def _same(one: Tensor, other: Any) -> bool:
    if not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    return torch.equal(one.to(other.device, other.dtype).nan_to_num(), other.nan_to_num())
