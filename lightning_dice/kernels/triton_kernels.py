# mypy: ignore-errors
"""Triton kernels of the sums and their gradient; `lightning_dice.kernels.triton_backend` launches them.

Each program processes tiles of `BLOCK_C` classes by `BLOCK_P` pixels of one image. A tile is loaded once, in its memory
order, and stays in registers; probabilities are computed there, and recomputed for the gradient. While one tile is
processed, the next `STAGES - 1` are loaded.

Shapes in the comments: C is `BLOCK_C`, P is `BLOCK_P`. Arguments in capitals are compile-time constants. Those that end
in `_ROW` are the rows of optional sums in the result, -1 for sums that are not required.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Not specialized, as these vary between calls: a value of 1 or a multiple of 16 would recompile the kernel.
_VARYING = ["images", "ignore", "chunks", "steps"]


@triton.jit
def _log1p(x):
    """Return log(1 + x), for finite x > -1: the part that 1 + x rounds away is added to first order."""
    u = 1.0 + x
    return tl.log(u) - ((u - 1.0) - x) / u


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _softmax(z, inside):
    """Return p, 1 - p and -log p, (C, P), and a mask of the likely class, which has more than half of the probability.

    Its exponential is the 1 in the total; its 1 - p and -log p are computed from the rest, so nothing cancels, however
    near p is to 1.
    """
    top = tl.max(z, 0)[None, :]
    e = tl.exp(z - top)
    total = tl.sum(e, 0)[None, :]
    likely = (e == 1.0) & (total < 2.0)
    rest = tl.sum(tl.where(likely, 0.0, e), 0)[None, :]
    inverse = 1.0 / total
    p = e * inverse
    q = tl.where(likely, rest * inverse, 1.0 - p)
    # Classes that pad the tile hold -inf, and infinity times a gradient of 0 would be NaN.
    nll = tl.where(inside, (top - z) + _log1p(tl.where(total < 2.0, rest, total - 1.0)), 0.0)
    return p, q, nll, likely


@triton.jit
def _softmax_without(z, likely):
    """Return the softmax over the classes other than the likely one, and the logarithm of its denominator, (1, P)."""
    z = tl.where(likely, float("-inf"), z)
    top = tl.max(z, 0)[None, :]
    e = tl.exp(z - top)
    total = tl.sum(e, 0)[None, :]
    return e / total, top + tl.log(total)


@triton.jit
def _sigmoid(z):
    """Return p, 1 - p, -log p and -log(1 - p), none of them by subtraction from 1."""
    e = tl.exp(-tl.abs(z))
    inverse = 1.0 / (1.0 + e)
    small = e * inverse
    rest = _log1p(e)
    p, q = tl.where(z >= 0.0, inverse, small), tl.where(z >= 0.0, small, inverse)
    return p, q, tl.maximum(-z, 0.0) + rest, tl.maximum(z, 0.0) + rest


@triton.jit
def _activate(z, inside, ACTIVATION: tl.constexpr, ABSENT: tl.constexpr, TINY: tl.constexpr):
    """Return p, 1 - p, -log p, -log(1 - p) (of a softmax only if ABSENT) and a mask of its likely class, all (C, P)."""
    if ACTIVATION == "softmax":
        p, q, nll, likely = _softmax(z, inside)
        absent = nll
        if ABSENT:
            # From logits if p is near 1, as 1 - p underflows for logits of a hundred.
            _, others = _softmax_without(z, likely)
            absent = tl.where(likely, _softplus(z - others), -_log1p(-tl.where(likely, 0.0, p)))
    elif ACTIVATION == "sigmoid":
        p, q, nll, absent = _sigmoid(z)
        likely = p > q
    else:
        p, q = z, 1.0 - z
        nll, absent = -tl.log(tl.maximum(p, TINY)), -tl.log(tl.maximum(q, TINY))
        likely = p > q
    return p, q, nll, absent, likely


@triton.jit
def _times_label(t, x, IDS: tl.constexpr):
    """Return the label times x. Class ids select instead of multiplying, as x may be infinite for a wrong class."""
    return tl.where(t, x, 0.0) if IDS else t * x


@triton.jit
def _power(x, GAMMA: tl.constexpr, TINY: tl.constexpr):
    """Return x^gamma and x, clamped to have a finite logarithm."""
    x = tl.maximum(x, TINY)
    return tl.exp(tl.log(x) * GAMMA), x


@triton.jit
def _sum_pixels(x):
    return tl.sum(x.to(tl.float64), 1)


@triton.jit
def _at_least(x, number, LEAST: tl.constexpr):
    """Return a sum of probabilities, or that of `number` of LEAST if these underflow; NaN stays."""
    return tl.where(x < LEAST * number, LEAST * number, x)


@triton.jit
def _load_tile(
    z_ptr,
    t_ptr,
    w_ptr,
    image,
    c,
    i,
    classes,
    pixels,
    z_image,
    z_class,
    z_pixel,
    t_image,
    t_class,
    t_pixel,
    w_image,
    w_class,
    w_pixel,
    ignore,
    ACTIVATION: tl.constexpr,
    IDS: tl.constexpr,
    IGNORE: tl.constexpr,
    WEIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Load the tile of classes c and pixels i: logits, labels, weights, valid pixels, and the part inside the image.

    Logits are 0 at ignored pixels, whatever memory holds there, and with a softmax -inf at classes beyond the last.
    Labels are (C, P), bool for class ids. Weights are 0 at ignored pixels, and (1, P) if classes share them.
    """
    in_image = (i < pixels)[None, :]
    inside = (c < classes)[:, None] & in_image
    z = tl.load(z_ptr + image * z_image + c[:, None] * z_class + i[None, :] * z_pixel, mask=inside, other=0.0)
    valid = in_image
    if IDS:
        ids = tl.load(t_ptr + image * t_image + i * t_pixel, mask=i < pixels, other=0)
        if IGNORE:
            valid = valid & (ids != ignore)[None, :]
        # The range is checked before narrowing to int32, as 2^32 + 1 is not class 1.
        in_range = (ids >= 0) & (ids < classes)
        t = in_range[None, :] & (ids.to(tl.int32)[None, :] == c.to(tl.int32)[:, None])
    else:
        labels = tl.load(t_ptr + image * t_image + c[:, None] * t_class + i[None, :] * t_pixel, mask=inside, other=0)
        t = labels.to(COMPUTE)
        if IGNORE:
            if ACTIVATION == "softmax":
                ignored = tl.max(((labels == ignore) & inside).to(tl.int32), 0)[None, :]
                valid = valid & (ignored == 0)
            else:
                valid = valid & (labels != ignore)
            t = tl.where(valid, t, 0.0)
    # Replaced, not multiplied by zero: an ignored pixel may hold NaN.
    z = tl.where(valid, z.to(COMPUTE), 0.0)
    if ACTIVATION == "softmax":
        z = tl.where((c < classes)[:, None], z, float("-inf"))
    if WEIGHT == "pixel":
        w = tl.load(w_ptr + image * w_image + i * w_pixel, mask=i < pixels, other=0.0).to(COMPUTE)[None, :]
        w = tl.where(valid, w, 0.0)
    elif WEIGHT == "class":
        w = tl.load(w_ptr + image * w_image + c[:, None] * w_class + i[None, :] * w_pixel, mask=inside, other=0.0)
        w = tl.where(valid, w.to(COMPUTE), 0.0)
    else:
        w = valid.to(COMPUTE)
    return z, t, w, valid, inside


