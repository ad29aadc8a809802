"""Regions and tiles of large TIFFs equal those of the whole image."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from helpers import rows, run_command, run_forked
from PIL import Image

from lightning_dice.data import DataError, FolderSource, ImageFormat, MaskFormat, PatchSampler, SegmentationData
from lightning_dice.data.images.datasets import FolderCases, TiledCases, tile_starts
from lightning_dice.data.images.prediction_io import ImagePredictionIO
from lightning_dice.data.images.windowed_tiff import WindowedTiff, open_windowed_tiff
from tests.data.image_sources import coco_source, folder_source

HEIGHT, WIDTH = 170, 230
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
IDS = (RNG.random((HEIGHT, WIDTH)) * 3).astype(np.uint8)
PLANES = RNG.integers(0, 2, (2, HEIGHT, WIDTH), dtype=np.uint8)
TWO, THREE = ["front", "back"], ["rest", "front", "back"]
TILES = {"tile": (32, 48), "compression": "zlib"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Treat small files as large, and read them in blocks of a few rows."""
    monkeypatch.setattr("lightning_dice.data.images.windowed_tiff.WINDOWED", 5000)
    monkeypatch.setattr("lightning_dice.data.images.windowed_tiff.BLOCK_PIXELS", 37 * WIDTH)
    monkeypatch.setattr("lightning_dice.data.patches.BLOCK", 11 * WIDTH)


def store(path: Path, pixels: np.ndarray, **how) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = pixels.shape[-1] if pixels.ndim == 3 else 1
    photometric = "rgb" if channels == 3 else "minisblack"
    planes = {"planarconfig": "contig"} if channels == 2 else {}
    tifffile.imwrite(path, pixels, **{"photometric": photometric, **planes, **how})


def folder(root: Path, masks: dict[str, np.ndarray], image: np.ndarray = RGB, splits=("train",), **how) -> Path:
    """Write one case for each split; `masks` are by their folder below that of the split."""
    how = how or TILES
    for split in splits:
        store(root / f"images/{split}/a.tif", image, **how)
        for place, mask in masks.items():
            store(root / f"masks/{split}/{place}/a.tif", mask, **TILES)
    return root


