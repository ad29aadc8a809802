"""Two processes with any share of the images give the loss and the gradient of one process with all of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from losses.family import CASES
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# What decides how sums and means reach over the ranks is shared: all of it with Dice,
DICE = [
    ("dice", {"activation": activation, "pool": pool, "absent": absent, **extra})
    for (activation, pool, absent), extra in itertools.product(
        itertools.product(["sigmoid", "softmax"], ["image", "batch", "all"], ["smooth", "skip", "penalize"]),
        [{}, {"class_weights": [1, 2, 3]}, {"exclude_classes": [0]}, {"reduction": "sum"}],
    )
    if not (pool == "all" and extra.get("class_weights"))
]
# and of every other loss one with each pool.
OTHERS = [
    (case.id, {"activation": activation, "pool": pool, "class_weights": [1, 2, 3]})
    for case in CASES
    for pool, activation in (("image", "sigmoid"), ("batch", "softmax"))
    if case.id != "dice" and pool in case.row.pools and activation in case.activations
]
SETTINGS = DICE + OTHERS
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


def step(
    model: nn.Module, name: str, settings: dict, image: torch.Tensor, mask: torch.Tensor
) -> tuple[float, torch.Tensor]:
    case = next(case for case in CASES if case.id == name)
    loss = case.loss(ignore_index=255, **settings)
    if "reduction" in settings:
        loss.reduction = settings["reduction"]
    value = loss(model(image), mask)
    value.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return value.item(), gradient


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    results = {}
    for split, (index, (name, settings)) in itertools.product(SPLITS, enumerate(SETTINGS)):
        image, mask = (tensor.split(split)[rank] for tensor in case(settings["activation"]))
        results[split, index] = step(DistributedDataParallel(net()), name, settings, image, mask)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, (folder,), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def label(index: int) -> str:
    name, settings = SETTINGS[index]
    return "-".join([name, *map(str, settings.values())])


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("index", range(len(SETTINGS)), ids=label)
def test_equal_to_one_process(results, split, index):
    name, settings = SETTINGS[index]
    loss, gradient = step(net(), name, settings, *case(settings["activation"]))
    losses = [result[split, index][0] for result in results]
    # With a ratio for each image a process reports its share; what is averaged is the loss.
    assert sum(losses) / 2 == pytest.approx(loss, rel=1e-10)
    if settings["pool"] != "image" and name not in ("top_k", "compound", "on_probabilities"):
        assert losses[0] == losses[1]
    for result in results:
        torch.testing.assert_close(result[split, index][1], gradient, rtol=1e-10, atol=1e-12)
