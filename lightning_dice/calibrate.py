"""Calibrate a run: `python -m lightning_dice.calibrate run=<folder>` finds its temperature and thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from lightning_dice.cli.command import run_command
from lightning_dice.cli.errors import UserError, as_user_errors
from lightning_dice.cli.required_extras import check_extras

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_dice.cli.experiment import Experiment
    from lightning_dice.inference import PostProcessing
    from lightning_dice.inference.calibrator import Calibrator
    from lightning_dice.module import SegmentationModule

SETTINGS = ("run", "checkpoint", "output", "thresholds", "pixels", "seed", "overwrite", "device")
MEMORY = 2**29  # bytes of the drawn logits (4 each) and targets (2 each) of all cases

# Scores before and after a calibration: `dice`, `dice/<class>`, `nll`, `ece`.
BeforeAndAfter = dict[str, dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m lightning_dice.calibrate` or `dice-calibrate`.

    Args:
        arguments: the command line, such as `["run=runs/a"]`; `None`: this process's.

    Raises:
        SystemExit: the command failed; its exit status.
    """

    def run(config: DictConfig, overrides: list[str]) -> None:
        calibrate(config, overrides)

    run_command("calibrate", run, SETTINGS, arguments)


def calibrate(config: DictConfig, overrides: list[str]) -> PostProcessing:
    """Find the temperature and thresholds of a checkpoint on the run's validation cases, and write them to a file.

    The cases are whole, and their logits are as in prediction: with windows and mirroring, if the run has them. The
    Dice score and its policy are those of the module's first `DiceScore`.

    Args:
        config: the settings of `conf/calibrate.yaml`.
        overrides: applied to the run's config, in Hydra's syntax: `data.root=elsewhere`, `inference.size=[512,512]`.

    Returns:
        The calibration.

    Raises:
        UserError: a wrong run, checkpoint or setting, or wrong data; before any work.
    """
    import torch
    from rich.console import Console

    from lightning_dice.cli import run_folder
    from lightning_dice.cli.experiment import Experiment, print_line

    run = run_folder.reopen(config.run, overrides, command="calibrate")
    run.trainer.update(accelerator=config.trainer.accelerator, devices=1, num_nodes=1, strategy="auto")
    run.update(logger={}, callbacks={})
    check_extras(run)
    path = output_path(config)
    checkpoint = run_folder.find_checkpoint(config.run, config.checkpoint)
    experiment = Experiment(run, Path(run.folder), trained=True)
    cases = check_experiment(experiment)
    module, device = experiment.module, experiment.trainer.strategy.root_device
    saved = run_folder.check_weights(module, checkpoint, run)
    module.load_state_dict(saved["state_dict"])
    module.eval().to(device)
    print_line(f"{checkpoint} on val, on {device}")
    with as_user_errors(), torch.inference_mode():
        experiment.data.setup("validate")
        calibrator = make_calibrator(module, config, run, cases=cases)
        collect(module, experiment.data.val_dataloader(), device, calibrator)

    classes = [str(name) for name in run.data.classes]
    calibration, scores = find_calibration(calibrator, classes, thresholds=config.thresholds)
    calibration.save(
        path,
        {
            "checkpoint": describe_checkpoint(checkpoint, saved),
            "split": "val",
            "cases": calibrator.cases,
            "pixels": calibrator.drawn,
            "seed": config.seed,
            "inference": str(module.inference),
            "scores": without_nan(scores),
        },
    )
    Console().print(score_table(scores, calibration, classes))
    if not calibrator.has_thresholds:
        print_line("no thresholds for a softmax of more than two classes: each would move the pixels of all others")
    print_line(f"{calibrator.cases} cases, {calibrator.drawn} pixels for the temperature: {path}")
    return calibration


def output_path(config: DictConfig) -> Path:
    """Return the path of the calibration's file.

    Raises:
        UserError: it exists and must not be overwritten, or its folder does not exist.
    """
    from lightning_dice.inference import CALIBRATION

    path = Path(config.output or Path(config.run) / CALIBRATION).expanduser().absolute()
    if path.exists() and not config.overwrite:
        raise UserError(f"{path} exists, and nothing is overwritten: overwrite=true, or choose output=<file>")
    if not path.parent.is_dir():
        raise UserError(f"output must be a file in a folder that exists, got {path}")
    return path


def check_experiment(experiment: Experiment) -> int:
    """Return the number of validation cases of a run that has no temperature or thresholds of its own.

    Raises:
        UserError: otherwise.
    """
    postprocessing = experiment.module.inference.postprocessing
    if postprocessing.temperature is not None or postprocessing.thresholds is not None:
        raise UserError(
            "inference.postprocessing of the run has a temperature or thresholds, which go before a calibration: "
            "calibrate with inference.postprocessing.temperature=null inference.postprocessing.thresholds=null"
        )
    cases = experiment.data.source.split("val")
    if cases is None:
        raise UserError("the data have no val split to calibrate on; the training and test splits must not be used")
    return len(cases)


