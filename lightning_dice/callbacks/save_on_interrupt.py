"""Save a checkpoint, however the training ends."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dice.callbacks.exact_resume import keep_pending_validation, saving_on_this_rank_alone
from lightning_dice.callbacks.ranks import is_distributed
from lightning_dice.io import write_atomically
from lightning_dice.library_internals.lightning import dump_checkpoint, is_accumulating

SIGINT_STATUS, SIGTERM_STATUS = 130, 143
# Windows has no SIGUSR1.
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
_SIGNAL_NAMES = {signal.SIGINT: "Ctrl-C"}


class SaveOnInterrupt(Callback):
    """Write `checkpoints/last.ckpt` when Ctrl-C, a signal or an exception ends the training, and print how to resume.

    Ctrl-C, SIGTERM and SIGUSR1, which clusters send before they take a machine away, end the training after the next
    optimizer step, on all ranks, whichever of them received the signal; from there it can be resumed exactly (see
    `ExactResume`). During a validation, that step comes after the validation; where no step follows, the training ends
    as usual, and nothing after it. A second Ctrl-C ends the training at once. Under SLURM, SIGUSR1 requeues the job
    (`#SBATCH --signal=USR1@90`, `--requeue`). Several ranks exchange one number per step for this.

    The checkpoint is written beside the former one and then takes its place: a full disk or a second signal leaves the
    former one intact. Nothing is written before the first optimizer step, nor if the weights are not finite, nor after
    an exception whose attribute `keep_checkpoint` is true, such as `NonFiniteError`. A checkpoint written after an
    exception or a second Ctrl-C dates from the middle of a step: that batch is repeated, and resuming is not exact.

    An interrupted `fit` raises `KeyboardInterrupt` or Lightning's `SIGTERMException`. Call it within
    `exit_with_signal_status()` to exit with the status that shells expect: 130, 143 or 138 (SIGUSR1).

    Args:
        folder: the run's folder.
        command: the command that resumes a run, without its argument `resume=<folder>`.

    >>> SaveOnInterrupt("runs/mine").path.as_posix()
    'runs/mine/checkpoints/last.ckpt'
    """

    def __init__(self, folder: str | Path, command: str = "python -m lightning_dice.fit") -> None:
        self.folder, self.command = Path(folder), command
        self._received = 0  # a signal's number: ranks agree on it by an all-reduce
        self._handlers: dict[signal.Signals, Any] = {}
        self._handled = self._started = False

    @property
    def path(self) -> Path:
        """Path of the checkpoint."""
        return self.folder / "checkpoints" / "last.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle signals instead of Lightning, which would end the ranks at different steps."""
        self._received, self._handled, self._started = 0, False, True
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            # Not by print: the signal may have interrupted one.
            os.write(2, b"\nStopping after this step, from which the run can resume exactly; Ctrl-C again stops now.\n")
        self._received = number

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """End the training if a rank has received a signal, unless gradients are still being accumulated."""
        if is_accumulating(trainer):
            return
        reason = self._received_by_any_rank(trainer)
        if reason is None:
            return
        if not _has_finite_weights(trainer.lightning_module):
            _print(
                trainer, f"Stopped by {_signal_name(reason)}: the weights are not finite, {self.path} was not written."
            )
        else:
            self._adopt_as_last(trainer)
            # A cluster's notice is short: do not wait for a full disk.
            with suppress(AttributeError):
                trainer.strategy.checkpoint_io.patience = 10.0  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path)
            self._print_saved(trainer, _signal_name(reason))
        self._stop(trainer, reason)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the former handlers, and stop after all if a rank has received a signal since the last step."""
        self._restore_handlers()
        reason = self._received_by_any_rank(trainer)
        if reason is None:
            return
        # A `ModelCheckpoint` has written one that can be trained further, if there is one for the end of each epoch.
        if not trainer.strategy.broadcast(self.path.is_file()) and _has_finite_weights(pl_module):
            trainer.save_checkpoint(self.path)
        _print(trainer, f"Stopped by {_signal_name(reason)} after the last step. {self._how_to_resume()}")
        self._stop(trainer, reason)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save that a validation or the end of the epoch is due, if it is, in case there is no `ExactResume`."""
        if trainer.state.fn == "fit":
            keep_pending_validation(trainer, checkpoint)

    def _received_by_any_rank(self, trainer: Trainer) -> signal.Signals | None:
        received = self._received
        if is_distributed(trainer):
            message = torch.tensor(received, device=trainer.strategy.root_device)
            dist.all_reduce(message, op=dist.ReduceOp.MAX)
            received = int(message)
        return signal.Signals(received) if received else None

    def _stop(self, trainer: Trainer, reason: signal.Signals) -> None:
        self._handled = True
        if reason not in (signal.SIGINT, signal.SIGTERM):
            _requeue(trainer)
        if reason == signal.SIGINT:
            raise KeyboardInterrupt
        error = SIGTERMException()
        error.code = 128 + int(reason)
        raise error

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, unless the checkpoint was written already or the former one is better."""
        self._restore_handlers()
        if isinstance(exception, SIGTERMException) and exception.code is None:
            exception.code = SIGTERM_STATUS
        if (
            self._handled
            or not self._started  # Resuming itself may have failed.
            or trainer.state.fn != "fit"
            or trainer.sanity_checking
            or getattr(trainer, "fast_dev_run", False)
            or trainer.global_step == 0
        ):
            return
        reason = {SIGTERMException: "SIGTERM", KeyboardInterrupt: "Ctrl-C"}.get(
            type(exception), type(exception).__name__
        )
        if getattr(exception, "keep_checkpoint", False):
            # The training has diverged, for example: the end of the last epoch is the better point to resume from.
            _print(trainer, f"Stopped by {reason}: {self.path} is unchanged.")
            return
        if not _has_finite_weights(pl_module):
            _print(trainer, f"Stopped by {reason}: the weights are not finite, {self.path} was not written.")
            return
        try:
            self._save_alone(trainer)
        except Exception as error:
            # Must not hide the exception that ended the training.
            _print(trainer, f"Stopped by {reason}: could not write {self.path}: {error}")
            return
        self._print_saved(trainer, reason)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _print_saved(self, trainer: Trainer, reason: str) -> None:
        where = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        _print(trainer, f"Stopped by {reason} in {where}: saved {self.path}. {self._how_to_resume()}")

    def _how_to_resume(self) -> str:
        return f"Resume with: {self.command} resume={shlex.quote(str(self.folder))}"

    def _adopt_as_last(self, trainer: Trainer) -> None:
        for callback in trainer.checkpoint_callbacks:
            folder = getattr(callback, "dirpath", None)
            if getattr(callback, "save_last", None) and folder and self.path.parent.resolve() == Path(folder).resolve():
                # Otherwise a resumed ModelCheckpoint does not know this file, and writes last-v1.ckpt beside it.
                callback.last_model_path = str(Path(folder) / self.path.name)  # type: ignore[attr-defined]

    def _save_alone(self, trainer: Trainer) -> None:
        self._adopt_as_last(trainer)
        strategy = trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy) and type(strategy) is not DDPStrategy:
            if trainer.world_size > 1:
                # All ranks write such a checkpoint together, and some may have failed.
                raise RuntimeError(f"{type(strategy).__name__} cannot save its shards after an exception")
            trainer.save_checkpoint(self.path)
        elif trainer.is_global_zero:
            # Not `trainer.save_checkpoint`, whose barrier waits forever if the exception was on this rank alone.
            with saving_on_this_rank_alone():
                state = dump_checkpoint(trainer)
            # Not by `SafeCheckpointIO`, which retries for minutes: the disk may be what ended the training.
            write_atomically(self.path, lambda part: torch.save(state, part))


@contextmanager
def exit_with_signal_status() -> Iterator[None]:
    """Exit with the status that shells expect when the training within is interrupted.

    Lightning turns Ctrl-C into exit status 1 and SIGTERM into 0; within this context they are 130 and 143. Without it,
    a script that does more after `fit` would mistake a terminated training for a finished one.

    >>> with exit_with_signal_status():
    ...     raise SIGTERMException
    Traceback (most recent call last):
    SystemExit: 143
    """
    try:
        yield
    except SIGTERMException as error:
        raise SystemExit(error.code or SIGTERM_STATUS) from None
    except KeyboardInterrupt:
        raise SystemExit(SIGINT_STATUS) from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise SystemExit(SIGINT_STATUS) from None
        raise


def _has_finite_weights(module: LightningModule) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def _signal_name(reason: signal.Signals) -> str:
    return _SIGNAL_NAMES.get(reason, reason.name)


def _requeue(trainer: Trainer) -> None:
    """Have SLURM start this job again, which resumes the run."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job or not trainer.is_global_zero or not re.fullmatch(r"[0-9_]+", job):
        return
    if shutil.which("scontrol") is None:
        _print(trainer, f"Job {job} was not requeued: there is no scontrol on this machine.")
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    outcome = "requeued" if done.returncode == 0 else f"not requeued: {done.stderr.strip()}"
    _print(trainer, f"Job {job} was {outcome}.")


def _print(trainer: Trainer, message: str) -> None:
    if trainer.is_global_zero:
        print(message, file=sys.stderr, flush=True)
