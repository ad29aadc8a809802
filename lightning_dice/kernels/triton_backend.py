"""The sums on a CUDA device, by two Triton kernels: one reads logits once, one reads them and writes the gradient.

Nothing is kept between them but logits and target. No sum depends on the order in which blocks of threads run, so a
repetition gives the same bits; no value is read back, so a CUDA graph can hold both. Logits and target are read where
they lie, in any format of memory whose space axes can be walked by one stride; others are copied once.

Triton is imported at the first use. With `TRITON_INTERPRET=1` in the environment before that, tensors of the CPU are
taken too, slowly: that is how the kernels are tested without a GPU.
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

# Reading a verdict back would make the GPU wait.
CHECKS_VALUES = False

# A tile holds all classes of a softmax; beyond this the few pixels that are left no longer fill a memory access.
_CLASSES = 1024
# Elsewhere classes are worked on in blocks: in channels_last they lie side by side, so a block should be wide.
_CLASS_BLOCK = 32
_TILE = 2048  # elements
# Registers decide: each sum that is wanted holds as many numbers of a thread as it has elements of the tile.
_PER_THREAD = 8
_FEW_ROWS = 6
_MOST_WARPS = 16
_PROGRAMS = 1024  # a few for each multiprocessor of a large GPU
_STEPS = 16  # tiles that a program adds up in the dtype of computation; more would cost digits
_STAGES = 3  # tiles on their way to the chip: one in use, two ahead
_BYTES_OF_A_STAGE = 16 << 10  # so that all stages fit into the shared memory of any GPU
_FAR = 1 << 31
_LEAST_CAPABILITY = (7, 5)  # of what Triton supports
_BFLOAT16_CAPABILITY = (8, 0)


def missing() -> str | None:
    """Why it cannot run here: `"no triton"` or `"no CUDA device"`; `None`: it can."""
    if not _triton_is_there():
        return "no triton"
    if not _interpreted() and not torch.cuda.is_available():
        return "no CUDA device"
    return None


def takes(work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether it can do this work on these tensors: on a GPU, and up to 1024 classes where they exclude each other."""
    if not _ready():
        return False
    if logits.device.type == "cuda":
        capability = _capability(logits.device.index)
        least = _BFLOAT16_CAPABILITY if torch.bfloat16 in (logits.dtype, target.dtype) else _LEAST_CAPABILITY
        # AMD's numbers mean something else.
        if torch.version.hip is None and capability < least:
            return False
    elif not (logits.device.type == "cpu" and _interpreted()):
        return False
    together = all(other is None or other.device == logits.device for other in (target, weight))
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    known = logits.dtype in floats and not target.dtype.is_complex
    known = known and (weight is None or weight.dtype in floats)
    known = known and (not target.is_floating_point() or target.dtype in floats)
    return together and known and (not _exclusive(work) or logits.shape[1] <= _CLASSES)


