"""The reference of docs/: every setting is explained, and the files, columns and variables are those of the package."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import run_command

from lightning_dice.callbacks.case_table import RELIABILITY
from lightning_dice.renamed_settings import RENAMED, RENAMED_IN_COMMANDS
from lightning_dice.scoring.table import column_names

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
PACKAGE = ROOT / "lightning_dice"


def hook(name: str):
    """A module of docs/hooks."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Where dataclasses look for it.
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("yaml")
    return hook("config_reference")


class TestSettings:
    def test_every_setting_has_a_comment(self, reference):
        assert reference.missing_meanings() == [], "write a comment after these settings: what it is, and its unit"

    def test_a_setting_without_a_comment_is_found(self, reference, tmp_path, monkeypatch):
        (tmp_path / "conf" / "loss").mkdir(parents=True)
        path = tmp_path / "conf" / "loss" / "mine.yaml"
        path.write_text("_target_: my.Loss\nactivation: ${data.activation}\nwidth: 2.0  # pixels\nstrength: 3.0\n")
        monkeypatch.setattr(reference, "ROOT", tmp_path)
        monkeypatch.setattr(reference, "CONF", tmp_path / "conf")
        assert reference.missing_meanings() == ["conf/loss/mine.yaml: loss.strength"]

    def test_keys_defaults_and_comments_are_read_as_written(self, reference, tmp_path, monkeypatch):
        (tmp_path / "loss").mkdir()
        path = tmp_path / "loss" / "mine.yaml"
        path.write_text(
            "# First line\n# and second.\n_target_: my.Loss\nsmooth: 1e-5      # pixels\nsides: [0.7, 1.4]  # mm\n"
            "part:\n  # Why.\n  ids: {0: 255}  # label id: class\n  names:  # of all\n    - a\n    - b c\n"
            "steps:\n  - _target_: my.Step\n    size: ${data.patch_size}\n"
        )
        monkeypatch.setattr(reference, "CONF", tmp_path)
        option = reference.read_option(path)
        assert option.description == ["First line", "and second."]
        assert option.targets == ["my.Loss", "my.Step"]
        assert [(each.key, each.default, each.comment) for each in option.settings] == [
            ("loss.smooth", "1e-5", "pixels"),
            ("loss.sides", "[0.7, 1.4]", "mm"),
            ("loss.part.ids", "{0: 255}", "label id: class. Why."),
            ("loss.part.names", "[a, b c]", "of all"),
            ("loss.steps.0.size", "${data.patch_size}", ""),
        ]

    def test_every_group_and_command_has_a_place(self, reference):
        pages = "\n".join(page.read_text() for page in REFERENCE.rglob("*.md"))
        for group in reference.groups():
            assert f"<!-- options of {group} -->" in pages
        for command in (ROOT / "conf").glob("*.yaml"):
            assert f"<!-- settings of {command.stem} -->" in pages

    def test_a_page_lists_every_file_of_its_group(self, reference):
        text = reference.on_page_markdown("before\n<!-- options of optimizer -->\nafter")
        assert text.startswith("before\n## `optimizer=adam`")
        assert text.endswith("after")
        files = sorted(path.stem for path in (ROOT / "conf" / "optimizer").glob("*.yaml"))
        assert re.findall("^## `optimizer=(.*)`", text, re.MULTILINE) == files
        assert "| <code>optimizer.<wbr>lr</code> | `1e-3` | learning rate |" in text

    @pytest.mark.parametrize(
        ("comment", "markdown"),
        [
            ("pixels; null: all", "pixels; `null`: all"),
            ("as in data.root=/x inference.size=[5,5].", "as in `data.root=/x` `inference.size=[5,5]`."),
            ("'data.label_map={255:1}' and <run>/a.json", "`'data.label_map={255:1}'` and `<run>/a.json`"),
            ("a < b, a*b", "a &lt; b, a\\*b"),
            ('masks/{split}/x, "{split}/*/{case}.png"', '`masks/{split}/x`, `"{split}/*/{case}.png"`'),
        ],
    )
    def test_comments_become_markdown(self, reference, comment, markdown):
        assert reference.prose(comment) == markdown

    def test_renamed_settings_are_all_listed(self, reference):
        text = reference.on_page_markdown("<!-- renamed settings -->")
        for old, new in (RENAMED | {k: v for pairs in RENAMED_IN_COMMANDS.values() for k, v in pairs.items()}).items():
            row = rf"^\| `{re.escape(old)}`(?: \(\w+\))? \| `{re.escape(new.split()[0])}`"
            assert re.search(row, text, re.MULTILINE), old


