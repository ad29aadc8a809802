"""The wheel holds the catalogue, and works from anywhere without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_holds_every_yaml_and_nothing_else(unpacked):
    shipped = {path.relative_to(unpacked / "lightning_dice/conf") for path in unpacked.rglob("*.yaml")}
    assert shipped == {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    assert (unpacked / "lightning_dice" / "py.typed").is_file()
    assert {path.name.partition("-")[0] for path in unpacked.iterdir()} == {"lightning_dice", "hydra_plugins"}
    # A namespace, which other packages share.
    assert [path.name for path in (unpacked / "hydra_plugins").iterdir()] == ["lightning_dice_search.py"]


def test_holds_the_templates_of_the_pages(unpacked):
    for package in ("report", "data_check"):
        templates = {path.name for path in (ROOT / "lightning_dice" / package / "templates").iterdir()}
        assert len(templates) >= 3
        assert {path.name for path in (unpacked / "lightning_dice" / package / "templates").iterdir()} == templates


def test_composes_from_another_folder(unpacked, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}

    def python(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        ).stdout

    found = python("-c", "from lightning_dice.cli.config import CONF_DIR; print(CONF_DIR)").strip()
    assert Path(found) == unpacked / "lightning_dice" / "conf"
    config = python("-m", "lightning_dice.fit", "model=fpn", "loss.smooth=1e-5", "--cfg", "job")
    assert "segmentation_models_pytorch.FPN" in config
    assert "smooth: 1.0e-05" in config
