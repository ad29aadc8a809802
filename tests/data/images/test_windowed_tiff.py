from __future__ import annotations

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torchvision.transforms import v2

from lightning_dice.data import Standardize
from lightning_dice.data.errors import DataProblem
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import read_image, to_tensor
from lightning_dice.data.images.windowed_tiff import LargeImage, open_large_image

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (150, 203), dtype=np.uint8)
RGB = RNG.integers(0, 256, (150, 203, 3), dtype=np.uint8)
PALETTE = RNG.integers(0, 65536, (3, 256), dtype=np.uint16)
BANDS = RNG.random((5, 150, 203), dtype=np.float32)

# name: pixels, channels, how they are stored
FILES = {
    "tiles": (RGB, 3, {"photometric": "rgb", "tile": (64, 32), "compression": "zlib", "predictor": True}),
    "strips": (RGB, 3, {"photometric": "rgb", "rowsperstrip": 7, "compression": "lzw"}),
    "one-row-strips": (GRAY, 1, {"rowsperstrip": 1, "compression": "zlib"}),
    "plain": (GRAY, 1, {}),
    "plain-big-endian-16-bit": (GRAY.astype(np.uint16) * 250, 1, {"byteorder": ">"}),
    "plain-tiles": (GRAY, 1, {"tile": (16, 48)}),
    "planes": (RGB.transpose(2, 0, 1), 3, {"photometric": "rgb", "planarconfig": "separate", "tile": (32, 32)}),
    "planes-plain": (BANDS, 5, {"photometric": "minisblack", "planarconfig": "separate"}),
    "planes-strips": (
        BANDS,
        5,
        {"photometric": "minisblack", "planarconfig": "separate", "rowsperstrip": 11, "compression": "zlib"},
    ),
    "jpeg": (RGB, 3, {"photometric": "rgb", "tile": (64, 64), "compression": "jpeg"}),
    "alpha": (
        np.concatenate([RGB, GRAY[..., None]], 2),
        3,
        {"photometric": "rgb", "extrasamples": ["unassalpha"], "tile": (32, 32)},
    ),
    "palette": (GRAY, 3, {"photometric": "palette", "colormap": PALETTE, "tile": (32, 32)}),
    "white-is-zero": (GRAY, 1, {"photometric": "miniswhite", "tile": (32, 32), "compression": "zlib"}),
    "one-bit": (GRAY > 128, 1, {"rowsperstrip": 8}),
    "gray-as-rgb": (GRAY, 3, {"tile": (32, 32)}),
    "big": (GRAY, 1, {"bigtiff": True, "tile": (32, 32)}),
}


def stored(folder, pixels, **how):
    path = folder / "a.tif"
    tifffile.imwrite(path, pixels, **how)
    return path


@pytest.mark.parametrize("name", FILES)
def test_windows_are_those_of_the_whole_image(name, tmp_path):
    pixels, channels, how = FILES[name]
    path = stored(tmp_path, pixels, **how)
    whole = to_tensor(read_image(path), channels)
    with LargeImage(path, ImageFormat(channels)) as image:
        assert image.shape == whole.shape
        # Down the rows as a sliding window goes, then back up, then all.
        for rows in (slice(0, 40), slice(20, 60), slice(110, 150), slice(3, 4), slice(None)):
            for columns in (slice(0, 50), slice(150, 203), slice(None)):
                assert torch.equal(image[..., rows, columns], whole[:, rows, columns]), (rows, columns)
        assert torch.equal(image[0:1, -5:], whole[0:1, -5:])


