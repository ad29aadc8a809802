from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest

from lightning_dice.inference.component_filter import filter_ids, filter_planes


def components(mask):
    """Sets of pixels that touch, at corners too, by flooding; in the order of their first pixels."""
    left = {tuple(map(int, place)) for place in np.argwhere(mask)}
    found = []
    for start in sorted(left):
        if start not in left:
            continue
        left.discard(start)
        reached, border = {start}, [start]
        while border:
            here = border.pop()
            for step in product((-1, 0, 1), repeat=len(here)):
                there = tuple(a + b for a, b in zip(here, step, strict=True))
                if there in left:
                    left.discard(there)
                    reached.add(there)
                    border.append(there)
        found.append(reached)
    return found


def going(mask, least, *, largest):
    found = components(mask)
    keep = max(range(len(found)), key=lambda i: (len(found[i]), -i), default=None)
    return [c for i, c in enumerate(found) if len(c) < least or (largest and i != keep)]


SPACES = [(60,), (14, 17), (7, 8, 6)]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_planes_by_flooding(space):
    rng = np.random.default_rng(0)
    for _ in range(20):
        planes = rng.random((3, *space)) < rng.uniform(0.05, 0.35)
        expected = planes.copy()
        for plane, (least, largest) in zip(expected, [(4, False), (0, False), (2, True)], strict=True):
            for component in going(plane, least, largest=largest):
                for place in component:
                    plane[place] = False
        filter_planes(planes, [4, 0, 2], keep_largest=[2])
        assert np.array_equal(planes, expected)


@pytest.mark.parametrize("background", [0, 2, None])
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_ids_by_flooding(space, background):
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.choice(4, size=space, p=[0.6, 0.2, 0.1, 0.1]).astype(np.uint8)
        expected = ids.copy()
        for index in range(4):
            if index == background:
                continue
            for component in going(expected == index, 3, largest=index == 1):
                around = Counter(
                    int(expected[there])
                    for there in {
                        tuple(a + b for a, b in zip(here, step, strict=True))
                        for here in component
                        for step in product((-1, 0, 1), repeat=len(space))
                    }
                    - component
                    if all(0 <= a < size for a, size in zip(there, space, strict=True))
                )
                most = min(around, key=lambda label: (-around[label], label))
                for place in component:
                    expected[place] = most if background is None else background
        filter_ids(ids, 3, keep_largest=[1], background=background)
        assert np.array_equal(ids, expected)
        assert ids.dtype == np.uint8


def test_a_component_that_fills_the_image_stays():
    ids = np.full((2, 2), 1)
    filter_ids(ids, 9, background=None)
    assert (ids == 1).all()


def test_sizes_must_fit_the_classes():
    with pytest.raises(ValueError, match="one for each of the 3 classes, got 2"):
        filter_planes(np.zeros((3, 4), bool), [1, 2])
    with pytest.raises(ValueError, match="one for each class, got 2 and a class 3"):
        filter_ids(np.array([0, 3]), [1.0, 2.0])
