"""Hydra, for the commands: where the catalogue lies, how objects come of it, how mistakes are told."""

from __future__ import annotations

import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel the catalogue lies in the package; in a checkout, beside it.
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


# Names the run's folder to the processes that Lightning starts for the other devices of this machine. They read the
# frozen config there, instead of composing one from a command line that may hold a sweep.
RUN_VARIABLE = "LIGHTNING_DICE_RUN"

_PATHS = {"data.root", "runs", "folder", "run", "predictions", "input", "output", "checkpoint", "resume"}
# Maps whose keys are no settings, but what the user has.
_MAPS = {
    *("data.values", "data.splits", "data.categories", "data.train", "data.val", "data.test"),
    "callbacks.freeze.parts",
}


class UserError(ValueError):
    """A mistake in what a command was given; shown as one message, without a traceback."""


def register_resolvers() -> None:
    """Make known what the catalogue computes.

    `${length:<list>}`: the number of classes follows from their names. `${remaining:<total>,<first>}`: the epochs after
    a warm-up; at least 1, so that a training that ends before its warm-up has a schedule too. `${first:<a>,<b>}`: the
    first of them that is not null. `${nnunet:<folder>,labels}`: what an nnU-Net data set's dataset.json says;
    `${labels:<labels>,classes}`: what follows from its labels.
    """
    OmegaConf.register_new_resolver("length", len, replace=True)
    OmegaConf.register_new_resolver("first", _first, replace=True)
    OmegaConf.register_new_resolver("remaining", lambda total, first: max(1, total - first), replace=True)
    OmegaConf.register_new_resolver("nnunet", _nnunet, replace=True)
    OmegaConf.register_new_resolver("labels", _labels, replace=True)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _nnunet(root: str, fact: str) -> Any:
    from lightning_dice.data.volumes.nnunet import read_dataset

    return _node(read_dataset(root)[fact])


def _labels(labels: Any, fact: str) -> Any:
    from lightning_dice.data.volumes.nnunet import label_facts

    plain = OmegaConf.to_container(labels) if isinstance(labels, DictConfig) else labels
    return _node(label_facts(cast("dict[str, Any]", plain))[fact])


def _node(value: Any) -> Any:
    """A value in OmegaConf's form, which `OmegaConf.resolve` asks for."""
    return OmegaConf.create(value) if isinstance(value, (dict, list)) else value


