"""Comparison of an exported file with the module that it was made from, on real cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.exporting.graph import OutputType
from lightning_dice.functional.model_outputs import resize_to
from lightning_dice.scoring import Scoring, score_case

if TYPE_CHECKING:
    from lightning_dice.inference import Predictor, SlidingWindow


class VerificationCase(NamedTuple):
    """A case that both the file and the module predict.

    Attributes:
        name: the case's name.
        image: `(channels, *space)`, as the data set returns it.
        mask: the reference, as in `lightning_dice.data.Sample`; `None` if there is none.
    """

    name: str
    image: Tensor
    mask: Tensor | None = None


class OpenedFile(NamedTuple):
    """An exported file, opened to be run.

    Attributes:
        run: its function of images `(batch, channels, *space)`.
        output_type: what `run` returns.
        normalizes: whether `run` normalizes the images.
        batch_size: the number of images that `run` takes; `None`: any.
    """

    run: Callable[[Tensor], Tensor]
    output_type: OutputType
    normalizes: bool = False
    batch_size: int | None = None


@dataclass(frozen=True)
class Agreement:
    """How far an exported file and its module agree.

    Attributes:
        data: a description of the cases.
        cases: their number.
        pixels: number of compared labels; each class's plane counts separately.
        different: number of labels that differ.
        largest_difference: in the file's logits or probabilities; `None` for labels.
        dice: the module's: the mean over the cases for each class, then over the classes; `None` without references.
        exported_dice: the file's.
    """

    data: str
    cases: int
    pixels: int
    different: int
    largest_difference: float | None
    dice: float | None
    exported_dice: float | None

    @property
    def different_fraction(self) -> float:
        """The fraction of labels that differ, in [0, 1]."""
        return self.different / self.pixels if self.pixels else 0.0

    def metadata(self, tolerance: float) -> dict[str, Any]:
        """Return plain values for the metadata of the file.

        Args:
            tolerance: the fraction of labels that may differ.
        """
        return {
            "data": self.data,
            "cases": self.cases,
            "pixels": self.pixels,
            "equal": 1 - self.different_fraction,
            "different_pixels": self.different,
            "tolerance": tolerance,
            "largest_difference": self.largest_difference,
            "dice": self.dice,
            "exported_dice": self.exported_dice,
        }


def verify(
    file: OpenedFile,
    predictor: Predictor,
    cases: Iterable[VerificationCase],
    *,
    data: str,
    scoring: Scoring,
    normalize: Callable[[Tensor], Tensor] | None = None,
    window: SlidingWindow | None = None,
) -> Agreement:
    """Predict cases with an exported file and with its module, and compare.

    Labels are compared at the size of the image and before small components are removed, which could hide a difference.
    Dice is computed at the masks' own size.

    Args:
        file: the exported file.
        predictor: the module's predictor, in evaluation mode on the CPU.
        cases: predicted one after the other.
        data: a description of them.
        scoring: the classes; surfaces and lesions are not scored.
        normalize: normalizes one image; `None`: it is left unchanged.
        window: for both the module and the file; `None`: whole images.

    Raises:
        ValueError: the file's outputs have the wrong shape, or are not finite.
    """
    module, exported = (
        _pixelwise_predictor(predictor, nets, window)
        for nets in (predictor.nets, [_in_batches(file.run, file.batch_size)])
    )
    count = pixels = different = 0
    largest: float | None = None
    scores: list[list[tuple[float, float]]] = []
    for case in cases:
        normalized = case.image if normalize is None else normalize(case.image)
        image = case.image if file.normalizes else normalized
        logits = module.logits(normalized)
        expected = _pixelwise(module, logits)
        output = exported.logits(image) if file.output_type == "logits" else file.run(image.unsqueeze(0))[0]
        if output.is_floating_point() and not bool(output.isfinite().all()):
            raise ValueError(f"the file's {file.output_type} of {case.name} are not finite")
        labels = labels_of_output(exported, output, file.output_type)
        if labels.shape != expected.shape:
            raise ValueError(f"the labels of {case.name} must be {tuple(expected.shape)}, got {tuple(labels.shape)}")
        count, pixels = count + 1, pixels + expected.numel()
        different += int((labels != expected).sum())
        if file.output_type != "labels":
            reference = logits if file.output_type == "logits" else module.probabilities(logits)
            largest = max(largest or 0.0, float((output - reference).abs().max()))
        if case.mask is not None:
            space = tuple(case.mask.shape[case.mask.ndim - (case.image.ndim - 1) :])
            masks = _labels_at(module, logits, "logits", space), _labels_at(exported, output, file.output_type, space)
            both = [score_case(mask, case.mask, scoring).classes for mask in masks]
            scores.append([(one.dice, other.dice) for one, other in zip(*both, strict=True)])
    dice, exported_dice = (_mean_dice(scores, side, scoring.scored) for side in range(2))
    return Agreement(data, count, pixels, different, largest, dice, exported_dice)


def labels_of_output(predictor: Predictor, output: Tensor, output_type: OutputType) -> Tensor:
    """Return the labels of a file's output for one image: ids `(*space)` or bool planes `(classes, *space)`."""
    if output_type == "labels":
        return output if predictor.activation == "softmax" else output.bool()
    if output_type == "logits":
        return _pixelwise(predictor, output)
    thresholds = predictor.postprocessing.thresholds
    column = (-1, *[1] * (output.ndim - 1))
    if predictor.activation == "softmax":
        divisors = torch.tensor(thresholds or [1.0] * len(output), dtype=output.dtype)
        ids = (output / divisors.view(column)).argmax(0)
        return ids.to(torch.uint8 if len(output) <= 256 else torch.int32)
    limits = torch.tensor(thresholds or [predictor.threshold] * len(output), dtype=output.dtype)
    return output > limits.view(column)


