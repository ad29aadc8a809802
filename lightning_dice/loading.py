"""Objects from the plain values in which a run keeps its config, without Hydra."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

# What a file from elsewhere may call.
_TRUSTED = (
    *(f"lightning_dice.{room}" for room in ("inference", "losses", "metrics", "models", "module")),
    *("monai.losses", "monai.networks.nets", "segmentation_models_pytorch"),
    *("torch.nn", "torchmetrics", "torchvision.models", "torchvision.transforms.v2", "lightning_dice.data.transforms"),
)


# Settings that fetch pretrained weights, which those of a checkpoint replace at once: a machine without a network, or
# another one's cache, must not keep a trained model from being read.
_PRETRAINED = ("encoder_weights", "weights_backbone", "pretrained")


def build(config: Any) -> Any:
    """The object that a resolved config describes, as `hydra.utils.instantiate` makes it.

    Args:
        config: plain values. A mapping with `_target_`, a dotted name, stands for what that returns of the other
            entries, each built first; with `_partial_` it is not called but waits for further arguments; `_args_` are
            positional arguments.

    Raises:
        ImportError: there is nothing by the name of a target.

    >>> build({"_target_": "fractions.Fraction", "_args_": [3, {"_target_": "int", "_args_": ["4"]}]})
    Fraction(3, 4)
    >>> build({"_target_": "int", "_partial_": True, "base": 2})("101")
    5
    """
    if isinstance(config, Mapping):
        if "_target_" not in config:
            return {key: build(value) for key, value in config.items()}
        made: Callable[[Any], Any] = _as_it_is if config.get("_recursive_") is False else build
        arguments = {key: made(value) for key, value in config.items() if not _is_directive(key)}
        positional = [made(value) for value in config.get("_args_", [])]
        target = locate(config["_target_"])
        return (
            partial(target, *positional, **arguments) if config.get("_partial_") else target(*positional, **arguments)
        )
    return [build(value) for value in config] if isinstance(config, (list, tuple)) else config


def locate(name: str) -> Any:
    """What stands under a dotted name, in the longest module that there is, or among the built-ins.

    Raises:
        ImportError: there is nothing by this name; says which part is missing.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
                raise  # The module is there, and imports what is not.
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                raise ImportError(f"{module} has no {'.'.join(parts[length:])}, for the target {name}")
            found = getattr(found, part)
        return found
    builtins = import_module("builtins")
    if hasattr(builtins, name):
        return getattr(builtins, name)
    raise ImportError(f"there is no module {parts[0]}, for the target {name}")


def check_targets(config: Any, trusted: Iterable[str]) -> None:
    """See that a config from elsewhere names nothing but what it may: `build` imports and calls whatever it says.

    Args:
        config: plain values, as for `build`.
        trusted: packages or modules, with all that is defined in them: `"torch.nn"`. What one of them has imported from
            elsewhere is not.

    Raises:
        ValueError: names the first target that lies elsewhere.

    >>> check_targets({"_target_": "fractions.Fraction", "_args_": [1, 2]}, ["fractions"])
    >>> check_targets({"net": {"_target_": "fractions.sys.exit"}}, ["fractions"])
    Traceback (most recent call last):
    ValueError: the config calls fractions.sys.exit, which is not in fractions
    """
    places = tuple(trusted)

    def within(name: str) -> bool:
        return any(name == place or name.startswith(f"{place}.") for place in places)

    if isinstance(config, Mapping):
        if "_target_" in config:
            name = str(config["_target_"])
            # By the package first, as importing runs code too; then by where it is defined.
            known = name.partition(".")[0] in {place.partition(".")[0] for place in places}
            home = getattr(locate(name), "__module__", None) if known else None
            if not within(str(home)):
                raise ValueError(f"the config calls {name}, which is not in {', '.join(places)}")
        for value in config.values():
            check_targets(value, places)
    elif isinstance(config, (list, tuple)):
        for value in config:
            check_targets(value, places)


def without_pretrained(config: Any) -> Any:
    """The same config, whose networks fetch no pretrained weights.

    >>> without_pretrained({"_target_": "x.Unet", "encoder_weights": "imagenet", "classes": 1})
    {'_target_': 'x.Unet', 'encoder_weights': None, 'classes': 1}
    """
    if isinstance(config, Mapping):
        names = (*_PRETRAINED, "weights") if str(config.get("_target_")).startswith("torchvision.") else _PRETRAINED
        return {
            key: (False if value is True else None)
            if key in names and (value is True or isinstance(value, str))
            else without_pretrained(value)
            for key, value in config.items()
        }
    return [without_pretrained(value) for value in config] if isinstance(config, (list, tuple)) else config


def _as_it_is(value: Any) -> Any:
    return value


def _is_directive(key: Any) -> bool:
    return key in ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
