"""What each loss costs, forward and backward: against `DiceLoss`, and against the peers. Time and peak memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import monai.losses
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_dice import losses
from tests.benchmarks.timing import interleaved

Step = Callable[[], None]
ROUNDS = 9


def step(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Step:
    """Forward and backward, from logits without a gradient."""

    def run() -> None:
        logits.grad = None
        loss(logits, target).backward()

    return run


def seconds(run: Step) -> Callable[[], float]:
    def timed() -> float:
        run()  # The one before may have left the caches and the allocator in any state.
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return timed


def peak(run: Step) -> float:
    """Peak of the tensors' memory beyond what there was before, in MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = lowest = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        lowest = min(lowest, total)  # The gradient of the step before goes first.
        highest = max(highest, total - lowest)
    return highest / 2**20


def show(title: str, variants: dict[str, Step], baseline: str) -> None:
    """A table of medians, with the ratio within a round and the peak memory."""
    times = interleaved({name: seconds(run) for name, run in variants.items()}, ROUNDS)
    print(f"**{title}**\n\n| | ms | ratio | quartiles | peak MiB |\n|---|---|---|---|---|")
    for name, run in variants.items():
        ratios = torch.tensor(times[name]) / torch.tensor(times[baseline])
        low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        median = 1000 * float(torch.tensor(times[name]).median())
        quartiles = "" if name == baseline else f"{low:.2f} to {high:.2f}"
        print(f"| {name} | {median:.1f} | {middle:.2f} | {quartiles} | {peak(run):.0f} |")
    print()


def four_lines(logits: Tensor, target: Tensor) -> Tensor:
    """The loss as tutorials write it."""
    p = logits.sigmoid()
    return 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)


def family(activation: str, classes: int) -> dict[str, nn.Module]:
    """Every loss that needs no more than logits and target, and those that make maps of the target as they go."""
    facts = {"activation": activation}
    named = {
        "DiceLoss": losses.DiceLoss(**facts),
        'DiceLoss, pool="image", absent="penalize"': losses.DiceLoss(pool="image", absent="penalize", **facts),
        "DiceLoss, squared": losses.DiceLoss(squared=True, **facts),
        "JaccardLoss": losses.JaccardLoss(**facts),
        "TverskyLoss": losses.TverskyLoss(**facts),
        "FocalTverskyLoss": losses.FocalTverskyLoss(**facts),
        "GeneralizedDiceLoss": losses.GeneralizedDiceLoss(**facts),
        "LogDiceLoss": losses.LogDiceLoss(**facts),
        "LogJaccardLoss": losses.LogJaccardLoss(**facts),
        "LogTverskyLoss": losses.LogTverskyLoss(**facts),
        "CrossEntropyLoss": losses.CrossEntropyLoss(**facts),
        "FocalLoss": losses.FocalLoss(**facts),
        "TopKCrossEntropyLoss": losses.TopKCrossEntropyLoss(**facts),
        "DiceCELoss": losses.DiceCELoss(**facts),
        "DiceFocalLoss": losses.DiceFocalLoss(**facts),
    }
    ids = {"classes": classes} if activation == "softmax" else {}
    image = losses.DiceLoss(pool="image", **facts)
    return named | {
        "LesionWiseLoss": losses.LesionWiseLoss(image, **ids),
        "BoundaryLoss": losses.BoundaryLoss(**facts, **ids),
        "BoundaryWeightedLoss": losses.BoundaryWeightedLoss(losses.DiceLoss(**facts)),
        "HausdorffLoss": losses.HausdorffLoss(**facts, **ids),
        "ClDiceLoss": losses.ClDiceLoss(**facts),
        "SkeletonRecallLoss": losses.SkeletonRecallLoss(**facts, **ids),
    }


def blobs(images: int, classes: int, size: int) -> Tensor:
    """Ids of smooth regions, the background being the largest."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images, classes, size // 16, size // 16, generator=generator)
    noise[:, 0] += 1
    return nn.functional.interpolate(noise, size=(size, size), mode="bilinear").argmax(1)


def main() -> None:
    """The family on one task of each kind, then the peers."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    z, mask = torch.randn(4, 1, 512, 512, requires_grad=True), blobs(4, 2, 512).unsqueeze(1)
    steps = {name: step(loss, z, mask) for name, loss in family("sigmoid", 1).items()}
    show("Losses, sigmoid, 4x1x512x512, target int64", steps, "DiceLoss")
    logits, ids = torch.randn(4, 8, 256, 256, requires_grad=True), blobs(4, 8, 256)
    steps = {name: step(loss, logits, ids) for name, loss in family("softmax", 8).items()}
    show("Losses, softmax, 4x8x256x256, target ids", steps, "DiceLoss")

    planes = mask.float()
    binary = {
        "lightning_dice.DiceLoss": step(losses.DiceLoss(), z, planes),
        "the four lines": step(four_lines, z, planes),
        "monai DiceLoss": step(monai.losses.DiceLoss(sigmoid=True, batch=True), z, planes),
        "smp DiceLoss": step(smp.losses.DiceLoss("binary"), z, planes),
    }
    show("Dice, sigmoid, 4x1x512x512, float target", binary, "lightning_dice.DiceLoss")
    softmax = {
        "lightning_dice.DiceLoss": step(losses.DiceLoss(activation="softmax"), logits, ids),
        "monai DiceLoss": step(monai.losses.DiceLoss(softmax=True, to_onehot_y=True, batch=True), logits, ids[:, None]),
        "smp DiceLoss": step(smp.losses.DiceLoss("multiclass"), logits, ids),
        "lightning_dice.DiceCELoss": step(losses.DiceCELoss(activation="softmax"), logits, ids),
        "monai DiceCELoss": step(
            monai.losses.DiceCELoss(softmax=True, to_onehot_y=True, batch=True), logits, ids[:, None]
        ),
    }
    show("Dice, softmax, 4x8x256x256, ids", softmax, "lightning_dice.DiceLoss")


if __name__ == "__main__":
    main()
