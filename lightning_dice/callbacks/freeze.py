"""Freeze parts of a network for some epochs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from lightning_dice.library_internals.torch import is_batch_norm, original_name

Span = tuple[int, int | None]


class FreezeSchedule(Callback):
    """Freeze and unfreeze parts of the module's `net` at the beginning of given epochs.

    The parameters of a frozen part do not change, neither by a gradient nor by weight decay or momentum, and are
    excluded from the norm by which gradients are clipped. Its batch norm is in evaluation mode: it normalizes with its
    running statistics, which do not change. The frozen parts depend on the epoch alone, so that a resumed run
    continues exactly. After training, everything is unfrozen.

    The optimizer holds all parameters from the start (Lightning's `BaseFinetuning` adds parameter groups later, which
    schedules and resumed runs must handle). On one device, no backward pass is computed for a frozen part. In
    distributed training (`ddp`) its gradients are computed and reduced as always, then dropped, because the choice of
    gradients to reduce is fixed when training starts.

    Args:
        parts: what to freeze, and when. A key is the path of a module of `net`, such as `encoder` or `encoder.layer1`,
            or of a parameter; if there is no such path, a prefix of parameter names. A value is the first epoch in
            which the part is trained, counted from 0, or a pair `[first, end]`: frozen in epochs `first` to `end` - 1,
            with `end` None for the rest of training. A part that several keys name is frozen if any of them is.

    Raises:
        ValueError: a key or a value of another form; before training starts: no parts, a part that `net` does not
            have, a schedule that leaves nothing to train in some epoch, or a strategy other than one device and `ddp`.

    >>> schedule = FreezeSchedule({"encoder": 5, "head": [10, None]})
    >>> [sorted(schedule.frozen(epoch)) for epoch in (0, 5, 10)]
    [['encoder'], [], ['head']]
    """

    def __init__(self, parts: Mapping[str, int | Sequence[int | None]] | None) -> None:
        parts = {} if parts is None else parts
        if not isinstance(parts, Mapping) or not all(isinstance(name, str) and name for name in parts):
            raise ValueError(f"parts must map names, such as 'encoder', to epochs, got {parts!r}")
        self.parts: dict[str, Span] = {name: _read_span(name, value) for name, value in parts.items()}
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._norms: dict[str, list[nn.Module]] = {}
        self._without_backward = False
        # Changed at present, to be restored.
        self._no_gradient: list[nn.Parameter] = []
        self._evaluating: list[nn.Module] = []
        self._frozen: list[nn.Parameter] = []

    def frozen(self, epoch: int) -> set[str]:
        """Return the names of the parts that are frozen in an epoch, counted from 0."""
        return {name for name, (first, end) in self.parts.items() if first <= epoch and (end is None or epoch < end)}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the parts in the network."""
        if stage != "fit":
            return
        net = getattr(pl_module, "net", None)
        if not isinstance(net, nn.Module):
            raise ValueError(f"parts are looked up in the module's net, but {type(pl_module).__name__} has no net")
        single = isinstance(trainer.strategy, SingleDeviceStrategy)
        if not single and not isinstance(trainer.strategy, DDPStrategy):
            raise ValueError(
                f"FreezeSchedule works on one device and with strategy=ddp, got a {type(trainer.strategy).__name__}, "
                "whose processes hold parts of each parameter"
            )
        self._without_backward = single
        if not self.parts:
            raise ValueError(
                "parts names nothing to freeze: callbacks.freeze.parts={encoder: 5}, for example, freezes net.encoder "
                f"up to epoch 4; this net, a {type(net).__name__}, has {_children(net)}"
            )
        for name in self.parts:
            self._parameters[name], self._norms[name] = _find_part(net, name)
        trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        for epoch in sorted({0, *(first for first, _ in self.parts.values())}):
            names = self.frozen(epoch)
            frozen = {id(parameter) for name in names for parameter in self._parameters[name]}
            if all(id(parameter) in frozen for parameter in trained):
                raise ValueError(
                    f"parts must leave something to train: in epoch {epoch}, {sorted(names)} is the whole network"
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what is frozen, and when."""
        if trainer.is_global_zero:
            print(f"freeze  {self}", flush=True)

    def __str__(self) -> str:
        return ", ".join(f"{name} {_describe_span(*span)}" for name, span in self.parts.items())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze the epoch's parts: an epoch that is resumed in its middle has no `on_train_epoch_start`."""
        self._apply(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze the epoch's parts, and unfreeze the rest."""
        self._apply(trainer.current_epoch)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the gradients of frozen parameters: an optimizer does not change a parameter without one."""
        # Here and not just before the step, so that no other callback sees them.
        for parameter in self._frozen:
            parameter.grad = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unfreeze everything: Lightning calls no teardown after an exception."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unfreeze everything."""
        self._restore()
        self._parameters, self._norms = {}, {}

    def _apply(self, epoch: int) -> None:
        self._restore()
        for name in self.parts:
            if name not in self.frozen(epoch):
                continue
            self._frozen += self._parameters[name]
            for norm in self._norms[name]:
                if norm.training:
                    norm.eval()
                    self._evaluating.append(norm)
        if self._without_backward:
            # Not with ddp, where a parameter without a gradient is an error, or is never reduced again.
            for parameter in self._frozen:
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._no_gradient.append(parameter)

    def _restore(self) -> None:
        for parameter in self._no_gradient:
            parameter.requires_grad_(True)
        for norm in self._evaluating:
            norm.train()
        self._no_gradient, self._evaluating, self._frozen = [], [], []


def _read_span(name: str, value: Any) -> Span:
    pair = (0, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    whole = all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in pair if one is not None)
    if len(pair) != 2 or isinstance(value, str) or not whole or pair[0] is None:
        raise ValueError(
            f"parts[{name!r}] must be the first epoch in which the part is trained, or a pair [first, end] of epochs "
            f"in which it is frozen (end: None for the rest), got {value!r}"
        )
    first, end = pair
    if end is not None and end < first:
        raise ValueError(f"parts[{name!r}] must not end before it begins, got {value!r}")
    return first, end


def _describe_span(first: int, end: int | None) -> str:
    if end == first:
        return "in no epoch"
    if end is None:
        return f"from epoch {first} on"
    return f"in epoch {first}" if end == first + 1 else f"in epochs {first} to {end - 1}"


def _find_part(net: nn.Module, part: str) -> tuple[list[nn.Parameter], list[nn.Module]]:
    """Return a part's parameters, and its norms with running statistics.

    Raises:
        ValueError: there is no such part; the message lists those that exist.
    """
    parameters = {original_name(name): parameter for name, parameter in net.named_parameters()}
    norms = {
        original_name(name): module
        for name, module in net.named_modules()
        if is_batch_norm(module) and module.track_running_stats
    }

    def is_within(name: str) -> bool:
        return name == part or name.startswith(f"{part}.")

    def has_prefix(name: str) -> bool:
        return name.startswith(part)

    for matches in (is_within, has_prefix):
        found = [parameter for name, parameter in parameters.items() if matches(name)]
        if found:
            return found, [norm for name, norm in norms.items() if matches(name)]
    paths = {".".join(name.split(".")[:depth]) for name in parameters for depth in range(1, name.count(".") + 2)}
    close = difflib.get_close_matches(part, sorted(paths), 1)
    raise ValueError(
        f"parts: net, a {type(net).__name__}, has no parameters in {part!r}, only in {_children(net)}"
        f"{f'; did you mean {close[0]}?' if close else ''}"
    )


def _children(net: nn.Module) -> str:
    """Return the names of the network's children that have parameters, for a message."""
    names = [original_name(name).split(".")[0] for name, _ in net.named_parameters()]
    return ", ".join(dict.fromkeys(names)) or "nothing"
