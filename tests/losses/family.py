"""The table of losses that the tests of this folder share; add a row for a new loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from definitions import (
    LEAST,
    PlainImages,
    plain_cross_entropy,
    plain_dice,
    plain_focal,
    plain_images,
    plain_jaccard,
    plain_overlap_loss,
    plain_squared_error,
    plain_top_k,
    plain_tversky,
    root,
)
from torch import Tensor, nn

from lightning_dice.losses import (
    BoundaryLoss,
    BoundaryWeightedLoss,
    ClDiceLoss,
    CompoundLoss,
    CrossEntropyLoss,
    DeepSupervision,
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    FocalLoss,
    FocalTverskyLoss,
    GeneralizedDiceLoss,
    HausdorffLoss,
    JaccardLoss,
    LesionWiseLoss,
    LogCoshDiceLoss,
    LogDiceLoss,
    LogJaccardLoss,
    LogTverskyLoss,
    OnProbabilities,
    SkeletonRecallLoss,
    SumsLoss,
    TopKCrossEntropyLoss,
    TverskyLoss,
)

OVERLAP = frozenset({"smooth", "pool", "exclude_classes", "class_weights", "absent", "weight"})
BY_PIXEL = frozenset({"pool", "class_weights", "weight"})


@dataclass(frozen=True)
class Row:
    """A loss, its settings and its definition.

    Attributes:
        name: of the loss, for the ids of tests.
        make: makes the loss from its settings.
        plain: computes the value from the pixels and the settings, without `activation` and `ignore_index`.
        takes: the common settings that it has; `"weight"`: pixel weights and `annotated`.
        own: sets of its own settings, by name; each is a test case.
        activations: the activations that it has.
        pools: the pools that it has.
    """

    name: str
    make: Callable[..., nn.Module]
    plain: Callable[..., float]
    takes: frozenset[str]
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    activations: tuple[str | None, ...] = ("sigmoid", "softmax", None)
    pools: tuple[str, ...] = ("image", "batch", "all")

    @property
    def overlaps(self) -> bool:
        """Whether it is an overlap loss, which has a policy for absent classes."""
        return "absent" in self.takes


@dataclass(frozen=True)
class Case:
    """A row with one set of its own settings."""

    row: Row
    id: str
    own: Mapping[str, Any]

    @property
    def activations(self) -> tuple[str | None, ...]:
        # A softmax has no foreground of each plane.
        return tuple(a for a in self.row.activations if not (a == "softmax" and self.own.get("alpha") is not None))

    @property
    def of_sums(self) -> bool:
        """Whether it is a formula on sums."""
        return isinstance(self.loss(activation=self.activations[0]), SumsLoss)

    def kept(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the common settings that the loss has."""
        return {
            name: value
            for name, value in settings.items()
            if name in self.row.takes and not (name == "pool" and value not in self.row.pools)
        }

    def loss(self, activation: str | None = "sigmoid", ignore_index: int | None = None, **settings: Any) -> nn.Module:
        """Make the loss, without the common settings that it does not have."""
        return self.row.make(activation=activation, ignore_index=ignore_index, **self.own, **self.kept(settings))

    def plain(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        annotated: Tensor | None = None,
        *,
        activation: str | None = "sigmoid",
        ignore_index: int | None = None,
        **settings: Any,
    ) -> float:
        """Compute its value from the definition."""
        images = plain_images(
            logits, target, activation=activation, ignore_index=ignore_index, weight=weight, annotated=annotated
        )
        return self.row.plain(images, **self.own, **self.kept(settings))


def dice(images: PlainImages, **settings: Any) -> float:
    return plain_overlap_loss(images, plain_dice, **settings)


def jaccard(images: PlainImages, **settings: Any) -> float:
    return plain_overlap_loss(images, plain_jaccard, **settings)


