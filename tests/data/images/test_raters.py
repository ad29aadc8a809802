"""Masks of several people become one, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lightning_dice import DiceLoss
from lightning_dice.data import MaskFormat, SegmentationData
from lightning_dice.data.batching import apply_augment
from lightning_dice.data.images.raters import Raters, fuse
from tests.data.image_sources import folder_source

SOFTMAX = MaskFormat(["background", "cell", "nucleus"])
SIGMOID = MaskFormat(["artery", "vein"], "sigmoid")
IGNORED = 255


def by_hand(votes: list[int], classes: int) -> tuple[list[float], int]:
    """Share and winner of each class in one pixel, in plain Python; ignored votes are none."""
    cast = [vote for vote in votes if vote != IGNORED]
    if not cast:
        return [float(IGNORED)] * classes, IGNORED
    shares = [cast.count(label) / len(cast) for label in range(classes)]
    return shares, max(range(classes), key=lambda label: (cast.count(label), -label))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_ids_against_a_vote_by_hand(count):
    generator = torch.Generator().manual_seed(count)
    masks = torch.tensor([0, 1, 2, IGNORED])[torch.randint(4, (count, 6, 7), generator=generator)].to(torch.uint8)
    masks[:, 0, 0] = IGNORED
    mean, vote = (fuse(list(masks), way, SOFTMAX) for way in ("mean", "majority"))
    assert mean.shape == (3, 6, 7)
    assert (mean.dtype, vote.dtype) == (torch.float32, torch.uint8)
    for row in range(6):
        for column in range(7):
            shares, winner = by_hand(masks[:, row, column].tolist(), 3)
            assert mean[:, row, column].tolist() == pytest.approx(shares)
            assert vote[row, column] == winner


@pytest.mark.parametrize("count", [2, 3])
def test_planes_against_a_vote_by_hand(count):
    generator = torch.Generator().manual_seed(count)
    masks = torch.tensor([0, 1, IGNORED])[torch.randint(3, (count, 2, 5, 5), generator=generator)].to(torch.uint8)
    masks[:, 1, 0, 0] = IGNORED
    mean, vote = (fuse(list(masks), way, SIGMOID) for way in ("mean", "majority"))
    for place in np.ndindex(2, 5, 5):
        cast = [mask[place].item() for mask in masks if mask[place] != IGNORED]
        share = sum(cast) / len(cast) if cast else IGNORED
        assert mean[place].item() == pytest.approx(share)
        assert vote[place].item() == (IGNORED if not cast else int(share > 0.5))


def test_without_an_ignored_label():
    form = MaskFormat(["a", "b"], ignore_index=None)
    masks = [torch.tensor([[0, 1]], dtype=torch.uint8), torch.tensor([[1, 1]], dtype=torch.uint8)]
    assert fuse(masks, "majority", form).tolist() == [[0, 1]]
    assert fuse(masks, "mean", form).tolist() == [[[0.5, 0]], [[0.5, 1]]]


def write(root: Path, raters: dict[str, int], splits: tuple[str, ...] = ("train", "val")) -> None:
    """Each rater's mask has the requested number of columns of foreground."""
    for split in splits:
        for case in "abcd":
            image = Path(root / "images" / split / f"{split}_{case}.png")
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), ord(case)).save(image)
            for rater, columns in raters.items():
                mask = np.zeros((8, 8), np.uint8)
                mask[:, :columns] = 1
                path = root / "masks" / split / rater / image.name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(path)


def columns(mask: torch.Tensor) -> float:
    """Columns of the first class's plane, or of id 1."""
    return float((mask[0] if mask.ndim == 3 else mask).sum()) / 8


