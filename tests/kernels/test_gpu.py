"""The Triton backend against the reference: on a GPU if there is one, or else in Triton's interpreter on the CPU.

The interpreter must be enabled before Triton is imported, and must not be enabled for other tests. So without a GPU,
one test runs the others of this file in a process of their own.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses.saturated import assert_agrees_where_probabilities_underflow

from lightning_dice.kernels import Focal, RequiredSums, forced, overlap_sums, reference, triton_backend
from lightning_dice.kernels.backend import SumsSpec
from lightning_dice.kernels.pixels import read_pixels

pytest.importorskip("triton", reason="no triton")

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ALL = RequiredSums(squares=True, minimum=True, nll=True, all_nll=True, absent_nll=True, focal=Focal(1.5))
TYPICAL = RequiredSums(nll=True)

# The interpreter uses NumPy, which warns of the logarithm of 0, among others.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton 3.2
    *([pytest.mark.gpu] if CUDA and not INTERPRETED else []),
]

needs_cuda = pytest.mark.skipif(not CUDA or INTERPRETED, reason="needs a CUDA device")


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests run in this process")
def test_all_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d\d passed", result.stdout), result.stdout


def case(
    activation,
    kind,
    *,
    seed=0,
    batch=2,
    classes=3,
    space=(9, 7),
    ignored=False,
    dtype=torch.float64,
    required=ALL,
    weight=None,
    spread=3.0,
):
    """Return a spec, logits with NaN at ignored pixels, target and weight."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, classes, *space)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    if activation is None:
        logits = logits.sigmoid() * 0.98 + 0.01
    ids = torch.randint(0, classes, (batch, *space), generator=generator)
    if kind == "ids":
        target = ids
    elif kind == "hard" and activation == "softmax":
        target = torch.nn.functional.one_hot(ids, classes).movedim(-1, 1)
    elif kind == "hard":
        target = torch.randint(0, 2, shape, generator=generator)
    else:
        target = torch.rand(shape, generator=generator, dtype=torch.float64)
        target = (target * 4).softmax(1) if activation == "softmax" else target
    if ignored:
        target = target.masked_fill(torch.rand(target.shape, generator=generator) < 0.2, 255)
    spec = SumsSpec(activation, kind != "ids", kind == "soft", 255 if ignored else None, required)
    logits = logits.masked_fill(ignored_places(spec, target), math.nan).to(dtype)
    if weight is not None:
        weight = torch.rand(shape if weight == "class" else ids.shape, generator=generator)
        weight = weight.to(DEVICE).masked_fill(torch.rand(weight.shape, generator=generator).to(DEVICE) < 0.1, 0.0)
    return spec, logits.to(DEVICE), target.to(DEVICE), weight


def ignored_places(spec, target):
    """Return a mask of the ignored logits, which broadcasts to their shape."""
    if spec.ignore_index is None:
        return torch.zeros((), dtype=torch.bool)
    ignored = target == spec.ignore_index
    if not spec.planes:
        return ignored.unsqueeze(1)
    return ignored.any(1, keepdim=True) if spec.activation == "softmax" else ignored


