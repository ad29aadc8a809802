"""The sums on a CUDA device, by two Triton kernels: one for the sums, one for the gradient, each reading logits once.

Between them nothing is stored but logits and target. No sum depends on the order in which thread blocks run, so results
are reproducible bit for bit, and no value is read back, so a CUDA graph can capture both. Tensors are read in place if
their space axes can be walked by one stride; others are copied once.

Triton is imported at the first use. With `TRITON_INTERPRET=1` set before that, CPU tensors are supported too, slowly,
which tests use on machines without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dice.kernels.backend import SumsSpec
from lightning_dice.kernels.sums import LEAST
from lightning_dice.library_internals.torch import constant_in_graphs

# Reading a flag back would stall the GPU.
CHECKS_VALUES = False

# A tile holds all classes of a softmax; with more than this, it has too few pixels to fill a memory access.
_MAX_CLASSES = 1024
# Otherwise classes are processed in blocks, which should be wide, as classes are adjacent in channels_last.
_CLASS_BLOCK = 32
_TILE = 2048  # elements
# Limited by registers: each required sum occupies as many numbers of a thread as it has elements of the tile.
_PER_THREAD = 8
_FEW_ROWS = 6
_MAX_WARPS = 16
_PROGRAMS = 1024  # a few for each multiprocessor of a large GPU
_MAX_STEPS = 16  # tiles that a program adds in the dtype of computation; more would cost digits
_STAGES = 3  # tiles in flight: one in use, two being loaded
_STAGE_BYTES = 16 << 10  # so that all stages fit into the shared memory of any GPU
_INT32_LIMIT = 1 << 31
_MIN_CAPABILITY = (7, 5)  # required by Triton
_MIN_BFLOAT16_CAPABILITY = (8, 0)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unavailable_reason() -> str | None:
    """Return why Triton cannot run here, `"no triton"` or `"no CUDA device"`; `None` if it can."""
    if not _has_triton():
        return "no triton"
    if not _is_interpreting() and not torch.cuda.is_available():
        return "no CUDA device"
    return None


def supports(spec: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether the tensors are on one supported GPU, with up to 1024 classes if these exclude each other."""
    if not _is_ready():
        return False
    if logits.device.type == "cuda":
        capability = _capability(logits.device.index)
        bfloat16 = torch.bfloat16 in (logits.dtype, target.dtype)
        # AMD numbers its capabilities differently.
        if torch.version.hip is None and capability < (_MIN_BFLOAT16_CAPABILITY if bfloat16 else _MIN_CAPABILITY):
            return False
    elif not (logits.device.type == "cpu" and _is_interpreting()):
        return False
    same_device = all(other is None or other.device == logits.device for other in (target, weight))
    dtypes = logits.dtype in _FLOATS and not target.dtype.is_complex
    dtypes = dtypes and (weight is None or weight.dtype in _FLOATS)
    dtypes = dtypes and (not target.is_floating_point() or target.dtype in _FLOATS)
    return same_device and dtypes and (not _is_exclusive(spec) or logits.shape[1] <= _MAX_CLASSES)


