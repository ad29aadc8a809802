"""What a sweep knows of its trials: a record in the folder of each."""

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
ERROR = "error.txt"  # The traceback of a trial that failed, or what its processes said last.

Status = Literal["running", "finished", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep.

    Attributes:
        number: from 0, in the order in which the sweeper asked for it.
        overrides: what it was trained with, in Hydra's syntax.
        status: `"running"` also if it was broken off.
        value: the best of what the checkpoint callback watches; `None` if there is none.
        monitor: what that is.
        mode: whether its best is the greatest or the least.
        epochs: trained, in all.
        seconds: in all its parts, if it was broken off.
        started: the last of them, in seconds since 1970.
        error: of one that failed, in one line.
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
        """The overrides by their keys.

        >>> Trial(0, ["loss=dice", "+trainer.limit_val_batches=2"]).parameters
        {'loss': 'dice', 'trainer.limit_val_batches': '2'}
        """
        pairs = (override.partition("=") for override in self.overrides)
        return {key.lstrip("+~"): value for key, _, value in pairs}

    def ended(self, status: Status, **changes: object) -> Trial:
        """The same trial, at its end."""
        # One that had ended and is trained on by hand has no beginning to count from.
        seconds = self.seconds + (time.time() - self.started if self.status == "running" else 0.0)
        return replace(self, status=status, seconds=seconds, **changes)  # type: ignore[arg-type]


def read_trial(folder: str | Path) -> Trial | None:
    """The record in a trial's folder; `None` if there is none."""
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # Of a machine that stopped while it was written: the trial is not known to have ended.
    known = {field.name for field in fields(Trial)}
    return Trial(**{name: value for name, value in values.items() if name in known})


def write_trial(folder: str | Path, trial: Trial) -> None:
    """Write the record; the folder is made if it is not there."""
    text = json.dumps(asdict(trial), indent=2) + "\n"

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    write_atomically(Path(folder) / RECORD, write)


def read_trials(sweep: str | Path) -> list[Trial]:
    """The records of a sweep's trials, by their numbers; folders that are not named by a number are passed over."""
    if not Path(sweep).is_dir():
        return []
    trials = (read_trial(path) for path in Path(sweep).iterdir() if path.name.isdigit())
    return sorted((trial for trial in trials if trial is not None), key=lambda trial: trial.number)


def best_first(trials: Iterable[Trial]) -> list[Trial]:
    """Trials by their value; those that have none come last.

    >>> [trial.number for trial in best_first([Trial(0, []), Trial(1, [], value=0.1), Trial(2, [], value=0.3)])]
    [2, 1, 0]
    """

    def key(trial: Trial) -> tuple[bool, float, int]:
        value = trial.value if trial.value is not None else 0.0
        return trial.value is None, -value if trial.mode == "max" else value, trial.number

    return sorted(trials, key=key)


def record_outcome(folder: str | Path, status: Status, **changes: object) -> None:
    """Note that the training in this folder has ended, if it is a trial of a sweep.

    Args:
        folder: of the run.
        status: how it ended.
        changes: other attributes of `Trial`.
    """
    trial = read_trial(folder)
    if trial is not None:
        write_trial(folder, trial.ended(status, error=None, **changes))
