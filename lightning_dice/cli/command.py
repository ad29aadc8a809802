"""Command lines: parsing arguments, help text, and running a command through Hydra."""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from lightning_dice.cli.config import CONF_DIR, force_known, register_resolvers
from lightning_dice.cli.errors import UserError, report_user_errors
from lightning_dice.renamed_settings import new_name

_PATHS = {"data.root", "runs", "folder", "run", "predictions", "input", "output", "checkpoint", "resume"}
# Maps whose keys are the user's own: stored values, names of splits, parts of the network.
_MAPS = {
    *("data.label_map", "data.splits", "data.categories", "data.train", "data.val", "data.test"),
    "callbacks.freeze.parts",
}


def split_arguments(arguments: Iterable[str], own: Iterable[str]) -> tuple[list[str], list[str]]:
    """Separate a command's own arguments from overrides of the run that it works on.

    Args:
        arguments: the command line.
        own: the names of the command's settings.

    Returns:
        The command's own arguments and flags, and the overrides.

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


def hydra_escape(arguments: Iterable[str]) -> list[str]:
    """Rewrite arguments for Hydra's grammar.

    Paths are quoted, as the grammar refuses spaces, brackets and many letters. A map whose keys are the user's own
    replaces the config's; Hydra would merge the two, and refuse new keys. `+` may stand before settings that exist.

    >>> hydra_escape(["data.root=my pictures (1)", "loss.smooth=1", 'runs="a b"'])
    ['data.root="my pictures (1)"', 'loss.smooth=1', 'runs="a b"']
    >>> hydra_escape(["data.label_map={255:1}"])
    ['data.label_map=null', 'data.label_map={255:1}']
    """
    result = []
    for argument in map(force_known, arguments):
        key, equals, value = argument.partition("=")
        if key in _PATHS and value and value[0] not in "\"'" and value != "null":
            value = hydra_quote(value)
        if key in _MAPS and value.startswith("{"):
            result.append(f"{key}=null")
        result.append(f"{key}{equals}{value}")
    return result


def hydra_quote(value: str) -> str:
    r"""Quote a value for Hydra's grammar, where a backslash escapes only a quote.

    >>> print(hydra_quote(r'a\b "c"'))
    "a\b \"c\""
    """
    return '"' + re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + ('\\"' if m[2] else ""), value) + '"'


def asks_for_help(arguments: Iterable[str]) -> bool:
    """Return whether a command line asks for help.

    >>> asks_for_help(["model=unet", "-h"]), asks_for_help(["--hydra-help"])
    (True, False)
    """
    return not {"--help", "-h"}.isdisjoint(arguments)


def refuse_renamed(arguments: Iterable[str], command: str | None = None) -> None:
    """Refuse overrides that use the old name of a setting.

    With a run, or a folder of configs of your own, old names of `data.*` are left alone, as your own data config may
    have settings of these names. If they do not exist, they are refused when they are applied.

    Args:
        arguments: overrides in Hydra's syntax, and flags.
        command: the command whose own settings are checked too.

    Raises:
        UserError: names the old and the new setting.

    >>> refuse_renamed(["+data.values={255:1}"])
    Traceback (most recent call last):
    ...
    lightning_dice.cli.errors.UserError: data.values has been renamed: give data.label_map
    """
    given = list(arguments)
    other_data = any(argument.startswith(("run=", "resume=", "--config-dir", "-cd")) for argument in given)
    for argument in given:
        key = argument.partition("=")[0].lstrip("+~")
        new = None if other_data and key.startswith("data.") else new_name(key, command)
        if new is not None:
            raise UserError(f"{key} has been renamed: give {new}")


def refuse_misspelled(overrides: Iterable[str], settings: Iterable[str]) -> None:
    """Refuse overrides that look like a misspelled setting of the command itself.

    Raises:
        UserError: suggests the setting.

    >>> refuse_misspelled(["spilt=val"], ["run", "split"])
    Traceback (most recent call last):
    lightning_dice.cli.errors.UserError: spilt=val: there is no such setting; did you mean split?
    """
    # The top-level keys of a run's config.
    known = {path.stem for path in CONF_DIR.iterdir()} | {str(key) for key in OmegaConf.load(CONF_DIR / "fit.yaml")}
    for override in overrides:
        key = override.partition("=")[0]
        if key.isidentifier() and key not in known and (close := difflib.get_close_matches(key, settings, 1)):
            raise UserError(f"{override}: there is no such setting; did you mean {close[0]}?")


def help_text(name: str) -> str:
    """Return the text of `--help`: the command's choices, and its settings with their comments.

    Hydra's own help composes the config first, and lists Hydra's groups too: a second, and a screen full.
    """
    lines = (CONF_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    about = [line.removeprefix("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
    start = lines.index("defaults:")
    defaults = list(itertools.takewhile(lambda line: line.startswith("  - "), lines[start + 1 :]))
    settings = itertools.takewhile(lambda line: line != "hydra:", lines[start + 1 + len(defaults) :])
    chosen = dict(line.removeprefix("  - ").split(": ") for line in defaults if ": " in line and "override" not in line)
    if "  - fit" in defaults:  # The only choices of a training that inspect depends on.
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


@contextmanager
def command_line(arguments: Iterable[str] | None = None) -> Iterator[list[str]]:
    """Make `arguments` this process's command line, which Hydra reads, and yield them.

    Hydra's state is set aside meanwhile, so that a command also runs inside a program that uses Hydra itself.

    Args:
        arguments: the command line without the program's name; `None`: this process's.

    >>> with command_line(["model=unet", "seed=1"]) as given:
    ...     given, sys.argv[1:]
    (['model=unet', 'seed=1'], ['model=unet', 'seed=1'])
    """
    before, hydra_before = sys.argv, GlobalHydra.instance().hydra
    if arguments is not None:
        sys.argv = [sys.argv[0], *map(str, arguments)]
    GlobalHydra.instance().clear()
    try:
        yield sys.argv[1:]
    finally:
        sys.argv = before
        GlobalHydra.instance().hydra = hydra_before


def run_command(
    name: str,
    act: Callable[[DictConfig, list[str]], int | None],
    settings: Iterable[str] | None = None,
    arguments: Iterable[str] | None = None,
) -> None:
    """Print the help text, or compose a command's config from the command line and run the command.

    Args:
        name: the command, and its config.
        act: called with the config, and with the overrides for the run that the command works on; returns the exit
            status, or `None` for 0. A `UserError` is printed, and the exit status is 2.
        settings: the names of the command's own settings; all other arguments are overrides of the run's config.
            `None`: all arguments are the command's own, and in Hydra's grammar already.
        arguments: the command line; `None`: this process's.
    """
    given = list(sys.argv[1:] if arguments is None else map(str, arguments))
    if asks_for_help(given):
        print(help_text(name))
        return
    register_resolvers()
    overrides: list[str] = []
    with report_user_errors():
        refuse_renamed(given, name)
        if settings is not None:
            given, overrides = split_arguments(hydra_escape(given), settings)
            refuse_misspelled(overrides, settings)

    @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=name)
    def from_command_line(config: DictConfig) -> None:
        with report_user_errors():
            status = act(config, overrides)
        if status:
            raise SystemExit(status)

    with command_line(given):
        from_command_line()
