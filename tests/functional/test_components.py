from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch

from lightning_dice.functional import RegionMap, component_regions


def flood(mask: np.ndarray, connectivity: int) -> list[set[tuple[int, ...]]]:
    """Find the components by hand."""
    places = {place for place in itertools.product(*map(range, mask.shape)) if mask[place]}
    steps = [s for s in itertools.product([-1, 0, 1], repeat=mask.ndim) if 0 < sum(map(abs, s)) <= connectivity]
    components = []
    while places:
        front = [places.pop()]
        component = set(front)
        while front:
            place = front.pop()
            near = {tuple(p + s for p, s in zip(place, step, strict=True)) for step in steps} & places
            places -= near
            component |= near
            front += near
        components.append(component)
    return components


def nearest(place: tuple[int, ...], components: list[set[tuple[int, ...]]]) -> set[int]:
    """Return the nearest components."""
    squares = [
        min(sum((a - b) ** 2 for a, b in zip(place, pixel, strict=True)) for pixel in component)
        for component in components
    ]
    return {number for number, square in enumerate(squares) if square == min(squares)}


CASES = [
    (seed, space, connectivity)
    for seed, space in enumerate([(17,), (7, 6), (9, 8), (4, 5, 4), (3, 6, 5)])
    for connectivity in range(1, len(space) + 1)
]


@pytest.mark.parametrize("regions", ["nearest", "blob"])
@pytest.mark.parametrize(("seed", "space", "connectivity"), CASES, ids=str)
def test_equals_the_definition(seed, space, connectivity, regions):
    mask = np.random.default_rng(seed).random(space) < 0.2
    found = component_regions(mask, regions, connectivity)
    components = flood(mask, connectivity)
    assert len(components) > 1
    # The order of the numbers is free: each of ours is one of theirs.
    ours = {}
    for number, component in enumerate(components):
        numbers = {int(found[place]) for place in component}
        assert len(numbers) == 1
        ours[numbers.pop()] = number
    assert sorted(ours) == list(range(len(components)))
    for place in itertools.product(*map(range, space)):
        if mask[place]:
            continue
        if regions == "blob":
            assert found[place] == -1
        else:
            assert ours[int(found[place])] in nearest(place, components)


def test_pixels_that_touch_at_a_corner_are_one_component_by_default():
    mask = np.eye(3, dtype=bool)
    assert (component_regions(mask) == 0).all()
    assert component_regions(mask, connectivity=1).diagonal().tolist() == [0, 1, 2]


@pytest.mark.parametrize("regions", ["nearest", "blob"])
@pytest.mark.parametrize("mask", [np.zeros((3, 3), bool), np.ones((3, 3), bool), np.eye(3, k=2) == 1])
def test_without_a_second_component_the_image_is_the_region(mask, regions):
    assert (component_regions(mask, regions) == 0).all()


@pytest.mark.parametrize("ignore_index", [None, 255])
def test_ids_and_planes_agree(ignore_index):
    ids = torch.randint(0, 3, (8, 9), generator=torch.Generator().manual_seed(0))
    if ignore_index is not None:
        ids[torch.rand(8, 9, generator=torch.Generator().manual_seed(1)) < 0.3] = 255
    planes = torch.stack([torch.where(ids == 255, 255, (ids == c).long()) for c in range(3)])
    expected = RegionMap("softmax", classes=3, ignore_index=ignore_index)(ids)
    assert expected.dtype == torch.int32
    assert expected.shape == (3, 8, 9)
    assert expected.amax((1, 2)).min() > 0
    assert torch.equal(RegionMap("sigmoid", ignore_index=ignore_index)(planes), expected)
    assert torch.equal(RegionMap("sigmoid", classes=3, ignore_index=ignore_index)(planes), expected)
    assert torch.equal(RegionMap("softmax", ignore_index=ignore_index)(planes.float()), expected)
    assert torch.equal(RegionMap(None, ignore_index=ignore_index)(planes), expected)
    assert torch.equal(RegionMap(None, classes=3, ignore_index=ignore_index)(ids), expected)


def test_ignored_pixels_belong_to_no_component():
    row = torch.tensor([[1, 255, 1, 0, 1]])
    expected = [[0, -1, 1, -1, 2]]
    assert RegionMap("sigmoid", regions="blob", ignore_index=255)(row).tolist() == expected
    # Even where the ignored label is that of a class, or of one class of a pixel with soft labels.
    assert RegionMap("softmax", classes=2, ignore_index=0)(torch.tensor([0, 1, 0])).tolist() == [[0] * 3] * 2
    soft = torch.tensor([[1, 0, 0, 1.0], [0, 1, -1, 0]])
    assert RegionMap("softmax", ignore_index=-1)(soft).tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    soft[0, 2], soft[1, 2] = 1, -1
    assert RegionMap("softmax", ignore_index=-1, regions="blob")(soft)[0].tolist() == [0, -1, -1, 1]


def test_soft_labels_are_a_class_from_one_half():
    soft = torch.tensor([[0.5, 0.4, 0.9, 0.1, 1.0]])
    assert RegionMap("sigmoid", regions="blob")(soft).tolist() == [[0, -1, 1, -1, 2]]


def test_excluded_classes_are_not_looked_at():
    ids = torch.tensor([0, 1, 0, 1])
    assert RegionMap("softmax", classes=2, exclude_classes=(0,))(ids).amax(1).tolist() == [0, 1]


def test_is_a_value():
    made = RegionMap("softmax", classes=2, connectivity=1)
    assert made == RegionMap("softmax", classes=2, connectivity=1) != RegionMap("softmax", classes=2)
    assert pickle.loads(pickle.dumps(made)) == made


def test_refuses():
    with pytest.raises(ValueError, match="connectivity must be from 1 to the number of space axes, 2, got 3"):
        component_regions(np.zeros((2, 2), bool), connectivity=3)
    with pytest.raises(ValueError, match="classes, the number of channels of the logits, is needed"):
        RegionMap("softmax")(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"a plane for each of the 3 classes, got the shape \(2, 4\)"):
        RegionMap("sigmoid", classes=3)(torch.zeros(2, 4))
