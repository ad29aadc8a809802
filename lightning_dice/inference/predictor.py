"""Logits and labels of single images, from one network or an ensemble, for evaluation and prediction alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_dice.argument_checks import check_choice, check_number
from lightning_dice.functional.activations import probabilities
from lightning_dice.functional.model_outputs import read_logits, resize_to
from lightning_dice.inference.logit_resampling import resample_chunks
from lightning_dice.inference.postprocessing import PostProcessing, combine_postprocessing
from lightning_dice.inference.sliding_window import Chunk, ImportanceMap, Net, Sliceable, SlidingWindow
from lightning_dice.inference.test_time_augmentation import Mirroring, mean_logits, mirror


class Inference:
    """Settings of a module's evaluation and prediction: windows, mirroring and post-processing.

    Args:
        size: window size in pixels, for each space axis; `None`: the whole image at once.
        overlap: passed to `SlidingWindow`, like the next two; ignored if `size` is `None`.
        importance_map: see `SlidingWindow`.
        batch_size: see `SlidingWindow`.
        mirror_axes: passed to `Mirroring`; with 2 axes, the mean of 4 predictions of each image.
        postprocessing: how logits become labels; by default as in `hard_prediction`.

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
        # Constructed even without a size, so that invalid settings fail early.
        window = SlidingWindow(size if size is not None else [1], overlap, importance_map, batch_size)
        self.window = window if size is not None else None
        self.mirroring = Mirroring(mirror_axes)
        self.postprocessing = postprocessing if postprocessing is not None else PostProcessing()

    def __repr__(self) -> str:
        return (
            f"Inference(window={self.window}, mirror_axes={list(self.mirroring.axes)}, "
            f"postprocessing={self.postprocessing})"
        )

    @property
    def is_single_pass(self) -> bool:
        """Whether logits come from one pass of the whole image through the network."""
        return self.window is None and not self.mirroring.axes


