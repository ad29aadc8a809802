"""What a resumed session changes in a checkpoint."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_dice import SegmentationModule
from lightning_dice.cli.adapt_checkpoint import adapt_checkpoint, apply_optimizer_settings, update_checkpoint_paths


def test_callbacks_follow_a_folder_that_was_moved():
    state = {
        "dirpath": "/old/run/checkpoints",
        "best_model_path": "/old/run/checkpoints/best.ckpt",
        "best_k_models": {"/old/run/checkpoints/best.ckpt": 0.5},
        "monitor": "val/dice",
        "other": "/old/run-2/best.ckpt",
        "best_model_score": 0.5,
    }
    checkpoint = {"callbacks": {"ModelCheckpoint": state}}
    update_checkpoint_paths(checkpoint, "/old/run", "/new")
    assert checkpoint["callbacks"]["ModelCheckpoint"] == {
        "dirpath": "/new/checkpoints",
        "best_model_path": "/new/checkpoints/best.ckpt",
        "best_k_models": {"/new/checkpoints/best.ckpt": 0.5},
        "monitor": "val/dice",
        "other": "/old/run-2/best.ckpt",
        "best_model_score": 0.5,
    }


def rate(**settings):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], **settings)


def exponential(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


@pytest.mark.parametrize(
    "form",
    [
        lambda new: new,
        lambda new: [new],
        lambda new: ([new], []),
        lambda new: ([new], [exponential(new)]),
        lambda new: {"optimizer": new},
        lambda new: {"optimizer": new, "lr_scheduler": exponential(new)},
        lambda new: {"optimizer": new, "lr_scheduler": {"scheduler": exponential(new), "interval": "epoch"}},
    ],
)
def test_settings_follow_in_every_form_of_configure_optimizers(form):
    class Mine(SegmentationModule):
        def configure_optimizers(self):
            return form(rate(lr=0.8, momentum=0.9))

    old = rate(lr=0.1)
    scheduled = exponential(old)
    checkpoint = {
        "optimizer_states": [old.state_dict()],
        "lr_schedulers": [{**scheduled.state_dict(), "last_epoch": 2}],
    }
    apply_optimizer_settings(checkpoint, Mine(nn.Conv2d(1, 1, 1)))
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    has_schedule = "lr_scheduler" in str(form(rate(lr=1))) or "ExponentialLR" in str(form(rate(lr=1)))
    assert group["momentum"] == 0.9
    assert group["lr"] == pytest.approx(0.8 / 4 if has_schedule else 0.8)
    assert group["params"] == [0]


def test_growth_of_a_loss_scale_is_a_setting_and_the_scale_is_not():
    old, new = (torch.amp.GradScaler("cpu", init_scale=8.0 * every, growth_interval=every) for every in (50, 7))
    settings = {"folder": "x", "trainer": {"plugins": {"growth_interval": 50}}, "module": {}}
    module = SegmentationModule(nn.Conv2d(1, 1, 1), optimizer=lambda parameters: rate(lr=1))
    checkpoint = {"config": settings, "SimpleNamespace": old.state_dict(), "lr_schedulers": []}
    checkpoint["optimizer_states"] = [rate(lr=1).state_dict()]
    trainer = SimpleNamespace(
        lightning_module=module, callbacks=[], precision_plugin=SimpleNamespace(scaler=new), datamodule=None
    )
    adapt_checkpoint(checkpoint, trainer, {**settings, "trainer": {"plugins": {"growth_interval": 7}}})
    assert checkpoint["SimpleNamespace"]["growth_interval"] == 7
    assert checkpoint["SimpleNamespace"]["scale"] == 400


def test_another_schedule_interval_counts_what_is_trained():
    class Mine(SegmentationModule):
        def configure_optimizers(self):
            optimizer = rate(lr=0.8)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": exponential(optimizer), "interval": interval}}

    old = rate(lr=0.1)
    loops = {
        "epoch_progress": {"current": {"ready": 3, "processed": 2}},
        "epoch_loop.batch_progress": {"current": {"ready": 1, "processed": 1}, "is_last_batch": False},
    }
    for interval, last, steps in (("step", False, 5), ("epoch", False, 2), ("epoch", True, 3)):
        loops["epoch_loop.batch_progress"]["is_last_batch"] = last
        checkpoint = {
            "optimizer_states": [old.state_dict()],
            "lr_schedulers": [{**exponential(rate(lr=0.1)).state_dict(), "last_epoch": 77}],
            "global_step": 5,
            "loops": {"fit_loop": loops},
        }
        apply_optimizer_settings(checkpoint, Mine(nn.Conv2d(1, 1, 1)), {"module.interval": ("other", interval)})
        assert checkpoint["lr_schedulers"][0]["last_epoch"] == steps
        assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.8 / 2**steps)


def test_other_groups_of_parameters_start_with_an_empty_state():
    class Mine(SegmentationModule):
        def configure_optimizers(self):
            return torch.optim.SGD([{"params": [one]} for one in self.parameters()], lr=0.5, momentum=0.9)

    module = Mine(nn.Conv2d(1, 1, 1))
    checkpoint = {"optimizer_states": [torch.optim.SGD(module.parameters(), lr=0.1).state_dict()], "lr_schedulers": []}
    (note,) = apply_optimizer_settings(checkpoint, module, {"optimizer.groups": (1, 2)})
    assert note == "SGD starts with an empty state: its groups of parameters have changed"
    assert [group["params"] for group in checkpoint["optimizer_states"][0]["param_groups"]] == [[0], [1]]


def test_metrics_with_other_settings_forget_what_they_have_counted():
    settings = {"folder": "x", "metrics": {"pool": "image"}, "module": {}}
    rank = {"logged": {"val/dice": 1, "train/loss": 2}, "metrics": {"train_metrics.dice": {}}, "means": []}
    rank["remembered"] = {"val_metrics.extremes": {"max_val": 1}}
    checkpoint = {"config": settings, "ranks": [rank, None]}
    trainer = SimpleNamespace(lightning_module=None, callbacks=[], precision_plugin=None, datamodule=None, world_size=2)
    adapt_checkpoint(checkpoint, trainer, settings)
    assert rank["metrics"]
    adapt_checkpoint(checkpoint, trainer, {**settings, "metrics": {"pool": "dataset"}})
    assert rank == {"logged": {"train/loss": 2}, "metrics": {}, "means": []}


@pytest.mark.parametrize(("changed", "expected"), [(False, 1e-4), (True, 0.5)])
def test_a_rate_that_a_metric_has_lowered_stays(changed, expected):
    class Mine(SegmentationModule):
        def configure_optimizers(self):
            optimizer = rate(lr=0.5, weight_decay=0.2)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)}

    old = rate(lr=1e-4)
    state = torch.optim.lr_scheduler.ReduceLROnPlateau(old).state_dict()
    checkpoint = {"optimizer_states": [old.state_dict()], "lr_schedulers": [state]}
    changes = {"optimizer.lr" if changed else "optimizer.weight_decay": (0, 1)}
    apply_optimizer_settings(checkpoint, Mine(nn.Conv2d(1, 1, 1)), changes)
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    assert (group["lr"], group["weight_decay"]) == (expected, 0.2)
    assert checkpoint["lr_schedulers"] == [{**state, "_last_lr": [expected]}]
