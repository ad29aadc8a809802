from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from definitions import plain_sums, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dice.kernels import Focal, RequiredSums, available, check_values, forced, overlap_sums, reference
from lightning_dice.kernels.pixels import read_pixels

ALL = RequiredSums(squares=True, minimum=True, nll=True, all_nll=True, absent_nll=True, focal=Focal())


def reference_sums(logits, target, *, ignore_index):
    """Compute the sums without the checks of the CPU, as on a GPU."""
    return reference.overlap_sums(
        read_pixels(logits, target, activation="softmax", ignore_index=ignore_index), RequiredSums()
    )


KERNELS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for name, reason in available().items()
    if name != "triton"
]

# Those with an implementation of all sums; `blocked` leaves most of them to the reference.
DIFFERENT = [kernel for kernel in KERNELS if kernel.values != ("blocked",)]


def stacked(sums):
    return torch.stack(list(sums.fields.values()))


def assert_equal_to_definition(logits, target, gamma=2.0, alpha=None, **options):
    sums = overlap_sums(logits, target, required=replace(ALL, focal=Focal(gamma, alpha)), **options)
    expected = plain_sums(logits, target, gamma=gamma, alpha=alpha, **options)
    assert len(sums.fields) == 11
    for name, field in sums.fields.items():
        values = torch.tensor([[entry.total(name) for entry in row] for row in expected], dtype=torch.float64)
        torch.testing.assert_close(field, values, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", None])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_equals_the_definition(kernel, activation, soft):
    for space, ignored in (((7,), True), ((5, 4), False), ((5, 4), True), ((3, 2, 4), True), ((1, 1), False)):
        logits, target = random_case(1, activation=activation, space=space, soft=soft, ignored=ignored)
        with forced(kernel):
            assert_equal_to_definition(logits, target, activation=activation, ignore_index=255 if ignored else None)


@pytest.mark.parametrize("kernel", DIFFERENT)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", None])
@pytest.mark.parametrize(("gamma", "alpha"), [(0.0, None), (0.5, 0.25), (1.0, None), (3.0, 0.25)])
def test_any_focal_factor(kernel, activation, gamma, alpha):
    logits, target = random_case(1, activation=activation, ignored=True)
    with forced(kernel):
        assert_equal_to_definition(logits, target, gamma, alpha, activation=activation, ignore_index=255)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", None])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_classes_that_are_not_annotated(activation, soft):
    logits, target = random_case(1, activation=activation, soft=soft, ignored=True)
    annotated = torch.tensor([[True, False, True], [False, True, True]])
    if activation == "softmax":
        if soft:  # Pixels of classes that are not annotated are labelled as background.
            target = target.masked_fill((~annotated[:, :, None, None]) & (target != 255), 0.0)
            labelled = target.where(target != 255, 0.0)
            target = target.clone()
            target[:, 0] = torch.where(target[:, 0] == 255, 255.0, 1 - labelled[:, 1:].sum(1))
        else:
            target[0][target[0] == 1] = 0
        logits_of = torch.softmax(logits, 1)
        assert (logits_of > 0).all()
    sums = overlap_sums(logits, target, activation=activation, ignore_index=255, annotated=annotated, required=ALL)
    expected = plain_sums(logits, target, activation=activation, ignore_index=255, annotated=annotated)
    for name, field in sums.fields.items():
        values = torch.tensor([[entry.total(name) for entry in row] for row in expected], dtype=torch.float64)
        torch.testing.assert_close(field, values, msg=lambda m, name=name: f"{name}: {m}")


def test_what_is_not_annotated_may_be_anything():
    logits, target = random_case(1, activation="sigmoid")
    annotated = torch.tensor([[True, False, True], [True, True, True]])
    expected = overlap_sums(logits, target, annotated=annotated)
    logits[0, 1] = math.nan
    sums = overlap_sums(logits.requires_grad_(), target, annotated=annotated)
    torch.testing.assert_close(stacked(sums), stacked(expected), rtol=0, atol=0)
    stacked(sums).sum().backward()
    assert (logits.grad[0, 1] == 0).all()


@pytest.mark.parametrize("kernel", DIFFERENT)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("by_class", [False, True], ids=["pixel", "pixel-and-class"])
def test_pixel_weights(kernel, activation, by_class):
    logits, target = random_case(2, activation=activation, ignored=True)
    weight = torch.rand(logits.shape if by_class else logits[:, 0].shape, dtype=torch.float64)
    with forced(kernel):
        assert_equal_to_definition(logits, target, activation=activation, ignore_index=255, weight=weight)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    classes=st.integers(2, 6),
    space=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    activation=st.sampled_from(["sigmoid", "softmax", None]),
    soft=st.booleans(),
    ignored=st.booleans(),
)
def test_equals_the_definition_on_any_shape(seed, batch, classes, space, activation, soft, ignored):
    logits, target = random_case(
        seed, activation=activation, batch=batch, classes=classes, space=space, soft=soft, ignored=ignored
    )
    assert_equal_to_definition(logits, target, activation=activation, ignore_index=255)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", None])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_gradients_once_and_twice(activation, soft):
    logits, target = random_case(3, activation=activation, soft=soft, space=(3,), ignored=True)

    def totals(z):
        return stacked(overlap_sums(z, target, activation=activation, ignore_index=255, required=ALL))

    logits.requires_grad_()
    assert torch.autograd.gradcheck(totals, logits)
    assert torch.autograd.gradgradcheck(totals, logits)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", None])