class TestApi:
    def test_whatever_a_package_offers_is_documented(self):
        """Each name of `__all__` has a place, apart from a few that are for the package itself."""
        import lightning_dice.callbacks
        import lightning_dice.data
        import lightning_dice.losses
        import lightning_dice.scoring

        pages = "\n".join(page.read_text() for page in (REFERENCE / "api").glob("*.md"))
        documented = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
        internal = {"Split"}  # a type of three strings
        for package in (lightning_dice.losses, lightning_dice.data, lightning_dice.callbacks, lightning_dice.scoring):
            missing = {f"{package.__name__}.{name}" for name in set(package.__all__) - internal} - documented
            assert not missing
        assert {"lightning_dice.metrics.DiceScore", "lightning_dice.module.SegmentationModule"} <= documented

    def test_docstrings_become_markdown(self):
        pytest.importorskip("griffe")
        docstrings = hook("docstrings")
        assert docstrings.linked("As `DiceLoss`, not `x`.", "JaccardLoss") == (
            "As [`DiceLoss`][lightning_dice.losses.DiceLoss], not `x`."
        )
        assert docstrings.linked("`DiceLoss`\n\n>>> `DiceLoss`\n", "DiceLoss") == "`DiceLoss`\n\n>>> `DiceLoss`\n"
        formula = "A.\n\n    .. math:: a\n        + b\n\n    C :math:`d`."
        assert docstrings.to_markdown(formula) == "A.\n\n    $$\n    a\n    + b\n    $$\n\n    C $d$."


def documented_columns(name: str) -> set[str]:
    """The first column of the table of files.md that follows its marker."""
    text = (REFERENCE / "files.md").read_text()
    table = text.split(f"<!-- {name} -->")[1].split("</div>")[0]
    cells = re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE)
    return {name for cell in cells for name in re.findall("`([^`]+)`", cell)}


def columns(path: Path, classes: tuple[str, ...] = ("object",), **others: str) -> set[str]:
    """The columns of a written table, with `<class>` for the names of classes."""
    with path.open(newline="") as file:
        found = next(csv.reader(file))
    names = {re.sub(rf"/({'|'.join(classes)})$", "/<class>", name) for name in found}
    return {others.get(name, name) for name in names}


