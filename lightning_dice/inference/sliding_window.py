"""Images of any size through a network of windows, with a memory that does not grow with the image's first axis."""

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
Slab = tuple[int, int, Tensor]
Net = Callable[[Tensor], Any]

# Of logits, that one step of the arithmetic on finished rows touches.
CHUNK_BYTES = 2**26


class Sliceable(Protocol):
    """An image `(channels, *space)`: a tensor, or what reads parts of a file as they are asked for.

    It is indexed by a tuple of slices, one for each axis, the channels' being `slice(None)`, and returns a tensor.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """`(channels, *space)`."""
        ...

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor: ...


class SlidingWindow:
    r"""Logits of an image as the weighted mean of those of windows that overlap.

    Windows, weights and their order are those of `monai.inferers.sliding_window_inference`: the stride along an axis is
    `int(size * (1 - overlap))` pixels, the last window is moved back to end with the image, and an image smaller than
    the window is padded with zeros on both sides and the logits are cropped. The Gaussian has a standard deviation of
    1/8 of the window along each axis (as in nnU-Net), and at least 1/1000 of its maximum everywhere.

    What is more, the sums are kept on the host, in float32, for one window's depth along the first space axis, and
    rows are handed on as soon as no further window touches them.

    Args:
        size: of a window, in pixels, for each space axis. A multiple of the network's size_divisor, or the network pads each
            window, as `SegmentationModule` does: that costs time and makes edges within the image.
        overlap: of neighbouring windows, as a share of their size, in [0, 1).
        importance_map: `"gaussian"`: a window's logits count for less towards its edge, where the network sees less;
            `"constant"`: equally.
        batch_size: windows that go through the network at once.

    Raises:
        ValueError: a setting out of its range; in a call, an image of another number of axes.

    >>> window = SlidingWindow([4, 4], overlap=0.25)
    >>> image = torch.arange(70.0).view(1, 7, 10)
    >>> slabs = list(window.slabs(image, lambda batch: batch * 2))
    >>> [(start, stop, tuple(logits.shape)) for start, stop, logits in slabs]
    [(0, 3, (1, 3, 10)), (3, 4, (1, 1, 10)), (4, 7, (1, 3, 10))]
    >>> torch.allclose(torch.cat([logits for *_, logits in slabs], 1), image * 2)
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
        """Where the windows of an image begin along each axis, in pixels of the padded image.

        >>> SlidingWindow([4, 8]).starts([7, 5])
        [[0, 2, 3], [0]]
        """
        from monai.data.utils import dense_patch_slices  # Here, as importing MONAI takes seconds.

        found = []
        for length, window in zip(space, self.size, strict=True):
            stride = window if length <= window else max(1, int(window * (1 - self.overlap)))
            patches = dense_patch_slices((max(length, window),), (window,), (stride,))
            found.append([int(start.start) for (start,) in patches])
        return found

    def weights(self) -> Tensor:
        """What the logits of a window count, float32 `(*size)`."""
        from monai.data.utils import compute_importance_map

        weights: Tensor = compute_importance_map(self.size, mode=self.importance_map, sigma_scale=0.125)
        return weights

    def slabs(self, image: Sliceable, net: Net, device: torch.device | str = "cpu") -> Iterator[Slab]:
        """Logits of the image, by and by along the first space axis.

        Args:
            image: `(channels, *space)`, on any device or none.
            net: takes windows `(batch, channels, *size)` on `device`, in evaluation mode, and returns their logits in
                any of the forms that `lightning_dice.functional.read_logits` knows; coarser ones are resized.
            device: where the network is.

        Yields:
            The rows `start` to `stop` and their logits, float32 `(classes, stop - start, *rest)` on the host; together
            the whole image, each row once. Rows that are finished at once may come in parts.
        """
        space = tuple(image.shape[1:])
        if len(space) != len(self.size):
            raise ValueError(
                f"the image must have the space axes of the window, {len(self.size)} (size {list(self.size)}), got an "
                f"image (channels, *space) of {tuple(image.shape)}"
            )
        if not all(space):
            raise ValueError(f"the image must have pixels along each axis, got {tuple(image.shape)}")
        rows: _Rows | None = None
        for origin, logits in self._windows(image, net, torch.device(device)):
            if rows is None:
                rows = _Rows(len(logits), space, self.size, self.weights())
            # No window to come begins above this one.
            yield from rows.finished(origin[0])
            rows.add(origin, logits)
        if rows is not None:
            yield from rows.finished(max(space[0], self.size[0]))

    def _windows(self, image: Sliceable, net: Net, device: torch.device) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Where each window begins in the padded image, and its logits on the host."""
        # On a GPU a batch is computed while the one before it is added up.
        ahead = 1 if device.type == "cuda" else 0
        under_way: deque[_Flight] = deque()
        origins = list(product(*self.starts(image.shape[1:])))
        for first in range(0, len(origins), self.batch_size):
            batch = origins[first : first + self.batch_size]
            under_way.append(self._launch(batch, image, net, device))
            if len(under_way) > ahead:
                yield from under_way.popleft().landed()
        while under_way:
            yield from under_way.popleft().landed()

    def _launch(self, origins: list[tuple[int, ...]], image: Sliceable, net: Net, device: torch.device) -> _Flight:
        windows = torch.stack([self._cut(image, origin) for origin in origins])
        if device.type == "cuda" and windows.device.type == "cpu":
            windows = windows.pin_memory()
        with torch.no_grad():
            logits = read_logits(net(windows.to(device, non_blocking=True)))[0]
            if logits.ndim != windows.ndim or len(logits) != len(windows):
                raise ValueError(
                    f"net must return logits (batch, classes, *space) for windows {tuple(windows.shape)}, got "
                    f"{tuple(logits.shape)}"
                )
            logits = resize_to(logits, self.size)
            if logits.device.type != "cuda":
                return _Flight(origins, logits.cpu(), None)
            host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
            host.copy_(logits, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(logits.device))
            return _Flight(origins, host, event)

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


class _Flight(NamedTuple):
    """Logits of some windows, which may still be on their way to the host."""

    origins: list[tuple[int, ...]]
    logits: Tensor
    event: Any

    def landed(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        if self.event is not None:
            self.event.synchronize()
        yield from zip(self.origins, self.logits, strict=True)


class _Rows:
    """The weighted sums of windows, for the rows that windows still touch.

    Row r of the padded image lies at r modulo the window's depth: every window covers all places, those of rows that
    are finished being free again.
    """

    def __init__(self, classes: int, space: tuple[int, ...], size: tuple[int, ...], weights: Tensor) -> None:
        rest = tuple(max(pair) for pair in zip(space[1:], size[1:], strict=True))
        self.depth, self.done, self.weight = size[0], 0, weights
        self.sums = torch.zeros(classes, self.depth, *rest)
        self.weights = torch.zeros(self.depth, *rest)
        (before, _), *others = _padding(space, size)
        # The image within the padded one.
        self.before, self.length = before, space[0]
        self.crop = tuple(slice(start, start + length) for (start, _), length in zip(others, space[1:], strict=True))
        self.chunk = max(1, CHUNK_BYTES // max(1, 4 * classes * self.weights[0].numel()))

    def add(self, origin: tuple[int, ...], logits: Tensor) -> None:
        """Add a window's logits, `(classes, *size)`."""
        rest = tuple(slice(start, start + size) for start, size in zip(origin[1:], self.weight.shape[1:], strict=True))
        turn = origin[0] % self.depth  # The place of the window's first row; the last ones may lie before it.
        for here, there in (
            (slice(turn, None), slice(0, self.depth - turn)),
            (slice(0, turn), slice(self.depth - turn, None)),
        ):
            self.sums[(slice(None), here, *rest)].addcmul_(logits[:, there], self.weight[there])
            self.weights[(here, *rest)].add_(self.weight[there])

    def finished(self, stop: int) -> Iterator[Slab]:
        """The rows of the padded image up to `stop` that are not yet handed on, as far as they are of the image."""
        while self.done < stop:
            place = self.done % self.depth
            here = slice(place, place + min(self.chunk, stop - self.done, self.depth - place))
            first, last = self.done - self.before, self.done + here.stop - here.start - self.before
            self.done = last + self.before
            low, high = max(first, 0), min(last, self.length)
            if low < high:
                inner = slice(place + low - first, place + high - first)
                yield low, high, self.sums[(slice(None), inner, *self.crop)] / self.weights[(inner, *self.crop)]
            self.sums[:, here], self.weights[here] = 0, 0


def _padding(space: tuple[int, ...], size: tuple[int, ...]) -> list[tuple[int, int]]:
    """Pixels before and after each axis of an image smaller than the window."""
    missing = [max(window - length, 0) for length, window in zip(space, size, strict=True)]
    return [(short // 2, short - short // 2) for short in missing]
