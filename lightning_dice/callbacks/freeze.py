"""Parts of a network that are not trained for some epochs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

Span = tuple[int, int | None]

_COMPILED = "_orig_mod."  # in the names of torch.compile's parameters


class FreezeSchedule(Callback):
    """Freeze parts of the module's `net`, and unfreeze them, at the beginning of given epochs.

    The parameters of a frozen part do not change, by weight decay or momentum no more than by a gradient; they have no
    part in the norm by which gradients are clipped. The running statistics of its batch norm neither change nor are
    left out: it normalizes with them, in evaluation mode. What is frozen depends on the epoch alone, so that a resumed
    training goes on exactly. After the training all is as it was.

    The optimizer has all parameters from the start (Lightning's `BaseFinetuning` adds groups of parameters later, which
    schedules and resumed trainings have to follow). On one device a frozen part needs no backward pass. In distributed
    training (`ddp`) it is computed and reduced as always, and then dropped: which gradients are reduced is fixed when
    the training starts.

    Args:
        parts: what is frozen, and when. A key is the path of a module of `net`, such as `encoder` or `encoder.layer1`,
            or of a parameter; if there is no such path, what the names of parameters begin with. A value is the first
            epoch in which the part is trained, from 0, or a pair `[first, end]`: frozen in epochs `first` to `end` - 1;
            `end` is `None` for the rest of the training. What several keys name is frozen if one of them says so.

    Raises:
        ValueError: a key or a value that is none of these; before training starts: no part, or one that `net` does not
            have, a schedule that at some epoch would leave nothing to train, or a strategy that is neither of one
            device nor `ddp`.

    >>> schedule = FreezeSchedule({"encoder": 5, "head": [10, None]})
    >>> [sorted(schedule.frozen(epoch)) for epoch in (0, 5, 10)]
    [['encoder'], [], ['head']]
    """

    def __init__(self, parts: Mapping[str, int | Sequence[int | None]] | None) -> None:
        parts = {} if parts is None else parts
        if not isinstance(parts, Mapping) or not all(isinstance(name, str) and name for name in parts):
            raise ValueError(f"parts must map names, such as 'encoder', to epochs, got {parts!r}")
        self.parts: dict[str, Span] = {name: _span(name, value) for name, value in parts.items()}
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._norms: dict[str, list[nn.Module]] = {}
        self._without_backward = False
        # What is changed now, to be set back.
        self._no_gradient: list[nn.Parameter] = []
        self._evaluating: list[nn.Module] = []
        self._frozen: list[nn.Parameter] = []

    def frozen(self, epoch: int) -> set[str]:
        """The parts that are frozen in an epoch, from 0."""
        return {name for name, (first, end) in self.parts.items() if first <= epoch and (end is None or epoch < end)}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the parts."""
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
                "parts names nothing to freeze: callbacks.freeze.parts={encoder: 5}, say, freezes what is in "
                f"net.encoder up to epoch 4; this net, a {type(net).__name__}, has {_tops(net)}"
            )
        for name in self.parts:
            self._parameters[name], self._norms[name] = _find(net, name)
        trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        for epoch in sorted({0, *(first for first, _ in self.parts.values())}):
            names = self.frozen(epoch)
            still = {id(parameter) for name in names for parameter in self._parameters[name]}
            if all(id(parameter) in still for parameter in trained):
                raise ValueError(
                    f"parts must leave something to train: in epoch {epoch}, {sorted(names)} is all there is"
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is frozen, and when."""
        if trainer.is_global_zero:
            print(f"freeze  {self}", flush=True)

    def __str__(self) -> str:
        return ", ".join(f"{name} {_words(*span)}" for name, span in self.parts.items())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze what the epoch says: one that is resumed in its middle does not start again."""
        self._apply(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze what the epoch says, and unfreeze the rest."""
        self._apply(trainer.current_epoch)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the gradients of what is frozen: an optimizer leaves a parameter without one as it is."""
        # Before the step and not when it is near: no other callback has seen them then.
        for parameter in self._frozen:
            parameter.grad = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the network as it was, as there is no teardown then."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the network as it was."""
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
            # Distributed, a parameter without a gradient is taken for an error, or never reduced again.
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


def _span(name: str, value: Any) -> Span:
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


def _words(first: int, end: int | None) -> str:
    if end == first:
        return "in no epoch"
    if end is None:
        return f"from epoch {first} on"
    return f"in epoch {first}" if end == first + 1 else f"in epochs {first} to {end - 1}"


def _find(net: nn.Module, part: str) -> tuple[list[nn.Parameter], list[nn.Module]]:
    """Parameters and norms with running statistics of a part.

    Raises:
        ValueError: it is not there; names what is.
    """
    parameters = {name.replace(_COMPILED, ""): parameter for name, parameter in net.named_parameters()}
    norms = {
        name.replace(_COMPILED, ""): module
        for name, module in net.named_modules()
        if isinstance(module, _NormBase) and module.track_running_stats
    }

    def within(name: str) -> bool:
        return name == part or name.startswith(f"{part}.")

    def begins(name: str) -> bool:
        return name.startswith(part)

    for chosen in (within, begins):
        found = [parameter for name, parameter in parameters.items() if chosen(name)]
        if found:
            return found, [norm for name, norm in norms.items() if chosen(name)]
    paths = {".".join(name.split(".")[:depth]) for name in parameters for depth in range(1, name.count(".") + 2)}
    close = difflib.get_close_matches(part, sorted(paths), 1)
    raise ValueError(
        f"parts: net, a {type(net).__name__}, has no parameters in {part!r}, only in {_tops(net)}"
        f"{f'; did you mean {close[0]}?' if close else ''}"
    )


def _tops(net: nn.Module) -> str:
    names = [name.replace(_COMPILED, "").split(".")[0] for name, _ in net.named_parameters()]
    return ", ".join(dict.fromkeys(names)) or "nothing"
