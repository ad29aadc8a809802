"""Check the settings of the optimizer and the schedule, before any data are read."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_dice.cli.errors import UserError
from lightning_dice.module import SegmentationModule
from lightning_dice.schedules import plateau_frequency, with_length

_MISSING = object()


def check_optimizer(module: SegmentationModule, trainer: L.Trainer) -> None:
    """Build the optimizer and the schedule of a module, and let copies of them make a step.

    A module with a `configure_optimizers` of its own is not checked.

    Raises:
        UserError: names the setting and its value.
    """
    if type(module).configure_optimizers is not SegmentationModule.configure_optimizers:
        return
    factory = module.optimizer
    if not isinstance(factory, partial):
        return
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        return
    _check_settings("optimizer", factory, lambda make: make(iter(parameters)), _step)
    scheduler = module.scheduler
    if not isinstance(scheduler, partial):
        return
    # Not of the optimizer above, whose rates a schedule changes.
    optimizer = factory(iter(parameters))
    length = max(1, trainer.max_epochs or 1)
    schedule: Any = with_length(scheduler, lambda: length)
    _check_settings("scheduler", schedule, lambda make: make(optimizer), _follow)
    try:
        plateau_frequency(schedule(optimizer), module.interval, module.monitor, trainer)
    except ValueError as error:
        raise UserError(_with_setting_names(str(error))) from error


def _check_settings(name: str, factory: partial[Any], build: Callable[[Any], Any], use: Callable[[Any], None]) -> None:
    """Build what a factory makes and use it, and blame the setting without which the error is gone or another one."""
    for argument, inner in factory.keywords.items():
        if isinstance(inner, partial):  # A schedule after a warm-up, which its first steps do not reach.
            _check_settings(f"{name}.{argument}", inner, build, use)
    error = _error_of(factory, build, use)
    if error is None:
        return
    given = {argument: value for argument, value in factory.keywords.items() if not isinstance(value, partial)}
    required = [argument for argument in given if _default(factory.func, argument) is _MISSING]
    others = {
        argument: _error_of(_without(factory, argument), build, use) for argument in given if argument not in required
    }
    blamed = [argument for argument, other in others.items() if other is None]
    blamed = blamed or [argument for argument, other in others.items() if str(other) != str(error)]
    blamed = blamed or (required if len(required) == 1 else [])
    if blamed:
        raise UserError(_refusal(f"{name}.{blamed[0]}", given[blamed[0]], factory.func, blamed[0], error)) from error
    if _error_of(factory, build, lambda _: None) is None:
        return  # A step of a copy with another parameter may fail where one of a training does not.
    settings = ", ".join(f"{argument}={value}" for argument, value in given.items()) or "its settings"
    raise UserError(f"{name}: {_name(factory.func)} refuses {settings}: {error}") from error


def _refusal(setting: str, value: Any, target: Any, argument: str, error: Exception) -> str:
    default = _default(target, argument)
    number = isinstance(default, (int, float, torch.Tensor)) and not isinstance(default, bool)
    if isinstance(value, str) and (number or default is _MISSING):
        return f"{setting} must be a number, got {value}"
    return f"{setting}={value} is refused by {_name(target)}: {error}"


def _error_of(factory: Any, build: Callable[[Any], Any], use: Callable[[Any], None]) -> Exception | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            use(build(factory))
        except Exception as error:  # Of any type, by the class that the config names.
            return error
    return None


def _step(optimizer: Optimizer) -> None:
    """Let a copy of an optimizer make a step with a parameter of its own."""
    probe, parameter = copy.copy(optimizer), nn.Parameter(torch.zeros(2, 2))
    probe.param_groups = [{**group, "params": [parameter]} for group in optimizer.param_groups]
    probe.state = defaultdict(dict)

    def closure() -> torch.Tensor:
        parameter.grad = torch.ones(2, 2)
        return torch.zeros(())

    with torch.enable_grad():
        closure()
        probe.step(closure)  # type: ignore[arg-type]


def _follow(scheduler: Any) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        for _ in range(2):
            scheduler.step(0.0)
    else:
        scheduler.step()


def _without(factory: partial[Any], argument: str) -> partial[Any]:
    return partial(factory.func, *factory.args, **{k: v for k, v in factory.keywords.items() if k != argument})


def _default(target: Any, argument: str) -> Any:
    try:
        default = inspect.signature(target).parameters[argument].default
    except (KeyError, TypeError, ValueError):
        return None
    return _MISSING if default is inspect.Parameter.empty else default


def _name(target: Any) -> str:
    return str(getattr(target, "__name__", target))


def _with_setting_names(message: str) -> str:
    """Replace the names of arguments by those of the settings of `fit`."""
    message = message.replace('interval="epoch"', "module.interval=epoch").replace('got "step"', "got step")
    for name in ("limit_val_batches", "check_val_every_n_epoch"):
        message = message.replace(f"{name} of the Trainer", f"trainer.{name}")
    return message.replace("got None", "got null").removeprefix("scheduler ")
