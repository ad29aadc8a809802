from __future__ import annotations

import inspect
import math
import pickle

import pytest
import torch
import torchmetrics
from definitions import random_case
from torchmetrics.segmentation import DiceScore as TorchmetricsDice

from lightning_dice import DiceScore


def as_logits(ids, classes):
    return torch.nn.functional.one_hot(torch.tensor(ids), classes).movedim(-1, 1).float()


A, B, C = [0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]
NAN = math.nan


@pytest.mark.parametrize(
    ("predicted", "target", "expected"),
    [
        ([A], [A], [1, 1, NAN]),
        ([A], [B], [2 / 3, 4 / 5, NAN]),
        ([A], [C], [2 / 3, 0, NAN]),
        ([C], [A], [2 / 3, 0, NAN]),
        ([C], [C], [1, NAN, NAN]),
        ([A, C], [A, C], [1, 1, NAN]),
        ([A, C], [B, A], [2 / 3, 2 / 5, NAN]),
        ([[2, 2, 2, 2]], [[0, 1, 0, 1]], [0, 0, 0]),
        ([A], [[0, 0, 255, 255]], [1, NAN, NAN]),
        ([A], [[255, 255, 255, 255]], [NAN, NAN, NAN]),
    ],
    ids=[
        "perfect",
        "one-pixel-missed",
        "predicted-but-absent",
        "missed",
        "absent-from-both",
        "absent-from-both-in-one-case",
        "mean-of-cases",
        "disjoint",
        "ignored",
        "everything-ignored",
    ],
)
def test_by_hand(predicted, target, expected):
    settings = {"num_classes": 3, "activation": "softmax", "ignore_index": 255}
    score, macro = DiceScore(average="none", **settings), DiceScore(**settings)
    for metric in (score, macro):
        metric.update(as_logits(predicted, 3), torch.tensor(target))
    torch.testing.assert_close(score.compute(), torch.tensor(expected).float(), equal_nan=True)
    torch.testing.assert_close(macro.compute(), torch.tensor(expected).float().nanmean(), equal_nan=True)


def test_binary_with_a_threshold():
    probs = torch.tensor([[[0.9, 0.6, 0.4, 0.1]]])
    target = torch.tensor([[[1, 0, 0, 0]]])
    assert DiceScore()(probs.logit(), target).item() == pytest.approx(2 / 3)
    assert DiceScore(threshold=0.7)(probs.logit(), target).item() == 1
    assert DiceScore(activation=None, threshold=0.3)(probs, target).item() == pytest.approx(1 / 2)


def test_pooled_over_the_data_set():
    score = DiceScore(2, activation="softmax", pool="dataset", average="none")
    score.update(as_logits([A], 2), torch.tensor([B]))
    score.update(as_logits([C], 2), torch.tensor([A]))
    torch.testing.assert_close(score.compute(), torch.tensor([2 * 3 / (6 + 3), 2 * 2 / (2 + 5)]))


@pytest.mark.parametrize(
    ("policy", "expected"), [("smooth", 0.5), ("skip", 1.0), ("penalize", 0.5)], ids=["smooth", "skip", "penalize"]
)
def test_the_policy_for_a_class_absent_from_the_target(policy, expected):
    score = DiceScore(absent=policy)
    score.update(torch.tensor([[[9.0, -9.0]], [[9.0, -9.0]]]), torch.tensor([[[1, 0]], [[0, 0]]]))
    assert score.compute().item() == expected


def test_excluded_classes_have_no_score():
    score = DiceScore(3, activation="softmax", exclude_classes=[0], average="none")
    values = score(as_logits([A], 3), torch.tensor([A]))
    torch.testing.assert_close(values, torch.tensor([NAN, 1, NAN]), equal_nan=True)


@pytest.mark.parametrize("split", [[8], [4, 4], [1, 2, 5]], ids=str)
@pytest.mark.parametrize("pool", ["image", "dataset"])
def test_any_split_gives_the_same_bits(split, pool):
    logits, target = random_case(1, activation="softmax", batch=8, ignored=True)
    settings = {"num_classes": 3, "activation": "softmax", "pool": pool, "ignore_index": 255, "average": "none"}
    whole = DiceScore(**settings)
    whole.update(logits, target)
    parts = DiceScore(**settings)
    # Also in reverse, where sums in floating point would not have the same bits.
    for piece, labels in reversed(list(zip(logits.split(split), target.split(split), strict=True))):
        parts.update(piece, labels)
    assert torch.equal(whole.compute(), parts.compute())


