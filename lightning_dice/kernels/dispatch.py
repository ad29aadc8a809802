"""Selection of the backend that computes the sums: by device, unless one is forced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from lightning_dice.kernels import native, torch_blocked, triton_backend
from lightning_dice.kernels.backend import Backend, SumsSpec
from lightning_dice.library_internals.torch import constant_in_graphs, is_transforming

BACKENDS = {
    "native": cast(Backend, native),
    "blocked": cast(Backend, torch_blocked),
    "triton": cast(Backend, triton_backend),
}
NAMES = ("reference", *BACKENDS)
# In order of preference.
_BY_DEVICE = {"cpu": ("native", "blocked"), "cuda": ("triton",)}


def available() -> dict[str, str | None]:
    """Return the reason why each implementation cannot run here, by name; `None` if it can.

    The CPU uses `native` or else `blocked`, CUDA uses `triton`. The reference is the fallback, and the only
    implementation of second derivatives, gradients of the target or the weight, `annotated`, and, on the CPU,
    probabilities (`activation=None`).

    >>> available()["reference"] is None
    True
    """
    return {"reference": None, **{name: backend.unavailable_reason() for name, backend in BACKENDS.items()}}


@contextmanager
def forced(name: str | None, *, strict: bool = False) -> Iterator[None]:
    """Use one implementation within the context, for all sums that it supports; `None` restores the default.

    The environment variable `LIGHTNING_DICE_KERNEL` does the same for a whole process. Both apply to all threads.

    Args:
        name: a key of `available()`.
        strict: raise an error for sums that the implementation does not support, instead of using the reference.

    Raises:
        ValueError: the name is unknown, or the implementation cannot run here; gives the reason.

    >>> with forced("reference"):
    ...     pass
    """
    global _forced, _strict
    before, _forced, _strict = (_forced, _strict), _check_name(name), strict
    try:
        yield
    finally:
        _forced, _strict = before


def choose_backend(spec: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> str | None:
    """Return the name of the backend for these sums; `None` if the reference computes them."""
    if not _are_plain(logits, target, weight):
        return None
    names = _BY_DEVICE.get(logits.device.type, ()) if _forced is None else (_forced,)
    for name in names:
        if name != "reference" and _is_available(name) and BACKENDS[name].supports(spec, logits, target, weight):
            return name
    return None


def check_forced() -> None:
    """Check the implementation that is forced, perhaps by the environment.

    Raises:
        ValueError: its name is unknown, or it cannot run here; lists the names or gives the reason.

    >>> with forced("reference"):
    ...     check_forced()
    """
    _check_name(_forced)


def refuse_if_strict() -> None:
    """Raise an error instead of using the reference, if another implementation is forced with `strict=True`.

    Raises:
        ValueError: names that implementation.
    """
    if _strict and _forced != "reference":
        raise ValueError(
            f"{_forced!r} does not support these sums of these tensors: leave strict out to use the reference"
        )


def can_count_natively(classes: int, ignore_index: int | None, *tensors: Tensor) -> bool:
    """Whether the C++ kernels count these predictions and labels."""
    if _forced not in (None, "native") or torch.compiler.is_compiling():
        return False
    return _are_plain(*tensors) and _is_available("native") and native.can_count(classes, ignore_index, *tensors)


def _are_plain(*tensors: Tensor | None) -> bool:
    """Whether the memory of tensors holds all there is: no transform, tangent, subclass or lazily negated view."""
    if torch.compiler.is_compiling():
        return True
    if is_transforming() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False
    return all(
        type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not tensor.is_neg()
        for tensor in tensors
        if tensor is not None
    )


@constant_in_graphs
def _is_available(name: str) -> bool:
    if name == _forced:
        check_forced()
    return BACKENDS[name].unavailable_reason() is None


def _check_name(name: str | None) -> str | None:
    if name is None:
        return None
    if name not in NAMES:
        raise ValueError(f"the implementation of the sums must be one of {', '.join(NAMES)}, got {name!r}")
    if name != "reference" and (reason := BACKENDS[name].unavailable_reason()) is not None:
        raise ValueError(f"{name!r} cannot run here: {reason}")
    return name


# Checked at the first use, as an import should not fail and a build may take some seconds.
_forced: str | None = os.environ.get("LIGHTNING_DICE_KERNEL") or None
_strict = False
