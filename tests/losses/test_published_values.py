"""Values that the peers' own tests publish: their inputs and numbers, our losses through the presets.

The tolerances are theirs, as is the accuracy of the numbers. Values on which we differ are at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice import DiceLoss
from lightning_dice.functional import dice_score, jaccard_score, tversky_score
from lightning_dice.kernels import overlap_sums
from lightning_dice.losses import (
    CompoundLoss,
    CrossEntropyLoss,
    DiceCELoss,
    FocalLoss,
    GeneralizedDiceLoss,
    JaccardLoss,
    TverskyLoss,
)


@dataclass
class Row:
    """A published value: the peer's arguments, its input and target, and the number."""

    id: str
    given: dict[str, Any]
    logits: Any
    target: Any
    expected: Any
    tolerance: dict[str, float] = field(default_factory=lambda: {"rtol": 1e-5, "atol": 0.0})


def rows(*values: Row):
    return pytest.mark.parametrize("row", [pytest.param(value, id=value.id) for value in values])


def one_hot(ids: Tensor, classes: int) -> Tensor:
    return F.one_hot(ids, classes).movedim(-1, 1)


def our_target(row: Row) -> Tensor:
    """MONAI's target in our layout: ids without a channel; planes where the activation is a sigmoid."""
    target = torch.tensor(row.target)
    if not row.given.get("to_onehot_y"):
        return target
    ids, classes = target.squeeze(1).long(), torch.tensor(row.logits).shape[1]
    return one_hot(ids, classes) if row.given.get("sigmoid") else ids


def assert_published(value: Tensor, row: Row) -> None:
    expected = torch.tensor(row.expected, dtype=value.dtype)
    # The published zeros are exact up to smoothing and rounding.
    tolerance = row.tolerance if expected.any() else {"rtol": 0.0, "atol": 1e-6}
    torch.testing.assert_close(value, expected, **tolerance)


