"""The sums in C++, called with plain pointers: needs a compiler at the first call, but no headers of PyTorch.

Each pass is one parallel region of PyTorch's own threads, `torch.get_num_threads()` of them. Results do not depend on
their number.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from typing import Literal

import torch
from torch import Tensor

from lightning_dice.kernels.backend import OutOfRange, SumsSpec
from lightning_dice.kernels.huge_pages import advise_huge_pages
from lightning_dice.kernels.native.build import load_library
from lightning_dice.library_internals.torch import constant_in_graphs

_TYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
    torch.int8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
    torch.uint16: 9,
    torch.uint32: 10,
    torch.bool: 11,
}
# The order of `Row` in sums.cpp.
_ROWS = (
    *("overlap", "predicted", "actual", "count", "predicted_squares", "actual_squares", "minimum"),
    *("nll", "all_nll", "absent_nll", "focal"),
)
CHECKS_VALUES = True
# `NO_MEMORY` of common.h.
_NO_MEMORY = 1 << 30
# Ids are compared as float32, which represents every integer up to here.
_EXACT = 1 << 24


class View(ctypes.Structure):
    """`View` of common.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("image", ctypes.c_int64),
        ("cls", ctypes.c_int64),
        ("pixel", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


class CountCall(ctypes.Structure):
    """`CountCall` of counts.cpp."""

    _fields_ = (
        ("images", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("pixels", ctypes.c_int64),
        ("predicted", View),
        ("target", View),
        ("mode", ctypes.c_int32),
        ("has_ignored", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("invalid", ctypes.c_int32),
        ("ignored", ctypes.c_double),
        ("threshold", ctypes.c_double),
        ("counts", ctypes.c_void_p),
        ("region", ctypes.c_void_p),
    )


class SumsCall(ctypes.Structure):
    """`SumsCall` of sums.cpp."""

    _fields_ = (
        ("images", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("pixels", ctypes.c_int64),
        ("logits", View),
        ("target", View),
        ("weight", View),
        ("gradient", View),
        ("softmax", ctypes.c_int32),
        ("planes", ctypes.c_int32),
        ("weighted", ctypes.c_int32),
        ("weight_by_class", ctypes.c_int32),
        ("has_ignored", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("ignored", ctypes.c_double),
        ("gamma", ctypes.c_double),
        ("front", ctypes.c_double),
        ("back", ctypes.c_double),
        ("row", ctypes.c_int32 * len(_ROWS)),
        ("rows", ctypes.c_int32),
        ("invalid", ctypes.c_int32),
        ("sums", ctypes.c_void_p),
        ("region", ctypes.c_void_p),
    )


_lock = threading.Lock()


def _library() -> tuple[ctypes.CDLL | None, str]:
    """Return the kernels, or `None` and the reason. The first call may build them."""
    with _lock:
        return _load()


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    try:
        kernels = load_library()
    except Exception as error:
        return None, f"{error}" or type(error).__name__
    for size, structure in (
        (kernels.lightning_dice_sums_call_size, SumsCall),
        (kernels.lightning_dice_count_call_size, CountCall),
    ):
        size.restype = ctypes.c_int64
        if size() != ctypes.sizeof(structure):
            return None, f"{structure.__name__} has {ctypes.sizeof(structure)} bytes here and {size()} in the kernels"
    return kernels, ""


@functools.cache
def parallel_region() -> int | None:
    """Return the address of `GOMP_parallel`, which runs a parallel region, in the OpenMP that PyTorch has loaded."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


def unavailable_reason() -> str | None:
    """Return why the C++ kernels cannot run here; `None` if they can. The first call may build them."""
    kernels, reason = _library()
    return reason if kernels is None else None


def supports(spec: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernels can compute these sums of these tensors."""
    return (
        spec.activation is not None
        and can_read(*((logits, target) if weight is None else (logits, target, weight)))
        and abs(spec.ignore_index or 0) < _EXACT
        and logits.shape[1] < _EXACT
    )


def can_read(*tensors: Tensor) -> bool:
    """Whether the kernels can read tensors of this device and dtype.

    >>> can_read(torch.zeros(1)), can_read(torch.zeros(1, dtype=torch.complex64))
    (True, False)
    """
    return all(tensor.device.type == "cpu" and tensor.dtype in _TYPES for tensor in tensors) and (
        _has_half() or all(tensor.dtype != torch.float16 for tensor in tensors)
    )


def can_count(classes: int, ignore_index: int | None, *tensors: Tensor) -> bool:
    """Whether the kernels can count these predictions and labels."""
    return can_read(*tensors) and classes < _EXACT - 1 and abs(ignore_index or 0) < _EXACT


@constant_in_graphs
def _has_half() -> bool:
    kernels, _ = _library()
    return kernels is not None and bool(kernels.lightning_dice_has_half())


def forward(spec: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Return the sums, float64 `(rows, images, classes)`.

    Raises:
        OutOfRange: a label or a weight is outside its range.
    """
    sums = torch.zeros(len(spec.rows), *logits.shape[:2], dtype=torch.float64)
    if not logits.numel():
        return sums
    call = _make_call(spec, logits, target, weight)
    call.sums = sums.data_ptr()
    _run("lightning_dice_forward", call)
    if call.invalid:
        raise OutOfRange
    return sums


def backward(spec: SumsSpec, grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Return the gradient of the logits, in their shape, dtype and memory format, from the gradient of the sums."""
    gradient = torch.empty_like(logits)
    if not logits.numel():
        return gradient
    call = _make_call(spec, logits, target, weight)
    grad = grad.contiguous()
    call.sums = grad.data_ptr()
    advise_huge_pages(gradient)
    written = with_flat_space(gradient, keep_classes=True)
    call.gradient = make_view(written)
    _run("lightning_dice_backward", call)
    return gradient if written is gradient else gradient.copy_(written)


_MODES = {"logits": 0, "ids": 1, "planes": 2}


def count(
    mode: Literal["logits", "ids", "planes"],
    predicted: Tensor,
    target: Tensor,
    classes: int,
    *,
    ignore_index: int | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """Return overlap, predicted, actual and count of hard predictions, int64 `(4, images, classes)`.

    Args:
        mode: what predicts: the class of the greatest logit, class ids, or planes of values above the threshold.
        predicted: ids `(images, *space)`; logits or planes `(images, classes, *space)`.
        target: ids `(images, *space)`; planes `(images, classes, *space)`.
        classes: number of classes.
        ignore_index: label of the pixels to ignore.
        threshold: for planes.

    Raises:
        OutOfRange: an id or a label is outside its range.
    """
    predicted = with_flat_space(predicted.detach(), keep_classes=mode != "ids")
    target = with_flat_space(target, keep_classes=mode == "planes")
    images = len(predicted)
    counts = torch.zeros(4, images, classes, dtype=torch.int64)
    if not target.numel():
        return counts
    call = CountCall()
    call.images, call.classes, call.pixels = images, classes, math.prod(predicted.shape[1 if mode == "ids" else 2 :])
    call.predicted = make_view(predicted, has_classes=mode != "ids")
    call.target = make_view(target, has_classes=mode == "planes")
    call.mode, call.threshold = _MODES[mode], threshold
    call.has_ignored, call.ignored = int(ignore_index is not None), float(ignore_index or 0)
    call.threads, call.region, call.counts = torch.get_num_threads(), parallel_region(), counts.data_ptr()
    _run("lightning_dice_count", call)
    if call.invalid:
        raise OutOfRange
    return counts


def _run(function: str, call: ctypes.Structure) -> None:
    kernels, reason = _library()
    if kernels is None:
        raise OSError(reason)
    getattr(kernels, function)(ctypes.byref(call))
    if call.invalid == _NO_MEMORY:
        raise MemoryError("there is not enough memory for the partial results of the sums")


def _make_call(spec: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> SumsCall:
    logits, target = with_flat_space(logits, keep_classes=True), with_flat_space(target, keep_classes=spec.planes)
    call = SumsCall()
    call.images, call.classes = logits.shape[:2]
    call.pixels = math.prod(logits.shape[2:])
    call.logits, call.target = make_view(logits), make_view(target, has_classes=spec.planes)
    if weight is not None:
        by_class = weight.shape == logits.shape
        weight = with_flat_space(weight, keep_classes=by_class)
        call.weight, call.weighted, call.weight_by_class = make_view(weight, has_classes=by_class), 1, int(by_class)
    call.softmax, call.planes = int(spec.activation == "softmax"), int(spec.planes)
    call.has_ignored, call.ignored = int(spec.ignore_index is not None), float(spec.ignore_index or 0)
    call.threads, call.region = torch.get_num_threads(), parallel_region()
    focal = spec.required.focal
    call.gamma = focal.gamma if focal else 0.0
    call.front, call.back = (1.0, 1.0) if focal is None or focal.alpha is None else (focal.alpha, 1 - focal.alpha)
    for index, name in enumerate(_ROWS):
        call.row[index] = spec.rows.index(name) if name in spec.rows else -1
    call.rows = len(spec.rows)
    call.tensors = logits, target, weight  # They must stay alive as long as the call.
    return call


def with_flat_space(tensor: Tensor, *, keep_classes: bool) -> Tensor:
    """Return the tensor itself if one stride walks all its space axes, or else a contiguous copy."""
    return tensor if _pixel_stride(tensor, 2 if keep_classes else 1) is not None else tensor.contiguous()


def make_view(tensor: Tensor, *, has_classes: bool = True) -> View:
    """Return the `View` of a tensor from `with_flat_space`."""
    stride = _pixel_stride(tensor, 2 if has_classes else 1)
    strides = tensor.stride()
    if stride is None:
        raise ValueError(f"tensor must come from with_flat_space, got space axes that no one stride walks: {strides}")
    return View(tensor.data_ptr(), strides[0], strides[1] if has_classes else 0, stride, _TYPES[tensor.dtype])


def _pixel_stride(tensor: Tensor, start: int) -> int | None:
    """Return the stride that walks all axes from `start`; `None` if there is none."""
    stride, expected = 1, None
    for size, step in zip(reversed(tensor.shape[start:]), reversed(tensor.stride()[start:]), strict=True):
        if size == 1:
            continue
        if expected is None:
            stride = step
        elif step != expected:
            return None
        expected = step * size
    return stride
