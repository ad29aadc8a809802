"""Hydra helpers for the commands: config location, resolvers, overrides, instantiation."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_dice.cli.errors import UserError
from lightning_dice.extras import EXTRAS, MissingExtra, how_to_install
from lightning_dice.library_internals.hydra import parse_override, parse_overrides
from lightning_dice.renamed_settings import new_name

_EXAMPLE = "trainer.max_epochs=20"
_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel conf/ is inside the package, in a checkout beside it.
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


# Hands the run to the processes that Lightning starts for the other devices of this machine. They take the resolved
# config from it instead of composing one from a command line that may hold a sweep.
RUN_VARIABLE = "LIGHTNING_DICE_RUN"


def register_resolvers() -> None:
    """Register the resolvers that conf/ uses.

    - `${length:<list>}`: its length; the number of classes from their names.
    - `${remaining:<total>,<first>}`: the epochs left after a warm-up, at least 1, so that a run that ends before
      its warm-up has a schedule too.
    - `${first:<a>,<b>}`: the first value that is not null.
    - `${nnunet:<folder>,<key>}`: an entry of an nnU-Net data set's dataset.json.
    - `${labels:<labels>,<key>}`: a setting that follows from nnU-Net's labels, such as `classes`.
    """
    OmegaConf.register_new_resolver("length", len, replace=True)
    OmegaConf.register_new_resolver("first", _first, replace=True)
    OmegaConf.register_new_resolver("remaining", lambda total, first: max(1, total - first), replace=True)
    OmegaConf.register_new_resolver("nnunet", _nnunet, replace=True)
    OmegaConf.register_new_resolver("labels", _labels, replace=True)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _nnunet(root: str, fact: str) -> Any:
    from lightning_dice.data.volumes.nnunet import read_dataset_json

    return _node(read_dataset_json(root)[fact])


def _labels(labels: Any, fact: str) -> Any:
    from lightning_dice.data.volumes.nnunet import settings_from_labels

    plain = OmegaConf.to_container(labels) if isinstance(labels, DictConfig) else labels
    return _node(settings_from_labels(cast("dict[str, Any]", plain))[fact])


def _node(value: Any) -> Any:
    """Wrap a list or dict for OmegaConf, as `OmegaConf.resolve` requires."""
    return OmegaConf.create(value) if isinstance(value, (dict, list)) else value


def resolve_from_files(config: DictConfig) -> None:
    """Replace interpolations that read files of the data by their values, so that a run does not need the files later.

    Raises:
        UserError: a file cannot be read.
    """
    data = config.get("data")
    raw = OmegaConf.to_container(data, resolve=False) if isinstance(data, DictConfig) else {}
    for key, value in raw.items() if isinstance(raw, dict) else ():
        if isinstance(value, str) and value.startswith("${nnunet:"):
            try:
                found = data[key]
            except (OmegaConfBaseException, ValueError) as error:
                # OmegaConf wraps the resolver's error several times.
                cause: BaseException = error
                while isinstance(cause, OmegaConfBaseException) and cause.__context__ is not None:
                    cause = cause.__context__
                missing = re.search(r"Missing mandatory value: (\S+)", str(error))
                message = f"{missing[1]} has no value: give {missing[1]}=..." if missing else str(cause).splitlines()[0]
                raise UserError(message) from error
            data[key] = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def explain_typos(name: str, arguments: Iterable[str]) -> None:
    """Print the settings that exist, after Hydra has refused an override of one that does not."""
    # Within a command Hydra is initialized already.
    ready = GlobalHydra.instance().is_initialized()
    # Only a hint behind Hydra's own error: it must not raise another one.
    with (
        suppress(Exception),
        nullcontext() if ready else hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"),
    ):
        overrides = parse_overrides(a for a in arguments if not a.startswith("-"))
        chosen = [o for o in overrides if (CONF_DIR / str(o.key_or_group)).is_dir() and o.input_line]
        for choice in chosen:
            names = sorted(path.stem for path in (CONF_DIR / choice.key_or_group).glob("*.yaml"))
            value = str(choice.value())
            if value not in names and (close := difflib.get_close_matches(value, names, 1)):
                print(f"there is no {choice.key_or_group}={value}; did you mean {close[0]}?", file=sys.stderr)
        groups = [o.input_line for o in chosen if o.input_line]
        config = hydra.compose(name, overrides=groups)
        for override in {override.key_or_group: override for override in overrides}.values():
            if override.is_add() or override.package is not None:
                continue  # It may name a new setting.
            parent, _, leaf = override.key_or_group.rpartition(".")
            place = OmegaConf.select(config, parent) if parent else config
            names = [str(key) for key in place] if isinstance(place, DictConfig) else []  # `in` skips ???.
            if names and leaf not in names and not (CONF_DIR / leaf).is_dir():
                close = difflib.get_close_matches(leaf, names, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                hint = f"; {new} is the new name" if (new := new_name(override.key_or_group)) else hint
                print(f"{parent or 'the config'} has {', '.join(names)}{hint}", file=sys.stderr)


@contextmanager
def restore_environment() -> Iterator[None]:
    """Restore the environment variables that a run sets, so that the next run of a sweep does not see them."""
    before = dict(os.environ)
    try:
        yield
    finally:
        # With the last run's LOCAL_RANK, Lightning would take this process for a child and wait for a parent.
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", RUN_VARIABLE):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def compose(name: str, overrides: Iterable[str]) -> DictConfig:
    """Compose a config other than the command's own.

    Raises:
        UserError: Hydra refuses an override.
    """
    try:
        return hydra.compose(name, overrides=list(overrides))
    except HydraException as error:
        explain_typos(name, overrides)
        raise UserError(str(error).splitlines()[0]) from error


def force_known(argument: str) -> str:
    """Let `+` name a setting of the Trainer or a callback that conf/ has already, as older command lines do.

    Arguments of the Trainer that conf/ does not have need no `+`.

    >>> force_known("+trainer.fast_dev_run=true"), force_known("trainer.inference_mode=true"), force_known("+new=1")
    ('++trainer.fast_dev_run=true', '++trainer.inference_mode=true', '+new=1')
    """
    key = argument.partition("=")[0].removeprefix("+")
    if key in _MORE_OF_TRAINER and not argument.startswith("+"):
        return f"++{argument}"
    known = argument.startswith("+") and (key in _trainer_settings() or key in _callback_settings())
    return f"+{argument}" if known else argument


# Arguments of the Trainer that are not in conf/trainer/default.yaml, and work.
_MORE_OF_TRAINER = frozenset(
    f"trainer.{name}"
    for name in (
        *("benchmark", "sync_batchnorm", "inference_mode", "use_distributed_sampler"),
        *("reload_dataloaders_every_n_epochs", "limit_predict_batches"),
        *("enable_progress_bar", "enable_checkpointing", "enable_model_summary"),
    )
)


@cache
def _trainer_settings() -> frozenset[str]:
    config = OmegaConf.load(CONF_DIR / "trainer" / "default.yaml")
    return frozenset(f"trainer.{key}" for key in map(str, config)) | _MORE_OF_TRAINER


@cache
def _callback_settings() -> frozenset[str]:
    files = [OmegaConf.load(path) for path in sorted((CONF_DIR / "callbacks").glob("*.yaml"))]
    return frozenset(
        f"callbacks.{name!s}.{key!s}"
        for file in files
        if isinstance(file, DictConfig)
        for name, callback in file.items_ex(resolve=False)
        if isinstance(callback, DictConfig)
        for key in callback
    )


def apply_overrides(config: DictConfig, overrides: Iterable[str]) -> None:
    """Apply overrides to a config that is composed already: `trainer.max_epochs=20`, `+trainer.fast_dev_run=true`.

    Raises:
        UserError: the key does not exist, or the override chooses another file of a group, which is possible only
            when a run starts.
    """
    OmegaConf.set_struct(config, True)
    for text in overrides:
        try:
            override = parse_override(text)
            key, value = override.key_or_group, override.value()
            group = isinstance(OmegaConf.select(config, key), DictConfig) and isinstance(value, str)
            if override.is_delete() or override.is_sweep_override() or group:
                raise UserError(f"{text}: only values of this run's config can be changed, as in {_EXAMPLE}")
            parent, _, leaf = key.rpartition(".")
            place = OmegaConf.select(config, parent) if parent else config
            if not isinstance(place, DictConfig) or not (
                override.is_add() or leaf in list(place.keys()) or key in _trainer_settings()
            ):
                if (CONF_DIR / key.replace(".", "/")).is_dir():
                    raise UserError(f"{text}: only a new run can choose a file; change values, as in {_EXAMPLE}")
                if (new := new_name(key)) is not None:
                    raise UserError(f"{key} has been renamed: give {new}")
                names = [str(name) for name in place] if isinstance(place, DictConfig) else []
                close = difflib.get_close_matches(leaf, names, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise UserError(f"{text}: {parent or 'the config'} has no {leaf}, only {', '.join(names)}{hint}")
            # A merge would keep the old entries of a map.
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"{text}: {str(error).splitlines()[0]}") from error


_LOCATING = re.compile(r"Error locating target '([^']+)'")


def _import_problem(target: str, cause: BaseException) -> str:
    """Say why the module of a target cannot be imported, or what it lacks."""
    if not isinstance(cause, ModuleNotFoundError) or cause.name is None:
        return str(cause) if isinstance(cause, ImportError) else f"{type(cause).__name__}: {cause}"
    parent = cause.name.rpartition(".")[0]
    if parent and target.startswith(cause.name) and parent in sys.modules:
        return f"{parent} has no {cause.name.rpartition('.')[2]}"
    package = cause.name.partition(".")[0]
    if any(package in modules for modules in EXTRAS.values()):
        return f"{cause}; {how_to_install([package])}"
    if target.partition(".")[0] == cause.name:
        return f"{cause}; a file of your own must be in the folder where you start the command, or be installed"
    return f"{cause}, which it imports"


def refuse_words(config: Mapping[str, Any], what: str) -> None:
    """Refuse text where a target takes a number: many callbacks notice it late, or never.

    Args:
        config: with `_target_`.
        what: its name, for the message.

    Raises:
        UserError: names the setting.

    >>> refuse_words({"_target_": "lightning.pytorch.callbacks.EarlyStopping", "patience": "ten"}, "callbacks.stop")
    Traceback (most recent call last):
    lightning_dice.cli.errors.UserError: callbacks.stop.patience must be a number, got ten
    """
    try:
        parameters = inspect.signature(hydra.utils.get_object(str(config.get("_target_")))).parameters
    except Exception:  # Of any type; instantiating it explains what is wrong.
        return
    for name, value in config.items():
        if isinstance(value, str) and name in parameters and _takes_a_number(parameters[name]):
            raise UserError(f"{what}.{name} must be a number, got {value}")


def _takes_a_number(parameter: inspect.Parameter) -> bool:
    if isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool):
        return True
    annotation = parameter.annotation
    text = getattr(annotation, "__name__", "") if isinstance(annotation, type) else str(annotation)
    kinds = set(re.findall(r"[A-Za-z]+", text)) - {"typing", "Optional", "Union", "None", "NoneType"}
    return bool(kinds) and kinds <= {"int", "float"}


def instantiate(config: Any, what: str, **arguments: Any) -> Any:
    """Create the object that a config describes.

    Args:
        config: a node with `_target_`, or a plain mapping with the same content.
        what: the config's name, for error messages.
        arguments: passed to the target; they replace the config's own.

    Raises:
        UserError: the target does not exist, or refuses a setting.
    """
    try:
        return hydra.utils.instantiate(config, **arguments)
    except InstantiationException as error:
        from lightning.fabric.utilities.exceptions import MisconfigurationException  # Here, as it slows the start down.

        cause = error.__cause__
        # The target's own error, the innermost one, is more helpful than Hydra's around it.
        while cause is not None and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        headline = str(error).splitlines()[0].removesuffix(":")
        if isinstance(cause, MissingExtra):
            raise UserError(f"{what}: {cause}") from error
        target = _LOCATING.match(headline)
        if target is not None and cause is not None:
            raise UserError(f"{what}: {target[1]} cannot be imported: {_import_problem(target[1], cause)}") from error
        if isinstance(cause, ImportError):
            module = str(cause.name or "").split(".")[0]
            optional = any(module in modules for modules in EXTRAS.values())
            hint = f"; {how_to_install([module])}" if optional else ""
            raise UserError(f"{what}: {headline}{hint}") from error
        if isinstance(cause, (ValueError, MisconfigurationException)) and str(cause):
            raise UserError(f"{what}: {cause}") from error
        detail = f": {cause}" if cause is not None else ""
        raise UserError(f"{what}: {headline}{detail}") from error
