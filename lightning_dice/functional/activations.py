"""Probabilities that do not depend on how an image is split into pieces."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

CHUNK = 2**21  # pixels, with all classes, in float64 at once


def probabilities(logits: Tensor, activation: Literal["sigmoid", "softmax"], temperature: float = 1.0) -> Tensor:
    """Compute softmax or sigmoid in float64, rounded to float32.

    In float32, the last digit of a pixel's softmax depends on how many pixels are computed at once.

    Args:
        logits: `(classes, *space)`, floating point.
        activation: `"softmax"` over the classes, or `"sigmoid"`.
        temperature: the logits are divided by it first.

    Returns:
        float32, the shape of logits.

    >>> probabilities(torch.tensor([[0.0], [0.0]]), "softmax")
    tensor([[0.5000],
            [0.5000]])
    """
    flat = logits.reshape(len(logits), -1)
    result = torch.empty(flat.shape, dtype=torch.float32, device=logits.device)
    for start in range(0, flat.shape[1], CHUNK):
        chunk = flat[:, start : start + CHUNK].double() / temperature
        result[:, start : start + CHUNK] = chunk.softmax(0) if activation == "softmax" else chunk.sigmoid()
    return result.view(logits.shape)
