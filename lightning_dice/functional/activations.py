"""Probabilities that do not depend on how an image is cut into pieces."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

CHUNK = 2**21  # pixels of all classes, that are in float64 at once


def probabilities(logits: Tensor, activation: Literal["sigmoid", "softmax"], temperature: float = 1.0) -> Tensor:
    """Softmax or sigmoid, computed in float64 and rounded to float32.

    In float32 the last digit of a pixel's softmax depends on how many pixels are computed with it.

    Args:
        logits: `(classes, *space)`, of floating point.
        activation: `"softmax"` over the classes, or `"sigmoid"`.
        temperature: by which logits are divided before.

    Returns:
        float32, of the shape of the logits.

    >>> probabilities(torch.tensor([[0.0], [0.0]]), "softmax")
    tensor([[0.5000],
            [0.5000]])
    """
    flat = logits.reshape(len(logits), -1)
    result = torch.empty(flat.shape, dtype=torch.float32, device=logits.device)
    for start in range(0, flat.shape[1], CHUNK):
        part = flat[:, start : start + CHUNK].double() / temperature
        result[:, start : start + CHUNK] = part.softmax(0) if activation == "softmax" else part.sigmoid()
    return result.view(logits.shape)