class Predictor:
    """Predict one image at a time.

    Each network predicts the image, or each window of it, and its mirror images; their probabilities are averaged. In
    an ensemble, these means are divided by each network's temperature and averaged once more. The logits of the mean
    are assembled from the windows, resized and post-processed, so that a calibration sees the logits that its
    temperature will be applied to. A single network without mirroring keeps its own logits unchanged.

    Images are processed in chunks along the first space axis: `labels` needs memory for the sums of one window's
    depth, however long that axis is. `logits` computes the same numbers for the whole image.

    Args:
        nets: each takes images `(batch, channels, *space)` on `device`, in evaluation mode, and returns logits in any
            of the forms that `lightning_dice.functional.read_logits` reads; a `SegmentationModule` is one.
        window: `None`: the whole image at once.
        mirroring: by default none.
        postprocessing: how logits become labels. For several networks one, or one for each, whose temperatures are
            then applied before the mean; see `combine_postprocessing`.
        activation: for the logits, `"sigmoid"` or `"softmax"`.
        threshold: a probability, for a sigmoid without thresholds in `postprocessing`.
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
        self.postprocessing = combine_postprocessing(each, self.threshold)

    @classmethod
    def ensemble(cls, predictors: Sequence[Predictor]) -> Predictor:
        """Return a predictor with the networks of several; windows and mirroring are those of the first.

        Raises:
            ValueError: their activations, devices or thresholds differ, or their post-processing cannot be combined.
        """
        first = predictors[0]
        postprocessing = [each for predictor in predictors for each in predictor.postprocessing_per_net]
        needs_threshold = first.activation == "sigmoid" and any(each.thresholds is None for each in postprocessing)
        for name in ("activation", "device", *(["threshold"] if needs_threshold else [])):
            values = {str(getattr(predictor, name)) for predictor in predictors}
            if len(values) > 1:
                found = ", ".join(sorted(values))
                raise ValueError(f"the networks of an ensemble must have the same {name}, got {found}")
        return cls(
            [net for predictor in predictors for net in predictor.nets],
            first.window,
            first.mirroring,
            postprocessing,
            activation=first.activation,
            threshold=first.threshold,
            device=first.device,
        )

    def chunks(self, image: Sliceable, size: Sequence[int] | None = None) -> Iterator[Chunk]:
        """Yield the logits of an image in chunks of rows along the first space axis.

        Args:
            image: `(channels, *space)`, normalized: a tensor, or a reader of parts of a file, see `Sliceable`.
            size: the space axes of the logits, which are interpolated linearly; by default those of the image.

        Yields:
            The rows `start` to `stop` and their logits `(classes, stop - start, *rest)`: with a window float32 on the
            host, else on the device.
        """
        space = tuple(image.shape[1:])
        size = space if size is None else tuple(int(length) for length in size)
        if len(size) != len(space) or min(size, default=1) < 1:
            raise ValueError(f"size must be one number of pixels >= 1 for each of the axes {space}, got {list(size)}")
        self.mirroring.check(len(space))
        if self.window is None:
            chunks = self._whole_image(image)
        else:
            chunks = self.window.chunks(image, self._ensemble_logits, self.device)
        return resample_chunks(chunks, space, size)

    def logits(self, image: Sliceable, size: Sequence[int] | None = None) -> Tensor:
        """Return the logits `(classes, *size)` of an image; see `chunks`."""
        result: Tensor | None = None
        shape = tuple(size) if size is not None else tuple(image.shape[1:])
        for start, stop, logits in self.chunks(image, size):
            if stop - start == shape[0]:
                return logits
            if result is None:
                result = logits.new_empty(logits.shape[0], *shape)
            result[:, start:stop] = logits
        if result is None:
            raise ValueError(f"the image must have pixels, got {tuple(image.shape)}")
        return result

    def labels(
        self, image: Sliceable, size: Sequence[int] | None = None, spacing: Sequence[float] | None = None
    ) -> Tensor:
        """Return the labels of an image, on the host, without holding all of its logits in memory.

        Args:
            image: as for `chunks`.
            size: the space axes of the labels; by default those of the image.
            spacing: the labels' pixel spacing along each axis, in mm, for post-processing that measures components.

        Returns:
            As `PostProcessing.labels`: class ids `(*size)` or bool planes `(classes, *size)`.

        Raises:
            ValueError: the network's logits are NaN.
        """
        result: Tensor | None = None
        shape = tuple(size) if size is not None else tuple(image.shape[1:])
        ids = self.activation == "softmax"
        for start, stop, logits in self.chunks(image, size):
            _check_numbers(logits)
            labels = self.postprocessing.pixelwise(logits, activation=self.activation, threshold=self.threshold)
            if result is None:
                result = torch.empty(shape if ids else (len(logits), *shape), dtype=labels.dtype)
            result[(slice(start, stop) if ids else (slice(None), slice(start, stop)))] = labels.cpu()
        if result is None:
            raise ValueError(f"the image must have pixels, got {tuple(image.shape)}")
        return self.postprocessing.remove_components(result, spacing)

    def labels_from_logits(self, logits: Tensor, spacing: Sequence[float] | None = None) -> Tensor:
        """Return the labels of logits that `logits` returned, on their device; equal to those of `labels`.

        Raises:
            ValueError: the logits are NaN.
        """
        _check_numbers(logits)
        return self.postprocessing.labels(logits, activation=self.activation, threshold=self.threshold, spacing=spacing)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities, after the temperature, of logits that `logits` returned."""
        return probabilities(logits, self.activation, self.postprocessing.scale)

    def _whole_image(self, image: Sliceable) -> Iterator[Chunk]:
        batch = torch.as_tensor(image[(slice(None),) * len(image.shape)]).unsqueeze(0).to(self.device)
        with torch.no_grad():
            logits = read_logits(self._ensemble_logits(batch))[0]
            logits = resize_to(logits, tuple(batch.shape[2:]))[0]
        yield 0, logits.shape[1], logits

    def _ensemble_logits(self, batch: Tensor) -> Tensor:
        """Return the logits of a batch of windows, by the network or the mean over networks."""
        if len(self.nets) == 1:
            return self._mirrored_logits(self.nets[0], batch)
        scales = [each.scale for each in self.postprocessing_per_net]
        predictions = (self._mirrored_logits(net, batch) for net in self.nets)
        tempered = (z if scale == 1 else z / scale for z, scale in zip(predictions, scales, strict=True))
        mean = mean_logits(tempered, self.activation)
        # A temperature that all networks share remains in the combined post-processing, which divides by it again.
        return mean if self.postprocessing.scale == 1 else mean * self.postprocessing.scale

    def _mirrored_logits(self, net: Net, batch: Tensor) -> Tensor:
        """Return the logits of one network's mean probabilities over mirror images, before the temperature."""
        if not self.mirroring.axes:
            return read_logits(net(batch), batch.shape[2:])[0]
        space = tuple(batch.shape[2:])
        return mean_logits(
            (
                mirror(resize_to(read_logits(net(mirror(batch, axes)), space)[0], space), axes)
                for axes in self.mirroring.combinations
            ),
            self.activation,
        )


def _check_numbers(logits: Tensor) -> None:
    # The argmax of NaN and numbers is NaN's index, a class like any other.
    if bool(logits.isnan().any()):
        raise ValueError("the network's logits are NaN: its weights are, or the precision is too low for it")