def test_jpeg_whose_tiles_share_their_tables(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(RGB).save(path, compression="jpeg")
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages.first.jpegtables
    with LargeImage(path, ImageFormat(3)) as image:
        assert torch.equal(image[..., 20:60, 30:80], to_tensor(read_image(path), 3)[:, 20:60, 30:80])


def counted(tiff, monkeypatch) -> list[tuple[int, int, int]]:
    """Each tile, as plane, row and column, that a TIFF decodes from now on."""
    decoded = []
    read = tiff._decode_tile
    monkeypatch.setattr(tiff, "_decode_tile", lambda file, *place: decoded.append(place) or read(file, *place))
    return decoded


def test_tiles_are_decoded_once_by_overlapping_windows_and_not_kept(tmp_path, monkeypatch):
    path = stored(tmp_path, GRAY, tile=(16, 16), compression="zlib")
    with LargeImage(path, ImageFormat(1)) as image:
        decoded = counted(image.tiff, monkeypatch)
        for top in range(0, 150, 20):
            for left in range(0, 200, 20):
                _ = image[:, top : top + 40, left : left + 40]
        assert sorted(decoded) == [(0, row, column) for row in range(10) for column in range(13)]
        assert len(image.tiff._tiles) <= 4 * 13


def test_a_window_decodes_the_tiles_it_touches(tmp_path, monkeypatch):
    path = stored(tmp_path, GRAY, tile=(16, 16), compression="zlib")
    with LargeImage(path, ImageFormat(1)) as image:
        decoded = counted(image.tiff, monkeypatch)
        _ = image[:, 20:40, 100:112]
        assert decoded == [(0, 1, 6), (0, 2, 6)]


@pytest.mark.parametrize("index", [0, (0, 0, 0), (..., slice(0, 9, 2)), (slice(None),) * 4, (..., slice(9, 9))])
def test_other_indices_are_refused(index, tmp_path):
    with LargeImage(stored(tmp_path, GRAY), ImageFormat(1)) as image, pytest.raises(IndexError, match="index must"):
        image[index]


class TestNormalized:
    @pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["wide", "narrow"])
    def test_standardized_windows_equal_the_whole(self, scale, tmp_path, monkeypatch):
        monkeypatch.setattr("lightning_dice.data.images.windowed_tiff.BLOCK_PIXELS", 203 * 13)
        # An offset much larger than the deviation is where sums of squares lose their digits.
        pixels = np.stack([BANDS[0] * scale + 10, BANDS[1] * 7, np.full_like(BANDS[0], 0.1)], axis=2)
        path = stored(tmp_path, pixels.astype(np.float32), photometric="rgb", tile=(32, 32))
        whole = to_tensor(read_image(path), 3)
        exact = whole.double()
        center = exact.mean((1, 2), keepdim=True)
        width = (exact - center).square().mean((1, 2), keepdim=True).sqrt()
        expected = ((exact - center) / width)[:2]
        with LargeImage(path, ImageFormat(3)) as image:
            seen = image.normalized(Standardize())[..., 40:90, 10:99]
        tolerance = 4 * torch.finfo(torch.float32).eps * float(10 / scale)  # of a float32 mean
        assert torch.allclose(seen[:2].double(), expected[..., 40:90, 10:99], atol=tolerance, rtol=1e-6)
        assert (seen[2] == 0).all()
        assert torch.allclose(seen[1], Standardize()(whole)[1, 40:90, 10:99], atol=2e-6)

    def test_fixed_and_composed(self, tmp_path):
        path = stored(tmp_path, RGB, photometric="rgb", tile=(32, 32))
        fixed = v2.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
        whole = to_tensor(read_image(path), 3)
        with LargeImage(path, ImageFormat(3)) as image:
            assert torch.equal(image.normalized(fixed)[..., 5:50, :], fixed(whole)[:, 5:50])
        both = v2.Compose([fixed, Standardize()])
        with LargeImage(path, ImageFormat(3)) as image:
            assert torch.allclose(image.normalized(both)[..., 5:50, :], both(whole)[:, 5:50], atol=1e-5)
        with LargeImage(path, ImageFormat(3)) as image:
            assert image.normalized(None) is image

    def test_another_is_refused(self, tmp_path):
        with (
            LargeImage(stored(tmp_path, GRAY), ImageFormat(1)) as image,
            pytest.raises(DataProblem, match="normalization by function"),
        ):
            image.normalized(lambda x: x - x.amin())


