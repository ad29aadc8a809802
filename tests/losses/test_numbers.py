"""Numerical accuracy: against float64 of the same rounded inputs, at ten million pixels, at extreme values."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from losses.family import CASES, EACH, FIRST, FIRST_EACH, ids_of, in_turn, value_and_gradient
from losses.saturated import assert_agrees_where_probabilities_underflow

from lightning_dice.kernels import Focal, RequiredSums, available, forced, overlap_sums
from lightning_dice.losses import DiceLoss

HALVES = [torch.float16, torch.bfloat16]
PIXELS = 10_000_000

ALL = RequiredSums(squares=True, minimum=True, nll=True, all_nll=True, absent_nll=True, focal=Focal())


def ten_million(dtype, activation):
    """Return logits of a net early in training, and a foreground of 100 pixels."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, PIXELS, generator=generator) - 6
    target = torch.zeros(1, 1, PIXELS, dtype=torch.uint8)
    target[..., :100] = 1
    logits[..., :100] += 8
    logits = logits.to(dtype)
    if activation == "sigmoid":
        return logits, target
    # The same probabilities, from a softmax of two classes.
    return torch.cat([torch.zeros_like(logits), logits], 1), target.squeeze(1)


@cache
def sums_of_ten_million(dtype, activation):
    """Return the sums of the logits, and of the same numbers in float64, for all losses."""
    logits, target = ten_million(dtype, activation)
    return [overlap_sums(z, target, activation=activation, required=ALL) for z in (logits, logits.double())]


AT_SCALE = [
    (case, activation)
    for case, activation in EACH
    if activation is not None and case.of_sums and "alpha" not in case.id
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "dtype"),
    [*(("sigmoid", dtype) for dtype in [torch.float32, *HALVES]), ("softmax", torch.float32)],
    ids=str,
)
def test_ten_million_pixels_and_a_hundred_of_foreground(activation, dtype):
    sums, exact = sums_of_ten_million(dtype, activation)
    for case, its in AT_SCALE:
        # The pass has the focal factor of one loss.
        if its == activation and (case.row.name != "focal" or case.id == "focal"):
            loss = case.loss(activation)
            value, expected = loss.from_sums(sums).item(), loss.from_sums(exact).item()
            assert value == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-4), case.id


@pytest.mark.slow
@pytest.mark.parametrize("name", ["top_k", "dice_ce"])
def test_ten_million_pixels_without_sums(name):
    case = next(case for case in FIRST if case.id == name)
    logits, target = ten_million(torch.float32, "sigmoid")
    with torch.no_grad():
        value, expected = case.loss()(logits, target), case.loss()(logits.double(), target)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def steps_apart(a, b):
    """Return the distance of two tensors in units of the last place."""
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16

    def place(x):
        bits = x.view(integer).long()
        return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)

    return (place(a) - place(b)).abs()


def around(activation, dtype, kind, spread=4.0):
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(2, 1 if activation == "sigmoid" else 2, 4000, generator=generator) * spread).to(dtype)
    target = (torch.rand(2, 1, 4000, generator=generator) < 0.1).long()
    if kind == "soft":
        target = torch.rand(2, 1, 4000, generator=generator)
        return logits, target if activation == "sigmoid" else torch.cat([target, 1 - target], 1)
    return logits, target if activation == "sigmoid" else target.squeeze(1)


# Rounding makes pixels equally hard, and any of them may be among the hardest; and torch's modules treat probabilities
# next to 1 in their own way.
SMOOTH = [
    (case, activation or ("softmax" if turn % 2 else "sigmoid"))
    for turn, (case, activation) in enumerate(in_turn(FIRST))
    if case.id not in ("compound", "on_probabilities")
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("case", "activation"), SMOOTH, ids=ids_of(SMOOTH))
def test_gradients_pixel_by_pixel(case, activation, dtype):
    """Half inputs: float64's gradient, rounded once. Float32: close to it, in units of each pixel's own gradient."""
    for kind in ("hard", "soft"):
        assert_gradients_pixel_by_pixel(case, activation, dtype, kind)


def assert_gradients_pixel_by_pixel(case, activation, dtype, kind):
    logits, target = around(activation, dtype, kind)
    # Scaled, as a trainer does for half precision, which cannot hold the gradient of one pixel of thousands.
    scale = 2.0**13 if dtype == torch.float16 else 1.0
    loss = case.loss(activation)
    z, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z, target) * scale, z)
    (expected,) = torch.autograd.grad(loss(exact, target) * scale, exact)
    rounded = expected.to(dtype)
    # No gradient is lost to rounding.
    assert (gradient[rounded != 0] != 0).all()
    if dtype == torch.float32:
        # Near p = 1, 1 - p has an error of half a unit in the last place of 1.
        error = (gradient - expected).abs() / expected.abs().clamp(min=expected.abs().max() * 1e-3)
        assert error.median() < 1e-6
        assert error.max() < 1e-3
    else:
        assert (steps_apart(gradient, rounded) <= 1).float().mean() > 0.999


ACTIVE = [(case, activation) for case, activation in FIRST_EACH if activation is not None]