recent_torchmetrics = pytest.mark.skipif(
    "aggregation_level" not in inspect.signature(TorchmetricsDice).parameters,
    reason="the Dice score of this torchmetrics is another one",
)


@recent_torchmetrics
@pytest.mark.parametrize("average", ["macro", "none"])
@pytest.mark.parametrize("level", ["samplewise", "global"])
def test_equals_torchmetrics_where_it_is_right(average, level):
    logits, target = random_case(2, activation="softmax", batch=4, space=(16, 16))
    ours = DiceScore(3, activation="softmax", average=average, pool="image" if level == "samplewise" else "dataset")
    theirs = TorchmetricsDice(3, average=average, input_format="index", aggregation_level=level)
    for b in range(0, 4, 2):
        ours.update(logits[b : b + 2], target[b : b + 2])
        theirs.update(logits[b : b + 2].argmax(1), target[b : b + 2])
    expected = theirs.compute()
    torch.testing.assert_close(ours.compute(), expected)


@recent_torchmetrics
def test_where_torchmetrics_is_wrong():
    # The argmax over one channel is class 0, for any prediction and target.
    theirs = TorchmetricsDice(1, input_format="one-hot")
    probs, target = torch.rand(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    assert theirs(probs, target).item() == 1
    assert DiceScore(activation=None)(probs, target).item() == 0


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_diverged_network_scores_nothing(activation):
    logits = torch.full((1, 2, 4), NAN)
    target = torch.zeros(1, 4, dtype=torch.long) if activation == "softmax" else torch.ones(1, 2, 4)
    assert DiceScore(2, activation=activation)(logits, target).item() == 0


def test_the_state_does_not_grow():
    score = DiceScore(3, activation="softmax")
    sizes = []
    for seed in range(3):
        score.update(*random_case(seed, activation="softmax"))
        sizes.append(sum(value.numel() for value in score.metric_state.values()))
    assert sizes == [6, 6, 6]


def test_pickles_resets_and_lives_in_collections():
    collection = torchmetrics.MetricCollection({"dice": DiceScore(3, activation="softmax")}, prefix="val/")
    logits, target = random_case(3, activation="softmax")
    collection.update(logits, target)
    value = collection.compute()["val/dice"]
    assert 0 < value < 1
    assert pickle.loads(pickle.dumps(collection)).compute()["val/dice"] == value
    collection.reset()
    with pytest.warns(UserWarning, match="compute"):
        assert collection.compute()["val/dice"].isnan()


def test_plots():
    figure, axes = DiceScore(2, average="none").plot(torch.tensor([0.25, 0.75]))
    assert figure is axes.figure
    assert axes.get_ylim()[1] >= 1  # From the bounds of the score, not from the values.


def test_half_precision_logits():
    logits, target = random_case(4, activation="softmax")
    score = DiceScore(3, activation="softmax")
    assert score(logits.half(), target) == score(logits.half().double(), target)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes must be an integer >= 1, got 0"),
        ({"threshold": 1.0}, r"threshold must be a probability in \(0, 1\), got 1.0"),
        ({"pool": "batch"}, "pool must be one of 'image', 'dataset', got 'batch'"),
        ({"average": "micro"}, "average must be one of 'macro', 'none'"),
        ({"num_classes": 2, "exclude_classes": [2]}, "classes from 0 to 1"),
        ({"activation": "argmax"}, "activation must be"),
        ({"smooth": -1}, "smooth must be"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DiceScore(**settings)


@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        (
            torch.zeros(1, 2, 4),
            torch.zeros(1, 2, 4),
            r"DiceScore: .*\(batch, 1, \*space\), for num_classes=1, got \(1, 2, 4\)",
        ),
        (torch.zeros(1, 1, 4), torch.zeros(1, 4), "shape of logits"),
        (torch.zeros(1, 1, 4), torch.full((1, 1, 4), 255), r"lie in \[0, 1\]"),
    ],
)
def test_refuses_input(preds, target, message):
    with pytest.raises(ValueError, match=message):
        DiceScore().update(preds, target)