class TestRefused:
    def test_truncated(self, tmp_path):
        path = stored(tmp_path, GRAY, tile=(32, 32))
        path.write_bytes(path.read_bytes()[:-3000])
        with pytest.raises(DataProblem, match=r"is truncated: .* bytes expected"):
            LargeImage(path, ImageFormat(1))

    def test_a_damaged_tile_is_reported_when_it_is_read(self, tmp_path):
        path = stored(tmp_path, GRAY, tile=(32, 32), compression="zlib")
        with tifffile.TiffFile(path) as tiff:
            place = tiff.pages.first.dataoffsets[-1]
        data = bytearray(path.read_bytes())
        data[place : place + 20] = b"\xff" * 20
        path.write_bytes(bytes(data))
        with LargeImage(path, ImageFormat(1)) as image:
            _ = image[..., :100, :]
            with pytest.raises(DataProblem, match=r"a\.tif: cannot be decoded from row 128 on"):
                _ = image[..., 120:, :]

    def test_one_piece(self, tmp_path, monkeypatch):
        monkeypatch.setattr("lightning_dice.data.images.windowed_tiff.MAX_CHUNK_BYTES", 20000)
        path = stored(tmp_path, GRAY, rowsperstrip=150, compression="zlib")
        with pytest.raises(DataProblem, match=r"compressed in pieces of 150 rows.*Save it in tiles"):
            LargeImage(path, ImageFormat(1))

    def test_a_bomb(self, tmp_path):
        path = stored(tmp_path, np.zeros((3000, 3000), np.uint8), tile=(1024, 1024), compression="zstd")
        with pytest.raises(DataProblem, match="may be a decompression bomb: 9000000 bytes of pixels in a file of"):
            LargeImage(path, ImageFormat(1))

    def test_channels(self, tmp_path):
        with pytest.raises(DataProblem, match=r"has 3 channels .*data\.channels=5 was asked for"):
            LargeImage(stored(tmp_path, RGB, photometric="rgb"), ImageFormat(5))

    def test_two_images(self, tmp_path):
        path = tmp_path / "a.tif"
        with tifffile.TiffWriter(path) as writer:
            writer.write(GRAY)
            writer.write(GRAY)
        with pytest.raises(DataProblem, match="holds 2 images"):
            LargeImage(path, ImageFormat(1))

    def test_turned(self, tmp_path):
        path = stored(tmp_path, GRAY, extratags=[(274, "H", 1, 6, True)])
        with pytest.raises(DataProblem, match="stored turned"):
            LargeImage(path, ImageFormat(1))

    def test_values_that_are_not_finite(self, tmp_path):
        pixels = BANDS[0].copy()
        pixels[100, 100] = np.nan
        with LargeImage(stored(tmp_path, pixels, tile=(32, 32)), ImageFormat(1)) as image:
            _ = image[..., :90, :]
            with pytest.raises(DataProblem, match="1 values that are not finite"):
                _ = image[..., 90:110, :]


class TestOpenLarge:
    def test_only_what_is_beyond_the_limit(self, tmp_path):
        path = stored(tmp_path, GRAY)
        assert open_large_image(path, ImageFormat(1), limit=GRAY.size) is None
        image = open_large_image(path, ImageFormat(1), limit=GRAY.size - 1)
        assert isinstance(image, LargeImage)
        image.close()

    def test_images_beyond_pillows_limit(self, tmp_path, monkeypatch):
        path = stored(tmp_path, GRAY, tile=(32, 32))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(DataProblem, match="bomb"):
            read_image(path)
        image = open_large_image(path, ImageFormat(1))
        assert image is not None
        image.close()

    def test_others_are_left_to_who_reads_them_whole(self, tmp_path):
        Image.fromarray(GRAY).save(tmp_path / "a.png")
        (tmp_path / "b.tif").write_bytes(b"II*\0rest")
        for name in ("a.png", "b.tif", "missing.tif"):
            assert open_large_image(tmp_path / name, ImageFormat(1), limit=1) is None


def test_a_preview_is_every_nth_pixel(tmp_path):
    path = stored(tmp_path, RGB, photometric="rgb", tile=(32, 32))
    with LargeImage(path, ImageFormat(3)) as image:
        small, step = image.preview(longest=60)
    assert step == 4
    assert torch.equal(small, to_tensor(read_image(path), 3)[:, ::4, ::4])
