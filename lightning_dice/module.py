"""The LightningModule that joins a network, a loss and metrics, and knows no concrete one of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric, MetricCollection

from lightning_dice.argument_checks import check_choice, check_count
from lightning_dice.functional import hard_prediction, hard_target, micro_batched, pad_to_multiple, read_logits
from lightning_dice.functional.model_outputs import crop_to, resize_to
from lightning_dice.functional.target_resizing import pad_target
from lightning_dice.inference import Inference, PostProcessing, Predictor, find_postprocessing
from lightning_dice.inference.logit_resampling import resized
from lightning_dice.library_internals.lightning import attached_trainer
from lightning_dice.loading import _TRUSTED, build, check_targets, without_pretrained
from lightning_dice.losses import DeepSupervision, DiceLoss, SegmentationLoss
from lightning_dice.losses.base import call_torch_loss
from lightning_dice.metrics import DiceScore
from lightning_dice.renamed_settings import refuse_old_config

if TYPE_CHECKING:
    from typing_extensions import Self

Stage = Literal["train", "val", "test"]
RateScaling = Literal["linear", "sqrt"]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

_CERTAIN = 50.0  # A logit; its probability is 1 to rounding, and its exponential far from float32's limits.


class SegmentationModule(L.LightningModule):
    """Trains any segmentation network on any loss of logits and target.

    Made to be subclassed: override `configure_optimizers`, `training_step`, `predict_step` or nothing.

    It logs `train/loss`, `val/loss` and `test/loss`, each a mean over the epoch's images, and for each metric its
    value over the epoch: `val/dice`, say, for a metric named `dice`. A metric that returns one value for each of
    several classes is logged as the mean over those that have one, and each as `val/dice/<class name>`. A loss of
    several terms logs each of them too: `val/loss/<term>`.

    In an evaluation every image has its loss by itself, whatever the loss pools, and the mean over the images is
    logged: `val/loss` and `test/loss` depend neither on the size of a batch nor on the number of processes. An image
    without a pixel that counts has a loss of 0. In training the loss is that of the batch, which is what is minimized;
    with `pool="batch"` the two are different numbers.

    Args:
        net: takes images `(batch, channels, *space)` and returns logits `(batch, classes, *space)`: as a tensor, a
            mapping with `out` or `logits`, an object with `.logits`, or a list, finest first (deep supervision: in
            training every level has its loss, as `DeepSupervision` says). Logits smaller than the image are resized;
            coarser levels keep their size, and the mask is reduced to it.
        loss: a module called with `(logits, mask)`; `DiceLoss()` by default. One of this library also gets what the
            batch has of `weight`, `annotated` and `maps`.
        metrics: a metric, which is then named `dice`, or named metrics, updated with `(logits, mask)`;
            `DiceScore(average="none")` by default, which is for one channel.
        optimizer: called with the parameters; AdamW with a rate of 1e-3 by default.
        scheduler: called with the optimizer; none by default.
        class_names: a name for each channel of the logits, for logging; `class 0`, `class 1` ... by default.
        activation: `"sigmoid"` or `"softmax"`, by which `predict_step` makes masks; the loss's by default.
        threshold: a probability, above which `predict_step` calls a pixel foreground; not for softmax.
        size_divisor: images are padded to multiples of it, in pixels, before the network, and logits are cropped
            afterwards: the stride of the network's coarsest features.
        channels_last: keep 2D images and the network's 2D weights with channels as the fastest axis, which convolutions
            run faster on; the numbers differ by rounding alone.
        micro_batch_size: the most images that go through the network at once, for a batch that does not fit the memory
            in one piece; all of them by default. The loss is still one loss of the whole batch, and so is its gradient,
            of whatever loss, at the cost of one more forward pass; see below.
        interval: when the scheduler steps: `"epoch"` or `"step"`.
        monitor: the metric that a scheduler such as `ReduceLROnPlateau` watches.
        inference: how evaluation and prediction make logits and labels: windows, flips, thresholds, see
            `lightning_dice.inference.Inference`; by default the whole image at once, and labels by `threshold`. It has
            no part in training.
        lr_scaling: how the learning rate of every parameter group follows the number of processes n, each of which has
            a batch of its own: `"linear"`, times n; `"sqrt"`, times the root of n; `None`: not at all. The scheduler
            starts from the scaled rate; rates that it sets itself (`eta_min`, `max_lr`) stay as they are. Accumulated
            batches do not count, and without a Trainer n is 1.

    Raises:
        ValueError: a setting out of its range.

    In an evaluation logits are resized to the space axes of the mask, where the image was resampled, and with windows
    or flips images are taken one by one. Where `inference` decides otherwise than by `threshold`, the metrics count the
    decided labels, whatever thresholds they have, so that they score what `predict` writes. The loss is that of the
    logits. Processes may have different numbers of windows: a network that communicates in its forward pass, as under
    FSDP, cannot have them in an evaluation on several processes.

    With `micro_batch_size` the memory holds the activations of one micro-batch and the logits of all, since the network
    runs again on each micro-batch when its backward begins. Batch norm normalizes within a micro-batch and updates its
    running statistics once for each, as it would in smaller batches. The second run repeats torch's random numbers
    (dropout), not those of `random` or numpy, and calls forward hooks again; a hook that works on activations only once
    must detach them. With `SyncBatchNorm` all ranks need the same number of micro-batches.

    A Trainer's `accumulate_grad_batches` instead takes the mean of the losses of several batches, which for a ratio
    over the batch, as in `DiceLoss(pool="batch")`, is another loss. The two combine: each of those batches is then
    exact in itself.

    Batches: a `lightning_dice.data.Batch`, a pair or triple `(image, mask[, case])`, or a mapping with these keys, and
    perhaps `weight`, `annotated` and `maps`.

    >>> module = SegmentationModule(nn.Conv2d(3, 1, 1))
    >>> module(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        net: nn.Module,
        loss: nn.Module | None = None,
        metrics: Metric | MetricCollection | Mapping[str, Metric] | None = None,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        *,
        class_names: Sequence[str] | None = None,
        activation: Literal["sigmoid", "softmax"] | None = None,
        threshold: float = 0.5,
        size_divisor: int = 1,
        channels_last: bool = False,
        micro_batch_size: int | None = None,
        interval: Literal["epoch", "step"] = "epoch",
        monitor: str = "val/dice",
        lr_scaling: RateScaling | None = None,
        inference: Inference | None = None,
    ) -> None:
        super().__init__()
        if size_divisor < 1:
            raise ValueError(f"size_divisor must be an integer >= 1, got {size_divisor!r}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be a probability in (0, 1), got {threshold!r}")
        self.net = net
        self.loss = loss if loss is not None else DiceLoss()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.activation = activation
        self.threshold = threshold
        self.size_divisor = size_divisor
        self.channels_last = channels_last
        if micro_batch_size is not None:
            check_count("micro_batch_size", micro_batch_size, optional=True)
        self.micro_batch_size = micro_batch_size
        if channels_last:
            for parameter in net.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.inference = inference if inference is not None else Inference()
        # Of images, as the run's config has it; known by what loads a trained module.
        self._normalize: Callable[[Tensor], Tensor] | str | list[str] | None = None
        self._white: float | None = None  # The stored value that is 1, where it is not that of the type.
        self.interval = interval
        self.monitor = monitor
        self.lr_scaling: RateScaling | None = check_choice("lr_scaling", lr_scaling, ("linear", "sqrt", None))
        if metrics is None:
            metrics = DiceScore(average="none")
        if isinstance(metrics, Metric):
            metrics = {"dice": metrics}
        # Without compute groups: two metrics would share a state for ever if it were equal after the first batch.
        collection = (
            metrics if isinstance(metrics, MetricCollection) else MetricCollection(dict(metrics), compute_groups=False)
        )
        self.train_metrics = collection.clone(prefix="train/")
        self.val_metrics = collection.clone(prefix="val/")
        self.test_metrics = collection.clone(prefix="test/")

    @classmethod
    def from_run(
        cls,
        folder: str | Path,
        checkpoint: str = "best",
        *,
        map_location: Any = "cpu",
        calibration: str | Path = "auto",
    ) -> Self:
        """The trained module of a run, in evaluation mode, with nothing but its checkpoint and its calibration.

        No code is run that a checkpoint may hold; the names in its config are imported and called.

        Args:
            folder: of the run.
            checkpoint: `"best"`, `"last"`, or the path of a checkpoint file, within `folder` or not.
            map_location: where the weights go, as in `torch.load`.
            calibration: `"auto"`: the run's `calibration.json`, if it has one; `"none"`; or the path of one. See
                `lightning_dice.inference.find_postprocessing`.

        Raises:
            FileNotFoundError: there is no such checkpoint or calibration; the message says what is there.
            ValueError: it is no checkpoint of a run, or one of another class than the one that is called; or the
                calibration cannot be read, or is that of another checkpoint.
        """
        checkpoints = Path(folder).expanduser() / "checkpoints"
        named = checkpoint in ("best", "last")
        path = checkpoints / f"{checkpoint}.ckpt" if named else Path(folder).expanduser() / checkpoint
        if not checkpoints.parent.is_dir():
            raise FileNotFoundError(f"folder must be that of a run, got {folder}, which is none")
        if not path.is_file():
            there = ", ".join(sorted(file.name for file in checkpoints.glob("*.ckpt"))) or "nothing"
            raise FileNotFoundError(f"there is no {path}; in {checkpoints} there is {there}")
        saved = torch.load(path, map_location=map_location, weights_only=True)
        config = saved.get("config") if isinstance(saved, dict) else None
        if not isinstance(config, dict) or "module" not in config or "state_dict" not in saved:
            raise ValueError(f"{path} is not a checkpoint that fit has written: it holds no config of a module")
        refuse_old_config(config, path)
        module = build(without_pretrained(config["module"]))
        if not isinstance(module, cls):
            raise ValueError(f"{path} is of a {type(module).__name__}, not of a {cls.__name__}")
        module.load_state_dict(saved["state_dict"])
        module.calibrate(find_postprocessing(folder, calibration, path))
        data = config.get("data", {})
        module._normalized_by(config.get("normalize"), data.get("normalization"))
        module._white = data.get("max_value")
        return module.to(map_location).eval() if isinstance(map_location, (str, torch.device)) else module.eval()

    @classmethod
    def from_safetensors(cls, path: str | Path, *, map_location: str = "cpu", trusted: Sequence[str] = ()) -> Self:
        """The module of a file that `lightning_dice.export format=safetensors` wrote, in evaluation mode.

        The file holds no code. The config in its header names classes, which are called: those of this library, torch,
        torchvision, torchmetrics, segmentation-models-pytorch and MONAI's networks, and what you trust.

        Args:
            path: of the file.
            map_location: the device for the weights.
            trusted: packages or modules whose classes may be called too, such as that of your own network.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not such a file, or its config names something that is not trusted.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(Path(path).expanduser(), framework="pt", device=map_location) as file:
                facts = json.loads((file.metadata() or {}).get("lightning_dice") or "{}")
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
        if not isinstance(facts.get("module"), dict):
            raise ValueError(f"{path} was not written by lightning_dice.export: its header holds no config of a module")
        refuse_old_config({"module": facts["module"]}, path)
        try:
            check_targets(facts["module"], (*_TRUSTED, *trusted))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; trusted=[...] adds to these what you trust") from error
        module = build(without_pretrained(facts["module"]))
        if not isinstance(module, cls):
            raise ValueError(f"{path} is of a {type(module).__name__}, not of a {cls.__name__}")
        module.load_state_dict(weights)
        names = {entry.name for entry in dataclasses.fields(PostProcessing)}
        module.calibrate(
            PostProcessing(**{key: value for key, value in facts["postprocessing"].items() if key in names})
        )
        normalization = facts.get("normalization") or {}
        transform, known = normalization.get("transform"), normalization.get("intensities")
        try:
            check_targets(transform, (*_TRUSTED, *trusted))
        except ValueError:
            transform, known = None, str(transform and transform.get("_target_"))  # The weights are of use without it.
        module._normalized_by(transform, known)
        return module.to(map_location).eval()

    def _normalized_by(self, transform: Any, known: str | list[str] | None) -> None:
        """Normalize what `segment` gets by a config; or refuse to, where nothing but a name is known."""
        # A partial, as a module of torch would become a part of this one.
        self._normalize = known or (partial(build(transform)) if transform else None)

    def calibrate(self, decision: PostProcessing) -> None:
        """Decide by what a calibration has found, wherever `inference` leaves it open."""
        self.inference = copy(self.inference)
        self.inference.postprocessing = self.inference.postprocessing.filled(decision)

    def predictor(self, device: torch.device | str | None = None) -> Predictor:
        """What makes logits and labels of single images by this module's settings.

        Args:
            device: where the module is; that of its parameters by default.

        Raises:
            ValueError: there is no activation.
        """
        return Predictor(
            [self],
            self.inference.window,
            self.inference.mirroring,
            self.inference.postprocessing,
            activation=self._activation(),
            threshold=self.threshold,
            device=self.device if device is None else device,
        )

    def evaluated(self, image: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """Logits `(batch, classes, *size)` of images `(batch, channels, *space)`, as `inference` says.

        Args:
            image: on the module's device, as the logits.
            size: the space axes of the logits, by linear interpolation; those of the image by default.
        """
        space = tuple(image.shape[2:])
        size = space if size is None else size
        if not len(image):
            return self._no_logits(image, size)
        if self.inference.plain:
            logits: Tensor = self(image)
            return logits if size == space else torch.stack([_resized(one, size) for one in logits])
        predictor = self.predictor(image.device)
        # Put together where they are wanted: the predictor's slabs may lie on the host.
        return torch.stack([predictor.logits(one, size).to(image.device) for one in image])

    def _no_logits(self, image: Tensor, size: tuple[int, ...]) -> Tensor:
        """Logits of no image. The network runs, as `levels` says, on no more than it does otherwise."""
        window = self.inference.window
        if window is not None:
            image = image.new_zeros(0, image.shape[1], *window.size)
        logits: Tensor = self(image)
        return logits.new_zeros(0, logits.shape[1], *size)

    def levels(self, image: Tensor) -> list[Tensor]:
        """Logits of every output of the network, finest first, the first at the size of the padded image.

        For a batch of no image, as a process with fewer batches than others gets in an evaluation, the network runs on
        one of zeros: few can take none, and where processes send weights or buffers all must run it equally often.
        """
        if not len(image) and not self.training:
            return [level[:0] for level in self.levels(image.new_zeros(1, *image.shape[1:]))]
        padded = pad_to_multiple(image, self.size_divisor)
        if self.channels_last and padded.ndim == 4:
            padded = padded.contiguous(memory_format=torch.channels_last)
        if self.micro_batch_size is None:
            finest, *coarser = read_logits(self.net(padded))
        else:
            finest, *coarser = micro_batched(self.net, padded, self.micro_batch_size)
        return [resize_to(finest, tuple(padded.shape[2:])), *coarser]

    def forward(self, image: Tensor) -> Tensor:
        """Logits `(batch, classes, *space)` of images `(batch, channels, *space)`."""
        return crop_to(self.levels(image)[0], tuple(image.shape[2:]))

    def shared_step(self, batch: Any, stage: Stage) -> dict[str, Tensor]:
        """Loss and logits of a batch; counts and logs both. What the training, validation and test steps call."""
        given = read_batch(batch)
        image, mask = given.image, given.mask
        labels: Tensor | None = None
        if stage == "train":
            levels = self.levels(image)
            logits = crop_to(levels[0], tuple(image.shape[2:]))
            loss = self._loss_of_levels(levels, given) if len(levels) > 1 else self._call(self.loss, logits, given)
            terms = self._terms()
        else:
            logits = self.evaluated(image, tuple(mask.shape[mask.ndim - image.ndim + 2 :]))
            loss, terms = self._loss_of_images(logits, given)
            if len(logits) and self._decides():
                labels = self._decided(logits, given.spacing)
        logits = logits.detach()
        # A float: Lightning averages the images counted on each rank, and of integers it keeps the whole part.
        images: Any = float(len(image))
        each = {f"{stage}/loss/{name}": value for name, value in terms.items()}
        self.log_dict({f"{stage}/loss": loss, **each}, on_step=False, on_epoch=True, batch_size=images, sync_dist=True)
        if stage == "train":
            activation = self.activation or getattr(self.loss, "activation", None)
            values = self.train_metrics(logits, hard_target(mask, activation=activation))
            running = {name.removeprefix("train/"): _mean(value) for name, value in values.items()}
            self.log_dict({"loss": loss.detach(), **running}, prog_bar=True, logger=False)
        else:
            self._metrics(stage).update(logits if labels is None else _logits_of(labels, logits), mask)
        found = {"loss": loss, "logits": logits} | ({} if labels is None else {"labels": labels})
        temperature = self.inference.postprocessing.temperature
        if stage != "train" and temperature is not None:
            # By which they become calibrated probabilities.
            found["temperature"] = torch.tensor(temperature, dtype=torch.float64)
        return found

    def setup(self, stage: str) -> None:
        """Have the data module's workers compute what the loss needs of the masks."""
        add_maps = getattr(getattr(self.trainer, "datamodule", None), "add_maps", None)
        if stage != "predict" and add_maps is not None and isinstance(self.loss, SegmentationLoss):
            add_maps(self.loss.maps)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss of a batch."""
        return self.shared_step(batch, "train")["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """`{"loss", "logits"}` of a batch, for callbacks; by `inference` also `"labels"` and `"temperature"`."""
        return self.shared_step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """`{"loss", "logits"}` of a batch, for callbacks; by `inference` also `"labels"` and `"temperature"`."""
        return self.shared_step(batch, "test")

    @torch.inference_mode()
    def segment(self, images: Tensor) -> Tensor:
        """Masks of images as they are read, by a module that `from_run` or `from_safetensors` has loaded.

        They are normalized as the run's images were, and go to the module's device.

        Args:
            images: `(batch, channels, *space)`: floats as training has them before `normalize`, which for pictures of 8
                and 16 bit are in [0, 1]; or uint8 or uint16, which are divided by the run's `data.max_value`, by
                default 255 or 65535.

        Returns:
            As `predict_step`.

        Raises:
            ValueError: for other types, and where images are normalized by more than is known here: volumes by their
                modality, those of a file of `from_safetensors` by what is not trusted.
        """
        if isinstance(self._normalize, (str, list)):
            raise ValueError(
                f"images of this run are normalized by {self._normalize}, which this module has no part of: use the "
                "command predict, or normalize them and call predict_step"
            )
        if images.dtype in (torch.uint8, torch.uint16):
            images = images.float() / (self._white or torch.iinfo(images.dtype).max)
        if not images.is_floating_point() or images.ndim < 3:
            raise ValueError(
                f"images must be (batch, channels, *space) of floats, uint8 or uint16, got {tuple(images.shape)} of "
                f"{images.dtype}"
            )
        if self._normalize is not None:
            images = torch.stack([self._normalize(image) for image in images])
        masks: Tensor = self.predict_step(images.to(self.device))
        return masks

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Any:
        """Masks of a batch of images: class ids `(batch, *space)` (softmax) or bool planes `(batch, classes, *space)`.

        Args:
            batch: as in training, or just the images, normalized; see `segment` for images as they are read.
            batch_idx: not used.
        """
        given = Given(batch, batch) if isinstance(batch, Tensor) else read_batch(batch)
        logits = self.evaluated(given.image)
        if len(logits) and self._decides():
            return self._decided(logits, given.spacing_of_image())
        return hard_prediction(logits, activation=self._activation(), threshold=self.threshold)

    def on_train_epoch_end(self) -> None:
        """Log the epoch's metrics."""
        self._log_metrics("train")

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics over the test set."""
        self._log_metrics("test")

    def configure_optimizers(self) -> Any:
        """The optimizer and, where there is one, the scheduler."""
        make = self.optimizer if self.optimizer is not None else lambda params: torch.optim.AdamW(params, lr=1e-3)
        optimizer = make(parameter for parameter in self.parameters() if parameter.requires_grad)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self._rate_factor()
        if self.scheduler is None:
            return optimizer
        schedule = {"scheduler": self.scheduler(optimizer), "interval": self.interval, "monitor": self.monitor}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _rate_factor(self) -> float:
        """By which the learning rate is multiplied for the number of processes that have batches of their own."""
        trainer = attached_trainer(self)
        if self.lr_scaling is None or trainer is None:
            return 1.0
        # The strategy knows which processes see different data; with a model split over GPUs not all of them do.
        processes = int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1))
        return float(processes) if self.lr_scaling == "linear" else math.sqrt(processes)

    def _loss_of_images(self, logits: Tensor, given: Given) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the images of the loss of each by itself, and of each of its terms."""
        if not len(logits):
            # Of no image only the terms' names are needed, which are to be the same on every process.
            mask = given.mask.new_zeros(1, *given.mask.shape[1:])
            if mask.is_floating_point():
                mask[:, :1] = 1  # A softmax needs labels that sum to 1.
            self._call(self.loss, logits.new_zeros(1, *logits.shape[1:]), Given(given.image, mask))
            nothing = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
            return nothing, dict.fromkeys(self._terms(), nothing)
        losses, terms = [], []
        for index in range(len(logits)):
            losses.append(self._call(self.loss, logits[index : index + 1], given.image_at(index)))
            terms.append(self._terms())
        return torch.stack(losses).mean(), {
            name: torch.stack([values[name] for values in terms]).mean() for name in terms[0]
        }

    def _terms(self) -> dict[str, Tensor]:
        """What the terms of the loss were in its last call, if it has several."""
        return dict(getattr(self.loss, "values", {}))

    def _loss_of_levels(self, levels: list[Tensor], given: Given) -> Tensor:
        """The loss of deep supervision, at the size of the padded image."""
        loss = self.loss if isinstance(self.loss, DeepSupervision) else DeepSupervision(self.loss)
        space = tuple(levels[0].shape[2:])
        if tuple(given.image.shape[2:]) != space:
            # What the padding shows is ignored, if the loss can, or repeats the last row as the image does.
            inner, ids = loss.loss, given.mask.ndim < given.image.ndim
            ignore_index = getattr(inner, "ignore_index", None) if isinstance(inner, SegmentationLoss) or ids else None
            weight = None if given.weight is None else pad_target(given.weight, space, ignore_index=None)
            mask = pad_target(given.mask, space, ignore_index=ignore_index)
            given = given._replace(mask=mask, weight=weight, maps={})
        return self._call(loss, levels, given)

    def _call(self, loss: nn.Module, logits: Any, given: Given) -> Tensor:
        if isinstance(loss, SegmentationLoss):
            result: Tensor = loss(logits, given.mask, given.weight, annotated=given.annotated, maps=given.maps)
            return result
        if given.weight is not None or given.annotated is not None:
            raise ValueError(
                f"the batch has a weight or annotated classes, which a {type(loss).__name__} does not take: wrap it in "
                "a lightning_dice.losses.SegmentationLoss, or leave them out"
            )
        return call_torch_loss(loss, logits, given.mask)

    def _activation(self) -> Literal["sigmoid", "softmax"]:
        activation = self.activation or getattr(self.loss, "activation", None)
        if activation not in ("sigmoid", "softmax"):
            raise ValueError(
                'activation must be "sigmoid" or "softmax" to make masks of logits, and the loss does not tell which: '
                f'SegmentationModule(..., activation="softmax"); got {activation!r}'
            )
        return activation

    def _decides(self) -> bool:
        """Whether labels are others than `threshold` alone would make."""
        decision = self.inference.postprocessing
        return decision != PostProcessing() and decision.changes(self._activation(), self.threshold)

    def _decided(self, logits: Tensor, spacing: Any) -> Tensor:
        """Class ids, int64 `(batch, *space)`, or bool planes `(batch, classes, *space)`."""
        predictor = self.predictor(logits.device)
        spacings = spacing if spacing is not None else [None] * len(logits)
        labels = torch.stack([predictor.decide(one, gap) for one, gap in zip(logits, spacings, strict=True)])
        return labels if labels.dtype == torch.bool else labels.long()

    def _metrics(self, stage: Stage) -> MetricCollection:
        return {"train": self.train_metrics, "val": self.val_metrics, "test": self.test_metrics}[stage]

    def _log_metrics(self, stage: Stage) -> None:
        metrics = self._metrics(stage)
        if not any(metric.update_called for metric in metrics.values()):
            return  # A subclass's step may count nothing.
        # A progress bar, on the first rank alone, reads what was logged, which asks the other ranks for their part.
        # Read by all before the metrics ask in turn, else one rank's question meets another's answer, for ever.
        _ = self.trainer.callback_metrics
        for name, value in metrics.compute().items():
            # A metric's value is the same on every rank; said again so that Lightning need not warn. The mean of equal
            # numbers may round, the greatest of them does not.
            self.log(name, _mean(value), prog_bar=stage == "val", sync_dist=True, reduce_fx="max")
            if value.ndim == 1:
                for class_name, score in zip(self._names(value.numel()), value, strict=True):
                    if not score.isnan():
                        self.log(f"{name}/{class_name}", score, sync_dist=True, reduce_fx="max")
        metrics.reset()

    def _names(self, classes: int) -> list[str]:
        names = self.class_names or [f"class {index}" for index in range(classes)]
        if len(names) != classes:
            raise ValueError(f"class_names must name each of the {classes} classes, got {names}")
        return names


