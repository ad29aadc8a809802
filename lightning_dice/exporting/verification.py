"""An exported file beside the module that it was made of, on real cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.exporting.graph import Graph
from lightning_dice.functional.model_outputs import resize_to
from lightning_dice.scoring import Scoring, score_case

if TYPE_CHECKING:
    from lightning_dice.inference import Predictor, SlidingWindow


class VerificationCase(NamedTuple):
    """What both are run on.

    Attributes:
        name: of the case.
        image: `(channels, *space)`, as the data set has it.
        mask: the truth, as in `lightning_dice.data.Sample`; `None` if there is none.
    """

    name: str
    image: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Agreement:
    """How far they agree.

    Attributes:
        data: what they were run on, in words.
        cases: how many.
        pixels: how many labels were compared; those of each class's plane count by themselves.
        different: how many of them differ.
        largest_difference: of the file's own output: logits or probabilities; `None` of labels.
        dice: that of the module: the mean over the cases of each class, then over the classes; `None` without a truth.
        exported_dice: that of the file.
    """

    data: str
    cases: int
    pixels: int
    different: int
    largest_difference: float | None
    dice: float | None
    exported_dice: float | None

    @property
    def share(self) -> float:
        """Of labels that differ, in [0, 1]."""
        return self.different / self.pixels if self.pixels else 0.0

    def facts(self, tolerance: float) -> dict[str, Any]:
        """As plain values, for the facts of a file."""
        return {
            "data": self.data,
            "cases": self.cases,
            "pixels": self.pixels,
            "equal": 1 - self.share,
            "different_pixels": self.different,
            "tolerance": tolerance,
            "largest_difference": self.largest_difference,
            "dice": self.dice,
            "exported_dice": self.exported_dice,
        }


def verify(
    run: Callable[[Tensor], Tensor],
    predictor: Predictor,
    cases: Iterable[VerificationCase],
    *,
    data: str,
    graph: Graph,
    scoring: Scoring,
    normalize: Callable[[Tensor], Tensor] | None = None,
    inside: bool = False,
    window: SlidingWindow | None = None,
    batch: int | None = None,
) -> Agreement:
    """Run an exported file and the module on some cases, one after the other.

    Labels are compared at the size of the image, as each pixel's logits decide, before any removal of small components,
    which could hide a difference; Dice is that of the masks at their own size, of whole images.

    Args:
        run: the file's function of images `(batch, channels, *space)`.
        predictor: of the module, in evaluation mode on the CPU.
        cases: what to run on.
        data: these, in words.
        graph: what `run` returns.
        scoring: the classes; surfaces and lesions are not scored.
        normalize: of an image; `None`: none.
        inside: whether the file normalizes.
        window: both are run by windows and logits put together; for files that take one size, or whose module does.
        batch: images that the file takes at once, where that is fixed.

    Raises:
        ValueError: what the file returns is not of the shape that its graph has, or not finite.
    """
    from lightning_dice.inference import Predictor

    module = Predictor(
        predictor.nets,
        window,
        postprocessing=predictor.postprocessing,
        activation=predictor.activation,
        threshold=predictor.threshold,
    )
    exported = Predictor(
        [_in_batches(run, batch)],
        window,
        postprocessing=predictor.postprocessing,
        activation=predictor.activation,
        threshold=predictor.threshold,
    )
    count = pixels = different = 0
    largest: float | None = None
    scores: list[list[tuple[float, float]]] = []
    for case in cases:
        prepared = case.image if normalize is None else normalize(case.image)
        given = case.image if inside else prepared
        logits = module.logits(prepared)
        expected = _pixelwise(module, logits)
        output = exported.logits(given) if graph == "logits" else run(given.unsqueeze(0))[0]
        if output.is_floating_point() and not bool(output.isfinite().all()):
            raise ValueError(f"the file's {graph} of {case.name} are not finite")
        found = labels_of(exported, output, graph)
        if found.shape != expected.shape:
            raise ValueError(f"the labels of {case.name} must be {tuple(expected.shape)}, got {tuple(found.shape)}")
        count, pixels = count + 1, pixels + expected.numel()
        different += int((found != expected).sum())
        if graph != "labels":
            own = logits if graph == "logits" else module.probabilities(logits)
            largest = max(largest or 0.0, float((output - own).abs().max()))
        if case.mask is not None:
            space = tuple(case.mask.shape[case.mask.ndim - (case.image.ndim - 1) :])
            masks = (
                _labels_at(module, logits, "logits", space),
                _labels_at(exported, output, graph, space),
            )
            each = [score_case(mask, case.mask, scoring).classes for mask in masks]
            scores.append([(one.dice, other.dice) for one, other in zip(*each, strict=True)])
    return Agreement(data, count, pixels, different, largest, *_means(scores, scoring.scored))


def labels_of(predictor: Predictor, output: Tensor, graph: Graph) -> Tensor:
    """The labels that one image's output of a graph stands for: ids `(*space)` or bool planes `(classes, *space)`."""
    if graph == "labels":
        return output if predictor.activation == "softmax" else output.bool()
    if graph == "logits":
        return _pixelwise(predictor, output)
    decision = predictor.postprocessing
    if predictor.activation == "softmax":
        scale = torch.tensor(decision.thresholds or [1.0] * len(output), dtype=output.dtype)
        ids = (output / scale.view(-1, *[1] * (output.ndim - 1))).argmax(0)
        return ids.to(torch.uint8 if len(output) <= 256 else torch.int32)
    limits = torch.tensor(decision.thresholds or [predictor.threshold] * len(output), dtype=output.dtype)
    return output > limits.view(-1, *[1] * (output.ndim - 1))


def _pixelwise(predictor: Predictor, logits: Tensor) -> Tensor:
    return predictor.postprocessing.pixelwise(logits, activation=predictor.activation, threshold=predictor.threshold)


def _labels_at(predictor: Predictor, output: Tensor, graph: Graph, space: tuple[int, ...]) -> Tensor:
    """Labels at the size of a mask: of logits and probabilities by linear interpolation, of labels by the nearest."""
    ids = graph == "labels" and predictor.activation == "softmax"
    if tuple(output.shape[0 if ids else 1 :]) == space:
        return labels_of(predictor, output, graph)
    if graph != "labels":
        return labels_of(predictor, resize_to(output.unsqueeze(0), space)[0], graph)
    planes = output[None, None] if ids else output[None]
    resized = F.interpolate(planes.float(), size=space, mode="nearest-exact")[0].to(output.dtype)
    return labels_of(predictor, resized[0] if ids else resized, graph)


def _in_batches(run: Callable[[Tensor], Tensor], size: int | None) -> Callable[[Tensor], Tensor]:
    """As `run`, for a file that takes a fixed number of images at once."""
    if size is None:
        return run
    return lambda images: torch.cat([run(images[start : start + size]) for start in range(0, len(images), size)])


def _means(scores: Sequence[Sequence[tuple[float, float]]], scored: Sequence[int]) -> tuple[float | None, float | None]:
    means = []
    for side in range(2):
        each = []
        for index in scored:
            known = [case[index][side] for case in scores if not math.isnan(case[index][side])]
            if known:
                each.append(sum(known) / len(known))
        means.append(sum(each) / len(each) if each else None)
    return means[0], means[1]
