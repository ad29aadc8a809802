"""The metrics of a module: one collection for each stage, computed over the epoch and logged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.segmentation import MeanIoU
from torchmetrics.wrappers.abstract import WrapperMetric

from lightning_dice.library_internals.lightning import attached_trainer
from lightning_dice.library_internals.torch import copy_without_hooks
from lightning_dice.library_internals.torchmetrics import compute_alone
from lightning_dice.metric_inputs import MetricInputs, prepare_metric
from lightning_dice.metrics import DiceScore

Stage = Literal["train", "val", "test"]
Metrics = Metric | MetricCollection | Mapping[str, Metric] | Sequence[Metric]


class MetricLogging(L.LightningModule):
    """Base of `SegmentationModule`: keeps the metrics of every stage, and logs them at the end of each epoch.

    Attributes:
        train_metrics, val_metrics, test_metrics: clones of the module's metrics.
        loss: its `ignore_index` is also that of metrics that have none.
        class_names: a name for each channel of the logits, for logging; `class 0`, `class 1` ... by default.
        activation: `"sigmoid"` or `"softmax"`; by default the loss's.
        threshold: a probability above which a pixel is foreground; for a sigmoid only.
    """

    train_metrics: MetricCollection
    val_metrics: MetricCollection
    test_metrics: MetricCollection
    loss: nn.Module
    class_names: list[str] | None
    activation: Literal["sigmoid", "softmax"] | None
    threshold: float

    def set_metrics(self, metrics: Metrics) -> None:
        """Make the collections of every stage; the loss must have been set.

        Args:
            metrics: a metric, which is then named `dice`, named metrics, or a list of metrics, named as their classes.

        Raises:
            ValueError: something that is no metric, a metric that cannot score a segmentation, or a name that is taken.
        """
        named = _named_metrics(metrics)
        for name, metric in named.items():
            if name == "loss":
                raise ValueError("a metric must not be named 'loss': the loss is logged under that name")
            try:
                prepare_metric(metric, self._ignored_label())
            except ValueError as error:
                raise ValueError(f"metric {name!r}, a {type(metric).__name__}: {error}") from error
        postfix = metrics.postfix if isinstance(metrics, MetricCollection) else None
        # Without compute groups: metrics whose states are equal after the first batch would share a state forever.
        collection = MetricCollection({**named}, compute_groups=False, postfix=postfix)
        self.train_metrics = collection.clone(prefix="train/")
        self.val_metrics = collection.clone(prefix="val/")
        self.test_metrics = collection.clone(prefix="test/")
        # The collections of each loader that is being evaluated; the first is the module's own. In a list, so that they
        # are no part of the module.
        self._loaders: dict[Stage, list[MetricCollection]] = {}
        self._channels: int | None = None
        self._updated: set[Stage] = set()
        self._probed: set[Stage] = set()

    def on_train_epoch_start(self) -> None:
        """Remove what an interrupted epoch has counted; Lightning does not call this in the middle of a resumed one."""
        self._reset_metrics("train")

    def on_validation_epoch_start(self) -> None:
        """Remove what an interrupted validation has counted."""
        self._reset_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Remove what an interrupted test has counted."""
        self._reset_metrics("test")

    def on_train_epoch_end(self) -> None:
        """Log the epoch's metrics."""
        self._log_metrics("train")

    def on_train_start(self) -> None:
        """Check that all processes have batches to validate, or none: the others would wait forever.

        The number of batches of an `IterableDataset` without a length is not known.
        """
        _check_every_process(self.trainer, sum(self.trainer.num_val_batches) > 0)

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test set."""
        self._log_metrics("test")

    def update_metrics(self, stage: Stage, logits: Tensor, mask: Tensor, loader: int = 0) -> dict[str, Tensor]:
        """Add a batch to the metrics of a stage, each in the form that the metric takes.

        Args:
            stage: of the metrics.
            logits: `(batch, classes, *space)`.
            mask: `(batch, *space)` class ids or `(batch, classes, *space)` planes.
            loader: index of the data loader.

        Returns:
            In training, the value of each metric for the batch alone, by name, apart from wrappers.

        Raises:
            ValueError: in the first batch, a metric has a value that cannot be logged; or it is for other classes.
        """
        activation = self.activation or getattr(self.loss, "activation", None)
        inputs = MetricInputs(logits, mask, activation, self.threshold, self._ignored_label())
        collections = self._loaders.get(stage) or [self._metrics(stage)]
        self._channels = logits.shape[1]
        self._updated.add(stage)
        values: dict[str, Tensor] = {}
        for name, metric in collections[loader].items(keep_base=True):
            try:
                arguments = inputs.for_metric(metric)
                if stage not in self._probed and len(logits):
                    self._probe(name, metric, arguments)
                if stage == "train" and not isinstance(metric, WrapperMetric):
                    values |= self._numbers(name, metric, metric(*arguments))
                else:
                    metric.update(*arguments)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise ValueError(f"metric {name!r}, a {type(metric).__name__}: {error}") from error
        if len(logits):
            self._probed.add(stage)
        return {name: value for name, value in values.items() if "/" not in name}

    def _probe(self, name: str, metric: Metric, arguments: tuple[Tensor, Tensor]) -> None:
        """Raise if the values of a metric cannot be logged, before a whole epoch has been computed."""
        copy = copy_without_hooks(metric)
        compute_alone(copy)  # The other ranks may have no batch.
        copy.reset()
        with torch.random.fork_rng(devices=[]):  # A bootstrap must not change the random numbers of the training.
            copy.update(*arguments)
        self._numbers(name, copy, copy.compute())

    def _ignored_label(self) -> int | None:
        label = getattr(self.loss, "ignore_index", None)
        # The default of torch's losses is -100, which no mask has.
        return label if isinstance(label, int) and label != -100 else None

    def _metrics(self, stage: Stage) -> MetricCollection:
        return {"train": self.train_metrics, "val": self.val_metrics, "test": self.test_metrics}[stage]

    def _reset_metrics(self, stage: Stage) -> None:
        own, trainer = self._metrics(stage), attached_trainer(self)
        own.reset()
        self._updated.discard(stage)
        counts = (
            [] if trainer is None else {"val": trainer.num_val_batches, "test": trainer.num_test_batches}.get(stage)
        )
        # On every rank for every loader, whether the rank has a batch of it or not.
        self._loaders[stage] = [own, *(copy_without_hooks(own) for _ in (counts or [0])[1:])]

    def _log_metrics(self, stage: Stage) -> None:
        collections = self._loaders.get(stage) or [self._metrics(stage)]
        if stage not in self._updated and not any(map(_is_updated, collections)):
            return  # A subclass's step may not update them.
        # The progress bar, on the first rank alone, reads the logged values, which are then reduced over all ranks. If
        # that met the reduction of the metrics below on other ranks, both would wait forever: so all ranks read first.
        _ = self.trainer.callback_metrics
        for index, collection in enumerate(collections):
            suffix = f"/dataloader_idx_{index}" if len(collections) > 1 else ""
            for name, metric in collection.items():
                # A wrapper may remember the values that it has computed: not those of an untrained network.
                value = (copy_without_hooks(metric) if self.trainer.sanity_checking else metric).compute()
                for key, number in self._numbers(name, metric, value).items():
                    # A metric's value is the same on every rank; reduced again only so that Lightning does not warn. By
                    # max, as the mean of equal numbers may be rounded.
                    shown = stage == "val" and key == name
                    settings: dict[str, Any] = {"prog_bar": shown, "sync_dist": True, "add_dataloader_idx": not suffix}
                    self.log(key + suffix, number, reduce_fx="max", **settings)
            collection.reset()
        self._updated.discard(stage)

    def _numbers(self, name: str, metric: Metric, value: Any) -> dict[str, Tensor]:
        """Return the numbers in a value of a metric, by name: the mean over the classes first.

        A class without a score is NaN: an older value of it would stay in `callback_metrics`.

        Raises:
            ValueError: the value is no number, and has not one for each class.
        """
        if isinstance(value, Mapping):
            return {
                key: number
                for part, entry in value.items()
                for key, number in self._numbers(f"{name}/{part}", metric, entry).items()
            }
        if isinstance(value, (int, float)):
            return {name: torch.tensor(float(value), device=self.device)}
        if isinstance(value, Tensor):
            return self._numbers_of_tensor(name, metric, value.detach().float())
        raise ValueError(
            f"its value is a {type(value).__name__}, and only numbers can be logged: compute it in a callback, or "
            "choose a metric of numbers"
        )

    def _numbers_of_tensor(self, name: str, metric: Metric, value: Tensor) -> dict[str, Tensor]:
        classes = self._channels
        if value.numel() == 1 and (value.ndim != 1 or classes != 1):
            return {name: value.reshape(())}
        names = self.class_names or [f"class {index}" for index in range(classes or value.numel())]
        if classes is not None and len(names) != classes and value.ndim == 1:
            raise ValueError(f"class_names must name each of the {classes} classes, got {names}")
        parts = [part for part in metric.modules() if isinstance(part, Metric)]
        if len(value) == 2 and len(names) == 1:
            names = ["background", *names]  # A plane of a sigmoid, to a metric of exclusive classes.
        elif len(value) == len(names) - 1 and not all(getattr(part, "include_background", True) for part in parts):
            names = names[1:]
        if value.shape != (len(names),):
            raise ValueError(
                f"its value has the shape {tuple(value.shape)}, and only a number, or one for each of the {len(names)} "
                "classes, can be logged: choose an average, or compute it in a callback"
            )
        if any(isinstance(part, MeanIoU) for part in parts):
            value = value.where(value >= 0, torch.nan)  # It gives -1 to classes that no image has.
        mean = metric.mean_of_classes(value) if isinstance(metric, DiceScore) else value.nanmean()
        excluded = getattr(metric, "exclude_classes", ())
        scores = {f"{name}/{names[index]}": score for index, score in enumerate(value) if index not in excluded}
        return {name: mean, **scores}


def _named_metrics(metrics: Any) -> dict[str, Metric]:
    """Return metrics by name, those of collections within too, named as `MetricCollection` does."""
    if isinstance(metrics, MetricCollection):
        return dict(metrics.items(keep_base=True))
    if isinstance(metrics, Metric):
        metrics = {"dice": metrics}
    if isinstance(metrics, Sequence) and not isinstance(metrics, str):
        metrics = list(metrics)
    elif isinstance(metrics, Mapping):
        metrics = dict(metrics)
    else:
        raise ValueError(f"metrics must be a metric, a list of metrics or metrics by name, got {_kind(metrics)}")
    for metric in metrics if isinstance(metrics, list) else metrics.values():
        if not isinstance(metric, (Metric, MetricCollection)):
            raise ValueError(f"metrics must be metrics of torchmetrics, got {_kind(metric)}")
    try:
        collection = MetricCollection(metrics, compute_groups=False)
    except ValueError as error:
        raise ValueError(f"metrics: {error}; give each a name: metrics={{'name': metric, ...}}") from error
    return dict(collection.items(keep_base=True))


def _kind(value: Any) -> str:
    return f"{value!r}" if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


def _is_updated(collection: MetricCollection) -> bool:
    parts: Iterator[nn.Module] = collection.modules()
    return any(
        isinstance(part, Metric) and not isinstance(part, WrapperMetric) and part.update_called for part in parts
    )


def _check_every_process(trainer: L.Trainer, has_batch: bool) -> None:
    """Raise in all processes if some of them have batches to validate and others none."""
    if trainer.world_size == 1:
        return
    device = trainer.strategy.root_device
    busy = int(trainer.strategy.reduce(torch.tensor(float(has_batch), device=device), reduce_op="sum"))
    if 0 < busy < trainer.world_size:
        raise ValueError(
            f"{trainer.world_size - busy} of {trainer.world_size} processes have no batch to validate: give each at "
            "least one, by fewer processes, smaller batches or another sampler (SegmentationData does)"
        )
