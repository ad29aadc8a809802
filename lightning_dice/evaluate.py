"""Score a run again, or masks in files: `python -m lightning_dice.evaluate run=<folder>`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from lightning_dice.cli.command import run_command
from lightning_dice.cli.config import compose, instantiate
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.required_extras import check_extras

if TYPE_CHECKING:
    from lightning_dice import report
    from lightning_dice.callbacks import CaseTable, Overlays
    from lightning_dice.cli.experiment import Experiment
    from lightning_dice.data import Split

SETTINGS = ("run", "predictions", "checkpoint", "calibration", "split", "missing", "output", "device")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m lightning_dice.evaluate` or `dice-evaluate`.

    Args:
        arguments: the command line, such as `["run=runs/a", "split=val"]`; `None`: this process's.

    Raises:
        SystemExit: the command failed; its exit status.
    """

    def act(config: DictConfig, overrides: list[str]) -> None:
        evaluate(config, overrides)

    run_command("evaluate", act, SETTINGS, arguments)


def evaluate(config: DictConfig, overrides: list[str]) -> None:
    """Score a run's checkpoint, or masks in files; write the scores and a report to a new folder.

    Args:
        config: as in `conf/evaluate.yaml`.
        overrides: applied to the run's config, in Hydra's syntax: `data.root=elsewhere`, `module.threshold=0.3`;
            without a run, to the config of `fit`, to choose the data.

    Raises:
        UserError: the run, its checkpoint, the predictions, the data or a setting is wrong.
    """
    if config.split not in (None, "val", "test"):
        raise UserError(f"split must be val or test, got {config.split}")
    if config.missing not in ("error", "skip"):
        raise UserError(f"missing must be error or skip, got {config.missing}")
    if config.predictions is not None:
        score_files(config, overrides)
    elif config.run is not None:
        score_run(config, overrides)
    else:
        raise UserError("run has no value: give run=<folder of a run>, or predictions=<folder of masks>")


def score_run(config: DictConfig, overrides: list[str]) -> None:
    """Predict with a run's network, and score the predictions.

    Raises:
        UserError: as by `evaluate`.
    """
    from lightning_dice.cli import run_folder
    from lightning_dice.cli.experiment import Experiment, print_line

    run = run_folder.reopen(config.run, overrides, command="evaluate")
    # With one device there is no need to agree on a folder for the results.
    run.trainer.update(accelerator=config.trainer.accelerator, devices=1, num_nodes=1, strategy="auto")
    run.logger = {}
    check_extras(run)
    checkpoint = run_folder.find_checkpoint(config.run, config.checkpoint)
    # Data and weights are read first, so that a mistake in them leaves no folder behind.
    experiment = Experiment(run, Path(run.folder), trained=True)
    run_folder.check_weights(experiment.module, checkpoint, run)
    calibration = run_folder.calibrate(experiment.module, config.run, config.calibration, checkpoint)
    split = _split(config, experiment)
    if config.output is not None:
        experiment.folder = run_folder.exact_folder(config.output)
    else:
        experiment.folder = run_folder.new_folder(config.run, f"evaluate_{split}", dated=False)
    run.folder = str(experiment.folder)
    run_folder.save_config(experiment.folder, run)
    print_line(f"{checkpoint} on {split}")
    if calibration is not None:
        print_line(calibration)
    try:
        experiment.evaluate(split, checkpoint)
    finally:
        run_folder.remove_unused(experiment.folder)
    _print_scores(experiment.summary, experiment.folder)
    experiment.print_summary()


