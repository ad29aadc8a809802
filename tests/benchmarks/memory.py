"""What a training step needs beside what `plan` says it does: `python -m tests.benchmarks.memory`.

A step is that of a training by the proposal, in float32: forward, Dice + cross-entropy at each level, backward, Adam.
On the CPU its memory is what the process has had at most, less that before the network was made; on a GPU what the
allocator has reserved at most.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

import torch
from omegaconf import OmegaConf

from lightning_dice import plan
from lightning_dice.losses import DeepSupervision, DiceCELoss
from lightning_dice.models import planner
from tests.benchmarks.volume import peak

CASES = {
    "2D, 1 channel, 2 classes": ((1.0, 1.0), (512, 512), 1, 2),
    "2D, 3 channels, 20 classes": ((1.0, 1.0), (1024, 2048), 3, 20),
    "3D, 1 channel, 3 classes": ((1.0, 1.0, 1.0), (160, 160, 160), 1, 3),
    "3D, 4 channels, 4 classes": ((1.0, 1.0, 1.0), (240, 240, 155), 4, 4),
    "3D, slices of 5 mm": ((0.8, 0.8, 5.0), (512, 512, 60), 1, 2),
}
MANY = 1000  # cases, so that they do not limit the batch


def proposed(name: str, gib: float) -> planner.Proposal:
    spacing, median, channels, classes = CASES[name]
    run = OmegaConf.create({"data": {"channels": channels, "classes": [str(n) for n in range(classes)]}})
    make = partial(plan._network, run)
    return planner.propose(spacing, median, MANY, make, channels, int(gib * planner.GIB))


def measure(name: str, gib: float, device: str) -> float:
    """GiB that some training steps of the proposal needed at most; in a process of its own."""
    proposal = proposed(name, gib)
    _, _, channels, classes = CASES[name]
    run = OmegaConf.create({"data": {"channels": channels, "classes": [str(n) for n in range(classes)]}})
    shape = (proposal.batch_size, channels, *proposal.topology.size)
    torch.nn.Conv2d(1, 1, 3)(torch.zeros(1, 1, 8, 8)).sum().backward()  # The libraries' own memory.
    before = peak()
    net = plan._network(run, proposal.topology).to(device)
    optimizer = torch.optim.Adam(net.parameters())
    loss = DeepSupervision(DiceCELoss(activation="softmax"))
    image = torch.randn(shape, device=device)
    mask = torch.randint(0, classes, (shape[0], *shape[2:]), device=device)
    for _ in range(2):
        optimizer.zero_grad()
        loss(net(image), mask).backward()
        optimizer.step()
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / planner.GIB
    return (peak() - before) * 1e9 / planner.GIB


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the estimate beside what was measured, of each case and budget, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", nargs="+", type=float, default=[2.0, 6.0], help="GiB")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.case:
        print(measure(chosen.case[0], float(chosen.case[1]), chosen.device))
        return
    print(f"**Memory of a training step as planned, {chosen.device}, GiB**\n")
    print("| | budget | patch | batch | estimate | measured | measured / estimate |\n|---|---|---|---|---|---|---|")
    for name in CASES:
        for gib in chosen.budgets:
            proposal = proposed(name, gib)
            line = [
                sys.executable,
                "-m",
                "tests.benchmarks.memory",
                "--device",
                chosen.device,
                "--case",
                name,
                str(gib),
            ]
            found = float(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
            estimate = proposal.memory / planner.GIB
            patch = "x".join(map(str, proposal.topology.size))
            print(
                f"| {name} | {gib:g} | {patch} | {proposal.batch_size} | {estimate:.2f} | {found:.2f} "
                f"| {found / estimate:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
