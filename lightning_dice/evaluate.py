"""Score a run again, or masks in files: `python -m lightning_dice.evaluate run=<folder>`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from lightning_dice.cli.command import run_command
from lightning_dice.cli.config import compose, instantiate
from lightning_dice.cli.errors import UserError

if TYPE_CHECKING:
    from lightning_dice import report
    from lightning_dice.callbacks import CaseTable, Overlays
    from lightning_dice.cli.experiment import Experiment
    from lightning_dice.data import Split

SETTINGS = ("run", "predictions", "checkpoint", "calibration", "split", "missing", "output", "device")


def main() -> None:
    """Entry point of `python -m lightning_dice.evaluate` and `dice-evaluate`."""

    def act(config: DictConfig, overrides: list[str]) -> None:
        evaluate(config, overrides)

    run_command("evaluate", act, SETTINGS)


def evaluate(config: DictConfig, overrides: list[str]) -> None:
    """Score a run's checkpoint, or predictions in files, and write the scores and the report to a new folder.

    Args:
        config: as of `conf/evaluate.yaml`.
        overrides: of the run's config, in Hydra's syntax: `data.root=elsewhere`, `module.threshold=0.3`; without a run,
            of the config of `fit`, whose data they choose.

    Raises:
        UserError: the run, its checkpoint, the predictions, the data or a setting is not as it should be.
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
    """Let a run's network predict, and score it.

    Raises:
        UserError: as `evaluate`.
    """
    from lightning_dice.cli import run_folder
    from lightning_dice.cli.experiment import Experiment, print_line

    run = run_folder.reopen(config.run, overrides)
    if any(override.partition("=")[0] in ("trainer.devices", "trainer.strategy") for override in overrides):
        raise UserError("evaluate runs on one device: only device=cpu or device=gpu can be chosen")
    # One device: the results then need no agreement on a folder.
    run.trainer.update(accelerator=config.trainer.accelerator, devices=1, num_nodes=1, strategy="auto")
    run.logger = {}
    checkpoint = run_folder.find_checkpoint(config.run, config.checkpoint)
    # The data and the weights are read, and a mistake in them told, before a folder is made.
    session = Experiment(run, Path(run.folder), trained=True)
    run_folder.check_weights(session.module, checkpoint)
    calibration = run_folder.calibrate(session.module, config.run, config.calibration, checkpoint)
    split = _split(config, session)
    if config.output is not None:
        session.folder = run_folder.exact_folder(config.output)
    else:
        session.folder = run_folder.new_folder(config.run, f"evaluate_{split}", dated=False)
    run.folder = str(session.folder)
    run_folder.save_config(session.folder, run)
    print_line(f"{checkpoint} on {split}")
    if calibration is not None:
        print_line(calibration)
    session.evaluate(split, checkpoint)
    _show(session.summary, session.folder)
    session.show()


