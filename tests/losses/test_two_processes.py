"""Two processes with any share of the images give the loss and the gradient of one process with all of them.

They send at most one message for it, and none where nothing is to be shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from losses.family import CASES, FIRST
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from lightning_dice.losses import (
    BoundaryLoss,
    BoundaryWeightedLoss,
    ClDiceLoss,
    CompoundLoss,
    CrossEntropyLoss,
    DeepSupervision,
    DiceCELoss,
    DiceLoss,
    HausdorffLoss,
    LesionWiseLoss,
    OverlapLoss,
    SegmentationLoss,
    SkeletonRecallLoss,
    TopKCrossEntropyLoss,
)

pytestmark = pytest.mark.process

# Losses share the code that reduces over the ranks: test each of its ways with Dice,
RULES = ["smooth", "skip", "penalize"]
EXTRAS = [{}, {"class_weights": [1, 2, 3]}, {"exclude_classes": [0]}, {"reduction": "sum"}]
DICE = [
    ("dice", {"activation": ["sigmoid", "softmax"][turn % 2], "pool": pool, "absent": RULES[turn % 3], **extra})
    for turn, (extra, pool) in enumerate(itertools.product(EXTRAS, ["image", "batch", "all"]))
    if not (pool == "all" and extra.get("class_weights"))
]
# and every other loss once with each pool.
OTHERS = [
    (case.id, {"activation": activation, "pool": pool, "class_weights": [1, 2, 3]})
    for case in FIRST
    for pool, activation in (("image", "sigmoid"), ("batch", "softmax"))
    if case.id != "dice" and pool in case.row.pools and activation in case.activations
]
SETTINGS = DICE + OTHERS
SPLITS = [(5, 3), (8, 0)]


def everything(**both: object) -> CompoundLoss:
    """Make nested compounds with terms of every kind and all pools."""
    image, batch = ({"pool": pool, **both} for pool in ("image", "batch"))
    terms = {
        "dice": DiceLoss(**batch),
        "image": DiceLoss(**image),
        "sum": DiceLoss(**image, reduction="sum"),
        "ce": CrossEntropyLoss(**batch),
        "hardest": TopKCrossEntropyLoss(**both),
        "cldice": ClDiceLoss(**batch),
        "lesions": LesionWiseLoss(DiceLoss(**image), classes=3),
        "boundary": BoundaryLoss(classes=3, **both),
        "near": BoundaryWeightedLoss(DiceCELoss(**batch), classes=3),
        "thin": SkeletonRecallLoss(classes=3, **batch),
    }
    return CompoundLoss(terms)


class HalfLoss(DiceLoss):
    """A user's loss, written without a thought of ranks: calls another loss and changes the result."""

    def forward(self, logits, target, weight=None, **options):
        return super().forward(logits, target, weight, **options) / 2


class RootLoss(SegmentationLoss):
    """The same, written in another way."""

    def __init__(self, **settings: object) -> None:
        super().__init__(activation=settings["activation"], ignore_index=settings["ignore_index"])
        self.loss = TopKCrossEntropyLoss(**settings)

    def forward(self, logits, target, weight=None, **options):
        return self.loss(logits, target, weight, **options).sqrt()


class VolumeLoss(OverlapLoss):
    """The formula of the README."""

    def per_class(self, sums):
        return (sums.predicted - sums.actual).abs() / (sums.predicted + sums.actual + self.smooth[1])


# Losses that are not in the family, by their common settings.
BESIDE: dict[str, Callable[..., nn.Module]] = {
    "boundary": lambda **both: BoundaryLoss(classes=3, **both),
    "hausdorff": lambda **both: HausdorffLoss(classes=3, **both),
    "cldice-batch": ClDiceLoss,
    "cldice-image": lambda **both: ClDiceLoss(pool="image", **both),
    "skeleton_recall": lambda **both: SkeletonRecallLoss(classes=3, **both),
    "lesion_wise": lambda **both: LesionWiseLoss(DiceLoss(pool="image", **both), classes=3),
    "lesion_wise-blob": lambda **both: LesionWiseLoss(
        DiceLoss(pool="image", absent="penalize", class_weights=[1, 2, 3], exclude_classes=[0], **both),
        classes=3,
        regions="blob",
    ),
    "cldice-skip": lambda **both: ClDiceLoss(absent="skip", class_weights=[1, 2, 3], **both),
    "boundary-excluded": lambda **both: BoundaryLoss(classes=3, exclude_classes=[0], **both),
    "lesion_wise-sum": lambda **both: LesionWiseLoss(DiceLoss(pool="image", reduction="sum", **both), classes=3),
    "boundary_weighted": lambda **both: BoundaryWeightedLoss(DiceCELoss(**both), classes=3),
    "everything": everything,
    "half": HalfLoss,
    "root": RootLoss,
    "both": lambda **both: CompoundLoss(
        {"first": HalfLoss(**both), "second": RootLoss(**both), "third": DiceLoss(**both)}
    ),
    "volume": VolumeLoss,
}


