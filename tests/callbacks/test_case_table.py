import math

import lightning.pytorch as pl
import pytest
import torch
from helpers import rows
from torch.utils.data import DataLoader

from lightning_dice.callbacks import CaseTable, Overlays
from lightning_dice.data.batch import Batch


class Answers(pl.LightningModule):
    """Returns the logits that come with the batch as its image."""

    def test_step(self, batch, batch_idx):
        return {"loss": torch.tensor(0.0), "logits": batch.image}

    validation_step = test_step


def batches(*items):
    """A loader of the batches, each a list of (logits, mask, case)."""
    stacked = [Batch(torch.stack([i[0] for i in b]), torch.stack([i[1] for i in b]), [i[2] for i in b]) for b in items]
    return DataLoader(stacked, batch_size=None)


def ids(*values):
    """Logits of three classes that predict the ids, one row of pixels."""
    return torch.nn.functional.one_hot(torch.tensor([values]), 3).permute(2, 0, 1).float()


def labels(*values):
    return torch.tensor([values], dtype=torch.uint8)


PERFECT = (ids(0, 1, 2, 2), labels(0, 1, 2, 2), "b perfect")
HALF = (ids(0, 1, 1, 1), labels(0, 0, 1, 255), "a half")
EMPTY = (ids(0, 0, 0, 0), labels(0, 0, 0, 0), "c empty")


def table(folder, **kwargs):
    facts = {"classes": ["background", "cell", "core"], "activation": "softmax", "ignore_index": 255}
    return CaseTable(folder, **facts | {"exclude_classes": [0]} | kwargs)


def test_table_of_cases(tmp_path, trainer):
    # A sampler that pads repeats a case, and the order is the sampler's.
    trainer(table(tmp_path)).test(Answers(), batches([PERFECT, EMPTY], [HALF], [PERFECT]), verbose=False)
    found = rows(tmp_path / "cases.csv")
    assert [row["case"] for row in found] == ["a half", "b perfect", "c empty"]
    assert {row["split"] for row in found} == {"test"}
    names = ("background", "cell", "core")
    pixels = [f"{side}/{name}" for name in names for side in ("actual", "predicted")]
    before = ["split", "case", "dice", "dice/cell", "dice/core", *pixels]
    assert list(found[0])[: len(before)] == before
    assert [row["dice"] for row in found] == ["0.666667", "1", ""]
    assert [row["dice/core"] for row in found] == ["", "1", ""]
    assert [row["actual/cell"] for row in found] == ["1", "1", "0"]
    assert [row["predicted/cell"] for row in found] == ["2", "1", "0"]
    assert [row["jaccard/cell"] for row in found] == ["0.5", "1", ""]
    assert [row["volume_difference/cell"] for row in found] == ["1", "0", ""]
    assert [row["lesion_recall/core"] for row in found] == ["", "1", ""]
    assert not any(key.endswith("/background") for key in found[0] if key not in pixels)
    assert (tmp_path / "dice_per_class.png").stat().st_size > 5_000


def test_distances_are_in_the_unit_of_the_spacing(tmp_path, trainer):
    actual, predicted = torch.zeros(2, 1, 8, 8)
    actual[0, 2:6, 2:6], predicted[0, 2:6, 4:8] = 1, 1
    batch = Batch(
        (predicted * 2 - 1)[None].repeat(2, 1, 1, 1), actual.byte()[None].repeat(2, 1, 1, 1), ["mm", "pixels"]
    )
    batch.spacing[0] = (3.0, 0.5)
    callback = CaseTable(tmp_path, ["object"], "sigmoid", tolerance=1.0)
    trainer(callback).test(Answers(), DataLoader([batch], batch_size=None), verbose=False)
    by_mm, by_pixels = rows(tmp_path / "cases.csv")
    assert (by_mm["spacing"], by_pixels["spacing"]) == ("3 0.5", "")
    assert (by_mm["hd95/object"], by_pixels["hd95/object"]) == ("1", "2")
    assert by_mm["surface_dice/object"] == "1"
    assert float(by_pixels["surface_dice/object"]) < 0.7
    assert by_mm["dice/object"] == by_pixels["dice/object"] == "0.5"


def test_labels_that_the_step_has_decided_on_are_scored(tmp_path, trainer):
    class Decided(Answers):
        def test_step(self, batch, batch_idx):
            return {"logits": batch.image, "labels": batch.mask.where(batch.mask != 255, 0)}

    trainer(table(tmp_path), Overlays(tmp_path, ["a", "b", "c"], "softmax", ignore_index=255)).test(
        Decided(), batches([HALF]), verbose=False
    )
    assert rows(tmp_path / "cases.csv")[0]["dice"] == "1"
    # Calibration is a matter of the logits: of three pixels that count, one is predicted wrongly, with 0.576.
    assert float(rows(tmp_path / "cases.csv")[0]["ece"]) == pytest.approx(2 / 3 - 0.5761, abs=1e-4)


