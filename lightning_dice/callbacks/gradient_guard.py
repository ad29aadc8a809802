"""What goes wrong silently while a network is trained: numbers that are not finite, predictions that are all alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lightning_dice.callbacks.input_check import read_batch
from lightning_dice.io import write_atomically

_SHOWN = 8  # cases in a message


class NonFiniteError(ValueError):
    """A loss or gradients that are not finite (NaN or infinite).

    Attributes:
        keep_checkpoint: tells whoever saves when training breaks off that the last checkpoint is the better one.
    """

    keep_checkpoint = True


class GradientGuard(Callback):
    r"""Log the norm of the gradients, and act on a loss or gradients that are not finite (NaN or infinite).

    `train/grad_norm` is the mean over the epoch's optimizer steps of

    .. math:: \|g\|_2 = \sqrt{\sum_i g_i^2}

    over all parameters, of accumulated, reduced and unscaled gradients, before they are clipped. Steps at which it is
    not finite are left out of the mean.

    At a step whose loss or gradients are not finite, the batch is saved to
    `<folder>/non_finite/epoch_<e>_step_<s>_rank<r>.pt`, to be read with `torch.load(..., weights_only=True)`: `image`,
    `mask`, `case`, and in `not_finite` which of `"input"` (the image), `"logits"`, `"loss"` and `"gradient"` were not.
    (`"logits"` are those of the network in evaluation mode, run once more.) Of several processes the ones save whose
    own loss or images are not finite, or all if there are none. Then

    - `action="stop"`: `NonFiniteError` ends the training before the weights change. The message names the cases and
      what to try. `SaveOnInterrupt` leaves the last checkpoint as it is.
    - `action="skip"`: the step is left out on all processes, with a warning, and training goes on with the next batch;
      after `max_skips` in a row it stops all the same. The epoch's `train/loss`, a mean over all steps, is then NaN.

    In both, running statistics of batch norm that the batch has changed are set back.

    All processes decide alike, from the reduced gradients: where the loss of one is not finite, its gradients are made
    so, and then those of all are. Mixed precision with float16 (`16-mixed`) meets infinite gradients in the normal
    course of things, and its scaler skips those steps: there only a loss that is not finite counts.

    It costs the norm of the gradients, and, on a GPU, one read of a few numbers for each optimizer step, for which the
    CPU waits. Batches of accumulated gradients are kept until their step. With FSDP one more number is reduced.

    Args:
        folder: the run's folder.
        action: `"stop"` or `"skip"`.
        max_skips: the most steps in a row that are skipped.
        max_files: the most batches that each process saves in a run; 0: none.

    Raises:
        ValueError: a setting out of its range.
        NonFiniteError: in training, as above.

    >>> GradientGuard("runs/mine", action="ignore")
    Traceback (most recent call last):
    ...
    ValueError: action must be 'stop' or 'skip', got 'ignore'
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        action: Literal["stop", "skip"] = "stop",
        max_skips: int = 3,
        max_files: int = 4,
    ) -> None:
        if action not in ("stop", "skip"):
            raise ValueError(f"action must be 'stop' or 'skip', got {action!r}")
        _check_count("max_skips", max_skips, 1)
        _check_count("max_files", max_files, 0)
        self.folder, self.action = Path(folder), action
        self.max_skips, self.max_files = max_skips, max_files
        self._skipped = 0  # in a row
        self._batches: list[Any] = []
        self._losses: list[Tensor] = []
        self._stepped = True
        self._statistics: list[Tensor] = []
        self._before: list[Tensor] = []

    @property
    def batches(self) -> Path:
        """Where batches are saved."""
        return self.folder / "non_finite"

    def state_dict(self) -> dict[str, Any]:
        """How many steps have been skipped in a row."""
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._skipped = state_dict["skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what a batch changes in its forward pass."""
        self._forget()
        self._statistics = [
            buffer
            for module in pl_module.modules()
            if isinstance(module, _NormBase)
            for buffer in module.buffers(recurse=False)
        ]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, and running statistics, until the optimizer steps."""
        if self._stepped:
            self._batches, self._losses, self._stepped = [], [], False
            if not self._before:
                self._before = [buffer.clone() for buffer in self._statistics]
            else:
                _copy(self._before, self._statistics)
        self._batches.append(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss, and have gradients tell the other processes if it is not finite."""
        noted = loss.detach()
        self._losses.append(noted)
        if _distributed(trainer) and loss.requires_grad:
            loss.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: torch.where(noted.isfinite(), gradient, math.nan)
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the norm, or act."""
        self._stepped = True
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = _total_norm(trainer, gradients)
        # One transfer: each would wait for the GPU.
        wide = torch.float32 if norm.device.type == "mps" else torch.float64
        numbers = torch.stack([norm.to(wide), *(loss.to(norm.device, wide).sum() for loss in self._losses)]).tolist()
        size, losses = numbers[0], numbers[1:]
        # The norm of large gradients may overflow; that alone is no reason to stop.
        gradient = not math.isfinite(size) and not _all_finite(trainer, gradients)
        loss = not all(map(math.isfinite, losses))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            # All ranks have the same gradients, and so all of them ask, or none.
            acts = any(_gather(trainer, loss)) if gradient or not _distributed(trainer) else False
        else:
            acts = gradient if _distributed(trainer) else gradient or loss
        if acts:
            self._act(trainer, pl_module, optimizer, losses, gradient)
        elif math.isfinite(size):
            self._skipped = 0
            # The same on every rank; said again so that Lightning need not warn.
            pl_module.log("train/grad_norm", norm, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind, as there is no teardown then."""
        self._forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._forget()

    def _forget(self) -> None:
        self._batches, self._losses, self._stepped = [], [], True
        self._statistics, self._before = [], []

    def _act(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, losses: list[float], gradient: bool
    ) -> None:
        _copy(self._statistics, self._before)
        found = [
            _look(trainer, pl_module, batch, loss, gradient) for batch, loss in zip(self._batches, losses, strict=False)
        ]
        blamed = [one for one in found if {"input", "loss"} & set(one.not_finite)]
        lost = any(_gather(trainer, any("loss" in one.not_finite for one in found)))
        known = any(_gather(trainer, bool(blamed)))
        # Without a batch that is known to be the cause, each of them may be.
        told = None if known and not blamed else self._report(trainer, blamed or found)
        where = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        what = " and ".join(["the loss"] * lost + ["the gradients"] * gradient)
        reports = "; ".join(report for report in _gather(trainer, told) if report)
        message = f"{what} of {where} are not finite (NaN or infinite): {reports}. "
        if self.action == "skip" and self._skipped < self.max_skips:
            self._skipped += 1
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            rank_zero_warn(f"{message}The step is skipped, number {self._skipped} of {self.max_skips} in a row.")
            return
        tried = f"It is the step after {self._skipped} in a row that were skipped. " if self._skipped else ""
        skip = "" if self.action == "skip" else ", or leave such steps out: callbacks.gradient_guard.action=skip"
        raise NonFiniteError(
            f"{message}{tried}Training stops with the weights as they were before, and the last checkpoint is not "
            "touched. Look at these images and masks; try a lower rate (optimizer.lr), clipped gradients "
            f"(trainer.gradient_clip_val=1), trainer.precision=bf16-mixed or 32-true instead of float16{skip}."
        )

    def _report(self, trainer: Trainer, found: Sequence[_Found]) -> str:
        """Tell of batches, and save the last one."""
        parts = [f"cases {_some([case for one in found for case in one.case])}"]
        if images := [case for one in found for case in one.broken]:
            parts.append(f"with images that are not finite: {_some(images)}")
        elif any("logits" in one.not_finite for one in found):
            parts.append("whose images are finite and whose logits are not")
        if trainer.world_size > 1:
            parts.append(f"on rank {trainer.global_rank}")
        if found:
            parts.append(self._save(trainer, found[-1]))
        return " ".join(part for part in parts if part)

    def _save(self, trainer: Trainer, one: _Found) -> str:
        rank = trainer.global_rank
        name = f"epoch_{trainer.current_epoch}_step_{trainer.global_step}_rank{rank}.pt"
        if one.image is None or len(list(self.batches.glob(f"*_rank{rank}.pt"))) >= self.max_files:
            return ""
        saved = {
            "image": one.image.detach().cpu(),
            "mask": None if one.mask is None else one.mask.detach().cpu(),
            "case": one.case,
            "not_finite": one.not_finite,
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "rank": rank,
        }
        try:
            write_atomically(self.batches / name, partial(torch.save, saved))
        except OSError as error:
            # What ends the training is the news; a failure to save must not take its place.
            return f"(could not save them: {error})"
        return f"(saved in {self.batches / name})"


class _Found(NamedTuple):
    """A batch, and what was not finite."""

    image: Tensor | None
    mask: Tensor | None
    case: list[str]
    broken: list[str]  # cases whose image is not finite
    not_finite: list[str]


def _look(trainer: Trainer, pl_module: LightningModule, batch: Any, loss: float, gradient: bool) -> _Found:
    given = read_batch(batch)
    bad = [] if math.isfinite(loss) else ["loss"]
    bad += ["gradient"] if gradient else []
    if given is None:
        return _Found(None, None, [f"of a {type(batch).__name__}, which has no names"], [], bad)
    finite = given.image.detach().flatten(1).isfinite().all(1).tolist()
    broken = [case for case, fine in zip(given.case, finite, strict=True) if not fine]
    logits = _logits(trainer, pl_module, given.image)
    if logits is not None and not bool(logits.isfinite().all()):
        bad.insert(0, "logits")
    if broken:
        bad.insert(0, "input")
    return _Found(given.image, given.mask, given.case, broken, bad)


def _logits(trainer: Trainer, pl_module: LightningModule, image: Tensor) -> Tensor | None:
    """What the network says of images, without talking to other ranks; None if it cannot be asked."""
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        return None
    training = [module for module in pl_module.modules() if module.training]
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(trainer.precision_plugin.forward_context())
            pl_module.eval()
            logits = pl_module(image)
    except Exception:
        # A module without `forward`, or without memory for it: nothing that matters beside what is told.
        return None
    finally:
        for module in training:
            module.training = True
    return logits if isinstance(logits, Tensor) else None


def _total_norm(trainer: Trainer, gradients: list[Tensor]) -> Tensor:
    norm: Any = nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    elif isinstance(trainer.strategy, FSDPStrategy) and _distributed(trainer):
        # Each rank has a part of every gradient.
        square = norm.to(trainer.strategy.root_device) ** 2
        torch.distributed.all_reduce(square)
        norm = square.sqrt()
    result: Tensor = norm
    return result


def _all_finite(trainer: Trainer, gradients: list[Tensor]) -> bool:
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    return all(_gather(trainer, finite)) if isinstance(trainer.strategy, FSDPStrategy) else finite


def _copy(to: list[Tensor], values: list[Tensor]) -> None:
    if to:
        with torch.no_grad():
            torch._foreach_copy_(to, values)


def _distributed(trainer: Trainer) -> bool:
    return trainer.world_size > 1 and torch.distributed.is_available() and torch.distributed.is_initialized()


def _gather(trainer: Trainer, value: Any) -> list[Any]:
    """What each rank holds, in the order of the ranks, on every rank. All ranks must call."""
    if not _distributed(trainer):
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def _some(items: Sequence[str]) -> str:
    shown = ", ".join(items[:_SHOWN])
    return shown + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
