"""Two ranks write one table and one picture, of all cases, each once."""

import csv
import subprocess
import sys
import textwrap

SCRIPT = """
import sys, warnings
import lightning.pytorch as pl, torch
from torch.utils.data import DataLoader
from lightning_dice.callbacks import CaseTable, Overlays
from lightning_dice.data.batch import Batch, Sample

class Cases(torch.utils.data.Dataset):
    def __len__(self): return 5
    def __getitem__(self, i):
        mask = torch.zeros(1, 8, 8, dtype=torch.uint8); mask[:, :, : 1 + i] = 1
        logits = torch.full((1, 8, 8), -1.0); logits[:, :, :1] = 1
        return Sample(logits, mask, f"case{i}")

class Answers(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
    def test_step(self, batch, batch_idx):
        return {"logits": batch.image}

def collate(s): return Batch(torch.stack([x.image for x in s]), torch.stack([x.mask for x in s]), [x.case for x in s])

if __name__ == "__main__":
    folder = sys.argv[1]
    facts = dict(folder=folder, classes=["object"], activation="sigmoid")
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, callbacks=[CaseTable(**facts), Overlays(**facts, count=2)],
    )
    trainer.test(Answers(), DataLoader(Cases(), 1, collate_fn=collate), verbose=False)
    # A process that ends while the other still talks to it may be killed by torch's own threads.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def test_cases_of_all_ranks_once_each(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    with (tmp_path / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [f"case{i}" for i in range(5)]
    assert [float(row["dice"]) for row in rows] == [round(2 / (2 + i), 6) for i in range(5)]
    assert (tmp_path / "overlays.png").exists()
