"""Measurements of one case, against plain definitions."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_dice.data import Sample
from lightning_dice.data_check.case_statistics import CaseStatistics, measure, measure_components
from lightning_dice.data_check.orientations import describe_orientation, orientations, reorient
from lightning_dice.data_check.task import Task
from lightning_dice.data_check.texture import texture
from lightning_dice.data_check.thumbnail import draw_thumbnail

THREE = Task(["background", "a", "b"], "softmax", exclude_classes=[0])


def blobs(seed: int, size: tuple[int, ...], density: float = 0.3) -> np.ndarray:
    return np.random.default_rng(seed).random(size) < density


def components(plane: np.ndarray) -> list[int]:
    """Return the sizes of the components connected by sides or corners, by flood filling."""
    left, sizes = set(map(tuple, np.argwhere(plane))), []
    steps = list(itertools.product((-1, 0, 1), repeat=plane.ndim))
    while left:
        frontier, size = [left.pop()], 1
        while frontier:
            place = frontier.pop()
            for step in steps:
                near = tuple(a + b for a, b in zip(place, step, strict=True))
                if near in left:
                    left.remove(near)
                    frontier.append(near)
                    size += 1
        sizes.append(size)
    return sorted(sizes)


def edge(plane: np.ndarray) -> int:
    """Count the pixels with a neighbour, across a side and inside the image, that is not of the class."""
    count = 0
    for place in map(tuple, np.argwhere(plane)):
        for axis, step in itertools.product(range(plane.ndim), (-1, 1)):
            near = tuple(x + step * (i == axis) for i, x in enumerate(place))
            if 0 <= near[axis] < plane.shape[axis] and not plane[near]:
                count += 1
                break
    return count


@pytest.mark.parametrize("size", [(40,), (13, 17), (6, 7, 8)])
@pytest.mark.parametrize("density", [0.1, 0.4, 0.8])
def test_objects(size, density):
    plane = blobs(1, size, density)
    found = measure_components(plane)
    assert found.sizes.tolist() == components(plane)
    assert (found.pixels, found.edge) == (plane.sum(), edge(plane))


def test_empty_and_full_planes():
    assert measure_components(np.zeros((3, 4), bool)).sizes.size == 0
    full = measure_components(np.ones((3, 4), bool))
    assert (full.pixels, full.sizes.tolist(), full.edge) == (12, [12], 0)


def test_a_case():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.normal(3, 2, (2, 20, 30)).astype(np.float32))
    ids = torch.from_numpy(rng.integers(0, 3, (20, 30)))
    ids[:2] = 255
    ids[5, 5:8] = 9
    case = measure(Sample(image, ids, "x", (2.0, 1.0)), "val", THREE, index=4, kind="float")
    assert (case.key, case.index, case.size, case.spacing, case.channels) == ("val/x", 4, (20, 30), (2.0, 1.0), 2)
    assert [one.pixels for one in case.components] == [int((ids == index).sum()) for index in range(3)]
    assert (case.pixels, case.ignored, case.unknown_labels) == (600, 60, {9: 3})
    values = image.numpy()
    assert case.mean == pytest.approx(values.mean((1, 2)), rel=1e-5)
    assert case.std == pytest.approx(values.std((1, 2)), rel=1e-5)
    expected = [values.min(), *np.percentile(values, [1, 50, 99]), values.max()]
    assert case.range == pytest.approx(expected, rel=1e-5)
    assert case.levels is None
    assert case.foreground_pixels(THREE) == int(((ids == 1) | (ids == 2)).sum())


def test_each_plane_has_its_own_ignored_pixels():
    mask = torch.tensor([[[1, 0, 255, 1]], [[255, 255, 255, 255]]])
    case = measure(Sample(torch.rand(1, 1, 4), mask, "x"), "train", Task(["a", "b"], "sigmoid"))
    assert [one.pixels for one in case.components] == [2, 0]
    assert (case.ignored, case.unannotated) == (2.5, (1,))


def test_soft_labels_count_above_a_half_and_nan_is_ignored():
    mask = torch.tensor([[[0.2, 0.6, 1.0, float("nan")]]])
    case = measure(Sample(torch.rand(1, 1, 4), mask, "x"), "train", Task(["a"], "sigmoid"))
    assert (case.components[0].pixels, case.ignored, case.unknown_labels) == (2, 1, {})


def test_nonfinite_values_are_counted_and_left_out():
    image = torch.tensor([[[1.0, float("nan"), 3.0, float("inf")]]])
    case = measure(Sample(image, torch.zeros(1, 4).int(), "x"), "train", THREE)
    assert (case.nonfinite, case.mean, case.range[0], case.range[4]) == (2, (2.0,), 1.0, 3.0)
    assert np.isfinite(case.texture.astype(float)).all()


@pytest.mark.parametrize(("values", "levels"), [([0, 1], 2), ([0.5], 1), (np.linspace(0, 1, 33), None)])
def test_levels(values, levels):
    image = torch.from_numpy(np.resize(np.asarray(values, np.float32), (1, 20, 20)))
    assert measure(Sample(image, torch.zeros(20, 20).int(), "x"), "train", THREE).levels == levels


def test_equal_pixels_have_equal_digests():
    image, mask = torch.rand(1, 8, 8), torch.zeros(8, 8).int()
    one, two, three = (
        measure(Sample(part, mask, "x"), "train", THREE) for part in (image, image.clone(), image.transpose(1, 2))
    )
    assert one.image_digest == two.image_digest != three.image_digest
    assert one.mask_digest == two.mask_digest


class TestOrientations:
    @pytest.mark.parametrize("axes", [1, 2, 3])
    def test_all_are_different(self, axes):
        array = np.arange(3**axes).reshape((3,) * axes)
        found = {reorient(array, orientation).tobytes() for orientation in orientations(axes)}
        assert len(found) == len(orientations(axes)) == {1: 2, 2: 8, 3: 48}[axes]
        assert np.array_equal(reorient(array, orientations(axes)[0]), array)

    @pytest.mark.parametrize("axes", [2, 3])
    def test_the_code_reorients_likewise(self, axes):
        mask = np.arange(3**axes).reshape((3,) * axes)
        for orientation in orientations(axes):
            code = describe_orientation(orientation)[1]
            assert np.array_equal(eval(code, {"mask": mask, "numpy": np}), reorient(mask, orientation)), code


class TestAlignment:
    @staticmethod
    def case(size: tuple[int, ...], transform=lambda mask: mask) -> CaseStatistics:
        plane = np.zeros(size, bool)
        plane[tuple(slice(length // 6, length // 2) for length in size)] = True
        plane[tuple(slice(length // 2, 2 * length // 3) for length in size)] = True
        plane[(slice(2, size[0] // 4), *(slice(length - 9, length - 3) for length in size[1:]))] = True
        image = torch.from_numpy(plane.astype(np.float32))[None]
        image += 0.02 * torch.from_numpy(np.random.default_rng(0).normal(size=(1, *size)).astype(np.float32))
        mask = torch.from_numpy(np.ascontiguousarray(transform(plane)).astype(np.int64))
        return measure(Sample(image, mask, "x"), "train", Task(["background", "a"]))

    @pytest.mark.parametrize("orientation", orientations(2), ids=str)
    def test_the_orientation_that_restores_a_mask_fits_best(self, orientation):
        inverse = next(
            m
            for m in orientations(2)
            if np.array_equal(
                reorient(reorient(np.arange(9).reshape(3, 3), orientation), m), np.arange(9).reshape(3, 3)
            )
        )
        found = self.case((60, 60), lambda mask: reorient(mask, orientation)).alignment
        assert orientations(2)[int(np.nanargmax(found))] == inverse

    def test_only_orientations_that_keep_the_size_are_tried(self):
        known = ~np.isnan(self.case((40, 60)).alignment)
        assert known.sum() == 4
        assert (~np.isnan(self.case((20, 24, 20)).alignment)).sum() == 16

    def test_large_images_are_reduced(self):
        assert int(np.nanargmax(self.case((900, 700)).alignment)) == 0

    def test_too_little_outline_is_not_judged(self):
        mask = torch.zeros(30, 30).int()
        mask[3, 3] = 1
        assert np.isnan(measure(Sample(torch.rand(1, 30, 30), mask, "x"), "train", THREE).alignment).all()


class TestTexture:
    image = torch.nn.functional.avg_pool2d(torch.rand(1, 150, 190, generator=torch.Generator().manual_seed(0)), 5, 1)

    @pytest.mark.parametrize(
        "change",
        [
            lambda image: 0.3 * image + 0.5,
            lambda image: image**1.5,
            lambda image: torch.nn.functional.interpolate(image[None], scale_factor=0.8, mode="area")[0],
            lambda image: image.expand(3, -1, -1),
            lambda image: image + torch.linspace(0, 0.3, image.shape[2]),
        ],
        ids=["brightness", "gamma", "smaller", "colour", "shading"],
    )
    def test_hardly_depends_on(self, change):
        assert float(texture(self.image).astype(float) @ texture(change(self.image)).astype(float)) > 0.95

    def test_distinguishes_images(self):
        assert abs(float(texture(self.image).astype(float) @ texture(self.image.flip(1)).astype(float))) < 0.2

    def test_a_constant_image_has_none(self):
        assert not texture(torch.full((1, 50, 50), 0.3)).any()


@pytest.mark.parametrize("size", [(300, 200), (20, 31), (40,), (30, 20, 10)])
def test_thumbnails(size):
    mask = torch.zeros(size).int()
    mask[tuple(slice(2, 12) for _ in size)] = 1
    picture = np.asarray(Image.open(io.BytesIO(draw_thumbnail(torch.zeros(1, *size), mask, THREE))))
    assert max(picture.shape[0], (picture.shape[1] - 2) // 2) <= 112
    left, right = picture[:, : picture.shape[1] // 2 - 2], picture[:, picture.shape[1] // 2 + 2 :]
    assert left.max() < 40  # black, except for JPEG artefacts at the gap
    assert right.max() > 60  # painted


def test_thin_structures_stay_visible_in_a_thumbnail():
    mask = torch.zeros(1000, 1000).int()
    mask[500] = 1
    picture = np.asarray(Image.open(io.BytesIO(draw_thumbnail(torch.zeros(1, 1000, 1000), mask, THREE)))).astype(int)
    assert picture[:, 130:].max(2).max(0).min() > 60  # in every column
