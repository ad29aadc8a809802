"""The prediction and the mask of a batch, in the form that each metric takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.wrappers import MultioutputWrapper, MultitaskWrapper
from torchmetrics.wrappers.abstract import WrapperMetric

from lightning_dice.functional import hard_prediction, hard_target
from lightning_dice.metrics import DiceScore

# What a metric takes. "logits": the logits and the mask; "counts": the same, with the mask as it is stored; "binary",
# "multiclass" and "multilabel": probabilities and the mask, as in torchmetrics.classification; "ranking": the same as
# "multilabel", of the pixels that count; "one-hot": planes of 0 and 1 of both, as in torchmetrics.segmentation;
# "outputs": probabilities and the mask, as planes.
Form = Literal[
    "logits", "counts", "binary", "multiclass", "multilabel", "ranking", "one-hot", "binary one-hot", "outputs"
]


def metric_form(metric: Metric) -> Form:
    """Return what a metric takes; a wrapper takes what the metric in it takes.

    Raises:
        ValueError: no segmentation gives what the metric takes.

    >>> from torchmetrics.classification import BinaryAUROC
    >>> metric_form(BinaryAUROC())
    'binary'
    """
    if isinstance(metric, MultitaskWrapper):
        raise ValueError("it takes several predictions and targets, by name: pass the metrics in it by name instead")
    if isinstance(metric, MultioutputWrapper):
        if metric.output_dim != 1:
            raise ValueError(
                f"it splits axis {metric.output_dim}, where the classes of a mask are axis 1: output_dim=1"
            )
        return "outputs"
    if isinstance(metric, WrapperMetric):
        if _transforms_predictions(metric):
            return "logits"
        forms = {metric_form(child) for child in _direct_metrics(metric)}
        if len(forms) > 1:
            raise ValueError("the metrics in it take different forms of a mask: pass each on its own")
        return forms.pop() if forms else "logits"
    if isinstance(metric, DiceScore):
        return "counts"
    for kind in type(metric).__mro__:
        if kind.__module__.startswith("torchmetrics.segmentation"):
            return "one-hot"
        if kind.__module__.startswith("torchmetrics.classification"):
            if kind.__name__ in ("BinaryFairness", "BinaryGroupStatRates"):
                raise ValueError("it takes the group of each pixel besides prediction and mask")
            if kind.__name__.startswith(("MultilabelCoverage", "MultilabelRanking")):
                return "ranking"  # With an ignore_index, they count an ignored pixel as a perfect one.
            for form in ("Binary", "Multiclass", "Multilabel"):
                if kind.__name__.startswith(form):
                    return cast(Form, form.lower())
    return "logits"


def prepare_metric(metric: Metric, ignore_index: int | None) -> None:
    """Check that a metric can score segmentations, and let it ignore the pixels that the loss ignores.

    An `ignore_index` of its own wins.

    Args:
        metric: changed in place.
        ignore_index: label of the pixels that the loss ignores.

    Raises:
        ValueError: no segmentation gives what the metric takes, or it has a value for each image.

    >>> metric = DiceScore()
    >>> prepare_metric(metric, 255)
    >>> metric.ignore_index
    255
    """
    form = metric_form(metric)
    if getattr(metric, "multidim_average", "global") == "samplewise":
        raise ValueError(
            'it has a value for each image, which is not a number to log: multidim_average="global", or the callback '
            "CaseTable for the scores of each image"
        )
    if form == "logits":
        return  # A metric of the user's own, or with their own transformation.
    if isinstance(metric, WrapperMetric):
        for part in _direct_metrics(metric):
            prepare_metric(part, ignore_index)
    elif form == "one-hot":
        metric.input_format = "one-hot"
    elif getattr(metric, "ignore_index", ignore_index) is None:
        metric.ignore_index = ignore_index


def _direct_metrics(module: nn.Module) -> Iterator[Metric]:
    """Yield the metrics below a module that are in no other metric below it."""
    for child in module.children():
        if isinstance(child, Metric):
            yield child
        else:
            yield from _direct_metrics(child)


def _transforms_predictions(metric: WrapperMetric) -> bool:
    """Return whether a wrapper has a function of predictions from its user."""
    return "transform_pred" in vars(metric) or any(
        "transform_pred" in vars(kind)
        for kind in type(metric).__mro__
        if not kind.__module__.startswith("torchmetrics.")
    )


@dataclass
class MetricInputs:
    """A batch's prediction and mask, converted once for each form that metrics take.

    Args:
        logits: `(batch, classes, *space)`.
        mask: class ids `(batch, *space)`, or planes `(batch, classes, *space)`; soft labels are made hard.
        activation: of the logits; by default that which fits the shape of the mask.
        threshold: a probability above which a pixel is foreground, for metrics that take labels; with a sigmoid only.
        ignore_index: label of the pixels to ignore.

    >>> from torchmetrics.classification import MulticlassJaccardIndex
    >>> inputs = MetricInputs(torch.zeros(1, 3, 2), torch.tensor([[0, 2]], dtype=torch.uint8))
    >>> [(values.dtype, tuple(values.shape)) for values in inputs.for_metric(MulticlassJaccardIndex(3))]
    [(torch.float32, (1, 3, 2)), (torch.int64, (1, 2))]
    """

    logits: Tensor
    mask: Tensor
    activation: Any = None
    threshold: float = 0.5
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        has_planes = self.mask.shape == self.logits.shape
        if self.activation not in ("sigmoid", "softmax"):
            self.activation = "sigmoid" if has_planes else "softmax"
        if self.mask.is_floating_point() and has_planes:
            self.mask = hard_target(self.mask, activation=self.activation)
        self._known: dict[Form, tuple[Tensor, Tensor]] = {}

    def for_metric(self, metric: Metric) -> tuple[Tensor, Tensor]:
        """Return the arguments of the `update` of a metric.

        Raises:
            ValueError: the metric is for another number of classes, or for classes that exclude each other where these
                may overlap, or the reverse.
        """
        form = metric_form(metric)
        name = "num_labels" if form in ("multilabel", "ranking") else "num_classes"
        parts = [part for part in metric.modules() if isinstance(part, Metric)]
        expected = next(
            (part_classes for part in parts if (part_classes := getattr(part, name, None)) is not None), None
        )
        # A plane of a sigmoid is class 1 of 2 to a metric of exclusive classes.
        if form == "one-hot" and self.logits.shape[1] == 1 and expected == 2:
            form = "binary one-hot"
        if form not in self._known:
            self._known[form] = self._convert(form)
        preds, target = self._known[form]
        if form in ("multiclass", "multilabel", "ranking", "one-hot") and expected not in (None, preds.shape[1]):
            raise ValueError(f"it is for {expected} classes, the logits have {preds.shape[1]}")
        return preds, target

    def _convert(self, form: Form) -> tuple[Tensor, Tensor]:
        if form == "counts":
            return self.logits, self.mask
        mask = self.mask.long()
        if form == "logits":
            return self.logits, mask
        channels, exclusive = self.logits.shape[1], self.activation == "softmax"
        if form in ("one-hot", "binary one-hot"):
            return self._planes(two=form == "binary one-hot")
        # In float32, where few probabilities round to 0 or 1; and none of the metrics takes logits in [0, 1] for them.
        logits = self.logits.float()
        probs = logits.softmax(1) if exclusive else logits.sigmoid()
        if form == "outputs":
            if not exclusive:
                return probs, mask
            valid = self._valid(mask)
            planes = self._planes_of_ids(mask.where(valid, 0))
            return probs, planes if self.ignore_index is None else planes.where(valid.unsqueeze(1), self.ignore_index)
        if form in ("multilabel", "ranking") and exclusive:
            raise ValueError("it is for classes that may overlap; with a softmax use a Multiclass... metric")
        if form == "ranking":
            valid = self._valid(mask).all(1)
            return probs.movedim(1, -1)[valid], mask.movedim(1, -1)[valid]
        if form == "binary" and exclusive:
            if channels != 2:
                raise ValueError(f"it is for one class, the logits have {channels}: use a Multiclass... metric")
            return probs[:, 1], mask
        if form == "multiclass" and not exclusive:
            if channels > 1:
                raise ValueError("it is for classes that exclude each other; with a sigmoid use a Multilabel... metric")
            return torch.cat([1 - probs, probs], 1), mask.squeeze(1)
        return probs, mask

    def _planes(self, *, two: bool) -> tuple[Tensor, Tensor]:
        """Return planes of 0 and 1 of prediction and mask; ignored pixels are 0 in both, hence in no sum.

        Args:
            two: return a plane of the background before that of the only class.
        """
        labels = hard_prediction(self.logits, activation=self.activation, threshold=self.threshold)
        mask = self.mask.long()
        valid = self._valid(mask)
        if self.activation == "softmax":
            preds, target = self._planes_of_ids(labels), self._planes_of_ids(mask.where(valid, 0))
            valid = valid.unsqueeze(1)
        else:
            preds, target = labels.long(), mask
            if two:
                preds, target = (torch.cat([1 - planes, planes], 1) for planes in (preds, target))
        return preds * valid, target * valid

    def _planes_of_ids(self, ids: Tensor) -> Tensor:
        return nn.functional.one_hot(ids, self.logits.shape[1]).movedim(-1, 1)

    def _valid(self, mask: Tensor) -> Tensor:
        return torch.ones_like(mask, dtype=torch.bool) if self.ignore_index is None else mask != self.ignore_index