def _pixelwise_predictor(
    predictor: Predictor, nets: Sequence[Callable[[Tensor], Any]], window: SlidingWindow | None
) -> Predictor:
    """Return a predictor with the same post-processing, but without mirroring."""
    from lightning_dice.inference import Predictor

    return Predictor(
        nets,
        window,
        postprocessing=predictor.postprocessing,
        activation=predictor.activation,
        threshold=predictor.threshold,
    )


def _pixelwise(predictor: Predictor, logits: Tensor) -> Tensor:
    return predictor.postprocessing.pixelwise(logits, activation=predictor.activation, threshold=predictor.threshold)


def _labels_at(predictor: Predictor, output: Tensor, output_type: OutputType, space: tuple[int, ...]) -> Tensor:
    """Return labels at the size of a mask; logits and probabilities are interpolated, labels are the nearest."""
    ids = output_type == "labels" and predictor.activation == "softmax"
    if tuple(output.shape[0 if ids else 1 :]) == space:
        return labels_of_output(predictor, output, output_type)
    if output_type != "labels":
        return labels_of_output(predictor, resize_to(output.unsqueeze(0), space)[0], output_type)
    planes = output[None, None] if ids else output[None]
    resized = F.interpolate(planes.float(), size=space, mode="nearest-exact")[0].to(output.dtype)
    return labels_of_output(predictor, resized[0] if ids else resized, output_type)


def _in_batches(run: Callable[[Tensor], Tensor], size: int | None) -> Callable[[Tensor], Tensor]:
    """Return `run` for any number of images, where it takes a fixed number at once."""
    if size is None:
        return run
    return lambda images: torch.cat([run(images[start : start + size]) for start in range(0, len(images), size)])


def _mean_dice(scores: Sequence[Sequence[tuple[float, float]]], side: int, scored: Sequence[int]) -> float | None:
    """Return the mean over the cases and then the classes, of the module (side 0) or the file (1)."""
    means = []
    for index in scored:
        known = [case[index][side] for case in scores if not math.isnan(case[index][side])]
        if known:
            means.append(sum(known) / len(known))
    return sum(means) / len(means) if means else None
