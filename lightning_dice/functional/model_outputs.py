"""Logits from the output of any network, and images padded and logits resized to fit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor


class ModelOutput(NamedTuple):
    """The logits in the output of a segmentation network, each `(batch, classes, *space)`.

    Attributes:
        levels: finest first: one, or several for deep supervision.
        auxiliary: those of auxiliary heads, which help training and are not used to predict.
    """

    levels: list[Tensor]
    auxiliary: list[Tensor]

    def map(self, change: Any) -> ModelOutput:
        """Apply a function to all logits.

        >>> import torch
        >>> ModelOutput([torch.zeros(4, 2, 8)], []).map(lambda logits: logits[:1]).levels[0].shape
        torch.Size([1, 2, 8])
        """
        return ModelOutput([change(level) for level in self.levels], [change(logits) for logits in self.auxiliary])


def read_logits(output: Any, space: Sequence[int] | None = None) -> list[Tensor]:
    """Return the logits in the output of a segmentation network, the level to be scored first.

    Args:
        output: a tensor; a mapping with `"out"` (torchvision) or `"logits"`; an object with `.logits` (transformers);
            a list or tuple of tensors, finest first, or a tensor `(batch, levels, classes, *space)` as of MONAI's
            DynUNet (deep supervision).
        space: size of the image that the network got; needed to recognize stacked levels and to check the logits.

    Raises:
        ValueError: any other output, such as levels with different numbers of channels; or logits that are larger than
            the image, or a little smaller.

    >>> import torch
    >>> [tuple(level.shape) for level in read_logits({"out": torch.zeros(1, 2, 4, 4)})]
    [(1, 2, 4, 4)]
    """
    return read_output(output, space).levels


def read_output(output: Any, space: Sequence[int] | None = None) -> ModelOutput:
    """Return the logits in the output of a segmentation network, and those of its auxiliary heads.

    Args:
        output: as for `read_logits`; auxiliary heads are the entries of a mapping whose names begin with `aux`, each
            a tensor or a list of tensors.
        space: as for `read_logits`.

    Raises:
        ValueError: as for `read_logits`; or an auxiliary head does not return logits.

    >>> import torch
    >>> output = read_output({"out": torch.zeros(1, 2, 4, 4), "aux": torch.zeros(1, 2, 2, 2)})
    >>> [tuple(logits.shape) for logits in output.auxiliary]
    [(1, 2, 2, 2)]
    """
    found = output
    auxiliary: list[Tensor] = []
    if isinstance(output, Mapping):
        key = next((key for key in ("out", "logits") if key in output), None)
        if key is None:
            raise ValueError(f'net returned a mapping without "out" or "logits": {sorted(map(str, output))}')
        found = output[key]
        for name, value in output.items():
            if str(name).startswith("aux") and value is not None:
                auxiliary += [value] if isinstance(value, Tensor) or not isinstance(value, (list, tuple)) else value
    elif isinstance(getattr(output, "logits", None), Tensor):
        found = output.logits
    levels = _levels(found, None if space is None else len(space))
    if space is not None:
        _check_size(levels[0], tuple(space))
    classes = levels[0].shape[1]
    for logits in auxiliary:
        if not isinstance(logits, Tensor) or logits.ndim != levels[0].ndim or logits.shape[1] != classes:
            raise ValueError(
                f"net returned {_describe(levels[0])} and, of an auxiliary head, {_describe(logits)}, which are no "
                "logits of the same classes: return the logits alone"
            )
    return ModelOutput(levels, auxiliary)


def _levels(output: Any, axes: int | None) -> list[Tensor]:
    levels = [output] if isinstance(output, Tensor) else output
    if not isinstance(levels, (list, tuple)) or not levels or not isinstance(levels[0], Tensor):
        raise ValueError(
            'net must return a tensor, a mapping with "out" or "logits", an object with .logits or a list of tensors, '
            f"got {_describe(output)}"
        )
    if axes is not None and len(levels) == 1 and levels[0].ndim == axes + 3:
        levels = levels[0].unbind(1)  # MONAI's DynUNet stacks the levels.
    expected = levels[0].ndim if axes is None else axes + 2
    classes = levels[0].shape[1] if levels[0].ndim > 1 else None
    if levels[0].ndim != expected or classes is None:
        shape = "(batch, classes, *space)" + ("" if axes is None else f", with {axes} space axes")
        raise ValueError(f"net must return logits {shape}, got {_describe(output)}")
    for level in levels[1:]:
        if not isinstance(level, Tensor) or level.ndim != expected or level.shape[1] != classes:
            raise ValueError(
                f"net returned {_describe(output)}: each of them must be logits of the same classes, finest first "
                "(deep supervision). If it returns other things too, wrap it so that it returns the logits alone, or "
                "override SegmentationModule.read_output"
            )
    return list(levels)


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    if isinstance(output, (list, tuple)) and output:
        return f"a {type(output).__name__} of {', '.join(_describe(part) for part in output)}"
    return "None" if output is None else f"a {type(output).__name__}"


def _check_size(logits: Tensor, space: tuple[int, ...]) -> None:
    """Check that logits are as large as the image along each axis, or coarser by a factor of 2 or more.

    Where unpadded convolutions have cut off a border, resizing would shift what they predict.
    """
    size = tuple(logits.shape[2:])
    if any(got != whole and 2 * got > whole + 1 for got, whole in zip(size, space, strict=True)):
        raise ValueError(
            f"net returned logits of {'x'.join(map(str, size))} for an image of {'x'.join(map(str, space))} pixels: "
            "they must be as large as the image, or coarser by a factor of 2 or more. Pad the network's convolutions; "
            "if it needs images that are multiples of a number of pixels, set size_divisor"
        )


def pad_to_multiple(image: Tensor, divisor: int) -> Tensor:
    """Pad an image at the end of each space axis, by repeating its edge, to a multiple of `divisor`.

    Args:
        image: `(batch, channels, *space)`, 1 to 3 space axes.
        divisor: in pixels: the stride of the network's coarsest features.

    >>> import torch
    >>> pad_to_multiple(torch.zeros(1, 3, 30, 65), 32).shape
    torch.Size([1, 3, 32, 96])
    """
    padding: list[int] = []
    for size in reversed(image.shape[2:]):
        padding += [0, -size % divisor]
    return F.pad(image, padding, mode="replicate") if any(padding) else image


def resize_to(logits: Tensor, space: tuple[int, ...]) -> Tensor:
    """Resize the logits of a coarser output to `space`, by linear interpolation.

    >>> import torch
    >>> resize_to(torch.tensor([[[0.0, 4.0]]]), (4,))
    tensor([[[0., 1., 3., 4.]]])
    """
    if tuple(logits.shape[2:]) == space:
        return logits
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(space)]
    return F.interpolate(logits, size=space, mode=mode, align_corners=False)


def crop_to(logits: Tensor, space: tuple[int, ...]) -> Tensor:
    """Undo `pad_to_multiple`: keep the first `space` pixels along the axes.

    >>> import torch
    >>> crop_to(torch.zeros(1, 2, 32, 96), (30, 65)).shape
    torch.Size([1, 2, 30, 65])
    """
    for axis, size in enumerate(space, start=2):
        logits = logits.narrow(axis, 0, size)
    return logits
