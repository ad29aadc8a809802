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
@pytest.mark.filterwarnings("ignore:DiceScore metric currently defaults")
@pytest.mark.parametrize("exclude", [(), (0,)], ids=["all", "without-background"])
@pytest.mark.parametrize("average", ["macro", "micro", "weighted", "none"])
@pytest.mark.parametrize("level", ["samplewise", "global"])
def test_equals_torchmetrics_where_it_is_right(average, level, exclude):
    logits, target = random_case(2, activation="softmax", batch=4, space=(16, 16))
    target[0, target[0] == 1] = 2  # An image without a class, and one with the background alone.
    target[1] = 0
    pool = "image" if level == "samplewise" else "dataset"
    ours = DiceScore(3, activation="softmax", average=average, pool=pool, exclude_classes=exclude)
    theirs = TorchmetricsDice(
        3, include_background=not exclude, average=average, input_format="index", aggregation_level=level
    )
    for b in range(0, 4, 2):
        ours.update(logits[b : b + 2], target[b : b + 2])
        theirs.update(logits[b : b + 2].argmax(1), target[b : b + 2])
    expected = theirs.compute()
    found = ours.compute()
    torch.testing.assert_close(found[len(exclude) :] if average == "none" else found, expected)


@recent_torchmetrics
def test_where_torchmetrics_is_wrong():
    # The argmax over one channel is class 0, for any prediction and target.
    theirs = TorchmetricsDice(1, input_format="one-hot")
    probs, target = torch.rand(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    assert theirs(probs, target).item() == 1
    assert DiceScore(activation=None)(probs, target).item() == 0


@pytest.mark.parametrize("smooth", [0.0, 1e-5])
@pytest.mark.parametrize("average", ["macro", "micro", "weighted", "none"])
@pytest.mark.parametrize("pool", ["image", "dataset"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", None])
def test_a_nan_gives_no_plausible_score(activation, pool, average, smooth):
    softmax = activation == "softmax"
    score = DiceScore(2, activation=activation, pool=pool, average=average, smooth=smooth, ignore_index=255)
    probs = torch.tensor([[[0.9, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.9]]] * 2)
    target = torch.tensor([[0, 0, 1, 1]] * 2) if softmax else probs.round().long()
    preds = probs if activation is None else probs.logit()
    score.update(preds, target)
    assert score.compute().tolist() == pytest.approx([1, 1] if average == "none" else 1)
    broken, ignored = preds.clone(), target.clone()
    broken[0, 0, 2:] = NAN  # On the background alone, of one image and one class: the rest is perfect.
    score.update(broken, target)
    if average == "none":
        assert score.compute().isnan().tolist() == [True, softmax]
    else:
        assert score.compute().isnan()
    ignored[..., 2:] = 255
    values = [score.reset() or score(logits, ignored) for logits in (broken, preds)]
    torch.testing.assert_close(*values, equal_nan=True)


def test_a_nan_of_an_excluded_class_does_not_count():
    logits = torch.tensor([[[NAN, NAN], [9.0, -9.0]]])
    score = DiceScore(2, exclude_classes=[0])
    assert score(logits, torch.tensor([[[0, 0], [1, 0]]])) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"threshold": 0.3}, {"threshold": 0.5}),
        ({"absent": "smooth"}, {"absent": "skip"}),
        ({"smooth": 0.0}, {"smooth": 1.0}),
        ({"ignore_index": None}, {"ignore_index": 255}),
        ({"average": "micro", "exclude_classes": []}, {"average": "micro", "exclude_classes": [1]}),
        ({"average": "micro"}, {"average": "weighted"}),
    ],
    ids=str,
)
def test_other_settings_share_no_state_in_a_collection(first, second):
    make = {"first": first, "second": second}
    alone = {name: DiceScore(2, **settings) for name, settings in make.items()}
    together = torchmetrics.MetricCollection({name: DiceScore(2, **settings) for name, settings in make.items()})
    perfect = torch.tensor([[[9.0, -9.0, 9.0], [9.0, -9.0, 9.0]]])
    labels = (perfect > 0).long()
    # The first batch is perfect under all settings; the second is not.
    second_batch = torch.tensor([[[-0.5, 9.0, -9.0], [9.0, 9.0, -0.5]]])
    target = torch.tensor([[[0, 1, 1], [0, 0, 0]]])
    for preds, truth in ((perfect, labels), (second_batch, target)):
        for metric in (*alone.values(), together):
            metric.update(preds, truth)
    expected = {name: metric.compute() for name, metric in alone.items()}
    assert {name: float(value) for name, value in together.compute().items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}
    )


def test_equal_settings_share_their_state_in_a_collection():
    together = torchmetrics.MetricCollection({"macro": DiceScore(2), "each": DiceScore(2, average="none")})
    together.update(torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
    assert len(together.compute_groups) == 1


@pytest.mark.parametrize("pool", ["image", "dataset"])
def test_averages_by_hand(pool):
    logits, target = as_logits([A, A], 3), torch.tensor([B, A])
    # B: class 0 has 1 pixel (predicted 2, hit 1), class 1 has 3 (predicted 2, hit 2); A is perfect, with 2 and 2.
    hit, predicted, actual = [[1, 2], [2, 2]], [[2, 2], [2, 2]], [[1, 3], [2, 2]]
    if pool == "dataset":
        hit, predicted, actual = (
            [[sum(column) for column in zip(*rows, strict=True)]] for rows in (hit, predicted, actual)
        )
    micro, weighted = [], []
    for h, p, a in zip(hit, predicted, actual, strict=True):
        micro.append(2 * sum(h) / (sum(p) + sum(a)))
        dice = [2 * x / (y + z) for x, y, z in zip(h, p, a, strict=True)]
        weighted.append(sum(z * d for z, d in zip(a, dice, strict=True)) / sum(a))
    for average, expected in (("micro", micro), ("weighted", weighted)):
        score = DiceScore(3, activation="softmax", pool=pool, average=average)(logits, target)
        assert float(score) == pytest.approx(sum(expected) / len(expected))


@pytest.mark.parametrize("average", ["micro", "weighted"])
@pytest.mark.parametrize("pool", ["image", "dataset"])
def test_averages_of_images_without_a_target(average, pool):
    score = DiceScore(average=average, pool=pool)
    score.update(torch.tensor([[[-9.0, -9.0]]]), torch.tensor([[[0, 0]]]))
    assert score.compute().isnan()
    score.update(torch.tensor([[[9.0, -9.0]]]), torch.tensor([[[0, 0]]]))
    assert score.compute() == 0
    assert DiceScore(average=average, pool=pool, absent="skip")(torch.ones(1, 1, 2), torch.zeros(1, 1, 2)).isnan()


def test_the_state_does_not_grow():
    score = DiceScore(3, activation="softmax")
    sizes = []
    for seed in range(3):
        score.update(*random_case(seed, activation="softmax"))
        sizes.append(sum(value.numel() for value in score.metric_state.values()))
    assert sizes[0] < 50
    assert len(set(sizes)) == 1


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
        ({"average": "samples"}, "average must be one of 'macro', 'micro', 'weighted', 'none'"),
        ({"ignore_index": True}, "ignore_index must be None or an integer label such as 255, got True"),
        ({"ignore_index": 1.5}, "ignore_index must be"),
        ({"ignore_index": "255"}, "ignore_index must be"),
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
