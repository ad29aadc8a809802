"""Settings of the Trainer that people type while they try things: each works from `fit` to the summary, and resumes."""

from __future__ import annotations

import inspect
import re

import lightning as L
import pytest
import torch
from helpers import LEAN, SMALL, refused, rows, run_command
from omegaconf import OmegaConf

from lightning_dice.cli import config as cli_config
from lightning_dice.cli.command import hydra_escape

FOUR = [*SMALL, "data.batch_size=4"]  # batches in an epoch
LAST = ["callbacks=[progress_bar,history,checkpoint,interrupt,exact_resume]", "logger=none", "test=false"]


def steps(folder) -> list[str]:
    return [row["step"] for row in rows(folder / "metrics.csv")]


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_plus_is_neither_needed_nor_refused(tmp_path, plus):
    limits = [f"{plus}trainer.limit_train_batches=1", f"{plus}trainer.detect_anomaly=true"]
    run_command("fit", *FOUR, *LEAN, *limits, "trainer.max_epochs=2", "folder=run", cwd=tmp_path)
    assert steps(tmp_path / "run") == ["1", "2"]
    # So it is for the run that is resumed, whose config may be of an older release.
    config = tmp_path / "run" / "config_unresolved.yaml"
    config.write_text("".join(line for line in config.read_text().splitlines(True) if "max_steps" not in line))
    again = ["resume=run", "trainer.max_epochs=9", f"{plus}trainer.max_steps=4"]
    run_command("fit", *again, cwd=tmp_path)
    assert steps(tmp_path / "run") == ["1", "2", "3", "4"]


def test_only_settings_of_the_file_are_forced():
    given = ["+trainer.max_steps=1,2", "+trainer.new=false", "++trainer.profiler=simple", "+new=1", "trainer.new=2"]
    assert hydra_escape(given) == ["++trainer.max_steps=1,2", *given[1:]]


def test_every_argument_of_the_trainer_is_a_setting():
    """But for what the commands give it themselves, and what needs another program."""
    settings = {key.removeprefix("trainer.") for key in cli_config._trainer_settings()} - {"_target_"}
    device = OmegaConf.load(cli_config.CONF_DIR / "device" / "auto.yaml")
    own = {"self", "callbacks", "logger", "barebones", "model_registry", "enable_autolog_hparams"}
    assert settings | set(device) == set(inspect.signature(L.Trainer.__init__).parameters) - own


MORE = {
    "benchmark": "true",
    "sync_batchnorm": "true",
    "inference_mode": "false",
    "use_distributed_sampler": "false",
    "reload_dataloaders_every_n_epochs": "1",
    "limit_predict_batches": "1",
    "enable_progress_bar": "false",
    "enable_checkpointing": "false",
    "enable_model_summary": "true",
}


@pytest.mark.parametrize("plus", ["", pytest.param("+", marks=pytest.mark.slow)])
def test_arguments_of_the_trainer_that_no_file_has(tmp_path, plus):
    assert {f"trainer.{name}" for name in MORE} == cli_config._MORE_OF_TRAINER
    given = [f"{plus}trainer.{name}={value}" for name, value in MORE.items()]
    out = run_command("fit", *FOUR, *LEAN[:-1], *given, "trainer.max_epochs=1", "folder=run", cwd=tmp_path).out
    assert "epoch 0/0" not in out
    assert "no checkpoint was saved: scoring the weights as they are" in out
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert steps(tmp_path / "run") == ["4"]


def test_a_time_as_a_map(tmp_path):
    limits = ["trainer.max_time={minutes: 9}", "trainer.val_check_interval={minutes: 9}", "trainer.max_epochs=1"]
    run_command("fit", *FOUR, *LEAN, *limits, "folder=run", cwd=tmp_path)
    assert [row.get("val/dice") for row in rows(tmp_path / "run/metrics.csv")] == [None]


def test_fast_dev_run(tmp_path):
    out = run_command("fit", *FOUR, "trainer.fast_dev_run=true", "folder=run", cwd=tmp_path).out
    assert "scoring the weights as they are" in out
    assert steps(tmp_path / "run") == ["1"]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert len(rows(tmp_path / "run" / "cases.csv")) == 4
    # One that was only tried starts again; one that has a checkpoint is not tried.
    more = ["resume=run", "trainer.max_epochs=1", "trainer.fast_dev_run=false"]
    assert "training starts from the beginning" in run_command("fit", *more, cwd=tmp_path).out
    assert steps(tmp_path / "run") == ["4"]
    assert "trainer.fast_dev_run was False and cannot become True" in refused(
        "fit", "resume=run", "trainer.fast_dev_run=true", "trainer.max_epochs=2", cwd=tmp_path
    )