def settle(config: DictConfig) -> None:
    """Put what is read from files of the data into the config, so that a run goes on where these are not.

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
                # OmegaConf puts its own words, several times, around what a resolver has said.
                cause: BaseException = error
                while isinstance(cause, OmegaConfBaseException) and cause.__context__ is not None:
                    cause = cause.__context__
                missing = re.search(r"Missing mandatory value: (\S+)", str(error))
                told = f"{missing[1]} has no value: give {missing[1]}=..." if missing else str(cause).splitlines()[0]
                raise UserError(told) from error
            data[key] = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def split_arguments(arguments: Iterable[str], own: Iterable[str]) -> tuple[list[str], list[str]]:
    """Tell a command's own arguments from overrides of the config of the run that it works on.

    Args:
        arguments: of the command line.
        own: the names of the command's settings.

    >>> split_arguments(["run=a", "data.root=b", "--help"], ["run"])
    (['run=a', '--help'], ['data.root=b'])
    """
    names = {*own, "hydra"}
    mine: list[str] = []
    others: list[str] = []
    for argument in arguments:
        key = argument.partition("=")[0].partition(".")[0]
        (mine if argument.startswith("-") or key in names else others).append(argument)
    return mine, others


def quoted(arguments: Iterable[str]) -> list[str]:
    """Arguments as Hydra takes them, so that they mean what they say.

    A path is quoted: Hydra's grammar refuses spaces, brackets and many letters. A map whose keys are the user's own
    takes the place of the config's: Hydra would merge the two, and refuse the keys that are new.

    >>> quoted(["data.root=my pictures (1)", "loss.smooth=1", 'runs="a b"'])
    ['data.root="my pictures (1)"', 'loss.smooth=1', 'runs="a b"']
    >>> quoted(["data.values={255:1}"])
    ['data.values=null', 'data.values={255:1}']
    """
    result = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in _PATHS and value and value[0] not in "\"'" and value != "null":
            value = quote(value)
        if key in _MAPS and value.startswith("{"):
            result.append(f"{key}=null")
        result.append(f"{key}{equals}{value}")
    return result


def quote(value: str) -> str:
    r"""A value in quotes, as Hydra's grammar has them: backslashes mean something before a quote alone.

    >>> print(quote(r'a\b "c"'))
    "a\b \"c\""
    """
    return '"' + re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + ('\\"' if m[2] else ""), value) + '"'


def refuse_misspelt(overrides: Iterable[str], settings: Iterable[str]) -> None:
    """See that no override is a setting of the command itself with a letter wrong.

    Raises:
        UserError: names the setting.

    >>> refuse_misspelt(["spilt=val"], ["run", "split"])
    Traceback (most recent call last):
    lightning_dice.cli.config.UserError: spilt=val: there is no such setting; did you mean split?
    """
    # What stands at the top of every run's config.
    known = {path.stem for path in CONF_DIR.iterdir()} | {str(key) for key in OmegaConf.load(CONF_DIR / "fit.yaml")}
    for override in overrides:
        key = override.partition("=")[0]
        if key.isidentifier() and key not in known and (close := difflib.get_close_matches(key, settings, 1)):
            raise UserError(f"{override}: there is no such setting; did you mean {close[0]}?")


def explain_typos(name: str, arguments: Iterable[str]) -> None:
    """After Hydra has refused an override of a setting that is not there: print which there are."""
    # Within a command Hydra has been set up.
    ready = GlobalHydra.instance().is_initialized()
    # A hint behind an error that has been told: it must not bring up one of its own.
    with (
        suppress(Exception),
        nullcontext() if ready else hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"),
    ):
        overrides = OverridesParser.create().parse_overrides([a for a in arguments if not a.startswith("-")])
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
                continue  # Nothing has to be there for it.
            parent, _, leaf = override.key_or_group.rpartition(".")
            place = OmegaConf.select(config, parent) if parent else config
            names = [str(key) for key in place] if isinstance(place, DictConfig) else []  # `in` passes over ???.
            if names and leaf not in names and not (CONF_DIR / leaf).is_dir():
                close = difflib.get_close_matches(leaf, names, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                print(f"{parent or 'the config'} has {', '.join(names)}{hint}", file=sys.stderr)


def help_text(name: str) -> str:
    """What `--help` shows: the choices there are, and the command's settings with their comments.

    Hydra's own help composes the config and lists its own groups too, which takes a second and a screen.
    """
    lines = (CONF_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    about = [line.removeprefix("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
    start = lines.index("defaults:")
    defaults = list(itertools.takewhile(lambda line: line.startswith("  - "), lines[start + 1 :]))
    settings = itertools.takewhile(lambda line: line != "hydra:", lines[start + 1 + len(defaults) :])
    chosen = dict(line.removeprefix("  - ").split(": ") for line in defaults if ": " in line and "override" not in line)
    if "  - fit" in defaults:  # Of a training's choices these decide the data.
        chosen |= {"data": "synthetic", "experiment": "null"}
    choices = [f"  {group:<11}{', '.join(_files(group, default))}" for group, default in chosen.items()]
    return "\n".join(
        [
            *about,
            *(["\nChoices, as in model=unet (default in brackets):", *choices] if choices else []),
            "\nSettings, as in seed=1; those of a choice too, as in loss.smooth=1e-5:",
            *(f"  {line}" for line in "\n".join(settings).strip().splitlines()),
            "\nFlags:",
            "  --cfg job                     show the whole config and do nothing; --package loss shows a part of it",
            *(["  --multirun loss.smooth=0.1,1  a run for each value"] if name == "fit" else []),
            "  --config-dir my_conf          choices of your own, as in my_conf/loss/volume.yaml",
            "  --hydra-help                  more flags",
        ]
    )


def _files(group: str, default: str) -> list[str]:
    names = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
    return [f"[{name}]" if name == default else name for name in names]


def run_command(
    name: str, act: Callable[[DictConfig, list[str]], int | None], settings: Iterable[str] | None = None
) -> None:
    """Answer `--help`, or compose a command's config from the command line and act.

    Args:
        name: of the command, and of its config.
        act: called with the config, and with what is to override another one; returns the exit status, if not 0. A
            `UserError` is told, with exit status 2.
        settings: the names of the command's own settings: what is not among them overrides the config of the run that
            the command works on. `None`: all arguments are its own, and are in Hydra's grammar already.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(name))
        return
    register_resolvers()
    overrides: list[str] = []
    if settings is not None:
        sys.argv[1:], overrides = split_arguments(quoted(sys.argv[1:]), settings)
        with mistakes_told():
            refuse_misspelt(overrides, settings)

    @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=name)
    def from_command_line(config: DictConfig) -> None:
        with mistakes_told():
            status = act(config, overrides)
        if status:
            raise SystemExit(status)

    from_command_line()