def case(activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(8, 2, 6, 5, generator=generator, dtype=torch.float64)
    shape = (8, 6, 5) if activation == "softmax" else (8, 3, 6, 5)
    mask = torch.randint(0, 3 if activation == "softmax" else 2, shape, generator=generator)
    mask[6:][mask[6:] == 1] = 0  # Class 1 (or all) is absent from the last two images,
    mask[7] = 255  # of which the last is ignored altogether.
    return image, mask.masked_fill(torch.rand(shape, generator=generator) < 0.2, 255)


def beside(name: str, activation: str) -> nn.Module:
    return BESIDE[name](activation=activation, ignore_index=255)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Conv2d(2, 3, 1).double()


def step(model: nn.Module, loss: nn.Module, image: torch.Tensor, mask: torch.Tensor) -> tuple[float, torch.Tensor]:
    value = loss(model(image), mask)
    value.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return value.item(), gradient


def family(index: int) -> nn.Module:
    name, settings = SETTINGS[index]
    loss = next(case for case in CASES if case.id == name).loss(ignore_index=255, **settings)
    if "reduction" in settings:
        loss.reduction = settings["reduction"]
    return loss


def alone(loss: nn.Module) -> nn.Module:
    """Return the loss with `across_ranks=False` in every term that has it."""
    for module in loss.modules():
        if hasattr(module, "across_ranks"):
            module.across_ranks = False
    return loss


def messages(loss: nn.Module, image: torch.Tensor, mask: torch.Tensor, levels: int = 1) -> tuple[int, int]:
    """Return the number of collectives in the forward and the backward pass of a loss."""
    logits = net()(image).detach().requires_grad_()
    given = logits if levels == 1 else [logits, logits[..., ::2, ::2], logits[..., ::3, ::3]]
    with CommDebugMode() as forward:
        value = loss(given, mask)
    with CommDebugMode() as backward:
        if value.requires_grad:
            value.backward()
    return forward.get_total_counts(), backward.get_total_counts()


def counts(index: int, rank: int) -> dict[str, tuple[int, int]]:
    image, mask = (tensor.split((5, 3))[rank] for tensor in case(SETTINGS[index][1]["activation"]))
    found = {
        "on": messages(family(index), image, mask),
        "off": messages(alone(family(index)), image, mask),
        "levels": messages(DeepSupervision(family(index)), image, mask, levels=3),
    }
    with torch.no_grad():
        found["no gradient"] = messages(family(index), image, mask)
    return found


def counts_beside(name: str, rank: int) -> dict[str, tuple[int, int]]:
    image, mask = (tensor.split((5, 3))[rank] for tensor in case("softmax"))
    found = {
        "on": messages(beside(name, "softmax"), image, mask),
        "off": messages(alone(beside(name, "softmax")), image, mask),
        "levels": messages(DeepSupervision(beside(name, "softmax")), image, mask, levels=3),
    }
    with torch.no_grad():
        found["no gradient"] = messages(beside(name, "softmax"), image, mask)
    return found


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    results = {}
    for split, (index, (_, settings)) in itertools.product(SPLITS, enumerate(SETTINGS)):
        image, mask = (tensor.split(split)[rank] for tensor in case(settings["activation"]))
        results[split, index] = step(DistributedDataParallel(net()), family(index), image, mask)
    for split, name in itertools.product(SPLITS, BESIDE):
        image, mask = (tensor.split(split)[rank] for tensor in case("softmax"))
        results[split, name] = step(DistributedDataParallel(net()), beside(name, "softmax"), image, mask)
    results["counts"] = {index: counts(index, rank) for index in range(len(SETTINGS))}
    results["counts"] |= {name: counts_beside(name, rank) for name in BESIDE}
    torch.save(results, folder / f"{rank}.pt")
    # A process that ends while the other still communicates may be killed by torch's threads.
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, (folder,), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def label(index: int) -> str:
    name, settings = SETTINGS[index]
    return "-".join([name, *map(str, settings.values())])


@pytest.mark.parametrize("index", range(len(SETTINGS)), ids=label)
def test_equal_to_one_process(results, index):
    expected = step(net(), family(index), *case(SETTINGS[index][1]["activation"]))
    for split in SPLITS:
        assert_equal([result[split, index] for result in results], expected)


@pytest.mark.parametrize("name", BESIDE)
def test_other_losses_equal_one_process(results, name):
    expected = step(net(), beside(name, "softmax"), *case("softmax"))
    for split in SPLITS:
        assert_equal([result[split, name] for result in results], expected)


def assert_equal(found, expected):
    # Every rank has the loss of all images, not of its own alone.
    assert found[0][0] == found[1][0] == pytest.approx(expected[0], rel=1e-10)
    for _, gradient in found:
        torch.testing.assert_close(gradient, expected[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("index", range(len(SETTINGS)), ids=label)
def test_one_message_or_none(results, index):
    assert_counts(results, index, switch=SETTINGS[index][0] != "on_probabilities")


@pytest.mark.parametrize("name", BESIDE)
def test_other_losses_send_one_message_or_none(results, name):
    # A loss that calls another one sends its own message, once for each level; all others share one.
    calls = {"half": 1, "root": 1, "both": 3}.get(name, 1)
    assert_counts(results, name, calls=calls, levels=3 * calls if name in ("half", "root") else 7 if calls > 1 else 1)


def assert_counts(results, key, *, switch=True, calls=1, levels=1):
    for result in results:
        found = result["counts"][key]
        assert found["on"] == (calls, 0)
        assert found["levels"] == (levels, 0)
        assert found["off"] == ((0, 0) if switch else (calls, 0))
        assert found["no gradient"] == (0, 0)


def test_the_settings_hold_every_loss():
    """Counts new losses of the library too."""

    def kinds(parent: type) -> set[type]:
        return {kind for child in parent.__subclasses__() for kind in {child, *kinds(child)}}

    ours = {kind for kind in kinds(SegmentationLoss) if kind.__module__.startswith("lightning_dice.")}
    made = [family(index) for index in range(len(SETTINGS))] + [beside(name, "softmax") for name in BESIDE]
    used = {type(module) for loss in made for module in loss.modules()}
    bases = {kind for kind in ours if kind.__module__.endswith((".base", ".overlap")) or kind.__subclasses__()}
    assert ours - bases - used <= {DeepSupervision}
