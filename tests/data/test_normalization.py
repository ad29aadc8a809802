"""Patches and tiles are normalized by the statistics of the whole image, as in prediction."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from torchvision.transforms import v2

from lightning_dice.data import MaskFormat, PatchSampler, SegmentationData, Standardize
from lightning_dice.data.images.windowed_tiff import LargeImage
from tests.data.image_sources import folder_source

SIDE, PART = 96, 32
KINDS = {
    "image": Standardize(),
    "image-after-a-fixed-one": v2.Compose([v2.Normalize([0.5], [0.1]), Standardize(), v2.Normalize([1.0], [3.0])]),
    "fixed": v2.Normalize([0.5], [0.1]),
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A picture whose corners differ, so that no part has the mean and spread of the whole."""
    monkeypatch.setattr("lightning_dice.data.images.windowed_tiff.BLOCK_PIXELS", 7 * SIDE)
    ramp = np.arange(SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE) ** 2 / SIDE**4
    for split in ("train", "val"):
        for kind, pixels in (("images", ramp), ("masks", (ramp > 0.5).astype(np.uint8))):
            path = tmp_path / kind / split / "a.tif"
            path.parent.mkdir(parents=True)
            tifffile.imwrite(path, pixels, tile=(16, 16))
    return tmp_path


def data_of(root: Path, normalize, nodata=None) -> SegmentationData:
    source = folder_source(root, MaskFormat(["a"], "sigmoid"), channels=1, tile=PART, nodata=nodata)
    patches = PatchSampler([PART, PART], patches_per_image=8)
    data = SegmentationData(source, batch_size=4, num_workers=0, normalize=normalize, patches=patches, ignore_index=255)
    data.prepare_data()
    data.setup("fit")
    return data


def whole_of(root: Path, normalize, nodata=None) -> torch.Tensor:
    source = folder_source(root, MaskFormat(["a"], "sigmoid"), channels=1, nodata=nodata)
    return normalize(source.split("val")[0].image)


@pytest.mark.parametrize("nodata", [None, 0.0])
@pytest.mark.parametrize("windowed", [1000, 10**6], ids=["from-the-file", "decoded-whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_normalized_as_in_the_whole(root, kind, windowed, nodata, monkeypatch):
    monkeypatch.setattr("lightning_dice.data.images.windowed_tiff.WINDOWED", windowed)
    whole = whole_of(root, KINDS[kind], nodata)
    data = data_of(root, KINDS[kind], nodata)
    tiles = {
        case: image for batch in data.val_dataloader() for case, image in zip(batch.case, batch.image, strict=True)
    }
    assert len(tiles) == 9
    for case, image in tiles.items():
        row, column = map(int, case.partition("@")[2].split("-"))
        expected = whole[:, row : row + image.shape[1], column : column + image.shape[2]]
        assert torch.allclose(image, expected, atol=2e-5), case
    values = whole.flatten().sort().values
    for batch in data.train_dataloader():
        found = batch.image.flatten()
        nearest = values[torch.searchsorted(values, found).clamp(1, len(values) - 1)[:, None] - torch.arange(2)]
        assert (nearest - found[:, None]).abs().min(1).values.max() < 2e-5


def test_prediction_by_windows_normalizes_in_the_same_way(root, monkeypatch):
    monkeypatch.setattr("lightning_dice.data.images.windowed_tiff.WINDOWED", 1000)
    for normalize in KINDS.values():
        data = data_of(root, normalize)
        image = LargeImage(root / "images/val/a.tif", data.source.image_format).normalized(normalize)
        tile = next(iter(data.val_dataloader())).image[0]
        assert torch.equal(image[:, :PART, :PART], tile)


def test_statistics_are_taken_once(root, monkeypatch):
    monkeypatch.setattr("lightning_dice.data.images.windowed_tiff.WINDOWED", 1000)
    passes = []
    monkeypatch.setattr(
        Standardize, "fit_blocks", lambda self, blocks: passes.append(list(blocks)) or (lambda part: part)
    )
    data = data_of(root, Standardize())
    for _ in range(2):
        assert len(list(data.train_dataloader())) == 2
    assert len(passes) == 1