def score_files(config: DictConfig, overrides: list[str]) -> None:
    """Score masks in files, with the code that scores a network.

    Raises:
        UserError: as by `evaluate`; names all cases without a prediction, and all predictions that cannot be scored.
    """
    from rich.progress import Progress

    from lightning_dice import report
    from lightning_dice.cli import run_folder
    from lightning_dice.cli.errors import as_user_errors
    from lightning_dice.cli.experiment import Experiment, print_line, score_provenance
    from lightning_dice.report.score_predictions import score_predictions

    if config.checkpoint != "best" or config.calibration != "auto":
        raise UserError("checkpoint and calibration apply to a network's predictions: leave them out with predictions=")
    folder = Path(config.predictions).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"predictions {folder} is not a folder")
    run = _data_config(config, overrides)
    # Checked before the masks are read. Nothing is written into their folder.
    output = None if config.output is None else Path(config.output).expanduser().absolute()
    if output is not None and output.exists():
        raise UserError(f"{output} exists, and nothing is overwritten: choose a new folder")
    experiment = Experiment(run, folder)
    split = _split(config, experiment)
    table, overlays = _recorders(run, folder)
    source = experiment.data.source
    cases, reader = source.split(split), getattr(source, "reader", None)
    if cases is None or reader is None:
        raise UserError(f"a {type(source).__name__} has no reader for predictions")
    with as_user_errors(), Progress(transient=True) as progress:
        bar = progress.add_task("scoring", total=len(cases))
        scored = score_predictions(
            experiment.data,
            reader.for_cases(cases),
            folder,
            split,
            table,
            overlays,
            skip_missing=config.missing == "skip",
            on_case=lambda: progress.advance(bar),
        )
    if output is None:
        output = run_folder.new_folder(folder.parent, f"{folder.name}_scores_{split}", dated=False)
    table.folder = output
    table.write(split)
    if overlays is not None:
        overlays.folder = output
        overlays.draw(split)
    provenance = score_provenance(run, folder.name, _origin(config, folder, scored.missing))
    lines = report.write_report(output, split, provenance)
    _print_files(f"{split} cases without a prediction, left out", scored.missing)
    _print_files("files that belong to no case, skipped", scored.unmatched)
    print_line(f"{scored.cases} {split} cases of {folder}")
    _print_scores(lines, output)
    print_line(f"folder  {output}\nreport  {output / report.REPORT}")


def _split(config: DictConfig, experiment: Experiment) -> Split:
    split: Split = config.split or experiment.last_split
    if experiment.data.source.split(split) is None:
        raise UserError(f"the data have no {split} split")
    return split


def _data_config(config: DictConfig, overrides: list[str]) -> DictConfig:
    """Return the config of the run; without a run, the config of one that would train on these data."""
    from lightning_dice.cli import run_folder

    if config.run is not None:
        run = run_folder.reopen(config.run, overrides, command="evaluate")
        check_extras(run, leave_out=("logger", "model", "module", "loss"))
        return run
    if not any(override.partition("=")[0] in ("data", "experiment") for override in overrides):
        raise UserError(
            "predictions need masks to be compared with: give run=<folder of a run>, or data=folder data.root=<folder>"
        )
    run = compose("fit", overrides)
    check_extras(run, leave_out=("logger", "model", "module", "loss"))
    run_folder.resolve_data(run)
    return run


def _recorders(run: DictConfig, folder: Path) -> tuple[CaseTable, Overlays | None]:
    """Return the callbacks that write the table of cases and the overlays, with the settings of the run."""
    from lightning_dice.callbacks import CaseTable

    described = run.get("callbacks") or {}
    if described.get("case_table"):
        table: CaseTable = instantiate(described["case_table"], "callbacks.case_table", folder=str(folder))
    else:
        settings = {"ignore_index": run.data.ignore_index, "exclude_classes": list(run.data.exclude_classes)}
        table = CaseTable(folder, list(run.data.classes), run.data.activation, **settings)
    if not described.get("overlays"):
        return table, None
    return table, instantiate(described["overlays"], "callbacks.overlays", folder=str(folder))


def _origin(config: DictConfig, folder: Path, missing: list[str]) -> Mapping[str, str]:
    """Describe where the predictions come from, for the report."""
    known = {"predictions": str(folder)}
    if config.run is not None:
        known["run"] = str(Path(config.run).expanduser().absolute())
    if missing:
        known["not predicted, and not scored"] = ", ".join(missing)
    return known


def _print_files(title: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
        print(f"{title} ({len(names)}): {shown}", file=sys.stderr)


def _print_scores(lines: list[report.ScoreSummary], folder: Path) -> None:
    from rich.console import Console

    from lightning_dice import report

    console = Console(width=max(Console().width, 112, len(str(folder)) + 24))
    console.print(report.score_table(lines))


if __name__ == "__main__":
    main()
