import math
import os
import signal
import sys
import time

import lightning.pytorch as pl
import pytest
import torch
from helpers import fork
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from squares import Cases, Net, load

from lightning_dice.callbacks import History, SaveOnInterrupt, exit_with_signal_status


class Slow(Net):
    """Leaves a file when it has come to the middle of its second epoch."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def training_step(self, batch, batch_idx):
        if self.global_step == 5:
            (self.folder / "ready").touch()
        time.sleep(0.2 if self.global_step >= 5 else 0)
        return super().training_step(batch, batch_idx)


def train_slowly(folder):
    # A shell's background job, as these tests may be, ignores SIGINT, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    callbacks = [History(folder), SaveOnInterrupt(folder), ModelCheckpoint(folder / "checkpoints", save_last=True)]
    trainer = pl.Trainer(accelerator="cpu", max_epochs=50, logger=False, enable_progress_bar=False, callbacks=callbacks)
    with exit_with_signal_status():
        trainer.fit(Slow(folder), load(Cases(8)), load(Cases(8)))
    print("went on after fit")


@pytest.mark.process
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(tmp_path, trainer, net, loader, number, status):
    process = fork(train_slowly, tmp_path, folder=tmp_path / "process")
    try:
        for _ in range(1200):
            if (tmp_path / "ready").exists() or process.exitcode is not None:
                break
            time.sleep(0.05)
        os.kill(process.pid, number)
        process.join(30)
    finally:
        process.kill()
    out, err = ((tmp_path / "process" / name).read_text() for name in ("out", "err"))
    assert process.exitcode == status, err
    assert "went on" not in out
    assert f"Resume with: python -m lightning_dice.fit resume={tmp_path}" in err
    last = tmp_path / "checkpoints/last.ckpt"
    state = torch.load(last, weights_only=True)
    # In the middle of the second epoch of four steps: its first batch or two are done.
    assert state["epoch"] == 1
    assert 5 <= state["global_step"] <= 7
    assert (tmp_path / "curves.png").exists()
    assert sorted(path.name for path in last.parent.iterdir())[-1] == "last.ckpt"

    model = net()
    checkpoint = ModelCheckpoint(last.parent, save_last=True)
    session = trainer(History(tmp_path), SaveOnInterrupt(tmp_path), checkpoint, max_epochs=3)
    session.fit(model, loader(8), loader(8), ckpt_path=last)
    assert session.global_step == 12
    # The new last checkpoint takes the place of the one that was resumed.
    assert torch.load(last, weights_only=True)["global_step"] == 12
    assert not (last.parent / "last-v1.ckpt").exists()


def fail(model, step, error):
    """Make the training step of a model raise at a step."""
    inner = model.training_step

    def training_step(batch, batch_idx):
        if model.global_step == step:
            raise error
        return inner(batch, batch_idx)

    model.training_step = training_step


def fit(trainer, model, loader, folder, **kwargs):
    session = trainer(SaveOnInterrupt(folder), max_epochs=3)
    session.fit(model, loader(8), loader(8), **kwargs)
    return session


def test_what_is_replayed_after_an_interruption_in_the_middle_of_an_epoch(tmp_path, trainer, net, loader, capsys):
    model = net()
    fail(model, 6, RuntimeError("out of luck"))
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(trainer, model, loader, tmp_path)
    assert "Stopped by RuntimeError in epoch 1, step 6: saved" in capsys.readouterr().err
    resumed = net()
    session = fit(trainer, resumed, loader, tmp_path, ckpt_path=tmp_path / "checkpoints/last.ckpt")
    assert session.global_step == 12
    # Lightning counts on from the third batch, but the loader starts again with the epoch's first cases.
    assert resumed.seen[:2] == [(1, 2, "case00", "case01"), (1, 3, "case02", "case03")]
    assert resumed.seen[2][:2] == (2, 0)


def test_a_training_that_fails_before_it_starts_leaves_the_checkpoint(tmp_path, trainer, net, loader):
    last = tmp_path / "checkpoints/last.ckpt"
    session = trainer(max_epochs=1)
    session.fit(net(), loader(8), loader(8))
    session.save_checkpoint(last)
    before = last.read_bytes()

    class Refuses(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            raise ValueError("not with this setting")

    session = trainer(Refuses(), SaveOnInterrupt(tmp_path), max_epochs=3)
    with pytest.raises(ValueError, match="not with this setting"):
        session.fit(net(), loader(8), loader(8), ckpt_path=last)
    assert session.global_step > 0
    assert last.read_bytes() == before


def test_a_run_that_was_stopped_in_its_first_epoch_keeps_one_last_checkpoint(
    tmp_path, trainer, net, loader, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    def callbacks():
        return SaveOnInterrupt("run"), ModelCheckpoint("run/checkpoints", save_last=True)

    model = net()
    fail(model, 2, RuntimeError("out of luck"))
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(*callbacks(), max_epochs=2).fit(model, loader(8), loader(8))
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    trainer(*callbacks(), max_epochs=2).fit(net(), loader(8), loader(8), ckpt_path=last)
    assert torch.load(last, weights_only=True)["global_step"] == 8
    assert not list(last.parent.glob("last-v*"))


def test_nothing_is_written_before_the_first_step(tmp_path, trainer, net, loader):
    model = net()
    fail(model, 0, RuntimeError("out of luck"))
    with pytest.raises(RuntimeError):
        fit(trainer, model, loader, tmp_path)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(tmp_path, trainer, net, loader, capsys):
    model = net()
    (tmp_path / "checkpoints").mkdir()
    last = tmp_path / "checkpoints/last.ckpt"
    last.write_text("the good one")
    fail(model, 2, RuntimeError("diverged"))
    model.on_train_batch_end = lambda *_: model.net.weight.data.fill_(math.nan)
    with pytest.raises(RuntimeError, match="diverged"):
        fit(trainer, model, loader, tmp_path)
    assert last.read_text() == "the good one"
    assert "the weights are not finite" in capsys.readouterr().err


def test_a_failure_to_save_does_not_hide_what_ended_the_training(tmp_path, trainer, net, loader, capsys):
    model = net()
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    fail(model, 2, RuntimeError("out of luck"))
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(trainer, model, loader, tmp_path)
    assert "could not write" in capsys.readouterr().err


def test_a_half_written_checkpoint_is_never_seen(tmp_path, trainer, net, loader, monkeypatch, capsys):
    def full_disk(state, path):
        path.write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    model = net()
    fail(model, 2, RuntimeError("out of luck"))
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(trainer, model, loader, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"), [(SIGTERMException(), 143), (KeyboardInterrupt(), 130), (SystemExit(3), 3)]
)
def test_exit_status(error, status):
    with pytest.raises(SystemExit) as caught, exit_with_signal_status():
        raise error
    assert caught.value.code == status


def test_lightnings_exit_after_ctrl_c_is_told_from_others():
    def fit():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    with pytest.raises(SystemExit) as caught, exit_with_signal_status():
        fit()
    assert caught.value.code == 130