def test_limits(tmp_path):
    limits = [f"trainer.limit_{split}_batches={number}" for split, number in (("train", 0.5), ("val", 1), ("test", 2))]
    out = run_command(
        "fit", *FOUR, "+data.datamodule.eval_batch_size=1", *limits, "trainer.max_epochs=2", "folder=run", cwd=tmp_path
    ).out
    assert steps(tmp_path / "run") == ["2", "4"]
    assert "only 2 of 4 batches of the test split are scored" in out
    assert len({row["case"] for row in rows(tmp_path / "run" / "cases.csv")}) == 2
    out = run_command("evaluate", "run=run", "trainer.limit_test_batches=null", "output=all", cwd=tmp_path).out
    assert "are scored" not in out
    assert len({row["case"] for row in rows(tmp_path / "all" / "cases.csv")}) == 4


SPY = """
import lightning as L

class Spy(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        print("batch", *batch.case)
"""


def test_overfit_batches(tmp_path, monkeypatch):
    (tmp_path / "spying.py").write_text(SPY)
    monkeypatch.syspath_prepend(str(tmp_path))
    spy = ["trainer.overfit_batches=2", "trainer.max_epochs=3", "+callbacks.spy={_target_: spying.Spy}"]
    result = run_command("fit", *FOUR, *LEAN, *spy, "folder=run", cwd=tmp_path)
    seen = [line for line in result.out.splitlines() if line.startswith("batch train-")]
    assert len(seen) == 6
    assert seen == seen[:2] * 3, "the same two batches in each epoch"
    assert "shuffling" not in result.err


def test_max_steps_ends_within_an_epoch_and_resumes(tmp_path):
    whole = ["trainer.max_steps=7", "trainer.max_epochs=9"]
    run_command("fit", *FOUR, *LAST, *whole, "folder=whole", cwd=tmp_path)
    run_command("fit", *FOUR, *LAST, "trainer.max_steps=5", "trainer.max_epochs=9", "folder=run", cwd=tmp_path)
    assert steps(tmp_path / "run") == ["4", "5"]
    assert "trainer.max_steps=3, but 5 steps are trained already" in refused(
        "fit", "resume=run", "trainer.max_steps=3", cwd=tmp_path
    )
    assert "all 5 steps are trained already" in run_command("fit", "resume=run", cwd=tmp_path).out
    run_command("fit", "resume=run", "trainer.max_steps=7", cwd=tmp_path)
    assert steps(tmp_path / "run")[-1] == "7"
    saved = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "run")]
    assert saved[1]["global_step"] == 7


def test_max_time_says_that_it_ended_the_training(tmp_path):
    time = ["trainer.max_time=00:00:00:01", "trainer.max_epochs=100000", "folder=run"]
    out = run_command("fit", *FOUR, *LAST, *time, cwd=tmp_path).out
    assert re.search(r"the time of the training is over after \d+ s \(max_time\)", out)
    out = run_command("fit", "resume=run", cwd=tmp_path).out
    assert "the time of the training is over" in out
    before = len(steps(tmp_path / "run"))
    run_command("fit", "resume=run", "trainer.max_time=null", f"trainer.max_epochs={before + 1}", cwd=tmp_path)
    assert len(steps(tmp_path / "run")) == before + 1


def test_early_stopping_says_why(tmp_path):
    stop = ["callbacks.early_stopping.patience=1", "+callbacks.early_stopping.min_delta=5", "trainer.max_epochs=9"]
    stop += ["callbacks=[progress_bar,history,early_stopping]", "logger=none", "test=false"]
    out = run_command("fit", *FOUR, *stop, "folder=run", cwd=tmp_path).out
    reason = "stopped after epoch 1, step 8: val/dice did not improve in the last validation. Best score: 0."
    (line,) = (line for line in out.splitlines() if line.startswith("stopped"))
    assert line.startswith(reason)
    # Patience that is not used up says nothing.
    out = run_command(
        "fit", "resume=run", "callbacks.early_stopping.patience=9", "trainer.max_epochs=3", cwd=tmp_path
    ).out
    assert "stopped" not in out


@pytest.mark.filterwarnings("ignore:The PyTorch Profiler default schedule")
@pytest.mark.parametrize("profiler", ["simple", "advanced", pytest.param("pytorch", marks=pytest.mark.slow)])
def test_a_profile_is_printed(tmp_path, profiler):
    out = run_command(
        "fit", *FOUR, *LEAN[:-1], f"trainer.profiler={profiler}", "trainer.max_epochs=1", "folder=run", cwd=tmp_path
    ).out
    assert "FIT Profiler Report" in out
    assert "TEST Profiler Report" in out
    assert "run_training_batch" in out


