"""Maps of a target, against brute force over all pairs of pixels and drawings by hand."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from scipy import ndimage

from lightning_dice.functional.target_maps import (
    BoundaryWeight,
    SignedDistance,
    TubedSkeleton,
    boundary_distance,
    signed_distance,
    tubed_skeleton,
)
from lightning_dice.losses import SegmentationLoss

SPACES = [pytest.param((9,), (0.5,), id="1d"), pytest.param((5, 4), (2.0, 0.7), id="2d")]
SPACES += [pytest.param((3, 4, 3), (3.0, 1.0, 0.5), id="3d")]


def places(shape):
    return itertools.product(*(range(size) for size in shape))


def apart(a, b, spacing):
    return math.sqrt(math.fsum(((i - j) * s) ** 2 for i, j, s in zip(a, b, spacing, strict=True)))


def plain_signed_distance(mask, spacing):
    """Return the distance of each position to the nearest of the other kind, negative inside."""
    result = {}
    for here in places(mask.shape):
        others = [apart(here, there, spacing) for there in places(mask.shape) if mask[there] != mask[here]]
        nearest = min(others) if others else 0.0
        result[here] = -nearest if mask[here] else nearest
    return result


def plain_boundary_distance(labels, valid, spacing):
    edge = []
    for here in places(labels.shape):
        for axis, step in itertools.product(range(labels.ndim), (-1, 1)):
            there = tuple(at + step * (axis == index) for index, at in enumerate(here))
            inside = all(0 <= at < size for at, size in zip(there, labels.shape, strict=True))
            if inside and valid[here] and valid[there] and labels[here] != labels[there]:
                edge.append(here)
    return {
        here: min((apart(here, there, spacing) for there in edge), default=math.inf) for here in places(labels.shape)
    }


def drawn(text):
    return np.array([[character == "#" for character in line] for line in text.split()])


class TestSignedDistance:
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    @pytest.mark.parametrize(("shape", "spacing"), SPACES)
    def test_equals_brute_force(self, shape, spacing, share):
        rng = np.random.default_rng(0)
        for mask in (rng.random((5, *shape)) < share).astype(bool):
            for sizes in (spacing, None):
                found = signed_distance(mask, sizes)
                expected = plain_signed_distance(mask, sizes or [1.0] * mask.ndim)
                for place in places(shape):
                    assert found[place] == pytest.approx(expected[place], rel=1e-12)

    def test_by_hand(self):
        mask = drawn("..... .##.. .##.. .....")
        r = math.sqrt
        expected = [[r(2), 1, 1, r(2), r(5)], [1, -1, -1, 1, 2], [1, -1, -1, 1, 2], [r(2), 1, 1, r(2), r(5)]]
        np.testing.assert_allclose(signed_distance(mask), expected)

    @pytest.mark.parametrize("value", [False, True], ids=["nowhere", "everywhere"])
    def test_without_a_boundary_it_is_zero(self, value):
        assert (signed_distance(np.full((3, 4), value)) == 0).all()

    def test_the_complement_has_the_opposite_sign(self):
        mask = np.random.default_rng(1).random((6, 7)) < 0.4
        np.testing.assert_array_equal(signed_distance(mask), -signed_distance(~mask))


class TestBoundaryDistance:
    @pytest.mark.parametrize("ignored", [0.0, 0.3])
    @pytest.mark.parametrize(("shape", "spacing"), SPACES)
    def test_equals_brute_force(self, shape, spacing, ignored):
        rng = np.random.default_rng(0)
        for _ in range(5):
            labels = (rng.random(shape) ** 3 * 3).astype(int)
            valid = rng.random(shape) >= ignored
            for sizes in (spacing, None):
                found = boundary_distance(labels, valid if ignored else None, sizes)
                expected = plain_boundary_distance(labels, valid, sizes or [1.0] * labels.ndim)
                for place in places(shape):
                    assert found[place] == pytest.approx(expected[place], rel=1e-12)

    def test_one_label_has_no_boundary(self):
        assert np.isinf(boundary_distance(np.ones((3, 4)))).all()


class TestTubedSkeleton:
    @pytest.mark.parametrize(
        "line", ["#.....# .#...#. ..#.#.. ...#...", "####### ....... .......", ".#... .#... .#### ....."]
    )
    def test_a_thin_line_is_its_own(self, line):
        mask = drawn(line)
        if mask.shape == (4, 5):
            mask[2, 1] = False  # A corner may be cut: without it the line touches at corners.
        for radius in (0, 1, 5):
            np.testing.assert_array_equal(tubed_skeleton(mask, radius), mask)

    def test_a_bar_has_its_middle_line(self):
        mask = np.zeros((9, 40), dtype=bool)
        mask[1:8, 2:38] = True
        skeleton = tubed_skeleton(mask, 0)
        # The ends depend on the algorithm, the middle does not.
        assert (skeleton[:, 8:32].nonzero()[0] == 4).all()
        assert skeleton[4, 8:32].all()

    @pytest.mark.parametrize(("radius", "rows"), [(0, [4]), (1, [3, 4, 5]), (2.9, [2, 3, 4, 5, 6]), (9, range(1, 8))])
    def test_a_tube_has_its_radius_and_stays_within_the_mask(self, radius, rows):
        mask = np.zeros((9, 40), dtype=bool)
        mask[1:8, 2:38] = True
        tube = tubed_skeleton(mask, radius)
        assert np.flatnonzero(tube[:, 20]).tolist() == list(rows)
        assert not (tube & ~mask).any()

    def test_radius_two_is_two_dilations_by_a_cross(self):
        image = ndimage.gaussian_filter(np.random.default_rng(0).random((40, 40)), 3)
        mask = image > np.median(image)
        cross = ndimage.generate_binary_structure(2, 1)
        skeleton = tubed_skeleton(mask, 0)
        np.testing.assert_array_equal(tubed_skeleton(mask, 2), ndimage.binary_dilation(skeleton, cross, 2) & mask)

    def test_a_connected_mask_has_a_connected_skeleton(self):
        mask = np.zeros((30, 30), dtype=bool)
        y, x = np.ogrid[:30, :30]
        mask[(abs(np.hypot(y - 15, x - 15) - 9) < 3)] = True
        skeleton = tubed_skeleton(mask, 0)
        touching = np.ones((3, 3))
        assert 0 < skeleton.sum() < mask.sum() / 3
        assert ndimage.label(skeleton, touching)[1] == 1
        assert ndimage.label(~skeleton)[1] == 2  # inside and outside of the ring

    def test_in_three_dimensions(self):
        mask = np.zeros((7, 7, 20), dtype=bool)
        mask[1:6, 1:6, 2:18] = True
        skeleton = tubed_skeleton(mask, 0)
        assert np.argwhere(skeleton[:, :, 9]).tolist() == [[3, 3]]
        assert tubed_skeleton(mask, 1)[:, :, 9].sum() == 5
        assert tubed_skeleton(mask, 1.5)[:, :, 9].sum() == 9

    def test_nothing_has_none(self):
        assert not tubed_skeleton(np.zeros((4, 4), dtype=bool)).any()

    @pytest.mark.parametrize("shape", [(4,), (2, 2, 2, 2)], ids=["1d", "4d"])
    def test_other_dimensions_are_refused(self, shape):
        with pytest.raises(ValueError, match=f"2 or 3 space axes, got {len(shape)}"):
            tubed_skeleton(np.ones(shape, dtype=bool))


IDS = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 2, 2]])


def each(classes, activation, **settings):
    return [
        SignedDistance(activation, classes, **settings),
        BoundaryWeight(activation, classes, **settings),
        TubedSkeleton(activation, classes, **settings),
    ]


def name(value):
    return type(value).__name__


class TestMaps:
    def test_of_ids_are_those_of_each_class(self):
        planes = torch.nn.functional.one_hot(IDS, 3).movedim(-1, 0)
        for make in (SignedDistance, TubedSkeleton):
            found = make("softmax", 3)(IDS)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, make("sigmoid")(planes))
            for index in range(3):
                torch.testing.assert_close(found[index], make("sigmoid", 1)(planes[index : index + 1])[0])

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
    @pytest.mark.parametrize("make", each(3, "softmax"), ids=name)
    def test_take_ids_of_any_dtype(self, make, dtype):
        torch.testing.assert_close(make(IDS.to(dtype)), make(IDS), rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64], ids=str)
    @pytest.mark.parametrize("make", each(None, "sigmoid"), ids=name)
    def test_take_planes_of_any_dtype(self, make, dtype):
        planes = torch.nn.functional.one_hot(IDS, 3).movedim(-1, 0)
        torch.testing.assert_close(make(planes.to(dtype)), make(planes), rtol=0, atol=0)

    @pytest.mark.parametrize("activation", ["sigmoid", "softmax", None])
    def test_cut_soft_labels_at_one_half(self, activation):
        soft = torch.tensor([[0.5, 0.2, 0.9, 0.49], [0.5, 0.8, 0.1, 0.51]])
        for make in (SignedDistance(activation), BoundaryWeight(activation)):
            torch.testing.assert_close(make(soft), make((soft >= 0.5).float()))
        torch.testing.assert_close(SignedDistance(activation)(soft)[0], torch.tensor([-1.0, 1.0, -1.0, 1.0]))

    def test_an_absent_class_is_zero(self):
        assert (SignedDistance("softmax", 4)(IDS)[3] == 0).all()
        assert (TubedSkeleton("softmax", 4)(IDS)[3] == 0).all()

    def test_the_weight_is_by_any_two_labels_of_ids_and_by_each_plane(self):
        ids = torch.tensor([0, 0, 1, 2, 2, 2])
        planes = torch.nn.functional.one_hot(ids, 3).movedim(-1, 0)

        def weight(*distances):
            return torch.tensor([1 + 3 * math.exp(-((d / 2) ** 2) / 2) for d in distances])

        make = BoundaryWeight("softmax", width=2.0, strength=3.0)
        torch.testing.assert_close(make(ids), weight(1, 0, 0, 0, 1, 2))
        expected = torch.stack([weight(1, 0, 0, 1, 2, 3), weight(1, 0, 0, 0, 1, 2), weight(2, 1, 0, 0, 1, 2)])
        torch.testing.assert_close(BoundaryWeight(width=2.0, strength=3.0)(planes), expected)

    def test_without_a_boundary_the_weight_is_one(self):
        assert (BoundaryWeight("softmax")(torch.ones(3, 4, dtype=torch.long)) == 1).all()

    def test_ignored_pixels_are_of_no_class(self):
        ids = torch.tensor([1, 1, 255, 0, 0])
        found = SignedDistance("softmax", 2, ignore_index=255)(ids)
        torch.testing.assert_close(found, torch.tensor([[3.0, 2, 1, -1, -2], [-2, -1, 1, 2, 3]]))
        planes = torch.tensor([[1, 1, 255, 1, 0], [0, 255, 1, 1, 1]])
        found = SignedDistance("sigmoid", ignore_index=255)(planes)
        torch.testing.assert_close(found, torch.tensor([[-2.0, -1, 1, -1, 1], [2, 1, -1, -2, -3]]))

    def test_an_ignored_soft_label_is_ignored_in_all_planes(self):
        soft = torch.tensor([[1.0, 1.0, 255.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
        found = SignedDistance("softmax", ignore_index=255)(soft)
        torch.testing.assert_close(found, torch.tensor([[-2.0, -1, 1, 2], [3, 2, 1, -1]]))

    def test_an_ignored_class_has_no_map(self):
        ids = torch.tensor([0, 0, 1, 1])
        found = SignedDistance("softmax", 2, ignore_index=0)(ids)
        torch.testing.assert_close(found, torch.tensor([[0.0, 0, 0, 0], [2, 1, -1, -2]]))

    def test_beside_ignored_pixels_there_is_no_boundary(self):
        weight = BoundaryWeight("softmax", ignore_index=255)
        assert (weight(torch.tensor([1, 1, 255, 0, 0])) == 1).all()
        planes = torch.tensor([[1, 1, 255, 0, 0], [0, 1, 1, 1, 255]])
        found = BoundaryWeight("sigmoid", ignore_index=255)(planes)
        assert (found[0] == 1).all()
        assert found[1].argmax() == 0

    def test_excluded_classes_are_zero(self):
        for make, full in zip(each(3, "softmax", exclude_classes=(0, 2)), each(3, "softmax"), strict=True):
            if not isinstance(make, BoundaryWeight):
                assert (make(IDS)[[0, 2]] == 0).all()
                torch.testing.assert_close(make(IDS)[1], full(IDS)[1])
                assert (full(IDS)[[0, 2]] != 0).any()

    @pytest.mark.parametrize("make", each(3, "softmax"), ids=name)
    def test_pickle_compare_and_hash(self, make):
        again = pickle.loads(pickle.dumps(make))
        assert again == make
        assert hash(again) == hash(make)
        assert make != type(make)("softmax", 4)
        torch.testing.assert_close(again(IDS), make(IDS))

    @pytest.mark.parametrize("make", [SignedDistance, BoundaryWeight])
    def test_spacing_is_used_and_may_be_a_list(self, make):
        ids = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 1]])
        found = instantiate(
            {"_target_": f"{make.__module__}.{make.__name__}", "activation": "softmax", "classes": 2, "spacing": [3, 1]}
        )
        assert found == make("softmax", 2, spacing=(3, 1))
        assert not torch.equal(found(ids), make("softmax", 2)(ids))
        torch.testing.assert_close(found(ids), make("softmax", 2, spacing=(1, 3))(ids.T).transpose(-1, -2))

    def test_what_is_missing_or_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match="classes, the number of channels of the logits, is needed"):
            SignedDistance("softmax")(IDS)
        with pytest.raises(ValueError, match=r"a plane for each of the 3 classes, got the shape \(2, 4\)"):
            SignedDistance("sigmoid", 3)(torch.zeros(2, 4))
        with pytest.raises(ValueError, match="classes must be None or an integer >= 1, got 0"):
            TubedSkeleton(classes=0)
        with pytest.raises(ValueError, match=r"one number for each of the 2 space axes, got \[1.0\]"):
            SignedDistance("softmax", 3, spacing=(1.0,))(IDS)
        for spacing in ("12", 1.0, (0.0, 1.0), (math.nan,), ()):
            with pytest.raises(ValueError, match="spacing must be None or a number > 0 for each space axis"):
                SignedDistance(spacing=spacing)


class TestMapOfABatch:
    class Loss(SegmentationLoss):
        maps = {"m": SignedDistance("softmax", 3)}  # noqa: RUF012

    def test_integer_planes_are_not_taken_for_ids(self):
        planes = torch.nn.functional.one_hot(IDS, 3).movedim(-1, 0).unsqueeze(0)
        found = self.Loss().get_checked_map("m", torch.zeros(planes.shape), planes, None)
        torch.testing.assert_close(found[0], SignedDistance("softmax", 3)(IDS))

    def test_a_given_map_of_another_shape_is_refused(self):
        for given in (torch.zeros(1, 4, 6), torch.zeros(1, 1, 4, 6), torch.zeros(1, 3, 6, 4)):
            with pytest.raises(ValueError, match=r"maps\['m'\] must have the shape \(1, 3, 4, 6\), got"):
                self.Loss().get_checked_map("m", torch.zeros(1, 3, 4, 6), IDS[None], {"m": given})


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_every_object_has_a_skeleton(depth):
    """Thinning in three dimensions leaves nothing of many boxes of even width."""
    large = {1: [], 2: [(2, 2, 12), (2, 12, 12)], 3: [], 4: [(6, 6, 12)]}
    for size in [*itertools.product([depth], [1, 2, 3, 4], [1, 2, 3, 4]), *large[depth]]:
        mask = np.pad(np.ones(size, dtype=bool), 2)
        mask = np.concatenate(
            [mask, np.pad(np.ones((3, 3, 3), dtype=bool), ((2, size[0] - 1), (2, size[1] - 1), (2, 2)))], 2
        )
        skeleton = tubed_skeleton(mask, radius=0)
        assert (skeleton <= mask).all()
        parts, found = ndimage.label(mask, np.ones((3, 3, 3)))
        assert found == 2
        assert set(np.unique(parts[skeleton])) == {1, 2}, size
