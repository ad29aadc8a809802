"""Logits and labels of images, by one network or several: the arithmetic that evaluation and prediction share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_dice.argument_checks import check_choice, check_number
from lightning_dice.functional.activations import probabilities
from lightning_dice.functional.model_outputs import read_logits, resize_to
from lightning_dice.inference.logit_resampling import resized
from lightning_dice.inference.postprocessing import PostProcessing, pooled
from lightning_dice.inference.sliding_window import Net, Slab, Sliceable, SlidingWindow, ImportanceMap
from lightning_dice.inference.test_time_augmentation import Mirroring, flipped, mean_logits


class Inference:
    """The settings of a module's evaluation and prediction; the object of the config group `inference`.

    Args:
        size: of windows, in pixels, for each space axis, as in `SlidingWindow`; `None`: the whole image at once.
        overlap: of windows; this and the following two as in `SlidingWindow`, and without windows of no account.
        importance_map: of windows.
        batch_size: windows that go through the network at once.
        mirror_axes: space axes of `Mirroring`: 2 of them make 4 predictions of each image, and their mean.
        postprocessing: how labels are made; by default as `hard_prediction` does.

    Raises:
        ValueError: a setting out of its range.

    >>> Inference([64, 64], mirror_axes=[0]).window
    SlidingWindow(size=[64, 64], overlap=0.5, importance_map='gaussian', batch_size=4)
    """

    def __init__(
        self,
        size: Sequence[int] | None = None,
        overlap: float = 0.5,
        importance_map: ImportanceMap = "gaussian",
        batch_size: int = 4,
        mirror_axes: Iterable[int] = (),
        postprocessing: PostProcessing | None = None,
    ) -> None:
        # Made in any case, so that a mistake in a setting is told before it is of account.
        window = SlidingWindow(size if size is not None else [1], overlap, importance_map, batch_size)
        self.window = window if size is not None else None
        self.mirroring = Mirroring(mirror_axes)
        self.postprocessing = postprocessing if postprocessing is not None else PostProcessing()

    def __repr__(self) -> str:
        return f"Inference(window={self.window}, mirror_axes={list(self.mirroring.axes)}, postprocessing={self.postprocessing})"

    @property
    def plain(self) -> bool:
        """Whether logits are what the network makes of the whole image."""
        return self.window is None and not self.mirroring.axes


class Predictor:
    """Logits and labels of one image at a time.

    A window, or the whole image, goes through a network, mirrored in each way, and the probabilities are averaged;
    those of several networks, after the temperature of each, are averaged too. The logits of that mean are put
    together, resized and decided on: a calibration sees what its temperature will be applied to. One network without
    flips has its own logits, untouched. All of it in slabs along the first space axis: `labels` needs memory for the
    sums of one window's depth, whatever the length of that axis, and `logits` makes the same numbers.

    Args:
        nets: each takes images `(batch, channels, *space)` on `device`, in evaluation mode, and returns their logits in
            any of the forms that `lightning_dice.functional.read_logits` knows; a `SegmentationModule` is one.
        window: `None`: the whole image at once.
        mirroring: `None`: no mirrored predictions.
        postprocessing: how logits become labels; for several networks one, or one for each, whose temperatures are then
            applied before the mean (see `lightning_dice.inference.pooled`).
        activation: of the logits, `"sigmoid"` or `"softmax"`.
        threshold: a probability, where the decision has no thresholds and the activation is a sigmoid.
        device: where the networks are.

    Raises:
        ValueError: a setting out of its range; in a call, an image or a network's logits that do not fit.

    >>> predictor = Predictor([lambda batch: batch], SlidingWindow([4, 4]), activation="sigmoid")
    >>> predictor.labels(torch.ones(1, 7, 9)).shape
    torch.Size([1, 7, 9])
    >>> predictor.logits(torch.ones(1, 7, 9), size=(14, 18)).shape
    torch.Size([1, 14, 18])
    """

    def __init__(
        self,
        nets: Sequence[Net],
        window: SlidingWindow | None = None,
        mirroring: Mirroring | None = None,
        postprocessing: PostProcessing | Sequence[PostProcessing] | None = None,
        *,
        activation: Literal["sigmoid", "softmax"],
        threshold: float = 0.5,
        device: torch.device | str = "cpu",
    ) -> None:
        self.nets = list(nets)
        if not self.nets:
            raise ValueError("nets must be at least one network, got none")
        self.window = window
        self.mirroring = mirroring if mirroring is not None else Mirroring()
        self.activation: Literal["sigmoid", "softmax"] = check_choice("activation", activation, ("sigmoid", "softmax"))
        self.threshold = check_number("threshold", threshold, 0, 1, open_ends=True)
        self.device = torch.device(device)
        chosen = postprocessing if postprocessing is not None else PostProcessing()
        each = [chosen] * len(self.nets) if isinstance(chosen, PostProcessing) else list(chosen)
        if len(each) != len(self.nets):
            raise ValueError(
                f"postprocessing must be one, or one for each of the {len(self.nets)} nets, got {len(each)}"
            )
        self.postprocessing_per_net = each
        self.postprocessing = pooled(each, self.threshold)

    @classmethod
    def ensemble(cls, predictors: Sequence[Predictor]) -> Predictor:
        """All networks of several predictors as one; window and flips are those of the first.

        Raises:
            ValueError: their activations, devices or thresholds differ, or decisions that cannot be pooled.
        """
        first = predictors[0]
        undecided = any(d.thresholds is None for predictor in predictors for d in predictor.postprocessing_per_net)
        for name in ("activation", "device", *(["threshold"] if undecided and first.activation == "sigmoid" else [])):
            values = {str(getattr(predictor, name)) for predictor in predictors}
            if len(values) > 1:
                raise ValueError(f"the networks of an ensemble must have one {name}, got {', '.join(sorted(values))}")
        return cls(
            [net for predictor in predictors for net in predictor.nets],
            first.window,
            first.mirroring,
            [decision for predictor in predictors for decision in predictor.postprocessing_per_net],
            activation=first.activation,
            threshold=first.threshold,
            device=first.device,
        )

    def slabs(self, image: Sliceable, size: Sequence[int] | None = None) -> Iterator[Slab]:
        """Logits of an image, by and by along the first space axis.

        Args:
            image: `(channels, *space)`, normalized; a tensor, or what reads parts of a file, see `Sliceable`.
            size: the space axes that the logits are to have, by linear interpolation; those of the image by default.

        Yields:
            The rows `start` to `stop` and their logits `(classes, stop - start, *rest)`; with a window float32 on the
            host, else on the device.
        """
        space = tuple(image.shape[1:])
        wanted = space if size is None else tuple(int(length) for length in size)
        if len(wanted) != len(space) or min(wanted, default=1) < 1:
            raise ValueError(f"size must be one number of pixels >= 1 for each of the axes {space}, got {size!r}")
        self.mirroring.check(len(space))
        slabs = self._whole(image) if self.window is None else self.window.slabs(image, self._together, self.device)
        return resized(slabs, space, wanted)

    def logits(self, image: Sliceable, size: Sequence[int] | None = None) -> Tensor:
        """Logits `(classes, *size)` of an image; see `slabs`."""
        result: Tensor | None = None
        wanted = tuple(size) if size is not None else tuple(image.shape[1:])
        for start, stop, part in self.slabs(image, size):
            if stop - start == wanted[0]:
                return part
            if result is None:
                result = part.new_empty(part.shape[0], *wanted)
            result[:, start:stop] = part
        if result is None:
            raise ValueError(f"the image must have pixels, got {tuple(image.shape)}")
        return result

    def labels(
        self, image: Sliceable, size: Sequence[int] | None = None, spacing: Sequence[float] | None = None
    ) -> Tensor:
        """Labels of an image, on the host, without ever holding the logits of all of it.

        Args:
            image: this and size as for `slabs`.
            size: of the labels.
            spacing: between pixels of the labels along each axis, in mm, for a decision that measures components.

        Returns:
            As `PostProcessing.labels`: class ids `(*size)` or bool planes `(classes, *size)`.

        Raises:
            ValueError: the network's logits are not numbers, which no label stands for; in `decide` too.
        """
        result: Tensor | None = None
        wanted = tuple(size) if size is not None else tuple(image.shape[1:])
        ids = self.activation == "softmax"
        for start, stop, part in self.slabs(image, size):
            labels = self.postprocessing.pixelwise(_numbers(part), activation=self.activation, threshold=self.threshold)
            if result is None:
                result = torch.empty(wanted if ids else (len(part), *wanted), dtype=labels.dtype)
            result[(slice(start, stop) if ids else (slice(None), slice(start, stop)))] = labels.cpu()
        if result is None:
            raise ValueError(f"the image must have pixels, got {tuple(image.shape)}")
        return self.postprocessing.clean(result, spacing)

    def decide(self, logits: Tensor, spacing: Sequence[float] | None = None) -> Tensor:
        """The labels of logits that `logits` made: what `labels` returns, on their device."""
        logits = _numbers(logits)
        return self.postprocessing.labels(logits, activation=self.activation, threshold=self.threshold, spacing=spacing)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The probabilities, after the temperature, of logits that `logits` made."""
        return probabilities(logits, self.activation, self.postprocessing.scale)

    def _whole(self, image: Sliceable) -> Iterator[Slab]:
        batch = torch.as_tensor(image[(slice(None),) * len(image.shape)]).unsqueeze(0).to(self.device)
        with torch.no_grad():
            logits = read_logits(self._together(batch))[0]
            logits = resize_to(logits, tuple(batch.shape[2:]))[0]
        yield 0, logits.shape[1], logits

    def _together(self, batch: Tensor) -> Tensor:
        """Logits of a batch of windows: of the one network, or of the mean over networks."""
        if len(self.nets) == 1:
            return self._mean_of_flips(self.nets[0], batch)
        scales = [decision.scale for decision in self.postprocessing_per_net]
        each = (self._mean_of_flips(net, batch) for net in self.nets)
        tempered = (z if scale == 1 else z / scale for z, scale in zip(each, scales, strict=True))
        mean = mean_logits(tempered, self.activation)
        # The decision divides by its temperature, which it has if all networks share it, again.
        return mean if self.postprocessing.scale == 1 else mean * self.postprocessing.scale

    def _mean_of_flips(self, net: Net, batch: Tensor) -> Tensor:
        """Logits of the mean over flips of one network's probabilities, before the temperature."""
        if not self.mirroring.axes:
            return read_logits(net(batch))[0]
        space = tuple(batch.shape[2:])
        return mean_logits(
            (
                flipped(resize_to(read_logits(net(flipped(batch, axes)))[0], space), axes)
                for axes in self.mirroring.combinations
            ),
            self.activation,
        )


def _numbers(logits: Tensor) -> Tensor:
    # The greatest of NaN and numbers would be NaN, and its class a label like any other.
    if bool(logits.isnan().any()):
        raise ValueError("the network's logits are NaN: its weights are, or the precision is too low for it")
    return logits