def test_reliability_adds_up_the_cases(tmp_path, trainer):
    trainer(table(tmp_path)).test(Answers(), batches([PERFECT, HALF], [PERFECT]), verbose=False)
    found = rows(tmp_path / "reliability.csv")
    assert len(found) == 15
    (filled,) = [row for row in found if row["pixels"] != "0"]
    assert (filled["pixels"], filled["right"], filled["split"]) == ("7", f"{5 / 7 + 1 / 7:.6g}", "test")
    assert float(filled["confidence"]) == pytest.approx(math.e / (math.e + 2), abs=1e-5)
    assert float(filled["lower"]) < float(filled["confidence"]) < float(filled["upper"])


def test_the_costly_scores_can_be_left_out(tmp_path, trainer):
    lean = table(tmp_path, surfaces=False, lesions=False, calibration_bins=0)
    trainer(lean).test(Answers(), batches([PERFECT]), verbose=False)
    assert not [key for key in rows(tmp_path / "cases.csv")[0] if key.startswith(("hd95", "surface", "lesion", "ece"))]
    assert not (tmp_path / "reliability.csv").exists()


def test_a_label_that_no_class_has_is_told_with_the_case(tmp_path, trainer):
    with pytest.raises(ValueError, match="case a bad: target must hold class ids from 0 to 2"):
        trainer(table(tmp_path)).test(Answers(), batches([(ids(0, 1), labels(0, 7), "a bad")]), verbose=False)


def test_each_split_replaces_its_own_rows(tmp_path, trainer):
    trainer(table(tmp_path)).validate(Answers(), batches([PERFECT]), verbose=False)
    trainer(table(tmp_path)).test(Answers(), batches([PERFECT, HALF]), verbose=False)
    trainer(table(tmp_path)).test(Answers(), batches([HALF]), verbose=False)
    found = rows(tmp_path / "cases.csv")
    assert [(row["split"], row["case"]) for row in found] == [("test", "a half"), ("val", "b perfect")]


@pytest.mark.parametrize("during_fit", [False, True])
def test_validation_within_a_fit_is_recorded_only_if_asked_for(tmp_path, trainer, net, loader, during_fit):
    callback = CaseTable(tmp_path, ["object"], "sigmoid", during_fit=during_fit)
    overlays = Overlays(tmp_path, ["object"], "sigmoid", during_fit=during_fit)
    trainer(callback, overlays, max_epochs=1).fit(net(), loader(), loader(3, batch_size=1))
    assert (tmp_path / "cases.csv").exists() is during_fit
    assert (tmp_path / "overlays.png").exists() is during_fit
    if during_fit:
        assert len(rows(tmp_path / "cases.csv")) == 3
        assert "hd95/object" not in rows(tmp_path / "cases.csv")[0]  # That would slow every epoch down.


def test_steps_that_return_no_logits_write_nothing(tmp_path, trainer):
    class Silent(Answers):
        def test_step(self, batch, batch_idx):
            return None

    trainer(table(tmp_path)).test(Silent(), batches([PERFECT]), verbose=False)
    assert not list(tmp_path.glob("*.csv"))


class AnyForm(pl.LightningModule):
    """Returns the images of a batch of any form as its logits."""

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return {"loss": torch.tensor(0.0), "logits": batch["image"] if isinstance(batch, dict) else batch[0]}


@pytest.mark.parametrize("form", [tuple, list, dict])
def test_batches_of_ones_own_project(tmp_path, trainer, form):
    """Cases without a name are counted, so that no batch replaces another."""
    stacked = [
        (torch.stack([PERFECT[0], HALF[0]]), torch.stack([PERFECT[1], HALF[1]])),
        (EMPTY[0][None], EMPTY[1][None]),
    ]
    loader = DataLoader(
        [dict(zip(("image", "mask"), pair, strict=True)) if form is dict else form(pair) for pair in stacked],
        batch_size=None,
    )
    colors = {"colors": ["#000000", "#ff0000", "#0000ff"], "size": 32}
    overlays = Overlays(tmp_path, ["background", "cell", "core"], "softmax", ignore_index=255, **colors)
    trainer(table(tmp_path), overlays).test(AnyForm(), loader, verbose=False)
    found = {row["case"]: row["dice"] for row in rows(tmp_path / "cases.csv")}
    assert found == {"batch 0, image 0": "1", "batch 0, image 1": "0.666667", "batch 1, image 0": ""}
    assert overlays.picture.is_file()


def test_cases_of_two_loaders(tmp_path, trainer):
    trainer(table(tmp_path)).test(AnyForm(), [batches([PERFECT]), batches([HALF, PERFECT])], verbose=False)
    found = {row["case"]: row["dice"] for row in rows(tmp_path / "cases.csv")}
    assert found == {
        "a half (data loader 1)": "0.666667",
        "b perfect (data loader 0)": "1",
        "b perfect (data loader 1)": "1",
    }
