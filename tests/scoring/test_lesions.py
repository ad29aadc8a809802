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
    ("said", "there", "expected"),
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
def test_any_overlap_by_hand(said, there, expected):
    scores = lesion_scores(row(said), row(there))
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx(expected, nan_ok=True)
    assert scores.actual == sum(bool(part) for part in there.split("."))
    assert scores.predicted == sum(bool(part) for part in said.split("."))


@pytest.mark.parametrize(
    ("said", "there", "iou", "pairs"),
    [
        ("####....", "###.....", 0.74, 1),
        ("####....", "###.....", 0.75, 0),  # more than the threshold
        ("#####...", "##.##...", 0.3, 1),  # two that match one: it is matched once
        ("########", "#.#.#.#.", 0.1, 1),
    ],
)
def test_by_intersection_over_union_each_matches_one(said, there, iou, pairs):
    scores = lesion_scores(row(said), row(there), iou)
    assert scores.recall * scores.actual == pytest.approx(pairs)
    assert scores.precision * scores.predicted == pytest.approx(pairs)


def brute_force(predicted, actual, iou):
    """Of all ways to pair the lesions, the most that match."""
    said, there = (measure.label(mask, connectivity=mask.ndim) for mask in (predicted, actual))
    table = [
        [((said == i) & (there == j)).sum() / ((said == i) | (there == j)).sum() for j in range(1, there.max() + 1)]
        for i in range(1, said.max() + 1)
    ]
    few, many = sorted((int(said.max()), int(there.max())))
    best = 0
    for order in itertools.permutations(range(many), few):
        pairs = zip(range(few), order, strict=True)
        scores = [table[i][j] if few == said.max() else table[j][i] for i, j in pairs]
        best = max(best, sum(score > iou for score in scores))
    return best, said.max(), there.max()


@pytest.mark.parametrize("shape", [(14, 12), (8, 7, 6)])
def test_the_most_pairs(shape):
    random = np.random.default_rng(0)
    for _ in range(12):
        noise = ndimage.gaussian_filter(random.standard_normal(shape), 1.0)
        actual = noise > 0.35
        predicted = noise + 0.25 * ndimage.gaussian_filter(random.standard_normal(shape), 0.8) > 0.35
        for iou in (0.05, 0.3):
            best, said, there = brute_force(predicted, actual, iou)
            if not (said and there):
                continue
            scores = lesion_scores(predicted, actual, iou)
            assert (scores.predicted, scores.actual) == (said, there)
            assert scores.precision * said == pytest.approx(best)
            assert scores.recall * there == pytest.approx(best)


def test_a_corner_joins_unless_it_is_not_to():
    corners = np.eye(3) > 0
    assert lesion_scores(corners, corners).actual == 1
    assert lesion_scores(corners, corners, connectivity=1).actual == 3
