"""How much memory a large volume takes, beyond the network's own, and how long: `python -m tests.benchmarks.volume`."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
from torch import nn

from lightning_dice.inference import Predictor, SlidingWindow

CLASSES = 14


def peak() -> float:
    """The most memory that this process has had at once, GB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e6 if sys.platform.startswith("linux") else used / 1e9


def measure(space: tuple[int, ...], size: tuple[int, ...], window: int) -> tuple[float, float, float]:
    """GB before, GB at most, and seconds, of the labels `size` of a volume of `space`; in a process of its own."""
    import monai.data.utils  # noqa: F401  # What it imports is not of the volume.

    torch.manual_seed(0)
    net = nn.Conv3d(1, CLASSES, 1).eval()
    predictor = Predictor([net], SlidingWindow([window] * 3, batch_size=1), activation="softmax")
    predictor.labels(torch.zeros(1, *[window] * 3))  # The libraries' own memory, and the network's for a window.
    image = torch.randn(1, *space)
    before, start = peak(), time.perf_counter()
    labels = predictor.labels(image, size)
    seconds = time.perf_counter() - start
    if tuple(labels.shape) != size or labels.dtype != torch.uint8:
        raise RuntimeError(f"labels must be uint8 {size}, got {labels.dtype} {tuple(labels.shape)}")
    return before, peak(), seconds


def main() -> None:
    """Measure each case in a process of its own, since a peak does not go down again, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="volumes of a tenth of the size")
    parser.add_argument("--case", nargs=7, type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        *sizes, window = chosen.case
        print(*measure(tuple(sizes[:3]), tuple(sizes[3:]), window))
        return
    part = 10 if chosen.quick else 1
    cases = {
        "as it is": ((512, 512, 400), (512, 512, 400)),
        "from half its resolution": ((256, 256, 200), (512, 512, 400)),
    }
    print(
        f"**Labels of a volume, {CLASSES} classes, one 1x1x1 convolution, CPU, {torch.get_num_threads()} threads**\n\n"
        "| volume | labels | logits, all of them | memory beyond image and network | s |\n|---|---|---|---|---|"
    )
    for name, (space, size) in cases.items():
        space, size = (tuple(length // part for length in axes) for axes in (space, size))
        arguments = [*map(str, (*space, *size)), str(96 // part)]
        line = [sys.executable, "-m", "tests.benchmarks.volume", "--case", *arguments]
        printed = subprocess.run(line, capture_output=True, text=True, check=True).stdout
        before, most, seconds = map(float, printed.split())
        logits = CLASSES * 4 * torch.Size(size).numel() / 1e9
        shown = "x".join(map(str, size))
        print(f"| {name} | {shown} | {logits:.2f} GB | {most - before:.2f} GB | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
