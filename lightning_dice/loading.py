"""Trained modules from a run's folder or an exported file, and objects from plain configs, without Hydra."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

from lightning_dice.inference import PostProcessing, find_postprocessing
from lightning_dice.inference.input_normalization import InputNormalization
from lightning_dice.renamed_settings import refuse_old_config

Module = TypeVar("Module")

# What the config of a safetensors file may call.
TRUSTED = (
    *(f"lightning_dice.{room}" for room in ("inference", "losses", "metrics", "models", "module")),
    *("monai.losses", "monai.networks.nets", "segmentation_models_pytorch"),
    *("torch.nn", "torchmetrics", "torchvision.models", "torchvision.transforms.v2", "lightning_dice.data.transforms"),
)

# Settings that fetch pretrained weights. Those of the checkpoint replace them at once, and a trained model must load on
# a machine without a network, or with another one's cache.
_PRETRAINED = ("encoder_weights", "weights_backbone", "pretrained")

_DIRECTIVES = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


def load_run(
    folder: str | Path,
    checkpoint: str = "best",
    *,
    kind: type[Module],
    map_location: Any = "cpu",
    calibration: str | Path = "auto",
) -> Module:
    """Load the module of a run; see `SegmentationModule.from_run`, which calls this.

    Args:
        folder: the run's folder.
        checkpoint: as in `from_run`, like the arguments after `kind`.
        kind: the class that the module must be an instance of.
        map_location: the device of the weights, as in `torch.load`.
        calibration: as in `from_run`.

    Raises:
        FileNotFoundError: the folder, the checkpoint or the calibration does not exist.
        ValueError: the checkpoint was not written by `fit` or holds a module of another class, or the calibration
            does not fit.
    """
    path = _find_checkpoint(Path(folder).expanduser(), checkpoint)
    module: Any = load_checkpoint(path, kind=kind, map_location=map_location)
    module.calibrate(find_postprocessing(folder, calibration, path))
    loaded: Module = module.eval()
    return loaded


def load_checkpoint(path: Path, *, kind: type[Module], map_location: Any = "cpu", strict: bool = True) -> Module:
    """Load the module of a checkpoint that `fit` has written.

    Args:
        path: the checkpoint.
        kind: as in `load_run`, as is `map_location`.
        map_location: see `kind`.
        strict: refuse weights that are missing or unexpected.

    Raises:
        ValueError: the checkpoint was not written by `fit`, or holds a module of another class.
    """
    saved = torch.load(path, map_location=map_location, weights_only=True)
    config = saved.get("config") if isinstance(saved, dict) else None
    if not isinstance(config, dict) or "module" not in config or "state_dict" not in saved:
        raise ValueError(
            f"{path} is not a checkpoint that fit has written: it holds no config of a module; give "
            "load_from_checkpoint the network, net=..., and what else is needed to make the module"
        )
    refuse_old_config(config, path)
    module = _build_kind(config["module"], kind, path)
    module.load_state_dict(saved["state_dict"], strict=strict)
    data = config.get("data", {})
    module.input_normalization = _input_normalization(
        config.get("normalize"), data.get("normalization"), data.get("max_value")
    )
    if isinstance(map_location, (str, torch.device)):
        module.to(map_location)
    loaded: Module = module
    return loaded


def load_safetensors(
    path: str | Path, *, kind: type[Module], map_location: str = "cpu", trusted: Sequence[str] = ()
) -> Module:
    """Load the module of an exported file; see `SegmentationModule.from_safetensors`, which calls this.

    Args:
        path: the file.
        kind: the class that the module must be an instance of.
        map_location: the device of the weights.
        trusted: packages or modules whose classes may be called besides `TRUSTED`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not such a file, or its config calls something that is not trusted.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(path).expanduser(), framework="pt", device=map_location) as file:
            metadata = json.loads((file.metadata() or {}).get("lightning_dice") or "{}")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a mapping)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    config = metadata.get("module")
    if not isinstance(config, dict):
        raise ValueError(f"{path} was not written by lightning_dice.export: its header holds no config of a module")
    refuse_old_config({"module": config}, path)
    try:
        check_targets(config, (*TRUSTED, *trusted))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; add what you trust with trusted=[...]") from error
    module = _build_kind(config, kind, path)
    module.load_state_dict(weights)
    names = {field.name for field in dataclasses.fields(PostProcessing)}
    settings = {name: value for name, value in metadata["postprocessing"].items() if name in names}
    module.calibrate(PostProcessing(**settings))
    normalization = metadata.get("normalization") or {}
    transform, intensities = normalization.get("transform"), normalization.get("intensities")
    try:
        check_targets(transform, (*TRUSTED, *trusted))
    except ValueError:
        # The weights are of use without it.
        transform, intensities = None, str(transform and transform.get("_target_"))
    module.input_normalization = _input_normalization(transform, intensities)
    loaded: Module = module.to(map_location).eval()
    return loaded