# MONAI: tests/losses/test_{dice,masked_dice,tversky,generalized_dice,dice_ce,focal}_loss.py.
ONE, ONE_MASK = [[[[1.0, -1.0], [-1.0, 1.0]]]], [[[[1.0, 0.0], [1.0, 1.0]]]]
TWO = [*ONE, *ONE]
TWO_MASKS = [[[[1.0, 1.0], [1.0, 1.0]]], [[[1.0, 0.0], [1.0, 0.0]]]]
PROBS = [[[[0.3, 0.4], [0.7, 0.9]]], [[[1.0, 0.1], [0.5, 0.3]]]]
HARD = [[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]]
HARD_IDS = [[[0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0]]]
CLASSES = [[[-1.0, 0.0, 1.0], [1.0, 0.0, -1.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]
IDS = [[[1.0, 0.0, 0.0]], [[1.0, 1.0, 0.0]]]
SIGMOID, SOFTMAX = {"to_onehot_y": True, "sigmoid": True}, {"to_onehot_y": True, "softmax": True}
E4, E6 = {"smooth_nr": 1e-4, "smooth_dr": 1e-4}, {"smooth_nr": 1e-6, "smooth_dr": 1e-6}
UNSMOOTHED = {"smooth_nr": 0.0, "smooth_dr": 0.0}
NO_BACKGROUND = {"include_background": False, "to_onehot_y": True}


@rows(
    Row("one-image", {"sigmoid": True, **E6}, ONE, ONE_MASK, 0.307576),
    Row("two-images", {"sigmoid": True, **E4}, TWO, TWO_MASKS, 0.416657),
    Row("soft-labels", {"soft_label": True, **E4}, PROBS, PROBS, 0.0),
    Row("soft-labels-by-products", {"soft_label": False, **E4}, PROBS, PROBS, 0.307773),
    Row("without-background", {**NO_BACKGROUND, **UNSMOOTHED}, HARD, HARD_IDS, 0.0),
    Row("sigmoid-of-two-classes", {**SIGMOID, **E4}, CLASSES, IDS, 0.435050),
    Row(
        "table",
        {**SIGMOID, **E4, "reduction": "none"},
        CLASSES,
        IDS,
        [[0.296529, 0.415136], [0.599976, 0.428559]],
    ),
    Row("softmax", {**SOFTMAX, **E4}, CLASSES, IDS, 0.383713),
    Row("sum", {**SOFTMAX, **E4, "reduction": "sum"}, CLASSES, IDS, 1.534853),
    Row("squared", {"sigmoid": True, "squared_pred": True}, ONE, ONE_MASK, 0.178337),
)
def test_monai_dice(row):
    loss = DiceLoss.like_monai(**row.given)
    assert_published(loss(torch.tensor(row.logits), our_target(row)), row)


@rows(Row("one-image", {"sigmoid": True, "jaccard": True}, ONE, ONE_MASK, 0.470451))
def test_monai_jaccard(row):
    loss = JaccardLoss.like_monai(**row.given)
    assert_published(loss(torch.tensor(row.logits), our_target(row)), row)


def test_monai_ignored_ids_are_cropped_ids():
    """Ids of class 2 below, ignored: a published equality, without a number."""
    probs = torch.tensor(
        [[[[0.8, 0.1], [0.1, 0.1]], [[0.1, 0.8], [0.1, 0.1]], [[0.1, 0.1], [0.8, 0.8]]]], dtype=torch.float64
    )
    ids = torch.tensor([[[0, 1], [2, 2]]])
    given = {"to_onehot_y": True, "softmax": True}
    loss = DiceLoss.like_monai(ignore_index=2, **given)(probs.log(), ids)
    torch.testing.assert_close(loss, DiceLoss.like_monai(**given)(probs.log()[..., :1, :], ids[..., :1, :]))


def test_monai_masked_dice():
    """The mask is our weight."""
    mask = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    loss = DiceLoss.like_monai(**NO_BACKGROUND, **UNSMOOTHED)
    ids = torch.tensor(HARD_IDS).squeeze(1).long()
    assert loss(torch.tensor(HARD), ids, weight=mask).item() == pytest.approx(0.0, abs=1e-6)


TVERSKY = {"rtol": 1e-4, "atol": 0.0}


@rows(
    Row("one-image", {"sigmoid": True, **E6}, ONE, ONE_MASK, 0.307576, TVERSKY),
    Row("two-images", {"sigmoid": True, **E4}, TWO, TWO_MASKS, 0.416657, TVERSKY),
    Row("soft-labels", {"soft_label": True, **E4}, PROBS, PROBS, 0.0, TVERSKY),
    Row("soft-labels-by-products", {"soft_label": False, **E4}, PROBS, PROBS, 0.307773, TVERSKY),
    Row("without-background", {**NO_BACKGROUND, **UNSMOOTHED}, HARD, HARD_IDS, 0.0, TVERSKY),
    Row(
        "smooth-below-alone",
        {**NO_BACKGROUND, "smooth_nr": 0.0, "smooth_dr": 1e-3},
        HARD,
        HARD_IDS,
        0.000999,
        TVERSKY,
    ),
    Row("sigmoid-of-two-classes", {**SIGMOID, **E4}, CLASSES, IDS, 0.435050, TVERSKY),
    Row("batch", {**SIGMOID, "batch": True}, CLASSES, IDS, 0.422979, TVERSKY),
    Row("sum", {**SIGMOID, **E4, "reduction": "sum"}, CLASSES, IDS, 1.74013, TVERSKY),
    Row("softmax", {**SOFTMAX, **E4}, CLASSES, IDS, 0.383713, TVERSKY),
    Row(
        "table",
        {**SOFTMAX, **E4, "reduction": "none"},
        CLASSES,
        IDS,
        [[0.210961, 0.295339], [0.599952, 0.428547]],
        TVERSKY,
    ),
    Row("recall", {"sigmoid": True, "alpha": 0.3, "beta": 0.7, **E6}, ONE, ONE_MASK, 0.3589, TVERSKY),
    Row("precision", {"sigmoid": True, "alpha": 0.7, "beta": 0.3, **E6}, ONE, ONE_MASK, 0.247366, TVERSKY),
)
def test_monai_tversky(row):
    loss = TverskyLoss.like_monai(**row.given)
    assert_published(loss(torch.tensor(row.logits), our_target(row)), row)


@rows(
    Row("without-background", {**NO_BACKGROUND, **UNSMOOTHED}, HARD, HARD_IDS, 0.0),
    Row(
        "by-size",
        {**SOFTMAX, "w_type": "simple", **UNSMOOTHED},
        [[[0.0, 10.0, 10.0, 10.0], [10.0, 0.0, 0.0, 0.0]]],
        [[[1, 1, 0, 0]]],
        0.250023,
    ),
)
def test_monai_generalized_dice(row):
    loss = GeneralizedDiceLoss.like_monai(**row.given)
    assert_published(loss(torch.tensor(row.logits), our_target(row)), row)


@pytest.mark.parametrize(
    ("activation", "logits", "target", "smooth", "expected"),
    [
        ("sigmoid", ONE, [ONE_MASK], [1e-6 * 3**2], 0.307576),
        ("sigmoid", TWO, [TWO_MASKS[:1], TWO_MASKS[1:]], [1e-4 * 4**2, 1e-4 * 2**2], 0.416597),
        (None, PROBS, [PROBS[:1], PROBS[1:]], [1e-4 * 2.3**2, 1e-4 * 1.9**2], 0.307748),
        ("sigmoid", CLASSES, None, [1e-4, 1e-4], 0.469964),
        ("softmax", CLASSES, None, [1e-4, 1e-4], 0.414507),
    ],
    ids=["one-image", "two-images", "soft-labels-by-products", "sigmoid-of-two-classes", "softmax"],
)
def test_monai_generalized_dice_smoothed_by_the_square_of_the_rarest_class(
    activation, logits, target, smooth, expected
):
    """MONAI's smoothing in our unit, pixels of the rarest class, is its own times the square of that class's size."""
    logits = torch.tensor(logits)
    if target is None:
        ids = torch.tensor(IDS).squeeze(1).long()
        targets = [t.unsqueeze(0) for t in (one_hot(ids, 2) if activation == "sigmoid" else ids)]
    else:
        targets = [torch.tensor(t) for t in target]
    losses = [
        GeneralizedDiceLoss(activation=activation, smooth=s, pool="image")(z.unsqueeze(0), t)
        for z, t, s in zip(logits, targets, smooth, strict=True)
    ]
    torch.testing.assert_close(torch.stack(losses).mean(), torch.tensor(expected), rtol=1e-5, atol=0)


def test_monai_generalized_dice_table_and_sum():
    ids = torch.tensor(IDS).squeeze(1).long()
    loss = GeneralizedDiceLoss(activation="softmax", smooth=1e-4, pool="image", reduction="none")
    # All columns of an image hold its one ratio.
    table = loss(torch.tensor(CLASSES), ids)
    torch.testing.assert_close(table, torch.tensor([[0.273476] * 2, [0.555539] * 2]), rtol=1e-5, atol=0)
    assert table[:, 0].sum().item() == pytest.approx(0.829015, rel=1e-5)


LOUD = [[[100.0, 100.0, 0.0], [0.0, 0.0, 1.0]], HARD[1]]
CE = {"rtol": 1e-4, "atol": 1e-4}


@rows(
    Row("ids", {"to_onehot_y": True}, HARD, HARD_IDS, 0.3133, CE),
    Row("one-hot", {}, HARD, HARD, 0.3133, CE),
    Row("one-hot-of-integers", {}, HARD, torch.tensor(HARD).to(torch.uint8).tolist(), 0.3133, CE),
    Row("without-background", {**NO_BACKGROUND, "weight": [1.0, 1.0]}, LOUD, HARD_IDS, 0.2088, CE),
    Row(
        "weights-of-the-terms",
        {**NO_BACKGROUND, "weight": [1.0, 1.0], "lambda_ce": 2.0},
        LOUD,
        HARD_IDS,
        0.4176,
        CE,
    ),
    Row("background-of-no-weight", {**NO_BACKGROUND, "weight": [0.0, 1.0]}, LOUD, HARD_IDS, 0.3133, CE),
)
def test_monai_dice_ce_of_numbers_that_are_probabilities_and_logits(row):
    """MONAI's rows take no activation: Dice reads probabilities, and the cross-entropy logits, from the same numbers.

    Ours refuses that, so the terms are called apart.
    """
    with pytest.raises(ValueError, match="sigmoid=True or softmax=True must be given"):
        DiceCELoss.like_monai(**row.given)
    given = {**row.given}
    lambda_ce, weight = given.pop("lambda_ce", 1.0), given.pop("weight", None)
    logits, target = torch.tensor(row.logits), our_target(row)
    # Values outside [0, 1] are in the background, which these rows leave out.
    dice = DiceLoss.like_monai(**given)(logits.clamp(0, 1), target)
    entropy = CrossEntropyLoss(activation="softmax", class_weights=weight)(logits, target)
    assert_published(dice + lambda_ce * entropy, row)


THREE = [[[[1.0, 1.0], [0.5, 0.0]], [[1.0, 1.0], [0.5, 0.0]], [[1.0, 1.0], [0.5, 0.0]]]]
THREE_IDS = torch.tensor([[[0, 1], [2, 0]]])
LONE = torch.cat([torch.ones(1, 1, 5, 5), torch.zeros(1, 1, 5, 5)], 1)
LONE_MASK = LONE.clone()
LONE_MASK[:, 0, 2, 2], LONE_MASK[:, 1, 2, 2] = 0, 1


@rows(
    Row("ids", {"to_onehot_y": True}, THREE, one_hot(THREE_IDS, 3), 0.34959, CE),
    Row("one-hot", {}, THREE, one_hot(THREE_IDS, 3), 0.34959, CE),
    Row(
        "without-background",
        {"to_onehot_y": True, "include_background": False, "weight": [1.0, 1.0]},
        THREE,
        one_hot(THREE_IDS, 3),
        0.36498,
        CE,
    ),
    Row("alpha", {"to_onehot_y": True, "alpha": 0.8}, THREE, one_hot(THREE_IDS, 3), 0.08423, CE),
    Row("one-pixel", {}, LONE.tolist(), LONE_MASK, 0.1116, {"rtol": 0, "atol": 5e-4}),
    Row(
        "one-pixel-without-background",
        {"include_background": False, "weight": [1.0]},
        LONE.tolist(),
        LONE_MASK,
        0.1733,
        {"rtol": 0, "atol": 5e-4},
    ),
)
def test_monai_focal(row):
    assert_published(FocalLoss.like_monai(**row.given)(torch.tensor(row.logits), row.target), row)


def test_monai_focal_by_pixel():
    """The table of `reduction="none"`, pixel by pixel: a loss of one pixel and one plane has no mean to take."""
    table = torch.tensor(
        [
            [[0.02266, 0.70187], [0.37741, 0.17329]],
            [[0.70187, 0.02266], [0.37741, 0.17329]],
            [[0.70187, 0.70187], [0.06757, 0.17329]],
        ]
    )
    loss = FocalLoss.like_monai()
    pixels = torch.tensor(THREE).view(-1, 1, 1), one_hot(THREE_IDS, 3).reshape(-1, 1, 1)
    ours = [loss(z.unsqueeze(0), t.unsqueeze(0)) for z, t in zip(*pixels, strict=True)]
    torch.testing.assert_close(torch.stack(ours).view(3, 2, 2), table, **CE)
    weighted = torch.tensor([[0.01133, 0.35093, 0.18871, 0.08664], [0.07019, 0.00227, 0.03774, 0.01733]])
    scaled = torch.stack(ours).view(3, 4)[:2] * torch.tensor([[0.5], [0.1]])
    torch.testing.assert_close(scaled, weighted, **CE)


def test_monai_focal_of_a_good_prediction_is_0():
    """Published for two classes, for background alone and for six classes, in 2d and 3d, with and without alpha."""
    for ids in (
        torch.tensor([[[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]]),
        torch.zeros(1, 4, 4, dtype=torch.long),
        torch.tensor([[[0, 0, 0, 0], [0, 1, 2, 0], [0, 3, 4, 0], [0, 0, 0, 0]]]),
        torch.tensor([[[[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]] * 3]),
    ):
        target = one_hot(ids, 6)
        good = 1000.0 * target - 500.0
        assert FocalLoss.like_monai()(good, target).item() == pytest.approx(0, abs=5e-4)
        assert FocalLoss.like_monai(alpha=0.5)(good, target).item() == pytest.approx(0, abs=5e-4)
        assert FocalLoss(activation="softmax")(good, ids).item() == pytest.approx(0, abs=5e-4)


def test_monai_focal_softmax_of_three_classes():
    """Published as a mean over the pixels of all planes, and so as a third of ours."""
    logits = torch.tensor(THREE)
    third = CompoundLoss([FocalLoss(activation="softmax")], [1 / 3])
    assert third(logits, THREE_IDS).item() == pytest.approx(0.16276, abs=1e-4)
    # Its alpha of 0.8 gives the background 0.2 and the others 0.8, not divided by their mean over the pixels.
    weights = CompoundLoss([FocalLoss(activation="softmax", class_weights=[0.2, 0.8, 0.8])], [1 / 3])
    of_pixels = (0.2 + 0.8 + 0.8 + 0.2) / 4
    assert weights(logits, THREE_IDS).item() * of_pixels == pytest.approx(0.08138, abs=1e-4)


# segmentation_models_pytorch: tests/test_losses.py.
SMP = {"rtol": 0.0, "atol": 1e-5}
BINARY = [
    ("all-foreground", [1.0, 1.0, 1.0], [1, 1, 1], 0.0),
    ("perfect", [1.0, 0.0, 1.0], [1, 0, 1], 0.0),
    ("empty", [0.0, 0.0, 0.0], [0, 0, 0], 0.0),
    ("all-false-positive", [1.0, 1.0, 1.0], [0, 0, 0], 0.0),
    ("disjoint", [1.0, 0.0, 1.0], [0, 1, 0], 1.0),
    ("all-missed", [0.0, 0.0, 0.0], [1, 1, 1], 1.0),
]


@pytest.mark.parametrize(("probs", "mask", "expected"), [row[1:] for row in BINARY], ids=[row[0] for row in BINARY])
@pytest.mark.parametrize(
    "loss",
    [
        DiceLoss.like_smp("binary", from_logits=False),
        JaccardLoss.like_smp("binary", from_logits=False),
        TverskyLoss.like_smp("binary", from_logits=False, alpha=0.5, beta=0.5),
    ],
    ids=["dice", "jaccard", "tversky"],
)
def test_smp_binary(loss, probs, mask, expected):
    value = loss(torch.tensor(probs).view(1, 1, 1, -1), torch.tensor(mask).view(1, 1, 1, -1))
    assert value.item() == pytest.approx(expected, abs=1e-5)


HALVES = [[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]]


@pytest.mark.parametrize(
    ("mode", "probs", "target", "expected"),
    [
        ("multiclass", HALVES, [[0, 0, 1, 1]], 0.0),
        ("multiclass", HALVES, [[1, 1, 0, 0]], 1.0),
        ("multiclass", [[[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]], [[1, 1, 0, 0]], 1 - 1 / 3),
        ("multilabel", HALVES, HALVES, 0.0),
        ("multilabel", HALVES, [[[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]], 1.0),
        ("multilabel", [[[0.0, 1.0, 1.0, 0.0]] * 2], [[[1.0, 1.0, 0.0, 0.0]] * 2], 1 - 1 / 3),
    ],
    ids=[f"{mode}-{what}" for mode in ("multiclass", "multilabel") for what in ("perfect", "disjoint", "a-third")],
)
def test_smp_jaccard(mode, probs, target, expected):
    loss = JaccardLoss.like_smp(mode, from_logits=False)
    assert loss(torch.tensor(probs), torch.tensor(target)).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("actual", "predicted", "jaccard", "dice"),
    [
        ([1, 1, 1, 1], [1, 1, 1, 1], 1.0, 1.0),
        ([0, 1, 1, 0], [0, 1, 1, 0], 1.0, 1.0),
        ([1, 1, 1, 1], [1, 1, 0, 0], 0.5, 2 / 3),
    ],
    ids=["all", "two", "half"],
)
def test_smp_scores(actual, predicted, jaccard, dice):
    sums = overlap_sums(torch.tensor([[predicted]]).float(), torch.tensor([[actual]]), activation=None)
    assert jaccard_score(sums).item() == pytest.approx(jaccard, rel=1e-5)
    assert dice_score(sums).item() == pytest.approx(dice, rel=1e-5)
    assert tversky_score(sums, 0.5, 0.5).item() == pytest.approx(dice, rel=1e-5)


@pytest.mark.parametrize(
    ("actual", "predicted", "expected"),
    [
        ([[1, 1, 0, 0], [0, 0, 1, 1]], [[1, 1, 0, 0], [0, 0, 1, 1]], 1.0),
        ([[1, 1, 0, 0], [0, 0, 1, 1]], [[0, 0, 1, 0], [0, 1, 0, 0]], 0.0),
        ([[1, 1, 0, 0], [0, 0, 0, 1]], [[1, 1, 0, 0], [0, 0, 0, 0]], 0.5),
    ],
    ids=["perfect", "disjoint", "one-of-two"],
)
def test_smp_mean_jaccard_score(actual, predicted, expected):
    sums = overlap_sums(torch.tensor([predicted]).float(), torch.tensor([actual]), activation=None)
    assert jaccard_score(sums).mean().item() == pytest.approx(expected, rel=1e-5)


class TestValuesWeDoNotShare:
    """A published number, then ours and why."""

    @pytest.mark.parametrize("loss", [DiceLoss, JaccardLoss], ids=["dice", "jaccard"])
    def test_smp_loss_of_false_positives_alone_is_0(self, loss):
        """Otherwise nothing would push them down."""
        probs, empty = torch.ones(1, 1, 1, 3), torch.zeros(1, 1, 1, 3)
        assert loss.like_smp("binary", from_logits=False)(probs, empty) == 0.0
        assert loss(activation=None)(probs, empty).item() == pytest.approx(1 - 1 / (3 + 1))
        assert loss(activation=None, absent="penalize")(probs, empty).item() > 80  # -log of the least float

    def test_smp_cross_entropy_is_divided_by_ignored_pixels(self):
        logits = torch.tensor([[-9.0, 9.0, 1.0, 9.0, -9.0]]).unsqueeze(0)
        mask = torch.tensor([[0, 1, -100, 1, 0]]).unsqueeze(0)
        published = 0.7201
        # Its factor of 0.1 turns a label of 1 into 0.9; ours is spread over both classes.
        ours = CrossEntropyLoss(label_smoothing=0.2, ignore_index=-100)(logits, mask).item()
        by_hand = -0.9 * math.log(1 / (1 + math.exp(-9))) - 0.1 * math.log(1 / (1 + math.exp(9)))
        assert ours == pytest.approx(by_hand, rel=1e-6)
        assert ours * 4 / 5 == pytest.approx(published, abs=1e-4)

    def test_smp_smoothed_cross_entropy_is_divided_by_ignored_pixels(self):
        logits = torch.full((4, 4), -9.0).fill_diagonal_(9.0)
        ids = torch.tensor([0, 1, -100, 3])
        published = 1.0125
        ours = CrossEntropyLoss(activation="softmax", label_smoothing=0.1, ignore_index=-100)
        value = ours(logits.T.unsqueeze(0), ids.unsqueeze(0)).item()
        assert value == pytest.approx(0.1 / 4 * 3 * 18, rel=1e-6)  # a share of 1/40 for three classes, 18 below
        assert value * 3 / 4 == pytest.approx(published, abs=1e-4)

    @pytest.mark.parametrize(
        ("act", "logits", "target", "published"),
        [
            (torch.tanh, TWO, TWO_MASKS, 0.999963),
            (lambda z: z.log_softmax(1), CLASSES, one_hot(torch.tensor(IDS).squeeze(1).long(), 2), -8.522593),
        ],
        ids=["tanh", "log-softmax"],
    )
    def test_monai_dice_of_what_is_no_probability(self, act, logits, target, published):
        """Sums of values below 0 have no Dice score; a loss of -8.5 shows it."""
        values, target = act(torch.tensor(logits)), torch.as_tensor(target)
        overlap, total = (v.flatten(2).sum(2) for v in (values * target, values + target))
        assert (1 - (2 * overlap + 1e-4) / (total + 1e-4)).mean().item() == pytest.approx(published, rel=1e-5)
        with pytest.raises(ValueError, match="other_act must be None"):
            DiceLoss.like_monai(other_act=act)
        with pytest.raises(ValueError, match=r"activation=None takes probabilities in \[0, 1\], got values from -"):
            DiceLoss(activation=None)(values, target)

    def test_monai_generalized_dice_of_a_mask_without_foreground_is_0(self):
        """Without any class present its weights are all 0; here the foreground that is predicted counts."""
        loss = GeneralizedDiceLoss(activation=None, smooth=1e-8, pool="image", exclude_classes=[0])
        ours = loss(torch.tensor(HARD), torch.zeros(2, 3, dtype=torch.long)).item()
        assert ours == pytest.approx(1 - 1e-8 / (1 + 1e-8), rel=1e-6)  # one pixel in each image

    def test_monai_dice_ce_weighs_the_foreground_of_one_channel(self):
        """`weight` is then the foreground's in the cross-entropy alone, and not divided by: 1.445239 for 0.5."""
        published = 1.445239
        logits = torch.tensor([[[0.8, 0.6, 0.0]], [[0.0, 0.0, 0.9]]])
        mask = torch.tensor([[[0, 0, 1]], [[0, 1, 0]]])
        with pytest.raises(ValueError, match="weight must be None with sigmoid=True"):
            DiceCELoss.like_monai(sigmoid=True, weight=torch.tensor([0.5]))
        dice = DiceLoss.like_monai(sigmoid=True)(logits, mask).item()
        ours = DiceCELoss.like_monai(sigmoid=True)(logits, mask).item()
        foreground = 2 * math.log(2)  # both pixels have a logit of 0
        background = math.log(2) + sum(math.log1p(math.exp(z)) for z in (0.8, 0.6, 0.9))
        assert ours == pytest.approx(dice + (foreground + background) / 6, rel=1e-6)
        assert dice + (0.5 * foreground + background) / 6 == pytest.approx(published, abs=1e-4)

    @pytest.mark.parametrize(
        ("logits", "target", "mask", "published", "expected"),
        [
            (ONE, ONE_MASK, [[[0.0, 0.0], [1.0, 1.0]]], 0.5, 1 / 3),
            (
                TWO,
                TWO_MASKS,
                [[[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]],
                0.422969,
                (1 / 3 + (1 - 2 * 0.731059 / 2)) / 2,
            ),
        ],
        ids=["one-image", "two-images"],
    )
    def test_monai_masked_dice_before_it_was_corrected(self, logits, target, mask, published, expected):
        """Logits were multiplied by the mask before the sigmoid, so that a masked pixel had a probability of 1/2."""
        logits, target, mask = torch.tensor(logits), torch.tensor(target), torch.tensor(mask)
        loss = DiceLoss.like_monai(sigmoid=True, **E4)
        ours = loss(logits, target, weight=mask).item()
        assert ours == pytest.approx(expected, abs=1e-4)
        halves = loss(logits * mask.unsqueeze(1), target * mask.unsqueeze(1)).item()
        assert halves == pytest.approx(published, abs=1e-4)
