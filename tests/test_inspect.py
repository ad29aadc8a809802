"""`python -m lightning_dice.inspect`, as a user runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from data_check.planted import sound
from helpers import refused, rows, run_command
from hydra import compose, initialize_config_dir
from omegaconf.errors import MissingMandatoryValue
from PIL import Image

from lightning_dice.cli.config import CONF_DIR, register_resolvers
from lightning_dice.cli.errors import UserError
from lightning_dice.inspect import inspect


def config(*overrides: str):
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("inspect", overrides=list(overrides))


def saved(root: Path) -> Path:
    """Write sound data as files."""
    for split, part in sound().items():
        for sample in part:
            for kind, values in (("images", sample.image[0] * 255), ("masks", sample.mask[0])):
                path = root / kind / split / f"{sample.case}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.numpy().round().astype(np.uint8)).save(path)
    return root


FOLDER = ["data=folder", "data.channels=1", "data.classes=[object]", "data.patch_size=[32,32]"]


def test_errors_are_named_and_set_the_status(tmp_path):
    root = saved(tmp_path / "my data")
    for kind in ("images", "masks"):
        (root / kind / "test/test-0001.png").write_bytes((root / kind / "train/train-0003.png").read_bytes())
    (root / "masks/train/train-0005.png").unlink()
    result = run_command("inspect", *FOLDER, f"data.root={root}", "output=seen", cwd=tmp_path, status=1)
    assert "Traceback" not in result.err
    assert "error: images/train/train-0005.png: has no mask in masks/train" in result.out
    assert "error: 1 image in two splits  [duplicates-across-splits]" in result.out
    assert result.out.splitlines()[-1].startswith("2 errors, 0 warnings, 0 notes: ")
    written = json.loads((tmp_path / "seen/findings.json").read_text())
    assert [finding["kind"] for finding in written["findings"]] == ["refused", "duplicates-across-splits"]
    assert written["cases"] == {"train": 13, "val": 6, "test": 6}
    text = (tmp_path / "seen/inspection.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:|#)|@import|url\(|https?://", text)  # It fetches nothing.
    assert "equal to test/test-0001" in text


def test_sound_data(tmp_path):
    root = saved(tmp_path / "data")
    run_command("inspect", *FOLDER, f"data.root={root}", "strict=true", cwd=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("_inspect_folder")
    cases = rows(folder / "cases.csv")
    assert len(cases) == 26
    for row in cases:
        mask = np.asarray(Image.open(root / "masks" / row["split"] / f"{row['case']}.png"))
        image = np.asarray(Image.open(root / "images" / row["split"] / f"{row['case']}.png")) / 255
        assert int(row["pixels/object"]) == mask.sum()
        assert float(row["mean"]) == pytest.approx(image.mean(), rel=1e-4)
        assert row["kind"] == "8-bit gray"


def test_typos_are_explained_and_leave_no_folder(tmp_path):
    errors = refused("inspect", "data=folder", "data.rot=x", cwd=tmp_path, status=1)
    assert "did you mean root?" in errors
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("data"))


class TestInProcess:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("accept=[duplicate]", "accept: there is no finding duplicate, only absent-classes"),
            ("thumbnails=-1", "thumbnails must be an integer of at least 0, got -1"),
            ("workers=0", "workers must be an integer of at least 1, got 0"),
            ("data.channels=0", "channels must be 1 or more"),
        ],
    )
    def test_refuses(self, root, tmp_path, override, message):
        with pytest.raises(UserError, match=message):
            inspect(config(*FOLDER, f"data.root={root}", f"runs={tmp_path}", override))
        assert not list(tmp_path.iterdir())

    def test_a_setting_without_a_value_leaves_no_folder(self, tmp_path):
        with pytest.raises(MissingMandatoryValue, match=r"data\.root"):
            inspect(config("data=folder", f"runs={tmp_path}"))
        assert not list(tmp_path.iterdir())

    def test_overwrites_nothing(self, root, tmp_path):
        with pytest.raises(UserError, match="exists, and nothing is overwritten"):
            inspect(config(*FOLDER, f"data.root={root}", f"output={tmp_path}"))

    def test_a_missing_folder(self, tmp_path):
        (finding,) = inspect(config(*FOLDER, f"data.root={tmp_path / 'none'}", f"output={tmp_path / 'out'}"))
        assert (finding.kind, finding.severity) == ("refused", "error")
        assert "does not exist" in finding.title

    def test_names_cannot_break_the_page(self, root, tmp_path):
        inspect(config(*FOLDER, f"data.root={root}", f"output={tmp_path / 'out'}", "data.classes=['<b>&']"))
        text = (tmp_path / "out/inspection.html").read_text()
        assert "&lt;b&gt;&amp;" in text
        assert "<b>&" not in text

    def test_the_number_of_thumbnails(self, root, tmp_path):
        for count in (0, 4):
            inspect(config(*FOLDER, f"data.root={root}", f"output={tmp_path / str(count)}", f"thumbnails={count}"))
            text = (tmp_path / str(count) / "inspection.html").read_text()
            assert text.count("data:image/jpeg") == count
            assert f"Pictures of {count} of them" in text

    def test_large_data_keep_the_page_small(self, root, tmp_path, monkeypatch):
        monkeypatch.setattr("lightning_dice.data_check.html.MAX_ROWS", 10)
        inspect(config(*FOLDER, f"data.root={root}", f"output={tmp_path / 'out'}", "data.patch_size=[32,80]"))
        text = (tmp_path / "out/inspection.html").read_text()
        table = text[text.index('id="cases"') :].partition("</table>")[0]
        assert table.count("<tr>") == 11
        assert table.count("smaller-than-crops") == 20  # Cases with findings come first.
        assert "10 of 26 cases; all are in cases.csv" in text


def test_settings_of_a_training_are_not_ignored(tmp_path):
    assert "error: folder is a setting of fit, which inspect does not have: give output=<new folder>" in refused(
        "inspect", "data=synthetic", "folder=a", cwd=tmp_path
    )
    assert "error: resume is a setting of fit" in refused("inspect", "data=synthetic", "resume=a", cwd=tmp_path)
    assert not list(tmp_path.iterdir())