def _find_checkpoint(folder: Path, checkpoint: str) -> Path:
    checkpoints = folder / "checkpoints"
    path = checkpoints / f"{checkpoint}.ckpt" if checkpoint in ("best", "last") else folder / checkpoint
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must be a run's folder, got {folder}, which does not exist")
    if not path.is_file():
        found = ", ".join(sorted(file.name for file in checkpoints.glob("*.ckpt"))) or "nothing"
        raise FileNotFoundError(f"{path} does not exist; {checkpoints} holds {found}")
    return path


def build_module(config: Mapping[str, Any]) -> Any:
    """Return the module that the config of a trained one describes, without fetching pretrained weights.

    Args:
        config: plain values, the entry `module` of a run's config.
    """
    return build(without_pretrained(config))


def _build_kind(config: Mapping[str, Any], kind: type, path: object) -> Any:
    module = build_module(config)
    if not isinstance(module, kind):
        raise ValueError(f"{path} holds a {type(module).__name__}, not a {kind.__name__}")
    return module


def _input_normalization(
    transform: Any, intensities: str | list[str] | None, max_value: float | None = None
) -> InputNormalization:
    """Return the normalization of a config; only the data's reader knows `intensities`, those of volumes."""
    return InputNormalization(build(transform) if transform and not intensities else None, max_value, intensities)


def build(config: Any) -> Any:
    """Return the object that a resolved config describes, as `hydra.utils.instantiate` does.

    Args:
        config: plain values. A mapping with `_target_`, a dotted name, is replaced by what that returns when called
            with the other entries, each built first; with `_partial_` by a `functools.partial` of it. `_args_` are
            positional arguments.

    Raises:
        ImportError: a target does not exist.

    >>> build({"_target_": "fractions.Fraction", "_args_": [3, {"_target_": "int", "_args_": ["4"]}]})
    Fraction(3, 4)
    >>> build({"_target_": "int", "_partial_": True, "base": 2})("101")
    5
    """
    if isinstance(config, Mapping):
        if "_target_" not in config:
            return {key: build(value) for key, value in config.items()}
        build_value: Callable[[Any], Any] = build if config.get("_recursive_") is not False else lambda value: value
        arguments = {key: build_value(value) for key, value in config.items() if key not in _DIRECTIVES}
        positional = [build_value(value) for value in config.get("_args_", [])]
        target = locate(config["_target_"])
        return (
            partial(target, *positional, **arguments) if config.get("_partial_") else target(*positional, **arguments)
        )
    return [build(value) for value in config] if isinstance(config, (list, tuple)) else config


def locate(name: str) -> Any:
    """Return the object of a dotted name, from the longest module that exists, or a built-in.

    Raises:
        ImportError: there is no such object; the message names the part that is missing.

    >>> locate("fractions.Fraction.from_float")(0.5)
    Fraction(1, 2)
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
                raise  # The module exists, but something that it imports does not.
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
    """Check that a config from elsewhere calls only what is trusted: `build` imports and calls whatever it names.

    Args:
        config: plain values, as for `build`.
        trusted: packages or modules, with everything defined in them: `"torch.nn"`. What they import from elsewhere is
            not trusted.

    Raises:
        ValueError: names the first target that is defined elsewhere.

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
    """Return a config whose networks do not fetch pretrained weights.

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
