"""Edges of images and outlines of masks, pixel by pixel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lightning_dice.functional.orientation import boundary_pixels, edge_ranks

SIZES = [(9,), (6, 7), (4, 5, 6)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ranks_of_the_gradient(size):
    image = np.random.default_rng(0).random((2, *size))

    def smoothed(channel: np.ndarray) -> np.ndarray:
        padded = np.pad(channel, 1, mode="edge")
        shifts = itertools.product(range(3), repeat=channel.ndim)
        windows = [padded[tuple(slice(s, s + n) for s, n in zip(shift, size, strict=True))] for shift in shifts]
        return np.mean(windows, axis=0)

    energy = np.zeros(size)
    for channel, axis in itertools.product(image, range(len(size))):
        padded = np.pad(smoothed(channel), 1, mode="edge")
        inner = [slice(1, -1)] * len(size)
        ahead, behind = ([*inner[:axis], part, *inner[axis + 1 :]] for part in (slice(2, None), slice(None, -2)))
        energy += (padded[tuple(ahead)] - padded[tuple(behind)]) ** 2
    expected = [(np.sum(energy < value) + np.sum(energy <= value)) / (2 * energy.size) for value in energy.ravel()]
    found = edge_ranks(torch.from_numpy(image)[None])
    assert found.numpy().ravel() == pytest.approx(expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outlines(size):
    planes = np.random.default_rng(1).integers(0, 2, (2, *size))
    planes[0][tuple(0 for _ in size)] = 9
    expected = np.zeros(size, bool)
    for place in itertools.product(*map(range, size)):
        for axis, step, plane in itertools.product(range(len(size)), (-1, 1), planes):
            near = tuple(x + step * (i == axis) for i, x in enumerate(place))
            if 0 <= near[axis] < size[axis] and 9 not in (plane[place], plane[near]):
                expected[place] |= plane[place] != plane[near]
    found = boundary_pixels(torch.from_numpy(planes)[None], ignore_index=9)
    assert np.array_equal(found[0].numpy(), expected)
