"""Logits at another size, row by row: what is interpolated never has to be in memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.inference.sliding_window import CHUNK_BYTES, Slab


def resized(slabs: Iterable[Slab], space: tuple[int, ...], size: tuple[int, ...]) -> Iterator[Slab]:
    """Linear interpolation, as `torch.nn.functional.interpolate` with `align_corners=False`, of logits in slabs.

    First within each row, then between rows; the result differs from torch's by rounding.

    Args:
        slabs: rows `start` to `stop` along the first space axis and their logits `(classes, stop - start, *rest)`, in
            order and without a gap.
        space: the size that they have together; at most four axes.
        size: the size that is wanted.

    Yields:
        As `slabs`, at the new size.

    >>> parts = [(0, 1, torch.tensor([[0.0]])), (1, 2, torch.tensor([[4.0]]))]
    >>> [(start, stop, part.tolist()) for start, stop, part in resized(parts, (2,), (4,))]
    [(0, 4, [[0.0, 1.0, 3.0, 4.0]])]
    """
    if space == size:
        yield from slabs
        return
    if space[0] == size[0]:
        for start, stop, logits in slabs:
            for begin, part in _parts(start, stop, logits, size[1:]):
                yield begin, begin + part.shape[1], _resize_rest(part, size[1:])
        return
    # torch's rule: the centre of row r lies at (r + 1/2) · scale - 1/2, and above the first row's centre is the first.
    centers = ((torch.arange(size[0], dtype=torch.float64) + 0.5) * (space[0] / size[0]) - 0.5).clamp(min=0)
    lower = centers.long().clamp(max=space[0] - 1)
    upper = (lower + 1).clamp(max=space[0] - 1)
    share = (centers - lower).float()
    last_needed = upper.tolist()
    kept: Tensor | None = None  # Rows of the old image, at the new size of the other axes, from `first` on.
    first = done = 0
    for start, stop, logits in slabs:
        for begin, part in _parts(start, stop, logits, size[1:]):
            rows = _resize_rest(part, size[1:])
            kept = rows if kept is None else torch.cat([kept, rows], 1)
            known = begin + part.shape[1]
            ready = done
            while ready < size[0] and last_needed[ready] < known:
                ready += 1
            step = _rows_at_once(len(rows), size[1:])
            for low in range(done, ready, step):
                some = slice(low, min(low + step, ready))
                above, below = (kept[:, (which[some] - first).to(kept.device)] for which in (lower, upper))
                weight = share[some].to(kept).view(-1, *[1] * (kept.ndim - 2))
                yield low, some.stop, torch.lerp(above, below, weight)
            done = ready
            if done < size[0]:
                # Of rows far apart the next one wanted may not have come yet.
                drop = min(int(lower[done]), known) - first
                kept, first = kept[:, drop:], first + drop


def _parts(start: int, stop: int, logits: Tensor, rest: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """The rows of a slab, few enough that they are small at the new size too."""
    step = _rows_at_once(len(logits), rest)
    for low in range(start, stop, step):
        yield low, logits[:, low - start : min(low + step, stop) - start]


def _rows_at_once(classes: int, rest: tuple[int, ...]) -> int:
    return max(1, CHUNK_BYTES // (4 * classes * math.prod(rest)))


def _resize_rest(rows: Tensor, rest: tuple[int, ...]) -> Tensor:
    """Rows `(classes, rows, *rest)` at another size of their other axes."""
    if tuple(rows.shape[2:]) == rest:
        return rows
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(rest)]
    return F.interpolate(rows, size=rest, mode=mode, align_corners=False)