@pytest.mark.parametrize(("case", "activation"), ACTIVE, ids=ids_of(ACTIVE))
def test_saturated_logits_stay_finite(case, activation):
    signs = torch.tensor([[[1.0, -1.0, 0.0, 1.0, -1.0], [-1.0, 1.0, 0.0, 1.0, 1.0]]])
    planes = torch.tensor([[[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]])
    targets = [planes, 1 - planes, planes * 0] if activation == "sigmoid" else [planes[:, 0], planes[:, 1] * 0]
    for size, smooth, dtype in ((40.0, 0.0, torch.float32), (100.0, 1.0, torch.float16), (1e4, 0.0, torch.float32)):
        for target in targets:
            loss = case.loss(activation, absent="penalize", smooth=smooth)
            value, gradient = value_and_gradient(loss, (signs * size).to(dtype), target)
            assert value.isfinite()
            assert gradient.isfinite().all()


CPU = [name for name in available() if name != "triton" and available()[name] is None]


@pytest.mark.parametrize("backend", CPU)
def test_backends_agree_where_probabilities_underflow(backend):
    """Whether a class counts follows from its pixels, not from the logit at which a backend's exponential is 0."""
    assert_agrees_where_probabilities_underflow(backend)


@pytest.mark.parametrize("backend", CPU)
def test_an_absent_class_has_a_score_of_0_without_smoothing(backend):
    """However low its logits are: a sigmoid or a softmax is never 0. Probabilities that are passed may be."""
    planes = torch.zeros(2, 1, 4)
    planes[1] = -120
    mask = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]]])
    classes = torch.zeros(1, 3, 4)
    classes[:, 2] = -95
    with forced(backend):
        assert DiceLoss(smooth=0, pool="image")(planes, mask).item() == pytest.approx(3 / 4)
        softmax = DiceLoss(smooth=0, activation="softmax")
        assert softmax(classes, torch.tensor([[0, 1, 0, 1]])).item() == pytest.approx(2 / 3)
        given = DiceLoss(smooth=0, pool="image", activation=None)
        assert given(planes.sigmoid(), mask).item() == pytest.approx(1 / 2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_certain_probabilities_stay_finite(case):
    for dtype in (torch.float64, torch.float32):
        probs = torch.tensor([[[1.0, 0.0, 1.0, 0.0]]], dtype=dtype)
        for target in ([1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]):
            for absent in ("smooth", "skip", "penalize"):
                loss = case.loss(None, absent=absent, smooth=0)
                value, gradient = value_and_gradient(loss, probs, torch.tensor([[target]]))
                assert value.isfinite()
                assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.id in ("focal-root", "focal_tversky", "log_dice-root", "compound")],
    ids=lambda case: case.id,
)
def test_an_exponent_below_1_has_a_gradient_at_a_perfect_prediction(case):
    target = torch.tensor([[[1, 1, 0, 0]]])
    for dtype in (torch.float64, torch.float32, *HALVES):
        for size in (5.0, 20.0, 60.0, 1e4):
            value, gradient = value_and_gradient(case.loss(), ((target * 2 - 1) * size).to(dtype), target)
            assert value.isfinite()
            assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        ("cross_entropy", "sigmoid"),
        ("cross_entropy", "softmax"),
        ("focal", "sigmoid"),
        ("focal", "softmax"),
    ],
)
def test_confident_pixels_keep_their_digits(activation, kind):
    """The cross-entropy of pixels that a trained net is sure of is small, not 0."""
    case = next(case for case in FIRST if case.id == kind)
    logits = torch.linspace(8, 16, 1001).view(1, 1, -1)
    logits, target = (
        (logits, torch.ones(1, 1, 1001, dtype=torch.long))
        if activation == "sigmoid"
        else (torch.cat([torch.zeros_like(logits), logits], 1), torch.ones(1, 1001, dtype=torch.long))
    )
    value, gradient = value_and_gradient(case.loss(activation), logits, target)
    expected, exact = value_and_gradient(case.loss(activation), logits.double(), target)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-3, atol=0)


def test_dice_of_confident_pixels_has_its_gradient():
    """The gradient of a pixel contains p (1 - p), which must not come from a p that is rounded to 1."""
    case = CASES[0]
    logits = torch.linspace(10, 30, 101).view(1, 1, -1)
    target = torch.zeros(1, 1, 101, dtype=torch.long)
    _, gradient = value_and_gradient(case.loss(), logits, target)
    _, exact = value_and_gradient(case.loss(), logits.double(), target)
    assert (gradient[exact.float() != 0] != 0).all()


def test_the_slope_of_a_root_is_bounded():
    """Near a perfect prediction, rounding alone would decide the gradient of a root."""
    focal, plain = (next(case for case in FIRST if case.id == name).loss(None) for name in ("focal_tversky", "tversky"))
    for missing in (1e-14, 1e-12, 1e-9):
        probs = torch.full((1, 1, 4), 1 - missing, dtype=torch.float64)
        _, gradient = value_and_gradient(focal, probs, torch.ones(1, 1, 4))
        _, slope = value_and_gradient(plain, probs, torch.ones(1, 1, 4))
        torch.testing.assert_close(gradient, slope * 1e-6 ** (0.75 - 1))