def test_ignored_pixels_may_hold_anything(activation):
    logits, target = random_case(4, activation=activation, ignored=True)
    ignored = target == 255
    ignored = ignored.unsqueeze(1).expand_as(logits) if activation == "softmax" else ignored
    poisoned = logits.masked_fill(ignored, math.nan).requires_grad_()
    options = {"activation": activation, "ignore_index": 255, "required": ALL}
    clean, dirty = overlap_sums(logits, target, **options), overlap_sums(poisoned, target, **options)
    torch.testing.assert_close(stacked(dirty), stacked(clean), rtol=0, atol=0)
    stacked(dirty).sum().backward()
    assert poisoned.grad.isfinite().all()
    assert (poisoned.grad[ignored] == 0).all()


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_saturated_logits_stay_finite(activation, dtype):
    logits = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]]]).to(dtype).requires_grad_()
    target = torch.tensor([[1, 0]]) if activation == "softmax" else torch.tensor([[[0, 1], [1, 0]]])
    sums = overlap_sums(logits, target, activation=activation, required=ALL)
    stacked(sums).sum().backward()
    assert stacked(sums).isfinite().all()
    assert logits.grad.isfinite().all()
    assert float(sums.nll.sum().detach()) > 1e4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ten_million_pixels_and_a_hundred_of_foreground(dtype):
    logits = torch.full((1, 1, 10_000_000), -7.0, dtype=dtype)
    logits[..., :100] = 3.0
    target = torch.zeros_like(logits, dtype=torch.uint8)
    target[..., :100] = 1
    sums = overlap_sums(logits, target)
    p_back, p_front = (1 / (1 + math.exp(-z)) for z in (-7.0, 3.0))
    assert sums.count.item() == 10_000_000
    # All pixels share one p, so its own rounding to float32 (6e-8 and the error of exp) does not average out.
    assert sums.predicted.item() == pytest.approx((10_000_000 - 100) * p_back + 100 * p_front, rel=3e-7)
    assert sums.overlap.item() == pytest.approx(100 * p_front, rel=3e-7)


@pytest.mark.slow
def test_the_sum_of_ten_million_loses_nothing():
    logits = torch.full((1, 1, 10_000_000), -7.0)
    with forced("reference"):
        sums = overlap_sums(logits, torch.zeros_like(logits, dtype=torch.uint8))
    assert sums.predicted.item() == pytest.approx(logits.sigmoid().double().sum().item(), rel=1e-12)


