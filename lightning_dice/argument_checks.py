"""Checks of settings that losses and metrics share, made once, in their constructors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor


def check_choice(name: str, value: Any, choices: Any) -> Any:
    """`value`, if it is one of a tuple of choices or of a `Literal`'s."""
    allowed = choices if isinstance(choices, tuple) else get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def check_smooth(smooth: float | Sequence[float]) -> tuple[float, float]:
    """`smooth` as (numerator, denominator), in pixels."""
    pair = tuple(smooth) if isinstance(smooth, Sequence) and not isinstance(smooth, str) else (smooth, smooth)
    if len(pair) != 2 or not all(_is_number(s) and math.isfinite(s) and s >= 0 for s in pair):
        raise ValueError(f"smooth must be a number of pixels >= 0, or a pair of them, got {smooth!r}")
    return float(pair[0]), float(pair[1])


def check_label(name: str, value: int | None) -> int | None:
    """A label id, or `None`."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ValueError(f"{name} must be None or an integer label such as 255, got {value!r}")
    return value


def check_flag(name: str, value: bool) -> bool:
    """True or False, and not a word that would count as true, such as "no"."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def check_count(name: str, value: int, least: int = 1, *, optional: bool = False) -> int:
    """An integer >= `least`; `optional` where `None` would do too, and the message is to say so."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be {'None or ' * optional}an integer >= {least}, got {value!r}")
    return value


def check_number(
    name: str, value: float, least: float = 0.0, most: float = math.inf, *, open_ends: bool = False
) -> float:
    """A finite number in [least, most], or between them with `open_ends`."""
    fine = _is_number(value) and math.isfinite(value)
    if not (fine and (least < value < most if open_ends else least <= value <= most)):
        wanted = (
            (f"> {least:g}" if open_ends else f">= {least:g}")
            if most == math.inf
            else (f"in ({least:g}, {most:g})" if open_ends else f"in [{least:g}, {most:g}]")
        )
        raise ValueError(f"{name} must be a number {wanted}, got {value!r}")
    return float(value)


def check_class_indices(name: str, indices: Iterable[int]) -> tuple[int, ...]:
    """Distinct class indices >= 0, as a tuple."""
    if isinstance(indices, (int, str)):
        raise ValueError(f"{name} must be a list of class indices such as [0], got {indices!r}")
    given = tuple(indices)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in given) or len(set(given)) != len(
        given
    ):
        raise ValueError(f"{name} must hold distinct class indices >= 0, got {list(given)}")
    return given


def check_class_weights(weights: Any) -> Tensor | None:
    """One finite weight >= 0 for each class, not all 0, as float32 `(classes,)`."""
    if weights is None:
        return None
    if isinstance(weights, str) or not isinstance(weights, (Iterable, Tensor)):
        raise ValueError(f"class_weights must be a list with a weight for each class, got {weights!r}")
    if any(isinstance(w, bool) or (isinstance(w, Tensor) and w.dtype == torch.bool) for w in weights):
        raise ValueError(f"class_weights must be numbers, got {weights!r}")
    tensor = torch.as_tensor(list(weights) if not isinstance(weights, Tensor) else weights, dtype=torch.float32)
    if tensor.ndim != 1 or not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()) or not tensor.any():
        raise ValueError(f"class_weights must be one finite number >= 0 for each class, not all 0, got {weights!r}")
    return tensor.detach().clone()


def included_classes(classes: int, excluded: tuple[int, ...]) -> list[int]:
    """The indices of the classes that are not left out.

    Raises:
        ValueError: a class that is not there is left out, or none would be left.
    """
    if any(index >= classes for index in excluded):
        raise ValueError(f"exclude_classes must name classes from 0 to {classes - 1}, got {list(excluded)}")
    kept = [index for index in range(classes) if index not in excluded]
    if not kept:
        raise ValueError(f"exclude_classes leaves no class: all {classes} are left out")
    return kept


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
