"""Two processes with any share of the images give the loss and the gradient of one process with all of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_dice import DiceLoss

SETTINGS = [
    {"activation": activation, "pool": pool, "absent": absent, **extra}
    for (activation, pool, absent), extra in itertools.product(
        itertools.product(["sigmoid", "softmax"], ["image", "batch", "all"], ["smooth", "skip", "penalize"]),
        [{}, {"class_weights": [1, 2, 3]}, {"exclude_classes": [0]}, {"reduction": "sum"}],
    )
    if not (pool == "all" and extra.get("class_weights"))
]
SPLITS = [(4, 4), (5, 3), (7, 1), (8, 0)]


def case(activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(8, 2, 6, 5, generator=generator, dtype=torch.float64)
    shape = (8, 6, 5) if activation == "softmax" else (8, 3, 6, 5)
    mask = torch.randint(0, 3 if activation == "softmax" else 2, shape, generator=generator)
    mask[6:][mask[6:] == 1] = 0  # Class 1 (or all) is absent from the last two images,
    mask[7] = 255  # of which the last is ignored altogether.
    return image, mask.masked_fill(torch.rand(shape, generator=generator) < 0.2, 255)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Conv2d(2, 3, 1).double()


def step(model: nn.Module, settings: dict, image: torch.Tensor, mask: torch.Tensor) -> tuple[float, torch.Tensor]:
    loss = DiceLoss(ignore_index=255, **settings)(model(image), mask)
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return loss.item(), gradient


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    results = {}
    for split, (index, settings) in itertools.product(SPLITS, enumerate(SETTINGS)):
        image, mask = (tensor.split(split)[rank] for tensor in case(settings["activation"]))
        results[split, index] = step(DistributedDataParallel(net()), settings, image, mask)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, (folder,), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("index", range(len(SETTINGS)), ids=lambda index: "-".join(map(str, SETTINGS[index].values())))
def test_equal_to_one_process(results, split, index):
    settings = SETTINGS[index]
    loss, gradient = step(net(), settings, *case(settings["activation"]))
    losses = [result[split, index][0] for result in results]
    # With a ratio for each image a process reports its share; what is averaged is the loss.
    assert sum(losses) / 2 == pytest.approx(loss, rel=1e-10)
    if settings["pool"] != "image":
        assert losses[0] == losses[1]
    for result in results:
        torch.testing.assert_close(result[split, index][1], gradient, rtol=1e-10, atol=1e-12)