# A program adds its tiles elementwise in the dtype of computation, and only then the pixels of the resulting tile, in
# float64. So no float32 sum has more terms than there are steps.
@triton.jit(do_not_specialize=_VARYING)
def sums_kernel(
    out_ptr,
    z_ptr,
    t_ptr,
    w_ptr,
    images,
    classes,
    pixels,
    z_image,
    z_class,
    z_pixel,
    t_image,
    t_class,
    t_pixel,
    w_image,
    w_class,
    w_pixel,
    ignore,
    chunks,
    steps,
    ACTIVATION: tl.constexpr,
    IDS: tl.constexpr,
    IGNORE: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    SQUARES_ROW: tl.constexpr,
    ACTUAL_SQUARES_ROW: tl.constexpr,
    MINIMUM_ROW: tl.constexpr,
    NLL_ROW: tl.constexpr,
    ALL_NLL_ROW: tl.constexpr,
    ABSENT_NLL_ROW: tl.constexpr,
    FOCAL_ROW: tl.constexpr,
    GAMMA: tl.constexpr,
    FRONT: tl.constexpr,
    BACK: tl.constexpr,
    COMPUTE: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
    INDEX: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Write partial sums, `(chunks, rows, images, classes)`: each program those of its chunk of an image's pixels."""
    EXCLUSIVE: tl.constexpr = IDS or ACTIVATION == "softmax"
    # One count for all classes if they share the weights.
    COUNT_C: tl.constexpr = BLOCK_C if WEIGHT == "class" or (IGNORE and not EXCLUSIVE) else 1
    class_blocks = tl.cdiv(classes, BLOCK_C)
    program = tl.program_id(0)
    chunk = program % chunks
    image = (program // chunks // class_blocks).to(tl.int64)
    c = (program // chunks % class_blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(INDEX)

    overlap = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    predicted = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    actual = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    count = tl.zeros([COUNT_C, BLOCK_P], COMPUTE)
    squares = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    actual_squares = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    minimum = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    nll = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    all_nll = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    absent_nll = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    focal = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
    for step in tl.range(0, steps, num_stages=STAGES):
        i = (chunk * steps + step).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
        z, t, w, _valid, inside = _load_tile(
            z_ptr,
            t_ptr,
            w_ptr,
            image,
            c,
            i,
            classes,
            pixels,
            z_image,
            z_class,
            z_pixel,
            t_image,
            t_class,
            t_pixel,
            w_image,
            w_class,
            w_pixel,
            ignore,
            ACTIVATION,
            IDS,
            IGNORE,
            WEIGHT,
            COMPUTE,
        )
        p, q, log, log_not, _ = _activate(z, inside, ACTIVATION, ABSENT_NLL_ROW >= 0, TINY)
        overlap += _times_label(t, w * p, IDS)
        predicted += w * p
        actual += _times_label(t, w, IDS)
        count += w
        if SQUARES_ROW >= 0:
            squares += w * p * p
        if ACTUAL_SQUARES_ROW >= 0:
            actual_squares += w * t * t
        if MINIMUM_ROW >= 0:
            minimum += w * tl.minimum(p, t)
        if NLL_ROW >= 0:
            nll += w * _times_label(t, log, IDS)
            if not EXCLUSIVE:
                nll += w * (1.0 - t) * log_not
        if ALL_NLL_ROW >= 0:
            all_nll += w * log
        if ABSENT_NLL_ROW >= 0:
            absent_nll += w * log_not
        if FOCAL_ROW >= 0:
            power, _ = _power(q, GAMMA, TINY)
            if EXCLUSIVE:
                focal += w * _times_label(t, power * log, IDS)
            else:
                power_not, _ = _power(p, GAMMA, TINY)
                focal += w * (t * (power * log) * FRONT + (1.0 - t) * (power_not * log_not) * BACK)

    row = images.to(tl.int64) * classes
    out = out_ptr + chunk.to(tl.int64) * ROWS * row + image * classes + c
    mask = c < classes
    actual_sum = _sum_pixels(actual)
    count_sum = tl.broadcast_to(_sum_pixels(count), [BLOCK_C])
    tl.store(out, _at_least(_sum_pixels(overlap), actual_sum, LEAST), mask=mask)
    tl.store(out + row, _at_least(_sum_pixels(predicted), count_sum, LEAST), mask=mask)
    tl.store(out + 2 * row, actual_sum, mask=mask)
    tl.store(out + 3 * row, count_sum, mask=mask)
    if SQUARES_ROW >= 0:
        tl.store(out + SQUARES_ROW * row, _at_least(_sum_pixels(squares), count_sum, LEAST), mask=mask)
    if ACTUAL_SQUARES_ROW >= 0:
        tl.store(out + ACTUAL_SQUARES_ROW * row, _sum_pixels(actual_squares), mask=mask)
    if MINIMUM_ROW >= 0:
        tl.store(out + MINIMUM_ROW * row, _at_least(_sum_pixels(minimum), actual_sum, LEAST), mask=mask)
    if NLL_ROW >= 0:
        tl.store(out + NLL_ROW * row, _sum_pixels(nll), mask=mask)
    if ALL_NLL_ROW >= 0:
        tl.store(out + ALL_NLL_ROW * row, _sum_pixels(all_nll), mask=mask)
    if ABSENT_NLL_ROW >= 0:
        tl.store(out + ABSENT_NLL_ROW * row, _sum_pixels(absent_nll), mask=mask)
    if FOCAL_ROW >= 0:
        tl.store(out + FOCAL_ROW * row, _sum_pixels(focal), mask=mask)


@triton.jit
def _load_grad(grad_ptr, row: tl.constexpr, size, offset, mask, COMPUTE: tl.constexpr):
    """Load the gradient of one sum for each class of a tile, (C, 1)."""
    return tl.load(grad_ptr + row * size + offset, mask=mask, other=0.0).to(COMPUTE)[:, None]


# The gradient is derived in `backend`: b, h and k are its B, H and K, d is D, `k_odds` holds the terms of R, and
# `likely` marks m if p_m > 1/2. Otherwise no class needs the forms for m.
@triton.jit(do_not_specialize=_VARYING)
def gradient_kernel(
    out_ptr,
    grad_ptr,
    z_ptr,
    t_ptr,
    w_ptr,
    images,
    classes,
    pixels,
    out_image,
    out_class,
    out_pixel,
    z_image,
    z_class,
    z_pixel,
    t_image,
    t_class,
    t_pixel,
    w_image,
    w_class,
    w_pixel,
    ignore,
    chunks,
    steps,
    ACTIVATION: tl.constexpr,
    IDS: tl.constexpr,
    IGNORE: tl.constexpr,
    WEIGHT: tl.constexpr,
    SQUARES_ROW: tl.constexpr,
    MINIMUM_ROW: tl.constexpr,
    NLL_ROW: tl.constexpr,
    ALL_NLL_ROW: tl.constexpr,
    ABSENT_NLL_ROW: tl.constexpr,
    FOCAL_ROW: tl.constexpr,
    GAMMA: tl.constexpr,
    FRONT: tl.constexpr,
    BACK: tl.constexpr,
    COMPUTE: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Write the gradient of the logits, given that of the sums, float64 `(rows, images, classes)`."""
    EXCLUSIVE: tl.constexpr = IDS or ACTIVATION == "softmax"
    # Triton 3.2 cannot parse a chain of three.
    ANY_H: tl.constexpr = (NLL_ROW >= 0 or ALL_NLL_ROW >= 0) or FOCAL_ROW >= 0
    ANY_K: tl.constexpr = ABSENT_NLL_ROW >= 0 or (not EXCLUSIVE and (NLL_ROW >= 0 or FOCAL_ROW >= 0))
    class_blocks = tl.cdiv(classes, BLOCK_C)
    program = tl.program_id(0)
    chunk = program % chunks
    image = (program // chunks // class_blocks).to(tl.int64)
    c = (program // chunks % class_blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(INDEX)

    row = images.to(tl.int64) * classes
    offset = image * classes + c
    mask = c < classes
    by_overlap = _load_grad(grad_ptr, 0, row, offset, mask, COMPUTE)
    by_predicted = _load_grad(grad_ptr, 1, row, offset, mask, COMPUTE)
    if SQUARES_ROW >= 0:
        by_squares = _load_grad(grad_ptr, SQUARES_ROW, row, offset, mask, COMPUTE)
    if MINIMUM_ROW >= 0:
        by_minimum = _load_grad(grad_ptr, MINIMUM_ROW, row, offset, mask, COMPUTE)
    if NLL_ROW >= 0:
        by_nll = _load_grad(grad_ptr, NLL_ROW, row, offset, mask, COMPUTE)
    if ALL_NLL_ROW >= 0:
        by_all_nll = _load_grad(grad_ptr, ALL_NLL_ROW, row, offset, mask, COMPUTE)
    if ABSENT_NLL_ROW >= 0:
        by_absent_nll = _load_grad(grad_ptr, ABSENT_NLL_ROW, row, offset, mask, COMPUTE)
    if FOCAL_ROW >= 0:
        by_focal = _load_grad(grad_ptr, FOCAL_ROW, row, offset, mask, COMPUTE)

    for step in tl.range(0, steps, num_stages=STAGES):
        i = (chunk * steps + step).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
        z, t, w, valid, inside = _load_tile(
            z_ptr,
            t_ptr,
            w_ptr,
            image,
            c,
            i,
            classes,
            pixels,
            z_image,
            z_class,
            z_pixel,
            t_image,
            t_class,
            t_pixel,
            w_image,
            w_class,
            w_pixel,
            ignore,
            ACTIVATION,
            IDS,
            IGNORE,
            WEIGHT,
            COMPUTE,
        )
        p, q, log, log_not, likely = _activate(z, inside, ACTIVATION, False, TINY)

        b = by_predicted + _times_label(t, by_overlap, IDS)
        if SQUARES_ROW >= 0:
            b += 2.0 * by_squares * p
        if MINIMUM_ROW >= 0:
            # As in torch.minimum, equal arguments share the gradient.
            b += by_minimum * tl.where(p < t, 1.0, tl.where(p == t, 0.5, 0.0))
        b *= w
        h = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
        k = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
        if NLL_ROW >= 0:
            h += _times_label(t, by_nll, IDS)
            if not EXCLUSIVE:
                k += (1.0 - t) * by_nll
        if ALL_NLL_ROW >= 0:
            h += by_all_nll
        if ABSENT_NLL_ROW >= 0:
            k += by_absent_nll
        if FOCAL_ROW >= 0:
            power, base = _power(q, GAMMA, TINY)
            derivative = power * (1.0 + p * log / base * GAMMA)
            if EXCLUSIVE:
                h += _times_label(t, by_focal * derivative, IDS)
            else:
                h += t * by_focal * derivative * FRONT
                power, base = _power(p, GAMMA, TINY)
                k += (1.0 - t) * by_focal * power * (1.0 + q * log_not / base * GAMMA) * BACK
        h *= w
        k *= w

        if ACTIVATION == "softmax":
            d = b - tl.sum(tl.where(likely, b, 0.0), 0)[None, :]
            dz = p * (d - tl.sum(p * d, 0)[None, :])
            if ANY_H:
                h_likely = tl.sum(tl.where(likely, h, 0.0), 0)[None, :]
                h_rest = tl.sum(tl.where(likely, 0.0, h), 0)[None, :]
                dz += p * tl.where(likely, h_rest, h_likely + (h_rest - h)) - h * q
            if ANY_K:
                shares, _ = _softmax_without(z, likely)
                k_likely = tl.sum(tl.where(likely, k * p, 0.0), 0)[None, :]
                k_odds = tl.where(likely, 0.0, k * p / q)
                dz += p * (k + k_odds - tl.sum(k_odds, 0)[None, :]) - k_likely * shares
        elif ACTIVATION == "sigmoid":
            dz = b * p * q
            if ANY_H:
                dz -= h * q
            if ANY_K:
                dz += k * p
        else:
            dz = b
            if ANY_H:
                dz -= tl.where(p >= TINY, h / tl.maximum(p, TINY), 0.0)
            if ANY_K:
                dz += tl.where(q >= TINY, k / tl.maximum(q, TINY), 0.0)
        # An infinite gradient of the sums times a weight of 0 would be NaN at an ignored pixel.
        dz = tl.where(valid, dz, 0.0)
        out = out_ptr + image * out_image + c[:, None] * out_class + i[None, :] * out_pixel
        tl.store(out, dz.to(out_ptr.dtype.element_ty), mask=inside)
