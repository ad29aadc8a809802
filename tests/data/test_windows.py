"""Windows of large TIFFs and tiles of them: that they are cut from what would have been read whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from lightning_dice.data import FolderSource, MaskFormat, PatchSampler
from lightning_dice.data.cases import FolderCases
from lightning_dice.data.tiffs import LargePicture

HEIGHT, WIDTH = 170, 230
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
IDS = (RNG.random((HEIGHT, WIDTH)) * 3).astype(np.uint8)
PLANES = RNG.integers(0, 2, (2, HEIGHT, WIDTH), dtype=np.uint8)
TWO, THREE = ["front", "back"], ["rest", "front", "back"]
TILES = {"tile": (32, 48), "compression": "zlib"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Let small files be large ones, and blocks of them a few rows."""
    monkeypatch.setattr("lightning_dice.data.tiffs.WINDOWED", 5000)
    monkeypatch.setattr("lightning_dice.data.tiffs.BLOCK", 37 * WIDTH)
    monkeypatch.setattr("lightning_dice.data.patches.BLOCK", 11 * WIDTH)


def store(path: Path, pixels: np.ndarray, **how) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = pixels.shape[-1] if pixels.ndim == 3 else 1
    photometric = "rgb" if channels == 3 else "minisblack"
    planes = {"planarconfig": "contig"} if channels == 2 else {}
    tifffile.imwrite(path, pixels, **{"photometric": photometric, **planes, **how})


def folder(root: Path, masks: dict[str, np.ndarray], image: np.ndarray = RGB, splits=("train",), **how) -> Path:
    """One case in each split; masks by their folder, `{}` standing for that of the split."""
    how = how or TILES
    for split in splits:
        store(root / f"images/{split}/a.tif", image, **how)
        for place, mask in masks.items():
            store(root / f"masks/{split}/{place}/a.tif", mask, **TILES)
    return root


MASKS = {
    "ids": ({"": IDS}, {"mask_format": MaskFormat(THREE)}),
    "ids-ignored": ({"": IDS}, {"mask_format": MaskFormat(THREE, values={2: 255, 1: 2})}),
    "ids-as-planes": ({"": IDS}, {"mask_format": MaskFormat(TWO, "sigmoid")}),
    "16-bit": ({"": IDS.astype(np.uint16) * 1000}, {"mask_format": MaskFormat(THREE, values={1000: 1, 2000: 2})}),
    "32-bit": (
        {"": IDS.astype(np.int32) - 1},
        {"mask_format": MaskFormat(THREE, values={-1: 0, 0: 1, 1: 300}, ignore_index=300)},
    ),
    "floats": ({"": IDS.astype(np.float32)}, {"mask_format": MaskFormat(THREE)}),
    "colours": (
        {"": np.array([[9, 9, 9], [255, 0, 0], [0, 0, 255]], np.uint8)[IDS]},
        {"mask_format": MaskFormat(THREE, colors=[[9, 9, 9], [255, 0, 0], [0, 0, 255]])},
    ),
    "stacked": (
        {"": PLANES.transpose(1, 2, 0)},
        {"mask_format": MaskFormat(TWO, "sigmoid", stacked=True)},
    ),
    "a-file-for-each-class": ({"front": PLANES[0], "back": PLANES[1]}, {"mask_format": MaskFormat(TWO, "sigmoid")}),
    "exclusive-classes": (
        {"front": (IDS == 1).astype(np.uint8), "back": (IDS == 2).astype(np.uint8)},
        {"mask_format": MaskFormat(THREE)},
    ),
    "mean-of-raters": (
        {"anna": IDS, "ben": IDS.T.reshape(IDS.shape)},
        {"mask_format": MaskFormat(THREE), "raters": ["anna", "ben"]},
    ),
    "majority-of-raters": (
        {"anna": IDS, "ben": IDS[::-1]},
        {"mask_format": MaskFormat(THREE), "raters": ["anna", "ben"], "fusion": "majority"},
    ),
}


def window_of(sample, top: int, left: int, height: int = 50, width: int = 60):
    rows, columns = slice(top, top + height), slice(left, left + width)
    return sample.image[..., rows, columns], sample.mask[..., rows, columns]


