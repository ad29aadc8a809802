"""CONTRIBUTING.md, CHANGELOG.md and CITATION.cff: what they name exists, and they agree with pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
# What is in code and looks like a path, such as `conf/loss/<name>.yaml`.
PATHS = re.findall(r"`([\w.-]+/[\w./<>-]*|[\w-]+\.(?:md|toml|cff|txt))`", CONTRIBUTING)
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", CONTRIBUTING, re.DOTALL))


def recipes() -> dict[str, str]:
    """The sections "Add a ...", by their titles."""
    return dict(re.findall(r"^## (Add a .*?)\n(.*?)(?=^## )", CONTRIBUTING, re.MULTILINE | re.DOTALL))


def exists(path: str) -> bool:
    folder, placeholder, _ = path.partition("<")
    return (ROOT / folder).exists() or (not placeholder and (ROOT / "lightning_dice" / path).exists())


def test_named_files_exist():
    assert len(PATHS) > 30
    assert [path for path in PATHS if not exists(path)] == []


def test_folders_of_the_table_exist():
    table = CONTRIBUTING.partition("## Where things are")[2].partition("\n\nImports")[0]
    names = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall("`([^`]+)`", row)]
    assert len(names) > 15
    assert {name for name in names if not (ROOT / "lightning_dice" / name).exists()} <= {"lightning_dice/"}
    rooms = {path.name for path in (ROOT / "lightning_dice").iterdir() if (path / "__init__.py").is_file()}
    assert rooms <= {name.split("/")[0] for name in names}


def test_recipes_lead_through_the_right_places():
    found = recipes()
    assert list(found) == ["Add a loss", "Add a network", "Add a data format", "Add a callback"]
    for group, text in zip(("loss", "model", "data", "callbacks"), found.values(), strict=True):
        assert f"conf/{group}/" in text
        assert re.search(r"docs/(reference|how-to)/[\w/-]+\.md", text)
        assert "tests/" in text


def test_a_loss_made_by_the_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    import torch
    from hydra import compose, initialize_config_dir

    from lightning_dice import losses
    from lightning_dice.cli.config import CONF_DIR, instantiate, register_resolvers

    bases = re.findall(r"subclass `(\w+)` and define\s+`(\w+)`", recipes()["Add a loss"])
    assert [base for base, _ in bases] == ["OverlapLoss", "PixelMeanLoss"]
    assert all(callable(getattr(getattr(losses, base), method)) for base, method in bases)
    (tmp_path / "recipe_losses.py").write_text(
        f"from lightning_dice.losses import {bases[0][0]}\n"
        f"class FalseDiscovery({bases[0][0]}):\n"
        f"    def {bases[0][1]}(self, sums):\n"
        "        return 1 - (sums.overlap + self.smooth[0]) / (sums.predicted + self.smooth[1])\n"
    )
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text(
        "_target_: recipe_losses.FalseDiscovery\nactivation: ${data.activation}\nsmooth: 0.5  # pixels\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("fit", overrides=["loss=mine", f"hydra.searchpath=[file://{tmp_path}]"])
    loss = instantiate(config.loss, "loss")
    p, n = torch.sigmoid(torch.tensor([3.0, -3.0])).tolist()
    value = loss(torch.tensor([[[3.0, -3.0, 3.0]]]), torch.tensor([[[1, 0, 0]]])).item()
    assert value == pytest.approx(1 - (p + 0.5) / (2 * p + n + 0.5), rel=1e-6)


def test_markers_of_the_commands_are_declared():
    declared = set(re.findall(r'^  "(\w+): ', PYPROJECT.partition("markers = [")[2].partition("]")[0], re.MULTILINE))
    expressions = re.findall(r'^pytest .*?-m (?:"([^"]*)"|(\w+) )', BASH, re.MULTILINE)
    used = {word for expression in expressions for word in "".join(expression).split()}
    assert used - {"or"} == declared
    assert declared == set(re.findall(r"^\| `(\w+)` \| it", CONTRIBUTING, re.MULTILINE))


def test_commands_name_modules_and_scripts_that_exist():
    for module in re.findall(r"python -m (tests\.\w+)", CONTRIBUTING):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    for script in re.findall(r"`bash (\S+)`", CONTRIBUTING):
        assert (ROOT / script).is_file()
    assert "ruff check . && ruff format --check . && mypy && pytest" in CONTRIBUTING


def test_versions_agree():
    version = re.search(r'^version = "(.+)"', PYPROJECT, re.MULTILINE)[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    released = re.findall(
        r"^## \[(\d[\d.]*)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert released[0] == (version, citation["date-released"])
    assert citation["version"] == version
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    assert citation["license"] == re.search(r'^license = "(.+)"', PYPROJECT, re.MULTILINE)[1]


def test_the_changelog_keeps_its_format():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)[0] == "Unreleased"
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds
