"""Build a run's data, module and Trainer from its config, then train, score and summarize it."""

from __future__ import annotations

import logging
import math
import os
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lightning_dice import report
from lightning_dice.callbacks import MedianPruner, SaveOnInterrupt, exit_with_signal_status
from lightning_dice.cli import run_folder
from lightning_dice.cli.config import instantiate, refuse_words
from lightning_dice.cli.config_consistency import ConfigConsistency
from lightning_dice.cli.errors import UserError, as_user_errors, report_disk_errors
from lightning_dice.cli.monitors import check_modes, check_monitors, check_validation, explain_missing_monitor
from lightning_dice.cli.optimizer_check import check_optimizer
from lightning_dice.cli.trainer_settings import check_shares_of_batches, check_trainer_settings
from lightning_dice.cli.training_report import printed_profile, stop_reason
from lightning_dice.data import SegmentationData, Split
from lightning_dice.io import read_csv
from lightning_dice.kernels import check_forced
from lightning_dice.library_internals.lightning import saved_loop_state
from lightning_dice.module import SegmentationModule
from lightning_dice.report.run_summary import summary_table
from lightning_dice.trials import Status, record_outcome

# Warnings of Lightning and torch that nobody can or should act on.
_NOISE = (
    ".*does not have many workers.*",  # The datamodule chooses their number by the cores.
    ".*is smaller than the logging interval.*",  # The epoch's means are logged anyway.
    ".*ended before the epoch ended.*",  # Printed in our own words when resuming.
    ".*Checkpoint directory .* exists and is not empty.*",  # As it should be when resuming.
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # Lightning's own use of torch.
    ".*Grad strides do not match bucket view strides.*",  # One more copy of some 1x1 weights in channels_last.
    ".*callbacks used to create the checkpoint need to be provided.*",  # A resumed run may remove some.
    ".*You requested to overfit but enabled.*",  # As the comment of trainer.overfit_batches says.
    ".*The checkpoint was not created with WeightAveraging.*",  # It may also begin when a run is resumed.
    ".*The dirpath has changed from.*",  # As it should when an evaluation has its own folder.
    ".*You are using a CUDA device.*Tensor Cores.*",
)


