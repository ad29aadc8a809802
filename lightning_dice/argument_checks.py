"""Argument checks for constructors: each returns the value, or raises `ValueError`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor


def check_choice(name: str, value: Any, choices: Any) -> Any:
    """Check that `value` is one of `choices`, a tuple or a `Literal`.

    >>> check_choice("pool", "image", ("image", "batch"))
    'image'
    """
    allowed = choices if isinstance(choices, tuple) else get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def check_smooth(smooth: float | Sequence[float]) -> tuple[float, float]:
    """Return `smooth`, a number of pixels >= 0 or a pair, as (numerator, denominator).

    >>> check_smooth(1)
    (1.0, 1.0)
    """
    pair = tuple(smooth) if isinstance(smooth, Sequence) and not isinstance(smooth, str) else (smooth, smooth)
    if len(pair) != 2 or not all(_is_number(s) and math.isfinite(s) and s >= 0 for s in pair):
        raise ValueError(f"smooth must be a number of pixels >= 0, or a pair of them, got {smooth!r}")
    return float(pair[0]), float(pair[1])


def check_label(name: str, value: int | None) -> int | None:
    """Check that `value` is an integer label, or `None`.

    >>> check_label("ignore_index", 255)
    255
    """
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ValueError(f"{name} must be None or an integer label such as 255, got {value!r}")
    return value


def check_flag(name: str, value: bool) -> bool:
    """Check that `value` is True or False, not something truthy such as "no".

    >>> check_flag("squared", True)
    True
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def check_count(name: str, value: int, least: int = 1, *, optional: bool = False) -> int:
    """Check that `value` is an integer >= `least`; `optional` mentions in the error that `None` is valid too.

    >>> check_count("iterations", 0, least=0)
    0
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be {'None or ' * optional}an integer >= {least}, got {value!r}")
    return value


def check_number(
    name: str, value: float, least: float = 0.0, most: float = math.inf, *, open_ends: bool = False
) -> float:
    """Return a finite number in [least, most], or in (least, most) with `open_ends`, as float.

    >>> check_number("k", 1, 0, 1)
    1.0
    """
    finite = _is_number(value) and math.isfinite(value)
    if not (finite and (least < value < most if open_ends else least <= value <= most)):
        if most == math.inf:
            interval = f"> {least:g}" if open_ends else f">= {least:g}"
        else:
            interval = f"in ({least:g}, {most:g})" if open_ends else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{name} must be a number {interval}, got {value!r}")
    return float(value)


def check_class_indices(name: str, indices: Iterable[int]) -> tuple[int, ...]:
    """Return distinct class indices >= 0 as a tuple.

    >>> check_class_indices("exclude_classes", [0, 2])
    (0, 2)
    """
    if isinstance(indices, (int, str)):
        raise ValueError(f"{name} must be a list of class indices such as [0], got {indices!r}")
    classes = tuple(indices)
    valid = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in classes)
    if not valid or len(set(classes)) != len(classes):
        raise ValueError(f"{name} must hold distinct class indices >= 0, got {list(classes)}")
    return classes


def check_class_weights(weights: Any) -> Tensor | None:
    """Return one finite weight >= 0 for each class, not all 0, as float32 `(classes,)`; `None` stays `None`.

    >>> check_class_weights([1, 2])
    tensor([1., 2.])
    """
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
    """Return the indices of the classes that are not excluded.

    Raises:
        ValueError: an excluded class does not exist, or no class remains.

    >>> included_classes(3, excluded=(0,))
    [1, 2]
    """
    if any(index >= classes for index in excluded):
        raise ValueError(f"exclude_classes must name classes from 0 to {classes - 1}, got {list(excluded)}")
    included = [index for index in range(classes) if index not in excluded]
    if not included:
        raise ValueError(f"exclude_classes leaves no class: all {classes} are excluded")
    return included


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
