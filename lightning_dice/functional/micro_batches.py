"""Run a batch through a network in micro-batches, with the gradient of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_dice.functional.model_outputs import ModelOutput, read_output

Reader = Callable[[Any, Sequence[int]], ModelOutput]


def micro_batched(net: nn.Module, image: Tensor, micro_batch_size: int) -> list[Tensor]:
    """Compute the logits of a batch while holding the activations of at most `micro_batch_size` images.

    The batch is split into as few and as equal micro-batches as possible. With gradients, the activations of each are
    dropped and recomputed in the backward pass (`torch.utils.checkpoint`), which costs one more forward pass. The
    second forward pass equals the first: it replays torch's random numbers and autocast, and starts from the buffers
    that the network had then. It leaves the buffers unchanged, so that batch norm counts each micro-batch once.

    Args:
        net: as for `SegmentationModule`.
        image: `(batch, channels, *space)`.
        micro_batch_size: maximum number of images at once, at least 1.

    Returns:
        The logits of each output, `(batch, classes, *space)`, finest first.

    >>> levels = micro_batched(nn.Conv2d(3, 2, 1), torch.zeros(5, 3, 8, 8), 2)
    >>> [tuple(level.shape) for level in levels]
    [(5, 2, 8, 8)]
    """
    return micro_batched_output(net, image, micro_batch_size, read_output).levels


def micro_batched_output(net: nn.Module, image: Tensor, micro_batch_size: int, read: Reader) -> ModelOutput:
    """Do as `micro_batched`, and return the logits of auxiliary heads too.

    Args:
        net: as for `micro_batched`, as are `image` and `micro_batch_size`.
        image: see `net`.
        micro_batch_size: see `net`.
        read: takes what `net` returned and the size of the image, as `read_output` does.
    """
    if len(image) <= micro_batch_size:
        return _run(net, read, image)
    outputs = []
    for images in image.tensor_split(-(-len(image) // micro_batch_size)):
        # Autocast caches its copies of the weights; a shared copy would add up gradients in half precision.
        torch.clear_autocast_cache()
        outputs.append(_checkpointed(net, read, images) if torch.is_grad_enabled() else _run(net, read, images))
    levels = [torch.cat(level) for level in zip(*(output.levels for output in outputs), strict=True)]
    auxiliary = [torch.cat(head) for head in zip(*(output.auxiliary for output in outputs), strict=True)]
    return ModelOutput(levels, auxiliary)


def _checkpointed(net: nn.Module, read: Reader, image: Tensor) -> ModelOutput:
    before = [(buffer, buffer.clone()) for buffer in net.buffers()]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _SwappedBuffers(before)

    # The images must be an argument: checkpoint keeps the random state of the devices of its arguments.
    output: ModelOutput = checkpoint(
        partial(_run, net, read), image, use_reentrant=False, preserve_rng_state=True, context_fn=contexts
    )
    return output


def _run(net: nn.Module, read: Reader, image: Tensor) -> ModelOutput:
    return read(net(image), image.shape[2:])


class _SwappedBuffers(AbstractContextManager[None]):
    """Gives each buffer a copy of its value in `values`, and restores it on exit, also after an error.

    Not a generator, as every backward pass through the same graph (`retain_graph=True`) enters it again.
    """

    def __init__(self, values: list[tuple[Tensor, Tensor]]) -> None:
        self.values = values
        self.held: list[Tensor] = []

    def __enter__(self) -> None:
        copies = [value.clone() for _, value in self.values]
        self.held = [buffer.data for buffer, _ in self.values]
        # Swap the memory, not the numbers, so that in-place changes of the forward pass are discarded.
        for (buffer, _), copy in zip(self.values, copies, strict=True):
            buffer.data = copy

    def __exit__(self, *error: object) -> None:
        for (buffer, _), data in zip(self.values, self.held, strict=True):
            buffer.data = data
        self.held = []
