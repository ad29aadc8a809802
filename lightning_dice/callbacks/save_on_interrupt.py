"""Leave a checkpoint behind, whatever ends the training."""

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

from lightning_dice.callbacks.exact_resume import saving_alone
from lightning_dice.io import write_atomically

SIGINT_STATUS, SIGTERM_STATUS = 130, 143
# Windows has no SIGUSR1.
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
_NAMES = {signal.SIGINT: "Ctrl-C"}


class SaveOnInterrupt(Callback):
    """Write `checkpoints/last.ckpt` when Ctrl-C, a signal or an exception ends the training, and say how to go on.

    Ctrl-C, SIGTERM and SIGUSR1, which clusters send before they take a machine away, end the training after the next
    optimizer step, on all ranks, whichever of them was told: from there it goes on exactly (see `ExactResume`). While
    it validates, that step comes after the validation. A second Ctrl-C ends it at once. Under SLURM, SIGUSR1 has the
    job requeued (`#SBATCH --signal=USR1@90`, `--requeue`). With several ranks this costs a message of one number a
    step.

    The checkpoint is written beside its place and then moved there: a full disk or a second signal leaves the former
    one whole. Nothing is written before the first optimizer step, nor if the weights are not finite, nor after an
    exception with a true attribute `keep_checkpoint`, such as `NonFiniteError`. One written because of an exception,
    or of a second Ctrl-C, is of the middle of a step: the batch that was under way comes again, and it is not exact.

    A training that was ended so raises `KeyboardInterrupt` or Lightning's `SIGTERMException`; for the exit status that
    shells expect, 130, 143 or 138 (SIGUSR1), call `fit` within `exit_with_signal_status()`.

    Args:
        folder: the run's folder.
        command: what resumes a run, up to ` resume=<folder>`.
    """

    def __init__(self, folder: str | Path, command: str = "python -m lightning_dice.fit") -> None:
        self.folder, self.command = Path(folder), command
        self._asked = 0  # The number of the signal that came, as a process of several must be able to add them up.
        self._handlers: dict[signal.Signals, Any] = {}
        self._saved = False

    @property
    def path(self) -> Path:
        """Where the checkpoint is written."""
        return self.folder / "checkpoints" / "last.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals; instead of Lightning, which would end the ranks at different steps."""
        self._asked, self._saved = 0, False
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            # Not by print, in the middle of which this may have come.
            os.write(2, b"\nStopping after this step, to save where it goes on exactly; Ctrl-C again stops at once.\n")
        self._asked = number

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """End the training if that was asked for, where it can go on exactly."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        asked = self._asked
        if trainer.world_size > 1 and dist.is_initialized():
            message = torch.tensor(asked, device=trainer.strategy.root_device)
            dist.all_reduce(message, op=dist.ReduceOp.MAX)
            asked = int(message)
        if not asked:
            return
        reason = signal.Signals(asked)
        if not _finite(trainer.lightning_module):
            _tell(trainer, f"Stopped by {_name(reason)}: the weights are not finite, {self.path} was not written.")
        else:
            self._own(trainer)
            # A cluster's notice is short: a full disk is not waited for.
            with suppress(AttributeError):
                trainer.strategy.checkpoint_io.patience = 10.0  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path)
            self._say_saved(trainer, _name(reason))
        self._saved = True
        if reason not in (signal.SIGINT, signal.SIGTERM):
            _requeue(trainer)
        if reason == signal.SIGINT:
            raise KeyboardInterrupt
        error = SIGTERMException()
        error.code = 128 + int(reason)
        raise error

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no longer."""
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, and tell."""
        self._restore_handlers()
        if isinstance(exception, SIGTERMException) and exception.code is None:
            exception.code = SIGTERM_STATUS
        if (
            self._saved
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
            # The error's own word, as of a training that has diverged: the last epoch's end is where to go on from.
            _tell(trainer, f"Stopped by {reason}: {self.path} stays as it was.")
            return
        if not _finite(pl_module):
            _tell(trainer, f"Stopped by {reason}: the weights are not finite, {self.path} was not written.")
            return
        try:
            self._save_alone(trainer)
        except Exception as error:
            # What ended the training is the news; a failure to save must not take its place.
            _tell(trainer, f"Stopped by {reason}: could not write {self.path}: {error}")
            return
        self._say_saved(trainer, reason)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _say_saved(self, trainer: Trainer, reason: str) -> None:
        where = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        resume = f"{self.command} resume={shlex.quote(str(self.folder))}"
        _tell(trainer, f"Stopped by {reason} in {where}: saved {self.path}. Go on with: {resume}")

    def _own(self, trainer: Trainer) -> None:
        for callback in trainer.checkpoint_callbacks:
            folder = getattr(callback, "dirpath", None)
            if getattr(callback, "save_last", None) and folder and self.path.parent.resolve() == Path(folder).resolve():
                # Else a resumed ModelCheckpoint takes our file for a stranger's and writes last-v1.ckpt beside it.
                callback.last_model_path = str(Path(folder) / self.path.name)  # type: ignore[attr-defined]

    def _save_alone(self, trainer: Trainer) -> None:
        self._own(trainer)
        strategy = trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy) and type(strategy) is not DDPStrategy:
            if trainer.world_size > 1:
                # In the strategy's own format, by all ranks together, of which some may not come.
                raise RuntimeError(f"after an exception a {type(strategy).__name__} cannot save its shards")
            trainer.save_checkpoint(self.path)
        elif trainer.is_global_zero:
            # Not `trainer.save_checkpoint`: its barrier waits for ever if the exception was on this rank alone.
            with saving_alone():
                state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            # Nor with the patience of `SafeCheckpointIO`: what ended the training may be the disk.
            write_atomically(self.path, lambda part: torch.save(state, part))


@contextmanager
def exit_with_signal_status() -> Iterator[None]:
    """Let a training that was interrupted end the process with the status that shells expect.

    Lightning turns Ctrl-C into exit status 1 and SIGTERM into 0; within this context they are 130 and 143. Without it,
    a script that goes on after `fit` would take a terminated training for a finished one.

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


def _finite(module: LightningModule) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def _name(reason: signal.Signals) -> str:
    return _NAMES.get(reason, reason.name)


def _requeue(trainer: Trainer) -> None:
    """Have SLURM start this job again, which then goes on with the run."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job or not trainer.is_global_zero or not re.fullmatch(r"[0-9_]+", job):
        return
    if shutil.which("scontrol") is None:
        _tell(trainer, f"The job {job} was not requeued: there is no scontrol here.")
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    what = "requeued" if done.returncode == 0 else f"not requeued: {done.stderr.strip()}"
    _tell(trainer, f"The job {job} was {what}.")


def _tell(trainer: Trainer, message: str) -> None:
    if trainer.is_global_zero:
        print(message, file=sys.stderr, flush=True)