@pytest.mark.parametrize("name", MASKS)
def test_windows_are_those_of_the_whole_sample(name, tmp_path):
    masks, settings = MASKS[name]
    cases = FolderSource(folder(tmp_path, masks), **settings).split("train")
    whole, opened = cases[0], cases.open(0)
    assert isinstance(opened.image, LargePicture)
    for top, left in ((0, 0), (120, 170), (31, 47), (32, 48), (100, 0)):
        image, mask = window_of(whole, top, left)
        sample = opened.window((slice(top, top + 50), slice(left, left + 60)))
        assert torch.equal(sample.image, image)
        assert torch.equal(sample.mask, mask)
        assert sample.mask.dtype == mask.dtype
        assert sample.case == "a"
    assert not opened.image._tiles, "tiles are kept"


IMAGES = {
    "strips": (RGB, {"rowsperstrip": 9, "compression": "lzw"}),
    "plain": (RGB, {"rowsperstrip": 9}),
    "planes": (RGB.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate", **TILES}),
    "16-bit": (RGB.astype(np.uint16) * 257, TILES),
    "floats": (RGB.astype(np.float32) / 255, {"tile": (16, 16)}),
    "jpeg": (RGB, {"tile": (64, 64), "compression": "jpeg"}),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name, tmp_path):
    pixels, how = IMAGES[name]
    cases = FolderSource(folder(tmp_path, {"": IDS}, pixels, **how), MaskFormat(THREE)).split("train")
    opened, whole = cases.open(0), cases[0]
    assert isinstance(opened.image, LargePicture)
    for top, left in ((0, 0), (120, 170), (31, 47)):
        assert torch.equal(
            opened.window((slice(top, top + 50), slice(left, left + 60))).image, window_of(whole, top, left)[0]
        )


class Whole:
    """Cases without windows: all of each is decoded."""

    def __init__(self, cases: FolderCases) -> None:
        self.cases, self.sizes = cases, cases.sizes

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int):
        return self.cases[index]


def drawn(patches, count: int = 12) -> list:
    torch.manual_seed(0)
    return [patches[index % len(patches)] for index in range(count)]


@pytest.mark.parametrize("name", ["ids", "ids-ignored", "a-file-for-each-class", "majority-of-raters"])
@pytest.mark.parametrize("size", [(40, 50), (180, 50)], ids=["within", "beyond"])
def test_patches_lie_where_those_of_whole_cases_do(name, size, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_dice.data.patches.PLACES", 300)
    masks, settings = MASKS[name]
    cases = FolderSource(folder(tmp_path, masks), **settings).split("train")
    sampler = PatchSampler(size, foreground=0.7, per_case=None)
    mine, other = sampler.of(cases), sampler.of(Whole(cases))
    for one, two in zip(drawn(mine), drawn(other), strict=True):
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.mask, two.mask)
    assert len(mine._places[0]) == 600 or name == "ids-ignored"
    assert np.array_equal(mine._places[0], other._places[0])


@pytest.mark.parametrize("fusion", ["mean", "random"])
def test_foreground_is_where_any_of_several_raters_sees_it(fusion, tmp_path):
    anna, ben = np.zeros_like(IDS), np.zeros_like(IDS)
    anna[20, 30], ben[100, 7] = 1, 2
    root = folder(tmp_path, {"anna": anna, "ben": ben})
    cases = FolderSource(root, MaskFormat(THREE), raters=["anna", "ben"], fusion=fusion).split("train")
    patches = PatchSampler((9, 9), foreground=1.0).of(cases)
    found = drawn(patches)
    assert patches._places[0].tolist() == [[1, 20 * WIDTH + 30], [2, 100 * WIDTH + 7]]
    if fusion == "random":
        assert {tuple(sample.mask.unique().tolist()) for sample in found} == {(0,), (0, 1), (0, 2)}


def test_a_file_that_is_no_tiff_is_decoded_once_and_kept_as_stored(tmp_path):
    for split in ("images", "masks"):
        (tmp_path / split / "train").mkdir(parents=True)
    Image.fromarray(RGB).save(tmp_path / "images/train/a.png")
    Image.fromarray(IDS).save(tmp_path / "masks/train/a.png")
    cases = FolderSource(tmp_path, MaskFormat(THREE)).split("train")
    sampler = PatchSampler((40, 50), foreground=0.5, per_case=3)
    patches = sampler.of(cases)
    for one, two in zip(drawn(patches), drawn(sampler.of(Whole(cases))), strict=True):
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.mask, two.mask)
    assert patches._kept[0].nbytes == RGB.nbytes + IDS.nbytes
