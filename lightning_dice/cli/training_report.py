"""What Lightning would log about a training: why it stopped early, and its profile."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer
from lightning.pytorch.utilities import rank_zero_only


def stop_reason(trainer: L.Trainer) -> str | None:
    """Return why a training ended before `max_epochs` and `max_steps`; `None` if it did not, or a callback said so.

    >>> stop_reason(L.Trainer(accelerator="cpu", logger=False)) is None
    True
    """
    if not trainer.should_stop:
        return None
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        reason = ""
        if isinstance(callback, EarlyStopping) and callback.stopped_epoch >= trainer.current_epoch - 1:
            reason = str(callback.stopping_reason_message or "")
            reason = reason.removeprefix("Monitored metric ").replace(" records.", " validations.")
            reason = reason.replace("last 1 validations", "last validation")
            reason = reason.removesuffix(" Signaling Trainer to stop.")
        elif isinstance(callback, Timer) and (callback.time_remaining() or 0.0) < 0:
            reason = f"the time of the training is over after {callback.time_elapsed():.0f} s (max_time)"
        if reason:
            return f"stopped after epoch {trainer.current_epoch - 1}, step {trainer.global_step}: {reason}"
    return None


class _Print(logging.Handler):
    """Print the profile, which would otherwise disappear with Lightning's messages."""

    @rank_zero_only
    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


@contextmanager
def printed_profile() -> Iterator[None]:
    """Print what a profiler of the Trainer (`trainer.profiler=simple`) measures within."""
    log, handler = logging.getLogger("lightning.pytorch.profilers"), _Print()
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