@pytest.mark.parametrize("kernel", DIFFERENT)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_sums_do_not_stop_at_2_to_the_24(kernel, activation):
    """A pixel of that weight, and three of weight 1, which float32 would lose."""
    logits, weight = torch.full((1, 2, 4), 0.0), torch.tensor([[2.0**24, 1.0, 1.0, 1.0]])
    target = torch.ones(1, 4, dtype=torch.long) if activation == "softmax" else torch.ones(1, 2, 4, dtype=torch.long)
    with forced(kernel):
        sums = overlap_sums(logits, target, activation=activation, weight=weight)
    size = 2**24 + 3
    assert (sums.count == size).all()
    assert sums.actual[0, 1] == size
    assert sums.predicted[0, 1] == sums.overlap[0, 1] == size / 2


@pytest.mark.slow
def test_counts_of_ids_do_not_stop_at_2_to_the_24():
    size = 2**24 + 3
    sums = overlap_sums(torch.zeros(1, 2, size), torch.zeros(1, size, dtype=torch.uint8), activation="softmax")
    assert sums.actual[0, 0].item() == size


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_ids_of_any_integer_dtype(dtype):
    logits, target = random_case(5, activation="softmax")
    expected = overlap_sums(logits, target, activation="softmax")
    sums = overlap_sums(logits, target.to(dtype), activation="softmax")
    torch.testing.assert_close(sums.overlap, expected.overlap)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.float32])
def test_planes_of_any_dtype(dtype):
    logits, target = random_case(6, activation="sigmoid")
    expected = overlap_sums(logits, target)
    torch.testing.assert_close(overlap_sums(logits, target.to(dtype)).actual, expected.actual)


def test_memory_formats_and_strides():
    logits, target = random_case(7, activation="softmax", space=(6, 8))
    expected = overlap_sums(logits, target, activation="softmax")
    for other in (logits.contiguous(memory_format=torch.channels_last), logits.mT.contiguous().mT):
        assert not other.is_contiguous()
        torch.testing.assert_close(overlap_sums(other, target, activation="softmax").overlap, expected.overlap)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="autocast on the CPU leaves these operations alone")
def test_autocast_changes_nothing():
    logits, target = (tensor.cuda() for tensor in random_case(8, activation=None, dtype=torch.float32))
    expected = overlap_sums(logits, target, activation=None, required=ALL)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        sums = overlap_sums(logits, target, activation=None, required=ALL)
    torch.testing.assert_close(sums.nll, expected.nll, rtol=0, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("z", [9.0, 25.0, 40.0])
def test_certain_pixels_are_exact_in_float32(kernel, activation, z):
    """1 - p is e^-z, which float32 cannot represent as a difference from 1."""
    logits = torch.tensor([[[z, 0.0, z, 0.0], [0.0, z, 0.0, z]]])
    ids = torch.tensor([[0, 1, 1, 0]])  # Right, right, wrong, wrong.
    target = ids if activation == "softmax" else torch.nn.functional.one_hot(ids, 2).movedim(-1, 1)
    # Not all_nll, which for label smoothing need not be so exact.
    required = RequiredSums(nll=True) if kernel == "blocked" else replace(ALL, all_nll=False)
    for part in (slice(0, 2), slice(2, 4)):
        leaf, exact = logits[..., part].clone().requires_grad_(), logits[..., part].double().requires_grad_()
        with forced(kernel):
            sums = stacked(overlap_sums(leaf, target[..., part], activation=activation, required=required))
        with forced("reference"):
            expected = stacked(overlap_sums(exact, target[..., part], activation=activation, required=required))
        torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-37)
        for row in range(len(sums)):
            (gradient,) = torch.autograd.grad(sums[row, 0, 0], leaf, retain_graph=True)
            (slope,) = torch.autograd.grad(expected[row, 0, 0], exact, retain_graph=True, allow_unused=True)
            if slope is not None:
                torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("kernel", DIFFERENT)