def forward(work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """The sums, float64 `(rows, images, classes)`, in the order of `work.rows`."""
    images, classes = logits.shape[:2]
    if logits.numel() == 0:
        return torch.zeros(len(work.rows), images, classes, dtype=torch.float64, device=logits.device)
    tensors = _Flat.of(work, logits, target, weight)
    plan = _Plan.of(work, tensors.logits)
    parts = torch.empty(plan.chunks, len(work.rows), images, classes, dtype=torch.float64, device=logits.device)
    with _on(logits.device):
        _kernels().sums_kernel[(plan.programs,)](
            parts,
            *tensors.pointers,
            images,
            classes,
            tensors.logits.shape[2],
            *tensors.strides,
            *plan.arguments(_ignored_value(work, target)),
            ROWS=len(work.rows),
            ACTUAL_SQUARES_ROW=_row(work, "actual_squares"),
            **plan.constants(work, tensors),
        )
    # Fixed in its order too: torch adds along an axis without atomic operations.
    return parts[0] if plan.chunks == 1 else parts.sum(0)


def backward(work: SumsSpec, grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient of logits, with the shape, dtype and strides of `torch.empty_like(logits)`.

    Args:
        work: as given to `forward`.
        grad: the gradient of the sums, float64 `(rows, images, classes)`.
        logits: `(images, classes, *space)`.
        target: `(images, *space)` or of the shape of logits.
        weight: `(images, *space)` or of the shape of logits.
    """
    result = torch.empty_like(logits)
    if logits.numel() == 0:
        return result
    tensors = _Flat.of(work, logits, target, weight)
    plan = _Plan.of(work, tensors.logits)
    ordered = result.permute(0, 1, *tensors.order)
    # Flattening copies what it cannot view; the kernel then fills the copy.
    flat = ordered.flatten(2)
    with _on(logits.device):
        _kernels().gradient_kernel[(plan.programs,)](
            flat,
            grad.contiguous(),
            *tensors.pointers,
            *logits.shape[:2],
            flat.shape[2],
            *flat.stride(),
            *tensors.strides,
            *plan.arguments(_ignored_value(work, target)),
            **plan.constants(work, tensors),
        )
    if flat.data_ptr() != result.data_ptr():
        ordered.copy_(flat.view(ordered.shape))
    return result


@dataclass(frozen=True)
class _Flat:
    """The tensors of one call with their space axes, in the order in which logits lie in memory, as one.

    Attributes:
        logits: `(images, classes, pixels)`.
        target: `(images, pixels)` or `(images, classes, pixels)`.
        weight: the same; `None`: 1 everywhere.
        order: the space axes of logits, the slowest first.
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    order: tuple[int, ...]

    @classmethod
    def of(cls, work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> _Flat:
        order = tuple(sorted(range(2, logits.ndim), key=lambda axis: -logits.stride()[axis]))

        def flat(tensor: Tensor) -> Tensor:
            lead = tensor.ndim - len(order)
            axes = [*range(lead), *(axis - 2 + lead for axis in order)]
            tensor = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
            return tensor.permute(axes).flatten(lead)

        return cls(flat(logits), flat(target), None if weight is None else flat(weight), order)

    @property
    def all(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in (self.logits, self.target, self.weight) if tensor is not None)

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.logits, self.target, self.logits if self.weight is None else self.weight

    @property
    def strides(self) -> tuple[int, ...]:
        """Of images, classes and pixels of all three; 0 along classes where there are none."""
        strides: tuple[int, ...] = ()
        for tensor in (self.logits, self.target, self.weight):
            own = (0, 0) if tensor is None else tensor.stride()
            strides += tuple(own) if len(own) == 3 else (own[0], 0, own[1])
        return strides


@dataclass(frozen=True)
class _Plan:
    """How one call is cut up: by its shape alone, so that equal calls add up in the same order.

    Attributes:
        block_c: classes in a tile, a power of two.
        block_p: pixels in a tile, likewise.
        warps: warps of a program, of 32 threads each.
        steps: tiles of a program, one after the other.
        chunks: programs that share an image, or a block of its classes.
        programs: programs in all.
    """

    block_c: int
    block_p: int
    warps: int
    steps: int
    chunks: int
    programs: int

    @classmethod
    def of(cls, work: SumsSpec, logits: Tensor) -> _Plan:
        images, classes, pixels = logits.shape
        widest = classes if _exclusive(work) else min(classes, _CLASS_BLOCK)
        block_c = 1 << (widest - 1).bit_length()
        heavy = logits.dtype == torch.float64 or len(work.rows) > _FEW_ROWS
        tile, per_thread = (_TILE // 2, _PER_THREAD // 2) if heavy else (_TILE, _PER_THREAD)
        # 16 pixels of half precision are one sector of memory; less would read what is not used.
        block_p = max(tile // block_c, 32 if block_c <= 128 and not heavy else 16 if block_c <= 512 else 8)
        warps = min(max(block_c * block_p // (32 * per_thread), 1), _MOST_WARPS)
        units = images * -(-classes // block_c)
        blocks = -(-pixels // block_p)
        steps = min(max(blocks * units // _PROGRAMS, 1), _STEPS)
        chunks = -(-blocks // steps)
        return cls(block_c, block_p, warps, steps, chunks, units * chunks)

    def arguments(self, ignore: float) -> tuple[float, ...]:
        return ignore, self.chunks, self.steps

    def constants(self, work: SumsSpec, tensors: _Flat) -> dict[str, Any]:
        wide = tensors.logits.dtype == torch.float64
        compute = torch.float64 if wide else torch.float32
        focal = work.wanted.focal
        alpha = None if focal is None else focal.alpha
        weight = tensors.weight
        return {
            "ACTIVATION": work.activation or "none",
            "IDS": not work.planes,
            "IGNORE": work.ignore_index is not None,
            "WEIGHT": "none" if weight is None else "class" if weight.ndim == 3 else "pixel",
            "SQUARES_ROW": _row(work, "predicted_squares"),
            "MINIMUM_ROW": _row(work, "minimum"),
            "NLL_ROW": _row(work, "nll"),
            "ALL_NLL_ROW": _row(work, "all_nll"),
            "ABSENT_NLL_ROW": _row(work, "absent_nll"),
            "FOCAL_ROW": _row(work, "focal"),
            "GAMMA": 0.0 if focal is None else float(focal.gamma),
            "FRONT": 1.0 if alpha is None else float(alpha),
            "BACK": 1.0 if alpha is None else 1.0 - alpha,
            "COMPUTE": _kernels().tl.float64 if wide else _kernels().tl.float32,
            "TINY": torch.finfo(compute).tiny,
            "BLOCK_C": self.block_c,
            "BLOCK_P": self.block_p,
            "STAGES": _STAGES if self._bytes_of_tiles(tensors) <= _BYTES_OF_A_STAGE else 1,
            "INDEX": _kernels().tl.int64 if self._far(tensors) else _kernels().tl.int32,
            "num_warps": self.warps,
        }

    def _bytes_of_tiles(self, tensors: _Flat) -> int:
        return self.block_c * self.block_p * sum(tensor.element_size() for tensor in tensors.all if tensor.ndim == 3)

    def _far(self, tensors: _Flat) -> bool:
        """Whether an offset inside an image, its last tiles filled up, passes 31 bits."""
        _, classes, pixels = tensors.logits.shape
        rows, columns = classes + self.block_c, pixels + self.steps * self.block_p
        furthest = [rows * columns]  # of the gradient, which is dense
        for tensor in tensors.all:
            by_class = tensor.stride()[1] if tensor.ndim == 3 else 0
            furthest.append(rows * by_class + columns * tensor.stride()[-1])
        return max(furthest) >= _FAR


# Facts of the machine, which a graph that is being compiled takes as they are.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _ready() -> bool:
    return missing() is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(device: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _exclusive(work: SumsSpec) -> bool:
    return not work.planes or work.activation == "softmax"


def _row(work: SumsSpec, name: str) -> int:
    return work.rows.index(name) if name in work.rows else -1


def _ignored_value(work: SumsSpec, target: Tensor) -> float:
    """The ignored label as a target of this dtype holds it."""
    if work.ignore_index is None:
        return 0
    if target.is_floating_point():
        # On the CPU whatever the default device is: reading it back would make a GPU wait.
        return float(torch.tensor(work.ignore_index, dtype=target.dtype, device="cpu"))
    return work.ignore_index


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _triton_is_there() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernels() -> Any:
    from lightning_dice.kernels import triton_kernels

    return triton_kernels
