"""Every class that ignores a label refuses one that no mask can hold, which would ignore the wrong pixels or none."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
from torch import nn

import lightning_dice
from lightning_dice.data import SyntheticSource

# What a constructor needs besides the label, by the name of its argument.
NEEDED = {
    "activation": "softmax",
    "classes": ["background", "cell"],
    "folder": "no/folder",
    "loss": nn.SmoothL1Loss(),
    "patch_size": (8, 8),
    "root": "no/folder",
    "source": SyntheticSource(),
    "values": ((0,), (1,)),
}
OTHERS = {
    "Calibrator": {"classes": 2},
    "NnunetSource": {"dataset_json": {"labels": {"background": 0, "cell": 1}, "channel_names": ["CT"]}},
}
# They get a label that another class has checked.
INTERNAL = {"MetricInputs", "ThumbnailSettings", "Task"}
# Settings of a command line, where a number may be a text.
MAY_BE_TEXT = {"MaskFormat"}


def arguments(maker: Any) -> dict[str, bool]:
    """Return whether a call needs each argument, by name."""
    try:
        parameters = inspect.signature(maker).parameters
    except ValueError:  # A class written in C, or of named texts.
        return {}
    return {name: parameter.default is parameter.empty for name, parameter in parameters.items()}


def makers() -> Iterator[Any]:
    """Yield every public class with an argument `ignore_index`."""
    for found in pkgutil.walk_packages(lightning_dice.__path__, "lightning_dice."):
        if found.name.rpartition(".")[2] in ("__main__", "run_onnx") or ".kernels" in found.name:
            continue
        module = import_module(found.name)
        for name, maker in vars(module).items():
            own = inspect.isclass(maker) and maker.__module__ == found.name and not name.startswith("_")
            if own and name not in INTERNAL and "ignore_index" in arguments(maker):
                yield maker


@pytest.mark.parametrize("maker", list(makers()), ids=lambda maker: maker.__name__)
def test_a_label_is_an_integer(maker: Any) -> None:
    settings = {name: value for name, value in NEEDED.items() if arguments(maker).get(name)}
    settings |= OTHERS.get(maker.__name__, {})
    for label in (None, 255):
        maker(**settings, ignore_index=label)
    for label in (True, 1.5, "cell", *(() if maker.__name__ in MAY_BE_TEXT else ("255", 255.0))):
        with pytest.raises(ValueError, match=r"ignore_index must .*, got"):
            maker(**settings, ignore_index=label)


def test_the_classes_are_found() -> None:
    names = {maker.__name__ for maker in makers()}
    assert {"DiceLoss", "DiceScore", "CaseTable", "CollapseGuard", "InputCheck", "Overlays"} <= names
