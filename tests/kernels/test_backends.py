"""Every backend against the reference, in float64, and against naive code in every other dtype."""

from __future__ import annotations

import itertools
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
from lightning_dice.kernels.dispatch import choose_backend
from lightning_dice.losses import DiceCELoss, HausdorffLoss

ALL = RequiredSums(squares=True, minimum=True, nll=True, all_nll=True, absent_nll=True, focal=Focal(1.5))
DICE_AND_CE = RequiredSums(nll=True)
# The sums that each backend supports.
SUPPORTED = {"native": ALL, "blocked": DICE_AND_CE}
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(available()[name] is not None, reason=str(available()[name])))
    for name in SUPPORTED
]


def case(seed, activation, batch, classes, space, *, kind="hard", ignored=0.2, scale=3.0, dtype=torch.float64):
    """Return logits and a target with 255 at ignored pixels."""
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


def run(backend, logits, target, required, *, weight=None, seed=0, **options):
    """Return the stacked sums and the gradient of a random combination of them."""
    leaf = logits.detach().requires_grad_()
    with forced(backend, strict=backend != "reference"):
        sums = overlap_sums(leaf, target, weight=weight, required=required, **options)
    stacked = torch.stack(list(sums.fields.values()))
    torch.manual_seed(seed)
    (gradient,) = torch.autograd.grad(stacked, leaf, torch.randn_like(stacked))
    return stacked.detach(), gradient


def assert_same(backend, logits, target, required, rtol=1e-9, **options):
    expected, expected_gradient = run("reference", logits, target, required, **options)
    result, gradient = run(backend, logits, target, required, **options)
    torch.testing.assert_close(result, expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(gradient, expected_gradient, rtol=rtol, atol=rtol)
    assert gradient.dtype == logits.dtype
    return gradient


def supports_half(backend):
    """Whether float16 is supported; some compilers have no type for it."""
    return backend != "native" or native.can_read(torch.zeros(1, dtype=torch.float16))


def forms(backend):
    """Yield the activations and kinds of target that a backend supports."""
    yield from (("softmax", "ids"), ("sigmoid", "hard"), ("sigmoid", "soft"))
    if backend == "native":
        yield from (("softmax", "hard"), ("softmax", "soft"))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
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
def test_equals_the_reference_on_any_shape(backend, seed, batch, classes, space, form, ignored, weighted, scale):
    activation, kind = form
    if form not in forms(backend) or (activation == "softmax" and classes < 2):
        return
    if backend == "blocked" and activation == "softmax" and weighted == "class":
        return
    logits, target = case(seed, activation, batch, classes, space, kind=kind, ignored=ignored, scale=scale)
    weight = None
    if weighted:
        weight = torch.rand(logits.shape if weighted == "class" else (batch, *space), dtype=torch.float64)
    options = {"activation": activation, "ignore_index": 255, "weight": weight}
    assert_same(backend, logits, target, SUPPORTED[backend], **options)
    assert_same(backend, logits, target, RequiredSums(), **options)
    assert_same(backend, logits, target, DICE_AND_CE, **options)


@pytest.mark.parametrize(
    ("classes", "pixels"),
    [
        *itertools.product([1, 2, 19, 118], [63, 65, 1024, 1025]),
        # More than a unit of work, and more than a block.
        *((1, 70_001), (2, 40_001), (19, 5000), (118, 1500), (200, 2700)),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(1, 600_001), (2, 300_001), (19, 140_001)]),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_at_the_ends_of_tiles_and_blocks(backend, classes, pixels):
    """Sizes around those of tiles and blocks."""
    activation, kind = ("sigmoid", "hard") if classes == 1 else ("softmax", "ids")
    logits, target = case(0, activation, 2, classes, (pixels,), kind=kind, ignored=0.01)
    assert_same(backend, logits, target, DICE_AND_CE, activation=activation, ignore_index=255)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.values[0] == "native"])
