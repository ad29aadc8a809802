"""Huge pages for the memory of large gradients."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

from torch import Tensor

_PAGE = 2 << 20  # bytes
_MADV_HUGEPAGE = 14


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask Linux to back a large CPU tensor, which is about to be filled, with pages of 2 MiB.

    A large allocation mostly consists of pages that were never touched, and faulting them in one by one takes longer
    than the arithmetic. Only huge pages that lie wholly inside the tensor are asked for, so none is wasted; pages
    already in use are unaffected.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    start = tensor.data_ptr()
    first, end = -(-start // _PAGE) * _PAGE, (start + tensor.numel() * tensor.element_size()) // _PAGE * _PAGE
    if end > first + _PAGE and (madvise := _madvise()) is not None:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Any:
    return getattr(ctypes.CDLL(None), "madvise", None)
