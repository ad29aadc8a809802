"""The metrics of a module: one collection for each stage, computed over the epoch and logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import lightning as L
from torch import Tensor
from torchmetrics import Metric, MetricCollection

Stage = Literal["train", "val", "test"]


class MetricLogging(L.LightningModule):
    """Base of `SegmentationModule`: keeps the metrics of every stage, and logs them at the end of each epoch.

    Attributes:
        train_metrics, val_metrics, test_metrics: clones of the module's metrics.
        class_names: a name for each channel of the logits, for logging; `class 0`, `class 1` ... by default.
    """

    train_metrics: MetricCollection
    val_metrics: MetricCollection
    test_metrics: MetricCollection
    class_names: list[str] | None

    def set_metrics(self, metrics: Metric | MetricCollection | Mapping[str, Metric]) -> None:
        """Make the collections of every stage.

        Args:
            metrics: a metric, which is then named `dice`, or named metrics.
        """
        if isinstance(metrics, Metric):
            metrics = {"dice": metrics}
        # Without compute groups: metrics whose states are equal after the first batch would share a state forever.
        collection = (
            metrics if isinstance(metrics, MetricCollection) else MetricCollection(dict(metrics), compute_groups=False)
        )
        self.train_metrics = collection.clone(prefix="train/")
        self.val_metrics = collection.clone(prefix="val/")
        self.test_metrics = collection.clone(prefix="test/")

    def on_train_epoch_end(self) -> None:
        """Log the epoch's metrics."""
        self._log_metrics("train")

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test set."""
        self._log_metrics("test")

    def update_metrics(self, stage: Stage, logits: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Add a batch to the metrics of a stage.

        Returns:
            In training, the value of each metric for the batch alone, by name.
        """
        if stage != "train":
            self._metrics(stage).update(logits, mask)
            return {}
        values = self.train_metrics(logits, mask)
        return {name.removeprefix("train/"): mean_of_classes(value) for name, value in values.items()}

    def _metrics(self, stage: Stage) -> MetricCollection:
        return {"train": self.train_metrics, "val": self.val_metrics, "test": self.test_metrics}[stage]

    def _log_metrics(self, stage: Stage) -> None:
        metrics = self._metrics(stage)
        if not any(metric.update_called for metric in metrics.values()):
            return  # A subclass's step may not update them.
        # The progress bar, on the first rank alone, reads the logged values, which are then reduced over all ranks. If
        # that met the reduction of the metrics below on other ranks, both would wait forever: so all ranks read first.
        _ = self.trainer.callback_metrics
        for name, value in metrics.compute().items():
            # A metric's value is the same on every rank; reduced again only so that Lightning does not warn. By max, as
            # the mean of equal numbers may be rounded.
            self.log(name, mean_of_classes(value), prog_bar=stage == "val", sync_dist=True, reduce_fx="max")
            if value.ndim == 1:
                for class_name, score in zip(self._class_names(value.numel()), value, strict=True):
                    if not score.isnan():
                        self.log(f"{name}/{class_name}", score, sync_dist=True, reduce_fx="max")
        metrics.reset()

    def _class_names(self, classes: int) -> list[str]:
        names = self.class_names or [f"class {index}" for index in range(classes)]
        if len(names) != classes:
            raise ValueError(f"class_names must name each of the {classes} classes, got {names}")
        return names


def mean_of_classes(value: Tensor) -> Tensor:
    """Return the mean over the classes that have a value."""
    return value.float().nanmean()
