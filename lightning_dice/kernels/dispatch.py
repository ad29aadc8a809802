"""Which implementation of the sums does the work: by device, in this one place, unless it is forced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from lightning_dice.kernels import native, torch_blocked, triton_backend
from lightning_dice.kernels.backend import Backend, SumsSpec
from lightning_dice.library_internals.torch import is_transform_wrapper

TWINS = {
    "native": cast(Backend, native),
    "blocked": cast(Backend, torch_blocked),
    "triton": cast(Backend, triton_backend),
}
NAMES = ("reference", *TWINS)
# The first that can does the work.
_BY_DEVICE = {"cpu": ("native", "blocked"), "cuda": ("triton",)}


def available() -> dict[str, str | None]:
    """Each implementation by name, with the reason why it cannot run here; `None`: it can.

    On the CPU the sums are done by the first of `native` and `blocked` that can, on CUDA by `triton`, and by the
    reference where neither can, as well as for what only the reference does: a second derivative, a gradient of the
    target or of the weight, `annotated`, probabilities (`activation=None`).

    >>> available()["reference"] is None
    True
    """
    return {"reference": None, **{name: twin.missing() for name, twin in TWINS.items()}}


@contextmanager
def forced(name: str | None, *, strict: bool = False) -> Iterator[None]:
    """Have one implementation do the sums, for what it can do, while the context lasts; `None`: as by default.

    The environment variable `LIGHTNING_DICE_KERNEL` does the same for a whole process. Both hold for all threads.

    Args:
        name: of the implementation.
        strict: refuse what the implementation cannot do, instead of leaving it to the reference.

    Raises:
        ValueError: an unknown name, or an implementation that cannot run here, with the reason.

    >>> with forced("reference"):
    ...     pass
    """
    global _forced, _strict
    before, _forced, _strict = (_forced, _strict), _checked(name), strict
    try:
        yield
    finally:
        _forced, _strict = before


def chosen(work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> str | None:
    """The name of the twin that does this work; `None`: the reference does."""
    if not _lies_in_memory(logits, target, weight):
        return None
    names = _BY_DEVICE.get(logits.device.type, ()) if _forced is None else (_forced,)
    for name in names:
        if name != "reference" and _usable(name) and TWINS[name].takes(work, logits, target, weight):
            return name
    return None


def check_forced() -> None:
    """Refuse an implementation, named in the environment perhaps, that is not known or cannot run here.

    Raises:
        ValueError: names what there is, or the reason.
    """
    _checked(_forced)


def refuse_if_strict() -> None:
    """Called where the reference does the work: raise if another was to, and no other.

    Raises:
        ValueError: names it.
    """
    if _strict and _forced != "reference":
        raise ValueError(f"{_forced!r} cannot do these sums, on these tensors: the reference would have to")


def native_counts(classes: int, ignore_index: int | None, *tensors: Tensor) -> bool:
    """Whether the C++ kernels count what these tensors hold."""
    if _forced not in (None, "native") or torch.compiler.is_compiling():
        return False
    return _lies_in_memory(*tensors) and _usable("native") and native.can_count(classes, ignore_index, *tensors)


def _lies_in_memory(*tensors: Tensor | None) -> bool:
    """Whether tensors are what their memory says: no subclass, no wrapper of a transform, no view with a sign."""
    if torch.compiler.is_compiling():
        return True
    return not torch.jit.is_tracing() and all(  # type: ignore[attr-defined,no-untyped-call]
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_neg()
        and not is_transform_wrapper(tensor)
        for tensor in tensors
        if tensor is not None
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _usable(name: str) -> bool:
    if name == _forced:
        check_forced()
    return TWINS[name].missing() is None


def _checked(name: str | None) -> str | None:
    if name is None:
        return None
    if name not in NAMES:
        raise ValueError(f"the implementations of the sums are {', '.join(NAMES)}, got {name!r}")
    if name != "reference" and (why := TWINS[name].missing()) is not None:
        raise ValueError(f"{name!r} cannot run here: {why}")
    return name


# Checked at the first use: an import should not fail, and a build may take some seconds.
_forced: str | None = os.environ.get("LIGHTNING_DICE_KERNEL") or None
_strict = False
