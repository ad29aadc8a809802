"""Channels, the value that becomes 1, and pixels that show nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from lightning_dice.data import MaskFormat
from lightning_dice.data.errors import DataError
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import read_image, read_size
from tests.data.image_sources import folder_source

RNG = np.random.default_rng(0)
BANDS = RNG.integers(0, 4000, (6, 9, 5)).astype(np.uint16)  # (height, width, bands)


def save(path: Path, pixels: np.ndarray, how: str) -> Path:
    first = np.moveaxis(pixels, -1, 0)
    if how == "contiguous":
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    elif how == "planar":
        tifffile.imwrite(path, first, photometric="minisblack", planarconfig="separate", compression="zlib")
    elif how == "pages":
        tifffile.imwrite(path, first, imagej=True, metadata={"axes": "CYX"})
    else:
        np.save(path, first if how == "npy-first" else pixels)
    return path.with_suffix(".npy") if how.startswith("npy") else path


@pytest.mark.parametrize("how", ["contiguous", "planar", "pages", "npy", "npy-first"])
@pytest.mark.parametrize(
    ("dtype", "settings", "max_value"),
    [
        (np.uint16, {}, 65535),
        (np.uint16, {"max_value": 4000}, 4000),
        (np.uint8, {}, 255),
        (np.float32, {}, 1),
        (np.float32, {"max_value": 1000.0}, 1000),
        (np.int16, {"max_value": 1000}, 1000),
    ],
)
def test_bands_of_every_kind_of_file(tmp_path, how, dtype, settings, max_value):
    if how == "pages" and dtype == np.int16:
        pytest.skip("ImageJ's TIFF has no int16")
    pixels = (BANDS % 250).astype(dtype) - (np.int16(100) if dtype == np.int16 else dtype(0))
    name = "a.npy" if how.startswith("npy") else "a.tif"
    path = save(tmp_path / name, pixels, how)
    assert read_size(path) == (6, 9)
    decoded = read_image(path)
    expected = torch.from_numpy(pixels[..., [3, 2, 1]].astype(np.float32)).permute(2, 0, 1) / max_value
    image = ImageFormat(channels=3, bands=[4, 3, 2], **settings).to_tensor(decoded)
    assert torch.equal(image, expected)
    assert ImageFormat(channels=5, **settings).to_tensor(decoded).shape == (5, 6, 9)


def test_invalid_bands_are_refused(tmp_path):
    decoded = read_image(save(tmp_path / "a.tif", BANDS, "planar"))
    with pytest.raises(DataError, match=r"a\.tif: has 5 channels .*data\.bands=\[6\] was asked for.*counted from 1"):
        ImageFormat(channels=1, bands=[6]).to_tensor(decoded)
    with pytest.raises(ValueError, match=r"bands must be as many as channels, 3, got \[1\]; set data\.channels=1"):
        ImageFormat(channels=3, bands=[1])
    with pytest.raises(ValueError, match="counted from 1"):
        ImageFormat(channels=1, bands=[0])
    with pytest.raises(ValueError, match="max_value must be a stored value above 0"):
        ImageFormat(max_value=0)


@pytest.mark.parametrize("how", ["npy-shape", "npy-ambiguous", "npy-objects", "npy-truncated"])
def test_arrays_that_are_no_image(tmp_path, how):
    path = tmp_path / "a.npy"
    array = {"npy-shape": np.zeros(4), "npy-ambiguous": np.zeros((3, 4, 3))}.get(how, np.zeros((4, 4)))
    np.save(path, np.array([[{}, 1]], dtype=object) if how == "npy-objects" else array, allow_pickle=True)
    if how == "npy-truncated":
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.npy: (has the shape|holds object|cannot be decoded)"):
        read_image(path)


@pytest.mark.parametrize(("nodata", "dtype"), [(np.nan, np.float32), (-9999, np.int16), (0, np.uint8)])
def test_pixels_that_show_nothing_are_ignored(tmp_path, nodata, dtype):
    pixels = RNG.integers(1, 9, (4, 5, 2)).astype(dtype)
    pixels[0, 1, 0] = pixels[2, 3, 1] = nodata
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    tifffile.imwrite(tmp_path / "images/a.tif", pixels, photometric="minisblack", planarconfig="contig")
    mask = RNG.integers(0, 2, (4, 5)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "masks/a.tif", mask)
    settings = {"channels": 2, "max_value": 10, "nodata": nodata, "fractions": (1, 0, 0)}
    source = folder_source(tmp_path, MaskFormat(["background", "cloud"]), **settings)
    source.check()
    sample = source.split("train")[0]
    holes = np.zeros((4, 5), bool)
    holes[0, 1] = holes[2, 3] = True
    assert torch.equal(sample.mask, torch.from_numpy(np.where(holes, 255, mask)))
    assert torch.equal(sample.image[:, ~holes], torch.from_numpy(pixels[~holes].T.astype(np.float32) / 10))
    means = [pixels[~holes, channel].mean(dtype=np.float64).astype(dtype) / 10 for channel in range(2)]
    assert sample.image[:, 0, 1].tolist() == pytest.approx(means)
    planes = folder_source(tmp_path, MaskFormat(["cloud"], "sigmoid"), **settings).split("train")[0].mask
    assert torch.equal(planes[0], torch.from_numpy(np.where(holes, 255, mask)))


def test_max_value_does_not_let_nan_pass(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.array([[1, np.nan]], np.float32))
    with pytest.raises(DataError, match="holds 1 values that are not finite"):
        ImageFormat(channels=1, max_value=100).to_tensor(read_image(tmp_path / "a.tif"))


@pytest.mark.parametrize("text", [".nan", ".NaN", "nan", "-9999"])
def test_nodata_of_a_command_line_is_text(text):
    assert str(ImageFormat(1, nodata=text).nodata) == ("-9999.0" if text == "-9999" else "nan")


def test_nodata_that_is_no_number():
    with pytest.raises(ValueError, match="nodata must be a stored value, or nan, got 'none'"):
        ImageFormat(1, nodata="none")
