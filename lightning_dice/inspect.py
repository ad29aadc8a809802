"""Inspect a data set, and find what is wrong with it: `python -m lightning_dice.inspect data=folder data.root=...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from lightning_dice.cli.command import hydra_escape, run_command
from lightning_dice.cli.config import explain_typos, instantiate
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.required_extras import check_extras

if TYPE_CHECKING:
    from lightning_dice.data import Source
    from lightning_dice.data_check.finding import Finding
    from lightning_dice.data_check.survey import SurveyResult

PAGE, TABLE, FINDINGS = "inspection.html", "cases.csv", "findings.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m lightning_dice.inspect` or `dice-inspect`.

    Args:
        arguments: the command line, such as `["data=folder", "data.root=images"]`; `None`: this process's.

    Raises:
        SystemExit: the command failed; its exit status.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-m", "--multirun"} & set(given):
        print("\nerror: inspect looks at one data set at a time, without --multirun", file=sys.stderr)
        raise SystemExit(2)
    composed = False

    def act(config: DictConfig, _: list[str]) -> int:
        nonlocal composed
        composed = True
        severe = {"error", "warning"} if config.strict else {"error"}
        return int(any(finding.severity in severe for finding in inspect(config)))

    try:
        run_command("inspect", act, arguments=hydra_escape(given))
    except SystemExit as stop:
        if stop.code == 1 and not composed:  # Hydra could not compose the config.
            explain_typos("inspect", hydra_escape(given))
        raise


def inspect(config: DictConfig) -> list[Finding]:
    """Read a data set once, print the findings, and write them to a new folder.

    `inspection.html` has the findings, tables and thumbnails; `cases.csv` the measurements of each case;
    `findings.json` the findings for other programs.

    Args:
        config: the settings of `conf/inspect.yaml`.

    Returns:
        The findings; accepted ones are notes.

    Raises:
        UserError: a setting is invalid, or the folder cannot be made; before the data are read.
    """
    from lightning_dice.cli.experiment import silence_libraries
    from lightning_dice.data_check.checks import run_checks
    from lightning_dice.data_check.html import illustrated_cases
    from lightning_dice.data_check.survey import draw_missing

    silence_libraries()
    check_settings(config)
    folder = make_folder(config)
    try:
        config.folder = str(folder)
        source: Source = instantiate(config.data.datamodule.source, "data")
        result = survey_with_progress(source, config)
    except BaseException:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    findings = run_checks(result, accept=list(config.accept))
    draw_missing(source, result, illustrated_cases(findings))
    write_results(folder, result, findings, config)
    print_results(folder, result, findings)
    return findings


def check_settings(config: DictConfig) -> None:
    """Check the command's settings, and that the data's settings are complete.

    Raises:
        UserError: a setting is invalid.
        MissingMandatoryValue: a setting of the data has no value.
    """
    from lightning_dice.cli import run_folder
    from lightning_dice.data_check.finding import KINDS

    for name, remedy in (("folder", ": give output=<new folder>"), ("resume", "")):
        if config[name] is not None:
            raise UserError(f"{name} is a setting of fit, which inspect does not have{remedy}")
    if unknown := [kind for kind in config.accept if kind not in KINDS]:
        raise UserError(f"accept: there is no finding {', '.join(unknown)}, only {', '.join(KINDS)}")
    for name, least in (("thumbnails", 0), ("workers", 1)):
        value = config[name]
        if not (isinstance(value, int) and value >= least) and not (name == "workers" and value is None):
            raise UserError(f"{name} must be an integer of at least {least}, got {value!r}")
    check_extras(config, leave_out=("logger", "model", "module", "loss", "augment"))
    run_folder.resolve_data(config)
    OmegaConf.to_container(config.data, resolve=True, throw_on_missing=True)


def make_folder(config: DictConfig) -> Path:
    """Make the folder for the results."""
    from lightning_dice.cli import run_folder

    if config.output is not None:
        return run_folder.exact_folder(config.output)
    return run_folder.new_folder(config.runs, f"inspect_{data_choice()}")


def survey_with_progress(source: Source, config: DictConfig) -> SurveyResult:
    """Read and measure all cases, with a progress bar."""
    import os

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lightning_dice.data_check.survey import survey
    from lightning_dice.data_check.task import Task

    data = config.data
    excluded = [int(index) for index in data.exclude_classes]
    task = Task([str(name) for name in data.classes], data.activation, data.ignore_index, excluded)
    facts = {
        "batch_size": -(-int(data.batch_size) // patches_per_image(data)),
        "channels": int(data.channels),
        "size": list(data.get("patch_size") or ()),
        "root": data.get("root"),
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        row = bar.add_task("checking the files", total=None)
        return survey(
            source,
            task,
            workers=config.workers or min(8, cores),
            thumbnails=config.thumbnails,
            facts=facts,
            advance=lambda done, total: bar.update(row, description="reading cases", completed=done, total=total),
        )


def patches_per_image(data: DictConfig) -> int:
    """Return how many patches of one image a batch may hold.

    Without a number, a large image has as many patches as its area holds: it may fill a batch.

    >>> patches_per_image(OmegaConf.create({"batch_size": 8, "read_size": [768, 768], "patches_per_image": None}))
    8
    """
    if "read_size" in data and not data.read_size:
        return 1
    return int(data.get("patches_per_image") or (data.batch_size if data.get("read_size") else 1))


def write_results(folder: Path, result: SurveyResult, findings: list[Finding], config: DictConfig) -> None:
    """Write the page, the table of cases and the findings."""
    import dataclasses
    import datetime
    import json
    from importlib.metadata import version

    from lightning_dice.data_check.html import render_inspection
    from lightning_dice.data_check.tables import case_columns, case_row
    from lightning_dice.io import write_atomically, write_csv

    root = str(config.data.get("root") or "")
    details = {
        "data": f"{data_choice()} {root}".strip(),
        "classes": ", ".join(result.task.classes),
        "activation": result.task.activation,
        "ignored label": str(result.task.ignore_index),
        "accepted": ", ".join(config.accept) or "none",
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        "version": f"lightning-dice {version('lightning-dice')}",
    }
    page = render_inspection(result, findings, f"Inspection of {Path(root).name or data_choice()}", details)
    write_atomically(folder / PAGE, lambda part: part.write_text(page, encoding="utf-8"))
    write_csv(folder / TABLE, case_columns(result), [case_row(case, result) for case in result.cases])
    content = {**details, "cases": result.sizes, "findings": [dataclasses.asdict(finding) for finding in findings]}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / FINDINGS, lambda part: part.write_text(text, encoding="utf-8"))


def print_results(folder: Path, result: SurveyResult, findings: list[Finding]) -> None:
    """Print the tables, the findings and their counts."""
    from rich.console import Console

    from lightning_dice.data_check.finding import SEVERITIES, pluralize
    from lightning_dice.data_check.tables import render_for_terminal

    console = Console(width=max(Console().width, 110))
    for part in render_for_terminal(result, findings):
        console.print(part)
        console.print()
    counts = [pluralize(sum(finding.severity == name for finding in findings), name) for name in SEVERITIES]
    print(f"{', '.join(counts)}: {folder / PAGE}")


def data_choice() -> str:
    """Return the chosen file of the group `data`; `"data"` outside of a command."""
    from hydra.core.hydra_config import HydraConfig

    return str(HydraConfig.get().runtime.choices.get("data")) if HydraConfig.initialized() else "data"


if __name__ == "__main__":
    main()
