"""Signals end a training after a step, on all ranks, and it resumes exactly."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import rows, run_ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from training import differences, train

from lightning_dice.callbacks import History, SaveOnInterrupt, exit_with_signal_status


class Send(L.Callback):
    """Send this process a signal in a hook of a step."""

    def __init__(self, number, step, hook="on_train_batch_start", times=1):
        self.number, self.step, self.times = number, step, times
        setattr(self, hook, self._send)

    def _send(self, trainer, *_):
        if trainer.global_step == self.step and self.times:
            self.times -= 1
            os.kill(os.getpid(), self.number)


@pytest.fixture(autouse=True)
def _handlers():
    """As a shell's own job has them, and left as they were."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == handlers
    signal.signal(signal.SIGINT, before)


def stopped(folder, *callbacks, **settings):
    """Train until a signal; returns the checkpoint it left."""
    with pytest.raises(SystemExit) as caught, exit_with_signal_status():
        train(callbacks=(*callbacks, SaveOnInterrupt(folder)), **settings)
    return folder / "checkpoints" / "last.ckpt", caught.value.code


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)], ids=lambda n: str(n)
)
def test_after_the_step(tmp_path, number, status, capsys):
    whole = train()
    checkpoint, code = stopped(tmp_path, Send(number, 5))
    assert code == status
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 6
    name = {130: "Ctrl-C", 143: "SIGTERM", 138: "SIGUSR1"}[status]
    assert f"Stopped by {name} in epoch 1, step 6: saved" in capsys.readouterr().err
    assert not differences(whole, train(checkpoint=checkpoint))


@pytest.mark.parametrize("step", [0, 3, 4])
def test_at_the_first_and_last_batch_of_an_epoch(tmp_path, step):
    whole = train()
    checkpoint, _ = stopped(tmp_path, Send(signal.SIGTERM, step))
    assert not differences(whole, train(checkpoint=checkpoint))


def test_while_it_validates(tmp_path):
    whole = train()
    checkpoint, _ = stopped(tmp_path, Send(signal.SIGTERM, 4, "on_validation_start"))
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 5
    assert not differences(whole, train(checkpoint=checkpoint))


class SendAt(L.Callback):
    """Send this process a signal in the n-th call of any of the hooks, on one rank."""

    HOOKS = (
        *("on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_validation_start"),
        *("on_validation_batch_start", "on_validation_batch_end", "on_validation_end", "on_train_epoch_end"),
        *("on_save_checkpoint", "on_train_end"),
    )

    def __init__(self, call, rank=0):
        self.call, self.rank, self.calls = call, rank, []
        for hook in self.HOOKS:
            setattr(self, hook, lambda trainer, *_, hook=hook, **__: self._send(hook, trainer))

    def _send(self, hook, trainer):
        if len(self.calls) == self.call and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        self.calls.append(hook)


def recorders(folder):
    last = ModelCheckpoint(
        folder / "checkpoints", filename="last", enable_version_counter=False, save_on_train_epoch_end=True
    )
    return History(folder), last


def table(folder):
    measured = ("seconds", "images_per_second", "memory_gb")
    return [{key: value for key, value in row.items() if key not in measured} for row in rows(folder / "metrics.csv")]


def wait_for_ranks():
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def interrupted_at_every_point(folder, rank=0, **settings):
    """Return what differs from an uninterrupted training, after a signal at any point of it; by its point."""
    settings = {"epochs": 2, "enable_checkpointing": True} | settings
    listener = SendAt(-1)
    whole = train(callbacks=(listener, *recorders(folder / "whole")), **settings)
    found, last_step = {}, max(i for i, hook in enumerate(listener.calls) if hook == "on_train_batch_end")
    for point in range(len(listener.calls)):
        run = folder / str(point)
        with pytest.raises(SystemExit) as caught, exit_with_signal_status():
            train(callbacks=(SendAt(point, rank), *recorders(run), SaveOnInterrupt(run)), **settings)
        status = caught.value.code
        wait_for_ranks()
        resumed = train(checkpoint=run / "checkpoints/last.ckpt", callbacks=recorders(run), **settings)
        wait_for_ranks()
        ended = point > last_step
        problems = [] if status == 138 else [f"exit status {status}"]
        if ended == bool(resumed["events"]):
            problems.append(f"events {resumed['events']}")
        if not ended and settings.get("exact", True):
            problems += differences(whole, resumed)
        tables = [table(path) for path in (run, folder / "whole")]
        if settings.get("exact", True) and tables[0] != tables[1]:
            problems.append(f"rows {tables[0]}")
        if [list(row) for row in tables[0]] != [list(row) for row in tables[1]]:
            problems.append(f"rows of {[row['epoch'] for row in tables[0]]}")
        if problems:
            found[f"{point} {listener.calls[point]}"] = problems
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize("exact", [True, False])
def test_at_every_point_of_a_training(tmp_path, exact):
    """Without `ExactResume` too, a validation or an epoch's end is not lost."""
    assert interrupted_at_every_point(tmp_path, exact=exact) == {}


def one_of_two_ranks_interrupted(folder):
    return interrupted_at_every_point(folder, rank=1, devices=2, strategy="ddp")