def test_large_logits_in_float64(kernel):
    z = 25.0
    with forced(kernel):
        sums = overlap_sums(torch.tensor([[[z]]], dtype=torch.float64), torch.tensor([[[0]]]), required=ALL)
    assert sums.absent_nll.item() == pytest.approx(z + math.log1p(math.exp(-z)), rel=1e-15, abs=0)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32])
def test_unsigned_ids_of_limited_support(dtype):
    logits, target = random_case(5, activation="softmax", ignored=True)
    expected = overlap_sums(logits, target, activation="softmax", ignore_index=255)
    sums = overlap_sums(logits, target.to(dtype), activation="softmax", ignore_index=255)
    torch.testing.assert_close(sums.overlap, expected.overlap)


def test_a_label_that_the_dtype_cannot_hold_ignores_nothing():
    target = torch.tensor([[0, 1, 255]], dtype=torch.uint8)
    sums = reference_sums(torch.zeros(1, 256, 3), target, ignore_index=-1)
    assert sums.count[0, 0].item() == 3  # torch finds uint8 255 equal to -1.


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_certain_probabilities_have_finite_gradients(value):
    probs = torch.full((1, 2, 3), value, requires_grad=True)
    for target in (torch.tensor([[0, 1, 0]]), torch.tensor([[[0, 1, 0], [1, 0, 1]]])):
        sums = overlap_sums(probs, target, activation=None, required=ALL)
        (gradient,) = torch.autograd.grad(stacked(sums).sum(), probs)
        assert gradient.isfinite().all()


def test_a_probability_under_an_ignored_pixel_may_be_anything():
    probs = torch.tensor([[[0.5, -1.0]]])
    sums = overlap_sums(probs, torch.tensor([[[1, 255]]]), activation=None, ignore_index=255)
    assert sums.predicted.item() == 0.5


def test_an_empty_batch():
    sums = overlap_sums(torch.zeros(0, 2, 4), torch.zeros(0, 4, dtype=torch.long), activation="softmax", required=ALL)
    assert all(field.shape == (0, 2) for field in sums.fields.values())


Z2 = torch.zeros(2, 1, 4, 6)
Z3 = torch.zeros(2, 3, 4, 6)
IDS = torch.zeros(2, 4, 6, dtype=torch.long)


@pytest.mark.parametrize(
    ("logits", "target", "options", "message"),
    [
        (Z2, IDS, {}, r"shape of logits, \(2, 1, 4, 6\), got \(2, 4, 6\); .*unsqueeze"),
        (Z2, torch.zeros(1, 1, 4, 6), {}, r"shape of logits, \(2, 1, 4, 6\), got \(1, 1, 4, 6\)"),
        (Z2, torch.zeros(2, 1, 6, 4), {}, r"got \(2, 1, 6, 4\)"),
        (Z3, torch.zeros(2, 1, 4, 6), {}, r"got \(2, 1, 4, 6\)"),
        (Z3, IDS, {}, r"shape of logits, \(2, 3, 4, 6\), got \(2, 4, 6\)"),
        (Z3, IDS[:, None], {"activation": "softmax"}, r"class ids .*\(2, 4, 6\).*got \(2, 1, 4, 6\); .*squeeze"),
        (Z3, IDS[:1], {"activation": "softmax"}, r"got \(1, 4, 6\)"),
        (Z3, IDS.mT, {"activation": "softmax"}, r"got \(2, 6, 4\)"),
        (Z3, IDS.float(), {"activation": "softmax"}, "integer dtype, got torch.float32"),
        (Z2, IDS, {"activation": "softmax"}, "at least 2 classes, logits have 1.*sigmoid"),
        (Z3.long(), IDS, {"activation": "softmax"}, "floating point, got torch.int64"),
        (Z3, IDS, {"activation": "tanh"}, "activation must be"),
        (torch.zeros(3), torch.zeros(3), {}, r"\(batch, classes, \*space\), got \(3,\)"),
        (Z3, IDS, {"activation": "softmax", "weight": torch.ones(2, 1, 4, 6)}, "weight must have the shape"),
        (Z3, IDS, {"activation": "softmax", "weight": torch.ones(2, 4, 6, dtype=torch.long)}, "weight must be float"),
        (
            Z3,
            IDS,
            {"activation": "softmax", "annotated": torch.ones(3, dtype=torch.bool)},
            r"annotated.*\(2, 3\).*\(3,\)",
        ),
        (Z3, IDS, {"activation": "softmax", "annotated": torch.ones(2, 3)}, "annotated must be bool"),
    ],
)
def test_refuses_what_would_broadcast(logits, target, options, message):
    with pytest.raises(ValueError, match=message):
        overlap_sums(logits, target, **options)


