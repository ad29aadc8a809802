"""What is in a data set, and what is wrong with it: `python -m lightning_dice.inspect data=folder data.root=...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lightning_dice.cli.command import hydra_escape, run_command
from lightning_dice.cli.config import explain_typos, instantiate
from lightning_dice.cli.errors import UserError

if TYPE_CHECKING:
    from lightning_dice.data import Source
    from lightning_dice.data_check.finding import Finding
    from lightning_dice.data_check.survey import SurveyResult

PAGE, TABLE, FINDINGS = "inspection.html", "cases.csv", "findings.json"


def main() -> None:
    """Entry point of `python -m lightning_dice.inspect` and `dice-inspect`."""
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        print("\nerror: inspect looks at one data set at a time, without --multirun", file=sys.stderr)
        raise SystemExit(2)
    sys.argv[1:] = hydra_escape(sys.argv[1:])
    composed = False

    def act(config: DictConfig, _: list[str]) -> int:
        nonlocal composed
        composed = True
        grave = {"error", "warning"} if config.strict else {"error"}
        return int(any(finding.severity in grave for finding in inspect(config)))

    try:
        run_command("inspect", act)
    except SystemExit as stop:
        if stop.code == 1 and not composed:  # Hydra's.
            explain_typos("inspect", sys.argv[1:])
        raise


def inspect(config: DictConfig) -> list[Finding]:
    """Read a data set once, show what was found, and write it to a new folder.

    `inspection.html` has the findings, tables and pictures; `cases.csv` the numbers of each case; `findings.json` what
    was found, for programs.

    Args:
        config: as of `conf/inspect.yaml`.

    Returns:
        The findings; those accepted are notes.

    Raises:
        UserError: a setting is not as it should be, or the folder cannot be made; before the data are read.
    """
    from lightning_dice.cli import run_folder
    from lightning_dice.cli.experiment import silence_libraries
    from lightning_dice.data_check.finding import KINDS

    silence_libraries()
    if unknown := [kind for kind in config.accept if kind not in KINDS]:
        raise UserError(f"accept: there is no finding {', '.join(unknown)}, only {', '.join(KINDS)}")
    for name, least in (("thumbnails", 0), ("workers", 1)):
        value = config[name]
        if not (isinstance(value, int) and value >= least) and not (name == "workers" and value is None):
            raise UserError(f"{name} must be an integer of at least {least}, got {value!r}")
    run_folder.resolve_data(config)
    OmegaConf.to_container(config.data, resolve=True, throw_on_missing=True)  # Before a folder is made.
    choice = data_choice()
    if config.output is not None:
        folder = run_folder.exact_folder(config.output)
    else:
        folder = run_folder.new_folder(config.runs, f"inspect_{choice}")
    try:
        config.folder = str(folder)
        source: Source = instantiate(config.data.datamodule.source, "data")
        found = run_survey(source, config)
    except BaseException:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    return write_results(source, found, config, folder)


def data_choice() -> str:
    """Which file of the group `data` was chosen; `data` outside of a command."""
    from hydra.core.hydra_config import HydraConfig

    return str(HydraConfig.get().runtime.choices.get("data")) if HydraConfig.initialized() else "data"


def run_survey(source: Source, config: DictConfig) -> SurveyResult:
    """Read and measure all cases, with a bar."""
    import os

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lightning_dice.data_check.case_statistics import Task
    from lightning_dice.data_check.survey import survey

    data = config.data
    task = Task(
        [str(name) for name in data.classes], data.activation, data.ignore_index, [int(i) for i in data.exclude_classes]
    )
    # Windows of large images are as many as their area holds.
    whole = "read_size" in data and not data.read_size
    default = data.batch_size if data.get("read_size") else 1
    of_each = 1 if whole else int(data.get("patches_per_image") or default)
    facts = {
        "batch_size": -(-int(data.batch_size) // of_each),
        "channels": int(data.channels),
        "size": list(data.get("patch_size") or ()),
        "root": data.get("root"),
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        shown = bar.add_task("checking the files", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(shown, description="looking at cases", completed=done, total=total)

        return survey(
            source,
            task,
            workers=config.workers or min(8, cores),
            thumbnails=config.thumbnails,
            facts=facts,
            advance=advance,
        )


def write_results(source: Source, found: SurveyResult, config: DictConfig, folder: Path) -> list[Finding]:
    """Judge what was measured, show it, and write the files."""
    import dataclasses
    import datetime
    import json
    from importlib.metadata import version

    from rich.console import Console

    from lightning_dice.data_check.checks import judge
    from lightning_dice.data_check.content_checks import cases_in_words
    from lightning_dice.data_check.finding import SEVERITIES
    from lightning_dice.data_check.html import page, pictured
    from lightning_dice.data_check.survey import draw_missing
    from lightning_dice.data_check.tables import case_columns, case_row, shown
    from lightning_dice.io import write_atomically, write_csv

    findings = judge(found, accept=list(config.accept))
    root = str(config.data.get("root") or "")
    draw_missing(source, found, pictured(findings))
    made_of = {
        "data": f"{data_choice()} {root}".strip(),
        "classes": ", ".join(found.task.classes),
        "activation": found.task.activation,
        "ignored label": str(found.task.ignore_index),
        "accepted": ", ".join(config.accept) or "none",
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        "version": f"lightning-dice {version('lightning-dice')}",
    }
    text = page(found, findings, f"Inspection of {Path(root).name or data_choice()}", made_of)
    write_atomically(folder / PAGE, lambda part: part.write_text(text, encoding="utf-8"))
    write_csv(folder / TABLE, case_columns(found), [case_row(case, found) for case in found.cases])
    plain: dict[str, Any] = {
        **made_of,
        "cases": found.sizes,
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    told = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / FINDINGS, lambda part: part.write_text(told, encoding="utf-8"))
    console = Console(width=max(Console().width, 110))
    for part in shown(found, findings):
        console.print(part)
        console.print()
    counts = (sum(finding.severity == severity for finding in findings) for severity in SEVERITIES)
    told_counts = (cases_in_words(count, name) for count, name in zip(counts, SEVERITIES, strict=True))
    print(f"{', '.join(told_counts)}: {folder / PAGE}")
    return findings


if __name__ == "__main__":
    main()
