"""How long a training step on the CPU waits for its images: `python -m tests.benchmarks.pipeline`.

Pictures of 512x512 as PNG, augmented as by default, two workers, a ResNet-18 U-Net. Workers share the cores with the
network, so that two things count: what a step waits, and by how much it is slower than with batches at hand.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import lightning as L
import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from scipy import ndimage

from lightning_dice import DiceLoss
from lightning_dice.cli.config import CONF_DIR, instantiate, register_resolvers
from lightning_dice.data import Batch, Sample, SegmentationData
from lightning_dice.data.images.image_reader import read_image

SIZE = 512  # pixels
IGNORED = 255  # what a rotation fills


class Times(NamedTuple):
    """Seconds of each step.

    Attributes:
        waited: for the batch.
        whole: with that.
        busy: processor time of all cores, without the wait.
    """

    waited: list[float]
    whole: list[float]
    busy: list[float]


class Held:
    """Cases that were decoded before, and lie in memory that workers share with the process they were forked from."""

    def __init__(self, cases: Any) -> None:
        self.sizes: Sequence[tuple[int, ...]] = cases.sizes
        self.samples: list[Sample] = [cases[index] for index in range(len(cases))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


class HeldSource:
    """A source whose training cases are held."""

    def __init__(self, source: Any) -> None:
        self.source, self.held = source, Held(source.split("train"))

    def check(self) -> str:
        return ""

    def split(self, name: str) -> Any:
        return self.held if name == "train" else None


def draw(folder: Path, count: int) -> None:
    """Pictures like photographs: blurred noise with grain, which PNG cannot compress by much, and round objects."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind / "train").mkdir(parents=True)
    for number in range(count):
        noise = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE, 3)), (8, 8, 0))
        mask = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), 12) > 0.04
        shades = 110 + 60 * noise / noise.std() + 30 * mask[..., None] + 6 * rng.standard_normal((SIZE, SIZE, 3))
        Image.fromarray(shades.clip(0, 255).astype(np.uint8)).save(folder / "images" / "train" / f"{number}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / "train" / f"{number}.png")


def train(batches: Callable[[], Iterator[Batch]], steps: int, device: torch.device) -> Times:
    """Train on these batches; the first two, for which workers start, do not count."""
    torch.manual_seed(0)
    net = smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=1).to(
        device, memory_format=torch.channels_last
    )
    optimizer, loss = torch.optim.AdamW(net.parameters()), DiceLoss(ignore_index=IGNORED)
    waited, whole, busy = [], [], []
    coming = batches()
    for _ in range(steps + 2):
        start = time.perf_counter()
        batch = next(coming)
        there, before = time.perf_counter(), time.process_time()
        image = batch.image.to(device, memory_format=torch.channels_last)
        optimizer.zero_grad()
        loss(net(image), batch.mask.to(device)).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        waited.append(there - start)
        whole.append(time.perf_counter() - start)
        busy.append(time.process_time() - before)
    return Times(waited[2:], whole[2:], busy[2:])


def endless(data: SegmentationData) -> Iterator[Batch]:
    """The epochs' batches, one after the other, as a Trainer takes them."""
    loader = data.train_dataloader()
    for epoch in range(10**6):
        sampler: Any = loader.sampler
        sampler.set_epoch(epoch)
        yield from loader


def milliseconds(work: Callable[[], Any], rounds: int = 15) -> float:
    """The median of some calls by one thread, as in a worker; of processor time, which other programs leave alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    torch.set_num_threads(threads)
    return statistics.median(times) * 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what an image costs a worker, and what each way of loading costs a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    L.seed_everything(0, verbose=False)
    device = torch.device(options.device)
    register_resolvers()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw(root, 6 * options.batch)
        overrides = [f"data.root={root}", f"data.patch_size=[{SIZE},{SIZE}]", f"data.batch_size={options.batch}"]
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            config = hydra.compose(
                "fit", ["data=folder", f"folder={root}", f"data.num_workers={options.workers}", *overrides]
            )
        made: SegmentationData = instantiate(config.data.datamodule, "data")

        def of(source: Any, workers: int) -> SegmentationData:
            data = SegmentationData(
                source,
                batch_size=options.batch,
                num_workers=workers,
                augment=made.augment,
                normalize=made.normalize,
                ignore_index=IGNORED,
            )
            data.prepare_data()
            data.setup("fit")
            return data

        cases: Any = made.source.split("train")
        sample = cases[0]
        one = of(HeldSource(made.source), 0)
        prepared: Any = one._prepare(one.augment, None)
        picture = cases.pairs[0].image
        print(f"**An image of {SIZE}x{SIZE} in a worker, {picture.stat().st_size / 1e3:.0f} kB of PNG**\n")
        print("| | ms of one core |\n|---|---|")
        print(f"| decode the picture | {milliseconds(lambda: read_image(picture)):.1f} |")
        print(f"| picture and mask as a sample | {milliseconds(lambda: cases[0]):.1f} |")
        print(f"| augment and normalize | {milliseconds(lambda: prepared(sample)):.1f} |\n")

        ready = list(islice(endless(one), options.steps + 2))
        variants: dict[str, Callable[[], Iterator[Batch]]] = {
            "batches in memory": lambda: iter(ready),
            f"decoded from PNG by {options.workers} workers": lambda: endless(of(made.source, options.workers)),
            f"decoded before, {options.workers} workers": lambda: endless(of(HeldSource(made.source), options.workers)),
        }
        found = {name: [train(batches, options.steps, device)] for name, batches in variants.items()}
        for name, batches in variants.items():  # A second round, as the machine is not always equally busy.
            found[name].append(train(batches, options.steps, device))
    shape = f"{options.batch}x3x{SIZE}x{SIZE}"
    print(f"**A step of a ResNet-18 U-Net, {shape}, {options.device}, {torch.get_num_threads()} threads**\n")
    print("| | ms | of all cores | waits, share of the time | longest wait, ms |\n|---|---|---|---|---|")
    for name, rounds in found.items():
        waited = [seconds for times in rounds for seconds in times.waited]
        whole = [seconds for times in rounds for seconds in times.whole]
        share = sum(waited) / sum(whole)
        busy = statistics.median(seconds for times in rounds for seconds in times.busy)
        step = statistics.median(whole)
        print(f"| {name} | {step * 1e3:.0f} | {busy * 1e3:.0f} | {share:.2%} | {max(waited) * 1e3:.0f} |")
    print()


if __name__ == "__main__":
    main()
