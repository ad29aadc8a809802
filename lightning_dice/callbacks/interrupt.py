"""Leave a checkpoint behind, whatever ends the training."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dice.callbacks.files import write_atomically

SIGINT_STATUS, SIGTERM_STATUS = 130, 143


class SaveOnInterrupt(Callback):
    """Write `checkpoints/last.ckpt` when Ctrl-C, SIGTERM or an exception ends the training, and say how to go on.

    The checkpoint is written beside its place and then moved there: a full disk or a second signal leaves the former
    one whole. Nothing is written before the first optimizer step, nor if the weights are not finite.

    Lightning acts on SIGTERM at the end of the running batch, and leaves the process with exit status 0; this callback
    makes it 143. For 130 after Ctrl-C, call `fit` within `honest_exit()`.

    Args:
        folder: the run's folder.
        command: what resumes a run, up to ` resume=<folder>`.
    """

    def __init__(self, folder: str | Path, command: str = "python -m lightning_dice.fit") -> None:
        self.folder, self.command = Path(folder), command

    @property
    def path(self) -> Path:
        """Where the checkpoint is written."""
        return self.folder / "checkpoints" / "last.ckpt"

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, and tell."""
        if isinstance(exception, SIGTERMException):
            exception.code = SIGTERM_STATUS
        if (
            trainer.state.fn != "fit"
            or trainer.sanity_checking
            or getattr(trainer, "fast_dev_run", False)
            or trainer.global_step == 0
        ):
            return
        reason = {SIGTERMException: "SIGTERM", KeyboardInterrupt: "Ctrl-C"}.get(
            type(exception), type(exception).__name__
        )
        if not all(bool(p.isfinite().all()) for p in pl_module.parameters()):
            _tell(trainer, f"Stopped by {reason}: the weights are not finite, {self.path} was not written.")
            return
        try:
            self._save(trainer)
        except Exception as error:
            # What ended the training is the news; a failure to save must not take its place.
            _tell(trainer, f"Stopped by {reason}: could not write {self.path}: {error}")
            return
        where = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        resume = f"{self.command} resume={shlex.quote(str(self.folder))}"
        _tell(trainer, f"Stopped by {reason} in {where}: saved {self.path}. Go on with: {resume}")

    def _save(self, trainer: Trainer) -> None:
        for callback in trainer.checkpoint_callbacks:
            folder = getattr(callback, "dirpath", None)
            if getattr(callback, "save_last", None) and folder and self.path.parent.resolve() == Path(folder).resolve():
                # Else a resumed ModelCheckpoint takes our file for a stranger's and writes last-v1.ckpt beside it.
                callback.last_model_path = str(Path(folder) / self.path.name)  # type: ignore[attr-defined]
        strategy = trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy) and type(strategy) is not DDPStrategy:
            # Sharded weights can be saved only by all ranks together, in the strategy's own format.
            trainer.save_checkpoint(self.path)
        elif trainer.is_global_zero:
            # Not `trainer.save_checkpoint`: its barrier waits for ever if the exception was on this rank alone.
            state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            write_atomically(self.path, lambda part: strategy.save_checkpoint(state, part))


@contextmanager
def honest_exit() -> Iterator[None]:
    """Let a training that was interrupted end the process with the status that shells expect.

    Lightning turns Ctrl-C into exit status 1 and SIGTERM into 0; within this context they are 130 and 143. Without it,
    a script that goes on after `fit` would take a terminated training for a finished one.

    >>> with honest_exit():
    ...     raise SIGTERMException
    Traceback (most recent call last):
    SystemExit: 143
    """
    try:
        yield
    except SIGTERMException:
        raise SystemExit(SIGTERM_STATUS) from None
    except KeyboardInterrupt:
        raise SystemExit(SIGINT_STATUS) from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise SystemExit(SIGINT_STATUS) from None
        raise


def _tell(trainer: Trainer, message: str) -> None:
    if trainer.is_global_zero:
        print(message, file=sys.stderr, flush=True)
