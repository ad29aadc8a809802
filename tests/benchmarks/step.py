"""What a training step costs beyond the network: against a bare loop, and against a stock LightningModule."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable
from functools import partial

import lightning as L
import rich
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.segmentation import DiceScore as TorchmetricsDice

from lightning_dice import DiceLoss, SegmentationModule
from lightning_dice.callbacks import ProgressBar
from tests.benchmarks.timing import interleaved, table

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Clock(L.Callback):
    """Seconds of a step, the first few left out."""

    def __init__(self, skip: int) -> None:
        self.skip, self.start, self.seconds = skip, 0.0, 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.skip:
            self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module):
        self.seconds = (time.perf_counter() - self.start) / (trainer.num_training_batches - self.skip)


class Stock(L.LightningModule):
    """What one writes with Lightning alone; with a torchmetrics Dice if asked for."""

    def __init__(self, net: nn.Module, *, metric: bool) -> None:
        super().__init__()
        self.net, self.criterion = net, DiceLoss()
        self.metric = TorchmetricsDice(num_classes=1, input_format="one-hot") if metric else None

    def training_step(self, batch, batch_idx):
        image, mask = batch
        logits = self.net(image)
        loss = self.criterion(logits, mask)
        if self.metric is not None:
            self.metric.update(logits > 0, mask)
            self.log("train/dice", self.metric, on_step=False, on_epoch=True, batch_size=len(image))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(image))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def bare(net: nn.Module, batches: Batches, skip: int) -> float:
    """Seconds of a step of the loop that everybody writes."""
    criterion, optimizer = DiceLoss(), torch.optim.AdamW(net.parameters(), lr=1e-3)
    start = 0.0
    for index, (image, mask) in enumerate(batches):
        if index == skip:
            start = time.perf_counter()
        optimizer.zero_grad()
        criterion(net(image), mask).backward()
        optimizer.step()
    return (time.perf_counter() - start) / (len(batches) - skip)


def trained(make: Callable[[], L.LightningModule], batches: Batches, skip: int, *, bar: L.Callback | None) -> float:
    """Seconds of a step in a Trainer."""
    clock = Clock(skip)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bar is not None,
        callbacks=[clock, *([bar] if bar else [])],
    )
    trainer.fit(make(), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return clock.seconds


def unseen_bar() -> ProgressBar:
    """A bar that is drawn as in a terminal, to nowhere."""
    bar = ProgressBar()
    bar._console_kwargs = {"force_terminal": True, "file": open(os.devnull, "w")}  # noqa: SIM115
    rich.reconfigure(force_terminal=True)  # Lightning undoes it at the end of each fit.
    return bar


def random_batches(count: int, *, channels: int, size: int) -> Batches:
    """Images and masks of 3 % foreground."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, channels, size, size)
    return [
        (torch.randn(shape, generator=generator), (torch.rand(4, 1, size, size, generator=generator) < 0.03).long())
        for _ in range(count)
    ]


def main() -> None:
    """Print both comparisons."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)

    unet = partial(smp.Unet, "resnet18", encoder_weights=None, in_channels=3, classes=1)
    batches = random_batches(14, channels=3, size=128)
    variants = {
        "bare PyTorch loop": lambda: bare(unet(), batches, 4),
        "Trainer, SegmentationModule, metric, log and bar": lambda: trained(
            lambda: SegmentationModule(unet()), batches, 4, bar=unseen_bar()
        ),
    }
    table("a step of a ResNet-18 U-Net, 4x3x128x128", interleaved(variants, 9), "bare PyTorch loop")

    def conv() -> nn.Module:
        return nn.Conv2d(3, 1, 1)

    batches = random_batches(240, channels=3, size=64)
    variants = {
        "stock LightningModule": lambda: trained(lambda: Stock(conv(), metric=False), batches, 40, bar=None),
        "the same with a torchmetrics Dice": lambda: trained(lambda: Stock(conv(), metric=True), batches, 40, bar=None),
        "SegmentationModule, metric, log and bar": lambda: trained(
            lambda: SegmentationModule(conv()), batches, 40, bar=unseen_bar()
        ),
    }
    table("a step of one convolution, 4x3x64x64", interleaved(variants, 9), "stock LightningModule")


if __name__ == "__main__":
    main()
