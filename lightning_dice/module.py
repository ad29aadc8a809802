"""The LightningModule that trains and evaluates any network with any loss and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_dice.argument_checks import check_count, check_number
from lightning_dice.data.batch import Batch, read_batch
from lightning_dice.functional import hard_prediction, pad_to_multiple
from lightning_dice.functional.micro_batches import micro_batched_output
from lightning_dice.functional.model_outputs import ModelOutput, crop_to, read_output, resize_to
from lightning_dice.inference import Inference, PostProcessing, Predictor
from lightning_dice.inference.batch_prediction import batch_labels, batch_logits, logits_of_labels
from lightning_dice.inference.input_normalization import InputNormalization
from lightning_dice.library_internals.torch import original_module, without_compiled_names
from lightning_dice.loading import load_checkpoint, load_run, load_safetensors
from lightning_dice.losses import DiceLoss, SegmentationLoss
from lightning_dice.losses.batch_loss import batch_loss, deep_supervision_loss, loss_terms, mean_image_loss
from lightning_dice.metric_logging import MetricLogging, Stage
from lightning_dice.metrics import DiceScore
from lightning_dice.optimization import Interval, Optimization, OptimizerFactory, RateScaling, SchedulerFactory

if TYPE_CHECKING:
    from typing_extensions import Self


class SegmentationModule(MetricLogging, Optimization):
    """Train any segmentation network with any loss of logits and target.

    Subclass it to change `configure_optimizers`, `training_step` or `predict_step`; nothing needs to be overridden.

    It logs `train/loss`, `val/loss` and `test/loss`, each a mean over the epoch's images; `train/loss_step`, the loss
    of a batch, every `log_every_n_steps` of the Trainer; and the value of each metric over the epoch, such as
    `val/dice` for a metric named `dice`. A metric with one value for each of several classes is logged as the mean over
    the classes that have a value, and each value as `val/dice/<class name>`, NaN for a class without a score. The terms
    of a compound loss are logged as `val/loss/<term>`. In an evaluation of several data loaders, each has its own
    metrics, logged as Lightning names them: `test/dice/dataloader_idx_0`.

    In training, the loss of the batch is minimized. In evaluation, the loss is computed for each image separately, even
    if it pools images, and the mean over the images is logged: `val/loss` and `test/loss` depend
    neither on the batch size nor on the number of processes. An image without a pixel that counts has a loss of 0.

    Args:
        net: takes images `(batch, channels, *space)` and returns logits `(batch, classes, *space)`: as a tensor, a
            mapping with `out` or `logits`, an object with `.logits`, or a list, finest first (deep supervision: in
            training every level has its loss, see `DeepSupervision`). Logits coarser than the image are resized;
            coarser levels keep their size, and the mask is reduced to it. The entries of a mapping whose names begin
            with `aux` are auxiliary heads, see `auxiliary_weight`. Override `read_output` for other outputs.
        loss: a module called with `(logits, mask)`; `DiceLoss()` by default. A `SegmentationLoss` also gets the batch's
            `weight`, `annotated` and `maps`.
        metrics: a metric, which is then named `dice`, metrics by name, or a list of metrics, named as their classes;
            `DiceScore(average="none")` by default, which is for one channel. See below for what they get.
        optimizer: called with the parameters; AdamW with a rate of 1e-3 by default.
        scheduler: called with the optimizer; none by default. In a `functools.partial` of one of torch's schedules, the
            length `T_max=None`, `total_iters=None` or `total_steps=None` is that of the training, in epochs or
            optimizer steps.
        class_names: a name for each channel of the logits, for logging; `class 0`, `class 1` ... by default.
        activation: `"sigmoid"` or `"softmax"`, for making masks of logits; by default the loss's.
        threshold: a probability above which a pixel is foreground; for a sigmoid only.
        size_divisor: images are padded to multiples of it, in pixels, and logits are cropped again: the stride of the
            network's coarsest features.
        channels_last: store 2D images and the network's 2D weights with channels as the fastest axis, which speeds up
            convolutions; the numbers differ by rounding only.
        micro_batch_size: the most images that go through the network at once, for batches that do not fit in memory;
            all by default. The loss and its gradient are still those of the whole batch, for any loss, at the cost of
            one more forward pass; see below.
        interval: when the scheduler steps: `"epoch"` or `"step"`, that is each optimizer step.
        monitor: the metric that a scheduler such as `ReduceLROnPlateau` watches; it steps after an epoch's end with a
            validation if that is one of `val/`.
        lr_scaling: how the learning rate of every parameter group grows with the number n of processes that have their
            own batches: `"linear"`, times n; `"sqrt"`, times the root of n; `None`: not at all. The scheduler starts
            from the scaled rate; rates that it sets itself (`eta_min`, `max_lr`) are not scaled. Accumulated batches
            do not count, and without a Trainer n is 1.
        auxiliary_weight: weight of the loss of each auxiliary head, which is added to the loss in training and logged
            as `train/loss/auxiliary`; its logits are resized to the image. 0.4 by default, as in Zhao et al., Pyramid
            Scene Parsing Network (CVPR 2017). With 0, auxiliary heads are not trained.
        inference: how evaluation and prediction make logits and labels: windows, mirroring, post-processing; see
            `Inference`. By default the whole image at once, and labels by `threshold`. Not used in training.

    Raises:
        ValueError: a setting out of its range.

    Metrics get the logits and the mask, soft labels made hard, and ids as int64. Those of `torchmetrics.classification`
    get probabilities instead of logits, those of `torchmetrics.segmentation` planes of 0 and 1 of both, without the
    ignored pixels, and wrappers what the metric in them takes. A metric whose `ignore_index` is None has the loss's. A
    dict of values is logged as `val/<metric>/<key>`. A metric that takes or returns something else is refused, at the
    latest in the first batch. Metrics never share states, so that compute groups of a `MetricCollection` have no
    effect.

    In evaluation, logits are resized to the mask where the image was resampled, and with windows or mirroring images
    are predicted one by one. If post-processing changes labels, metrics are computed on the post-processed labels,
    whatever thresholds the metrics have: they score what `predict` writes. The loss is that of the logits. Processes
    may have different numbers of windows: in an evaluation on several processes, a network that communicates in its
    forward pass, as under FSDP, cannot have windows.

    With `micro_batch_size`, memory holds the activations of one micro-batch and the logits of all: the network runs
    again on each micro-batch when its backward pass begins. Batch norm normalizes within a micro-batch and updates its
    running statistics once for each, as in smaller batches. The second run repeats torch's random numbers (dropout),
    not those of `random` or numpy, and calls forward hooks again; a hook that must see activations only once has to
    detach them. With `SyncBatchNorm` all ranks need the same number of micro-batches.

    A Trainer's `accumulate_grad_batches` takes the mean of the losses of several batches instead, which is a different
    loss if it is a ratio over the batch, as in `DiceLoss(pool="batch")`. The two combine: each of those batches is then
    exact in itself.

    Batches: a `lightning_dice.data.Batch`, or any form that `lightning_dice.data.batch.read_batch` reads: a pair or
    triple `(image, mask[, case])`, or a mapping with these keys and perhaps `weight`, `annotated`, `maps`, `spacing`.

    >>> module = SegmentationModule(nn.Conv2d(3, 1, 1))
    >>> module(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        net: nn.Module,
        loss: nn.Module | None = None,
        metrics: Metric | MetricCollection | Mapping[str, Metric] | Sequence[Metric] | None = None,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        *,
        class_names: Sequence[str] | None = None,
        activation: Literal["sigmoid", "softmax"] | None = None,
        threshold: float = 0.5,
        size_divisor: int = 1,
        channels_last: bool = False,
        micro_batch_size: int | None = None,
        interval: Interval = "epoch",
        monitor: str = "val/dice",
        lr_scaling: RateScaling | None = None,
        auxiliary_weight: float = 0.4,
        inference: Inference | None = None,
    ) -> None:
        super().__init__()
        without_compiled_names(self)
        if size_divisor < 1:
            raise ValueError(f"size_divisor must be an integer >= 1, got {size_divisor!r}")
        if not isinstance(threshold, (int, float)) or not 0 < threshold < 1:
            raise ValueError(f"threshold must be a probability in (0, 1), got {threshold!r}")
        if micro_batch_size is not None:
            check_count("micro_batch_size", micro_batch_size, optional=True)
        self.net = net
        self.loss = loss if loss is not None else DiceLoss()
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.activation = activation
        self.threshold = threshold
        self.size_divisor = size_divisor
        self.channels_last = channels_last
        self.micro_batch_size = micro_batch_size
        self.set_optimization(optimizer, scheduler, interval, monitor, lr_scaling)
        self.auxiliary_weight = check_number("auxiliary_weight", auxiliary_weight)
        self.inference = inference if inference is not None else Inference()
        # For the run's images; set by `from_run` and `from_safetensors`.
        self.input_normalization = InputNormalization()
        if channels_last:
            for parameter in net.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        # Plain values only, so that a checkpoint is read without running code.
        self.save_hyperparameters(
            {
                "class_names": self.class_names,
                "activation": activation,
                "threshold": threshold,
                "size_divisor": size_divisor,
                "channels_last": channels_last,
                "micro_batch_size": micro_batch_size,
                "interval": interval,
                "monitor": monitor,
                "lr_scaling": lr_scaling,
                "auxiliary_weight": auxiliary_weight,
            }
        )
        self.set_metrics(metrics if metrics is not None else DiceScore(average="none"))

    @classmethod
    def from_run(
        cls,
        folder: str | Path,
        checkpoint: str = "best",
        *,
        map_location: Any = "cpu",
        calibration: str | Path = "auto",
    ) -> Self:
        """Load the trained module of a run, in evaluation mode, from its checkpoint and calibration alone.

        Code in the checkpoint is not run, but the names in its config are imported and called.

        Args:
            folder: the run's folder.
            checkpoint: `"best"`, `"last"`, or the path of a checkpoint file, absolute or below `folder`.
            map_location: the device of the weights, as in `torch.load`.
            calibration: `"auto"`: the run's `calibration.json`, if it has one; `"none"`; or the path of one. See
                `lightning_dice.inference.find_postprocessing`.

        Raises:
            FileNotFoundError: the folder, the checkpoint or the calibration does not exist; the message lists what
                does.
            ValueError: the checkpoint was not written by a run, or holds a module of another class than `cls`; or the
                calibration cannot be read, or belongs to another checkpoint.
        """
        return load_run(folder, checkpoint, kind=cls, map_location=map_location, calibration=calibration)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's own is no method of the class alone.
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a checkpoint, as any LightningModule does.

        Checkpoints that `fit` has written hold the config of the module, which is built from it. Others need `net`, and
        whatever else is not a plain value: `loss`, `metrics` ...; `threshold`, `class_names` and other plain values are
        those that the checkpoint holds. `from_run` also applies the run's calibration.

        Args:
            checkpoint_path: the file.
            map_location: the device of the weights, as in `torch.load`.
            hparams_file: as for any LightningModule, as are `strict` and `weights_only`.
            strict: see `hparams_file`.
            weights_only: see `hparams_file`.
            kwargs: arguments of the constructor.

        Raises:
            ValueError: `fit` has not written the checkpoint, and `net` is not given.
        """
        if kwargs or hparams_file is not None:
            loaded: Self = super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
            )
            return loaded
        return load_checkpoint(
            Path(checkpoint_path), kind=cls, map_location=map_location, strict=True if strict is None else strict
        )

    @classmethod
    def from_safetensors(cls, path: str | Path, *, map_location: str = "cpu", trusted: Sequence[str] = ()) -> Self:
        """Load a module that `lightning_dice.export format=safetensors` wrote, in evaluation mode.

        The file holds no code. The config in its header names classes, which are called: those of this library, torch,
        torchvision, torchmetrics, segmentation-models-pytorch and MONAI's networks, and those you trust.

        Args:
            path: the file.
            map_location: the device of the weights.
            trusted: packages or modules whose classes may be called too, such as your own network's.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is not such a file, or its config names something that is not trusted.
        """
        return load_safetensors(path, kind=cls, map_location=map_location, trusted=trusted)

    def calibrate(self, calibration: PostProcessing) -> None:
        """Apply the temperature, thresholds ... of a calibration, except where `inference` has its own.

        >>> module = SegmentationModule(nn.Conv2d(1, 1, 1))
        >>> module.calibrate(PostProcessing(thresholds=[0.4]))
        >>> print(module.inference.postprocessing)
        thresholds 0.4
        """
        self.inference = copy(self.inference)
        self.inference.postprocessing = self.inference.postprocessing.with_defaults(calibration)

    def read_output(self, output: Any, space: Sequence[int]) -> ModelOutput:
        """Return the logits in what the network returned; override it for a network with an output of another form.

        Args:
            output: of `net`.
            space: size of the images that it got.
        """
        return read_output(output, space)

    def outputs(self, image: Tensor) -> ModelOutput:
        """Return the logits of the network: levels finest first, the first at the size of the padded image.

        In evaluation, a process with fewer batches than others gets a batch without images. The network then runs on
        one image of zeros: few networks can take none, and where processes send weights or buffers to each other, all
        must run it equally often.
        """
        if not len(image) and not self.training:
            return self.outputs(image.new_zeros(1, *image.shape[1:])).map(lambda logits: logits[:0])
        padded = pad_to_multiple(image, self.size_divisor)
        if self.channels_last and padded.ndim == 4:
            padded = padded.contiguous(memory_format=torch.channels_last)
        if self.micro_batch_size is None:
            output = self.read_output(self.net(padded), padded.shape[2:])
        else:
            output = micro_batched_output(self.net, padded, self.micro_batch_size, self.read_output)
        finest, *coarser = output.levels
        return output._replace(levels=[resize_to(finest, tuple(padded.shape[2:])), *coarser])

    def levels(self, image: Tensor) -> list[Tensor]:
        """Return the logits of every level of the network, finest first, the first at the size of the padded image."""
        return self.outputs(image).levels

    def forward(self, image: Tensor) -> Tensor:
        """Return logits `(batch, classes, *space)` of images `(batch, channels, *space)`."""
        return crop_to(self.outputs(image).levels[0], tuple(image.shape[2:]))

    def eval_logits(self, image: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """Return logits `(batch, classes, *size)` of images `(batch, channels, *space)`, by the `inference` settings.

        Args:
            image: on the module's device, as are the logits.
            size: the space axes of the logits, which are interpolated linearly; by default those of the image.
        """
        return batch_logits(self, image, size)

    def shared_step(self, batch: Any, stage: Stage, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Run a training, validation or test step: compute the loss, update the metrics, log.

        Args:
            batch: of any form that `read_batch` reads.
            stage: `"train"`, `"val"` or `"test"`.
            dataloader_idx: index of the data loader, in an evaluation of several.

        Returns:
            `loss` and `logits`. In evaluation also `labels`, where post-processing changes them, and `temperature`,
            where there is one.
        """
        batch = read_batch(batch)
        image, mask = batch.image, batch.mask
        labels: Tensor | None = None
        if stage == "train":
            levels, auxiliary = self.outputs(image)
            logits = crop_to(levels[0], tuple(image.shape[2:]))
            several = len(levels) > 1
            loss = deep_supervision_loss(self.loss, levels, batch) if several else batch_loss(self.loss, logits, batch)
            terms = loss_terms(self.loss)
            if auxiliary and self.auxiliary_weight:
                terms["auxiliary"] = torch.stack([self._auxiliary_loss(head, batch) for head in auxiliary]).sum()
                loss = loss + self.auxiliary_weight * terms["auxiliary"]
        else:
            logits = self.eval_logits(image, tuple(mask.shape[mask.ndim - image.ndim + 2 :]))
            loss, terms = mean_image_loss(self.loss, logits, batch)
            labels = batch_labels(self, logits, batch.spacing)
        logits = logits.detach()
        # A float: Lightning averages the images counted on each rank, and truncates integers.
        images: Any = float(len(image))
        losses = {f"{stage}/loss": loss} | {f"{stage}/loss/{name}": value for name, value in terms.items()}
        self.log_dict(losses, on_step=False, on_epoch=True, batch_size=images, sync_dist=True)
        if stage == "train":
            self.log("train/loss_step", loss.detach(), on_step=True, on_epoch=False, batch_size=images)
            running = self.update_metrics(stage, logits, mask)
            self.log_dict({"loss": loss.detach(), **running}, prog_bar=True, logger=False)
        else:
            scored = logits if labels is None else logits_of_labels(labels, logits)
            self.update_metrics(stage, scored, mask, dataloader_idx)
        outputs = {"loss": loss, "logits": logits} | ({} if labels is None else {"labels": labels})
        temperature = self.inference.postprocessing.temperature
        if stage != "train" and temperature is not None:
            outputs["temperature"] = torch.tensor(temperature, dtype=torch.float64)
        return outputs

    def _auxiliary_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        space = tuple(batch.image.shape[2:])
        padded = tuple(-(-size // self.size_divisor) * self.size_divisor for size in space)
        return batch_loss(self.loss, crop_to(resize_to(logits, padded), space), batch)

    def setup(self, stage: str) -> None:
        """Have the data module's workers compute the target maps that the loss needs."""
        add_maps = getattr(getattr(self.trainer, "datamodule", None), "add_maps", None)
        loss = original_module(self.loss)
        if stage != "predict" and add_maps is not None and isinstance(loss, SegmentationLoss):
            add_maps(loss.maps)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss of a batch."""
        return self.shared_step(batch, "train")["loss"]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return the outputs of `shared_step`, for callbacks."""
        return self.shared_step(batch, "val", dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return the outputs of `shared_step`, for callbacks."""
        return self.shared_step(batch, "test", dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Any:
        """Return masks of a batch: class ids `(batch, *space)` (softmax) or bool planes `(batch, classes, *space)`.

        Args:
            batch: as in training, or the images alone, normalized; see `segment` for images as they are read.
            batch_idx: not used.
            dataloader_idx: not used.

        >>> module = SegmentationModule(nn.Conv2d(1, 3, 1), activation="softmax")
        >>> module.predict_step(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 8, 8])
        """
        if isinstance(batch, Tensor):
            image, spacing = batch, None
        else:
            batch = read_batch(batch)
            image, spacing = batch.image, batch.spacing_of_image()
        logits = self.eval_logits(image)
        labels = batch_labels(self, logits, spacing)
        if labels is not None:
            return labels
        return hard_prediction(logits, activation=self._known_activation(), threshold=self.threshold)

    @torch.inference_mode()
    def segment(self, images: Tensor) -> Tensor:
        """Return masks of images as they are read, by a module that `from_run` or `from_safetensors` has loaded.

        The images are normalized like those of the run, and moved to the module's device.

        Args:
            images: `(batch, channels, *space)`: floats as in training before `normalize`, which are in [0, 1] for
                images of 8 and 16 bit; or uint8 or uint16, which are divided by the run's `data.max_value`, by default
                255 or 65535.

        Returns:
            As `predict_step`.

        Raises:
            ValueError: images of another type; or their normalization is not known here, as that of volumes by their
                modality, or a class in a safetensors file that is not trusted.

        >>> module = SegmentationModule(nn.Conv2d(3, 1, 1))
        >>> module.segment(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape
        torch.Size([1, 1, 8, 8])
        """
        masks: Tensor = self.predict_step(self.input_normalization(images).to(self.device))
        return masks

    def predictor(self, device: torch.device | str | None = None) -> Predictor:
        """Return a `Predictor` of single images with this module's network and settings.

        Args:
            device: where the module is; by default its parameters' device.

        Raises:
            ValueError: there is no activation.

        >>> module = SegmentationModule(nn.Conv2d(1, 1, 1), inference=Inference([4, 4]))
        >>> module.predictor().labels(torch.zeros(1, 9, 7)).shape
        torch.Size([1, 9, 7])
        """
        return Predictor(
            [self],
            self.inference.window,
            self.inference.mirroring,
            self.inference.postprocessing,
            activation=self._known_activation(),
            threshold=self.threshold,
            device=self.device if device is None else device,
        )

    def _known_activation(self) -> Literal["sigmoid", "softmax"]:
        activation = self.activation or getattr(self.loss, "activation", None)
        if activation not in ("sigmoid", "softmax"):
            raise ValueError(
                'activation must be "sigmoid" or "softmax" to make masks of logits, and the loss has none: '
                f'SegmentationModule(..., activation="softmax"); got {activation!r}'
            )
        return activation