@contextmanager
def mistakes_told() -> Iterator[None]:
    """Turn a `UserError` into its message on standard error and exit status 2."""
    try:
        yield
    except (UserError, MissingMandatoryValue) as error:
        message = str(error)
        if isinstance(error, MissingMandatoryValue):
            message = f"{error.full_key} has no value: give {error.full_key}=..."
        print(f"\nerror: {message}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def traces_removed() -> Iterator[None]:
    """Leave nothing of this run in the environment to the next one of a sweep."""
    before = dict(os.environ)
    try:
        yield
    finally:
        # A launcher that finds the last run's LOCAL_RANK takes itself for a child and waits for a parent.
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", RUN_VARIABLE):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def composed(name: str, overrides: Iterable[str]) -> DictConfig:
    """Another config than the command's own, composed within it.

    Raises:
        UserError: what Hydra refuses.
    """
    try:
        return hydra.compose(name, overrides=list(overrides))
    except HydraException as error:
        explain_typos(name, overrides)
        raise UserError(str(error).splitlines()[0]) from error


def apply_overrides(config: DictConfig, overrides: Iterable[str]) -> None:
    """Change values of a composed config, in Hydra's syntax: `trainer.max_epochs=20`, `+trainer.fast_dev_run=true`.

    Raises:
        UserError: a key that is not there, or another file of a group: that is composed once, when a run starts.
    """
    OmegaConf.set_struct(config, True)
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
            key, value = override.key_or_group, override.value()
            group = isinstance(OmegaConf.select(config, key), DictConfig) and isinstance(value, str)
            if override.is_delete() or override.is_sweep_override() or group:
                raise UserError(f"{text}: only values of this run's config can be changed, as in trainer.max_epochs=20")
            parent, _, leaf = key.rpartition(".")
            place = OmegaConf.select(config, parent) if parent else config
            if not isinstance(place, DictConfig) or not (override.is_add() or leaf in list(place.keys())):
                names = [str(name) for name in place] if isinstance(place, DictConfig) else []
                close = difflib.get_close_matches(leaf, names, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise UserError(f"{text}: {parent or 'the config'} has no {leaf}, only {', '.join(names)}{hint}")
            # Replaced, not merged: a map of values would keep the old ones.
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"{text}: {str(error).splitlines()[0]}") from error


def instantiate(config: Any, what: str, **arguments: Any) -> Any:
    """The object that a config describes.

    Args:
        config: a node with `_target_`, or a plain mapping of the same content.
        what: the config's name, for the message.
        arguments: passed on, over the config's own.

    Raises:
        UserError: the target is not there, or refuses its settings.
    """
    try:
        return hydra.utils.instantiate(config, **arguments)
    except InstantiationException as error:
        from lightning.fabric.utilities.exceptions import MisconfigurationException  # Which would slow the start down.

        cause = error.__cause__
        # The target's own complaint says more than Hydra's frame around it; deepest first.
        while cause is not None and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        headline = str(error).splitlines()[0].removesuffix(":")
        if isinstance(cause, ImportError):
            missing = getattr(cause, "name", None) or str(cause)
            extra = {"wandb": "loggers", "mlflow": "loggers"}.get(str(missing).split(".")[0])
            hint = f"; pip install 'lightning-dice[{extra}]'" if extra else ""
            raise UserError(f"{what}: {headline}{hint}") from error
        if isinstance(cause, (ValueError, MisconfigurationException)) and str(cause):
            raise UserError(f"{what}: {cause}") from error  # It says what is wrong by itself.
        detail = f": {cause}" if cause is not None else ""
        raise UserError(f"{what}: {headline}{detail}") from error