def tversky(images: PlainImages, alpha: float = 0.3, beta: float = 0.7, **settings: Any) -> float:
    return plain_overlap_loss(images, plain_tversky(alpha, beta), **settings)


def focal_tversky(
    images: PlainImages, gamma: float = 0.75, alpha: float = 0.3, beta: float = 0.7, **settings: Any
) -> float:
    score = plain_tversky(alpha, beta)
    return plain_overlap_loss(images, score, lambda value: root(1 - value, gamma), **settings)


def generalized_dice(images: PlainImages, weighting: str = "inverse_square", **settings: Any) -> float:
    return plain_overlap_loss(images, plain_dice, weighting=weighting, **settings)


def log_dice(images: PlainImages, gamma: float = 1.0, **settings: Any) -> float:
    def penalty(score: float) -> float:
        return root(-math.log(max(score, LEAST)), gamma)

    return plain_overlap_loss(images, plain_dice, penalty, **settings)


def log_jaccard(images: PlainImages, gamma: float = 1.0, **settings: Any) -> float:
    def penalty(score: float) -> float:
        return root(-math.log(max(score, LEAST)), gamma)

    return plain_overlap_loss(images, plain_jaccard, penalty, **settings)


def log_tversky(
    images: PlainImages, gamma: float = 1.0, alpha: float = 0.3, beta: float = 0.7, **settings: Any
) -> float:
    score = plain_tversky(alpha, beta)
    return plain_overlap_loss(images, score, lambda value: root(-math.log(max(value, LEAST)), gamma), **settings)


def log_cosh_dice(images: PlainImages, **settings: Any) -> float:
    return plain_overlap_loss(images, plain_dice, lambda score: math.log(math.cosh(1 - score)), **settings)