def score_files(config: DictConfig, overrides: list[str]) -> None:
    """Score masks that lie in files, by the code that scores a network.

    Raises:
        UserError: as `evaluate`; all cases without a prediction, and all predictions that cannot be scored, are named.
    """
    from rich.progress import Progress

    from lightning_dice import report
    from lightning_dice.cli import run_folder
    from lightning_dice.cli.errors import as_user_errors
    from lightning_dice.cli.experiment import Experiment, print_line, score_provenance
    from lightning_dice.data.volumes.prediction_io import VolumePredictionIO
    from lightning_dice.data.volumes.sources import VolumeCases
    from lightning_dice.report.score_predictions import score_predictions

    if config.checkpoint != "best" or config.calibration != "auto":
        raise UserError("checkpoint and calibration decide what a network predicts: leave them out with predictions=")
    folder = Path(config.predictions).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"predictions {folder} is not a folder")
    run = _config_of_data(config, overrides)
    # The masks' own folder, and what it holds, stay as they are.
    output = None if config.output is None else Path(config.output).expanduser().absolute()
    if output is not None and output.exists():
        raise UserError(f"{output} exists, and nothing is overwritten: choose a new folder")
    session = Experiment(run, folder)
    split = _split(config, session)
    table, overlays = _recorders(run, folder)
    cases, reader = session.data.source.split(split), getattr(session.data.source, "reader", None)
    if reader is None:
        raise UserError(f"a {type(session.data.source).__name__} has no reader, so that it reads no predictions")
    if isinstance(reader, VolumePredictionIO) and isinstance(cases, VolumeCases):
        reader = replace(reader, stored=cases.stored)
    with as_user_errors(), Progress(transient=True) as progress:
        bar = progress.add_task("scoring", total=None if cases is None else len(cases))
        scored = score_predictions(
            session.data,
            reader,
            folder,
            split,
            table,
            overlays,
            skip_missing=config.missing == "skip",
            on_case=lambda: progress.advance(bar),
        )
    made = (
        run_folder.new_folder(folder.parent, f"{folder.name}_scores_{split}", dated=False) if output is None else output
    )
    table.folder = made
    table.write(split)
    if overlays is not None:
        overlays.folder = made
        overlays.draw(split)
    lines = report.write_report(
        made, split, score_provenance(run, folder.name, _origin(config, folder, scored.missing))
    )
    _tell_files(scored.missing, scored.unmatched, split)
    print_line(f"{scored.cases} {split} cases of {folder}")
    _show(lines, made)
    print_line(f"folder  {made}\nreport  {made / report.REPORT}")


def _split(config: DictConfig, session: Experiment) -> Split:
    split: Split = config.split or session.last_split
    if session.data.source.split(split) is None:
        raise UserError(f"the data have no {split} split")
    return split


def _config_of_data(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The config of a run, or, without one, that of a run that would train on these data."""
    from lightning_dice.cli import run_folder

    if config.run is not None:
        return run_folder.reopen(config.run, overrides)
    if not any(override.partition("=")[0] in ("data", "experiment") for override in overrides):
        raise UserError(
            "predictions need masks to be compared with: give run=<folder of a run>, or data=folder data.root=<folder>"
        )
    run = compose("fit", overrides)
    run_folder.resolve_data(run)
    return run


def _recorders(run: DictConfig, folder: Path) -> tuple[CaseTable, Overlays | None]:
    """The callbacks that write a run's table and pictures, as its config has them."""
    from lightning_dice.callbacks import CaseTable

    described = run.get("callbacks") or {}
    if described.get("case_table"):
        table: CaseTable = instantiate(described["case_table"], "callbacks.case_table", folder=str(folder))
    else:
        facts = {"ignore_index": run.data.ignore_index, "exclude_classes": list(run.data.exclude_classes)}
        table = CaseTable(folder, list(run.data.classes), run.data.activation, **facts)
    if not described.get("overlays"):
        return table, None
    return table, instantiate(described["overlays"], "callbacks.overlays", folder=str(folder))


def _origin(config: DictConfig, folder: Path, missing: list[str]) -> Mapping[str, str]:
    """What is known of the predictions."""
    known = {"predictions": str(folder)}
    if config.run is not None:
        known["run"] = str(Path(config.run).expanduser().absolute())
    if missing:
        known["not predicted, and not scored"] = ", ".join(missing)
    return known


def _tell_files(missing: list[str], leftover: list[str], split: Split) -> None:
    told = {f"{split} cases without a prediction, left out": missing, "files of no case, passed over": leftover}
    for what, files in told.items():
        if files:
            some = ", ".join(files[:8]) + (" ..." if len(files) > 8 else "")
            print(f"{what} ({len(files)}): {some}", file=sys.stderr)


def _show(lines: list[report.ScoreSummary], folder: Path) -> None:
    from rich.console import Console

    from lightning_dice import report

    console = Console(width=max(Console().width, 112, len(str(folder)) + 24))
    console.print(report.score_table(lines))


if __name__ == "__main__":
    main()