def test_any_focal_factor(backend, gamma, alpha):
    for activation, kind in forms(backend):
        logits, target = case(1, activation, 2, 3, (5, 7), kind=kind)
        required = replace(ALL, focal=Focal(gamma, None if activation == "softmax" else alpha))
        assert_same(backend, logits, target, required, activation=activation, ignore_index=255)


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
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_in_memory(backend, layout):
    for activation, kind in forms(backend):
        for classes in (2, 19):
            logits, target = case(2, activation, 3, classes, (6, 11), kind=kind)
            expected = run("reference", logits, target, SUPPORTED[backend], activation=activation, ignore_index=255)
            change = LAYOUTS[layout]
            moved = change(logits)
            assert torch.equal(moved, logits)
            masks = [
                target,
                change(target) if target.ndim == 4 else target.transpose(1, 2).contiguous().transpose(1, 2),
            ]
            for mask in masks:
                result = run(backend, moved, mask, SUPPORTED[backend], activation=activation, ignore_index=255)
                torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
                # The strides that the operator promises to torch.compile.
                assert result[1].stride() == torch.empty_like(moved).stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_has_the_memory_format_of_the_logits(backend):
    for space, memory_format in (((6, 5), torch.channels_last), ((4, 5, 6), torch.channels_last_3d)):
        logits, target = case(3, "softmax", 2, 5, space, kind="ids")
        logits = logits.contiguous(memory_format=memory_format)
        gradient = assert_same(backend, logits, target, DICE_AND_CE, activation="softmax", ignore_index=255)
        assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_of_any_dtype(backend, dtype):
    for activation, kind in forms(backend):
        if kind == "soft" or (dtype == torch.bool and kind == "ids"):
            continue
        logits, target = case(4, activation, 2, 3, (9, 5), kind=kind, ignored=0.0)
        expected = run(backend, logits, target, SUPPORTED[backend], activation=activation)
        result = run(backend, logits, target.to(dtype), SUPPORTED[backend], activation=activation)
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_pixels_may_hold_anything(backend):
    for activation, kind in forms(backend):
        logits, target = case(5, activation, 2, 3, (8, 9), kind=kind)
        ignored = target == 255
        ignored = ignored.unsqueeze(1).expand_as(logits) if target.ndim < logits.ndim else ignored
        options = {"activation": activation, "ignore_index": 255}
        expected = run(backend, logits, target, SUPPORTED[backend], **options)
        for anything in (math.nan, math.inf, -math.inf):
            result = run(backend, logits.masked_fill(ignored, anything), target, SUPPORTED[backend], **options)
            assert torch.equal(result[0], expected[0])
            assert torch.equal(result[1], expected[1])
            assert (result[1][ignored] == 0).all()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_diverged_net_yields_no_finite_sums(backend, broken):
    for activation, kind in forms("native" if backend == "reference" else backend):
        for classes in (2, 19):
            for at in (0, classes - 1):
                logits, target = case(5, activation, 1, classes, (40,), kind=kind, ignored=0.0)
                logits[0, at, 17] = broken
                sums = run(backend, logits, target, DICE_AND_CE, activation=activation)[0]
                # A sigmoid of infinity is 1, and its cross-entropy infinite.
                seen = sums.isnan() if activation == "softmax" or math.isnan(broken) else ~sums.isfinite()
                assert seen.any(), (activation, kind, at)
                # The cross-entropy on its own, which a loss may use alone.
                assert not sums[-1].isfinite().all(), (activation, kind, at)


def naive(logits, target, activation, with_nll):
    """Compute Dice and cross-entropy in the usual way, in the dtype of the logits."""
    if activation == "softmax":
        p, t = logits.softmax(1), F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
        nll = F.cross_entropy(logits, target)
    else:
        p, t = logits.sigmoid(), target.to(logits.dtype)
        nll = F.binary_cross_entropy_with_logits(logits, t)
    axes = (0, *range(2, logits.ndim))
    dice = 1 - ((2 * (p * t).sum(axes) + 1) / (p.sum(axes) + t.sum(axes) + 1)).mean()
    return dice + nll if with_nll else dice


