"""Temperature and thresholds of a run: `python -m lightning_dice.calibrate run=<folder>`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from lightning_dice.cli.command import run_command
from lightning_dice.cli.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_dice.inference import PostProcessing
    from lightning_dice.inference.calibrator import Calibrator
    from lightning_dice.module import SegmentationModule

SETTINGS = ("run", "checkpoint", "output", "thresholds", "pixels", "seed", "overwrite", "device")
# Bytes of logits, 4 of each, and targets, 2, that are drawn from all cases together.
MEMORY = 2**29


def main() -> None:
    """Entry point of `python -m lightning_dice.calibrate` and `dice-calibrate`."""

    def act(config: DictConfig, overrides: list[str]) -> None:
        calibrate(config, overrides)

    run_command("calibrate", act, SETTINGS)


def calibrate(config: DictConfig, overrides: list[str]) -> PostProcessing:
    """Find the temperature and the thresholds of a checkpoint on the run's validation cases, and write them.

    Cases are whole, and their logits as prediction has them, by windows and flips if the run does so. The Dice score
    and its policy are those of the module's first `DiceScore`.

    Args:
        config: as of `conf/calibrate.yaml`.
        overrides: of the run's config, in Hydra's syntax: `data.root=elsewhere`, `inference.size=[512,512]`.

    Returns:
        What was found.

    Raises:
        UserError: the run, its checkpoint, the data or a setting is not as it should be; before any work.
    """
    import torch

    from lightning_dice.cli import run_folder
    from lightning_dice.cli.errors import as_user_errors
    from lightning_dice.cli.experiment import Experiment, print_line
    from lightning_dice.inference import CALIBRATION
    from lightning_dice.inference.postprocessing import sha256

    run = run_folder.reopen(config.run, overrides)
    path = Path(config.output or Path(config.run) / CALIBRATION).expanduser().absolute()
    if path.exists() and not config.overwrite:
        raise UserError(f"{path} exists, and nothing is overwritten: overwrite=true, or choose output=<file>")
    if not path.parent.is_dir():
        raise UserError(f"output must be a file in a folder that exists, got {path}")
    run.trainer.update(accelerator=config.trainer.accelerator, devices=1, num_nodes=1, strategy="auto")
    run.update(logger={}, callbacks={})
    checkpoint = run_folder.find_checkpoint(config.run, config.checkpoint)
    session = Experiment(run, Path(run.folder), trained=True)
    module, data = session.module, session.data
    given = module.inference.postprocessing
    if given.temperature is not None or given.thresholds is not None:
        raise UserError(
            "inference.postprocessing of the run has a temperature or thresholds, which go before a calibration: calibrate "
            "with inference.postprocessing.temperature=null inference.postprocessing.thresholds=null"
        )
    cases = data.source.split("val")
    if cases is None:
        raise UserError("the data have no val split to calibrate on; that of the training or the test must not be used")
    saved = run_folder.check_weights(module, checkpoint)
    module.load_state_dict(saved["state_dict"])
    device = session.trainer.strategy.root_device
    module.eval().to(device)
    print_line(f"{checkpoint} on val, on {device}")
    with as_user_errors(), torch.inference_mode():
        data.setup("validate")
        calibrator = _calibrator(module, config, run, cases=len(cases))
        collected = collect(module, data.val_dataloader(), device, calibrator)

    classes = [str(name) for name in run.data.classes]
    found, scores = decide(collected, classes, thresholds=config.thresholds)
    about = {
        "checkpoint": {
            "file": str(checkpoint.absolute()),
            "sha256": sha256(checkpoint),
            "epoch": saved.get("epoch"),
            "global_step": saved.get("global_step"),
        },
        "split": "val",
        "cases": collected.cases,
        "pixels": collected.drawn,
        "seed": config.seed,
        "inference": str(module.inference),
        "scores": {
            when: {name: None if math.isnan(value) else value for name, value in columns.items()}
            for when, columns in scores.items()
        },
    }
    found.save(path, about)
    from rich.console import Console

    Console().print(table(scores, found, classes))
    if not collected.has_thresholds:
        print_line(
            "thresholds are not sought for a softmax of more than two classes: each would move all others' pixels"
        )
    print_line(f"{collected.cases} cases, {collected.drawn} pixels for the temperature: {path}")
    return found


def collect(module: SegmentationModule, loader: Any, device: Any, calibrator: Calibrator) -> Calibrator:
    """Give a calibrator the logits and the target of each case, one after the other."""
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
    return calibrator


def decide(
    calibrator: Calibrator, classes: list[str], *, thresholds: bool
) -> tuple[PostProcessing, dict[str, dict[str, float]]]:
    """The best decision, and the scores `"before"` and `"after"` it: `dice`, `dice/<class>`, `nll`, `ece`."""
    from lightning_dice.inference import PostProcessing

    temperature = calibrator.temperature()
    found = calibrator.thresholds(temperature) if thresholds and calibrator.has_thresholds else None
    scores = {}
    for when, scale, limits in (("before", 1.0, None), ("after", temperature, found)):
        score = calibrator.scores(scale, limits)
        scores[when] = {
            "dice": score.mean_dice,
            **{f"dice/{name}": value for name, value in zip(classes, score.dice, strict=True)},
            "nll": score.nll,
            "ece": calibration_error(calibrator, scale),
        }
    return PostProcessing(temperature=temperature, thresholds=found), scores


def calibration_error(calibrator: Calibrator, temperature: float) -> float:
    """The expected calibration error on the pixels that were drawn, with sigmoid the mean over the classes."""
    from lightning_dice.scoring.calibration import reliability

    total = None
    for logits, target in calibrator.samples():
        part = reliability(logits, target, activation=calibrator.activation, ignore_index=-1, temperature=temperature)
        total = part if total is None else total.merge(part)
    errors = [] if total is None else [error for error in total.calibration_error() if not math.isnan(error)]
    return sum(errors) / len(errors) if errors else math.nan


def table(scores: dict[str, dict[str, float]], found: PostProcessing, classes: list[str]) -> Table:
    """Scores before and after, for a terminal."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD)
    for column in ("", "before", "after", "threshold"):
        shown.add_column(column, justify="left" if not column else "right")
    limits = dict(zip((f"dice/{name}" for name in classes), found.thresholds or (), strict=False))
    for name, before in scores["before"].items():
        limit = f"{limits[name]:.3f}" if name in limits else ""
        if not (math.isnan(before) and not limit):
            shown.add_row(name, f"{before:.4f}", f"{scores['after'][name]:.4f}", limit)
    shown.add_row("temperature", "1", f"{found.scale:.4g}", "")
    return shown


def _calibrator(module: SegmentationModule, config: DictConfig, run: DictConfig, *, cases: int) -> Calibrator:
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
    try:
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
    except ValueError as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    main()
