"""The sums in C++, called with plain pointers: needs a compiler at the first call, and no header of PyTorch.

The threads are those of PyTorch itself, `torch.get_num_threads()` of them, in one parallel region for each pass.
Results do not depend on their number.
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
from lightning_dice.kernels.native.build import library
from lightning_dice.kernels.pages import ask_for_large_pages

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
_NO_MEMORY = 1 << 30
# float32 tells all integers apart up to here, and an id is compared as a float.
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


class Count(ctypes.Structure):
    """`Count` of counts.cpp."""

    _fields_ = (
        ("images", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("pixels", ctypes.c_int64),
        ("predicted", View),
        ("target", View),
        ("mode", ctypes.c_int32),
        ("has_ignored", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("wrong", ctypes.c_int32),
        ("ignored", ctypes.c_double),
        ("threshold", ctypes.c_double),
        ("counts", ctypes.c_void_p),
        ("region", ctypes.c_void_p),
    )


class Job(ctypes.Structure):
    """`Job` of sums.cpp."""

    _fields_ = (
        ("images", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("pixels", ctypes.c_int64),
        ("logits", View),
        ("target", View),
        ("weight", View),
        ("slope", View),
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
        ("wrong", ctypes.c_int32),
        ("sums", ctypes.c_void_p),
        ("region", ctypes.c_void_p),
    )


_lock = threading.Lock()


def _loaded() -> tuple[ctypes.CDLL | None, str]:
    with _lock:
        return _load()


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    try:
        found = library()
    except Exception as error:
        return None, f"{error}" or type(error).__name__
    for size, structure in ((found.lightning_dice_job_size, Job), (found.lightning_dice_count_size, Count)):
        size.restype = ctypes.c_int64
        if size() != ctypes.sizeof(structure):
            return None, f"{structure.__name__} has {ctypes.sizeof(structure)} bytes here and {size()} in the kernels"
    return found, ""


@functools.cache
def region() -> int | None:
    """The address of the function by which the OpenMP that PyTorch has loaded runs a parallel region."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


def missing() -> str | None:
    """Why the C++ kernels cannot run here; `None`: they can. The first call may build them."""
    found, why = _loaded()
    return why if found is None else None


