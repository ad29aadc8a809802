"""Interpolate logits row by row, so that neither the old nor the new image is ever in memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.inference.sliding_window import CHUNK_BYTES, Chunk


def resample_chunks(chunks: Iterable[Chunk], space: tuple[int, ...], size: tuple[int, ...]) -> Iterator[Chunk]:
    """Resize logits by linear interpolation, as `torch.nn.functional.interpolate` with `align_corners=False` does.

    The axes of each row are resized first, then the rows are interpolated; the result differs from torch's by rounding.

    Args:
        chunks: rows `start` to `stop` along the first space axis and their logits `(classes, stop - start, *rest)`, in
            order and without gaps.
        space: the size of the image that they make up; at most four axes.
        size: the new size.

    Yields:
        Chunks at the new size, each as soon as the rows that it needs have come.

    >>> chunks = [(0, 1, torch.tensor([[0.0]])), (1, 2, torch.tensor([[4.0]]))]
    >>> [(start, stop, logits.tolist()) for start, stop, logits in resample_chunks(chunks, (2,), (4,))]
    [(0, 4, [[0.0, 1.0, 3.0, 4.0]])]
    """
    if space == size:
        yield from chunks
        return
    if space[0] == size[0]:
        for start, stop, logits in chunks:
            for begin, part in _split(start, stop, logits, size[1:]):
                yield begin, begin + part.shape[1], _resize_rows(part, size[1:])
        return
    # torch's rule: the centre of row r is at (r + 1/2) · scale - 1/2, and rows above the first centre equal the first.
    centers = ((torch.arange(size[0], dtype=torch.float64) + 0.5) * (space[0] / size[0]) - 0.5).clamp(min=0)
    lower = centers.long().clamp(max=space[0] - 1)
    upper = (lower + 1).clamp(max=space[0] - 1)
    share = (centers - lower).float()
    needed = upper.tolist()
    kept: Tensor | None = None  # Rows of the old image from `first` on, their other axes resized.
    first = done = 0
    for start, stop, logits in chunks:
        for begin, part in _split(start, stop, logits, size[1:]):
            rows = _resize_rows(part, size[1:])
            kept = rows if kept is None else torch.cat([kept, rows], 1)
            known = begin + part.shape[1]
            ready = done
            while ready < size[0] and needed[ready] < known:
                ready += 1
            step = _rows_at_once(len(rows), size[1:])
            for low in range(done, ready, step):
                new = slice(low, min(low + step, ready))
                above, below = (kept[:, (old[new] - first).to(kept.device)] for old in (lower, upper))
                weight = share[new].to(kept).view(-1, *[1] * (kept.ndim - 2))
                yield low, new.stop, torch.lerp(above, below, weight)
            done = ready
            if done < size[0]:
                # When rows are skipped, the next one needed may not have come yet.
                drop = min(int(lower[done]), known) - first
                kept, first = kept[:, drop:], first + drop


def resample_logits(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize the logits `(classes, *space)` of one image as `resample_chunks` does.

    >>> resample_logits(torch.tensor([[0.0, 4.0]]), (4,))
    tensor([[0., 1., 3., 4.]])
    """
    space = tuple(logits.shape[1:])
    return torch.cat([part for *_, part in resample_chunks([(0, space[0], logits)], space, size)], 1)


def _split(start: int, stop: int, logits: Tensor, rest: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """Yield the rows of a chunk in parts that are small at the new size too."""
    step = _rows_at_once(len(logits), rest)
    for low in range(start, stop, step):
        yield low, logits[:, low - start : min(low + step, stop) - start]


def _rows_at_once(classes: int, rest: tuple[int, ...]) -> int:
    return max(1, CHUNK_BYTES // (4 * classes * math.prod(rest)))


def _resize_rows(rows: Tensor, rest: tuple[int, ...]) -> Tensor:
    """Resize the other axes of rows `(classes, rows, *rest)`."""
    if tuple(rows.shape[2:]) == rest:
        return rows
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(rest)]
    return F.interpolate(rows, size=rest, mode=mode, align_corners=False)