@pytest.mark.parametrize(
    ("settings", "train", "val"),
    [
        ({}, 4.0, 4.0),
        ({"fusion": "majority"}, 4.0, 4.0),
        ({"fusion": "r3", "reference": "r1"}, 6.0, 2.0),
        ({"fusion": "mean", "reference": "gold"}, 4.0, 7.0),
    ],
    ids=["mean", "majority", "names", "gold"],
)
def test_training_and_evaluation_see_what_is_asked_for(tmp_path, settings, train, val):
    write(tmp_path, {"r1": 2, "r2": 4, "r3": 6, "gold": 7})
    form = MaskFormat(["cell"], "sigmoid")
    source = folder_source(tmp_path, form, channels=1, raters=["r1", "r2", "r3"], **settings)
    report = source.check()
    assert f"by {4 if 'gold' in settings.values() else 3} raters" in report
    masks = [source.split(split)[0].mask for split in ("train", "val")]
    assert [columns(mask) for mask in masks] == [train, val]
    assert [mask.is_floating_point() for mask in masks] == [settings.get("fusion", "mean") == "mean", False]
    share = sum([2, 4, 6, 7][: 4 if "gold" in settings.values() else 3]) / (4 if "gold" in settings.values() else 3) / 8
    assert source.survey().shares(["train"])["cell"].fraction == pytest.approx(share)


def test_a_random_rater_follows_from_the_seed_alone(tmp_path):
    write(tmp_path, {"r1": 2, "r2": 6})
    form = MaskFormat(["cell"], "sigmoid")

    def epochs(workers: int) -> list[list[float]]:
        torch.manual_seed(3)
        source = folder_source(tmp_path, form, channels=1, raters=["r1", "r2"], fusion="random", workers=1)
        data = SegmentationData(source, batch_size=4, num_workers=workers, ignore_index=255)
        data.setup("fit")
        loader = data.train_dataloader()
        return [[columns(mask) for batch in loader for mask in batch.mask] for _ in range(6)]

    seen = epochs(0)
    assert {found for epoch in seen for found in epoch} == {2.0, 6.0}
    assert len({tuple(epoch) for epoch in seen}) > 1
    assert epochs(1) == seen


def test_a_bad_mask_of_any_rater_is_named(tmp_path):
    write(tmp_path, {"r1": 2, "r2": 6})
    Image.new("L", (8, 8), 7).save(tmp_path / "masks/train/r2/train_b.png")
    Image.new("L", (8, 7)).save(tmp_path / "masks/val/r1/val_c.png")
    with pytest.raises(ValueError, match=r"(?s)r1/val_c\.png: is 7x8.*r2/train_b\.png: holds the values 7"):
        folder_source(tmp_path, MaskFormat(["cell"], "sigmoid"), channels=1, raters=["r1", "r2"]).check()


def test_names_are_checked():
    with pytest.raises(ValueError, match="raters must be a list"):
        Raters("abc")


# Soft labels on their way to the loss


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_soft_labels_survive_augmentation(activation):
    """Pixels that a transform fills are ignored, moved ones keep their values, and the loss counts the rest."""
    masks = [torch.tensor([[0, 1, 1], [1, 1, 255]]), torch.tensor([[0, 0, 1], [1, 0, 255]]), torch.ones(2, 3).long()]
    form = MaskFormat(["background", "cell"] if activation == "softmax" else ["cell"], activation)
    masks = masks if activation == "softmax" else [mask.unsqueeze(0) for mask in masks]
    masks[2][..., 1, 2] = 255
    soft = fuse(masks, "mean", form)
    image, moved = apply_augment(v2.Compose([v2.Pad(1), v2.RandomHorizontalFlip(p=1)]), torch.ones(1, 2, 3), soft, 255)
    assert image.shape == (1, 4, 5)
    inner = moved[:, 1:-1, 1:-1].flip(-1)
    assert torch.allclose(inner, soft, atol=1e-7)
    assert inner[..., 1, 2].eq(255).all()
    border = torch.ones(4, 5, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert moved[:, border].eq(255).all()
    logits = torch.randn(1, len(soft), 4, 5, generator=torch.Generator().manual_seed(0))
    loss = DiceLoss(activation=activation, overlap="minimum", ignore_index=255)
    assert loss(logits, moved[None]) == pytest.approx(
        loss(logits[..., 1:-1, 1:-1].flip(-1), inner[None]).item(), abs=1e-6
    )


def test_soft_labels_without_an_ignored_label_become_0_outside():
    _, moved = apply_augment(v2.Pad(1), torch.ones(1, 1, 1), torch.full((1, 1, 1), 0.25), None)
    assert moved.sum() == 0.25