class Experiment:
    """The objects of a run; each is created on first access.

    Args:
        config: resolved, as saved in a run's folder.
        folder: where the files go.
        trained: whether a checkpoint will be loaded, so that no pretrained weights need be downloaded.
        template: the config with its interpolations, if it is to be written to the folder when training starts.

    Raises:
        UserError: on access to an object: it refuses a setting, or the data are wrong.
    """

    def __init__(
        self, config: DictConfig, folder: Path, *, trained: bool = False, template: DictConfig | None = None
    ) -> None:
        self.config, self.folder, self.trained, self.template = config, folder, trained, template
        self.run = folder  # An evaluation writes into another folder.
        self.scores: dict[str, dict[str, float]] = {}
        self.summary: list[report.ScoreSummary] = []
        silence_libraries()
        seed = config.seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise UserError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed}")
        L.seed_everything(seed, workers=True, verbose=False)

    @cached_property
    def data(self) -> SegmentationData:
        """The datamodule, after it has checked its data."""
        with as_user_errors():
            data: SegmentationData = instantiate(self.config.data.datamodule, "data")
            rank_zero_only(data.prepare_data)()  # Lightning calls it again in every process, which is free.
        return data

    @cached_property
    def module(self) -> SegmentationModule:
        """Network, loss, metrics, optimizer and scheduler."""
        with as_user_errors():
            check_forced()
        return run_folder.build_module(self.config, trained=self.trained)

    @cached_property
    def trainer(self) -> L.Trainer:
        """The Trainer with its callbacks and loggers."""
        callbacks: list[Callback] = instantiate_each(self.config.callbacks, "callbacks")
        accept = None if self.template is None else partial(run_folder.accept_config, self.folder, self.template)
        callbacks.append(ConfigConsistency(_plain(self.config), accept))
        # Last, as it ends the training after a step that the others must have seen.
        callbacks.sort(key=lambda callback: isinstance(callback, SaveOnInterrupt))
        # Lightning refuses callbacks that these turn off.
        for name, kind in (("enable_progress_bar", LightningProgressBar), ("enable_checkpointing", Checkpoint)):
            if self.config.trainer.get(name) is False:
                callbacks = [callback for callback in callbacks if not isinstance(callback, kind)]
        loggers = instantiate_each(self.config.logger, "logger")
        accelerator = self.config.trainer.get("accelerator")
        if accelerator in ("gpu", "cuda") and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
            raise UserError(f"trainer.accelerator={accelerator}, but torch finds no GPU: use device=cpu")
        check_trainer_settings(self.config.trainer)
        trainer: L.Trainer = instantiate(
            self.config.trainer,
            "trainer",
            callbacks=callbacks,
            logger=loggers or False,
            enable_model_summary=bool(self.config.trainer.get("enable_model_summary", False)),
            _convert_="all",  # Times are dicts for Lightning, not nodes of a config.
            plugins=[*instantiate(list(self.config.trainer.get("plugins") or []), "trainer.plugins"), *cluster()],
        )
        return trainer

    @contextmanager
    def training(self) -> Iterator[None]:
        """Turn errors in training into user errors, and an interrupt into the signal's exit status."""
        explained = explain_missing_monitor(self.config, self.trainer)
        disk = report_disk_errors(self.folder, f"python -m lightning_dice.fit resume={shlex.quote(str(self.folder))}")
        with exit_with_signal_status(), as_user_errors(), disk, explained, printed_profile():
            yield
        if reason := stop_reason(self.trainer):
            print_line(reason)

    def check_settings(self) -> None:
        """Check the settings that would fail only when training starts, or after an epoch; needs no data.

        Raises:
            UserError: names the setting.
        """
        check_optimizer(self.module, self.trainer)
        check_monitors(self.config, self.module, self.trainer)
        check_modes(self.config, self.module)

    def check_validation(self) -> None:
        """Check that there is a validation, if a callback or the schedule needs one.

        Raises:
            UserError: names the setting.
        """
        check_validation(self.config, self.trainer, has_split=self.data.source.split("val") is not None)

    def print_start(self, checkpoint: Path | None) -> None:
        """Check that the weights of a checkpoint fit, and print what is about to be trained."""
        if checkpoint is not None:
            saved = run_folder.check_weights(self.module, checkpoint, self.config)
            print_line(f"resuming from epoch {saved['epoch']}, step {saved['global_step']}, of {checkpoint}")
            ended, wanted = saved_loop_state(saved, "epoch_progress")["current"]["processed"], self.trainer.max_epochs
            if self.trainer.max_steps == saved["global_step"]:
                print_line(
                    f"all {self.trainer.max_steps} steps are trained already, and are scored again: train more with "
                    f"trainer.max_steps={2 * self.trainer.max_steps}"
                )
            if wanted is not None and 0 <= wanted <= ended:
                print_line(
                    f"all {ended} epochs are trained already, and are scored again: train more with "
                    f"trainer.max_epochs={2 * ended}"
                )
        print_line(str(self.data.report))
        parameters = sum(parameter.numel() for parameter in self.module.parameters())
        print_line(f"net     {type(self.module.net).__name__}, {parameters:,} parameters")
        print_line(f"loss    {self.module.loss}")
        print_line(f"batch   {self.batch_text()}")
        print_line(f"folder  {self.folder}")

    def batches_of_epoch(self) -> int:
        """Return the number of training batches of each process in an epoch, without limits."""
        cases = self.data.source.split("train")
        return 0 if cases is None else len(cases) // (self.data.batch_size * self.trainer.world_size)

    def check_limits(self) -> None:
        """Check that no limit of the Trainer leaves out all batches of a split.

        Raises:
            UserError: names the setting.
        """
        counts = {"train": self.batches_of_epoch()}
        for split in ("val", "test"):
            cases = self.data.source.split(split)
            counts[split] = 0 if cases is None else -(-len(cases) // self.trainer.world_size)
            counts[split] = -(-counts[split] // self.data.eval_batch_size)
        check_shares_of_batches(self.config.trainer, counts)

    def open_loggers(self) -> None:
        """Let the loggers begin, which some cannot without a login or a server.

        Raises:
            UserError: names the logger.
        """
        for logger in self.trainer.loggers:
            try:
                _ = getattr(logger, "experiment", None)
            except Exception as error:  # Of any type, by the logger's library.
                reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                name = type(logger).__name__
                raise UserError(f"the logger {name} cannot begin: {reason}; use another, such as logger=csv") from error

    def batch_text(self) -> str:
        """Return a line with the images of a step, over all processes, and the seed."""
        images, processes = self.data.batch_size, self.trainer.world_size
        accumulated = self.trainer.accumulate_grad_batches
        factors = [f"{images} images"]
        if processes > 1:
            factors.append(f"{processes} processes")
        if accumulated > 1:
            limit, batches = self.trainer.limit_train_batches, self.batches_of_epoch()
            batches = max(1, int(batches * limit) if isinstance(limit, float) else min(batches, limit or 1))
            whole = f", the {batches} of an epoch" if batches < accumulated else ""
            accumulated = min(accumulated, batches)
            factors.append(f"{accumulated} accumulated{whole}")
        total = images * processes * accumulated
        return " x ".join(factors) + (f" = {total}" if len(factors) > 1 else "") + f" a step, seed {self.config.seed}"

    def evaluate(self, split: Split, checkpoint: str | Path | None) -> dict[str, float]:
        """Score a checkpoint on `"val"` or `"test"`, write the report, and return the logged metrics.

        Args:
            split: of the data.
            checkpoint: its path; `None`: the weights as they are.
        """
        self.check_limits()
        run = self.trainer.test if split == "test" else self.trainer.validate
        with exit_with_signal_status(), as_user_errors(), printed_profile():
            path = None if checkpoint is None else str(checkpoint)
            logged = run(self.module, self.data, ckpt_path=path, weights_only=True, verbose=False)
        scored, loader = self.trainer.num_val_batches, self.trainer.val_dataloaders
        if split == "test":
            scored, loader = self.trainer.num_test_batches, self.trainer.test_dataloaders
        if isinstance(loader, Sized) and sum(scored) < len(loader):
            print_line(f"only {sum(scored)} of {len(loader)} batches of the {split} split are scored, by your limits")
        self.scores[split] = dict(logged[0]) if logged else {}
        if self.trainer.is_global_zero:
            facts = score_provenance(self.config, self.run.name, {"run": str(self.run), "checkpoint": str(checkpoint)})
            self.summary = report.write_report(self.folder, split, facts)
        return self.scores[split]

    def score_best(self) -> None:
        """Score the best checkpoint on the test split, or on the validation split if there is none."""
        checkpoint = self.scored_checkpoint
        if self.data.source.split(self.last_split) is None:
            return
        if checkpoint is None:
            reason = "trainer.fast_dev_run saves no checkpoint" if self.fast_dev_run else "no checkpoint was saved"
            print_line(f"{reason}: scoring the weights as they are")
        elif checkpoint != self.best_checkpoint:
            none = self.checkpoint is not None and self.checkpoint.save_top_k == 0
            reason = "with callbacks.checkpoint.save_top_k=0" if none else "without a validation"
            print_line(f"there is no best checkpoint {reason}: scoring the last one")
        self.evaluate(self.last_split, checkpoint)

    @property
    def fast_dev_run(self) -> bool:
        """Whether the training only tries a few batches."""
        return bool(getattr(self.trainer, "fast_dev_run", False))

    @property
    def last_split(self) -> Split:
        """`"test"`, or `"val"` where there is no test split."""
        return "val" if self.data.source.split("test") is None else "test"

    @property
    def checkpoint(self) -> ModelCheckpoint | None:
        """The callback that saves the best checkpoint."""
        callbacks = [
            callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)
        ]
        return next((callback for callback in callbacks if callback.monitor is not None), None)

    @property
    def best_checkpoint(self) -> Path | None:
        """Path of the best checkpoint, if there is one."""
        path = "" if self.checkpoint is None else self.checkpoint.best_model_path
        return Path(path) if path else None

    @property
    def scored_checkpoint(self) -> Path | None:
        """Path of the best checkpoint, or of the last one where there is no best one."""
        last = self.folder / run_folder.CHECKPOINTS / "last.ckpt"
        return self.best_checkpoint or (last if last.is_file() else None)

    @property
    def best_score(self) -> float | None:
        """The best value of the checkpoint callback's monitor."""
        score = None if self.checkpoint is None else self.checkpoint.best_model_score
        return None if score is None or math.isnan(score) else float(score)

    @property
    def pruned(self) -> bool:
        """Whether the training was stopped early because other trials of the sweep are better."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return any(isinstance(callback, MedianPruner) and callback.pruned for callback in callbacks)

    def print_summary(self) -> None:
        """Print the scores, and where the files are."""
        if not self.trainer.is_global_zero:
            return
        from rich.console import Console

        epoch, step, val = self.scored_row()
        val = self.scores.get("val", val)
        files: dict[str, str | Path] = {
            "config": self.folder / run_folder.CONFIG,
            "best checkpoint": self.folder / run_folder.CHECKPOINTS / "best.ckpt",
            "last checkpoint": self.folder / run_folder.CHECKPOINTS / "last.ckpt",
            "metrics by epoch": self.folder / "metrics.csv",
            "scores by case": self.folder / "cases.csv",
            "learning curves": self.folder / "curves.png",
            "Dice by class": self.folder / "dice_per_class.png",
            "worst and best cases": self.folder / "overlays.png",
            "report": self.folder / report.REPORT,
        }
        # Wide enough for the folder, so that it can be copied.
        console = Console(width=max(Console().width, len(str(self.folder)) + 24))
        console.print(summary_table(self.folder, val, self.scores.get("test"), files, epoch, step))

    def record_outcome(self) -> None:
        """Record in the run's folder how the training ended, for the table of a sweep."""
        if self.trainer.is_global_zero:
            status: Status = "pruned" if self.pruned else "finished"
            watched = (
                {} if self.checkpoint is None else {"monitor": self.checkpoint.monitor, "mode": self.checkpoint.mode}
            )
            record_outcome(self.folder, status, value=self.best_score, epochs=self.trainer.current_epoch, **watched)

    def scored_row(self) -> tuple[int | None, int | None, dict[str, float]]:
        """Return the validation of the checkpoint that is scored.

        Returns:
            Epoch of the best checkpoint, if there is one; its step, if it is not that of an epoch's end; the metrics.
        """
        path = self.scored_checkpoint
        if path is None or not path.exists():
            return None, None, {}
        saved = run_folder.read_position(path)
        # By its position: the numbers of the table are rounded.
        rows = [row for row in read_csv(self.folder / "metrics.csv") if (int(row["epoch"]), int(row["step"])) == saved]
        val = {key: float(value) for row in rows for key, value in row.items() if key.startswith("val/") and value}
        if path != self.best_checkpoint:
            return None, None, val
        return saved[0], saved[1] if rows and "seconds" not in rows[-1] else None, val


def cluster() -> list[Any]:
    """Return Lightning's plugin for SLURM, if SLURM started the processes; `SaveOnInterrupt` does the requeueing."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return [SLURMEnvironment(auto_requeue=False)] if "SLURM_NTASKS" in os.environ and SLURMEnvironment.detect() else []


def score_provenance(config: DictConfig, name: str, made_of: Mapping[str, str]) -> report.ScoreProvenance:
    """Describe an evaluation for its report.

    Args:
        config: the run's, or only its data.
        name: the name of the run or folder that was scored.
        made_of: the paths of that run or folder, by name.
    """
    data = config.data
    source = str(data.datamodule.source.get("_target_", "")).rpartition(".")[2]
    known = {**made_of, "data": str(data.get("root") or source), "classes": ", ".join(map(str, data.classes))}
    if data.activation == "sigmoid":
        known["threshold"] = str(config.module.threshold)
    table = (config.get("callbacks") or {}).get("case_table") or {}
    settings: dict[str, Any] = {
        "tolerance": 2.0,
        "lesion_iou": 0.0,
    }  # if they are not set
    for key in settings:
        value = table.get(key, settings[key])
        settings[key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return report.ScoreProvenance(f"Evaluation of {name}", known, settings)


def instantiate_each(configs: Mapping[str, Any] | None, what: str) -> list[Any]:
    """Instantiate each config of a named group, except those that are `null`.

    Raises:
        UserError: a setting is refused.
    """
    for name, config in (configs or {}).items():
        if config:
            refuse_words(config, f"{what}.{name}")
    return [instantiate(config, f"{what}.{name}") for name, config in (configs or {}).items() if config]


def silence_libraries() -> None:
    """Silence log messages and warnings that appear in every run and need no action."""
    # alembic: MONAI imports MLflow if it is installed, and MLflow's database logs its plug-ins.
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)


@rank_zero_only
def print_line(text: str) -> None:
    """Print a line, once for all processes."""
    print(text, flush=True)


def _plain(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=True)
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}
