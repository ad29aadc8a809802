import os
import pty
import re
import subprocess
import sys
import textwrap

import pytest

from lightning_dice.callbacks import ProgressBar


def test_a_log_file_gets_one_line_for_each_epoch(trainer, net, loader, capsys):
    trainer(ProgressBar(), max_epochs=3, enable_progress_bar=True).fit(net(), loader(), loader())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [[f"epoch {i}/2", f"step {2 * i + 2}"] for i in range(3)]
    losses = r"train/loss 0\.\d{4}  val/loss 0\.\d{4}"
    assert re.fullmatch(rf"epoch 0/2  step 2  {losses}  val/dice -?0\.\d{{4}}  0:0\d", lines[0])


def test_a_long_epoch_shows_that_it_lives(trainer, net, loader, capsys):
    trainer(ProgressBar(interval=0.0), max_epochs=1, enable_progress_bar=True).fit(net(), loader(), loader())
    assert [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()] == ["step 1/2", "step 2/2", "step 2"]


def test_disabled_bars_print_nothing(trainer, net, loader, capsys):
    bar = ProgressBar(refresh_rate=0)
    trainer(bar, max_epochs=1, enable_progress_bar=True).fit(net(), loader(), loader())
    assert capsys.readouterr().out == ""


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import lightning.pytorch as pl
from torch.utils.data import DataLoader
from conftest import Cases, Net, collate
from lightning_dice.callbacks import ProgressBar

class Both(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("dice", 0.5, prog_bar=True, logger=False)
        return loss

loader = DataLoader(Cases(60), 2, collate_fn=collate)
kwargs = dict(accelerator="cpu", logger=False, enable_checkpointing=False)
trainer = pl.Trainer(max_epochs=2, callbacks=[ProgressBar()], **kwargs)
trainer.fit(Both(), loader, loader)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_of_80_columns_shows_loss_and_dice_in_one_line(tmp_path, request):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(request.path.parent))))
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, script], stdout=slave, stderr=subprocess.DEVNULL, env=environment, cwd=tmp_path
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    assert process.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    bars = [line for line in re.split(r"[\r\n]+", text) if line.startswith("Epoch 1/1")]
    assert bars
    assert re.search(r"30/30 .*loss: 0\.\d+ dice: 0\.500 val/dice: -?0\.\d+\s*$", bars[-1])
    assert max(map(len, bars)) <= 80
    assert "v_num" not in text
