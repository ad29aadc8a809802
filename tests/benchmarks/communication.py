"""What the loss's own message costs: two processes that train as one, on a CPU.

Started with `python -m tests.benchmarks.communication`; `--quick` for a few small steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_dice.losses import DiceCELoss, DiceLoss
from tests.benchmarks.timing import table

GLOBAL_BATCH = 4
LOSSES: dict[str, Callable[..., nn.Module]] = {"DiceLoss": DiceLoss, "DiceCELoss": DiceCELoss}


def images(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Images and masks of 3 % foreground."""
    generator = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    shape = (count, 1, size, size)
    return torch.randn(shape, generator=generator), (torch.rand(shape, generator=generator) < 0.03).long()


def unet() -> nn.Module:
    """The small U-Net."""
    torch.manual_seed(0)
    return smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=1)


def seconds(net: nn.Module, loss: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    """Of one step; the processes begin it together."""
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    optimizer.zero_grad()
    loss(net(batch[0]), batch[1]).backward()
    optimizer.step()
    return time.perf_counter() - start


class Messages:
    """Takes the time of the loss's all-reduces: DDP's own are sent by its C++ and do not come by here."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._send = dist.all_reduce

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """What `torch.distributed.all_reduce` does."""
        start = time.perf_counter()
        result = self._send(*arguments, **options)
        self.seconds.append(time.perf_counter() - start)
        return result


def message_seconds(loss: nn.Module, logits: Tensor, mask: Tensor, messages: Messages) -> float:
    """Of the loss's message alone, with both processes there: nobody is waited for."""
    loss(logits, mask)
    dist.barrier()
    messages.seconds.clear()
    loss(logits, mask)
    return sum(messages.seconds)


def worker(rank: int, folder: str, size: int, rounds: int) -> None:
    """Both processes' steps, with and without the message, by turns; the first writes what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    messages = Messages()
    dist.all_reduce = messages
    net = DistributedDataParallel(unet())
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    batch = images(GLOBAL_BATCH // 2, size)
    found: dict[str, Any] = {}
    for name, make in LOSSES.items():
        variants = {"across_ranks=False": make(across_ranks=False), "across_ranks=True": make()}
        times: dict[str, list[float]] = {variant: [] for variant in variants}
        within: list[float] = []
        for index in range(rounds + 2):
            for variant, loss in variants.items():
                messages.seconds.clear()
                taken = seconds(net, loss, optimizer, batch)
                if index < 2:
                    continue  # caches, allocators and DDP's buckets
                times[variant].append(taken)
                if messages.seconds:
                    within.append(sum(messages.seconds))
        logits = torch.randn(batch[1].shape, requires_grad=True)
        alone = [message_seconds(variants["across_ranks=True"], logits, batch[1], messages) for _ in range(10 * rounds)]
        found[name] = {"times": times, "within": within, "alone": alone}
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    # A process that ends while the other still talks to it may be killed by torch's own threads.
    dist.barrier()
    dist.destroy_process_group()


def single(size: int, rounds: int) -> dict[str, list[float]]:
    """Steps of one process on the whole batch."""
    net = unet()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    batch = images(GLOBAL_BATCH, size)
    found = {}
    for name, make in LOSSES.items():
        loss = make()
        found[name] = [seconds(net, loss, optimizer, batch) for _ in range(rounds + 2)][2:]
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few small steps")
    quick = parser.parse_args(arguments).quick
    size, rounds = (64, 4) if quick else (256, 15)
    one = single(size, rounds)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(worker, (folder, size, rounds), nprocs=2, start_method="spawn")
        found = json.loads(Path(folder, "found.json").read_text())
    for name, result in found.items():
        steps = {"one process, two threads": one[name]}
        steps |= {f"two processes, {variant}": times for variant, times in result["times"].items()}
        title = f"a step of a ResNet-18 U-Net on {GLOBAL_BATCH}x1x{size}x{size}, {name}"
        table(title, steps, "two processes, across_ranks=False")
        step = statistics.median(result["times"]["across_ranks=True"])
        print("| the loss's message | ms | share of the step |\n|---|---|---|")
        for what, key in (("alone", "alone"), ("within a step, waiting for the other process included", "within")):
            median = statistics.median(result[key])
            print(f"| {what} | {median * 1e3:.3f} | {median / step:.3%} |")
        print()


if __name__ == "__main__":
    main()
