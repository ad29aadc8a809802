"""Optional packages: which extra installs each, and the error if one is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec

from lightning_dice.text import join_all

# Extra of pyproject.toml -> the modules that it is for.
EXTRAS = {
    "volumes": ("monai", "nibabel", "einops"),
    "tiff": ("tifffile", "imagecodecs"),
    "skeletons": ("skimage",),
    "tensorboard": ("tensorboard",),
    "loggers": ("wandb", "mlflow"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "sweep": ("optuna", "hydra_plugins.hydra_joblib_launcher", "hydra_plugins.hydra_submitit_launcher"),
}


class MissingExtra(ImportError):
    """An optional package is not installed; the message tells how to install it."""


def require(*modules: str, needed_by: str) -> None:
    """Check that optional packages are installed, without importing them.

    Args:
        modules: their names in Python, such as `"skimage"`.
        needed_by: what needs them, for the message: a setting, a class or a file.

    Raises:
        MissingExtra: names what needs them, those that are missing, and how to install them.

    >>> require("torch", needed_by="DiceLoss")
    >>> require("torch", "tortch", needed_by="DiceLoss")
    Traceback (most recent call last):
    lightning_dice.extras.MissingExtra: DiceLoss needs tortch, which is not installed: pip install tortch
    """
    require_all({needed_by: modules})


def require_all(needs: Mapping[str, Iterable[str]]) -> None:
    """Check the modules that each of several things needs, as `require` does, and name all that are missing.

    >>> require_all({"data=a": ["scan"], "model=b": ["nets", "scan"]})
    Traceback (most recent call last):
    lightning_dice.extras.MissingExtra: data=a needs scan; model=b needs nets and scan: pip install nets scan
    """
    missing: dict[str, list[str]] = {}
    for needed_by, modules in needs.items():
        if lacking := [name for name in modules if not _is_installed(name)]:
            missing[needed_by] = lacking
    if not missing:
        return
    names = sorted({name for lacking in missing.values() for name in lacking})
    lines = [f"{needed_by} needs {join_all(lacking)}" for needed_by, lacking in missing.items()]
    verb = ", which is not installed" if len(lines) == len(names) == 1 else ""
    raise MissingExtra(f"{'; '.join(lines)}{verb}: {how_to_install(names)}", name=names[0])


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # The package around it is missing; it is hidden.
        return False


def how_to_install(modules: Iterable[str]) -> str:
    """Return the command that installs modules.

    >>> how_to_install(["nibabel", "tensorboard"]), how_to_install(["my_nets"])
    ("pip install 'lightning-dice[tensorboard,volumes]'", 'pip install my_nets')
    """
    modules = list(modules)
    extras = sorted({extra for extra, names in EXTRAS.items() if set(names) & set(modules)})
    others = sorted(set(modules) - {name for names in EXTRAS.values() for name in names})
    ours = [f"'lightning-dice[{','.join(extras)}]'"] if extras else []
    return " ".join(["pip install", *ours, *others])
