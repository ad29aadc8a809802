"""Settings that would fail after an epoch, or after the data check, are refused before any data are read."""

from __future__ import annotations

import sys
from functools import partial

import lightning as L
import pytest
import torch
from helpers import LEAN, SMALL, refused, rows, run_command
from torch import nn
from torchmetrics import MeanMetric

from lightning_dice import DiceScore, SegmentationModule
from lightning_dice.cli import monitors
from lightning_dice.cli.optimizer_check import check_optimizer
from lightning_dice.schedules import plateau_frequency

# Data that do not exist: a message about anything else comes before they are read.
NOWHERE = ["model=custom", "data=folder", "data.root=/nowhere/at/all", "data.classes=[cell]", "device=cpu"]
PLATEAU = ["scheduler=plateau"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.monitor=val/dise"],
            "callbacks.early_stopping.monitor=val/dise is not a logged metric: did you mean val/dice",
        ),
        (["callbacks.checkpoint.monitor=val/cell"], "callbacks.checkpoint.monitor=val/cell is not a logged metric"),
        (["callbacks.checkpoint.monitor=val/dice/cel"], "did you mean val/dice/cell"),
        (["callbacks.checkpoint.monitor=val_loss"], "did you mean val/loss"),
        (["callbacks.checkpoint.monitor=val/loss/dice"], "monitor=val/loss/dice is not a logged metric"),
        ([*PLATEAU, "module.monitor=dise"], "module.monitor=dise is not a logged metric: did you mean dice"),
        (["callbacks=median_pruner", "callbacks.median_pruner.monitor=iou"], "callbacks.median_pruner.monitor=iou is"),
        (["++callbacks.history.monitor=val/dcie"], "callbacks.history.monitor=val/dcie is not a logged metric"),
        ([*PLATEAU, "+trainer.limit_val_batches=0"], "set trainer.limit_val_batches above 0"),
        ([*PLATEAU, "module.interval=step"], "set module.interval=epoch, got step"),
        (
            [*PLATEAU, "trainer.check_val_every_n_epoch=null"],
            "set trainer.check_val_every_n_epoch to a number of epochs",
        ),
    ],
)
def test_a_metric_to_watch_that_will_not_be_there(tmp_path, arguments, message):
    told = refused("fit", *NOWHERE, *arguments, cwd=tmp_path)
    assert message in told
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["callbacks.checkpoint.monitor=val/loss"],
            "callbacks.checkpoint.mode=max, but the best val/loss is the smallest: give callbacks.checkpoint.mode=min",
        ),
        (["callbacks.checkpoint.mode=min"], "but the best val/dice is the largest: give callbacks.checkpoint.mode=max"),
        (
            [
                "callbacks=early_stopping",
                "callbacks.early_stopping.monitor=val/dice/cell",
                "callbacks.early_stopping.mode=min",
            ],
            "give callbacks.early_stopping.mode=max with callbacks.early_stopping.monitor=val/dice/cell",
        ),
        ([*PLATEAU, "module.monitor=train/loss"], "give scheduler.mode=min with module.monitor=train/loss"),
        (
            [
                "+metrics.metrics.far={_target_: torchmetrics.segmentation.HausdorffDistance, num_classes: 2}",
                "callbacks.checkpoint.monitor=val/far",
            ],
            "the best val/far is the smallest",
        ),
    ],
)
def test_a_mode_that_takes_the_worst_for_the_best(tmp_path, arguments, message):
    assert message in refused("fit", *NOWHERE, *arguments, cwd=tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["callbacks=[early_stopping]", "+trainer.limit_val_batches=0"],
        ["callbacks=[early_stopping]", "data.cases={train:16,val:0,test:4}"],
        ["scheduler=plateau", "data.cases={train:16,val:0,test:4}"],
        ["callbacks=[median_pruner]", "data.cases={train:16,val:0,test:4}"],
    ],
)
def test_watching_a_validation_needs_one(tmp_path, arguments):
    told = refused("fit", *SMALL, *arguments, cwd=tmp_path)
    assert "follows val/dice, which needs a validation, and " in told
    assert "=train/loss" in told


def test_names_that_are_logged_are_accepted():
    module = SegmentationModule(nn.Conv2d(3, 2, 1), metrics={"dice": DiceScore(average="none"), "f": MeanMetric()})
    module.class_names = ["a", "b"]
    known = [
        "loss",
        "dice",
        "f",
        "train/loss",
        "train/loss_step",
        "val/loss",
        "val/dice/b",
        "train/grad_norm",
        "loss/smooth",
    ]
    for name in (*known, "val/f_anything", "train/f/anything", "train/loss/auxiliary"):
        assert monitors._is_logged(name, module), name
    for name in ("val/dice/c", "val/loss/dice", "val/g", "test/dice", "a", ""):
        assert not monitors._is_logged(name, module), name


