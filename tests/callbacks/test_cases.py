import csv
import math

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_dice.callbacks import CaseTable, Overlays
from lightning_dice.callbacks.scores import score_cases
from lightning_dice.data.batch import Batch


class Answers(pl.LightningModule):
    """Returns the logits that come with the batch as its image."""

    def test_step(self, batch, batch_idx):
        return {"loss": torch.tensor(0.0), "logits": batch.image}

    validation_step = test_step


def rows(folder):
    with (folder / "cases.csv").open() as file:
        return list(csv.DictReader(file))


def batches(*items):
    """A loader of the batches, each a list of (logits, mask, case)."""
    stacked = [Batch(torch.stack([i[0] for i in b]), torch.stack([i[1] for i in b]), [i[2] for i in b]) for b in items]
    return DataLoader(stacked, batch_size=None)


def ids(*values):
    """Logits of three classes that stand for the ids, one row of pixels."""
    return torch.nn.functional.one_hot(torch.tensor([values]), 3).permute(2, 0, 1).float()


def labels(*values):
    return torch.tensor([values], dtype=torch.uint8)


PERFECT = (ids(0, 1, 2, 2), labels(0, 1, 2, 2), "b perfect")
HALF = (ids(0, 1, 1, 1), labels(0, 0, 1, 255), "a half")
EMPTY = (ids(0, 0, 0, 0), labels(0, 0, 0, 0), "c empty")


def table(folder, **kwargs):
    facts = {"classes": ["background", "cell", "core"], "activation": "softmax", "ignore_index": 255}
    return CaseTable(folder, **facts | {"exclude_classes": [0]} | kwargs)


def test_scores_of_cases_by_hand():
    scores = score_cases(
        torch.stack([PERFECT[0], HALF[0], EMPTY[0]]),
        torch.stack([PERFECT[1], HALF[1], EMPTY[1]]),
        activation="softmax",
        ignore_index=255,
        exclude_classes=[0],
    )
    assert scores[0].dice == [1, 1, 1]
    assert scores[1].dice[:2] == pytest.approx([2 / 3, 2 / 3])
    assert [s.mean for s in scores] == pytest.approx([1, 2 / 3, math.nan], nan_ok=True)
    assert (scores[1].actual, scores[1].predicted) == ([2, 1, 0], [1, 2, 0])


def test_table_of_cases(tmp_path, trainer):
    # A sampler that pads repeats a case, and the order is the sampler's.
    trainer(table(tmp_path)).test(Answers(), batches([PERFECT, EMPTY], [HALF], [PERFECT]), verbose=False)
    found = rows(tmp_path)
    assert [row["case"] for row in found] == ["a half", "b perfect", "c empty"]
    assert {row["split"] for row in found} == {"test"}
    names = ("background", "cell", "core")
    pixels = [f"{side}/{name}" for name in names for side in ("actual", "predicted")]
    assert list(found[0]) == ["split", "case", "dice", "dice/cell", "dice/core", *pixels]
    assert [row["dice"] for row in found] == ["0.666667", "1", ""]
    assert [row["dice/core"] for row in found] == ["", "1", ""]
    assert [row["predicted/cell"] for row in found] == ["2", "1", "0"]
    assert (tmp_path / "dice_per_class.png").stat().st_size > 5_000


def test_each_split_replaces_its_own_rows(tmp_path, trainer):
    trainer(table(tmp_path)).validate(Answers(), batches([PERFECT]), verbose=False)
    trainer(table(tmp_path)).test(Answers(), batches([PERFECT, HALF]), verbose=False)
    trainer(table(tmp_path)).test(Answers(), batches([HALF]), verbose=False)
    assert [(row["split"], row["case"]) for row in rows(tmp_path)] == [("test", "a half"), ("val", "b perfect")]


@pytest.mark.parametrize("during_fit", [False, True])
def test_validation_within_a_fit_is_recorded_only_if_asked_for(tmp_path, trainer, net, loader, during_fit):
    callback = CaseTable(tmp_path, ["object"], "sigmoid", during_fit=during_fit)
    overlays = Overlays(tmp_path, ["object"], "sigmoid", during_fit=during_fit)
    trainer(callback, overlays, max_epochs=1).fit(net(), loader(), loader(3, batch_size=1))
    assert (tmp_path / "cases.csv").exists() is during_fit
    assert (tmp_path / "overlays.png").exists() is during_fit
    if during_fit:
        assert len(rows(tmp_path)) == 3


def test_steps_that_return_no_logits_write_nothing(tmp_path, trainer):
    class Silent(Answers):
        def test_step(self, batch, batch_idx):
            return None

    trainer(table(tmp_path)).test(Silent(), batches([PERFECT]), verbose=False)
    assert not list(tmp_path.glob("*.csv"))