def _mean(value: Tensor) -> Tensor:
    return value.float().nanmean()


def _resized(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits of one image at another size, as a predictor makes them."""
    space = tuple(logits.shape[1:])
    return torch.cat([part for *_, part in resized([(0, space[0], logits)], space, size)], 1)


def _logits_of(labels: Tensor, logits: Tensor) -> Tensor:
    """Logits that say nothing but the labels, for metrics that take logits: all but certain, and finite."""
    if labels.dtype == torch.bool:
        return torch.where(labels, _CERTAIN, -_CERTAIN).to(logits.dtype)
    return torch.full_like(logits, -_CERTAIN).scatter_(1, labels.unsqueeze(1), _CERTAIN)


class Given(NamedTuple):
    """What a batch holds.

    Attributes:
        image: `(batch, channels, *space)`.
        mask: as the loss takes it.
        case: a name for each image, or `None`.
        weight: of pixels, or `None`; see `SegmentationLoss.forward`, as for the following.
        annotated: classes that each image says something about, or `None`.
        maps: what the loss needs of the masks, as far as it was computed.
        spacing: between the mask's pixels, in mm, of each image, or `None`; each may be `None` too.
    """

    image: Tensor
    mask: Tensor
    case: Any = None
    weight: Tensor | None = None
    annotated: Tensor | None = None
    maps: Mapping[str, Tensor] = MappingProxyType({})
    spacing: Sequence[Sequence[float] | None] | None = None

    def spacing_of_image(self) -> list[list[float] | None] | None:
        """Between the image's pixels, in mm, where it was resampled and has others than the mask."""
        if self.spacing is None or not isinstance(self.mask, Tensor):
            return None
        space = self.image.shape[2:]
        factors = [new / old for new, old in zip(self.mask.shape[-len(space) :], space, strict=True)]
        return [
            None if gaps is None else [gap * factor for gap, factor in zip(gaps, factors, strict=True)]
            for gaps in self.spacing
        ]

    def image_at(self, index: int) -> Given:
        """A batch of one image, without its name."""
        one = slice(index, index + 1)
        weight = None if self.weight is None else self.weight[one]
        annotated = None if self.annotated is None else self.annotated[one]
        maps = {name: values[one] for name, values in self.maps.items()}
        return Given(self.image[one], self.mask[one], None, weight, annotated, maps)


def read_batch(batch: Any) -> Given:
    """A batch in any of the usual forms.

    Raises:
        ValueError: a form that is not known.

    >>> given = read_batch({"image": torch.zeros(1, 3, 4, 4), "mask": torch.zeros(1, 1, 4, 4)})
    >>> given.case is None
    True
    """
    if isinstance(batch, tuple) and "image" in getattr(batch, "_fields", ()):
        batch = batch._asdict()  # type: ignore[attr-defined]
    if isinstance(batch, Mapping) and "image" in batch and "mask" in batch:
        return Given(**{name: batch[name] for name in Given._fields if name in batch})
    if isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        return Given(*batch)
    came = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(f"a batch must be (image, mask[, case]) or a mapping with image and mask, got {came}")
