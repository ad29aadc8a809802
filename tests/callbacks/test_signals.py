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
from helpers import run_ranks
from lightning.pytorch.utilities.exceptions import SIGTERMException
from training import differences, train

from lightning_dice.callbacks import SaveOnInterrupt, exit_with_signal_status


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