def takes(work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernels can do this work on these tensors."""
    return (
        work.activation is not None
        and reads(*((logits, target) if weight is None else (logits, target, weight)))
        and abs(work.ignore_index or 0) < _EXACT
        and logits.shape[1] < _EXACT
    )


def reads(*tensors: Tensor) -> bool:
    """Whether the kernels can read these tensors."""
    return all(tensor.device.type == "cpu" and tensor.dtype in _TYPES for tensor in tensors) and (
        _has_half() or all(tensor.dtype != torch.float16 for tensor in tensors)
    )


def can_count(classes: int, ignore_index: int | None, *tensors: Tensor) -> bool:
    """Whether the kernels can count these tensors."""
    return reads(*tensors) and classes < _EXACT - 1 and abs(ignore_index or 0) < _EXACT


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_half() -> bool:
    found, _ = _loaded()
    return found is not None and bool(found.lightning_dice_has_half())


def forward(work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """The sums, float64 `(rows, images, classes)`.

    Raises:
        OutOfRange: a label or a weight outside its range.
    """
    sums = torch.zeros(len(work.rows), *logits.shape[:2], dtype=torch.float64)
    if not logits.numel():
        return sums
    job, alive = _job(work, logits, target, weight)
    job.sums = sums.data_ptr()
    _call("lightning_dice_forward", job)
    del alive
    if job.wrong:
        raise OutOfRange
    return sums


def backward(work: SumsSpec, grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient of logits, of their shape, dtype and memory format, from that of the sums."""
    slope = torch.empty_like(logits)
    if not logits.numel():
        return slope
    job, alive = _job(work, logits, target, weight)
    grad = grad.contiguous()
    job.sums = grad.data_ptr()
    ask_for_large_pages(slope)
    # Itself, but where its space axes are not one axis of one stride.
    written = flat(slope, keep_classes=True)
    job.slope = view(written)
    _call("lightning_dice_backward", job)
    del alive
    return slope if written is slope else slope.copy_(written)


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
    """Overlap, predicted, actual and count of hard predictions, int64 `(4, images, classes)`.

    Args:
        mode: what is predicted: the class of the greatest logit, ids, or planes of values above the threshold.
        predicted: ids `(images, *space)`, or `(images, classes, *space)`.
        target: ids `(images, *space)`; planes `(images, classes, *space)`.
        classes: how many there are.
        ignore_index: the label of pixels that count as nothing.
        threshold: of planes.

    Raises:
        OutOfRange: an id or a label outside its range.
    """
    predicted = flat(predicted.detach(), keep_classes=mode != "ids")
    target = flat(target, keep_classes=mode == "planes")
    images = len(predicted)
    counts = torch.zeros(4, images, classes, dtype=torch.int64)
    if not target.numel():
        return counts
    job = Count()
    job.images, job.classes, job.pixels = images, classes, math.prod(predicted.shape[1 if mode == "ids" else 2 :])
    job.predicted = view(predicted, has_classes=mode != "ids")
    job.target = view(target, has_classes=mode == "planes")
    job.mode, job.threshold = _MODES[mode], threshold
    job.has_ignored, job.ignored = int(ignore_index is not None), float(ignore_index or 0)
    job.threads, job.region, job.counts = torch.get_num_threads(), region(), counts.data_ptr()
    _call("lightning_dice_count", job)
    if job.wrong:
        raise OutOfRange
    return counts


def _call(name: str, job: ctypes.Structure) -> None:
    found, why = _loaded()
    if found is None:
        raise OSError(why)
    getattr(found, name)(ctypes.byref(job))
    if job.wrong == _NO_MEMORY:
        raise MemoryError("the sums found no memory for their partial results")


def _job(work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Job, list[Tensor]]:
    """The job, and the tensors that must live as long as it does."""
    logits, target = flat(logits, keep_classes=True), flat(target, keep_classes=work.planes)
    job = Job()
    job.images, job.classes = logits.shape[:2]
    job.pixels = math.prod(logits.shape[2:])
    job.logits, job.target = view(logits), view(target, has_classes=work.planes)
    if weight is not None:
        by_class = weight.shape == logits.shape
        weight = flat(weight, keep_classes=by_class)
        job.weight, job.weighted, job.weight_by_class = view(weight, has_classes=by_class), 1, int(by_class)
    job.softmax, job.planes = int(work.activation == "softmax"), int(work.planes)
    job.has_ignored, job.ignored = int(work.ignore_index is not None), float(work.ignore_index or 0)
    job.threads, job.region = torch.get_num_threads(), region()
    focal = work.wanted.focal
    job.gamma = focal.gamma if focal else 0.0
    job.front, job.back = (1.0, 1.0) if focal is None or focal.alpha is None else (focal.alpha, 1 - focal.alpha)
    for place, name in enumerate(_ROWS):
        job.row[place] = work.rows.index(name) if name in work.rows else -1
    job.rows = len(work.rows)
    return job, [logits, target] if weight is None else [logits, target, weight]


def flat(tensor: Tensor, *, keep_classes: bool) -> Tensor:
    """The tensor itself where its space axes are one axis of one stride, in memory; else a contiguous copy."""
    return tensor if _pixel_stride(tensor, 2 if keep_classes else 1) is not None else tensor.contiguous()


def view(tensor: Tensor, *, has_classes: bool = True) -> View:
    """The `View` of a tensor that has gone through `flat`."""
    stride = _pixel_stride(tensor, 2 if has_classes else 1)
    strides = tensor.stride()
    if stride is None:
        raise ValueError(
            f"space axes of the strides {strides} are no single axis: the tensor must go through flat first"
        )
    return View(tensor.data_ptr(), strides[0], strides[1] if has_classes else 0, stride, _TYPES[tensor.dtype])


def _pixel_stride(tensor: Tensor, start: int) -> int | None:
    """The stride of all axes from `start` on taken as one; `None` if there is none."""
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
