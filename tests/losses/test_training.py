"""Every loss of the catalogue trains the same small task, by its name alone, to a score in the range of the others'."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from lightning_dice import DiceScore
from lightning_dice.cli.config import CONF_DIR, instantiate, register_resolvers
from lightning_dice.data import Batch, SegmentationData, Standardize, SyntheticSource

NAMES = sorted(path.stem for path in (CONF_DIR / "loss").glob("*.yaml"))
STEPS = 150


@cache
def batches(activation: str) -> tuple[list[Batch], list[Batch]]:
    classes = ["object"] if activation == "sigmoid" else ["background", "object"]
    source = SyntheticSource(
        size=(40, 40), classes=classes, activation=activation, cases=(32, 16, 0), contrast=0.5, noise=0.02,
        foreground_fraction=0.08, ignore_index=255,
    )  # fmt: skip
    data = SegmentationData(source, batch_size=8, num_workers=0, normalize=Standardize(), ignore_index=255)
    torch.manual_seed(0)
    data.prepare_data()
    data.setup()
    return list(data.train_dataloader()), list(data.val_dataloader())


def score(name: str, activation: str) -> float:
    """Dice of the object on the validation images, after a short training."""
    register_resolvers()
    overrides = [f"loss={name}", f"data.activation={activation}"]
    if activation == "softmax":
        overrides += ["data.classes=[background,object]", "data.exclude_classes=[0]"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        loss = instantiate(compose("fit", overrides=overrides).loss, "loss")
    train, val = batches(activation)
    channels = 1 if activation == "sigmoid" else 2
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, channels, 1)
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for step in range(STEPS):
        batch = train[step % len(train)]
        optimizer.zero_grad()
        loss(net(batch.image), batch.mask).backward()
        optimizer.step()
    metric = DiceScore(channels, activation=activation, exclude_classes=[0] if channels == 2 else (), ignore_index=255)
    with torch.no_grad():
        for batch in val:
            metric.update(net(batch.image), batch.mask)
    return float(metric.compute())


# One activation of each, in turn; the quick ones are of the two most common losses.
PAIRS = [(name, ("sigmoid", "softmax")[turn % 2]) for turn, name in enumerate(NAMES)]
QUICK = ("dice", "dice_ce")


@pytest.mark.parametrize(
    ("name", "activation"),
    [pytest.param(*pair, marks=[] if pair[0] in QUICK else pytest.mark.slow, id="-".join(pair)) for pair in PAIRS],
)
def test_trains_to_the_range_of_the_others(name, activation):
    assert score(name, activation) > 0.6