OWN = """
from lightning_dice import SegmentationModule

class Own(SegmentationModule):
    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("val/own", float(self.current_epoch))
"""


def test_what_a_subclass_logs_itself_is_accepted(tmp_path, monkeypatch):
    (tmp_path / "owned.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = [*SMALL, *LEAN, "module._target_=owned.Own", "trainer.max_epochs=2"]
    run_command("fit", *own, "callbacks.checkpoint.monitor=val/own", "folder=run", cwd=tmp_path)
    assert torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)["epoch"] == 1
    # A name that it does not log is known when the first epoch ends.
    told = refused("fit", *own, "callbacks.checkpoint.monitor=val/ow", "folder=other", cwd=tmp_path)
    assert "callbacks.checkpoint.monitor=val/ow is not a logged metric: did you mean val/own" in told


def test_a_plateau_counts_validations_not_epochs(tmp_path):
    """The metric between two validations is an old one, which must not count as one more without improvement."""
    patience = ["scheduler=plateau", "scheduler.patience=1", "+scheduler.threshold=10", "optimizer.lr=0.01"]
    often = ["trainer.max_epochs=9", "trainer.check_val_every_n_epoch=2", "folder=run"]
    run_command("fit", *SMALL, *LEAN, *patience, *often, cwd=tmp_path)
    table = rows(tmp_path / "run/metrics.csv")
    # The first of epochs 1, 3, 5, 7 is the best; the third one is the second that is no better.
    assert [float(row["lr"]) for row in table] == [0.01] * 6 + [0.005] * 2 + [0.005]
    assert [row["val/dice"] != "" for row in table] == [False, True] * 4 + [False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimizer.lr=fast"], "error: optimizer.lr must be a number, got fast"),
        (["optimizer.lr=-1"], "error: optimizer.lr=-1 is refused by AdamW: Invalid learning rate: -1"),
        (["optimizer.lr=nan"], "optimizer.lr=nan is refused by AdamW"),
        (["optimizer.weight_decay=-1"], "optimizer.weight_decay=-1 is refused by AdamW: Invalid weight_decay"),
        (["optimizer.weight_decay=much"], "optimizer.weight_decay must be a number, got much"),
        (["+optimizer.betas=[0.9]"], "optimizer.betas=[0.9] is refused by AdamW"),
        (["+optimizer.betas=[0.9,x]"], "optimizer.betas=[0.9, 'x'] is refused by AdamW"),
        (["+optimizer.speed=3"], "optimizer.speed=3 is refused by AdamW"),
        (["optimizer=sgd", "optimizer.momentum=-0.5"], "optimizer.momentum=-0.5 is refused by SGD"),
        (["optimizer=sgd", "optimizer.momentum=high"], "optimizer.momentum must be a number, got high"),
        (["optimizer=adam", "+optimizer.eps=-1"], "optimizer.eps=-1 is refused by Adam"),
        (["scheduler.T_max=long"], "scheduler.T_max must be a number, got long"),
        (["scheduler.T_max=0"], "scheduler.T_max=0 is refused by CosineAnnealingLR"),
        (["scheduler.eta_min=low"], "scheduler.eta_min must be a number, got low"),
        (["scheduler=plateau", "scheduler.factor=2"], "scheduler.factor=2 is refused by ReduceLROnPlateau"),
        (["scheduler=plateau", "scheduler.mode=best"], "scheduler.mode=best is refused by ReduceLROnPlateau"),
        (["scheduler=plateau", "scheduler.patience=few"], "scheduler.patience must be a number, got few"),
        (["scheduler=poly", "scheduler.power=x"], "scheduler.power must be a number, got x"),
        (["scheduler=constant", "scheduler.factor=-1"], "scheduler.factor=-1 is refused by ConstantLR"),
        (["scheduler=warmup_cosine", "scheduler.epochs=0"], "epochs must be an integer >= 1, got 0"),
        (["scheduler=warmup_poly", "scheduler.start_factor=2"], "scheduler.start_factor=2 is refused by warmup"),
        (["scheduler=warmup_cosine", "scheduler.scheduler.eta_min=x"], "scheduler.scheduler.eta_min must be a number"),
    ],
)
def test_numbers_of_optimizer_and_schedule(tmp_path, arguments, message):
    told = refused("fit", *NOWHERE, *arguments, cwd=tmp_path)
    assert message in told
    assert "nowhere" not in told
    assert not list((tmp_path / "runs").glob("*"))


