"""Predict images of any size window by window, in memory that does not grow with the image's first axis."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.argument_checks import check_choice, check_count, check_number
from lightning_dice.functional.model_outputs import read_logits, resize_to

ImportanceMap = Literal["gaussian", "constant"]
Chunk = tuple[int, int, Tensor]  # rows `start` to `stop` of an image along its first space axis, and their logits
Net = Callable[[Tensor], Any]

# The most bytes of logits that a chunk holds, or one step of resampling computes.
CHUNK_BYTES = 2**26


class Sliceable(Protocol):
    """An image `(channels, *space)`: a tensor, or a reader that decodes parts of a file on demand.

    Indexed by a tuple of slices, one for each axis and `slice(None)` for the channels, it returns a tensor.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """`(channels, *space)`."""
        ...

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor: ...


class SlidingWindow:
    r"""Predict overlapping windows of an image and average their logits.

    Windows, weights and their order are those of `monai.inferers.sliding_window_inference`: the stride along an axis is
    `int(size * (1 - overlap))` pixels, the last window is moved back to end with the image, and an image smaller than
    the window is padded with zeros on both sides and its logits are cropped. The Gaussian has a standard deviation of
    1/8 of the window along each axis (as in nnU-Net), and is at least 1/1000 of its maximum everywhere.

    Unlike MONAI, it keeps sums for one window's depth along the first space axis only, in float32 on the host, and
    yields rows as soon as no further window covers them.

    Args:
        size: window size in pixels, for each space axis; best a multiple of the module's `size_divisor`, as it pads
            every window to one, which costs time and makes edges within the image.
        overlap: overlap of neighbouring windows, as a fraction of their size, in [0, 1).
        importance_map: weights of a window's logits: `"gaussian"`, lower towards its edge, where the network sees less
            of the surroundings; or `"constant"`.
        batch_size: windows that go through the network at once.

    Raises:
        ValueError: a setting out of its range; in a call, an image of another number of axes.

    >>> window = SlidingWindow([4, 4], overlap=0.25)
    >>> image = torch.arange(70.0).view(1, 7, 10)
    >>> chunks = list(window.chunks(image, lambda batch: batch * 2))
    >>> [(start, stop, tuple(logits.shape)) for start, stop, logits in chunks]
    [(0, 3, (1, 3, 10)), (3, 4, (1, 1, 10)), (4, 7, (1, 3, 10))]
    >>> torch.allclose(torch.cat([logits for *_, logits in chunks], 1), image * 2)
    True
    """

    def __init__(
        self,
        size: Sequence[int],
        overlap: float = 0.5,
        importance_map: ImportanceMap = "gaussian",
        batch_size: int = 4,
    ) -> None:
        if isinstance(size, (int, str)) or not len(size):
            raise ValueError(f"size must be a number of pixels for each space axis, such as [96, 96], got {size!r}")
        self.size = tuple(check_count("size", length) for length in size)
        self.overlap = check_number("overlap", overlap, 0, 1)
        if self.overlap == 1:
            raise ValueError("overlap must be a number in [0, 1): windows that overlap fully would not move, got 1")
        self.importance_map: ImportanceMap = check_choice("importance_map", importance_map, ImportanceMap)
        self.batch_size = check_count("batch_size", batch_size)

    def __repr__(self) -> str:
        return (
            f"SlidingWindow(size={list(self.size)}, overlap={self.overlap:g}, importance_map={self.importance_map!r}, "
            f"batch_size={self.batch_size})"
        )

    def starts(self, space: Sequence[int]) -> list[list[int]]:
        """Return where the windows of an image begin along each axis, in pixels of the padded image.

        >>> SlidingWindow([4, 8]).starts([7, 5])
        [[0, 2, 3], [0]]
        """
        starts = []
        for length, window in zip(space, self.size, strict=True):
            stride = max(1, int(window * (1 - self.overlap)))
            last = max(0, length - window)
            starts.append([*range(0, last, stride), last])
        return starts

    def weights(self) -> Tensor:
        """Return the weights of a window's logits, float32 `(*size)`."""
        if self.importance_map == "constant":
            return torch.ones(self.size, dtype=torch.float32)
        weights = torch.ones((), dtype=torch.float32)
        for length in self.size:
            place = torch.arange(-(length - 1) / 2, (length - 1) / 2 + 1, dtype=torch.float32)
            weights = weights.unsqueeze(-1) * torch.exp(place**2 / (-2 * (length / 8) ** 2))
        # The Gaussian may be 0 at the corners of a large window.
        return weights.clamp(min=max(float(weights.min()), 1e-3))

    def chunks(self, image: Sliceable, net: Net, device: torch.device | str = "cpu") -> Iterator[Chunk]:
        """Yield the logits of an image in chunks of rows along the first space axis.

        Args:
            image: `(channels, *space)`, on any device or in a file.
            net: takes windows `(batch, channels, *size)` on `device`, in evaluation mode, and returns logits in any of
                the forms that `lightning_dice.functional.read_logits` reads; coarser ones are resized.
            device: where the network is.

        Yields:
            The rows `start` to `stop` and their logits, float32 `(classes, stop - start, *rest)` on the host. The
            chunks follow each other without gaps; rows that are finished at the same time may come in several chunks.

        Raises:
            ValueError: the image has other axes than the window, or none of its pixels; or the network returns
                something else than logits.
        """
        space = tuple(image.shape[1:])
        if len(space) != len(self.size):
            raise ValueError(
                f"the image must have the space axes of the window, {len(self.size)} (size {list(self.size)}), got an "
                f"image (channels, *space) of {tuple(image.shape)}"
            )
        if not all(space):
            raise ValueError(f"the image must have pixels along each axis, got {tuple(image.shape)}")
        rows: _RowBuffer | None = None
        for origin, logits in self._windows(image, net, torch.device(device)):
            if rows is None:
                rows = _RowBuffer(len(logits), space, self.size, self.weights())
            # No later window begins above this one.
            yield from rows.finished(origin[0])
            rows.add(origin, logits)
        if rows is not None:
            yield from rows.finished(max(space[0], self.size[0]))

    def _windows(self, image: Sliceable, net: Net, device: torch.device) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield where each window begins in the padded image, and its logits on the host."""
        # On a GPU, a batch is computed while the one before it is added up.
        ahead = 1 if device.type == "cuda" else 0
        pending: deque[_PendingLogits] = deque()
        origins = list(product(*self.starts(image.shape[1:])))
        for first in range(0, len(origins), self.batch_size):
            batch = origins[first : first + self.batch_size]
            pending.append(self._launch(batch, image, net, device))
            if len(pending) > ahead:
                yield from pending.popleft().wait()
        while pending:
            yield from pending.popleft().wait()

    def _launch(
        self, origins: list[tuple[int, ...]], image: Sliceable, net: Net, device: torch.device
    ) -> _PendingLogits:
        windows = torch.stack([self._cut(image, origin) for origin in origins])
        if device.type == "cuda" and windows.device.type == "cpu":
            windows = windows.pin_memory()
        with torch.no_grad():
            logits = read_logits(net(windows.to(device, non_blocking=True)), windows.shape[2:])[0]
            if logits.ndim != windows.ndim or len(logits) != len(windows):
                raise ValueError(
                    f"net must return logits (batch, classes, *space) for windows {tuple(windows.shape)}, got "
                    f"{tuple(logits.shape)}"
                )
            logits = resize_to(logits, self.size)
            if logits.device.type != "cuda":
                return _PendingLogits(origins, logits.cpu(), None)
            host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
            host.copy_(logits, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(logits.device))
            return _PendingLogits(origins, host, event)

    def _cut(self, image: Sliceable, origin: tuple[int, ...]) -> Tensor:
        space = tuple(image.shape[1:])
        within = [
            slice(start, min(start + size, length))
            for start, size, length in zip(origin, self.size, space, strict=True)
        ]
        window = torch.as_tensor(image[(slice(None), *within)])
        padding: list[int] = []
        for before, after in reversed(_padding(space, self.size)):
            padding += [before, after]
        return F.pad(window, padding) if any(padding) else window


class _PendingLogits(NamedTuple):
    """Logits of some windows, which may still be on their way to the host."""

    origins: list[tuple[int, ...]]
    logits: Tensor
    event: Any

    def wait(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        if self.event is not None:
            self.event.synchronize()
        yield from zip(self.origins, self.logits, strict=True)


class _RowBuffer:
    """Weighted sums of logits, for the rows of the padded image that windows still cover.

    A ring: row r is at place r modulo the window's depth. Every window covers all places, as those of finished rows are
    free again.
    """

    def __init__(self, classes: int, space: tuple[int, ...], size: tuple[int, ...], weights: Tensor) -> None:
        rest = tuple(max(pair) for pair in zip(space[1:], size[1:], strict=True))
        self.depth, self.done, self.weight = size[0], 0, weights
        self.sums = torch.zeros(classes, self.depth, *rest)
        self.weights = torch.zeros(self.depth, *rest)
        (before, _), *others = _padding(space, size)
        # Where the image is in the padded one.
        self.before, self.length = before, space[0]
        self.crop = tuple(slice(start, start + length) for (start, _), length in zip(others, space[1:], strict=True))
        self.chunk = max(1, CHUNK_BYTES // max(1, 4 * classes * self.weights[0].numel()))

    def add(self, origin: tuple[int, ...], logits: Tensor) -> None:
        """Add the logits of a window, `(classes, *size)`, that begins at `origin`."""
        rest = tuple(slice(start, start + size) for start, size in zip(origin[1:], self.weight.shape[1:], strict=True))
        first = origin[0] % self.depth  # The place of the window's first row; its last rows may be before it.
        for places, rows in (
            (slice(first, None), slice(0, self.depth - first)),
            (slice(0, first), slice(self.depth - first, None)),
        ):
            self.sums[(slice(None), places, *rest)].addcmul_(logits[:, rows], self.weight[rows])
            self.weights[(places, *rest)].add_(self.weight[rows])

    def finished(self, stop: int) -> Iterator[Chunk]:
        """Yield the logits of the next rows of the padded image, up to `stop`, without the padding."""
        while self.done < stop:
            place = self.done % self.depth
            places = slice(place, place + min(self.chunk, stop - self.done, self.depth - place))
            first, last = self.done - self.before, self.done + places.stop - places.start - self.before
            self.done = last + self.before
            low, high = max(first, 0), min(last, self.length)
            if low < high:
                inner = slice(place + low - first, place + high - first)
                yield low, high, self.sums[(slice(None), inner, *self.crop)] / self.weights[(inner, *self.crop)]
            self.sums[:, places], self.weights[places] = 0, 0


def _padding(space: tuple[int, ...], size: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the pixels to add before and after each axis of an image smaller than the window."""
    missing = [max(window - length, 0) for length, window in zip(space, size, strict=True)]
    return [(short // 2, short - short // 2) for short in missing]
