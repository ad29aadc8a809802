"""Imports point one way; see the list of layers below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lightning_dice

PACKAGE = Path(lightning_dice.__file__).parent

# Room -> the rooms it may import from, itself apart.
BELOW = {
    "kernels": {"library_internals"},
    "functional": {"kernels", "argument_checks", "extras"},
    "argument_checks": set(),
    "extras": {"text"},
    "library_internals": set(),
    "text": set(),
    "schedules": {"library_internals"},
    "losses": {"functional", "kernels", "argument_checks", "data", "extras", "library_internals"},
    "metrics": {"functional", "kernels", "argument_checks"},
    "metric_inputs": {"functional", "metrics"},
    "metric_logging": {"library_internals", "metric_inputs", "metrics"},
    "inference": {"functional", "kernels", "io", "argument_checks"},
    "loading": {"data", "inference", "renamed_settings"},
    "module": {
        "losses",
        "metric_logging",
        "metrics",
        "functional",
        "inference",
        "loading",
        "argument_checks",
        "data",
        "library_internals",
        "optimization",
        "renamed_settings",
    },
    "optimization": {"argument_checks", "library_internals", "schedules"},
    "models": {"extras", "library_internals"},
    "renamed_settings": set(),
    "io": set(),
    "trials": {"io"},
    "data": {"argument_checks", "extras", "io", "library_internals", "text"},
    "scoring": {"functional", "kernels", "argument_checks", "io"},
    "plotting": {"data", "io", "scoring", "trials"},
    "callbacks": {
        *("functional", "kernels", "data", "io", "scoring", "argument_checks", "plotting", "trials"),
        *("library_internals", "text"),
    },
    "checkpoints": {"io"},
    "report": {"scoring", "callbacks", "data", "io", "plotting", "trials"},
    "exporting": {
        *("argument_checks", "data", "extras", "functional", "inference", "io", "library_internals", "module"),
        "scoring",
    },
    "data_check": {"data", "functional", "io", "plotting", "report"},
    "cli": {
        *("argument_checks", "callbacks", "checkpoints", "data", "extras", "inference", "io", "kernels", "loading"),
        "module",
        *("library_internals", "plotting", "renamed_settings", "report", "scoring", "trials"),
        *("metrics", "schedules"),
    },
    "fit": {"cli", "trials"},
    "evaluate": {"cli", "data", "callbacks", "inference", "io", "report"},
    "compare": {"cli", "io", "report", "scoring", "plotting"},
    "calibrate": {"cli", "data", "inference", "metrics", "module", "scoring"},
    "plan": {"cli", "data", "io", "models"},
    "predict": {"cli", "data"},
    "export": {"cli", "data", "exporting", "io", "inference", "module", "scoring"},
    "inspect": {"cli", "data", "data_check", "io"},
    "__init__": {"losses", "metrics", "module"},
}
COMMANDS = {"calibrate", "compare", "fit", "evaluate", "inspect", "export", "plan", "predict"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports from, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("lightning_dice.")}
    return found - {room(path)}


def test_every_room_is_listed():
    assert {room(path) for path in FILES} <= set(BELOW)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    beyond = imported_rooms(path) - BELOW[room(path)]
    assert not beyond, f"{path.relative_to(PACKAGE)} must not import {beyond}"


def test_nothing_imports_a_command():
    assert not [path for path in FILES if imported_rooms(path) & COMMANDS]


def test_the_layers_have_no_circle():
    order: list[str] = []
    while len(order) < len(BELOW):
        ready = [name for name, below in BELOW.items() if name not in order and below <= set(order)]
        assert ready, f"a circle among {set(BELOW) - set(order)}"
        order += ready


def test_only_commands_and_configs_know_hydra():
    def knows_hydra(path: Path) -> bool:
        imports = (
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
        )
        return any("hydra" in ast.unparse(node) for node in imports)

    assert {room(path) for path in FILES if knows_hydra(path)} <= COMMANDS | {"cli", "library_internals"}