def test_any_optimizer_that_trains_is_accepted():
    trainer = L.Trainer(accelerator="cpu", logger=False, max_epochs=3, enable_checkpointing=False)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    for make in (partial(torch.optim.LBFGS, lr=0.1), partial(torch.optim.SparseAdam, lr=0.1), partial(NoProbe, lr=0.1)):
        check_optimizer(SegmentationModule(net, optimizer=make), trainer)
    state = torch.get_rng_state()
    one_cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=3)
    module = SegmentationModule(net, optimizer=partial(torch.optim.Adam, lr=0.2), scheduler=one_cycle)
    check_optimizer(module, trainer)
    assert torch.equal(state, torch.get_rng_state())


class NoProbe(torch.optim.SGD):
    """Steps only with the parameters it was made for, as one that keeps them by name."""

    def step(self, closure=None):
        assert self.param_groups[0]["params"][0].shape == (2, 1, 1, 1)


def test_only_a_plateau_of_a_validation_is_restricted():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    plateau, constant = (
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        torch.optim.lr_scheduler.ConstantLR(optimizer),
    )
    trainer = L.Trainer(accelerator="cpu", logger=False, check_val_every_n_epoch=3, enable_checkpointing=False)
    assert plateau_frequency(plateau, "epoch", "val/dice", trainer) == 3
    assert plateau_frequency(plateau, "epoch", "train/loss", trainer) == 1
    assert plateau_frequency(plateau, "step", "loss", trainer) == 1
    assert plateau_frequency(constant, "step", "val/dice", trainer) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import not_there\n", "No module named 'not_there', which it imports"),
        ("import monai.no_such_part\n", "monai"),
        ("class Net(\n", "SyntaxError: '(' was never closed (broken_net.py, line 1)"),
        ("raise RuntimeError('no such file: weights.pt')\n", "RuntimeError: no such file: weights.pt"),
        ("x = 1\n", "broken_net has no Net"),
        (None, "No module named 'broken_net'; a file of your own must be in the folder where you start the command"),
    ],
)
def test_a_network_that_cannot_be_imported(tmp_path, monkeypatch, text, message):
    monkeypatch.delitem(sys.modules, "broken_net", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    if text is not None:
        (tmp_path / "broken_net.py").write_text(text)
    told = refused("fit", *NOWHERE, "model._target_=broken_net.Net", cwd=tmp_path)
    assert "module: broken_net.Net cannot be imported: " in told
    assert message in told
    assert "HYDRA_FULL_ERROR" not in told


FULL = """
import resource
import lightning as L

class Full(L.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
"""


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    (tmp_path / "filling.py").write_text(FULL)
    monkeypatch.syspath_prepend(str(tmp_path))
    small = [*SMALL, "callbacks=[progress_bar,history,checkpoint,interrupt,exact_resume]", "logger=none", "test=false"]
    run_command("fit", *small, "trainer.max_epochs=4", "folder=whole", cwd=tmp_path)
    patience = "trainer.plugins=[{_target_: lightning_dice.checkpoints.SafeCheckpointIO, patience: 0}]"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        full = ["+callbacks.filling={_target_: filling.Full}", patience, "trainer.max_epochs=4", "folder=run"]
        message = refused("fit", *small, *full, cwd=tmp_path, status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = (line for line in message.splitlines() if line.startswith("error:"))
    assert "could not be written: File too large. What was saved before is intact" in line
    assert f"python -m lightning_dice.fit resume={tmp_path / 'run'}" in line
    assert len(message.strip().splitlines()) <= 3
    # As if nothing had happened.
    run_command("fit", "resume=run", "callbacks.filling=null", cwd=tmp_path)
    saved = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "run")]
    for name, value in saved[0]["state_dict"].items():
        assert torch.equal(value, saved[1]["state_dict"][name]), name
    epochs = [[row["epoch"] for row in rows(tmp_path / name / "metrics.csv")] for name in ("whole", "run")]
    assert epochs == [["0", "1", "2", "3"]] * 2


@pytest.mark.parametrize("classes", [[], ["data.activation=softmax", "data.classes=[a,b]"]], ids=["sigmoid", "softmax"])
def test_logits_that_are_nan_have_no_score(tmp_path, classes):
    run_command("fit", *SMALL, *classes, *LEAN[:1], "test=false", "trainer.max_epochs=1", "folder=run", cwd=tmp_path)
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    saved = torch.load(path, weights_only=True)
    for name, value in saved["state_dict"].items():
        if name.startswith("net."):
            value.fill_(torch.nan)
    torch.save(saved, path)
    for options in ([], ["+callbacks.case_table.calibration_bins=0"]):
        told = refused("evaluate", "run=run", *options, f"output=scores{len(options)}", cwd=tmp_path)
        assert (
            "case test-0000: the network's logits are NaN: its weights are, or the precision is too low for it" in told
        )
    # The check of the data that a training sees is the first to notice.
    told = refused("evaluate", "run=run", "split=val", "output=val", cwd=tmp_path)
    assert "weights that are not finite" in told