@pytest.mark.parametrize(
    ("logits", "target", "options", "message"),
    [
        (Z2, Z2.to(torch.uint8) + 255, {}, r"lie in \[0, 1\], got values from 255 to 255"),
        (Z2, torch.tensor([0, 255] * 24).view(2, 1, 4, 6), {}, r"0 to 255; .*target == 255"),
        (Z2, Z2 - 0.5, {}, r"lie in \[0, 1\], got values from -0.5"),
        (Z2, Z2 + torch.nan, {}, r"lie in \[0, 1\], got values from nan"),
        (Z3, IDS + 3, {"activation": "softmax"}, "class ids from 0 to 2, got values from 3 to 3"),
        (Z3, IDS - 1, {"activation": "softmax"}, "class ids from 0 to 2, got values from -1 to -1"),
        (Z3, IDS + 7, {"activation": "softmax", "ignore_index": 255}, r"from 0 to 2 \(ignored: 255\), got"),
        (Z3, Z3 + 0.5, {"activation": "softmax"}, r"sum to 1 .* from 1.5 to 1.5; for classes that overlap"),
        (Z3, Z3.to(torch.uint8), {"activation": "softmax"}, r"sum to 1 .* from 0 to 0"),
        (torch.rand(2, 3, 4, 6).softmax(1), IDS, {"activation": "softmax"}, "are probabilities"),
        (Z2, Z2, {"weight": Z2 - 1}, "weight must be finite and >= 0, got values from -1"),
        (Z2, Z2, {"weight": Z2 + torch.nan}, "weight must be finite"),
        (Z3 + 2, IDS, {"activation": None}, r"probabilities in \[0, 1\], got values from 2 to 2; for logits"),
    ],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_refuses_values_out_of_range(kernel, logits, target, options, message):
    with forced(kernel), pytest.raises(ValueError, match=message):
        overlap_sums(logits, target, **options)


def test_rounding_beyond_the_range_is_accepted():
    beyond = torch.full((1, 2, 3), 1 + 2e-7)
    overlap_sums(beyond - 1, beyond - 1, activation=None)
    overlap_sums(beyond, beyond, activation=None)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        overlap_sums(Z2, Z2 + 1.0001)


def test_ignored_values_are_not_checked():
    options = {"activation": "softmax", "ignore_index": 255}
    check_values(Z3, torch.where(torch.rand(IDS.shape) < 0.5, 255, 1), **options)
    check_values(Z3, torch.full_like(IDS, 255), **options)
    check_values(Z3, IDS - 1, activation="softmax", ignore_index=-1)


def test_refuses_a_mask_in_place_of_logits():
    mask = (torch.rand(1, 1, 8, 8) < 0.5).float()
    with pytest.raises(ValueError, match=r"logits are a mask.*activation=None"):
        overlap_sums(mask, mask)


def test_one_pass_has_one_focal_factor():
    assert (RequiredSums(focal=Focal()) | RequiredSums(nll=True)) == RequiredSums(nll=True, focal=Focal())
    with pytest.raises(ValueError, match="one focal factor"):
        RequiredSums(focal=Focal(1.0)) | RequiredSums(focal=Focal(2.0))
