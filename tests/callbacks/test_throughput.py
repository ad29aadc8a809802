import math
import sys
import types

import lightning.pytorch as pl
import pytest
import torch
from helpers import SMALL, rows, run_command, run_forked, run_ranks
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from lightning_dice.callbacks import History, throughput
from lightning_dice.callbacks.throughput import EpochThroughput, batch_size, peak_memory


class Clock:
    """A clock that the test sets."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(throughput, "time", types.SimpleNamespace(perf_counter=lambda: self.now))


class Takes(Callback):
    """Two seconds for each training batch, a hundred for each validation batch."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_start(self, *_):
        self.clock.now += 2

    def on_validation_batch_start(self, *_):
        self.clock.now += 100


@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_images_by_the_seconds_of_training_alone(tmp_path, trainer, net, loader, monkeypatch, interval):
    clock, logger = Clock(monkeypatch), CSVLogger(tmp_path)
    fit = trainer(Takes(clock), History(tmp_path), max_epochs=2, val_check_interval=interval, logger=logger)
    # Batches of 2, 2, 2 and 1.
    fit.fit(net(), loader(7), loader())
    epochs = [row for row in rows(tmp_path / "metrics.csv") if row["seconds"]]
    assert [float(row["images_per_second"]) for row in epochs] == [7 / 8, 7 / 8]
    logged = [row for row in rows(tmp_path / "lightning_logs/version_0/metrics.csv") if row.get("images_per_second")]
    assert [float(row["images_per_second"]) for row in logged] == [7 / 8, 7 / 8]
    assert all(float(row["memory_gb"]) > 0 for row in logged)


def memory_around_a_tensor():
    """Return the peak before a tensor of 0.4 GB, with it, and after it."""
    device = torch.device("cpu")
    before = peak_memory(device)
    block = torch.ones(100_000_000)
    during = peak_memory(device)
    del block
    return before, during, peak_memory(device)


@pytest.mark.process
def test_memory_is_the_peak_of_the_process():
    before, during, after = run_forked(memory_around_a_tensor)
    # Besides what the process did in between.
    assert during - before == pytest.approx(0.4, abs=0.02)
    assert after == pytest.approx(during, abs=0.02)


def test_memory_where_it_is_not_known(tmp_path, trainer, net, loader, monkeypatch):
    monkeypatch.setattr(throughput, "_STATUS", tmp_path / "nowhere")
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_memory(torch.device("cpu")) is None
    trainer(History(tmp_path), max_epochs=1).fit(net(), loader(), loader())
    assert "memory_gb" not in rows(tmp_path / "metrics.csv")[0]


def test_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2_500_000_000 if device.index == 1 else 0)
    assert peak_memory(torch.device("cuda", 1)) == 2.5


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ((torch.zeros(3, 1, 4, 4), torch.zeros(3, 1, 4, 4)), 3),
        ({"image": torch.zeros(2, 1, 4, 4), "mask": torch.zeros(2, 4, 4), "case": ["a", "b"]}, 2),
        (torch.zeros(5, 1, 4, 4), 5),
        (7, 0),
    ],
)
def test_batch_size(batch, size):
    assert batch_size(batch) == size


def test_no_rate_without_images():
    one = EpochThroughput()
    one.start()
    assert one.images_per_second() is None


class Used(Callback):
    """The throughput and memory of a rank that measured numbers of its own."""

    def on_train_start(self, trainer, pl_module):
        one = EpochThroughput()
        one.images, one.seconds = 10 + trainer.global_rank, 2.0 + trainer.global_rank
        throughput.peak_memory = lambda device: 4.0 - trainer.global_rank
        self.used = one.reduce(trainer)


def measure_as_a_rank():
    used = Used()
    pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False, max_steps=1,
        enable_progress_bar=False, callbacks=[used],
    ).fit(BoringModel())  # fmt: skip
    return used.used


@pytest.mark.process
def test_of_all_processes():
    assert run_ranks(measure_as_a_rank).results == [{"images_per_second": 21 / 3.0, "memory_gb": 4.0}] * 2


def test_lightnings_monitors_as_a_command(tmp_path):
    """With one batch in four that is smaller."""
    few = [*SMALL, "test=false", "logger=csv", "trainer.max_epochs=2", "trainer.log_every_n_steps=1"]
    few += ["data.batch_size=5", "callbacks=[throughput,device_stats]", "~callbacks.overlays", "folder=run"]
    run_command("fit", *few, cwd=tmp_path)
    table = rows(tmp_path / "run/logs/csv/version_0/metrics.csv")
    known = {name for row in table for name, value in row.items() if value}
    assert {"train/samples", "train/device/samples_per_sec", "train/batches"} & known, known
    assert any("cpu_percent" in name for name in known), known
    assert [math.isfinite(float(row["images_per_second"])) for row in rows(tmp_path / "run/metrics.csv")] == [True] * 2
