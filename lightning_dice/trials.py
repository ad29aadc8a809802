"""Records of a sweep's trials, one in each trial's folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from lightning_dice.io import write_atomically

RECORD = "trial.json"
ERROR = "error.txt"  # The traceback of a failed trial, or the last output of its processes.

Status = Literal["running", "finished", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep.

    Attributes:
        number: from 0, in the order in which the sweeper asked for the trials.
        overrides: the trial's settings, in Hydra's syntax.
        status: `"running"` also after an interruption.
        value: best value of the metric that the checkpoint callback monitors; None if there is none.
        monitor: that metric.
        mode: `"max"` if its best value is the largest, `"min"` if it is the smallest.
        epochs: number of epochs trained.
        seconds: duration, summed over the parts of an interrupted run.
        started: start of the last part, in seconds since 1970.
        error: the error of a failed trial, in one line.
    """

    number: int
    overrides: list[str]
    status: Status = "running"
    value: float | None = None
    monitor: str | None = None
    mode: str = "max"
    epochs: int | None = None
    seconds: float = 0.0
    started: float = 0.0
    error: str | None = None

    @property
    def parameters(self) -> dict[str, str]:
        """The values of the overrides by their keys.

        >>> Trial(0, ["loss=dice", "+trainer.limit_val_batches=2"]).parameters
        {'loss': 'dice', 'trainer.limit_val_batches': '2'}
        """
        pairs = (override.partition("=") for override in self.overrides)
        return {key.lstrip("+~"): value for key, _, value in pairs}

    def ended(self, status: Status, **changes: object) -> Trial:
        """Return the trial with its final status, its duration, and other changed attributes.

        >>> Trial(0, [], status="finished", seconds=60.0).ended("finished", value=0.9).seconds
        60.0
        """
        # The start is unknown if the trial had ended and somebody trained it further.
        seconds = self.seconds + (time.time() - self.started if self.status == "running" else 0.0)
        return replace(self, status=status, seconds=seconds, **changes)  # type: ignore[arg-type]


def read_trial(folder: str | Path) -> Trial | None:
    """Read the record in a trial's folder; None if there is none."""
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # The machine stopped while it was written: whether the trial has ended is unknown.
    known = {field.name for field in fields(Trial)}
    return Trial(**{name: value for name, value in values.items() if name in known})


def write_trial(folder: str | Path, trial: Trial) -> None:
    """Write the record into a trial's folder, which is created if necessary."""
    text = json.dumps(asdict(trial), indent=2) + "\n"

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    write_atomically(Path(folder) / RECORD, write)


def read_trials(sweep: str | Path) -> list[Trial]:
    """Read the records of a sweep's trials, sorted by number, from the folders that are named by a number."""
    if not Path(sweep).is_dir():
        return []
    trials = (read_trial(path) for path in Path(sweep).iterdir() if path.name.isdigit())
    return sorted((trial for trial in trials if trial is not None), key=lambda trial: trial.number)


def best_first(trials: Iterable[Trial]) -> list[Trial]:
    """Sort trials by their value, the best first; trials without a value come last.

    >>> [trial.number for trial in best_first([Trial(0, []), Trial(1, [], value=0.1), Trial(2, [], value=0.3)])]
    [2, 1, 0]
    """

    def key(trial: Trial) -> tuple[bool, float, int]:
        value = trial.value if trial.value is not None else 0.0
        return trial.value is None, -value if trial.mode == "max" else value, trial.number

    return sorted(trials, key=key)


def record_outcome(folder: str | Path, status: Status, **changes: object) -> None:
    """Record in a folder how training ended, if it is a trial of a sweep.

    Args:
        folder: the run's folder.
        status: the trial's status.
        changes: other attributes of `Trial`.
    """
    trial = read_trial(folder)
    if trial is not None:
        write_trial(folder, trial.ended(status, error=None, **changes))
