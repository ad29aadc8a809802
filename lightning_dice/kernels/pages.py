"""Memory of large gradients."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

from torch import Tensor

_PAGE = 2 << 20  # bytes
_MADV_HUGEPAGE = 14


def ask_for_large_pages(tensor: Tensor) -> None:
    """Ask Linux to back a large tensor of the CPU, which is about to be filled, with pages of 2 MiB.

    Its memory mostly lies on pages that nobody has touched, and faulting them in one by one takes longer than the
    arithmetic. Only whole large pages within the tensor, so that none is wasted; what was touched stays as it is.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    start = tensor.data_ptr()
    first, end = -(-start // _PAGE) * _PAGE, (start + tensor.numel() * tensor.element_size()) // _PAGE * _PAGE
    if end > first + _PAGE and (advise := _madvise()) is not None:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Any:
    return getattr(ctypes.CDLL(None), "madvise", None)
