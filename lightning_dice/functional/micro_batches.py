"""A batch through the network in pieces, with the gradient of the whole."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_dice.functional.model_outputs import read_logits


def micro_batched(net: nn.Module, image: Tensor, micro_batch_size: int) -> list[Tensor]:
    """Logits of every output of the network, which never holds the activations of more images than allowed.

    The batch is split into as few, and as equal, micro-batches as can be. With gradients, the activations of each are
    dropped and computed again when its backward begins (`torch.utils.checkpoint`), which costs one more forward pass.
    What is computed again is what was computed first: random numbers of torch and autocast are replayed, and the
    network's buffers are as they were then. The second pass leaves no trace in them: the running statistics of batch
    norm see each micro-batch once.

    Args:
        net: as `SegmentationModule` takes it.
        image: `(batch, channels, *space)`.
        micro_batch_size: the most images at once, at least 1.

    Returns:
        `(batch, classes, *space)` of each output, finest first.

    >>> levels = micro_batched(nn.Conv2d(3, 2, 1), torch.zeros(5, 3, 8, 8), 2)
    >>> [tuple(level.shape) for level in levels]
    [(5, 2, 8, 8)]
    """
    if len(image) <= micro_batch_size:
        return read_logits(net(image))
    outputs = []
    for part in image.tensor_split(-(-len(image) // micro_batch_size)):
        # Autocast keeps its copies of the weights; a shared copy would add up the parts' gradients in half precision.
        torch.clear_autocast_cache()
        outputs.append(_checkpointed(net, part) if torch.is_grad_enabled() else read_logits(net(part)))
    return [torch.cat(level) for level in zip(*outputs, strict=True)]


def _checkpointed(net: nn.Module, image: Tensor) -> list[Tensor]:
    before = [(buffer, buffer.clone()) for buffer in net.buffers()]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _Holding(before)

    # The images are an argument, not part of the function: their device is the one whose random state is kept.
    levels: list[Tensor] = checkpoint(
        partial(_run, net), image, use_reentrant=False, preserve_rng_state=True, context_fn=contexts
    )
    return levels


def _run(net: nn.Module, image: Tensor) -> list[Tensor]:
    return read_logits(net(image))


class _Holding(AbstractContextManager[None]):
    """Lets each buffer hold a copy of its value in `values`, and afterwards what it held before, whatever happens.

    Not a generator: every backward pass through the same graph (`retain_graph=True`) enters it again.
    """

    def __init__(self, values: list[tuple[Tensor, Tensor]]) -> None:
        self.values = values
        self.held: list[Tensor] = []

    def __enter__(self) -> None:
        copies = [value.clone() for _, value in self.values]
        self.held = [buffer.data for buffer, _ in self.values]
        # Other memory rather than other numbers: what the forward pass changes in place is then thrown away.
        for (buffer, _), copy in zip(self.values, copies, strict=True):
            buffer.data = copy

    def __exit__(self, *error: object) -> None:
        for (buffer, _), data in zip(self.values, self.held, strict=True):
            buffer.data = data
        self.held = []
