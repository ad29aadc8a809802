"""Cases that need no file, and a network of one convolution: enough for a Trainer to call every hook."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_dice.data.batch import Batch, Sample


class Cases(Dataset):
    """Squares on noise."""

    def __init__(self, count=4, classes=1, activation="sigmoid", size=16, value=1):
        self.count, self.classes, self.activation, self.size, self.value = count, classes, activation, size, value

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        image = torch.randn(3, self.size, self.size, generator=torch.Generator().manual_seed(index))
        mask = torch.zeros(self.size, self.size, dtype=torch.uint8)
        mask[4:10, 2 : 6 + index % 4] = self.value
        image[:, mask > 0] += 1
        if self.activation == "sigmoid":
            mask = mask.expand(self.classes, -1, -1).clone()
        return Sample(image, mask, f"case{index:02}")


def collate(samples):
    image, mask, case, *_ = zip(*samples, strict=True)
    return Batch(torch.stack(image), torch.stack(mask), list(case))


def load(cases, batch_size=2):
    """Return a loader of cases."""
    return DataLoader(cases, batch_size, collate_fn=collate)


class Net(pl.LightningModule):
    """Trains one convolution, and logs what the callbacks look for."""

    def __init__(self, classes=1, activation="sigmoid", late_train_dice=False):
        super().__init__()
        self.net = torch.nn.Conv2d(3, classes, 1)
        self.activation, self.late_train_dice = activation, late_train_dice
        self.seen = []

    def _step(self, batch):
        logits = self.net(batch.image)
        if self.activation == "sigmoid":
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.mask.clamp(max=1).float())
        else:
            loss = torch.nn.functional.cross_entropy(logits, batch.mask.long(), ignore_index=255)
        return loss, logits.detach()

    def training_step(self, batch, batch_idx):
        loss, _ = self._step(batch)
        self.seen.append((self.current_epoch, batch_idx, *batch.case))
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.case))
        self.log("loss", loss, on_step=True, on_epoch=False, prog_bar=True, logger=False)
        return loss

    def on_train_epoch_end(self):
        if self.late_train_dice:
            self.log("train/dice", 0.25 * (self.current_epoch + 1))

    def validation_step(self, batch, batch_idx):
        loss, logits = self._step(batch)
        self.log("val/loss", loss, batch_size=len(batch.case))
        self.log("val/dice", 1 - loss, prog_bar=True, batch_size=len(batch.case))
        self.log("val/dice/object", 1 - loss, batch_size=len(batch.case))
        return {"loss": loss, "logits": logits}

    def test_step(self, batch, batch_idx):
        loss, logits = self._step(batch)
        return {"loss": loss, "logits": logits}

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
