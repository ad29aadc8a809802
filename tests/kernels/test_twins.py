"""The faster twins against the reference, in float64, and against naive code in every other dtype."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_dice import DiceLoss
from lightning_dice.kernels import Focal, RequiredSums, available, forced, native, overlap_sums
from lightning_dice.kernels.backend import SumsSpec
from lightning_dice.kernels.dispatch import chosen
from lightning_dice.losses import DiceCELoss, HausdorffLoss

ALL = RequiredSums(squares=True, minimum=True, nll=True, all_nll=True, absent_nll=True, focal=Focal(1.5))
DICE_AND_CE = RequiredSums(nll=True)
# What each twin can do.
WANTED = {"native": ALL, "blocked": DICE_AND_CE}
TWINS = [
    pytest.param(name, marks=pytest.mark.skipif(available()[name] is not None, reason=str(available()[name])))
    for name in WANTED
]


def case(seed, activation, batch, classes, space, *, kind="hard", ignored=0.2, scale=3.0, dtype=torch.float64):
    """Logits and a target with 255 at ignored pixels."""
    torch.manual_seed(seed)
    logits = (torch.randn(batch, classes, *space, dtype=torch.float64) * scale).to(dtype)
    where = torch.rand(batch, *space) < ignored
    if activation == "softmax":
        if kind == "soft":
            target = torch.randn(batch, classes, *space, dtype=torch.float64).softmax(1)
            return logits, target.masked_fill(where.unsqueeze(1), 255)
        ids = torch.randint(0, classes, (batch, *space))
        if kind == "ids":
            return logits, ids.masked_fill(where, 255 if classes <= 255 else -100)
        planes = torch.zeros(batch, classes, *space, dtype=torch.int64).scatter_(1, ids.unsqueeze(1), 1)
        return logits, planes.masked_fill(where.unsqueeze(1), 255)
    target = torch.rand(batch, classes, *space, dtype=torch.float64)
    target = target if kind == "soft" else (target < 0.3).long()
    return logits, target.masked_fill(torch.rand(target.shape) < ignored, 255)


def run(twin, logits, target, wanted, *, weight=None, seed=0, **options):
    """The sums, stacked, and the gradient of a random combination of them."""
    leaf = logits.detach().requires_grad_()
    with forced(twin, strict=twin != "reference"):
        sums = overlap_sums(leaf, target, weight=weight, wanted=wanted, **options)
    stacked = torch.stack(list(sums.fields.values()))
    torch.manual_seed(seed)
    (gradient,) = torch.autograd.grad(stacked, leaf, torch.randn_like(stacked))
    return stacked.detach(), gradient


def assert_same(twin, logits, target, wanted, rtol=1e-9, **options):
    expected, slope = run("reference", logits, target, wanted, **options)
    came, gradient = run(twin, logits, target, wanted, **options)
    torch.testing.assert_close(came, expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(gradient, slope, rtol=rtol, atol=rtol)
    assert gradient.dtype == logits.dtype
    return gradient


def reads_half(twin):
    """Not every compiler has a type for float16."""
    return twin != "native" or native.reads(torch.zeros(1, dtype=torch.float16))


def forms(twin):
    """Activations and kinds of target that a twin takes."""
    yield from (("softmax", "ids"), ("sigmoid", "hard"), ("sigmoid", "soft"))
    if twin == "native":
        yield from (("softmax", "hard"), ("softmax", "soft"))


@pytest.mark.parametrize("twin", TWINS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    classes=st.sampled_from([1, 2, 3, 5, 7, 16, 19, 33, 118, 200]),
    space=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    form=st.sampled_from(list(forms("native"))),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    weighted=st.sampled_from([None, "pixel", "class"]),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
)
def test_equals_the_reference_on_any_shape(twin, seed, batch, classes, space, form, ignored, weighted, scale):
    activation, kind = form
    if form not in forms(twin) or (activation == "softmax" and classes < 2):
        return
    if twin == "blocked" and activation == "softmax" and weighted == "class":
        return
    logits, target = case(seed, activation, batch, classes, space, kind=kind, ignored=ignored, scale=scale)
    weight = None
    if weighted:
        weight = torch.rand(logits.shape if weighted == "class" else (batch, *space), dtype=torch.float64)
    options = {"activation": activation, "ignore_index": 255, "weight": weight}
    assert_same(twin, logits, target, WANTED[twin], **options)
    assert_same(twin, logits, target, RequiredSums(), **options)
    assert_same(twin, logits, target, DICE_AND_CE, **options)


@pytest.mark.parametrize("classes", [1, 2, 19, 118])
@pytest.mark.parametrize("pixels", [63, 64, 65, 1023, 1024, 1025, 5000, 140_001])
@pytest.mark.parametrize("twin", TWINS)
def test_at_the_ends_of_tiles_and_blocks(twin, classes, pixels):
    """Sizes around those at which the work is cut into pieces."""
    if classes * pixels > 3_000_000:
        pixels = 20_001
    activation, kind = ("sigmoid", "hard") if classes == 1 else ("softmax", "ids")
    logits, target = case(0, activation, 2, classes, (pixels,), kind=kind, ignored=0.01)
    assert_same(twin, logits, target, DICE_AND_CE, activation=activation, ignore_index=255)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("twin", [twin for twin in TWINS if twin.values[0] == "native"])
def test_any_focal_factor(twin, gamma, alpha):
    for activation, kind in forms(twin):
        logits, target = case(1, activation, 2, 3, (5, 7), kind=kind)
        wanted = replace(ALL, focal=Focal(gamma, None if activation == "softmax" else alpha))
        assert_same(twin, logits, target, wanted, activation=activation, ignore_index=255)


LAYOUTS = {
    "cropped-channels-last": lambda x: F.pad(x, (1, 2, 3, 1)).contiguous(memory_format=torch.channels_last)[
        ..., 3:-1, 1:-2
    ],
    "batch-innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced-batch": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "sliced-classes": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "cropped": lambda x: F.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    "transposed-space": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "flipped-strides": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every-other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("twin", TWINS)
def test_any_layout_in_memory(twin, layout):
    for activation, kind in forms(twin):
        for classes in (2, 19):
            logits, target = case(2, activation, 3, classes, (6, 11), kind=kind)
            expected = run("reference", logits, target, WANTED[twin], activation=activation, ignore_index=255)
            change = LAYOUTS[layout]
            moved = change(logits)
            assert torch.equal(moved, logits)
            masks = [
                target,
                change(target) if target.ndim == 4 else target.transpose(1, 2).contiguous().transpose(1, 2),
            ]
            for mask in masks:
                came = run(twin, moved, mask, WANTED[twin], activation=activation, ignore_index=255)
                torch.testing.assert_close(came, expected, rtol=1e-9, atol=1e-9)
                # What the operator tells torch.compile beforehand.
                assert came[1].stride() == torch.empty_like(moved).stride()


@pytest.mark.parametrize("twin", TWINS)
def test_the_gradient_has_the_memory_format_of_the_logits(twin):
    for space, memory_format in (((6, 5), torch.channels_last), ((4, 5, 6), torch.channels_last_3d)):
        logits, target = case(3, "softmax", 2, 5, space, kind="ids")
        logits = logits.contiguous(memory_format=memory_format)
        gradient = assert_same(twin, logits, target, DICE_AND_CE, activation="softmax", ignore_index=255)
        assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
)
@pytest.mark.parametrize("twin", TWINS)
def test_targets_of_any_dtype(twin, dtype):
    for activation, kind in forms(twin):
        if kind == "soft" or (dtype == torch.bool and kind == "ids"):
            continue
        logits, target = case(4, activation, 2, 3, (9, 5), kind=kind, ignored=0.0)
        expected = run(twin, logits, target, WANTED[twin], activation=activation)
        came = run(twin, logits, target.to(dtype), WANTED[twin], activation=activation)
        assert torch.equal(came[0], expected[0])
        assert torch.equal(came[1], expected[1])


@pytest.mark.parametrize("twin", TWINS)
def test_ignored_pixels_may_hold_anything(twin):
    for activation, kind in forms(twin):
        logits, target = case(5, activation, 2, 3, (8, 9), kind=kind)
        ignored = target == 255
        ignored = ignored.unsqueeze(1).expand_as(logits) if target.ndim < logits.ndim else ignored
        options = {"activation": activation, "ignore_index": 255}
        expected = run(twin, logits, target, WANTED[twin], **options)
        for anything in (math.nan, math.inf, -math.inf):
            came = run(twin, logits.masked_fill(ignored, anything), target, WANTED[twin], **options)
            assert torch.equal(came[0], expected[0])
            assert torch.equal(came[1], expected[1])
            assert (came[1][ignored] == 0).all()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("twin", TWINS)
def test_a_net_that_has_diverged_shows(twin, broken):
    for activation, kind in forms(twin):
        for classes in (2, 19):
            for at in (0, classes - 1):
                logits, target = case(5, activation, 1, classes, (40,), kind=kind, ignored=0.0)
                logits[0, at, 17] = broken
                sums = run(twin, logits, target, DICE_AND_CE, activation=activation)[0]
                # A sigmoid of infinity is 1, and its cross-entropy infinite.
                seen = sums.isnan() if activation == "softmax" or math.isnan(broken) else ~sums.isfinite()
                assert seen.any(), (activation, kind, at)


def naive(logits, target, activation, wanted_nll):
    """Dice of one class after the other and cross-entropy, as everybody writes them, in the dtype of the logits."""
    if activation == "softmax":
        p, t = logits.softmax(1), F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
        nll = F.cross_entropy(logits, target)
    else:
        p, t = logits.sigmoid(), target.to(logits.dtype)
        nll = F.binary_cross_entropy_with_logits(logits, t)
    axes = (0, *range(2, logits.ndim))
    dice = 1 - ((2 * (p * t).sum(axes) + 1) / (p.sum(axes) + t.sum(axes) + 1)).mean()
    return dice + nll if wanted_nll else dice


@pytest.mark.parametrize("scale", [0.5, 5.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("twin", TWINS)
def test_never_less_exact_than_naive_code(twin, activation, dtype, scale):
    """The error of the gradient, and that of the value, against float64."""
    if dtype == torch.float16 and not reads_half(twin):
        pytest.skip("the compiler has no float16")
    for classes in (2, 19):
        logits, target = case(6, activation, 2, classes, (64, 64), kind="ids", ignored=0.0, scale=scale, dtype=dtype)
        for loss, with_nll in (
            (DiceLoss(activation=activation), False),
            (DiceCELoss(activation=activation, smooth=1.0), True),
        ):
            results = []
            for how, wide in ((naive, True), (naive, False), (loss, False)):
                leaf = logits.detach().clone().to(torch.float64 if wide else dtype).requires_grad_()
                with forced(twin, strict=True):
                    value = how(leaf, target, activation, with_nll) if how is naive else how(leaf, target)
                value.backward()
                results.append((value.detach().double(), leaf.grad.double()))
            (value, slope), plain, ours = results
            digit = torch.finfo(dtype).eps
            # Naive code in half precision may overflow altogether.
            error, allowed = (float(abs(value - x[0]).nan_to_num(0.0, 0.0)) for x in (ours, plain))
            assert ours[0].isfinite()
            assert error <= max(1.5 * allowed, 2e-7 * float(value.abs()))
            # The root of the mean square. A result in half precision cannot be closer than its last digit.
            size = float(slope.norm())
            error, allowed = (float((slope - x[1]).norm().nan_to_num(0.0, 0.0)) for x in (ours, plain))
            assert ours[1].isfinite().all()
            assert error <= max(1.5 * allowed, 1.5e-7 * size, size * digit / 2 if dtype != torch.float32 else 0.0)


@pytest.mark.parametrize("twin", TWINS)
def test_a_certain_pixel_has_its_own_small_gradient(twin):
    """1 - p is e^-25 there, which float32 cannot take from 1."""
    logits = torch.tensor([[[25.0, 0.0], [0.0, 25.0]]])
    for activation in ("softmax", "sigmoid"):
        target = torch.tensor([[0, 1]]) if activation == "softmax" else torch.tensor([[[1, 0], [0, 1]]])
        exact = run("reference", logits.double(), target, DICE_AND_CE, activation=activation)
        came = run(twin, logits, target, DICE_AND_CE, activation=activation)
        torch.testing.assert_close(came[0], exact[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(came[1].double(), exact[1], rtol=1e-5, atol=0)
        assert (came[1] != 0).all()


@pytest.mark.parametrize("twin", TWINS)
def test_small_gradients_of_half_precision_are_not_lost(twin):
    """With the scale of mixed precision in the gradient from above, as a scaler has it."""
    if not reads_half(twin):
        pytest.skip("the compiler has no float16")
    logits, target = case(7, "softmax", 4, 3, (64, 64), kind="ids", ignored=0.0, dtype=torch.float16)
    for scale in (1.0, 65536.0):
        leaf = logits.detach().requires_grad_()
        with forced(twin, strict=True):
            (DiceLoss(activation="softmax")(leaf, target) * scale).backward()
        exact = logits.double().requires_grad_()
        with forced("reference"):
            (DiceLoss(activation="softmax")(exact, target) * scale).backward()
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-3, atol=6e-8)
    assert (leaf.grad != 0).double().mean() > 0.99


@pytest.mark.parametrize("twin", TWINS)
def test_a_second_backward_pass_gives_the_same(twin):
    logits, target = case(8, "softmax", 2, 3, (9, 9), kind="ids", ignored=0.0)
    leaf = logits.requires_grad_()
    with forced(twin, strict=True):
        loss = DiceCELoss(activation="softmax")(leaf, target)
        first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("twin", TWINS)
def test_a_class_that_is_masked_out(twin):
    """A logit of -inf, in a class that no pixel has."""
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 9, 9, dtype=torch.float64), torch.randint(0, 3, (2, 9, 9))
    logits[:, 3] = -math.inf
    for wanted in (
        WANTED[twin],
        replace(WANTED[twin], all_nll=False),
        RequiredSums(nll=True, squares=twin == "native"),
    ):
        expected = run("reference", logits, target, replace(wanted, all_nll=False), activation="softmax")
        came = run(twin, logits, target, replace(wanted, all_nll=False), activation="softmax")
        torch.testing.assert_close(came, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("twin", TWINS)
def test_sums_of_equal_float32_terms(twin):
    """All with one rounding, so that the errors of adding them up do not average out."""
    for classes, layout in ((2, torch.contiguous_format), (3, torch.channels_last), (1000, torch.contiguous_format)):
        size = 512 if classes < 10 else 32
        logits = torch.zeros(1, classes, size, size).contiguous(memory_format=layout)
        target = torch.zeros(1, size, size, dtype=torch.long)
        sums, _ = run(twin, logits, target, WANTED[twin], activation="softmax")
        exact, _ = run("reference", logits.double(), target, WANTED[twin], activation="softmax")
        torch.testing.assert_close(sums, exact, rtol=4e-7, atol=0)


@pytest.mark.parametrize("twin", [twin for twin in TWINS if twin.values[0] == "native"])
def test_a_minimum_of_equals_has_half_of_each_slope(twin):
    logits, target = torch.zeros(1, 2, 5, dtype=torch.float64), torch.full((1, 2, 5), 0.5, dtype=torch.float64)
    for activation in ("sigmoid", "softmax"):
        assert_same(twin, logits, target, RequiredSums(minimum=True), activation=activation)


@pytest.mark.parametrize("twin", [twin for twin in TWINS if twin.values[0] == "native"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_ignored_planes_with_weights_by_class(twin, activation):
    logits, target = case(13, activation, 2, 3, (40,), kind="soft", ignored=0.5)
    weight = torch.rand(logits.shape, dtype=torch.float64)
    for wanted in (RequiredSums(), DICE_AND_CE, ALL):
        assert_same(twin, logits, target, wanted, activation=activation, ignore_index=255, weight=weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("twin", [twin for twin in TWINS if twin.values[0] == "native"])
def test_a_gradient_in_half_precision_is_the_nearest(twin, dtype):
    """That of float32, rounded once."""
    if not reads_half(twin):
        pytest.skip("the compiler has no float16")
    for activation, kind in (("softmax", "ids"), ("sigmoid", "hard")):
        logits, target = case(14, activation, 2, 5, (9, 13), kind=kind, ignored=0.0, dtype=dtype)
        _, exact = run(twin, logits.float(), target, DICE_AND_CE, activation=activation)
        _, came = run(twin, logits, target, DICE_AND_CE, activation=activation)
        assert torch.equal(came, exact.to(dtype))


@pytest.mark.parametrize("twin", TWINS)
def test_views_that_are_not_what_their_memory_says(twin):
    logits = torch.complex(torch.zeros(1, 2, 8), torch.randn(1, 2, 8)).conj().imag
    assert logits.is_neg()
    target = torch.zeros(1, 8, dtype=torch.long)
    bytes_of_255 = torch.full((1, 2, 8), 255, dtype=torch.uint8).view(torch.bool)
    for mask, activation in ((target, "softmax"), (bytes_of_255, "sigmoid")):
        plain = logits.clone().resolve_neg()
        with forced("reference"):
            exact = overlap_sums(plain, torch.ones_like(mask) if mask is bytes_of_255 else mask, activation=activation)
        for values in (logits, plain):
            leaf = values.detach().requires_grad_()
            with forced(twin):
                sums = overlap_sums(leaf, mask, activation=activation)
            (gradient,) = torch.autograd.grad(sums.overlap.sum(), leaf)
            torch.testing.assert_close(sums.predicted.detach(), exact.predicted)
            torch.testing.assert_close(sums.overlap.detach(), exact.overlap)
            assert float(gradient.abs().max()) <= 0.25


@pytest.mark.parametrize("twin", TWINS)
def test_a_fake_tensor_is_left_to_the_reference(twin):
    with forced(twin), FakeTensorMode() as mode:
        logits, target = (mode.from_tensor(t) for t in (torch.zeros(1, 2, 8), torch.zeros(1, 8, dtype=torch.long)))
        assert chosen(SumsSpec("softmax", False, False), logits, target, None) is None
    with forced(twin):
        assert chosen(SumsSpec("softmax", False, False), torch.zeros(1, 2, 8), logits_of(target), None) == twin


def logits_of(fake):
    return torch.zeros(fake.shape, dtype=fake.dtype)


@pytest.mark.parametrize("twin", TWINS)
def test_compiles_whatever_the_layout(twin):
    loss = DiceCELoss(activation="softmax")
    target = torch.randint(0, 3, (2, 8, 8))

    def cropped(x):
        return loss(x.contiguous(memory_format=torch.channels_last)[..., 1:-1, 1:-2] * 1, target)

    def transposed(x):
        return loss(x[..., 1:-1, 1:-2].transpose(2, 3), target)

    for function in (cropped, transposed):
        torch._dynamo.reset()
        leaf = torch.randn(2, 3, 10, 11, requires_grad=True)
        with forced(twin):
            (compiled,) = torch.autograd.grad(torch.compile(function, fullgraph=True)(leaf), leaf)
            (plain,) = torch.autograd.grad(function(leaf), leaf)
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("twin", TWINS)
def test_a_gradient_of_the_gradient(twin):
    for activation, kind in (("softmax", "ids"), ("sigmoid", "hard")):
        logits, target = case(9, activation, 1, 3, (2, 2), kind=kind)
        loss = DiceCELoss(activation=activation, ignore_index=255)
        with forced(twin, strict=True):
            assert torch.autograd.gradcheck(lambda z: loss(z, target), logits.requires_grad_())  # noqa: B023
            assert torch.autograd.gradgradcheck(lambda z: loss(z, target), logits)  # noqa: B023


@pytest.mark.parametrize("twin", TWINS)
def test_nothing_is_kept_but_the_input(twin):
    """Between forward and backward a loss holds the logits, the target, and numbers of classes."""
    for activation, kind in (("softmax", "ids"), ("sigmoid", "hard")):
        logits, target = case(10, activation, 2, 3, (64, 64), kind=kind, ignored=0.0)
        leaf = logits.requires_grad_()
        kept: list[torch.Tensor] = []
        with (
            forced(twin, strict=True),
            torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t),
        ):
            DiceCELoss(activation=activation)(leaf, target)
        given = {leaf.untyped_storage().data_ptr(), target.untyped_storage().data_ptr()}
        assert given <= {t.untyped_storage().data_ptr() for t in kept}
        assert sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in given) < 200


@pytest.mark.parametrize("twin", TWINS)
def test_what_a_twin_cannot_do_the_reference_does(twin):
    logits, target = case(11, "softmax", 2, 3, (4, 4), kind="soft", ignored=0.0)
    target.requires_grad_()
    with forced(twin):
        overlap_sums(logits, target, activation="softmax").overlap.sum().backward()
    torch.testing.assert_close(target.grad, logits.softmax(1))
    with forced(twin, strict=True), pytest.raises(ValueError, match=f"'{twin}' cannot do these sums"):
        overlap_sums(logits, target, activation="softmax")


def test_an_unknown_implementation():
    with pytest.raises(ValueError, match="reference, native, blocked, triton, got 'fast'"), forced("fast"):
        pass


@pytest.mark.parametrize("twin", TWINS)
def test_an_empty_batch(twin):
    for logits in (
        torch.zeros(0, 3, 4),
        torch.zeros(2, 3, 0),
        torch.zeros(0, 3, 8, 8)[..., 1:-1, 1:-1],
        torch.zeros(2, 3, 4, 0),
    ):
        shape = logits.shape
        sums, gradient = run(
            twin, logits, torch.zeros(shape[0], *shape[2:], dtype=torch.long), DICE_AND_CE, activation="softmax"
        )
        assert not sums.any()
        assert gradient.shape == shape


def test_losses_that_need_no_sums_are_left_alone():
    logits, target = case(12, "sigmoid", 1, 1, (8, 8), kind="hard", ignored=0.0)
    with forced("blocked", strict=True):
        assert HausdorffLoss()(logits, target).isfinite()