def without(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a Dice loss that the other term of a compound shares."""
    return {name: value for name, value in settings.items() if name == "class_weights"}


def dice_ce(
    images: PlainImages, dice_weight: float = 1.0, ce_weight: float = 1.0, label_smoothing: float = 0.0, **settings: Any
) -> float:
    ce = plain_cross_entropy(images, label_smoothing=label_smoothing, **shared(settings))
    return dice_weight * dice(images, **settings) + ce_weight * ce


def dice_focal(
    images: PlainImages,
    dice_weight: float = 1.0,
    focal_weight: float = 1.0,
    gamma: float = 2.0,
    alpha: float | None = None,
    **settings: Any,
) -> float:
    focal = plain_focal(images, gamma=gamma, alpha=alpha, **shared(settings))
    return dice_weight * dice(images, **settings) + focal_weight * focal


def compound(activation: str | None, ignore_index: int | None, **settings: Any) -> CompoundLoss:
    """Make a compound of terms with two focal factors, which need two passes, and one that is not a formula on sums."""
    both = {"activation": activation, "ignore_index": ignore_index}
    return CompoundLoss(
        {
            "tversky": TverskyLoss(**both, **settings),
            "focal": FocalLoss(**both, **shared(settings)),
            "sharp": FocalLoss(gamma=0.5, **both),
            "hardest": TopKCrossEntropyLoss(k=0.5, **both),
        },
        {"focal": 0.5, "sharp": 0.25, "hardest": 2.0},
    )


def plain_compound(images: PlainImages, **settings: Any) -> float:
    focal = 0.5 * plain_focal(images, **shared(settings)) + 0.25 * plain_focal(images, gamma=0.5)
    return tversky(images, **settings) + focal + 2 * plain_top_k(images, k=0.5)


def on_probabilities(**settings: Any) -> OnProbabilities:
    return OnProbabilities(nn.MSELoss(), **settings)


DICE = {"": {}, "squared": {"squared": True}, "minimum": {"overlap": "minimum"}}

ROWS = [
    Row("dice", DiceLoss, dice, OVERLAP, DICE),
    Row("jaccard", JaccardLoss, jaccard, OVERLAP, DICE),
    Row("tversky", TverskyLoss, tversky, OVERLAP, {"": {}, "minimum": {"alpha": 1.5, "beta": 0, "overlap": "minimum"}}),
    Row("focal_tversky", FocalTverskyLoss, focal_tversky, OVERLAP, {"": {}, "sharp": {"gamma": 2, "alpha": 0.5}}),
    Row(
        "generalized_dice",
        GeneralizedDiceLoss,
        generalized_dice,
        OVERLAP - {"class_weights"},
        {
            "": {},
            "inverse": {"weighting": "inverse"},
            "uniform": {"weighting": "uniform", "squared": True},
            "minimum": {"overlap": "minimum"},
        },
        pools=("image", "batch"),
    ),
    Row("log_dice", LogDiceLoss, log_dice, OVERLAP, {"": {}, "root": {"gamma": 0.3}, "squared": {"squared": True}}),
    Row("log_jaccard", LogJaccardLoss, log_jaccard, OVERLAP, {"": {}, "root": {"gamma": 0.3, "squared": True}}),
    Row("log_tversky", LogTverskyLoss, log_tversky, OVERLAP, {"": {}, "sharp": {"gamma": 2, "alpha": 0.5}}),
    Row("log_cosh_dice", LogCoshDiceLoss, log_cosh_dice, OVERLAP),
    Row(
        "cross_entropy",
        CrossEntropyLoss,
        plain_cross_entropy,
        BY_PIXEL,
        {"": {}, "smoothed": {"label_smoothing": 0.2}},
        pools=("image", "batch"),
    ),
    Row(
        "focal",
        FocalLoss,
        plain_focal,
        BY_PIXEL,
        {"": {}, "root": {"gamma": 0.5}, "alpha": {"gamma": 1.5, "alpha": 0.25}, "none": {"gamma": 0}},
        pools=("image", "batch"),
    ),
    Row(
        "top_k",
        TopKCrossEntropyLoss,
        plain_top_k,
        BY_PIXEL - {"pool"},
        {"": {}, "half": {"k": 0.5}, "all": {"k": 1.0}},
        pools=("image",),
    ),
    Row(
        "dice_ce",
        DiceCELoss,
        dice_ce,
        OVERLAP,
        {"": {}, "weighted": {"dice_weight": 0.5, "ce_weight": 2, "label_smoothing": 0.1, "squared": True}},
    ),
    Row("dice_focal", DiceFocalLoss, dice_focal, OVERLAP, {"": {}, "alpha": {"focal_weight": 0.5, "alpha": 0.75}}),
    Row("compound", compound, plain_compound, OVERLAP),
    Row("on_probabilities", on_probabilities, plain_squared_error, frozenset(), pools=("batch",)),
]

CASES = [
    Case(row, f"{row.name}-{choice}" if choice else row.name, own) for row in ROWS for choice, own in row.own.items()
]
FIRST = [case for case in CASES if case.id == case.row.name]  # one of each row
EACH = [(case, activation) for case in CASES for activation in case.activations]
FIRST_EACH = [(case, activation) for case in FIRST for activation in case.activations]


def in_turn(cases: list[Case]) -> list[tuple[Case, str | None]]:
    """Pair each case with one of its activations, so that all activations take turns."""
    return [(case, case.activations[turn % len(case.activations)]) for turn, case in enumerate(cases)]


# Every public loss, from `activation`, `ignore_index` and other settings to a loss of three classes; wrappers pass the
# settings to the loss that they wrap. A new loss needs a row here, and one above if it is a formula on pixels.
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "BoundaryLoss": lambda **kw: BoundaryLoss(**{"classes": 3} | kw),
    "BoundaryWeightedLoss": lambda **kw: BoundaryWeightedLoss(CrossEntropyLoss(**kw)),
    "ClDiceLoss": ClDiceLoss,
    "CompoundLoss": lambda **kw: CompoundLoss(
        [DiceLoss(**kw), TopKCrossEntropyLoss(activation=kw["activation"], ignore_index=kw.get("ignore_index"))]
    ),
    "CrossEntropyLoss": CrossEntropyLoss,
    "DeepSupervision": lambda **kw: DeepSupervision(DiceLoss(**kw)),
    "DiceCELoss": DiceCELoss,
    "DiceFocalLoss": DiceFocalLoss,
    "DiceLoss": DiceLoss,
    "FocalLoss": FocalLoss,
    "FocalTverskyLoss": FocalTverskyLoss,
    "GeneralizedDiceLoss": GeneralizedDiceLoss,
    "HausdorffLoss": lambda **kw: HausdorffLoss(**{"classes": 3} | kw),
    "JaccardLoss": JaccardLoss,
    "LesionWiseLoss": lambda **kw: LesionWiseLoss(DiceLoss(**{"pool": "image"} | kw), classes=3),
    "LogCoshDiceLoss": LogCoshDiceLoss,
    "LogDiceLoss": LogDiceLoss,
    "LogJaccardLoss": LogJaccardLoss,
    "LogTverskyLoss": LogTverskyLoss,
    "OnProbabilities": lambda **kw: OnProbabilities(nn.SmoothL1Loss(), **kw),
    "SkeletonRecallLoss": lambda **kw: SkeletonRecallLoss(**{"classes": 3} | kw),
    "TopKCrossEntropyLoss": TopKCrossEntropyLoss,
    "TverskyLoss": TverskyLoss,
}


def ids_of(table: list[tuple[Any, ...]]) -> list[str]:
    """Return the ids of tests over cases and other parameters."""
    return ["-".join([case.id, *map(str, others)]) for case, *others in table]


def make_target(
    generator: torch.Generator, shape: tuple[int, ...], activation: str | None, kind: str, ignored: float = 0.0
) -> Tensor:
    """Return a target for logits of `shape`; 255 marks a fraction `ignored` of its pixels, if the kind can hold it.

    `kind`: `"ids"`, `"planes"` or `"soft"`. Planes of exclusive classes are one-hot.
    """
    batch, classes, *space = shape
    ids = torch.randint(0, classes, (batch, *space), generator=generator)
    if kind == "ids":
        target = ids
    elif kind == "soft":
        target = torch.rand(shape, generator=generator, dtype=torch.float64)
        target = target / target.sum(1, keepdim=True) if activation == "softmax" else target
    elif activation == "softmax":
        target = torch.zeros(shape, dtype=torch.long).scatter_(1, ids.unsqueeze(1), 1)
    else:
        target = torch.randint(0, 2, shape, generator=generator)
    return target.masked_fill(torch.rand(target.shape, generator=generator) < ignored, 255)


def make_case(
    seed: int,
    activation: str | None,
    *,
    shape: tuple[int, ...] = (2, 3, 4, 3),
    kind: str | None = None,
    ignored: float = 0.2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return logits (or probabilities) and a target: by default ids with a softmax, and else planes."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    if activation is None:
        logits = logits.sigmoid()
    kind = kind or ("ids" if activation == "softmax" else "planes")
    return logits.to(dtype), make_target(generator, shape, activation, kind, ignored)


def places_of(ignored: Tensor, logits: Tensor, activation: str | None) -> Tensor:
    """Return which logits are ignored, from the positions of the ignored label in the target."""
    if ignored.shape != logits.shape:
        return ignored.unsqueeze(1).expand_as(logits)
    return ignored.any(1, keepdim=True).expand_as(logits) if activation == "softmax" else ignored


def close(actual: Tensor, expected: Any, rtol: float = 1e-10, atol: float = 1e-13) -> None:
    """Assert that values are equal, up to the rounding of float64."""
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def value_and_gradient(loss: nn.Module, logits: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the value of the loss and its gradient at logits."""
    z = logits.detach().clone().requires_grad_()
    value = loss(z, *arguments, **options)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient
