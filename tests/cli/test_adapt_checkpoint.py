"""What a resumed session changes in a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_dice import SegmentationModule
from lightning_dice.cli.adapt_checkpoint import apply_optimizer_settings, update_checkpoint_paths


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
