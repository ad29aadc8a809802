"""An interrupted and resumed training equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers import SMALL, Forked, fork_command, rows, run_ranks
from training import cosine, differences, plateau, train

from lightning_dice.callbacks import ExactResume

SETTINGS = {
    "plain": {},
    "workers": {"workers": 2},
    "validation-within-epochs": {"val_check_interval": 0.5},
    "accumulation": {"accumulate_grad_batches": 2},
    "accumulation-with-a-rest": {"accumulate_grad_batches": 3},
    "validation-every-second-epoch": {"check_val_every_n_epoch": 2},
    "no-validation": {"limit_val_batches": 0},
    "validation-between-accumulated-batches": {"accumulate_grad_batches": 2, "val_check_interval": 1, "epochs": 2},
    "steps": {"max_steps": 10, "epochs": 4},
    "steps-alone": {"max_steps": 10, "epochs": -1},
    "a-logged-metric": {"metric": True, "epochs": 2},
    "wrapped-metrics": {"wrapped": True, "epochs": 2},
    "plateau": {"schedule": plateau},
    "averaged-weights": {"average": True, "epochs": 2},
    "all": {"workers": 2, "val_check_interval": 0.5, "accumulate_grad_batches": 2, "schedule": plateau},
}


QUICK = {"plain", "accumulation", "steps-alone", "a-logged-metric", "wrapped-metrics", "averaged-weights", "plateau"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_from_every_checkpoint(tmp_path, name):
    settings = {"schedule": cosine, **SETTINGS[name]}
    whole = train(tmp_path, **settings)
    assert len(whole["paths"]) >= 8
    # With workers, whose processes take most of the time, from every second one.
    for path in whole["paths"][:: 2 if settings.get("workers") else 1]:
        # Another seed, as if none had been given: the checkpoint knows the one that counts.
        resumed = train(checkpoint=path, **settings, seed=8)
        if not resumed["events"]:
            continue  # The training is finished: nothing is done, and no hook called.
        assert not differences(whole, resumed), path.name


def test_with_another_batch_size_no_case_is_seen_twice(tmp_path):
    whole = train(tmp_path, epochs=1)
    path = next(path for path in whole["paths"] if "batch-0-2" in path.name)
    with pytest.warns(UserWarning, match=r"interrupted with 4 images .*, and resumes with 2: this epoch is not exact$"):
        resumed = train(checkpoint=path, epochs=1, batch_size=2)
    seen = [[case for event in run["events"] if event[0] == "batch" for case in event[4:]] for run in (whole, resumed)]
    assert seen[0][8:] == seen[1]


@pytest.mark.parametrize(("batch_size", "batches"), [(2, 8), (6, 2), (12, 1)])
def test_an_epoch_that_resumes_with_another_batch_size_ends_as_any_other(tmp_path, batch_size, batches):
    """After 8 of 16 cases; it is validated once, and the next epoch is whole."""
    whole = train(tmp_path, epochs=2)
    path = next(path for path in whole["paths"] if "batch-0-2" in path.name)
    with pytest.warns(UserWarning, match="this epoch is not exact"):
        events = train(checkpoint=path, epochs=2, batch_size=batch_size)["events"]
    names = [event[:2] for event in events]
    assert names.count(("validation", 0)) == names.count(("validation", 1)) == 1
    assert names.index(("validation", 0)) < names.index(("epoch", 1))
    # At least one batch, or Lightning would not end the epoch.
    assert names.count(("batch", 0)) == max(1, 8 // batch_size)
    assert [event[2] for event in events if event[0] == "batch"][-batches:] == list(range(batches))


class TestSeed:
    """A new seed: the interrupted epoch keeps its order, the next ones have another."""

    @staticmethod
    def orders(run: dict[str, Any]) -> list[list[str]]:
        batches = [event for event in run["events"] if event[0] == "batch"]
        return [[case for event in batches if event[1] == epoch for case in event[4:]] for epoch in range(3)]

    def test_applies_from_the_next_epoch_on(self, tmp_path):
        class Reseed(L.Callback):
            def on_load_checkpoint(self, trainer, pl_module, checkpoint):
                trainer.datamodule.change_seed(8)

        (tmp_path / "again").mkdir()
        whole, other = train(tmp_path), train(seed=8)
        path = next(path for path in whole["paths"] if "batch-1-6" in path.name)
        resumed = train(tmp_path / "again", path, callbacks=(Reseed(),))
        assert self.orders(resumed)[1] == self.orders(whole)[1][8:]
        assert self.orders(resumed)[2] == self.orders(other)[2]
        # Resumed once more within that epoch, now without a change.
        path = next(path for path in resumed["paths"] if "batch-1-7" in path.name)
        assert self.orders(train(checkpoint=path))[1:] == [self.orders(whole)[1][12:], self.orders(other)[2]]


def test_the_same_without_the_callback_is_not_exact(tmp_path):
    """Else the test above would show nothing."""
    whole = train(tmp_path, exact=False)
    path = next(path for path in whole["paths"] if "batch-1" in path.name)
    assert differences(whole, train(checkpoint=path, exact=False))


@pytest.mark.parametrize("hook", ["train", "validation", "test", "predict"])
def test_random_numbers_follow_from_the_step_alone(hook):
    def drawn(rank=0, epoch=0, batch=0, before=0):
        callback = ExactResume()
        callback.seed = 7
        trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank, global_step=3)
        torch.manual_seed(before)
        getattr(callback, f"on_{hook}_batch_start")(trainer, None, None, batch)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert drawn() == drawn(before=1)
    for other in (drawn(rank=1), drawn(epoch=1), drawn(batch=1)):
        assert all(one != two for one, two in zip(drawn(), other, strict=True))


def resumed_from_every_checkpoint(folder: Path) -> list[str]:
    """On each rank; the checkpoints."""
    settings = {"devices": 2, "strategy": "ddp", "epochs": 2}
    whole = train(folder, **settings)
    paths = sorted(folder.glob("*.ckpt"))
    for path in paths:
        found = differences(whole, train(checkpoint=path, **settings, seed=8))
        assert not found, (path.name, found)
    return [path.name for path in paths]


@pytest.mark.process
def test_on_two_ranks(tmp_path):
    names, others = run_ranks(resumed_from_every_checkpoint, tmp_path).results
    # Two batches, a validation and an epoch's end in each of two epochs.
    assert names == others
    assert len(names) == 8


RUN = [
    *SMALL,
    *("data.cases={train:24,val:6,test:4}", "data.batch_size=4", "trainer.max_epochs=10", "logger=none"),
    "callbacks=[progress_bar,history,checkpoint,case_table,interrupt,frequent_checkpoint,ema]",
    "callbacks.frequent_checkpoint.every_n_train_steps=2",
]


def values(path: Path) -> list[dict[str, str]]:
    """A table without what differs from one day to the other."""
    measured = ("seconds", "images_per_second", "memory_gb")
    return [{key: value for key, value in row.items() if key not in measured} for row in rows(path)]


@pytest.mark.slow
@pytest.mark.process
def test_killed_at_random_moments(tmp_path):
    fork_command("fit", *RUN, "folder=whole", cwd=tmp_path)
    draw, folder, kills = random.Random(0), tmp_path / "killed", 0
    process = Forked("fit", *RUN, "folder=killed", cwd=tmp_path)
    while kills < 6:
        end = time.monotonic() + draw.uniform(0.1, 1.5)
        # Of the start nothing can be learned before there is something to go on with.
        while time.monotonic() < end or not (folder / "config.yaml").exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        # Finished too early, it is still killed again, while it scores.
        kills += process.wait(status=None).status == -signal.SIGKILL
        process = Forked("fit", "resume=killed", cwd=tmp_path)
    process.wait()
    paths = [tmp_path / name / "checkpoints" / "last.ckpt" for name in ("whole", "killed")]
    one, two = (torch.load(path, weights_only=True) for path in paths)
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key
    for index, state in one["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, two["optimizer_states"][0]["state"][index][key])
    for name in ("metrics.csv", "cases.csv"):
        assert values(tmp_path / "whole" / name) == values(folder / name), name
    assert not list((folder / "checkpoints").glob(".*"))
