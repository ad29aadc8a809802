"""Images that are too large to be measured whole."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from omegaconf import OmegaConf
from PIL import Image

from lightning_dice import inspect
from lightning_dice.data import MaskFormat
from lightning_dice.data_check.checks import run_checks
from lightning_dice.data_check.survey import draw_missing, survey
from lightning_dice.data_check.tables import split_table
from lightning_dice.data_check.task import Task
from tests.data.image_sources import folder_source

CLASSES = ["background", "disc"]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A scene of four tiles and a photograph in each split; the scene is too large to be decoded whole."""
    monkeypatch.setattr("lightning_dice.data_check.survey.LARGE", 100 * 100)
    monkeypatch.setattr("lightning_dice.data_check.survey.TILE", 100)
    monkeypatch.setattr("lightning_dice.data.images.windowed_tiff.WINDOWED", 100 * 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150 * 150)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, length in (("scene", 200), ("photo", 90)):
            disc = (np.hypot(*np.mgrid[-45 : length - 45, -45 : length - 45]) < 20).astype(np.uint8)
            image = rng.integers(0, 100, disc.shape, dtype=np.uint8) + 100 * disc
            for folder, pixels in (("images", image), ("masks", disc)):
                (tmp_path / folder / split).mkdir(parents=True, exist_ok=True)
                tifffile.imwrite(tmp_path / folder / split / f"{name}.tif", pixels, tile=(32, 32), compression="zlib")
    return folder_source(tmp_path, MaskFormat(CLASSES), channels=1)


def test_large_images_are_measured_in_tiles(source):
    found = survey(source, Task(CLASSES), thumbnails=0)
    names = ["photo", "scene@0-0", "scene@0-100", "scene@100-0", "scene@100-100"]
    assert [case.key for case in found.cases] == [f"{split}/{name}" for split in ("train", "val") for name in names]
    assert found.sizes == {"train": 5, "val": 5}
    assert found.images == {"train": 2, "val": 2}
    assert [row[1] for row in split_table(found)] == ["cases", "2 in 5 tiles", "2 in 5 tiles"]
    few = [finding.title for finding in run_checks(found) if finding.kind == "few-cases"]
    assert few == ["the val split has only 2 cases"]
    photo, first, *rest = found.of("train")
    assert (photo.size, first.size) == ((90, 90), (100, 100))
    assert photo.components[1].pixels == first.components[1].pixels > 1000
    assert not any(case.components[1].pixels for case in rest)
    assert first.kind == "8-bit gray"
    assert [str(problem) for problem in found.problems] == [
        f"{source.root}/images/val/scene.tif: is too large to be scored whole: 200x200 pixels, more than 22500. "
        "Set data.tile=4096 to score it in tiles."
    ]
    draw_missing(source, found, ["train/scene@0-0"])
    assert first.thumbnail is not None


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({}, 8),
        ({"read_size": [64, 64]}, 1),
        ({"read_size": [64, 64], "patches_per_image": 3}, 3),
        ({"read_size": None, "patches_per_image": 3}, 8),
        ({"patches_per_image": 3}, 3),  # volumes
    ],
)
def test_patches_fill_batches(settings, least, source):
    """The smallest number of cases that fills a batch depends on how many patches one image gives."""
    data = {"classes": CLASSES, "activation": "softmax", "ignore_index": 255, "exclude_classes": [], "channels": 1}
    config = {"data": {**data, "batch_size": 8, **settings}, "workers": 1, "thumbnails": 0}
    assert inspect.survey_with_progress(source, OmegaConf.create(config)).facts["batch_size"] == least
