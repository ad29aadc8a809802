"""Settings of the loss that change while it is trained on."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

Shape = Literal["linear", "cosine", "exponential", "step"]
Value = float | tuple[float, ...]


class LossSchedule(Callback):
    r"""Change one number of the module's loss from epoch to epoch.

    .. math:: v(e) = f\left(\frac{e - e_0}{n - 1}\right), \quad f(0) = \mathrm{start},\ f(1) = \mathrm{end}

    The value depends on the epoch alone, so that a resumed training goes on exactly. It is logged once an epoch as
    `loss/<setting>`. When training has ended, the loss has its own value again: what is scored then does not depend on
    the epoch at which it ended. A compiled loss is compiled anew for new values.

    Args:
        setting: where the number is, from the loss on, its parts parted by dots: attributes, keys of a mapping or names
            of terms. `"smooth"`, `"weights.boundary"`, `"terms.dice.smooth"`.
        start: its value up to `begin_epoch`. A number sets all of a pair, such as `smooth`; or give as many.
        end: its value from the last of the `epochs` on.
        begin_epoch: the first of the epochs in which it changes, from 0.
        epochs: n, how many they are; 1: the first has `end` already.
        shape: `"linear"`; `"cosine"`, slow at both ends; `"exponential"`, by the same factor every epoch, for numbers
            above 0; `"step"`, `start` until the last one.

    Raises:
        ValueError: numbers that are none; before training starts: a setting that the loss does not have, or whose value
            it refuses.

    >>> schedule = LossSchedule("smooth", 100, 1, epochs=3, shape="exponential")
    >>> [round(schedule.value(epoch), 6) for epoch in range(4)]
    [100.0, 10.0, 1.0, 1.0]
    """

    def __init__(
        self,
        setting: str,
        start: float | Sequence[float],
        end: float | Sequence[float],
        *,
        epochs: int,
        begin_epoch: int = 0,
        shape: Shape = "linear",
    ) -> None:
        if not isinstance(setting, str) or not all(setting.split(".")):
            raise ValueError(f"setting must be names parted by dots, such as 'weights.boundary', got {setting!r}")
        if shape not in get_args(Shape):
            raise ValueError(f"shape must be one of {', '.join(map(repr, get_args(Shape)))}, got {shape!r}")
        for name, count, least in (("epochs", epochs, 1), ("begin_epoch", begin_epoch, 0)):
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {count!r}")
        self.setting, self.shape = setting, shape
        self.start, self.end = _given("start", start), _given("end", end)
        self.epochs, self.begin_epoch = epochs, begin_epoch
        if isinstance(self.start, tuple) and isinstance(self.end, tuple) and len(self.start) != len(self.end):
            raise ValueError(f"start and end must have as many numbers, got {start!r} and {end!r}")
        if shape == "exponential" and min(_each(self.start, 1) + _each(self.end, 1)) <= 0:
            raise ValueError(f"start and end must be > 0 with shape='exponential', got {start!r} and {end!r}")
        self._place: _Place | None = None

    def value(self, epoch: int) -> Value:
        """The value in an epoch, counted from 0."""
        size = max(len(_each(one, 1)) for one in (self.start, self.end))
        values = tuple(
            self._between(a, b, epoch) for a, b in zip(_each(self.start, size), _each(self.end, size), strict=True)
        )
        return values if isinstance(self.start, tuple) or isinstance(self.end, tuple) else values[0]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the setting, and have its values checked."""
        if stage != "fit":
            return
        loss = getattr(pl_module, "loss", None)
        if loss is None:
            raise ValueError(f"setting {self.setting!r} is looked up in the module's loss, but the module has no loss")
        place = _find(loss, self.setting)
        for value in (self.start, self.end):
            place.check(value)
        self._place = place

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what changes, and when."""
        if trainer.is_global_zero:
            print(f"change  {self}", flush=True)

    def __str__(self) -> str:
        last = self.begin_epoch + self.epochs - 1
        start, end = (" and ".join(f"{one:g}" for one in _each(value, 1)) for value in (self.start, self.end))
        when = f"in epoch {last}" if self.epochs == 1 else f"in epochs {self.begin_epoch} to {last}, {self.shape}"
        return f"{self.setting} of the loss from {start} to {end} {when}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the epoch's value: one that is resumed in its middle does not start again."""
        if self._place is not None:
            self._place.set(self.value(trainer.current_epoch))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set and log the epoch's value."""
        if self._place is None:
            return
        value = self.value(trainer.current_epoch)
        self._place.set(value)
        each = dict(enumerate(value)) if isinstance(value, tuple) else {None: value}
        for index, one in each.items():
            name = f"loss/{self.setting}" + ("" if index is None else f"/{index}")
            # The same on every rank; said again so that Lightning need not warn.
            pl_module.log(name, one, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the loss its own value back, as there is no teardown then."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the loss its own value back."""
        self._restore()

    def _restore(self) -> None:
        if self._place is not None:
            self._place.restore()
            self._place = None

    def _between(self, start: float, end: float, epoch: int) -> float:
        done = epoch - self.begin_epoch
        if done >= self.epochs - 1 and done >= 0:
            return end
        if done <= 0 or self.shape == "step":
            return start
        share = done / (self.epochs - 1)
        if self.shape == "exponential":
            return start * math.exp(share * math.log(end / start))
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return start + (end - start) * share


class _Place:
    """Where a number stands: in an attribute of an object or under a key of a mapping, which has an owner."""

    def __init__(self, path: str, owner: Any, holder: Any, name: str) -> None:
        self.path, self.owner, self.holder, self.name = path, owner, holder, name
        self.own = holder[name] if isinstance(holder, Mapping) else getattr(holder, name)
        if not _is_value(self.own):
            raise ValueError(f"setting {path!r} must lead to a number, got {type(self.own).__name__}")

    def set(self, value: Value) -> None:
        self._write(_each(value, len(self.own)) if isinstance(self.own, (tuple, list)) else value)

    def restore(self) -> None:
        self._write(self.own)

    def check(self, value: Value) -> None:
        """Ask the class whose setting it is."""
        size = len(self.own) if isinstance(self.own, (tuple, list)) else None
        if isinstance(value, tuple) and len(value) != size:
            came = f"{len(value)} numbers, {list(value)}"
            raise ValueError(f"setting {self.path!r} takes {'one number' if size is None else size}, got {came}")
        try:
            self.restore()
        except (AttributeError, TypeError) as error:
            raise ValueError(f"setting {self.path!r} cannot be changed: {error}") from error
        argument = self.name
        given: Any = _each(value, size) if size is not None else value
        if isinstance(self.holder, Mapping):
            # What stands in a mapping is a setting of the object that holds the mapping.
            argument = self.path.split(".")[-2]
            given = {**self.holder, self.name: given}
        _construct(self.owner, argument, given, self.path)

    def _write(self, value: Any) -> None:
        if isinstance(self.holder, MutableMapping):
            self.holder[self.name] = value
        elif isinstance(self.holder, Mapping):
            raise TypeError(f"a {type(self.holder).__name__} is read-only")
        else:
            setattr(self.holder, self.name, value)


def _find(loss: Any, path: str) -> _Place:
    """The place of a setting.

    Raises:
        ValueError: it is not there; names what is.
    """
    here: Any = loss
    owner, called = loss, "the loss"
    names = path.split(".")
    for index, name in enumerate(names):
        here = getattr(here, "_orig_mod", here)  # of torch.compile
        owner = owner if isinstance(here, Mapping) else here
        if name not in (known := _names(here)):
            close = difflib.get_close_matches(name, known, 1)
            raise ValueError(
                f"setting {path!r}: {called}, a {type(here).__name__}, has no number {name!r}, only "
                f"{', '.join(known) or 'none at all'}{f'; did you mean {close[0]}?' if close else ''}"
            )
        if index < len(names) - 1:
            here = here[name] if isinstance(here, (Mapping, nn.ModuleDict)) else getattr(here, name)
            called = name
    return _Place(path, owner, here, names[-1])


def _names(here: Any) -> list[str]:
    """What a path can go on with: numbers, and what may hold some."""
    if isinstance(here, nn.ModuleDict):
        return list(here)
    if isinstance(here, Mapping):
        return [str(key) for key, value in here.items() if _is_value(value)]
    # What is computed from settings is not one.
    public = {name: value for name, value in getattr(here, "__dict__", {}).items() if not name.startswith("_")}
    numbers = [name for name, value in public.items() if _is_value(value)]
    mappings = [name for name, value in public.items() if isinstance(value, Mapping) and _names(value)]
    return numbers + mappings + ([name for name, _ in here.named_children()] if isinstance(here, nn.Module) else [])


def _construct(owner: Any, argument: str, value: Any, path: str) -> None:
    """Have the constructor that declares a setting check it, with whatever else it must be given."""
    for kind in type(owner).__mro__:
        try:
            declared = inspect.signature(vars(kind)["__init__"]).parameters if "__init__" in vars(kind) else {}
        except ValueError:
            return
        if argument not in declared:
            continue
        needed = [
            name
            for name, one in list(declared.items())[1:]
            if one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL) and name != argument
        ]
        if not all(hasattr(owner, name) for name in needed):
            return
        given = {name: getattr(owner, name) for name in needed}
        given = {name: dict(one.items()) if isinstance(one, nn.ModuleDict) else one for name, one in given.items()}
        try:
            kind(**given, **{argument: value})
        except ValueError as error:
            raise ValueError(f"setting {path!r}: {error}") from error
        except Exception:
            # Not an answer about the value: a constructor of somebody else that asks for more.
            return
        return


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_value(value: Any) -> bool:
    """Whether it is a number, or several. Integers are labels and counts."""
    several = value if isinstance(value, (tuple, list)) else [value]
    return bool(several) and all(isinstance(one, float) for one in several)


def _given(name: str, value: Any) -> Value:
    if _is_number(value):
        return float(value)
    if isinstance(value, Sequence) and not isinstance(value, str) and value and all(map(_is_number, value)):
        return tuple(map(float, value))
    raise ValueError(f"{name} must be a finite number, or several, got {value!r}")


def _each(value: Value, size: int | None) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,) * (size or 1)
