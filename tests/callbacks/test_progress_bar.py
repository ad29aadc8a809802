import io
import re
import sys

import pytest
from squares import Net

from lightning_dice.callbacks import ProgressBar

USE = r"\d+(\.\d|k)? images/s  \d+\.\d GB"


def test_a_log_file_gets_one_line_for_each_epoch(trainer, net, loader, capsys):
    trainer(ProgressBar(), max_epochs=3, enable_progress_bar=True).fit(net(), loader(), loader())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [[f"epoch {i}/2", f"step {2 * i + 2}"] for i in range(3)]
    losses = r"train/loss 0\.\d{4}  val/loss 0\.\d{4}"
    assert re.fullmatch(rf"epoch 0/2  step 2  {losses}  val/dice -?0\.\d{{4}}  {USE}  0:00:0\d", lines[0])


def test_an_epoch_without_validation_shows_none_of_an_earlier_one(trainer, net, loader, capsys):
    settings = {"max_epochs": 4, "check_val_every_n_epoch": 2, "enable_progress_bar": True}
    trainer(ProgressBar(), **settings).fit(net(), loader(), loader())
    lines = capsys.readouterr().out.splitlines()
    assert ["val/" in line for line in lines] == [False, True, False, True]
    assert all("train/loss" in line for line in lines)


def test_a_long_epoch_shows_that_it_lives(trainer, net, loader, capsys):
    trainer(ProgressBar(interval=0.0), max_epochs=1, enable_progress_bar=True).fit(net(), loader(), loader())
    assert [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()] == ["step 1/2", "step 2/2", "step 2"]


def test_disabled_bars_print_nothing(trainer, net, loader, capsys):
    bar = ProgressBar(refresh_rate=0)
    trainer(bar, max_epochs=1, enable_progress_bar=True).fit(net(), loader(), loader())
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    """A terminal that keeps what it shows."""

    def isatty(self):
        return True


class Both(Net):
    """Logs two metrics for the bar."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("dice", 0.5, prog_bar=True, logger=False)
        return loss


@pytest.mark.parametrize(("epochs", "batches", "bar"), [(2, 30, "━+ +"), (11, 100, "")], ids=["bar", "no-room"])
def test_a_terminal_of_80_columns_shows_loss_and_dice_in_one_line(trainer, loader, monkeypatch, epochs, batches, bar):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("rich._console", None)
    fit = trainer(ProgressBar(), max_epochs=epochs, enable_progress_bar=True, num_sanity_val_steps=0)
    fit.fit_loop.epoch_progress.current.processed = epochs - 1  # Only the last epoch is trained.
    fit.fit(Both(), loader(batches, 1, size=10), loader(2, size=10))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    last = f"Epoch {epochs - 1}/{epochs - 1}"
    bars = [line for line in re.split(r"[\r\n]+", text) if line.startswith(last)]
    assert bars
    # Throughput and memory come before them, and nothing is cut.
    left = rf"{last} +{bar}{batches}/{batches} +00:00 +\d+(\.\d|k)?/s \d+\.\dG"
    assert re.fullmatch(rf"{left} +loss: 0\.\d{{3}} dice: 0\.500 val/dice: -?0\.\d{{3}}\s*", bars[-1]), bars[-1]
    assert max(map(len, bars)) <= 80
    assert "v_num" not in text
