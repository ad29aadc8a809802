"""What every loss inherits from the shared code, tested once for each loss: that it goes through that code.

The code itself, `lightning_dice.kernels`, has the matrix of dtypes, layouts and values in `tests/kernels`.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from losses.family import LOSSES, close, make_case, places_of, value_and_gradient
from torch import nn

from lightning_dice import losses

# Base classes have no formula.
BASES = {"OverlapLoss", "PixelMeanLoss", "SegmentationLoss", "SumsLoss"}
SHAPE = (2, 3, 8, 6)

each = pytest.mark.parametrize("name", LOSSES)
ACTIVATIONS = ["sigmoid", "softmax", None]


def test_the_table_has_every_loss():
    public = {
        name for name in losses.__all__ if inspect.isclass(one := getattr(losses, name)) and issubclass(one, nn.Module)
    }
    assert public - BASES == set(LOSSES)


@each
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_shared_duties(name, activation):
    """Ignored pixels, layouts, dtypes, autocast, an empty batch: all in one, from a loss of the same settings."""
    logits, target = make_case(1, activation, shape=SHAPE)
    loss = LOSSES[name](activation=activation, ignore_index=255)
    value, gradient = value_and_gradient(loss, logits, target)
    assert value.dtype == torch.float64
    assert value.isfinite()
    assert (gradient != 0).any()

    # Ignored pixels may hold anything.
    ignored = places_of(target == 255, logits, activation)
    dirty, dirty_gradient = value_and_gradient(loss, logits.masked_fill(ignored, math.nan), target)
    assert dirty == value
    assert torch.equal(dirty_gradient, gradient)
    assert (gradient[ignored] == 0).all()

    # Any layout in memory.
    padded = torch.zeros(*SHAPE, 2, dtype=logits.dtype)
    padded[..., 0] = logits
    for other in (
        logits.contiguous(memory_format=torch.channels_last),
        logits.mT.contiguous().mT,
        padded[..., 0],
    ):
        assert other.stride() != logits.stride()
        moved, moved_gradient = value_and_gradient(loss, other, target.mT.contiguous().mT)
        close(moved, value)
        close(moved_gradient, gradient)
    expanded = target[:1].expand_as(target)
    close(loss(logits, expanded), loss(logits, expanded.contiguous()))

    # Small dtypes of targets.
    small, small_gradient = value_and_gradient(loss, logits, target.to(torch.uint8))
    close(small, value)
    close(small_gradient, gradient)

    # Computed in float32, whatever the input; autocast changes nothing.
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounded = logits.to(dtype)
        single, single_gradient = value_and_gradient(loss, rounded, target)
        exact, exact_gradient = value_and_gradient(loss, rounded.double(), target)
        assert single.dtype == torch.float32
        assert single_gradient.dtype == dtype
        assert single.item() == pytest.approx(exact.item(), rel=1e-5)
        assert single_gradient.double().norm().item() == pytest.approx(exact_gradient.norm().item(), rel=1e-2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast, cast_gradient = value_and_gradient(loss, rounded, target)
        assert torch.equal(cast, single)
        assert torch.equal(cast_gradient, single_gradient)

    # Nothing to learn from: no images, no rows or columns, or all of them ignored.
    for nothing, of_nothing in (
        (logits[:0], target[:0]),
        (logits[..., :0, :], target[..., :0, :]),
        (logits[..., :0], target[..., :0]),
        (logits[:0, ..., :0], target[:0, ..., :0]),
        (logits * math.nan, torch.full_like(target, 255)),
    ):
        value, gradient = value_and_gradient(loss, nothing, of_nothing)
        assert value == 0
        assert gradient.shape == nothing.shape
        assert (gradient == 0).all()


@each
def test_a_weight_counts(name):
    for activation in ACTIVATIONS:
        check_a_weight_counts(name, activation)


def check_a_weight_counts(name, activation):
    logits, target = make_case(2, activation, shape=SHAPE)
    loss = LOSSES[name](activation=activation, ignore_index=255)
    if name == "OnProbabilities":
        for more in ({"weight": torch.ones(2, 8, 6)}, {"annotated": torch.ones(2, 3, dtype=torch.bool)}):
            with pytest.raises(ValueError, match="takes neither weight nor annotated"):
                loss(logits, target, **more)
        return
    value, gradient = value_and_gradient(loss, logits, target)
    for shape in ((2, 8, 6), SHAPE):
        ones = torch.ones(shape, dtype=torch.float64)
        same, same_gradient = value_and_gradient(loss, logits, target, ones)
        close(same, value)
        close(same_gradient, gradient)
        # Of the first row of each image nothing is left.
        ones[..., 0, :] = 0
        weighted, weighted_gradient = value_and_gradient(loss, logits, target, ones)
        assert not torch.isclose(weighted, value)
        if name != "ClDiceLoss":  # The skeleton of other pixels depends on it.
            assert (weighted_gradient[..., 0, :] == 0).all()


@each
def test_a_class_that_is_not_annotated_does_not_count(name):
    for activation in ACTIVATIONS:
        check_a_class_that_is_not_annotated_does_not_count(name, activation)


def check_a_class_that_is_not_annotated_does_not_count(name, activation):
    if name == "OnProbabilities":
        return
    logits, target = make_case(3, activation, shape=SHAPE, ignored=0.0)
    if activation == "softmax":
        target[1][target[1] == 2] = 0  # Expected to be labelled as background.
    loss = LOSSES[name](activation=activation)
    every = torch.ones(2, 3, dtype=torch.bool)
    value, gradient = value_and_gradient(loss, logits, target)
    same, same_gradient = value_and_gradient(loss, logits, target, annotated=every)
    close(same, value)
    close(same_gradient, gradient)
    every[1, 2] = False
    other, other_gradient = value_and_gradient(loss, logits, target, annotated=every)
    assert not torch.isclose(other, value)
    if activation == "softmax":
        # Its probability counts as background, so that moving some from one to the other changes nothing.
        joined = logits.clone()
        joined[1, 0], joined[1, 2] = joined[1, [0, 2]].logsumexp(0), -1e3
        close(loss(joined, target, annotated=every), other)
    else:
        assert (other_gradient[1, 2] == 0).all()


@each
def test_a_diverged_network_is_seen(name):
    for activation in ACTIVATIONS:
        check_a_diverged_network_is_seen(name, activation)


def check_a_diverged_network_is_seen(name, activation):
    logits, target = make_case(4, activation, shape=SHAPE, ignored=0.0)
    # Within the class, and so in the map of every loss.
    target[(0, 0, 4, 3)[-target.ndim :] if activation == "softmax" else (0, 0, 4, 3)] = 1
    logits[0, 0 if activation != "softmax" else 1, 4, 3] = math.nan
    if name == "SkeletonRecallLoss":
        logits[0] = math.nan
    assert LOSSES[name](activation=activation)(logits, target).isnan()
