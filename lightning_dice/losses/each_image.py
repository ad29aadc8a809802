"""A function of one image on the CPU, applied to each image of a batch, within transforms of `torch.func` too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_dice.library_internals.torch import is_transforming


def apply_to_each_image(function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """Apply a function without a gradient, which may use NumPy, to each image of a batch on the CPU; stack the results.

    >>> apply_to_each_image(lambda image: image.flip(0), torch.tensor([[1, 2], [3, 4]]))
    tensor([[2, 1],
            [4, 3]])
    >>> torch.func.vmap(lambda batch: apply_to_each_image(torch.amax, batch))(torch.tensor([[[1, 2], [3, 4]]]))
    tensor([[2, 4]])
    """
    if torch.compiler.is_compiling() or not is_transforming():
        return _stack(function, batch)
    result: Tensor = _Opaque.apply(batch, function)
    return result


class _Opaque(torch.autograd.Function):
    """The function on tensors that hold values: transforms see only its result."""

    @staticmethod
    def forward(batch: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return _stack(function, batch)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], batch: Tensor, function: Any) -> tuple[Tensor, int]:
        batches = batch.movedim(in_dims[0], 0)
        result: Tensor = _Opaque.apply(batches.flatten(0, 1), function)
        return result.view(*batches.shape[:2], *result.shape[1:]), 0


def _stack(function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    if not len(batch):
        return function(batch.new_zeros(batch.shape[1:]).cpu())[None][:0].to(batch.device)
    return torch.stack([function(one) for one in batch.cpu()]).to(batch.device)