def test_validations_within_epochs(tmp_path):
    often = ["trainer.val_check_interval=0.5", "trainer.max_epochs=2"]
    run_command("fit", *FOUR, *LAST, *often, "folder=run", cwd=tmp_path)
    assert {row["epoch"]: row["val/dice"] != "" for row in rows(tmp_path / "run/metrics.csv")} == {"0": True, "1": True}
    across = ["trainer.val_check_interval=6", "trainer.check_val_every_n_epoch=null", "trainer.max_epochs=3"]
    run_command("fit", *FOUR, *LAST, *across, "folder=across", cwd=tmp_path)
    scored = [row["step"] for row in rows(tmp_path / "across" / "metrics.csv") if row["val/dice"]]
    assert int(scored[0]) >= 6
    assert scored[-1] == "12"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "max_epochs=0",
            "trainer.max_epochs=0 trains nothing: it must be a whole number >= 1, or -1 for no limit; to score",
        ),
        ("max_epochs=-2", "trainer.max_epochs must be a whole number >= 1, or -1 for no limit, got -2"),
        ("max_epochs=2.5", "trainer.max_epochs must be a whole number >= 1, or -1 for no limit, got 2.5"),
        ("max_steps=0", "trainer.max_steps=0 trains nothing"),
        ("accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be a whole number >= 1, got 0"),
        ("check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch must be a whole number >= 1, got 0"),
        ("log_every_n_steps=-3", "trainer.log_every_n_steps must be a whole number >= 0, got -3"),
        ("limit_train_batches=0", "trainer.limit_train_batches=0 trains nothing"),
        (
            "limit_train_batches=0.1",
            "trainer.limit_train_batches=0.1 of 4 batches is less than one: give at least 0.25, or",
        ),
        (
            "limit_val_batches=x",
            "trainer.limit_val_batches must be a whole number of batches, or a fraction of them from",
        ),
        (
            "limit_test_batches=1.5",
            "trainer.limit_test_batches must be a whole number of batches, or a fraction of them",
        ),
        (
            "overfit_batches=-1",
            "trainer.overfit_batches must be a whole number of batches, or a fraction of them from 0.0",
        ),
        (
            "val_check_interval=5",
            "trainer.val_check_interval=5 is more than the 4 batches of an epoch: give fewer, or let",
        ),
        (
            "limit_val_batches=0.1",
            "trainer.limit_val_batches=0.1 of 1 batch is less than one: give at least 1, or a whole number",
        ),
        ("limit_test_batches=0.5", "trainer.limit_test_batches=0.5 of 1 batch is less than one"),
        ("overfit_batches=0.2", "trainer.overfit_batches=0.2 of 4 batches is less than one: give at least 0.25"),
        ("gradient_clip_val=-1", "trainer.gradient_clip_val must be a number >= 0, or null for no clipping, got -1"),
        ("gradient_clip_val=x", "trainer.gradient_clip_val must be a number >= 0, or null for no clipping, got x"),
        ("val_check_interval=0", "trainer.val_check_interval must be more than 0"),
        ("+seed=x", "seed must be a whole number from 0 to 4294967295, got x"),
        ("+module.threshold=half", "module: threshold must be a probability in (0, 1), got 'half'"),
    ],
)
def test_what_a_training_cannot_be_made_of(tmp_path, setting, message):
    given = setting.removeprefix("+") if setting.startswith("+") else f"trainer.{setting}"
    assert f"error: {message}" in refused("fit", *FOUR, *LEAN, given, cwd=tmp_path)
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("callback", "setting"),
    [("early_stopping", "patience"), ("frequent_checkpoint", "every_n_train_steps"), ("gradient_guard", "max_skips")],
)
def test_a_word_where_a_callback_takes_a_number(tmp_path, callback, setting):
    given = [f"callbacks={callback}", f"callbacks.{callback}.{setting}=ten"]
    message = f"error: callbacks.{callback}.{setting} must be a number, got ten"
    assert message in refused("fit", *FOUR, *given, cwd=tmp_path)
    assert not list(tmp_path.glob("runs/*"))


def test_an_evaluation_needs_a_batch(tmp_path, trained_run):
    message = "trainer.limit_test_batches=0.1 of "
    assert message in refused("evaluate", f"run={trained_run}", "trainer.limit_test_batches=0.1", cwd=tmp_path)


def test_a_logger_that_cannot_begin(tmp_path, monkeypatch):
    def fails(self):
        raise RuntimeError("No API key configured. Use `log in`.\nTwo lines.")

    monkeypatch.setattr("lightning.pytorch.loggers.CSVLogger.experiment", property(fails))
    message = "error: the logger CSVLogger cannot begin: No API key configured. Use `log in`.; use another, such as"
    lean = [part for part in LEAN if not part.startswith("logger")]
    assert message in refused("fit", *FOUR, *lean, cwd=tmp_path)
    assert not list(tmp_path.glob("runs/*"))


def test_the_number_of_batches_is_limited_as_the_trainer_does(tmp_path):
    few = ["trainer.max_epochs=1", "trainer.limit_train_batches=0.5", "trainer.accumulate_grad_batches=3"]
    out = run_command("fit", *FOUR, *LEAN, *few, "folder=run", cwd=tmp_path).out
    assert "batch   4 images x 2 accumulated, the 2 of an epoch = 8 a step" in out
    assert steps(tmp_path / "run") == ["1"]


def test_a_schedule_that_ends_too_early_leaves_no_folder(tmp_path):
    """It is found when the training begins, after loggers have made folders."""
    lean = [part for part in LEAN if not part.startswith("logger")]
    given = ["scheduler=poly", "scheduler.total_iters=1", "trainer.max_epochs=2"]
    assert "error: scheduler: PolynomialLR with total_iters=1 ends after 1 of 2 epochs" in refused(
        "fit", *FOUR, *lean, *given, cwd=tmp_path
    )
    assert not list(tmp_path.glob("runs/*"))