@pytest.mark.parametrize("scale", [0.5, 5.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_never_less_exact_than_naive_code(backend, activation, dtype, scale):
    """The errors of value and gradient against float64."""
    if dtype == torch.float16 and not supports_half(backend):
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
                with forced(backend, strict=True):
                    value = how(leaf, target, activation, with_nll) if how is naive else how(leaf, target)
                value.backward()
                results.append((value.detach().double(), leaf.grad.double()))
            (value, gradient), plain, ours = results
            digit = torch.finfo(dtype).eps
            # Naive code may overflow in half precision.
            error, allowed = (float(abs(value - x[0]).nan_to_num(0.0, 0.0)) for x in (ours, plain))
            assert ours[0].isfinite()
            assert error <= max(1.5 * allowed, 2e-7 * float(value.abs()))
            # In the root mean square. A result in half precision cannot be closer than its last digit.
            size = float(gradient.norm())
            error, allowed = (float((gradient - x[1]).norm().nan_to_num(0.0, 0.0)) for x in (ours, plain))
            assert ours[1].isfinite().all()
            assert error <= max(1.5 * allowed, 1.5e-7 * size, size * digit / 2 if dtype != torch.float32 else 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_certain_pixel_has_its_own_small_gradient(backend):
    """1 - p is e^-25, which float32 cannot represent as a difference from 1."""
    logits = torch.tensor([[[25.0, 0.0], [0.0, 25.0]]])
    for activation in ("softmax", "sigmoid"):
        target = torch.tensor([[0, 1]]) if activation == "softmax" else torch.tensor([[[1, 0], [0, 1]]])
        exact = run("reference", logits.double(), target, DICE_AND_CE, activation=activation)
        result = run(backend, logits, target, DICE_AND_CE, activation=activation)
        torch.testing.assert_close(result[0], exact[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(result[1].double(), exact[1], rtol=1e-5, atol=0)
        assert (result[1] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_gradients_of_half_precision_are_not_lost(backend):
    """With the incoming gradient scaled as by a GradScaler."""
    if not supports_half(backend):
        pytest.skip("the compiler has no float16")
    logits, target = case(7, "softmax", 4, 3, (64, 64), kind="ids", ignored=0.0, dtype=torch.float16)
    for scale in (1.0, 65536.0):
        leaf = logits.detach().requires_grad_()
        with forced(backend, strict=True):
            (DiceLoss(activation="softmax")(leaf, target) * scale).backward()
        exact = logits.double().requires_grad_()
        with forced("reference"):
            (DiceLoss(activation="softmax")(exact, target) * scale).backward()
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-3, atol=6e-8)
    assert (leaf.grad != 0).double().mean() > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_pass_gives_the_same(backend):
    logits, target = case(8, "softmax", 2, 3, (9, 9), kind="ids", ignored=0.0)
    leaf = logits.requires_grad_()
    with forced(backend, strict=True):
        loss = DiceCELoss(activation="softmax")(leaf, target)
        first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_that_is_masked_out(backend):
    """A logit of -inf in a class without pixels."""
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 9, 9, dtype=torch.float64), torch.randint(0, 3, (2, 9, 9))
    logits[:, 3] = -math.inf
    for required in (
        SUPPORTED[backend],
        replace(SUPPORTED[backend], all_nll=False),
        RequiredSums(nll=True, squares=backend == "native"),
    ):
        expected = run("reference", logits, target, replace(required, all_nll=False), activation="softmax")
        result = run(backend, logits, target, replace(required, all_nll=False), activation="softmax")
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_equal_float32_terms(backend):
    """All terms are rounded alike, so the errors of their addition do not average out."""
    for classes, layout in ((2, torch.contiguous_format), (3, torch.channels_last), (1000, torch.contiguous_format)):
        size = 512 if classes < 10 else 32
        logits = torch.zeros(1, classes, size, size).contiguous(memory_format=layout)
        target = torch.zeros(1, size, size, dtype=torch.long)
        sums, _ = run(backend, logits, target, SUPPORTED[backend], activation="softmax")
        exact, _ = run("reference", logits.double(), target, SUPPORTED[backend], activation="softmax")
        torch.testing.assert_close(sums, exact, rtol=4e-7, atol=0)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.values[0] == "native"])
def test_equal_probability_and_label_share_the_gradient_of_the_minimum(backend):
    logits, target = torch.zeros(1, 2, 5, dtype=torch.float64), torch.full((1, 2, 5), 0.5, dtype=torch.float64)
    for activation in ("sigmoid", "softmax"):
        assert_same(backend, logits, target, RequiredSums(minimum=True), activation=activation)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.values[0] == "native"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_ignored_planes_with_weights_by_class(backend, activation):
    logits, target = case(13, activation, 2, 3, (40,), kind="soft", ignored=0.5)
    weight = torch.rand(logits.shape, dtype=torch.float64)
    for required in (RequiredSums(), DICE_AND_CE, ALL):
        assert_same(backend, logits, target, required, activation=activation, ignore_index=255, weight=weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.values[0] == "native"])
def test_a_gradient_in_half_precision_is_the_nearest(backend, dtype):
    """The gradient in float32, rounded once."""
    if not supports_half(backend):
        pytest.skip("the compiler has no float16")
    for activation, kind in (("softmax", "ids"), ("sigmoid", "hard")):
        logits, target = case(14, activation, 2, 5, (9, 13), kind=kind, ignored=0.0, dtype=dtype)
        _, exact = run(backend, logits.float(), target, DICE_AND_CE, activation=activation)
        _, result = run(backend, logits, target, DICE_AND_CE, activation=activation)
        assert torch.equal(result, exact.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_whose_values_differ_from_their_memory(backend):
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
            with forced(backend):
                sums = overlap_sums(leaf, mask, activation=activation)
            (gradient,) = torch.autograd.grad(sums.overlap.sum(), leaf)
            torch.testing.assert_close(sums.predicted.detach(), exact.predicted)
            torch.testing.assert_close(sums.overlap.detach(), exact.overlap)
            assert float(gradient.abs().max()) <= 0.25


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_form_of_target_has_its_sums(backend):
    """Those that the backend does not support come from the reference, not from another form."""
    for activation, kind in [*forms("native"), (None, "hard")]:
        logits, target = case(15, activation or "sigmoid", 2, 3, (5, 4), kind=kind)
        logits = logits.sigmoid() if activation is None else logits
        for required in (RequiredSums(), DICE_AND_CE):
            results = []
            for name in ("reference", backend):
                leaf = logits.detach().requires_grad_()
                with forced(name):
                    sums = overlap_sums(leaf, target, activation=activation, ignore_index=255, required=required)
                values = torch.stack(list(sums.fields.values()))
                results.append((values.detach(), torch.autograd.grad((values * values).sum(), leaf)[0]))
            torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fake_tensor_is_left_to_the_reference(backend):
    with forced(backend), FakeTensorMode() as mode:
        logits, target = (mode.from_tensor(t) for t in (torch.zeros(1, 2, 8), torch.zeros(1, 8, dtype=torch.long)))
        assert choose_backend(SumsSpec("softmax", False, False), logits, target, None) is None
    with forced(backend):
        assert (
            choose_backend(SumsSpec("softmax", False, False), torch.zeros(1, 2, 8), logits_of(target), None) == backend
        )


def logits_of(fake):
    return torch.zeros(fake.shape, dtype=fake.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whatever_the_layout(backend):
    loss = DiceCELoss(activation="softmax")
    target = torch.randint(0, 3, (2, 8, 8))

    def cropped(x):
        return loss(x.contiguous(memory_format=torch.channels_last)[..., 1:-1, 1:-2] * 1, target)

    def transposed(x):
        return loss(x[..., 1:-1, 1:-2].transpose(2, 3), target)

    for function in (cropped, transposed):
        torch._dynamo.reset()
        leaf = torch.randn(2, 3, 10, 11, requires_grad=True)
        with forced(backend):
            (compiled,) = torch.autograd.grad(torch.compile(function, fullgraph=True)(leaf), leaf)
            (plain,) = torch.autograd.grad(function(leaf), leaf)
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_the_gradient(backend):
    for activation, kind in (("softmax", "ids"), ("sigmoid", "hard")):
        logits, target = case(9, activation, 1, 3, (2, 2), kind=kind)
        loss = DiceCELoss(activation=activation, ignore_index=255)
        with forced(backend, strict=True):
            assert torch.autograd.gradcheck(lambda z: loss(z, target), logits.requires_grad_())  # noqa: B023
            assert torch.autograd.gradgradcheck(lambda z: loss(z, target), logits)  # noqa: B023


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_stored_but_the_input(backend):
    """Between forward and backward, a loss stores the logits, the target, and a few numbers for each class."""
    for activation, kind in (("softmax", "ids"), ("sigmoid", "hard")):
        logits, target = case(10, activation, 2, 3, (64, 64), kind=kind, ignored=0.0)
        leaf = logits.requires_grad_()
        stored: list[torch.Tensor] = []
        with (
            forced(backend, strict=True),
            torch.autograd.graph.saved_tensors_hooks(lambda t, stored=stored: stored.append(t) or t, lambda t: t),
        ):
            DiceCELoss(activation=activation)(leaf, target)
        inputs = {leaf.untyped_storage().data_ptr(), target.untyped_storage().data_ptr()}
        assert inputs <= {t.untyped_storage().data_ptr() for t in stored}
        assert sum(t.numel() for t in stored if t.untyped_storage().data_ptr() not in inputs) < 200


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reference_computes_what_a_backend_does_not_support(backend):
    logits, target = case(11, "softmax", 2, 3, (4, 4), kind="soft", ignored=0.0)
    target.requires_grad_()
    with forced(backend):
        overlap_sums(logits, target, activation="softmax").overlap.sum().backward()
    torch.testing.assert_close(target.grad, logits.softmax(1))
    with forced(backend, strict=True), pytest.raises(ValueError, match=f"'{backend}' does not support these sums"):
        overlap_sums(logits, target, activation="softmax")


def test_an_unknown_implementation():
    with pytest.raises(ValueError, match="reference, native, blocked, triton, got 'fast'"), forced("fast"):
        pass


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend):
    for logits in (
        torch.zeros(0, 3, 4),
        torch.zeros(2, 3, 0),
        torch.zeros(0, 3, 8, 8)[..., 1:-1, 1:-1],
        torch.zeros(2, 3, 4, 0),
    ):
        shape = logits.shape
        sums, gradient = run(
            backend, logits, torch.zeros(shape[0], *shape[2:], dtype=torch.long), DICE_AND_CE, activation="softmax"
        )
        assert not sums.any()
        assert gradient.shape == shape


def test_losses_that_need_no_sums_are_left_alone():
    logits, target = case(12, "sigmoid", 1, 1, (8, 8), kind="hard", ignored=0.0)
    with forced("blocked", strict=True):
        assert HausdorffLoss()(logits, target).isfinite()
