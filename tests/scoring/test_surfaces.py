import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from lightning_dice.scoring import surface_scores, surfaces


def blobs(random, shape, smoothness=1.5):
    """Return a mask of several rough blobs, some of which reach the border."""
    return ndimage.gaussian_filter(random.standard_normal(shape), smoothness) > 0.05


def random_pairs(count, axes):
    random = np.random.default_rng(axes)
    for _ in range(count):
        shape = tuple(random.integers(6, 20, axes))
        pair = blobs(random, shape), blobs(random, shape)
        if all(mask.any() for mask in pair):
            yield *pair, tuple(random.uniform(0.3, 3, axes)), float(random.uniform(0.2, 3))


def by_distance_transform(predicted, actual, spacing):
    """Return the distances between boundary pixels, by a distance transform of the whole image."""
    cross = ndimage.generate_binary_structure(predicted.ndim, 1)
    edges = [mask & ~ndimage.binary_erosion(mask, cross) for mask in (predicted, actual)]
    maps = [ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in edges]
    return maps[1][edges[0]], maps[0][edges[1]]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_boundary_distances_equal_a_distance_transform(axes):
    for predicted, actual, spacing, tolerance in random_pairs(15, axes):
        there, back = by_distance_transform(predicted, actual, spacing)
        scores = surface_scores(predicted, actual, spacing, tolerance)
        assert scores.hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-9)
        assert scores.mean == pytest.approx((there.sum() + back.sum()) / (len(there) + len(back)), rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's own call
@pytest.mark.parametrize("axes", [2, 3])
def test_scores_agree_with_monai(axes):
    for predicted, actual, spacing, tolerance in random_pairs(15, axes):
        pair = [torch.from_numpy(mask)[None, None] for mask in (predicted, actual)]
        facts = {"include_background": True, "spacing": list(spacing)}
        scores = surface_scores(predicted, actual, spacing, tolerance)
        dice = compute_surface_dice(*pair, [tolerance], use_subvoxels=True, **facts)
        # MONAI computes in float32.
        assert scores.dice == pytest.approx(dice.item(), abs=1e-5)
        assert scores.hd95 == pytest.approx(compute_hausdorff_distance(*pair, percentile=95, **facts).item(), rel=1e-5)
        mean = compute_average_surface_distance(*pair, symmetric=True, **facts).item()
        assert scores.mean == pytest.approx(mean, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Please import .* namespace:DeprecationWarning")  # the reference's imports
@pytest.mark.parametrize("axes", [2, 3])
def test_surface_dice_agrees_with_its_authors(axes):
    reference = pytest.importorskip("surface_distance")
    for predicted, actual, spacing, tolerance in random_pairs(15, axes):
        distances = reference.compute_surface_distances(actual, predicted, spacing)
        expected = reference.compute_surface_dice_at_tolerance(distances, tolerance)
        assert surface_scores(predicted, actual, spacing, tolerance).dice == pytest.approx(expected, abs=1e-7)


def test_elements_by_hand():
    """The surface of a square of 2 x 2 pixels has 4 corners, and one element on each of 4 sides."""
    predicted, actual = np.zeros((2, 8, 12), dtype=bool)
    predicted[2:4, 2:4] = actual[2:4, 8:10] = True
    actual[2:4, 2:4] = True
    # The whole surface of the prediction is matched, and half of the other.
    assert surface_scores(predicted, actual, (1, 1), 0.5).dice == pytest.approx(2 / 3)
    # The second square is 6 pixels of 0.5 mm beside the first, 4 * 0.5 mm from its right side.
    assert surface_scores(predicted, actual, (1, 0.5), 1.999).dice < 1
    assert surface_scores(predicted, actual, (1, 0.5), 3.0).dice == 1


def test_a_distance_equal_to_the_tolerance_is_within():
    """In floating point, three steps of 0.1 are more than 0.3."""
    predicted, actual = np.zeros((2, 20), dtype=bool)
    predicted[2:9] = actual[5:12] = True
    assert surface_scores(predicted, actual, (0.1,), 0.3).dice == 1
    assert surface_scores(predicted, actual, (0.1,), 0.29).dice == 0


def test_the_border_of_the_image_is_a_surface():
    inner, outer = np.zeros((6, 7), dtype=bool), np.zeros((8, 9), dtype=bool)
    inner[0:3, 2:7] = outer[1:4, 3:8] = True
    shifted, shifted_outer = np.roll(inner, 2, 0), np.roll(outer, 2, 0)
    assert surface_scores(inner, shifted, (1, 2), 1) == surface_scores(outer, shifted_outer, (1, 2), 1)
    # Rings of 12 and 10 pixels; 4 and 2 of these are one pixel from the other ring.
    whole, most = np.ones((4, 4), dtype=bool), np.ones((4, 4), dtype=bool)
    most[:, 3] = False
    assert surface_scores(whole, most, (1, 1), 1).mean == pytest.approx(6 / 22)


@pytest.mark.parametrize(("actual", "predicted", "dice"), [(1, 0, 0.0), (0, 1, 0.0), (0, 0, math.nan)])
def test_an_empty_mask_has_no_distances(actual, predicted, dice):
    masks = [np.zeros((5, 5), dtype=bool) for _ in range(2)]
    masks[0][2:4, 2:4], masks[1][2:4, 2:4] = predicted, actual
    scores = surface_scores(*masks, (1, 1), 1)
    assert scores.dice == pytest.approx(dice, nan_ok=True)
    assert math.isnan(scores.hd95)
    assert math.isnan(scores.mean)


def test_large_masks_are_processed_in_chunks(monkeypatch):
    random = np.random.default_rng(5)
    predicted, actual = blobs(random, (17, 9, 8)), blobs(random, (17, 9, 8))
    whole = surface_scores(predicted, actual, (3, 1, 0.7), 1.2)
    for slab in (1, 250, 1000):
        monkeypatch.setattr(surfaces, "CHUNK", slab)
        assert surface_scores(predicted, actual, (3, 1, 0.7), 1.2) == pytest.approx(whole, rel=1e-12)


def test_four_axes_are_refused():
    with pytest.raises(ValueError, match="surface distances need 1 to 3 space axes, got 4; set surfaces=False"):
        surface_scores(*np.ones((2, 2, 2, 2, 2), dtype=bool), (1,) * 4, 1)