def forward(spec: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Return the sums, float64 `(rows, images, classes)`, in the order of `spec.rows`."""
    images, classes = logits.shape[:2]
    if logits.numel() == 0:
        return torch.zeros(len(spec.rows), images, classes, dtype=torch.float64, device=logits.device)
    launch = _Launch.of(spec, logits, target, weight)
    shape = (launch.plan.chunks, len(spec.rows), images, classes)
    partial = torch.empty(shape, dtype=torch.float64, device=logits.device)
    actual_squares = _row(spec, "actual_squares")
    # Probabilities that were passed may be 0.
    least = 0.0 if spec.activation is None else LEAST
    launch(_kernels().sums_kernel, (partial,), ROWS=len(spec.rows), ACTUAL_SQUARES_ROW=actual_squares, LEAST=least)
    # Reproducible too: torch adds along an axis without atomic operations.
    return partial[0] if launch.plan.chunks == 1 else partial.sum(0)


def backward(spec: SumsSpec, grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Return the gradient of the logits, with the shape, dtype and strides of `torch.empty_like(logits)`."""
    gradient = torch.empty_like(logits)
    if logits.numel() == 0:
        return gradient
    launch = _Launch.of(spec, logits, target, weight)
    ordered = gradient.permute(0, 1, *launch.tensors.order)
    # Flattening copies if it cannot view; the kernel then fills the copy.
    flat = ordered.flatten(2)
    launch(_kernels().gradient_kernel, (flat, grad.contiguous()), flat.stride())
    if flat.data_ptr() != gradient.data_ptr():
        ordered.copy_(flat.view(ordered.shape))
    return gradient


@dataclass(frozen=True)
class _Launch:
    """The launch of either kernel on the tensors of one call: all arguments but its outputs are built here."""

    spec: SumsSpec
    tensors: _FlatTensors
    plan: _Plan

    @classmethod
    def of(cls, spec: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> _Launch:
        tensors = _FlatTensors.of(logits, target, weight)
        return cls(spec, tensors, _Plan.of(spec, tensors.logits))

    def __call__(
        self, kernel: Any, outputs: tuple[Tensor, ...], strides: tuple[int, ...] = (), **constants: float
    ) -> None:
        """Launch a kernel.

        Args:
            kernel: one of `triton_kernels`.
            outputs: the tensors it writes, its first pointers.
            strides: the output's strides, if the kernel takes them.
            constants: those that only this kernel takes.
        """
        tensors, plan = self.tensors, self.plan
        arguments = (
            *outputs,
            *tensors.pointers,
            *tensors.logits.shape,
            *strides,
            *tensors.strides,
            _ignored_value(self.spec, tensors.target),
            plan.chunks,
            plan.steps,
        )
        device = tensors.logits.device
        # Triton launches on the current device, which may be another.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(plan.programs,)](*arguments, **constants, **self._constants(), num_warps=plan.warps)

    def _constants(self) -> dict[str, Any]:
        spec, tensors, plan = self.spec, self.tensors, self.plan
        tl = _kernels().tl
        wide = tensors.logits.dtype == torch.float64
        focal = spec.required.focal
        alpha = None if focal is None else focal.alpha
        weight = tensors.weight
        return {
            "ACTIVATION": spec.activation or "none",
            "IDS": not spec.planes,
            "IGNORE": spec.ignore_index is not None,
            "WEIGHT": "none" if weight is None else "class" if weight.ndim == 3 else "pixel",
            "SQUARES_ROW": _row(spec, "predicted_squares"),
            "MINIMUM_ROW": _row(spec, "minimum"),
            "NLL_ROW": _row(spec, "nll"),
            "ALL_NLL_ROW": _row(spec, "all_nll"),
            "ABSENT_NLL_ROW": _row(spec, "absent_nll"),
            "FOCAL_ROW": _row(spec, "focal"),
            "GAMMA": 0.0 if focal is None else float(focal.gamma),
            "FRONT": 1.0 if alpha is None else float(alpha),
            "BACK": 1.0 if alpha is None else 1.0 - alpha,
            "COMPUTE": tl.float64 if wide else tl.float32,
            "TINY": torch.finfo(torch.float64 if wide else torch.float32).tiny,
            "BLOCK_C": plan.block_c,
            "BLOCK_P": plan.block_p,
            "STAGES": _STAGES if plan.tile_bytes(tensors) <= _STAGE_BYTES else 1,
            "INDEX": tl.int64 if plan.needs_int64(tensors) else tl.int32,
        }


@dataclass(frozen=True)
class _FlatTensors:
    """The tensors of one call with their space axes flattened to one, in the memory order of the logits.

    Attributes:
        logits: `(images, classes, pixels)`.
        target: `(images, pixels)` or `(images, classes, pixels)`.
        weight: like target; `None` if every pixel has the weight 1.
        order: the space axes of the logits, slowest first.
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    order: tuple[int, ...]

    @classmethod
    def of(cls, logits: Tensor, target: Tensor, weight: Tensor | None) -> _FlatTensors:
        order = tuple(sorted(range(2, logits.ndim), key=lambda axis: -logits.stride()[axis]))

        def flatten(tensor: Tensor) -> Tensor:
            first = tensor.ndim - len(order)
            axes = [*range(first), *(axis - 2 + first for axis in order)]
            tensor = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
            return tensor.permute(axes).flatten(first)

        return cls(flatten(logits), flatten(target), None if weight is None else flatten(weight), order)

    @property
    def all(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in (self.logits, self.target, self.weight) if tensor is not None)

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.logits, self.target, self.logits if self.weight is None else self.weight

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of images, classes and pixels of all three tensors; 0 for an axis that a tensor lacks."""
        strides: tuple[int, ...] = ()
        for tensor in (self.logits, self.target, self.weight):
            own = (0, 0) if tensor is None else tensor.stride()
            strides += tuple(own) if len(own) == 3 else (own[0], 0, own[1])
        return strides


@dataclass(frozen=True)
class _Plan:
    """The division of one call into tiles and programs. It depends on the shape alone, so that sums are reproducible.

    Attributes:
        block_c: classes in a tile, a power of two.
        block_p: pixels in a tile, a power of two.
        warps: warps of a program, of 32 threads each.
        steps: tiles that a program processes one after the other.
        chunks: programs that share an image, or a block of its classes.
        programs: total number of programs.
    """

    block_c: int
    block_p: int
    warps: int
    steps: int
    chunks: int
    programs: int

    @classmethod
    def of(cls, spec: SumsSpec, logits: Tensor) -> _Plan:
        images, classes, pixels = logits.shape
        widest = classes if _is_exclusive(spec) else min(classes, _CLASS_BLOCK)
        block_c = 1 << (widest - 1).bit_length()
        heavy = logits.dtype == torch.float64 or len(spec.rows) > _FEW_ROWS
        tile, per_thread = (_TILE // 2, _PER_THREAD // 2) if heavy else (_TILE, _PER_THREAD)
        # 16 pixels of half precision are one memory sector; less would load unused bytes.
        block_p = max(tile // block_c, 32 if block_c <= 128 and not heavy else 16 if block_c <= 512 else 8)
        warps = min(max(block_c * block_p // (32 * per_thread), 1), _MAX_WARPS)
        units = images * -(-classes // block_c)
        blocks = -(-pixels // block_p)
        steps = min(max(blocks * units // _PROGRAMS, 1), _MAX_STEPS)
        chunks = -(-blocks // steps)
        return cls(block_c, block_p, warps, steps, chunks, units * chunks)

    def tile_bytes(self, tensors: _FlatTensors) -> int:
        return self.block_c * self.block_p * sum(tensor.element_size() for tensor in tensors.all if tensor.ndim == 3)

    def needs_int64(self, tensors: _FlatTensors) -> bool:
        """Whether an offset inside an image, including the padding of its last tiles, exceeds 31 bits."""
        _, classes, pixels = tensors.logits.shape
        rows, columns = classes + self.block_c, pixels + self.steps * self.block_p
        offsets = [rows * columns]  # of the gradient, which is dense
        for tensor in tensors.all:
            class_stride = tensor.stride()[1] if tensor.ndim == 3 else 0
            offsets.append(rows * class_stride + columns * tensor.stride()[-1])
        return max(offsets) >= _INT32_LIMIT


# Facts about the machine are constants in a compiled graph.
@constant_in_graphs
def _is_ready() -> bool:
    return unavailable_reason() is None


@constant_in_graphs
def _capability(device: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _is_exclusive(spec: SumsSpec) -> bool:
    return not spec.planes or spec.activation == "softmax"


def _row(spec: SumsSpec, name: str) -> int:
    return spec.rows.index(name) if name in spec.rows else -1


def _ignored_value(spec: SumsSpec, target: Tensor) -> float:
    """Return the ignored label, rounded to the dtype of the target."""
    if spec.ignore_index is None:
        return 0
    if target.is_floating_point():
        # On the CPU whatever the default device, as reading it back would stall a GPU.
        return float(torch.tensor(spec.ignore_index, dtype=target.dtype, device="cpu"))
    return spec.ignore_index


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernels() -> Any:
    from lightning_dice.kernels import triton_kernels

    return triton_kernels
