from __future__ import annotations

import itertools

import pytest
import torch
from definitions import random_case

from lightning_dice.functional import hard_prediction, hard_sums


def counted(predicted, target, classes, ignore_index, *, planes):
    """Count overlap, predicted, actual and count, pixel by pixel."""
    table = torch.zeros(4, len(predicted), classes, dtype=torch.int64)
    for b, c in itertools.product(range(len(predicted)), range(classes)):
        p = predicted[b, c] if planes else predicted[b]
        t = target[b, c] if planes else target[b]
        for mine, true in zip(p.flatten().tolist(), t.flatten().tolist(), strict=True):
            if true == ignore_index:
                continue
            is_p, is_t = (bool(mine), true == 1) if planes else (mine == c, true == c)
            table[:, b, c] += torch.tensor([is_p and is_t, is_p, is_t, True])
    return table


@pytest.mark.parametrize("space", [(7,), (5, 4), (3, 2, 4)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", None])
@pytest.mark.parametrize("ignored", [False, True], ids=["all", "ignored"])
def test_counts(space, activation, ignored):
    logits, target = random_case(0, activation=activation, space=space, ignored=ignored)
    sums = hard_sums(logits, target, activation=activation, threshold=0.6, ignore_index=255)
    if activation == "softmax":
        predicted = logits.argmax(1)
    else:
        predicted = (logits.sigmoid() if activation == "sigmoid" else logits) > 0.6
    expected = counted(predicted, target, 3, 255, planes=activation != "softmax")
    torch.testing.assert_close(torch.stack(list(sums.fields.values())), expected)


def test_the_threshold_is_a_probability():
    logits = torch.tensor([[[-2.0, 0.0, 0.1, 2.0]]])
    assert hard_prediction(logits).tolist() == [[[False, False, True, True]]]
    assert hard_prediction(logits, threshold=0.1).tolist() == [[[True, True, True, True]]]
    assert hard_prediction(logits.sigmoid(), activation=None, threshold=0.6).tolist() == [[[False, False, False, True]]]


def test_soft_labels_have_no_hard_score():
    with pytest.raises(ValueError, match=r"class ids .*argmax"):
        hard_sums(torch.zeros(1, 3, 4), torch.full((1, 3, 4), 1 / 3), activation="softmax")


def test_ids_for_overlapping_classes_are_refused():
    with pytest.raises(ValueError, match="shape of logits"):
        hard_sums(torch.zeros(1, 3, 4), torch.zeros(1, 4, dtype=torch.long), activation=None)