def make_calibrator(module: SegmentationModule, config: DictConfig, run: DictConfig, *, cases: int) -> Calibrator:
    """Return a calibrator that counts as the module's first `DiceScore` does.

    Args:
        module: the run's module.
        config: the command's config.
        run: the run's config, for a module without a `DiceScore`.
        cases: number of cases, which the memory for drawn pixels is divided by.
    """
    from lightning_dice.inference.calibrator import Calibrator
    from lightning_dice.metrics import DiceScore

    activation = module.predictor().activation
    dice = next((metric for metric in module.val_metrics.values() if isinstance(metric, DiceScore)), None)
    if dice is None:
        dice = DiceScore(
            len(run.data.classes),
            activation=activation,
            exclude_classes=list(run.data.exclude_classes),
            ignore_index=run.data.ignore_index,
        )
    return Calibrator(
        dice.num_classes,
        activation,
        threshold=module.threshold,
        ignore_index=dice.ignore_index,
        exclude_classes=dice.exclude_classes,
        smooth=dice.smooth,
        absent=dice.absent,
        pool=dice.pool,
        pixels=min(config.pixels, max(1, MEMORY // (6 * dice.num_classes * cases))),
        seed=config.seed,
    )


def collect(module: SegmentationModule, loader: Any, device: Any, calibrator: Calibrator) -> None:
    """Predict the cases of a loader one after the other, and add their logits and targets to a calibrator.

    Raises:
        DataError: a case that the calibrator refuses; the message names it.
    """
    from rich.progress import track

    from lightning_dice.data import DataError

    for batch in track(loader, description="calibrating"):
        image, mask = batch.image.to(device), batch.mask.to(device)
        logits = module.eval_logits(image, tuple(mask.shape[mask.ndim - image.ndim + 2 :]))
        for case, one, target in zip(batch.case, logits, mask, strict=True):
            try:
                calibrator.add(one, target)
            except ValueError as error:
                raise DataError(f"{case}: {error}") from error


def find_calibration(
    calibrator: Calibrator, classes: list[str], *, thresholds: bool
) -> tuple[PostProcessing, BeforeAndAfter]:
    """Return the best temperature and, if asked for and possible, thresholds, with the scores before and after."""
    from lightning_dice.inference import PostProcessing

    temperature = calibrator.temperature()
    best = calibrator.thresholds(temperature) if thresholds and calibrator.has_thresholds else None
    scores = {}
    for when, scale, limits in (("before", 1.0, None), ("after", temperature, best)):
        score = calibrator.scores(scale, limits)
        scores[when] = {
            "dice": score.mean_dice,
            **{f"dice/{name}": value for name, value in zip(classes, score.dice, strict=True)},
            "nll": score.nll,
            "ece": calibration_error(calibrator, scale),
        }
    return PostProcessing(temperature=temperature, thresholds=best), scores


def calibration_error(calibrator: Calibrator, temperature: float) -> float:
    """Return the expected calibration error of the drawn pixels; with sigmoid, the mean over the classes."""
    from lightning_dice.scoring.calibration import reliability

    total = None
    for logits, target in calibrator.samples():
        part = reliability(logits, target, activation=calibrator.activation, ignore_index=-1, temperature=temperature)
        total = part if total is None else total.merge(part)
    errors = [] if total is None else [error for error in total.calibration_error() if not math.isnan(error)]
    return sum(errors) / len(errors) if errors else math.nan


def describe_checkpoint(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return plain values by which a calibration's checkpoint is recognized."""
    from lightning_dice.inference.postprocessing import sha256

    return {
        "file": str(path.absolute()),
        "sha256": sha256(path),
        "epoch": content.get("epoch"),
        "global_step": content.get("global_step"),
    }


def without_nan(scores: BeforeAndAfter) -> dict[str, dict[str, float | None]]:
    """Return scores with `None` for NaN, which JSON does not have.

    >>> without_nan({"before": {"dice": math.nan}})
    {'before': {'dice': None}}
    """
    return {
        when: {name: None if math.isnan(value) else value for name, value in columns.items()}
        for when, columns in scores.items()
    }


def score_table(scores: BeforeAndAfter, calibration: PostProcessing, classes: list[str]) -> Table:
    """Return a table of the scores, thresholds and the temperature, for a terminal."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "before", "after", "threshold"):
        table.add_column(column, justify="left" if not column else "right")
    thresholds = dict(zip((f"dice/{name}" for name in classes), calibration.thresholds or (), strict=False))
    for name, before in scores["before"].items():
        threshold = f"{thresholds[name]:.3f}" if name in thresholds else ""
        if not (math.isnan(before) and not threshold):
            table.add_row(name, f"{before:.4f}", f"{scores['after'][name]:.4f}", threshold)
    table.add_row("temperature", "1", f"{calibration.scale:.4g}", "")
    return table


if __name__ == "__main__":
    main()
