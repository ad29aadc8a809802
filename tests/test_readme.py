"""The README's code runs, and its commands compose."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from lightning_dice import calibrate, compare, evaluate, export, plan, predict
from lightning_dice.cli import command, config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [
    line[line.index("python -m lightning_dice.") :]
    for block in blocks("bash")
    for line in block.replace("\\\n", " ").splitlines()
    if "python -m lightning_dice." in line
]


@pytest.mark.filterwarnings("ignore:.*shuffle")
def test_python_blocks_run_in_order():
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["loss"].item() > 0
    assert "val/dice/border" in names["trainer"].callback_metrics


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_compose(line):
    _, _, module, *arguments = shlex.split(line)
    name = module.removeprefix("lightning_dice.")
    # What resumes a run is not composed: its overrides are checked against that run's config.
    arguments = [argument for argument in arguments if not argument.startswith("resume=")]
    # What is not a setting of such a command is an override of a run's config, or of a training's.
    with_overrides = {"calibrate": calibrate, "evaluate": evaluate, "export": export, "plan": plan, "predict": predict}
    if name in with_overrides:
        arguments, overrides = command.split_arguments(arguments, with_overrides[name].SETTINGS)
        if name == "plan" or not any(a.startswith("run=") for a in arguments):
            with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
                assert compose("fit", overrides=overrides)
        else:
            assert all("." in override for override in overrides)
    if name == "compare":
        arguments = compare.quote_folders(arguments)
    if "--config-dir" in arguments:
        arguments = []  # They are in files that are not here.
    config.register_resolvers()
    sweep = "-m" in arguments
    arguments = [argument for argument in arguments if argument != "-m"]
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        # A sweep's values are taken one by one.
        assert compose(name, overrides=[a.partition(",")[0] if sweep else a for a in arguments])


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 3
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_two_commands_of_the_start():
    assert "pip install -e . && python -m lightning_dice.fit model=unet\n" in blocks("bash")
    assert "pip install -e '.[dev]' && pytest -n 2\n" in blocks("bash")


def test_extras_that_are_named_exist():
    texts = [
        README,
        *(path.read_text() for part in ("lightning_dice", "conf") for path in (ROOT / part).rglob("*.*[ly]")),
    ]
    named = set(re.findall(r"(?:lightning-dice|'\.)\[(\w+)\]", "\n".join(texts)))
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert {"dev", "export", "loggers", "sweep"} <= named <= set(re.findall(r"^(\w+) = ", table, flags=re.MULTILINE))