MASKS = {
    "ids": ({"": IDS}, {"mask_format": MaskFormat(THREE)}),
    "ids-ignored": ({"": IDS}, {"mask_format": MaskFormat(THREE, label_map={2: 255, 1: 2})}),
    "ids-as-planes": ({"": IDS}, {"mask_format": MaskFormat(TWO, "sigmoid")}),
    "16-bit": ({"": IDS.astype(np.uint16) * 1000}, {"mask_format": MaskFormat(THREE, label_map={1000: 1, 2000: 2})}),
    "32-bit": (
        {"": IDS.astype(np.int32) - 1},
        {"mask_format": MaskFormat(THREE, label_map={-1: 0, 0: 1, 1: 300}, ignore_index=300)},
    ),
    "floats": ({"": IDS.astype(np.float32)}, {"mask_format": MaskFormat(THREE)}),
    "colours": (
        {"": np.array([[9, 9, 9], [255, 0, 0], [0, 0, 255]], np.uint8)[IDS]},
        {"mask_format": MaskFormat(THREE, colors=[[9, 9, 9], [255, 0, 0], [0, 0, 255]])},
    ),
    "stacked": (
        {"": PLANES.transpose(1, 2, 0)},
        {"mask_format": MaskFormat(TWO, "sigmoid", multichannel_masks=True)},
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
def test_regions_equal_those_of_the_whole_sample(name, tmp_path):
    masks, settings = MASKS[name]
    cases = folder_source(folder(tmp_path, masks), **settings).split("train")
    whole, opened = cases[0], cases.open(0)
    assert isinstance(opened.image, WindowedTiff)
    for top, left in ((0, 0), (120, 170), (31, 47), (32, 48), (100, 0)):
        image, mask = window_of(whole, top, left)
        sample = opened.read_region((slice(top, top + 50), slice(left, left + 60)))
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
    cases = folder_source(folder(tmp_path, {"": IDS}, pixels, **how), MaskFormat(THREE)).split("train")
    opened, whole = cases.open(0), cases[0]
    assert isinstance(opened.image, WindowedTiff)
    for top, left in ((0, 0), (120, 170), (31, 47)):
        assert torch.equal(
            opened.read_region((slice(top, top + 50), slice(left, left + 60))).image, window_of(whole, top, left)[0]
        )


@pytest.mark.parametrize("settings", [{}, {"bands": [3, 1, 2]}, {"nodata": 7}, {"bands": [3, 1, 2], "nodata": 7}])
def test_a_window_of_grays_in_a_palette_of_colours(settings, tmp_path):
    colours = np.repeat(np.arange(256, dtype=np.uint16)[None] * 257, 3, axis=0)
    colours[:, 200:] = RNG.integers(0, 65536, (3, 56))
    image = RNG.integers(0, 200, (HEIGHT, WIDTH), dtype=np.uint8)
    image[:, 120:] = 220
    how = {"photometric": "palette", "colormap": colours, **TILES}
    cases = folder_source(folder(tmp_path, {"": IDS}, image, **how), MaskFormat(THREE), **settings).split("train")
    whole, opened = cases[0], cases.open(0)
    for top, left in ((0, 0), (90, 100), (100, 150)):
        sample = opened.read_region((slice(top, top + 50), slice(left, left + 60)))
        assert torch.equal(sample.image, window_of(whole, top, left)[0])
        assert torch.equal(sample.mask, window_of(whole, top, left)[1])


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
def test_patches_equal_those_of_whole_cases(name, size, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_dice.data.patches.MAX_CENTERS", 300)
    masks, settings = MASKS[name]
    cases = folder_source(folder(tmp_path, masks), **settings).split("train")
    sampler = PatchSampler(size, oversample_foreground=0.7, patches_per_image=None)
    mine, other = sampler.cut(cases), sampler.cut(Whole(cases))
    for one, two in zip(drawn(mine), drawn(other), strict=True):
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.mask, two.mask)
    assert len(mine._centers[0]) == 600 or name == "ids-ignored"
    assert np.array_equal(mine._centers[0], other._centers[0])
    middle = mine._centers[0][:, 1] / IDS.size - 0.5
    assert abs(middle.mean()) < 0.1  # the first ones would have a smaller mean


@pytest.mark.parametrize("fusion", ["mean", "random"])
def test_foreground_is_that_of_any_rater(fusion, tmp_path):
    anna, ben = np.zeros_like(IDS), np.zeros_like(IDS)
    anna[20, 30], ben[100, 7] = 1, 2
    root = folder(tmp_path, {"anna": anna, "ben": ben})
    cases = folder_source(root, MaskFormat(THREE), raters=["anna", "ben"], fusion=fusion).split("train")
    patches = PatchSampler((9, 9), oversample_foreground=1.0).cut(cases)
    found = drawn(patches)
    assert patches._centers[0].tolist() == [[1, 20 * WIDTH + 30], [2, 100 * WIDTH + 7]]
    if fusion == "random":
        assert {tuple(sample.mask.unique().tolist()) for sample in found} == {(0,), (0, 1), (0, 2)}


def test_other_files_than_tiffs_are_decoded_once_and_cached_as_stored(tmp_path):
    for split in ("images", "masks"):
        (tmp_path / split / "train").mkdir(parents=True)
    Image.fromarray(RGB).save(tmp_path / "images/train/a.png")
    Image.fromarray(IDS).save(tmp_path / "masks/train/a.png")
    cases = folder_source(tmp_path, MaskFormat(THREE)).split("train")
    sampler = PatchSampler((40, 50), oversample_foreground=0.5, patches_per_image=3)
    patches = sampler.cut(cases)
    for one, two in zip(drawn(patches), drawn(sampler.cut(Whole(cases))), strict=True):
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.mask, two.mask)
    assert patches._cached[0].nbytes == RGB.nbytes + IDS.nbytes


def test_which_files_are_read_by_windows(tmp_path, monkeypatch):
    large = {"tiles.tif": TILES, "strips.tif": {"rowsperstrip": 4, "compression": "lzw"}, "plain.tif": {}}
    others = {
        "one-strip.tif": {"rowsperstrip": HEIGHT, "compression": "zlib"},
        "turned.tif": {**TILES, "extratags": [(274, "H", 1, 6, True)]},
    }
    for name, how in (large | others).items():
        store(tmp_path / name, IDS, **how)
        assert (open_windowed_tiff(tmp_path / name) is not None) == (name in large), name
    store(tmp_path / "small.tif", IDS[:50, :50], **TILES)
    Image.fromarray(IDS).save(tmp_path / "a.png")
    assert open_windowed_tiff(tmp_path / "small.tif") is open_windowed_tiff(tmp_path / "a.png") is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(DataError, match="is stored turned"):
        open_windowed_tiff(tmp_path / "turned.tif")


def test_the_file_is_not_kept_open(tmp_path):
    """Forks share no open file, and many cases do not exhaust the limit of open files."""
    cases = folder_source(folder(tmp_path, {"": IDS}), MaskFormat(THREE)).split("train")
    patches = PatchSampler((50, 60), oversample_foreground=0.5).cut(cases)
    expected = drawn(patches, 3)
    assert isinstance(patches._cached[0].image, WindowedTiff)
    if sys.platform == "linux":
        assert not [link for link in Path("/proc/self/fd").iterdir() if "a.tif" in _target(link)]
    for one, two in zip(drawn(pickle.loads(pickle.dumps(patches)), 3), expected, strict=True):
        assert torch.equal(one.image, two.image)


def _target(link: Path) -> str:
    with contextlib.suppress(OSError):
        return str(link.readlink())
    return ""


class TestSurvey:
    @staticmethod
    def both(root: Path, monkeypatch, **settings) -> list:
        """Survey the files by windows and whole."""
        found = [folder_source(root, **settings).survey()]
        monkeypatch.setattr("lightning_dice.data.images.windowed_tiff.WINDOWED", 10**9)
        return [*found, folder_source(root, **settings).survey()]

    @pytest.mark.parametrize("name", MASKS)
    def test_a_survey_by_blocks_equals_that_of_whole_files(self, name, tmp_path, monkeypatch):
        masks, settings = MASKS[name]
        one, two = self.both(folder(tmp_path, masks, splits=("train", "val")), monkeypatch, **settings)
        assert one.facts == two.facts
        assert one.report(tmp_path) == two.report(tmp_path)

    def test_few_values_and_nodata(self, tmp_path, monkeypatch):
        image = IDS.astype(np.float32)
        image[:40] = np.nan
        root = folder(tmp_path, {"": IDS}, image, ("train", "val"))
        one, two = self.both(root, monkeypatch, mask_format=MaskFormat(THREE), channels=1, nodata=np.nan)
        assert one.facts == two.facts
        assert one.facts["train"][0].levels in (3, 4)  # NaN counts as one

    def test_problems_name_the_rows(self, tmp_path):
        image = RGB.astype(np.float32)
        image[100, 3] = np.nan
        claimed = np.zeros_like(IDS)
        claimed[160:] = 1
        root = folder(tmp_path, {"front": claimed, "back": claimed}, image, ("train", "val"))
        with pytest.raises(DataError) as caught:
            folder_source(root, MaskFormat(THREE)).check()
        assert "holds 3 values that are not finite (NaN or infinite) (in the rows 74 to 110)" in str(caught.value)
        assert "holds 2300 pixels of several classes" in str(caught.value)
        assert "data.activation=sigmoid (in the rows 148 to 169)" in str(caught.value)

    def test_invalid_values_and_sizes_are_refused(self, tmp_path):
        root = folder(tmp_path, {"": IDS * 100}, splits=("train", "val"))
        store(root / "masks/val/a.tif", IDS[:-1], **TILES)
        with pytest.raises(DataError) as caught:
            folder_source(root, MaskFormat(THREE)).check()
        assert f"the values 100 ({(IDS == 1).sum()} pixels), 200 ({(IDS == 2).sum()} pixels)" in str(caught.value)
        assert "is 169x230 (height x width), but its image a.tif is 170x230" in str(caught.value)

    def test_a_damaged_tile(self, tmp_path):
        root = folder(tmp_path, {"": IDS}, splits=("train", "val"))
        path = root / "images/train/a.tif"
        with tifffile.TiffFile(path) as tiff:
            place = tiff.pages.first.dataoffsets[-1]
        data = bytearray(path.read_bytes())
        data[place : place + 20] = b"\xff" * 20
        path.write_bytes(bytes(data))
        with pytest.raises(DataError, match=r"a\.tif: cannot be decoded from row 160 on"):
            folder_source(root, MaskFormat(THREE)).check()


class TestNodata:
    @pytest.fixture
    def root(self, tmp_path):
        image = np.maximum(RGB, 1)
        image[30:60, 40:100], image[120:] = 0, 0
        return folder(tmp_path, {"": IDS}, image)

    def test_holes_have_the_mean_of_the_whole_image_and_are_ignored(self, root):
        cases = folder_source(root, MaskFormat(THREE), nodata=0).split("train")
        whole, opened = cases[0], cases.open(0)
        for top, left in ((0, 0), (20, 30), (120, 170), (70, 0)):
            image, mask = window_of(whole, top, left)
            sample = opened.read_region((slice(top, top + 50), slice(left, left + 60)))
            assert torch.equal(sample.image, image)
            assert torch.equal(sample.mask, mask)
        assert (whole.mask[30:60, 40:100] == 255).all()

    def test_prediction_by_windows_equals_that_of_the_whole(self, root):
        form = MaskFormat(THREE)
        reader = folder_source(root, form, nodata=0).reader
        (item,) = reader.find(root / "images/train")
        whole = reader.read(item).image
        large = ImagePredictionIO(form, reader.image_format, large=1000).read(item).image
        for top, left in ((0, 0), (20, 30), (120, 170)):
            assert torch.equal(large[..., top : top + 50, left : left + 60], whole[:, top : top + 50, left : left + 60])


class TestTiles:
    def test_tiles_cover_every_pixel_once(self, tmp_path):
        root = folder(tmp_path, {"": IDS}, splits=("train", "val"))
        for tile in (1, 7, 50, 64, 170, 229, 230, 500):
            source = folder_source(root, MaskFormat(THREE), tile=tile)
            cases = source.split("val")
            assert isinstance(source.split("train"), FolderCases)
            seen = np.zeros((HEIGHT, WIDTH), int)
            for _, (down, across) in cases._tiles:
                seen[down, across] += 1
                for part, length in ((down, HEIGHT), (across, WIDTH)):
                    assert part.stop - part.start <= tile
                    assert length <= tile or 2 * (part.stop - part.start) >= tile
            assert (seen == 1).all()
            assert len(cases) == len(tile_starts(HEIGHT, tile)) * len(tile_starts(WIDTH, tile))

    def test_tiles_sum_to_the_image(self, tmp_path):
        root = folder(tmp_path, {"": IDS}, splits=("train", "val"))
        whole = folder_source(root, MaskFormat(THREE)).split("val")[0]
        cases = pickle.loads(pickle.dumps(folder_source(root, MaskFormat(THREE), tile=64).split("val")))
        samples = [cases[index] for index in range(len(cases))]
        assert [tuple(sample.image.shape[1:]) for sample in samples] == list(cases.sizes)
        joined = sum(sample.image.double().sum((1, 2)) for sample in samples)
        torch.testing.assert_close(joined, whole.image.double().sum((1, 2)))
        for label in range(3):
            assert sum(int((sample.mask == label).sum()) for sample in samples) == int((whole.mask == label).sum())
        names = {sample.case: sample for sample in samples}
        assert list(names)[:4] == ["a@0-0", "a@0-64", "a@0-128", "a@0-179"]
        assert torch.equal(names["a@64-179"].image, whole.image[:, 64:117, 179:])

    def test_an_image_that_is_not_cut_keeps_its_name(self, tmp_path):
        cases = folder_source(folder(tmp_path, {"": IDS}, splits=("train", "val")), MaskFormat(THREE), tile=230).split(
            "val"
        )
        assert cases[0].case == "a"

    def test_files_of_any_kind_are_cut(self, tmp_path):
        root = folder(tmp_path, {"": IDS}, splits=("train",))
        for part, pixels in (("images", RGB), ("masks", IDS)):
            (root / part / "val").mkdir()
            Image.fromarray(pixels).save(root / part / "val" / "b.png")
        cases = folder_source(root, MaskFormat(THREE), tile=100).split("val")
        assert isinstance(cases, TiledCases)
        assert np.array_equal(cases[3].mask.numpy(), IDS[85:, :100])

    @pytest.mark.parametrize("tile", [0, 2.5, "4096"])
    def test_an_invalid_tile_is_refused(self, tile, tmp_path):
        with pytest.raises(ValueError, match="tile must be None or pixels"):
            folder_source(tmp_path, MaskFormat(THREE), tile=tile)


class TestBeyondWhatIsDecodedWhole:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
        return folder(tmp_path, {"": IDS}, splits=("train", "val"))

    def test_validation_needs_tiles(self, root):
        source = folder_source(root, MaskFormat(THREE))
        for read in (source.check, lambda: source.split("val")):
            with pytest.raises(
                DataError, match=r"images/val/a\.tif: is too large .*170x230 pixels.*\n.*data\.tile=4096"
            ):
                read()
        assert "2 cases" in folder_source(root, MaskFormat(THREE), tile=50).check()

    def test_training_needs_a_read_size(self, root):
        cases = folder_source(root, MaskFormat(THREE), tile=50).split("train")
        assert list(cases.sizes) == [(HEIGHT, WIDTH)]
        with pytest.raises(DataError, match=r"is too large to be read whole.*data\.read_size=\[768,768\]"):
            cases[0]
        assert PatchSampler((50, 60), oversample_foreground=0.5).cut(cases)[0].mask.shape == (50, 60)

    def test_a_large_mask_must_be_a_tiff_too(self, root):
        path = root / "masks/train/a.tif"
        path.unlink()
        Image.fromarray(IDS).save(path.with_suffix(".png"))
        with pytest.raises(DataError, match=r"(?s)a\.png: may be a .*save it as a TIFF in tiles"):
            folder_source(root, MaskFormat(THREE), tile=50).check()


class TestEpochs:
    @staticmethod
    def batches(root: Path, workers: int, **settings) -> list:
        torch.manual_seed(3)
        source = folder_source(root, MaskFormat(THREE), raters=["anna", "ben"], fusion="random")
        data = SegmentationData(
            source,
            batch_size=4,
            num_workers=workers,
            ignore_index=255,
            patches=PatchSampler.from_read_size((50, 60), **settings),
        )
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
        return [batch for _ in range(2) for batch in loader]

    def test_workers_and_memory_change_nothing(self, tmp_path):
        root = folder(tmp_path, {"anna": IDS, "ben": IDS[::-1]}, splits=("train", "val"))
        for part in ("images/train", "masks/train/anna", "masks/train/ben"):
            Image.fromarray(RGB if part == "images/train" else IDS.T.reshape(IDS.shape)).save(root / part / "b.png")
        expected = self.batches(root, 0, oversample_foreground=0.5)
        assert len(expected) == 12  # 13 patches of each of two images, the last two left out, in two epochs
        for workers, settings in ((2, {}), (0, {"cache": 0})):
            for mine, other in zip(
                expected, self.batches(root, workers, oversample_foreground=0.5, **settings), strict=True
            ):
                assert mine.case == other.case
                assert torch.equal(mine.image, other.image)
                assert torch.equal(mine.mask, other.mask)
        assert not any(torch.equal(a.image, b.image) for a in expected[:6] for b in expected[6:])


@pytest.mark.parametrize("read_size", [512, "512", [512], [64, 64, 64]])
def test_an_invalid_read_size(read_size):
    with pytest.raises(ValueError, match=r"read_size must be pixels along both axes, such as \[768,768\]"):
        PatchSampler.from_read_size(read_size)


def test_regions_of_annotations(tmp_path):
    outline = [30.5, 20.25, 200.0, 30.0, 150.0, 150.0, 20.0, 100.0]
    runs = [0, 5 * HEIGHT + 7, 90, 60 * HEIGHT - 90, HEIGHT * (WIDTH - 65) - 7]
    segments = [
        {"segmentation": [outline], "area": 9000, "iscrowd": 0},
        {
            "segmentation": {"counts": [5 * HEIGHT + 7, 90, HEIGHT * (WIDTH - 5) - 97], "size": [HEIGHT, WIDTH]},
            "iscrowd": 0,
        },
        {"segmentation": {"counts": runs, "size": [HEIGHT, WIDTH]}, "iscrowd": 1},
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.tif", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{"id": i, "image_id": 1, "category_id": 1, **one} for i, one in enumerate(segments)],
    }
    for split in ("train", "val"):
        store(tmp_path / split / "a.tif", RGB, **TILES)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    for form in (MaskFormat(["cell"], "sigmoid"), MaskFormat(["rest", "cell"])):
        cases = coco_source(tmp_path, form).split("train")
        whole, opened = cases[0], cases.open(0)
        assert isinstance(opened.image, WindowedTiff)
        assert set(whole.mask.unique().tolist()) == {0, 1, 255}
        for top, left in ((0, 0), (120, 170), (15, 3)):
            sample = opened.read_region((slice(top, top + 50), slice(left, left + 60)))
            assert torch.equal(sample.mask, window_of(whole, top, left)[1])


def scene(root: Path, split: str, length: int, **how) -> None:
    """Bright discs of radius 50, one in each square of 200 pixels, in light noise."""
    disc = np.hypot(*np.mgrid[-100:100, -100:100]) < 50
    mask = np.tile(disc.astype(np.uint8), (length // 200,) * 2)
    noise = np.random.default_rng(0).integers(0, 99, disc.shape, dtype=np.uint8)
    for part, pixels in (("images", np.tile(noise, (length // 200,) * 2) + 150 * mask), ("masks", mask * 255)):
        store(root / part / split / "a.tif", pixels, tile=(512, 512), compression="zlib", **how)


@pytest.mark.slow
def test_fit_on_two_scenes(tmp_path):
    for split in ("train", "val"):
        scene(tmp_path / "scenes", split, 800)
    settings = [
        *("data=folder", "data.root=scenes", "data.label_map={255:1}", "data.channels=1", "data.tile=512"),
        *("data.read_size=[200,200]", "data.patches_per_image=32", "data.oversample_foreground=0.5"),
        *("data.patch_size=[64,64]", "data.num_workers=0", "data.batch_size=4", "model=custom", "device=cpu"),
        *("logger=none", "~callbacks.overlays", "optimizer.lr=0.1", "trainer.max_epochs=3", "folder=run"),
    ]
    run_command("fit", *settings, cwd=tmp_path)
    scores = rows(tmp_path / "run/cases.csv")
    assert [row["case"] for row in scores] == ["a@0-0", "a@0-400", "a@400-0", "a@400-400"]
    assert min(float(row["dice"]) for row in scores) > 0.9


def peak() -> float:
    """Return the peak memory of this process in MB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def read_in_parts(folder: Path) -> tuple[int, str, float]:
    """Check, cut and tile a large image; return patches, the name of a tile, and the memory used in MB."""
    discs = MaskFormat(["disc"], "sigmoid", label_map={255: 1})
    source = FolderSource(folder, discs, ImageFormat(1), tile=1024, workers=1)
    before = peak()
    source.check()
    patches = PatchSampler((512, 512), oversample_foreground=0.5, patches_per_image=None).cut(source.split("train"))
    for index in range(0, len(patches), 40):
        patches[index].mask.float().mean()
    tile = source.split("val")[9]
    return len(patches), tile.case, peak() - before


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_image(tmp_path):
    """An image of 64 MB, 256 MB as the network sees it, and its mask: checked, trained on and scored."""
    scene(tmp_path / "scenes", "train", 8000, compressionargs={"level": 1})
    for part in ("images", "masks"):
        shutil.copytree(tmp_path / f"scenes/{part}/train", tmp_path / f"scenes/{part}/val")
    patches, tile, used = run_forked(read_in_parts, tmp_path / "scenes")
    assert (patches, tile) == (244, "a@1024-1024")
    assert used < 150, used  # MB
