import itertools
import math

import numpy as np
import pytest
from scipy import ndimage
from skimage import measure

from lightning_dice.scoring import lesion_scores


def row(text):
    return np.array([[letter == "#" for letter in text]])


@pytest.mark.parametrize(
    ("predicted", "actual", "expected"),
    [
        pytest.param("##.#..", "##.#..", (1, 1, 1), id="perfect"),
        pytest.param("##....", "...##.", (0, 0, 0), id="disjoint"),
        pytest.param("#####.", "##.##.", (1, 1, 1), id="one finds two"),
        pytest.param("#.#.#.", "###...", (2 / 3, 1, 0.8), id="two pieces in one"),
        pytest.param("......", "##.#..", (math.nan, 0, 0), id="all missed"),
        pytest.param("##.#..", "......", (0, math.nan, 0), id="nothing there"),
        pytest.param("......", "......", (math.nan, math.nan, math.nan), id="nothing at all"),
    ],
)
def test_any_overlap_by_hand(predicted, actual, expected):
    scores = lesion_scores(row(predicted), row(actual))
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx(expected, nan_ok=True)
    assert scores.actual == sum(bool(part) for part in actual.split("."))
    assert scores.predicted == sum(bool(part) for part in predicted.split("."))


@pytest.mark.parametrize(
    ("predicted", "actual", "iou", "pairs"),
    [
        ("####....", "###.....", 0.74, 1),
        ("####....", "###.....", 0.75, 0),  # more than the threshold
        ("#####...", "##.##...", 0.3, 1),  # two that match one: it is matched once
        ("########", "#.#.#.#.", 0.1, 1),
    ],
)
def test_with_iou_each_lesion_matches_one(predicted, actual, iou, pairs):
    scores = lesion_scores(row(predicted), row(actual), iou)
    assert scores.recall * scores.actual == pytest.approx(pairs)
    assert scores.precision * scores.predicted == pytest.approx(pairs)


def brute_force(predicted, actual, iou):
    """Return the most matches among all ways to pair the lesions, and the numbers of lesions."""
    predicted_ids, actual_ids = (measure.label(mask, connectivity=mask.ndim) for mask in (predicted, actual))
    table = [
        [
            ((predicted_ids == i) & (actual_ids == j)).sum() / ((predicted_ids == i) | (actual_ids == j)).sum()
            for j in range(1, actual_ids.max() + 1)
        ]
        for i in range(1, predicted_ids.max() + 1)
    ]
    few, many = sorted((int(predicted_ids.max()), int(actual_ids.max())))
    best = 0
    for order in itertools.permutations(range(many), few):
        pairs = zip(range(few), order, strict=True)
        scores = [table[i][j] if few == predicted_ids.max() else table[j][i] for i, j in pairs]
        best = max(best, sum(score > iou for score in scores))
    return best, predicted_ids.max(), actual_ids.max()


@pytest.mark.parametrize("shape", [(14, 12), (8, 7, 6)])
def test_matching_is_maximum(shape):
    random = np.random.default_rng(0)
    for _ in range(12):
        noise = ndimage.gaussian_filter(random.standard_normal(shape), 1.0)
        actual = noise > 0.35
        predicted = noise + 0.25 * ndimage.gaussian_filter(random.standard_normal(shape), 0.8) > 0.35
        for iou in (0.05, 0.3):
            best, predicted_count, actual_count = brute_force(predicted, actual, iou)
            if not (predicted_count and actual_count):
                continue
            scores = lesion_scores(predicted, actual, iou)
            assert (scores.predicted, scores.actual) == (predicted_count, actual_count)
            assert scores.precision * predicted_count == pytest.approx(best)
            assert scores.recall * actual_count == pytest.approx(best)


def test_connectivity_decides_about_corners():
    corners = np.eye(3) > 0
    assert lesion_scores(corners, corners).actual == 1
    assert lesion_scores(corners, corners, connectivity=1).actual == 3