@pytest.mark.slow
@pytest.mark.process
def test_on_one_of_two_ranks_at_every_point_of_a_training(tmp_path):
    assert run_ranks(one_of_two_ranks_interrupted, tmp_path, timeout=300).results == [{}, {}]


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_after_the_last_batch_of_an_epoch_it_is_validated_without_exact_resume_too(tmp_path):
    settings = {"epochs": 1, "exact": False, "enable_checkpointing": True}
    checkpoint, _ = stopped(tmp_path, Send(signal.SIGTERM, 3), *recorders(tmp_path), **settings)
    assert not (tmp_path / "metrics.csv").exists()
    resumed = train(checkpoint=checkpoint, callbacks=recorders(tmp_path), **settings)
    assert resumed["events"] == [("validation", 0, 4), ("epoch's end", 0)]
    assert [row["val/dice"] != "" for row in table(tmp_path)] == [True]


@pytest.mark.parametrize("saves", [True, False])
def test_after_the_last_step(tmp_path, saves, capsys):
    """The epoch ends as usual, but what follows the training does not happen."""
    callbacks = recorders(tmp_path) if saves else (History(tmp_path),)
    settings = {"epochs": 1, "enable_checkpointing": saves}
    checkpoint, code = stopped(tmp_path, Send(signal.SIGTERM, 4, "on_validation_start"), *callbacks, **settings)
    assert code == 143
    assert f"Stopped by SIGTERM after the last step. Resume with: python -m lightning_dice.fit resume={tmp_path}" in (
        capsys.readouterr().err
    )
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4
    assert len(rows(tmp_path / "metrics.csv")) == 1
    assert (tmp_path / "curves.png").exists()


def test_not_between_batches_whose_gradients_add_up(tmp_path):
    whole = train(accumulate_grad_batches=2)
    checkpoint, _ = stopped(tmp_path, Send(signal.SIGTERM, 2), accumulate_grad_batches=2)
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3
    assert not differences(whole, train(checkpoint=checkpoint, accumulate_grad_batches=2))


def test_a_second_ctrl_c_stops_at_once(tmp_path, capfd):
    checkpoint, code = stopped(tmp_path, Send(signal.SIGINT, 5, times=1), Send(signal.SIGINT, 5, times=1))
    assert code == 130
    # The step was not made.
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 5
    assert "Ctrl-C again stops now" in capfd.readouterr().err


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys):
    class Spoil(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            next(pl_module.parameters()).data.fill_(torch.nan)

    checkpoint, code = stopped(tmp_path, Send(signal.SIGTERM, 0), Spoil())
    assert code == 143
    assert not checkpoint.exists()
    assert "the weights are not finite" in capsys.readouterr().err


def test_after_the_training_signals_are_again_what_they_were(tmp_path):
    train(callbacks=(SaveOnInterrupt(tmp_path),), epochs=1)
    assert not (tmp_path / "checkpoints").exists()


def ignores(process: int, number: int) -> bool:
    """Return whether a process ignores a signal: a worker does not yet while it starts."""
    status = Path(f"/proc/{process}/status").read_text()
    return bool(int(status.partition("SigIgn:")[2].split()[0], 16) >> (number - 1) & 1)


def test_workers_leave_signals_to_the_training(tmp_path):
    """A cluster sends them to all processes of a job, a terminal to all in the foreground."""

    class ToWorkers(L.Callback):
        def __init__(self):
            self.workers = set()

        def on_train_batch_end(self, trainer, *_):
            for worker in multiprocessing.active_children():
                if worker.pid not in self.workers and ignores(worker.pid, signal.SIGINT):
                    self.workers.add(worker.pid)
                    # By another process: what comes from the training itself, a worker obeys.
                    for name in ("INT", "TERM", "USR1"):
                        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)

    whole = train(workers=2)
    callback = ToWorkers()
    assert not differences(whole, train(workers=2, callbacks=(callback,)))
    assert len(callback.workers) == 4, "two of training, two of validation"


def test_signals_are_lightnings_own_in_an_evaluation(tmp_path):
    """Only a fit is listened to."""
    callback = SaveOnInterrupt(tmp_path)
    assert callback._handlers == {}


def stop_one_rank(folder):
    """Train to the end, then until one rank gets a signal, then from there; returns the differences."""

    class SendToOne(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_rank == 1 and trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    settings = {"devices": 2, "strategy": "ddp", "epochs": 2}
    whole = train(**settings)
    with pytest.raises(SIGTERMException):
        train(callbacks=(SendToOne(), SaveOnInterrupt(folder)), **settings)
    torch.distributed.barrier()
    return differences(whole, train(checkpoint=folder / "checkpoints/last.ckpt", **settings))


@pytest.mark.process
def test_all_ranks_stop_when_one_is_told(tmp_path):
    ranks = run_ranks(stop_one_rank, tmp_path)
    assert ranks.results == [[], []]
    assert ranks.err.count("Stopped by SIGTERM in epoch 1, step 3: saved") == 1


def test_the_error_tells_its_status(tmp_path):
    with pytest.raises(SIGTERMException) as caught:
        train(callbacks=(Send(signal.SIGUSR1, 0), SaveOnInterrupt(tmp_path)))
    assert caught.value.code == 138
