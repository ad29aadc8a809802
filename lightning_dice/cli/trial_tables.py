"""The table and the picture of a sweep's trials."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from lightning_dice.io import number, write_csv
from lightning_dice.trials import Trial, best_first, read_trials

if TYPE_CHECKING:
    from rich.table import Table

SWEEP = "sweep.yaml"
TABLE, PICTURE = "trials.csv", "trials.png"


def swept_parameters(sweep: Path, trials: Sequence[Trial]) -> list[str]:
    """Return the keys that the user asked to sweep, and others in which trials differ."""
    described: Any = OmegaConf.load(sweep / SWEEP) if (sweep / SWEEP).is_file() else {}
    asked = [str(key) for key in described.get("swept") or []]
    parameters = [trial.parameters for trial in trials]
    known = dict.fromkeys(key for given in parameters for key in given)
    differ = [key for key in known if len({given.get(key) for given in parameters}) > 1]
    return list(dict.fromkeys([*(key for key in asked if key in known), *differ]))


def write_tables(sweep: Path) -> None:
    """Write `trials.csv` and `trials.png` for the trials so far.

    The table has a row for each trial: number, status, the best value of the monitor (under its name, such as
    `val/dice`), seconds, epochs, a column for each swept parameter, and the error.
    """
    trials = read_trials(sweep)
    parameters = swept_parameters(sweep, trials)
    value = next((trial.monitor for trial in trials if trial.monitor), "value")
    rows = []
    for trial in trials:
        row = {"number": str(trial.number), "status": trial.status, "seconds": f"{trial.seconds:.1f}"}
        row[value] = "" if trial.value is None else number(trial.value)
        row["epochs"] = "" if trial.epochs is None else str(trial.epochs)
        row["error"] = trial.error or ""
        rows.append({**{key: trial.parameters.get(key, "") for key in parameters}, **row})
    write_csv(sweep / TABLE, ["number", "status", value, "seconds", "epochs", *parameters, "error"], rows)
    from lightning_dice.plotting.sweep_chart import draw_trials

    draw_trials(sweep / PICTURE, trials, parameters)


def trial_table(sweep: Path, trials: Sequence[Trial], parameters: Sequence[str]) -> Table:
    """Return the table that is printed at the end of a sweep, best trials first.

    Args:
        sweep: the sweep's folder.
        trials: in any order.
        parameters: the swept keys.

    Returns:
        A rich table.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    value = next((trial.monitor for trial in trials if trial.monitor), "value")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("trial", value, *parameters, "epochs", "time", "status"):
        table.add_column(name, justify="left" if name in ("status", *parameters) else "right")
    ordered = best_first(trials)
    best = ordered[0] if ordered and ordered[0].value is not None else None
    for trial in ordered:
        outcome = trial.status if trial.status != "running" else "interrupted"
        table.add_row(
            str(trial.number),
            "" if trial.value is None else f"{trial.value:.4f}",
            *(Text(trial.parameters.get(key, "")) for key in parameters),
            "" if trial.epochs is None else str(trial.epochs),
            _clock(trial.seconds),
            Text(f"{outcome}: {trial.error}" if trial.error else outcome, overflow="ellipsis", no_wrap=True),
            style="bold" if trial is best else "red" if trial.status == "failed" else "",
        )
    whole, paths = Table.grid(padding=(0, 0)), Table.grid(padding=(0, 2))
    paths.add_column(style="dim", no_wrap=True)
    paths.add_column(overflow="fold")
    paths.add_row("sweep", Text(str(sweep), style="bold"))
    if best is not None:
        paths.add_row("best trial", Text(str(best.number)))
        paths.add_row("its settings", Text(" ".join(f"{key}={best.parameters.get(key, '')}" for key in parameters)))
    for label, name in (("trials", TABLE), ("picture", PICTURE)):
        if (sweep / name).is_file():
            paths.add_row(label, Text(name))
    whole.add_row(table)
    whole.add_row(paths)
    return whole


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
