"""Internals of Lightning, torch, torchmetrics and Hydra: the package uses them through these modules only.

Any release of these libraries may rename or remove an internal without notice. Here each one is a small function that
names where it was read, fails with a clear error where it is missing, and has a test of its own
(`tests/test_library_internals.py`). There is one module per library, so that `--help`, which needs Hydra's, does not
import torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

# Library -> the release whose source was read, and the releases that pyproject.toml allows.
LIBRARIES = {
    "lightning": ("2.6.6", ">=2.6,<2.7"),
    "torch": ("2.14.1", ">=2.6"),
    "torchmetrics": ("1.9.0", ">=1.6,<1.10"),
    "hydra-core": ("1.3.8", ">=1.3.2,<1.4"),
}


class MissingInternalError(RuntimeError):
    """The installed release of a library lacks an internal that this package uses.

    Args:
        name: the internal, such as `"Trainer.fit_loop._results"`.
        library: name of the distribution, a key of `LIBRARIES`.
    """

    def __init__(self, name: str, library: str) -> None:
        read_in, supported = LIBRARIES[library]
        super().__init__(
            f"{library} {version(library)} has no {name}, an internal that lightning-dice uses; it was read in "
            f"{library} {read_in}: install '{library}{supported}'"
        )


def internal(owner: Any, path: str, library: str) -> Any:
    """Return an internal attribute of a library's object or module.

    Args:
        owner: object or class of the library, or the full name of a module, which is imported.
        path: attribute names below `owner`, separated by dots.
        library: name of the distribution, a key of `LIBRARIES`.

    Raises:
        MissingInternalError: an attribute of the path is missing.

    >>> internal("hydra.utils", "_renamed", "hydra-core")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    lightning_dice.library_internals.MissingInternalError: hydra-core ... has no hydra.utils._renamed, an internal \
that lightning-dice uses; it was read in hydra-core 1.3.8: install 'hydra-core>=1.3.2,<1.4'
    """
    name = owner if isinstance(owner, str) else getattr(owner, "__name__", type(owner).__name__)
    try:
        value = import_module(owner) if isinstance(owner, str) else owner
        for attribute in path.split("."):
            value = getattr(value, attribute)
    except (AttributeError, ImportError) as error:
        raise MissingInternalError(f"{name}.{path}", library) from error
    return value


def set_internal(owner: Any, path: str, value: Any, library: str) -> None:
    """Set an internal attribute of a library's object; the arguments and the error are those of `internal`.

    Raises:
        MissingInternalError: the attribute does not exist, so that nothing would read what is set.
    """
    internal(owner, path, library)
    *parents, name = path.split(".")
    setattr(internal(owner, ".".join(parents), library) if parents else owner, name, value)
