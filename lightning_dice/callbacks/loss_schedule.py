"""Change a setting of the loss during training."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_dice.argument_checks import check_choice, check_count
from lightning_dice.library_internals.torch import original_module

Shape = Literal["linear", "cosine", "exponential", "step"]
Value = float | tuple[float, ...]


class LossSchedule(Callback):
    r"""Change one number of the module's loss from epoch to epoch.

    .. math:: v(e) = f\left(\frac{e - e_0}{n - 1}\right), \quad f(0) = \mathrm{start},\ f(1) = \mathrm{end}

    The value depends on the epoch alone, so that a resumed run continues exactly. It is logged once per epoch as
    `loss/<setting>`. After training, the loss has its own value again, so that later scores do not depend on the
    epoch at which training ended. A compiled loss is compiled again for new values.

    Args:
        setting: path of the number, from the loss, with dots between its parts: attributes, keys of a mapping or names
            of terms. `"smooth"`, `"weights.boundary"`, `"terms.dice.smooth"`.
        start: the value up to `begin_epoch`. One number sets all of a tuple, such as the pair `smooth`; or give as many
            numbers.
        end: the value from the last of the `epochs` on.
        begin_epoch: e0, the first of the epochs in which the value changes, counted from 0.
        epochs: n, the number of those epochs; with 1, the first has `end` already. `None`: until the last epoch of the
            training.
        shape: `"linear"`; `"cosine"`, slow at both ends; `"exponential"`, by the same factor every epoch, for numbers
            above 0; `"step"`, `start` until the last of them.

    Raises:
        ValueError: an argument is out of its range; before training starts: a setting that the loss does not have, or
            whose value it refuses.

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
        epochs: int | None = None,
        begin_epoch: int = 0,
        shape: Shape = "linear",
    ) -> None:
        if not isinstance(setting, str) or not all(setting.split(".")):
            raise ValueError(
                f"setting must be names with dots between them, such as 'weights.boundary', got {setting!r}"
            )
        self.setting, self.shape = setting, check_choice("shape", shape, Shape)
        self.epochs = None if epochs is None else check_count("epochs", epochs)
        self.begin_epoch = check_count("begin_epoch", begin_epoch, 0)
        self.start, self.end = _read_value("start", start), _read_value("end", end)
        if isinstance(self.start, tuple) and isinstance(self.end, tuple) and len(self.start) != len(self.end):
            raise ValueError(f"start and end must have equally many numbers, got {start!r} and {end!r}")
        if shape == "exponential" and min(_as_tuple(self.start) + _as_tuple(self.end)) <= 0:
            raise ValueError(f"start and end must be > 0 with shape='exponential', got {start!r} and {end!r}")
        self._number: _LossNumber | None = None
        self._length = self.epochs

    def value(self, epoch: int) -> Value:
        """Return the value in an epoch, counted from 0."""
        size = max(len(_as_tuple(value)) for value in (self.start, self.end))
        pairs = zip(_as_tuple(self.start, size), _as_tuple(self.end, size), strict=True)
        values = tuple(self._interpolate(start, end, epoch) for start, end in pairs)
        return values if isinstance(self.start, tuple) or isinstance(self.end, tuple) else values[0]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the setting, and check `start` and `end`."""
        if stage != "fit":
            return
        if self.epochs is None:
            if trainer.max_epochs is None or trainer.max_epochs < 0:
                raise ValueError(
                    f"epochs of the change of {self.setting!r} must be given, as the training has no last epoch "
                    f"(max_epochs={trainer.max_epochs})"
                )
            self._length = max(1, trainer.max_epochs - self.begin_epoch)
        loss = getattr(pl_module, "loss", None)
        if loss is None:
            raise ValueError(f"setting {self.setting!r} belongs to the module's loss, but the module has no loss")
        number = _find_number(loss, self.setting)
        for value in (self.start, self.end):
            number.check(value)
        self._number = number

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what changes, and when."""
        if trainer.is_global_zero:
            print(f"change  {self}", flush=True)

    def __str__(self) -> str:
        length = self._known_length()
        last = self.begin_epoch + length - 1
        start, end = (" and ".join(f"{number:g}" for number in _as_tuple(value)) for value in (self.start, self.end))
        when = f"in epoch {last}" if length == 1 else f"in epochs {self.begin_epoch} to {last}, {self.shape}"
        return f"{self.setting} of the loss from {start} to {end} {when}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the epoch's value: an epoch that is resumed in its middle has no `on_train_epoch_start`."""
        if self._number is not None:
            self._number.set(self.value(trainer.current_epoch))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set and log the epoch's value."""
        if self._number is None:
            return
        value = self.value(trainer.current_epoch)
        self._number.set(value)
        names = {"": value} if isinstance(value, float) else {f"/{index}": number for index, number in enumerate(value)}
        for suffix, number in names.items():
            # The same on every rank; sync_dist only avoids Lightning's warning.
            pl_module.log(
                f"loss/{self.setting}{suffix}", number, on_step=False, on_epoch=True, sync_dist=True, batch_size=1
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the loss: Lightning calls no teardown after an exception."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the loss."""
        self._restore()

    def _restore(self) -> None:
        if self._number is not None:
            self._number.restore()
            self._number = None

    def _known_length(self) -> int:
        if self._length is None:
            raise ValueError("epochs must be given: until training starts, its number of epochs is not known")
        return self._length

    def _interpolate(self, start: float, end: float, epoch: int) -> float:
        done = epoch - self.begin_epoch
        length = self._known_length()
        if done >= length - 1 and done >= 0:
            return end
        if done <= 0 or self.shape == "step":
            return start
        fraction = done / (length - 1)
        if self.shape == "exponential":
            return start * math.exp(fraction * math.log(end / start))
        if self.shape == "cosine":
            fraction = (1 - math.cos(math.pi * fraction)) / 2
        return start + (end - start) * fraction


class _LossNumber:
    """A number of the loss, or a tuple of them, that can be set and restored.

    Args:
        path: from the loss, for messages.
        owner: the object whose constructor takes the setting.
        holder: the object with the attribute, or the mapping with the key: `owner`, or a mapping in it.
        name: of the attribute or the key.
    """

    def __init__(self, path: str, owner: Any, holder: Any, name: str) -> None:
        self.path, self.owner, self.holder, self.name = path, owner, holder, name
        self.original = holder[name] if isinstance(holder, Mapping) else getattr(holder, name)
        if not _is_scheduled(self.original):
            raise ValueError(f"setting {path!r} must lead to a number, got {type(self.original).__name__}")
        self.size = len(self.original) if isinstance(self.original, (tuple, list)) else None

    def set(self, value: Value) -> None:
        self._write(value if self.size is None else _as_tuple(value, self.size))

    def restore(self) -> None:
        self._write(self.original)

    def check(self, value: Value) -> None:
        """Refuse a value that cannot be set, or that the owner's constructor refuses."""
        if isinstance(value, tuple) and len(value) != self.size:
            required = "one number" if self.size is None else self.size
            raise ValueError(f"setting {self.path!r} takes {required}, got {len(value)} numbers, {list(value)}")
        try:
            self.restore()
        except (AttributeError, TypeError) as error:
            raise ValueError(f"setting {self.path!r} cannot be changed: {error}") from error
        argument = self.name
        setting: Any = value if self.size is None else _as_tuple(value, self.size)
        if isinstance(self.holder, Mapping):
            # The constructor takes the mapping as a whole.
            argument = self.path.split(".")[-2]
            setting = {**self.holder, self.name: setting}
        _check_by_constructor(self.owner, argument, setting, self.path)

    def _write(self, value: Any) -> None:
        if isinstance(self.holder, MutableMapping):
            self.holder[self.name] = value
        elif isinstance(self.holder, Mapping):
            raise TypeError(f"a {type(self.holder).__name__} is read-only")
        else:
            setattr(self.holder, self.name, value)


def _find_number(loss: Any, path: str) -> _LossNumber:
    """Find a setting by its path.

    Raises:
        ValueError: it does not exist; the message lists those that do.
    """
    here: Any = loss
    owner, description = loss, "the loss"
    names = path.split(".")
    for index, name in enumerate(names):
        here = original_module(here)
        owner = owner if isinstance(here, Mapping) else here
        if name not in (known := _setting_names(here)):
            close = difflib.get_close_matches(name, known, 1)
            raise ValueError(
                f"setting {path!r}: {description}, a {type(here).__name__}, has no number {name!r}, only "
                f"{', '.join(known) or 'none at all'}{f'; did you mean {close[0]}?' if close else ''}"
            )
        if index < len(names) - 1:
            here = here[name] if isinstance(here, (Mapping, nn.ModuleDict)) else getattr(here, name)
            description = name
    return _LossNumber(path, owner, here, names[-1])


def _setting_names(here: Any) -> list[str]:
    """Return the names that may follow in a path: numbers, and objects that may hold some."""
    if isinstance(here, nn.ModuleDict):
        return list(here)
    if isinstance(here, Mapping):
        return [str(key) for key, value in here.items() if _is_scheduled(value)]
    # Private attributes are computed from settings.
    public = {name: value for name, value in getattr(here, "__dict__", {}).items() if not name.startswith("_")}
    numbers = [name for name, value in public.items() if _is_scheduled(value)]
    mappings = [name for name, value in public.items() if isinstance(value, Mapping) and _setting_names(value)]
    return numbers + mappings + ([name for name, _ in here.named_children()] if isinstance(here, nn.Module) else [])


def _check_by_constructor(owner: Any, argument: str, value: Any, path: str) -> None:
    """Check a setting by the constructor that declares it, called with the owner's other required arguments."""
    for kind in type(owner).__mro__:
        try:
            declared = inspect.signature(vars(kind)["__init__"]).parameters if "__init__" in vars(kind) else {}
        except ValueError:
            return
        if argument not in declared:
            continue
        required = [
            name
            for name, one in list(declared.items())[1:]
            if one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL) and name != argument
        ]
        if not all(hasattr(owner, name) for name in required):
            return
        others = {name: getattr(owner, name) for name in required}
        others = {name: dict(one.items()) if isinstance(one, nn.ModuleDict) else one for name, one in others.items()}
        try:
            kind(**others, **{argument: value})
        except ValueError as error:
            raise ValueError(f"setting {path!r}: {error}") from error
        except Exception:
            # Not necessarily because of the value: the constructor of a loss that is not ours may require more.
            return
        return


def _is_scheduled(value: Any) -> bool:
    """Return whether a value is a float, or several. Integers are labels and counts."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return bool(values) and all(isinstance(number, float) for number in values)


def _read_value(name: str, value: Any) -> Value:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    numbers = value if several else [value]
    if not numbers or not all(
        isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
        for number in numbers
    ):
        raise ValueError(f"{name} must be a finite number, or several, got {value!r}")
    return tuple(map(float, numbers)) if several else float(value)


def _as_tuple(value: Value, size: int = 1) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,) * size
