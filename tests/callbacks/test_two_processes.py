"""Two ranks write one table and one picture, of all cases, each once."""

import lightning.pytorch as pl
import pytest
import torch
from helpers import rows, run_ranks
from squares import load

from lightning_dice.callbacks import CaseTable, Overlays
from lightning_dice.data.batch import Sample

pytestmark = pytest.mark.process


class Answers(pl.LightningModule):
    """Answers with the image."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def test_step(self, batch, batch_idx):
        return {"logits": batch.image}


def scored(folder):
    cases = []
    for index in range(5):
        mask, logits = torch.zeros(1, 8, 8, dtype=torch.uint8), torch.full((1, 8, 8), -1.0)
        mask[:, :, : 1 + index], logits[:, :, :1] = 1, 1
        cases.append(Sample(logits, mask, f"case{index}"))
    facts = {"folder": folder, "classes": ["object"], "activation": "sigmoid"}
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, callbacks=[CaseTable(**facts), Overlays(**facts, count=2)],
    )  # fmt: skip
    trainer.test(Answers(), load(cases, 1), verbose=False)


def test_cases_of_all_ranks_once_each(tmp_path):
    run_ranks(scored, tmp_path)
    table = rows(tmp_path / "cases.csv")
    assert [row["case"] for row in table] == [f"case{i}" for i in range(5)]
    assert [float(row["dice"]) for row in table] == [round(2 / (2 + i), 6) for i in range(5)]
    assert (tmp_path / "overlays.png").exists()