def gradient_for(spec, logits, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    shape = (len(spec.rows), *logits.shape[:2])
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(logits.device)


def expected_of(spec, logits, target, weight, grad):
    """Return sums and gradient of the reference, in float64."""
    z = logits.detach().double().requires_grad_()
    options = {"activation": spec.activation, "ignore_index": spec.ignore_index}
    pixels = read_pixels(z, target, weight=None if weight is None else weight.double(), **options)
    fields = reference.overlap_sums(pixels, spec.required).fields
    sums = torch.stack([fields[name] for name in spec.rows])
    (gradient,) = torch.autograd.grad((sums * grad).sum(), z)
    return sums.detach(), gradient


def run_backend(spec, logits, target, weight, grad):
    assert triton_backend.unavailable_reason() is None
    assert triton_backend.supports(spec, logits, target, weight)
    with torch.no_grad():
        return triton_backend.forward(spec, logits, target, weight), triton_backend.backward(
            spec, grad, logits, target, weight
        )


def check(spec, logits, target, weight=None, *, scale=1.0, sums_tolerance=None, gradient_tolerance=None):
    grad = gradient_for(spec, logits, scale)
    sums, gradient = run_backend(spec, logits, target, weight, grad)
    expected_sums, expected_gradient = expected_of(spec, logits, target, weight, grad)
    assert sums.dtype == torch.float64
    assert gradient.dtype == logits.dtype
    assert gradient.stride() == torch.empty_like(logits).stride()
    wide = logits.dtype == torch.float64
    # Rounding of single precision, with exponents of up to 30 and focal factors, which are powers.
    sums_tolerance = sums_tolerance or ((1e-12, 1e-12) if wide else (2e-6, 2e-6))
    gradient_tolerance = gradient_tolerance or (
        (1e-10, 1e-12) if wide else (1e-5, 3e-6) if logits.dtype == torch.float32 else (None, None)
    )
    torch.testing.assert_close(sums, expected_sums, rtol=sums_tolerance[0], atol=sums_tolerance[1])
    half = logits.dtype in (torch.float16, torch.bfloat16)
    torch.testing.assert_close(
        gradient,
        expected_gradient.to(logits.dtype) if half else expected_gradient,
        check_dtype=False,
        rtol=gradient_tolerance[0],
        atol=gradient_tolerance[1],
    )
    ignored = ignored_places(spec, target)
    assert (gradient.masked_select(ignored) == 0).all()
    return sums, gradient


KINDS = [
    ("softmax", "ids"),
    ("softmax", "hard"),
    ("softmax", "soft"),
    ("sigmoid", "hard"),
    ("sigmoid", "soft"),
    (None, "ids"),
    (None, "hard"),
    (None, "soft"),
]


@pytest.mark.parametrize(("activation", "kind"), KINDS)
@pytest.mark.parametrize("ignored", [False, True], ids=["all", "ignored"])
@pytest.mark.parametrize("weight", [None, "pixel", "class"])
def test_every_sum_and_its_gradient(activation, kind, ignored, weight):
    spec, logits, target, w = case(activation, kind, ignored=ignored, weight=weight)
    check(spec, logits, target, w)


def test_agrees_where_probabilities_underflow():
    assert_agrees_where_probabilities_underflow("triton", DEVICE)


@pytest.mark.parametrize(("activation", "kind"), KINDS)
def test_single_precision(activation, kind):
    spec, logits, target, weight = case(activation, kind, ignored=True, dtype=torch.float32, weight="pixel")
    # The error of the gradient of log p is that of p times 1/p^2.
    check(spec, logits, target, weight, gradient_tolerance=(1e-5, 1e-3) if activation is None else None)


@pytest.mark.parametrize("name", ["squares", "minimum", "nll", "all_nll", "absent_nll", "focal", None])
@pytest.mark.parametrize(("activation", "kind"), KINDS)
def test_each_sum_alone(activation, kind, name):
    required = RequiredSums(**{name: Focal(2.0) if name == "focal" else True}) if name else RequiredSums()
    spec, logits, target, _ = case(activation, kind, required=required, space=(5,))
    check(spec, logits, target)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize(("activation", "kind"), [("softmax", "ids"), ("sigmoid", "soft"), (None, "hard")])
def test_any_focal_factor(activation, kind, gamma, alpha):
    required = RequiredSums(focal=Focal(gamma, alpha if activation != "softmax" else None))
    spec, logits, target, _ = case(activation, kind, required=required, space=(4, 5))
    check(spec, logits, target)


@settings(max_examples=12 if INTERPRETED else 30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    classes=st.integers(1, 9),
    space=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    kind=st.sampled_from(KINDS),
    ignored=st.booleans(),
    weight=st.sampled_from([None, "pixel", "class"]),
    required=st.sampled_from([RequiredSums(), TYPICAL, ALL]),
)
def test_any_shape(seed, batch, classes, space, kind, ignored, weight, required):
    classes = max(classes, 2) if kind[0] == "softmax" or kind[1] == "ids" else classes
    options = {"seed": seed, "batch": batch, "classes": classes, "space": space, "ignored": ignored}
    spec, logits, target, w = case(*kind, **options, weight=weight, required=required)
    check(spec, logits, target, w)


@pytest.mark.parametrize("classes", [2, 19, 33, 118, 200, 600])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_many_classes(classes, activation):
    kind = "ids" if activation == "softmax" else "hard"
    space = (5,) if INTERPRETED and classes > 100 else (37,)
    spec, logits, target, _ = case(activation, kind, classes=classes, batch=1, space=space, required=TYPICAL)
    check(spec, logits, target)


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_steps_of_a_program(steps, monkeypatch):
    monkeypatch.setattr(triton_backend, "_PROGRAMS", 1)
    monkeypatch.setattr(triton_backend, "_MAX_STEPS", steps)
    # The interpreter takes seconds for a thousand pixels.
    space, required = ((17, 16), TYPICAL) if INTERPRETED else ((31, 21), ALL)
    spec, logits, target, weight = case(
        "softmax", "ids", classes=33, space=space, ignored=True, weight="pixel", required=required
    )
    plan = triton_backend._Plan.of(spec, logits.flatten(2))
    assert plan.steps == min(steps, -(-math.prod(space) // plan.block_p))
    check(spec, logits, target, weight)


DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ignore_index", [None, 1, -1, 2])
def test_ids_of_any_dtype(dtype, ignore_index):
    if ignore_index is not None and not torch.iinfo(dtype).min <= ignore_index:
        pytest.skip("a label that the dtype cannot hold")
    spec, logits, target, _ = case("softmax", "ids", required=TYPICAL, space=(11,))
    if ignore_index == -1:
        target[:, ::3] = -1
    spec = SumsSpec("softmax", False, False, ignore_index, TYPICAL)
    grad = gradient_for(spec, logits)
    expected = expected_of(spec, logits, target, None, grad)
    torch.testing.assert_close(
        run_backend(spec, logits, target.to(dtype), None, grad), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.bool, *DTYPES[:5], torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_planes_of_any_dtype(dtype, activation):
    ignored = dtype in (torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32)
    spec, logits, target, _ = case(activation, "hard", ignored=ignored, required=TYPICAL, space=(11,))
    grad = gradient_for(spec, logits)
    expected = expected_of(spec, logits, target, None, grad)
    spec = SumsSpec(activation, True, dtype.is_floating_point, spec.ignore_index, TYPICAL)
    torch.testing.assert_close(
        run_backend(spec, logits, target.to(dtype), None, grad), expected, rtol=1e-12, atol=1e-12
    )


def test_ids_out_of_range_are_no_class():
    spec, logits, target, _ = case("softmax", "ids", required=TYPICAL, space=(11,), batch=1)
    grad = gradient_for(spec, logits)
    outside = target.clone()
    outside[0, 0], outside[0, 1], outside[0, 2] = 2**32 + 1, -5, 3
    sums, gradient = run_backend(spec, logits, outside, None, grad)
    inside = expected_of(spec, logits[..., 3:], target[..., 3:], None, grad)
    expected = expected_of(spec, logits, target, None, grad)
    for row, name in enumerate(spec.rows):
        known = expected if name in ("predicted", "count") else inside
        torch.testing.assert_close(sums[row], known[0][row])
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("activation", "kind"), [("softmax", "ids"), ("softmax", "soft"), ("sigmoid", "hard")])
def test_half_precision(dtype, activation, kind):
    spec, logits, target, _ = case(activation, kind, ignored=True, dtype=dtype)
    check(spec, logits, target)


def test_small_gradients_are_rounded_once():
    # The gradient by a sum over many pixels, 1e-6 here, would vanish if rounded to float16 before the product with p.
    spec, logits, target, _ = case("softmax", "ids", dtype=torch.float16, required=TYPICAL)
    _, gradient = check(spec, logits, target, scale=1e-6, gradient_tolerance=(1e-3, 6e-8))
    assert (gradient != 0).any()


MEMORY = {
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "every-second-image": lambda x: x.repeat_interleave(2, 0)[::2],
    "some-classes": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "transposed-space": lambda x: x.mT.contiguous().mT,
    "every-second-column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "class-between-rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "images-side-by-side": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "one-for-all-images": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(("activation", "kind"), [("softmax", "ids"), ("softmax", "soft"), ("sigmoid", "hard")])
def test_memory_formats(memory, activation, kind):
    spec, logits, target, weight = case(activation, kind, required=TYPICAL, ignored=True, weight="class", space=(5, 6))
    other = MEMORY[memory](logits)
    assert not other.is_contiguous()
    if memory == "one-for-all-images":
        target = target[:1].expand_as(target)
    check(spec, other, target, weight)
    check(spec, other, MEMORY[memory](target) if spec.planes else target, MEMORY[memory](weight))


def test_ids_and_weights_that_lie_apart():
    spec, logits, target, weight = case("softmax", "ids", required=TYPICAL, ignored=True, weight="pixel", space=(5, 6))
    for memory in ("every-second-image", "every-second-column", "transposed-space", "images-side-by-side"):
        check(spec, logits, MEMORY[memory](target), MEMORY[memory](weight))


def test_volumes_that_are_channels_last():
    spec, logits, target, _ = case("softmax", "ids", required=TYPICAL, space=(3, 4, 5))
    _, gradient = check(spec, logits.to(memory_format=torch.channels_last_3d), target)
    assert gradient.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("memory", ["channels-last", "every-second-image", "some-classes", "transposed-space"])
def test_logits_are_read_where_they_lie(memory):
    _, logits, target, _ = case("softmax", "hard", space=(5, 6))
    other = MEMORY[memory](logits)
    flat = triton_backend._FlatTensors.of(other, target, None)
    assert flat.logits.data_ptr() == other.data_ptr()


@pytest.mark.parametrize("size", [30.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_saturated_logits(size, dtype, activation):
    classes = 3
    logits = torch.full((1, classes, 8), -size, dtype=torch.float64)
    for i in range(8):
        logits[0, i % classes, i] = size
    logits[0, :, 7] = torch.tensor([size, size - 1, -size])
    ids = torch.tensor([[0, 1, 2, 1, 2, 0, 2, 0]])
    target = ids if activation == "softmax" else torch.nn.functional.one_hot(ids, classes).movedim(-1, 1)
    spec = SumsSpec(activation, activation == "sigmoid", False, None, ALL)
    logits, target = logits.to(DEVICE, dtype), target.to(DEVICE)
    grad = gradient_for(spec, logits)
    sums, gradient = run_backend(spec, logits, target, None, grad)
    assert sums.isfinite().all()
    assert gradient.isfinite().all()
    expected = expected_of(spec, logits, target, None, grad)
    rtol = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(sums, expected[0], rtol=rtol, atol=0)
    # Relative, except below the range of single precision.
    torch.testing.assert_close(gradient.double(), expected[1], rtol=rtol, atol=1e-300 if rtol < 1e-9 else 1e-37)


# Each alone: the gradient of absent_nll is of the order of 1 where that of the others vanishes.
@pytest.mark.parametrize(
    "required", [RequiredSums(), TYPICAL, RequiredSums(absent_nll=True)], ids=["overlap", "nll", "absent"]
)
@pytest.mark.parametrize("z", [2.0, 9.0, 17.0, 40.0])
def test_certain_pixels_are_exact(z, required):
    # From a logit of 17, single precision rounds p to 1, but not 1 - p, the cross-entropy or the gradient to 0.
    logits = torch.tensor([[[z], [-z], [0.5 - z]]], device=DEVICE)
    spec = SumsSpec("softmax", False, False, None, required)
    target = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    grad = gradient_for(spec, logits)
    sums, gradient = run_backend(spec, logits, target, None, grad)
    expected = expected_of(spec, logits, target, None, grad)
    torch.testing.assert_close(sums, expected[0], rtol=2e-5, atol=0)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=2e-5, atol=0)


def test_equal_probability_and_label_share_the_gradient_of_the_minimum():
    probs = torch.tensor([[[0.5, 0.25, 0.75]]], dtype=torch.float64, device=DEVICE)
    target = torch.full_like(probs, 0.5)
    spec = SumsSpec(None, True, True, None, RequiredSums(minimum=True))
    grad = torch.zeros(len(spec.rows), 1, 1, dtype=torch.float64, device=DEVICE)
    grad[spec.rows.index("minimum")] = 1
    _, gradient = run_backend(spec, probs, target, None, grad)
    assert gradient.flatten().tolist() == [0.5, 1.0, 0.0]


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["ids", "hard"])
def test_certain_probabilities(value, kind):
    spec, logits, target, _ = case(None, kind, space=(3,))
    check(spec, torch.full_like(logits, value), target)


def test_an_infinite_gradient_does_not_reach_ignored_pixels():
    spec, logits, target, _ = case("softmax", "ids", ignored=True, required=TYPICAL)
    grad = torch.full_like(gradient_for(spec, logits), math.inf)
    _, gradient = run_backend(spec, logits, target, None, grad)
    assert (gradient.masked_select(ignored_places(spec, target)) == 0).all()


def test_a_class_that_is_ruled_out():
    # A logit of -inf has p = 0 and an infinite -log p, which must not be multiplied by the label 0.
    spec, logits, target, _ = case("softmax", "ids", required=TYPICAL)
    target[target == 2] = 0
    logits[:, 2] = -math.inf
    sums, gradient = run_backend(spec, logits, target, None, grad := gradient_for(spec, logits))
    assert sums.isfinite().all()
    without = SumsSpec("softmax", False, False, None, TYPICAL)
    expected = expected_of(without, logits[:, :2], target, None, grad[..., :2])
    torch.testing.assert_close((sums[..., :2], gradient[:, :2]), expected, rtol=1e-10, atol=1e-12)
    assert (gradient[:, 2] == 0).all()


def test_a_diverged_network_yields_nan():
    spec, logits, target, _ = case("softmax", "ids", required=TYPICAL)
    logits[0, 0, 0, 0] = math.nan
    sums, _ = run_backend(spec, logits, target, None, gradient_for(spec, logits))
    assert sums[1, 0].isnan().all()
    assert sums[:, 1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
def test_nothing_to_sum(shape):
    logits, target = torch.zeros(shape, device=DEVICE), torch.zeros(shape[0], shape[2], dtype=torch.long, device=DEVICE)
    spec = SumsSpec("softmax", False, False, None, ALL)
    sums, gradient = run_backend(spec, logits, target, None, gradient_for(spec, logits))
    assert sums.shape == (len(spec.rows), *shape[:2])
    assert (sums == 0).all()
    assert gradient.shape == shape


@pytest.mark.parametrize(("activation", "kind"), [("softmax", "ids"), ("sigmoid", "soft")])
def test_the_same_bits_twice(activation, kind):
    spec, logits, target, _ = case(activation, kind, dtype=torch.float32, space=(9, 7) if INTERPRETED else (41, 37))
    grad = gradient_for(spec, logits)
    once, twice = (run_backend(spec, logits, target, None, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize(("activation", "kind"), [("softmax", "ids"), ("sigmoid", "hard")])
def test_no_less_exact_than_the_reference_in_the_same_dtype(activation, kind):
    spec, logits, target, _ = case(
        activation, kind, dtype=torch.float32, space=(17, 31) if INTERPRETED else (61, 97), required=TYPICAL
    )
    grad = gradient_for(spec, logits)
    exact = expected_of(spec, logits, target, None, grad)
    z = logits.clone().requires_grad_()
    pixels = read_pixels(z, target, activation=activation, ignore_index=None)
    fields = reference.overlap_sums(pixels, spec.required).fields
    naive = torch.stack([fields[name] for name in spec.rows])
    (naive_gradient,) = torch.autograd.grad((naive * grad).sum(), z)
    for ours, theirs, true in zip(
        run_backend(spec, logits, target, None, grad), (naive.detach(), naive_gradient), exact, strict=True
    ):
        assert (ours - true).abs().max() <= 2 * (theirs - true).abs().max() + 1e-7


def test_unsupported_tensors():
    spec, logits, target, _ = case("softmax", "ids")
    assert not triton_backend.supports(spec, torch.zeros(1, 1025, 2, device=DEVICE), target, None)
    assert not triton_backend.supports(spec, logits.to("meta"), target.to("meta"), None)
    assert not triton_backend.supports(spec, logits, target.to("meta"), None)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", None])
def test_a_compiled_call_equals_an_eager_one(activation):
    _, logits, target, _ = case(activation, "ids" if activation == "softmax" else "hard", dtype=torch.float32)

    def sums(z):
        return overlap_sums(z, target, activation=activation).overlap

    with forced("triton", strict=True):
        torch.testing.assert_close(torch.compile(sums, backend="aot_eager", fullgraph=True)(logits), sums(logits))


def test_offsets_beyond_31_bits():
    # Two images 2^31 elements apart. The memory between them is never touched, so it costs nothing.
    stride = 2**31 + 16
    spec, logits, target, _ = case("sigmoid", "hard", space=(5,), required=TYPICAL, classes=1, dtype=torch.float16)
    far = torch.empty(stride + 16, dtype=torch.float16, device=DEVICE).as_strided(logits.shape, (stride, 5, 1))
    far.copy_(logits)
    check(spec, far, target)


def test_offsets_inside_an_image_beyond_31_bits():
    stride = 2**30 + 16
    spec, logits, target, _ = case("softmax", "ids", space=(5,), required=TYPICAL, batch=1, dtype=torch.float16)
    far = torch.empty(2 * stride + 16, dtype=torch.float16, device=DEVICE).as_strided(logits.shape, (1, stride, 1))
    far.copy_(logits)
    check(spec, far, target)


HOPPER = [
    (SumsSpec("softmax", False, False, 255, TYPICAL), (2, 19, 64 * 64), torch.bfloat16, torch.uint8, None),
    (SumsSpec("softmax", False, False, -100, ALL), (1, 118, 31 * 33), torch.float32, torch.int64, "pixel"),
    (SumsSpec("softmax", True, True, 255, ALL), (1, 4, 63), torch.float16, torch.float32, "class"),
    (SumsSpec("sigmoid", True, False, 1, TYPICAL), (2, 1, 64), torch.float16, torch.uint8, "pixel"),
    (SumsSpec("sigmoid", True, True, None, ALL), (1, 40, 64), torch.float64, torch.float64, "class"),
    (SumsSpec(None, False, False, 255, ALL), (1, 3, 64), torch.float32, torch.int32, None),
    (SumsSpec(None, True, False, None, TYPICAL), (1, 1, 1), torch.float32, torch.int64, None),
    (SumsSpec("softmax", True, True, 255, TYPICAL), (1, 1000, 64), torch.float32, torch.float32, "class"),
]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="a kernel that is interpreted is not compiled")
@pytest.mark.parametrize("arguments", HOPPER, ids=[str(i) for i in range(len(HOPPER))])
def test_compiles_for_a_gpu(arguments, tmp_path, monkeypatch):
    compiled = compile_for_hopper(*arguments, monkeypatch, tmp_path)
    for kernel in compiled:
        assert "atom" not in kernel.asm["ptx"]
        assert len(kernel.asm["cubin"]) > 0
        # The shared memory of the smallest GPUs with asynchronous copies.
        assert kernel.metadata.shared <= 99 << 10


def compile_for_hopper(spec, shape, dtype, target_dtype, weighted, monkeypatch, folder):
    """Compile both kernels, without a GPU, as a launch with such tensors would."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    if "nvidia" not in triton.backends.backends:
        pytest.skip("triton was built without its compiler for NVIDIA's GPUs")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("older releases describe a kernel's arguments in another way")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    logits = torch.empty(shape, dtype=dtype)
    ids_shape = (shape[0], *shape[2:])
    target = torch.empty(shape if spec.planes else ids_shape, dtype=target_dtype)
    weight = None if weighted is None else torch.empty(shape if weighted == "class" else ids_shape)
    grad = torch.empty(len(spec.rows), *shape[:2], dtype=torch.float64)
    launches = []

    class Recorder:
        tl = triton_backend._kernels().tl

        class _Kernel:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getitem__(self, grid):
                return lambda *args, **constants: launches.append((self.kernel, args, constants))

        sums_kernel = _Kernel(triton_backend._kernels().sums_kernel)
        gradient_kernel = _Kernel(triton_backend._kernels().gradient_kernel)

    monkeypatch.setattr(triton_backend, "_kernels", lambda: Recorder)
    triton_backend.forward(spec, logits, target, weight)
    triton_backend.backward(spec, grad, logits, target, weight)
    compiled = []
    for kernel, args, constants in launches:
        warps = constants.pop("num_warps")
        signature, attributes = {}, {}
        for position, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
            varies = name in sys.modules["lightning_dice.kernels.triton_kernels"]._VARYING
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + POINTERS[value.dtype]
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1 and not varies:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i32"
            if isinstance(value, torch.Tensor) or (not varies and value % 16 == 0):
                attributes[(position,)] = [["tt.divisibility", 16]]
        signature |= {name: "constexpr" for name in constants}
        source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
        compiled.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}))
    return compiled


POINTERS = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@needs_cuda
def test_a_cuda_graph_and_no_waiting():
    spec, logits, target, _ = case("softmax", "ids", dtype=torch.float32, space=(61, 37), ignored=True)
    grad = gradient_for(spec, logits)
    expected = run_backend(spec, logits, target, None, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums, gradient = run_backend(spec, logits, target, None, grad)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close((sums, gradient), expected, rtol=0, atol=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_backend(spec, logits, target, None, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize(("activation", "kind"), [("softmax", "ids"), ("sigmoid", "hard")])
def test_at_most_six_launches(activation, kind):
    spec, logits, target, _ = case(activation, kind, dtype=torch.float16, space=(257, 255), required=TYPICAL)
    grad = gradient_for(spec, logits)
    run_backend(spec, logits, target, None, grad)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_backend(spec, logits, target, None, grad)
        torch.cuda.synchronize()
    launched = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 2 <= len(launched) <= 6


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    spec, logits, target, _ = case("softmax", "ids", required=TYPICAL)
    check(spec, logits.to("cuda:1"), target.to("cuda:1"))


if not (CUDA or INTERPRETED):  # Only the tests that run the interpreter or the compiler.
    for _name in [name for name in globals() if name.startswith("test_")]:
        if _name not in ("test_all_in_the_interpreter", "test_compiles_for_a_gpu"):
            del globals()[_name]