class TestFiles:
    def test_metrics(self, trained_run):
        # With one class there is no column for it.
        assert columns(trained_run / "metrics.csv") == {
            name for name in documented_columns("columns of metrics.csv") if "<class>" not in name
        }

    def test_cases(self, trained_run):
        every = {re.sub("/a$", "/<class>", name) for name in column_names(["a"], [0])}
        assert documented_columns("columns of cases.csv") == every
        assert columns(trained_run / "cases.csv") <= every
        assert "hd95/<class>" in columns(trained_run / "cases.csv")

    def test_summary_and_reliability(self, trained_run):
        assert columns(trained_run / "summary.csv") == documented_columns("columns of summary.csv")
        assert columns(trained_run / "reliability.csv") == documented_columns("columns of reliability.csv")
        assert documented_columns("columns of reliability.csv") == set(RELIABILITY)

    def test_every_file_of_a_run_is_named(self, trained_run):
        text = (REFERENCE / "files.md").read_text()
        for path in trained_run.rglob("*"):
            name = path.relative_to(trained_run).as_posix()
            if path.is_file() and not name.startswith("logs/"):
                assert f"`{name}`" in text, name

    def test_calibration_and_comparison(self, trained_run, tmp_path):
        run, second = (shutil.copytree(trained_run, tmp_path / name) for name in ("run", "second"))
        run_command("calibrate", f"run={run}", "device=cpu", cwd=tmp_path)
        content = json.loads((run / "calibration.json").read_text())
        assert set(content) == documented_columns("keys of calibration.json")
        run_command("compare", run, second, cwd=tmp_path)
        folder = run / "compare_second"
        assert columns(folder / "compare.csv") == documented_columns("columns of compare.csv")
        assert columns(folder / "compare_cases.csv") == documented_columns("columns of compare_cases.csv")
        assert {path.name for path in folder.iterdir()} == {"compare.csv", "compare_cases.csv", "compare.png"}

    def test_predictions(self, trained_run, tmp_path):
        import numpy as np
        from PIL import Image

        (tmp_path / "in").mkdir()
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "in" / "a.png")
        wishes = ("probabilities=true", "overlays=true", "device=cpu")
        run_command("predict", f"run={trained_run}", "input=in", "output=out", *wishes, cwd=tmp_path)
        found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
        assert found == {"a.png", "overlays/a.png", "predictions.json", "probabilities/a.tif"}
        manifest = json.loads((tmp_path / "out" / "predictions.json").read_text())
        text = (REFERENCE / "files.md").read_text()
        assert all(f"`{key}`" in text for key in manifest)

    def test_inspection(self, tmp_path):
        data = ("data.patch_size=[32,32]", "data.cases={train:8,val:2,test:2}")
        run_command("inspect", *data, "output=page", cwd=tmp_path)
        assert columns(tmp_path / "page" / "cases.csv") == documented_columns("columns of inspection")
        text = (REFERENCE / "files.md").read_text()
        findings = json.loads((tmp_path / "page" / "findings.json").read_text())["findings"]
        assert findings
        assert all(f"`{key}`" in text for key in ("kind", "severity", "title", "why", "remedy", "cases"))
        assert all({"kind", "severity", "title", "why", "remedy", "cases"} <= set(finding) for finding in findings)

    def test_trials(self, tmp_path):
        from dataclasses import fields

        from lightning_dice.cli.trial_tables import write_tables
        from lightning_dice.trials import Trial, write_trial

        for number in range(2):
            trial = Trial(number, [f"loss.smooth={number}"], "finished", value=0.5, monitor="val/dice", epochs=1)
            write_trial(tmp_path / str(number), trial)
        write_tables(tmp_path)
        renamed = {"val/dice": "<monitor>", "loss.smooth": "<setting>"}
        assert columns(tmp_path / "trials.csv", **renamed) == documented_columns("columns of trials.csv")
        text = (REFERENCE / "files.md").read_text()
        assert all(f"`{field.name}`" in text for field in fields(Trial))


def test_every_environment_variable_is_named():
    text = (REFERENCE / "environment.md").read_text()
    sources = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    read = set(re.findall(r"environ(?:ment)?(?:\.get\(|\[)\"([A-Z_]+)\"", sources))
    read |= set(re.findall(r"\"([A-Z_]+)\" (?:not )?in (?:os\.)?environ", sources))
    read |= set(re.findall(r"\"(LIGHTNING_DICE_[A-Z_]+)\"", sources))
    read |= {
        name for path in (ROOT / "conf").rglob("*.yaml") for name in re.findall(r"oc\.env:(\w+)", path.read_text())
    }
    assert {"LIGHTNING_DICE_KERNEL", "CXX", "SLURM_JOB_ID", "RANK"} <= read
    assert {name for name in read if f"`{name}`" not in text} == set()
