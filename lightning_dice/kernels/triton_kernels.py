# mypy: ignore-errors
"""Triton kernels of the sums and of their gradient; `lightning_dice.kernels.triton_backend` launches them.

Every program works on tiles of `BLOCK_C` classes by `BLOCK_P` pixels of one image. A tile is read once, in whatever
order memory has it, and stays in registers: the probabilities are made there, and made again for the gradient. While
one tile is worked on, the next `STAGES - 1` are on their way.

Shapes in the comments: C is `BLOCK_C`, P is `BLOCK_P`. Arguments in capitals are constants of a compiled kernel. Those
that end in `_ROW` are the places of optional sums in the result, -1 where they are not wanted.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What changes from call to call must not compile a kernel anew where it happens to be 1 or a multiple of 16.
_VARYING = ["images", "ignore", "chunks", "steps"]


@triton.jit
def _log1p(x):
    """log(1 + x) from logarithms alone: what 1 + x rounds away is added to first order. For x > -1, not infinite."""
    u = 1.0 + x
    return tl.log(u) - ((u - 1.0) - x) / u


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _softmax(z, inside):
    """p, 1 - p and -log p of every class, (C, P), and where a class is likelier than all others together.

    There can be one such class; its exponential is the 1 in the total, and 1 - p and -log p come from the rest. Nothing
    then cancels, however near p is to 1.
    """
    top = tl.max(z, 0)[None, :]
    e = tl.exp(z - top)
    total = tl.sum(e, 0)[None, :]
    likely = (e == 1.0) & (total < 2.0)
    rest = tl.sum(tl.where(likely, 0.0, e), 0)[None, :]
    inverse = 1.0 / total
    p = e * inverse
    q = tl.where(likely, rest * inverse, 1.0 - p)
    # Classes that only fill the tile hold -inf; infinity times a gradient of 0 would be NaN.
    nll = tl.where(inside, (top - z) + _log1p(tl.where(total < 2.0, rest, total - 1.0)), 0.0)
    return p, q, nll, likely


@triton.jit
def _softmax_without(z, likely):
    """Softmax over all but the likely class, where there is one, and the logarithm of its denominator, (1, P)."""
    z = tl.where(likely, float("-inf"), z)
    top = tl.max(z, 0)[None, :]
    e = tl.exp(z - top)
    total = tl.sum(e, 0)[None, :]
    return e / total, top + tl.log(total)


@triton.jit
def _sigmoid(z):
    """p, 1 - p, -log p and -log(1 - p), none of them by subtraction from 1."""
    e = tl.exp(-tl.abs(z))
    inverse = 1.0 / (1.0 + e)
    small = e * inverse
    rest = _log1p(e)
    p, q = tl.where(z >= 0.0, inverse, small), tl.where(z >= 0.0, small, inverse)
    return p, q, tl.maximum(-z, 0.0) + rest, tl.maximum(z, 0.0) + rest


@triton.jit
def _activate(z, inside, ACTIVATION: tl.constexpr, ABSENT: tl.constexpr, TINY: tl.constexpr):
    """p, 1 - p, -log p, -log(1 - p) (of a softmax if ABSENT) and where a softmax has a likely class, all (C, P)."""
    if ACTIVATION == "softmax":
        p, q, nll, likely = _softmax(z, inside)
        absent = nll
        if ABSENT:
            # From logits where p is near 1: 1 - p itself underflows for logits of a hundred.
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
def _of_label(t, x, IDS: tl.constexpr):
    """The label times x. Not multiplied where labels are true and false: x may be infinite at a false one."""
    return tl.where(t, x, 0.0) if IDS else t * x


@triton.jit
def _power(x, GAMMA: tl.constexpr, TINY: tl.constexpr):
    """x^gamma, and x as it was taken for it: not 0, of which no logarithm is finite."""
    x = tl.maximum(x, TINY)
    return tl.exp(tl.log(x) * GAMMA), x


@triton.jit
def _over_pixels(x):
    return tl.sum(x.to(tl.float64), 1)


@triton.jit
def _read(
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
    """A tile of classes c and pixels i: logits, labels, weights, and where the tile lies inside the image.

    Logits are 0 at ignored pixels, whatever memory holds there, and -inf at classes beyond the last under a softmax.
    Labels are (C, P), bool for ids. Weights are 0 where a pixel counts as nothing, and (1, P) where classes share them.
    """
    known = (i < pixels)[None, :]
    inside = (c < classes)[:, None] & known
    z = tl.load(z_ptr + image * z_image + c[:, None] * z_class + i[None, :] * z_pixel, mask=inside, other=0.0)
    valid = known
    if IDS:
        ids = tl.load(t_ptr + image * t_image + i * t_pixel, mask=i < pixels, other=0)
        if IGNORE:
            valid = valid & (ids != ignore)[None, :]
        # Narrowed only to be compared with every class of the tile; 2^32 + 1 is not class 1.
        held = (ids >= 0) & (ids < classes)
        t = held[None, :] & (ids.to(tl.int32)[None, :] == c.to(tl.int32)[:, None])
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


# A program adds up a few tiles in the dtype of computation, each place of the tile for itself, and only then the pixels
# of the tile, in float64. So no float32 sum has more terms than there are steps.
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
):
    """Partial sums, `(chunks, rows, images, classes)`: each program those of its chunk of an image's pixels."""
    EXCLUSIVE: tl.constexpr = IDS or ACTIVATION == "softmax"
    # One count for all classes, where they share the weights.
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
        z, t, w, _valid, inside = _read(
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
        overlap += _of_label(t, w * p, IDS)
        predicted += w * p
        actual += _of_label(t, w, IDS)
        count += w
        if SQUARES_ROW >= 0:
            squares += w * p * p
        if ACTUAL_SQUARES_ROW >= 0:
            actual_squares += w * t * t
        if MINIMUM_ROW >= 0:
            minimum += w * tl.minimum(p, t)
        if NLL_ROW >= 0:
            nll += w * _of_label(t, log, IDS)
            if not EXCLUSIVE:
                nll += w * (1.0 - t) * log_not
        if ALL_NLL_ROW >= 0:
            all_nll += w * log
        if ABSENT_NLL_ROW >= 0:
            absent_nll += w * log_not
        if FOCAL_ROW >= 0:
            power, _ = _power(q, GAMMA, TINY)
            if EXCLUSIVE:
                focal += w * _of_label(t, power * log, IDS)
            else:
                power_not, _ = _power(p, GAMMA, TINY)
                focal += w * (t * (power * log) * FRONT + (1.0 - t) * (power_not * log_not) * BACK)

    row = images.to(tl.int64) * classes
    out = out_ptr + chunk.to(tl.int64) * ROWS * row + image * classes + c
    mask = c < classes
    tl.store(out, _over_pixels(overlap), mask=mask)
    tl.store(out + row, _over_pixels(predicted), mask=mask)
    tl.store(out + 2 * row, _over_pixels(actual), mask=mask)
    tl.store(out + 3 * row, tl.broadcast_to(_over_pixels(count), [BLOCK_C]), mask=mask)
    if SQUARES_ROW >= 0:
        tl.store(out + SQUARES_ROW * row, _over_pixels(squares), mask=mask)
    if ACTUAL_SQUARES_ROW >= 0:
        tl.store(out + ACTUAL_SQUARES_ROW * row, _over_pixels(actual_squares), mask=mask)
    if MINIMUM_ROW >= 0:
        tl.store(out + MINIMUM_ROW * row, _over_pixels(minimum), mask=mask)
    if NLL_ROW >= 0:
        tl.store(out + NLL_ROW * row, _over_pixels(nll), mask=mask)
    if ALL_NLL_ROW >= 0:
        tl.store(out + ALL_NLL_ROW * row, _over_pixels(all_nll), mask=mask)
    if ABSENT_NLL_ROW >= 0:
        tl.store(out + ABSENT_NLL_ROW * row, _over_pixels(absent_nll), mask=mask)
    if FOCAL_ROW >= 0:
        tl.store(out + FOCAL_ROW * row, _over_pixels(focal), mask=mask)


@triton.jit
def _gradient_of(grad_ptr, row: tl.constexpr, size, offset, mask, COMPUTE: tl.constexpr):
    """The gradient of one sum, for each class of a tile, (C, 1)."""
    return tl.load(grad_ptr + row * size + offset, mask=mask, other=0.0).to(COMPUTE)[:, None]


# The sums reach a logit through p, through -log p and through -log(1 - p). At one pixel let B, H and K be their
# gradients by these three, weights included, and q = 1 - p. A focal term q^g L, with L = -log p and dq/dL = p, has
# d/dL = q^g (1 + g p L / q), and goes into H; the one of the background, p^g (-log q), likewise into K.
#
# Sigmoid: dp/dz = p q, dL/dz = -q, d(-log q)/dz = p, so dz = B p q - H q + K p.
#
# Probabilities: dp = B - H/p + K/q, without what the logarithm's floor takes away.
#
# Softmax: three parts, of which m is the likely class (if there is none, terms with it are 0).
#   By p: dp_c/dz_k = p_c (d_ck - p_k), so p_k (B_k - sum_c p_c B_c). As the p add up to 1, B_m can be subtracted from
#   every B: with D = B - B_m it is p_k (D_k - sum_c p_c D_c), where nothing of the size of p_m B_m is left to cancel.
#   By -log p: dL_c/dz_k = p_k - d_ck, so p_k sum_{c != k} H_c - H_k q_k.
#   By -log(1 - p): dA_c/dz_c = p_c and, for k != c, dA_c/dz_k = -p_k r_c with r = p/q. For c = m that is -p_m u_k, with
#   u_k the share of k among the classes other than m: r_m may be infinite. With R = sum_{c != m} K_c r_c:
#   p_k (K_k + K_k r_k - R) - K_m p_m u_k for k != m, as R counts k too; p_m (K_m - R) for m.
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
    """The gradient of logits from that of the sums, float64 `(rows, images, classes)`."""
    EXCLUSIVE: tl.constexpr = IDS or ACTIVATION == "softmax"
    # Triton 3.2 reads no chain of three.
    ANY_H: tl.constexpr = (NLL_ROW >= 0 or ALL_NLL_ROW >= 0) or FOCAL_ROW >= 0
    ANY_K: tl.constexpr = ABSENT_NLL_ROW >= 0 or (not EXCLUSIVE and (NLL_ROW >= 0 or FOCAL_ROW >= 0))
    class_blocks = tl.cdiv(classes, BLOCK_C)
    program = tl.program_id(0)
    chunk = program % chunks
    image = (program // chunks // class_blocks).to(tl.int64)
    c = (program // chunks % class_blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(INDEX)

    row = images.to(tl.int64) * classes
    place = image * classes + c
    mask = c < classes
    by_overlap = _gradient_of(grad_ptr, 0, row, place, mask, COMPUTE)
    by_predicted = _gradient_of(grad_ptr, 1, row, place, mask, COMPUTE)
    if SQUARES_ROW >= 0:
        by_squares = _gradient_of(grad_ptr, SQUARES_ROW, row, place, mask, COMPUTE)
    if MINIMUM_ROW >= 0:
        by_minimum = _gradient_of(grad_ptr, MINIMUM_ROW, row, place, mask, COMPUTE)
    if NLL_ROW >= 0:
        by_nll = _gradient_of(grad_ptr, NLL_ROW, row, place, mask, COMPUTE)
    if ALL_NLL_ROW >= 0:
        by_all_nll = _gradient_of(grad_ptr, ALL_NLL_ROW, row, place, mask, COMPUTE)
    if ABSENT_NLL_ROW >= 0:
        by_absent_nll = _gradient_of(grad_ptr, ABSENT_NLL_ROW, row, place, mask, COMPUTE)
    if FOCAL_ROW >= 0:
        by_focal = _gradient_of(grad_ptr, FOCAL_ROW, row, place, mask, COMPUTE)

    for step in tl.range(0, steps, num_stages=STAGES):
        i = (chunk * steps + step).to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)
        z, t, w, valid, inside = _read(
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

        b = by_predicted + _of_label(t, by_overlap, IDS)
        if SQUARES_ROW >= 0:
            b += 2.0 * by_squares * p
        if MINIMUM_ROW >= 0:
            # As torch.minimum: where both are equal, each has half.
            b += by_minimum * tl.where(p < t, 1.0, tl.where(p == t, 0.5, 0.0))
        b *= w
        h = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
        k = tl.zeros([BLOCK_C, BLOCK_P], COMPUTE)
        if NLL_ROW >= 0:
            h += _of_label(t, by_nll, IDS)
            if not EXCLUSIVE:
                k += (1.0 - t) * by_nll
        if ALL_NLL_ROW >= 0:
            h += by_all_nll
        if ABSENT_NLL_ROW >= 0:
            k += by_absent_nll
        if FOCAL_ROW >= 0:
            power, base = _power(q, GAMMA, TINY)
            slope = power * (1.0 + p * log / base * GAMMA)
            if EXCLUSIVE:
                h += _of_label(t, by_focal * slope, IDS)
            else:
                h += t * by_focal * slope * FRONT
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
        # A gradient of the sums that is infinite must not reach an ignored pixel as 0 times infinity.
        dz = tl.where(valid, dz, 0.0)
        at = out_ptr + image * out_image + c[:, None] * out_class + i[None, :] * out_pixel
        tl.store(at, dz.to(out_ptr.dtype.element_ty), mask=inside)
