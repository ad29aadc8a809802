"""Stop, or skip a step, when the loss or the gradients are not finite."""

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
from torch.optim import Optimizer

from lightning_dice.argument_checks import check_choice, check_count
from lightning_dice.callbacks.ranks import all_gather, is_distributed
from lightning_dice.data.batch import find_batch
from lightning_dice.io import write_atomically
from lightning_dice.library_internals.torch import foreach_copy_, is_batch_norm
from lightning_dice.text import join_some


class NonFiniteError(ValueError):
    """A loss or gradients that are not finite (NaN or infinite).

    Attributes:
        keep_checkpoint: True, so that `SaveOnInterrupt` does not replace the last checkpoint.
    """

    keep_checkpoint = True


class GradientGuard(Callback):
    r"""Log the norm of the gradients, and act when the loss or the gradients are not finite (NaN or infinite).

    `train/grad_norm` is the mean over the epoch's optimizer steps of

    .. math:: \|g\|_2 = \sqrt{\sum_i g_i^2}

    over all parameters, of accumulated, reduced and unscaled gradients, before they are clipped. Steps at which it is
    not finite are excluded from the mean.

    At a step whose loss or gradients are not finite, the batch is saved to
    `<folder>/non_finite/epoch_<e>_step_<s>_rank<r>.pt`, to be read with `torch.load(..., weights_only=True)`: `image`,
    `mask`, `case`, and `not_finite`, a list of those among `"input"` (the image), `"logits"`, `"loss"` and `"gradient"`
    that are not finite. (`"logits"` are computed again, by the network in evaluation mode.) Among several processes,
    those save whose own loss or images are not finite; if none is, all of them. Then

    - with `action="stop"`, `NonFiniteError` ends the training before the weights change. Its message names the cases
      and what to try. `SaveOnInterrupt` leaves the last checkpoint unchanged.
    - with `action="skip"`, all processes skip the step with a warning and continue with the next batch; after
      `max_skips` in a row the training stops. The epoch's `train/loss`, a mean over all steps, is then NaN.

    In both cases, running statistics of batch norm that the batch has changed are restored.

    All processes make the same decision, based on the reduced gradients: a process whose loss is not finite makes its
    gradients so, and thereby everyone's. Mixed precision with float16 (`16-mixed`) produces infinite gradients
    regularly, and its scaler skips those steps; with it, only a loss that is not finite counts.

    It costs one gradient norm per optimizer step and, on a GPU, one read of a few numbers, for which the CPU waits.
    Batches whose gradients accumulate are kept until the step. FSDP reduces one more number.

    Args:
        folder: the run's folder.
        action: `"stop"` or `"skip"`.
        max_skips: maximal number of steps skipped in a row.
        max_files: maximal number of batches that each process saves in a run; 0 saves none.

    Raises:
        ValueError: an argument is out of its range.
        NonFiniteError: in training, as above.

    >>> GradientGuard("runs/mine", action="ignore")
    Traceback (most recent call last):
    ...
    ValueError: action must be one of 'stop', 'skip', got 'ignore'
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        action: Literal["stop", "skip"] = "stop",
        max_skips: int = 3,
        max_files: int = 4,
    ) -> None:
        self.folder, self.action = Path(folder), check_choice("action", action, ("stop", "skip"))
        self.max_skips, self.max_files = check_count("max_skips", max_skips), check_count("max_files", max_files, 0)
        self._skipped = 0  # in a row
        self._batches: list[Any] = []
        self._losses: list[Tensor] = []
        self._stepped = True
        self._statistics: list[Tensor] = []  # of batch norm
        self._saved_statistics: list[Tensor] = []

    @property
    def batches(self) -> Path:
        """Folder of the saved batches."""
        return self.folder / "non_finite"

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps skipped in a row."""
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self._skipped = state_dict["skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the running statistics, which a forward pass changes."""
        self._reset()
        self._statistics = [
            buffer
            for module in pl_module.modules()
            if is_batch_norm(module)
            for buffer in module.buffers(recurse=False)
        ]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch and the running statistics until the optimizer steps."""
        if self._stepped:
            self._batches, self._losses, self._stepped = [], [], False
            if not self._saved_statistics:
                self._saved_statistics = [buffer.clone() for buffer in self._statistics]
            else:
                _copy_into(self._saved_statistics, self._statistics)
        self._batches.append(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss; if it is not finite, make the gradients so, for the other processes to see."""
        kept = loss.detach()
        self._losses.append(kept)
        if is_distributed(trainer) and loss.requires_grad:
            loss.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: torch.where(kept.isfinite(), gradient, math.nan)
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the norm, or skip the step, or stop."""
        self._stepped = True
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = _total_norm(trainer, gradients)
        # One transfer: each would wait for the GPU.
        wide = torch.float32 if norm.device.type == "mps" else torch.float64
        numbers = torch.stack([norm.to(wide), *(loss.to(norm.device, wide).sum() for loss in self._losses)]).tolist()
        size, *losses = numbers
        # The norm of large gradients may overflow; that alone is no reason to stop.
        bad_gradient = not math.isfinite(size) and not _all_finite(trainer, gradients)
        bad_loss = not all(map(math.isfinite, losses))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            # All ranks have the same gradients: either all of them gather, or none.
            acts = any(all_gather(trainer, bad_loss)) if bad_gradient or not is_distributed(trainer) else False
        else:
            acts = bad_gradient if is_distributed(trainer) else bad_gradient or bad_loss
        if acts:
            self._skip_or_stop(trainer, pl_module, optimizer, losses, bad_gradient)
        elif math.isfinite(size):
            self._skipped = 0
            # The same on every rank; sync_dist only avoids Lightning's warning.
            pl_module.log("train/grad_norm", norm, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop all batches: Lightning calls no teardown after an exception."""
        self._reset()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop all batches."""
        self._reset()

    def _reset(self) -> None:
        self._batches, self._losses, self._stepped = [], [], True
        self._statistics, self._saved_statistics = [], []

    def _skip_or_stop(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        optimizer: Optimizer,
        losses: list[float],
        bad_gradient: bool,
    ) -> None:
        _copy_into(self._statistics, self._saved_statistics)
        diagnoses = [
            _diagnose(trainer, pl_module, batch, loss, bad_gradient)
            for batch, loss in zip(self._batches, losses, strict=False)
        ]
        causes = [diagnosis for diagnosis in diagnoses if {"input", "loss"} & set(diagnosis.not_finite)]
        bad_loss = any(all_gather(trainer, any("loss" in diagnosis.not_finite for diagnosis in diagnoses)))
        cause_known = any(all_gather(trainer, bool(causes)))
        # If no batch is known to be the cause, each of them may be.
        report = None if cause_known and not causes else self._describe(trainer, causes or diagnoses)
        reports = "; ".join(report for report in all_gather(trainer, report) if report)
        subject = " and ".join(["the loss"] * bad_loss + ["the gradients"] * bad_gradient)
        step = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        message = f"{subject} of {step} are not finite (NaN or infinite): {reports}. "
        if self.action == "skip" and self._skipped < self.max_skips:
            self._skipped += 1
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            rank_zero_warn(f"{message}The step is skipped, number {self._skipped} of {self.max_skips} in a row.")
            return
        skipped = f"It follows {self._skipped} skipped step{'s' * (self._skipped > 1)}. " if self._skipped else ""
        skip = "" if self.action == "skip" else ", or skip such steps: callbacks.gradient_guard.action=skip"
        raise NonFiniteError(
            f"{message}{skipped}Training stops with the weights from before this step, and the last checkpoint is "
            "unchanged. Look at these images and masks; try a lower rate (optimizer.lr), clipped gradients "
            f"(trainer.gradient_clip_val=1), trainer.precision=bf16-mixed or 32-true instead of float16{skip}."
        )

    def _describe(self, trainer: Trainer, diagnoses: Sequence[_Diagnosis]) -> str:
        """Describe batches for the message, and save the last one."""
        parts = [f"cases {join_some([case for diagnosis in diagnoses for case in diagnosis.case])}"]
        if broken := [case for diagnosis in diagnoses for case in diagnosis.broken]:
            parts.append(f"with images that are not finite: {join_some(broken)}")
        elif any("logits" in diagnosis.not_finite for diagnosis in diagnoses):
            parts.append("whose images are finite and whose logits are not")
        if trainer.world_size > 1:
            parts.append(f"on rank {trainer.global_rank}")
        if diagnoses:
            parts.append(self._save(trainer, diagnoses[-1]))
        return " ".join(part for part in parts if part)

    def _save(self, trainer: Trainer, diagnosis: _Diagnosis) -> str:
        rank = trainer.global_rank
        name = f"epoch_{trainer.current_epoch}_step_{trainer.global_step}_rank{rank}.pt"
        if diagnosis.image is None or len(list(self.batches.glob(f"*_rank{rank}.pt"))) >= self.max_files:
            return ""
        content = {
            "image": diagnosis.image.detach().cpu(),
            "mask": None if diagnosis.mask is None else diagnosis.mask.detach().cpu(),
            "case": diagnosis.case,
            "not_finite": diagnosis.not_finite,
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "rank": rank,
        }
        try:
            write_atomically(self.batches / name, partial(torch.save, content))
        except OSError as error:
            # Must not hide the error that ends the training.
            return f"(could not save them: {error})"
        return f"(saved in {self.batches / name})"


class _Diagnosis(NamedTuple):
    """A batch, and which parts of it are not finite."""

    image: Tensor | None
    mask: Tensor | None
    case: list[str]
    broken: list[str]  # cases whose image is not finite
    not_finite: list[str]


def _diagnose(trainer: Trainer, pl_module: LightningModule, batch: Any, loss: float, bad_gradient: bool) -> _Diagnosis:
    found = find_batch(batch)
    not_finite = ([] if math.isfinite(loss) else ["loss"]) + ["gradient"] * bad_gradient
    if found is None:
        return _Diagnosis(None, None, [f"of a {type(batch).__name__}, which has no names"], [], not_finite)
    finite = found.image.detach().flatten(1).isfinite().all(1).tolist()
    broken = [case for case, is_finite in zip(found.case, finite, strict=True) if not is_finite]
    logits = _eval_logits(trainer, pl_module, found.image)
    if logits is not None and not bool(logits.isfinite().all()):
        not_finite.insert(0, "logits")
    if broken:
        not_finite.insert(0, "input")
    return _Diagnosis(found.image, found.mask, found.case, broken, not_finite)


def _eval_logits(trainer: Trainer, pl_module: LightningModule, image: Tensor) -> Tensor | None:
    """Return the network's logits in evaluation mode, without messages to other ranks; None where it cannot."""
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
        # No `forward`, or no memory for it: the report does without the logits.
        return None
    finally:
        for module in training:
            module.training = True
    return logits if isinstance(logits, Tensor) else None


def _total_norm(trainer: Trainer, gradients: list[Tensor]) -> Tensor:
    norm: Any = nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    elif isinstance(trainer.strategy, FSDPStrategy) and is_distributed(trainer):
        # Each rank has a shard of every gradient.
        square = norm.to(trainer.strategy.root_device) ** 2
        torch.distributed.all_reduce(square)
        norm = square.sqrt()
    result: Tensor = norm
    return result


def _all_finite(trainer: Trainer, gradients: list[Tensor]) -> bool:
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    return all(all_gather(trainer, finite)) if isinstance(trainer.strategy, FSDPStrategy) else finite


def _copy_into(tensors: list[Tensor], values: list[Tensor]) -> None:
    if tensors:
        with torch.no_grad():
            foreach_copy_(tensors, values)
