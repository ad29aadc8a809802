"""Every kind of file is read with all its bits, or refused by name."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from lightning_dice.data.errors import DataError, DataProblem
from lightning_dice.data.images.image_reader import read_image, read_size, to_tensor
from lightning_dice.data.images.mask_format import MaskFormat

RAMP = (np.arange(4 * 6 * 4) * 2).astype(np.uint8).reshape(4, 6, 4)
DEEP = (np.arange(4 * 6 * 4) * 601).astype(np.uint16).reshape(4, 6, 4)
REAL = DEEP.astype(np.float32) / 1000 - 3


NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)


def with_channels(array: np.ndarray, *channels: int) -> np.ndarray:
    return np.ascontiguousarray(array[..., list(channels)].squeeze())


def write(path: Path, array: np.ndarray, **settings: object) -> Path:
    """Write 8 bit by Pillow, the rest by tifffile or imagecodecs."""
    if path.suffix == ".tif":
        tifffile.imwrite(path, array, **{"photometric": "minisblack" if array.ndim == 2 else "rgb", **settings})
    elif array.dtype == np.uint16:
        path.write_bytes(imagecodecs.png_encode(array))
    else:
        Image.fromarray(array).save(path, **settings)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def packed_png(path: Path, bits: int) -> Path:
    """A gray PNG of 2 or 4 bits with the values 0, 1, 2, 3 in a row; Pillow writes none."""
    row = sum(value << (bits * (3 - value)) for value in range(4)).to_bytes(bits * 4 // 8, "big")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(
    ("source", "channels", "max_value", "kind", "extension"),
    [
        pytest.param(with_channels(array, *range(channels)), channels, max_value, f"{depth} {color}", extension)
        for array, max_value, depth, extensions in [
            (RAMP, 255, "8-bit", ["png", "tif", "bmp"]),
            (DEEP, 65535, "16-bit", ["png", "tif"]),
            (REAL, 1, "float32", ["tif"]),
        ]
        for extension in extensions
        for channels, color in [(1, "gray"), (3, "RGB")]
    ],
    ids=lambda value: "" if isinstance(value, np.ndarray) else str(value),
)
def test_an_image_keeps_every_bit(tmp_path, source, channels, max_value, kind, extension):
    decoded = read_image(write(tmp_path / f"a.{extension}", source))
    expected = torch.from_numpy(source.astype(np.float32) / max_value).reshape(4, 6, channels).permute(2, 0, 1)
    image = to_tensor(decoded, channels)
    assert decoded.kind == kind
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert torch.equal(image, expected)
    assert read_size(decoded.path) == (4, 6)


@pytest.mark.parametrize("deep", [False, True], ids=["8-bit", "16-bit"])
@pytest.mark.parametrize(("stored", "channels"), [(2, 1), (2, 3), (4, 3)])
@pytest.mark.parametrize("extension", ["png", "tif"])
def test_alpha_is_dropped(tmp_path, stored, channels, deep, extension):
    source = with_channels(DEEP if deep else RAMP, *range(stored))
    photometric = "minisblack" if stored == 2 else "rgb"
    settings = {"extrasamples": ["unassalpha"], "photometric": photometric} if extension == "tif" else {}
    decoded = read_image(write(tmp_path / f"a.{extension}", source, **settings))
    image = to_tensor(decoded, channels)
    max_value = 65535 if deep else 255
    expected = torch.from_numpy(source[..., : stored - 1].astype(np.float32) / max_value).permute(2, 0, 1)
    assert decoded.alpha
    assert torch.equal(image, expected.expand(channels, -1, -1))


def test_alpha_is_kept_where_it_makes_up_the_channels(tmp_path):
    decoded = read_image(write(tmp_path / "a.png", RAMP))
    assert torch.equal(to_tensor(decoded, 4)[3], torch.from_numpy(RAMP[..., 3]) / 255)


def test_gray_is_repeated(tmp_path):
    image = to_tensor(read_image(write(tmp_path / "a.png", with_channels(RAMP, 0))), 3)
    assert image.shape == (3, 4, 6)
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_many_channels(tmp_path, planar):
    source = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
    stored = source if planar == "contig" else source.transpose(2, 0, 1)
    write(tmp_path / "a.tif", stored, planarconfig=planar, photometric="minisblack")
    image = to_tensor(read_image(tmp_path / "a.tif"), 5)
    assert torch.equal(image, torch.from_numpy(source).permute(2, 0, 1) / 255)


# tifffile for Python 3.10 leaves fax compression, which scanners use for one bit, to others.
FAX = pytest.param("a.tif", marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="tifffile reads no fax here"))


@pytest.mark.parametrize("name", ["a.png", FAX, "a.bmp"])
def test_one_bit(tmp_path, name):
    bits = Image.fromarray(np.array([[0, 255, 255]], np.uint8)).convert("1")
    bits.save(tmp_path / name, **({"compression": "group4"} if name == "a.tif" else {}))
    decoded = read_image(tmp_path / name)
    assert to_tensor(decoded, 1).tolist() == [[[0, 1, 1]]]
    assert MaskFormat(["background", "lesion"]).read(decoded).tolist() == [[0, 1, 1]]
    assert decoded.kind == "1-bit gray"


@pytest.mark.parametrize("bits", [2, 4])
def test_few_bits_keep_their_ids(tmp_path, bits):
    decoded = read_image(packed_png(tmp_path / "a.png", bits))
    assert decoded.pixels[..., 0].tolist() == [[0, 1, 2, 3]]
    assert to_tensor(decoded, 1).flatten().tolist() == pytest.approx([i / (2**bits - 1) for i in range(4)])


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "gif.png"])
def test_palette(tmp_path, name):
    """An image has its colours, a mask its indices; a GIF named PNG is recognized by its content."""
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 200, 0, 0, 0, 100, 0])
    palette.putdata([0, 2, 1])
    palette.save(tmp_path / name, format="GIF" if name == "gif.png" else None)
    decoded = read_image(tmp_path / name)
    colors = torch.tensor([[10, 20, 30], [0, 100, 0], [200, 0, 0]]).T.reshape(3, 1, 3) / 255
    assert torch.equal(to_tensor(decoded, 3), colors)
    if name != "gif.png":  # which sorts its palette
        assert MaskFormat(["a", "b", "c"]).read(decoded).tolist() == [[0, 2, 1]]
    colored = MaskFormat(["a", "b", "c"], colors=[[10, 20, 30], [200, 0, 0], [0, 100, 0]])
    assert colored.read(decoded).tolist() == [[0, 2, 1]]


@pytest.mark.parametrize("quality", [{"lossless": True}, {"quality": 80}], ids=["lossless", "lossy"])
def test_webp_by_another_name(tmp_path, quality):
    Image.fromarray(NOISE).save(tmp_path / "a.png", format="WEBP", **quality)
    decoded = read_image(tmp_path / "a.png")
    assert to_tensor(decoded, 3).shape == (3, 64, 64)
    assert decoded.lossy  # which of the two it is, the header does not say


def test_palette_of_grays_is_gray(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([7, 7, 7, 200, 200, 200])
    palette.putdata([1, 0])
    palette.save(tmp_path / "a.png")
    assert torch.equal(to_tensor(read_image(tmp_path / "a.png"), 1), torch.tensor([[[200, 7]]]) / 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_orientation(tmp_path, name, orientation):
    image = Image.fromarray(np.arange(64 * 32, dtype=np.uint16).astype(np.uint8).reshape(64, 32))
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / name, **({"tiffinfo": {274: orientation}} if name == "a.tif" else {"exif": exif}))
    if name == "a.tif":  # which Pillow 13 scrambles
        image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / ("a.png" if name == "a.tif" else name)) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored))
    decoded = read_image(tmp_path / name)
    np.testing.assert_array_equal(decoded.pixels[..., 0], upright)
    assert read_size(tmp_path / name) == upright.shape
    assert decoded.turned == (orientation != 1)


def test_white_is_zero(tmp_path):
    write(tmp_path / "a.tif", with_channels(RAMP, 0), photometric="miniswhite")
    with Image.open(tmp_path / "a.tif") as image:
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels[..., 0], np.asarray(image))


def test_overviews_are_no_frames(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(with_channels(RAMP, 0), photometric="minisblack", metadata=None)
        tiff.write(with_channels(RAMP, 0)[::2, ::2], photometric="minisblack", subfiletype=1, metadata=None)
    assert read_image(tmp_path / "a.tif").size == (4, 6)


def test_a_cameras_jpeg_with_a_preview_is_one_image(tmp_path):
    image = Image.fromarray(with_channels(RAMP, 0, 1, 2))
    image.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[image.resize((3, 2))])
    assert read_image(tmp_path / "a.jpg").size == (4, 6)


def half(path: Path, image: np.ndarray = NOISE, **settings: object) -> None:
    write(path, image, **settings)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def frames(path: Path) -> None:
    image = Image.fromarray(NOISE)
    image.save(path, save_all=True, append_images=[Image.fromarray(255 - NOISE)])


UNREADABLE = {
    "empty": ("a.png", lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
    "text": ("a.png", lambda path: path.write_text("<html>not found"), r"is not a PNG.*begins with b'<html>not fo'"),
    "lfs": ("a.png", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "truncated-png": ("a.png", half, "cannot be decoded .*truncated"),
    "truncated-jpeg": ("a.jpg", half, "cannot be decoded .*truncated"),
    "truncated-bmp": ("a.bmp", half, "cannot be decoded .*truncated"),
    "truncated-png-16": ("a.png", lambda path: half(path, NOISE.astype(np.uint16)), "cannot be decoded .*PngError"),
    "truncated-tiff": ("a.tif", half, "is truncated|cannot be decoded"),
    "truncated-tiff-jpeg": ("a.tif", lambda path: half(path, compression="jpeg"), "is truncated|cannot be decoded"),
    "header-only": ("a.tif", lambda path: path.write_bytes(b"II*\0"), "cannot be decoded"),
    "frames-tiff": ("a.tif", frames, "holds 2 frames, but one is required.*Save each frame"),
    "frames-png": ("a.png", frames, "holds 2 frames"),
    "stack": (
        "a.tif",
        lambda path: write(path, NOISE[..., 0].reshape(4, 32, 32), photometric="minisblack"),
        "4 frames",
    ),
    "cmyk": ("a.jpg", lambda path: Image.fromarray(NOISE).convert("CMYK").save(path), "has the colours CMYK"),
    "cmyk-tiff": ("a.tif", lambda path: Image.fromarray(NOISE).convert("CMYK").save(path), "colours SEPARATED"),
    "missing": ("a.png", lambda path: None, r"cannot be opened \(No such file"),
}


@pytest.mark.parametrize(("name", "make", "message"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_unreadable_files_are_named(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}.*({message})"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("limit", [2000, 3000], ids=["error", "warning"])
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_decompression_bomb(tmp_path, monkeypatch, name, limit):
    write(tmp_path / name, NOISE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=rf"{name}: may be a decompression bomb.*raise PIL.Image.MAX_IMAGE_PIXELS"):
        read_image(tmp_path / name)
    with pytest.raises(DataError, match="may be a decompression bomb"):
        read_size(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "channels", "message"),
    [
        (NOISE, 1, r"has 3 channels \(8-bit RGB\), but data.channels=1 was asked for. Set data.channels=3"),
        (NOISE, 4, "has 3 channels.*data.channels=4"),
        (NOISE[..., 0], 2, "has 1 channel .*data.channels=2"),
        (NOISE[..., 0].astype(np.int32), 1, "holds int32 values, which have no default max_value. Set data.max_value"),
        (NOISE[..., 0].astype(np.uint32), 1, "holds uint32 values"),
        (np.array([[np.nan, 1, np.inf]], np.float32), 1, "holds 2 values that are not finite"),
        (np.array([[1e300, 1]]), 1, "holds 1 values that are not finite"),
    ],
    ids=["rgb-for-gray", "rgb-for-four", "gray-for-two", "int32", "uint32", "nan", "float64-overflow"],
)
def test_images_that_do_not_fit_the_network_are_refused(tmp_path, source, channels, message):
    decoded = read_image(write(tmp_path / "a.tif", np.ascontiguousarray(source)))
    with pytest.raises(DataError, match=f"a.tif: {message}"):
        to_tensor(decoded, channels)


def test_a_problem_survives_a_worker():
    """A data loader rebuilds an error from its text."""
    problem = DataProblem("is empty", where="a.png", remedy="Copy it again.")
    assert str(type(problem)(str(problem))) == str(problem)
