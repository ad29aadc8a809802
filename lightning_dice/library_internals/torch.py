"""Internals of torch, read in torch 2.14.1."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from lightning_dice.library_internals import internal, set_internal

Function = TypeVar("Function", bound=Callable[..., Any])
Module = TypeVar("Module", bound=nn.Module)


def constant_in_graphs(function: Function) -> Function:
    """Mark a function whose result `torch.compile` may take for a constant (`_dynamo_marked_constant`).

    `torch.compiler.assume_constant_result` does the same, but imports `torch._dynamo`, which takes a second.

    >>> @constant_in_graphs
    ... def answer():
    ...     return 42
    >>> answer()
    42
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch or instance norm of any kind (`torch.nn.modules.batchnorm._NormBase`).

    >>> is_batch_norm(nn.SyncBatchNorm(4)), is_batch_norm(nn.GroupNorm(2, 4))
    (True, False)
    """
    return isinstance(module, internal("torch.nn.modules.batchnorm", "_NormBase", "torch"))


def original_module(module: Any) -> Any:
    """Return the module within one that `torch.compile` returned (`OptimizedModule._orig_mod`), or `module` itself."""
    return getattr(module, "_orig_mod", module)


def original_name(name: str) -> str:
    """Remove what `torch.compile` adds to the names of parameters and submodules.

    >>> original_name("net._orig_mod.weight")
    'net.weight'
    """
    return name.replace("_orig_mod.", "")


def copy_without_hooks(module: Module) -> Module:
    """Return a deep copy of a module without its forward hooks (`_forward_hooks`, `_forward_pre_hooks`).

    Hooks of a profiler cannot be copied.
    """
    names = ("_forward_hooks", "_forward_pre_hooks")
    hooks = [(part, name, internal(part, name, "torch")) for part in module.modules() for name in names]
    try:
        for part, name, _ in hooks:
            set_internal(part, name, OrderedDict(), "torch")
        return copy.deepcopy(module)
    finally:
        for part, name, own in hooks:
            set_internal(part, name, own, "torch")


def without_compiled_names(module: nn.Module) -> None:
    """Give a module's state the names of its parameters before `torch.compile`, and load states with either names.

    `torch.compile` inserts `_orig_mod` into the names of what is within the module that it returns.
    """
    module.register_state_dict_post_hook(_save_original_names)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_load_either_names)  # type: ignore[no-untyped-call]


def _save_original_names(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for key in [key for key in state if key.startswith(prefix) and "_orig_mod." in key]:
        state[prefix + original_name(key[len(prefix) :])] = state.pop(key)


def _load_either_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    compiled = {name for name, _ in module.named_modules() if name.endswith("_orig_mod")}
    for key in [key for key in state if key.startswith(prefix)]:
        own: list[str] = []
        for part in original_name(key[len(prefix) :]).split("."):
            own += [part]
            while ".".join([*own, "_orig_mod"]) in compiled:
                own += ["_orig_mod"]
        name = prefix + ".".join(own)
        if name != key:
            state[name] = state.pop(key)


def sequence_parts(scheduler: SequentialLR) -> list[tuple[LRScheduler, int]]:
    """Return the schedules of a sequence, and the steps at which they start (`_schedulers`, `_milestones`)."""
    parts = internal(scheduler, "_schedulers", "torch")
    return list(zip(parts, [0, *internal(scheduler, "_milestones", "torch")], strict=True))


def is_compiled_in_place(module: nn.Module) -> bool:
    """Return whether `module.compile()` has been called (`Module._compiled_call_impl`)."""
    return internal(module, "_compiled_call_impl", "torch") is not None


def foreach_lerp_(tensors: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Move each tensor towards its end, in place and in few kernels (`torch._foreach_lerp_`).

    >>> import torch
    >>> start = torch.zeros(2)
    >>> foreach_lerp_([start], [torch.ones(2)], 0.25)
    >>> start
    tensor([0.2500, 0.2500])
    """
    internal("torch", "_foreach_lerp_", "torch")(tensors, ends, weight)


def foreach_copy_(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Copy values into tensors, in few kernels (`torch._foreach_copy_`)."""
    internal("torch", "_foreach_copy_", "torch")(tensors, values)


def is_transforming() -> bool:
    """Return whether a transform of `torch.func`, or a level of forward-mode differentiation, is active.

    Reads `torch._C._are_functorch_transforms_active` and `torch.autograd.forward_ad._current_level`.

    >>> is_transforming()
    False
    """
    are_active, forward_mode = _transforms()
    return are_active() or forward_mode._current_level >= 0


@cache  # Asked at each step.
def _transforms() -> tuple[Callable[[], bool], Any]:
    internal("torch.autograd.forward_ad", "_current_level", "torch")
    return internal("torch", "_C._are_functorch_transforms_active", "torch"), forward_ad


def is_vmapped(tensor: Tensor) -> bool:
    """Return whether a tensor has an axis that `torch.func.vmap` hides, at any level of nested transforms.

    Reads `is_batchedtensor`, `is_functorch_wrapped_tensor` and `get_unwrapped` of `torch._C._functorch`.

    >>> import torch
    >>> is_vmapped(torch.zeros(2))
    False
    """
    if not is_transforming():
        return False
    functorch = internal("torch", "_C._functorch", "torch")
    while internal(functorch, "is_functorch_wrapped_tensor", "torch")(tensor):
        if internal(functorch, "is_batchedtensor", "torch")(tensor):
            return True
        tensor = internal(functorch, "get_unwrapped", "torch")(tensor)
    return False


def storage_id(tensor: Tensor) -> int:
    """Return a number that identifies a living storage, also on the meta device (`UntypedStorage._cdata`).

    >>> import torch
    >>> tensor = torch.empty(4, device="meta")
    >>> storage_id(tensor) == storage_id(tensor[:2])
    True
    """
    return int(internal(tensor.untyped_storage(), "_cdata", "torch"))


@contextmanager
def unspecialized_sizes() -> Iterator[None]:
    """Export graphs that hold for axes of 1 and multiples of the divisor too, which torch otherwise specializes.

    Sets `torch.fx.experimental._config.backed_size_oblivious`, which torch 2.6 does not have; there it does nothing.
    """
    config = internal("torch.fx.experimental", "_config", "torch")
    name = "backed_size_oblivious"
    before = getattr(config, name, None)
    if before is None:
        yield
        return
    set_internal(config, name, True, "torch")
    try:
        yield
    finally:
        set_internal(config, name, before, "torch")
