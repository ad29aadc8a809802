from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from lightning_dice.data import DataError, MaskFormat, SyntheticSource
from lightning_dice.data.errors import FileWarning, SkippedWarning
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import read_image
from lightning_dice.data.images.prediction_io import ImagePredictionIO
from lightning_dice.data.images.windowed_tiff import LargeImage
from lightning_dice.data.interfaces import PredictionItem
from tests.data.image_sources import folder_source

GRAY = ImageFormat(channels=1)
LESION = MaskFormat(["lesion"], "sigmoid")
COLORS = [[0, 0, 0], [255, 0, 0], [0, 0, 255]]

# name: how masks are stored, and the values that the ids 0, 1, 2 have in a written file
FORMATS = {
    "ids": (MaskFormat(["background", "a", "b"]), [0, 1, 2]),
    "values": (MaskFormat(["background", "a", "b"], label_map={128: 1, 255: 2}), [0, 128, 255]),
    "several-values-of-an-id": (MaskFormat(["background", "a", "b"], label_map={7: 1, 9: 1, 3: 255}), [0, 7, 2]),
    "merged-into-the-background": (MaskFormat(["background", "a", "b"], label_map={7: 0}), [0, 1, 2]),
    "background-elsewhere": (MaskFormat(["background", "a", "b"], label_map={0: 255, 7: 0}), [7, 1, 2]),
    "ids-moved": (MaskFormat(["background", "a", "b"], label_map={1: 255, 2: 1, 3: 2}), [0, 2, 3]),
    "16-bit": (MaskFormat(["background", "a", "b"], label_map={1000: 1, 40000: 2}), [0, 1000, 40000]),
    "colors": (MaskFormat(["background", "a", "b"], colors=COLORS), COLORS),
    "colors-mapped": (
        MaskFormat(["background", "a", "b"], colors=[[9, 9, 9], *COLORS], label_map={0: 255, 1: 0, 2: 1, 3: 2}),
        COLORS,
    ),
    "one-class": (MaskFormat(["lesion"], "sigmoid", label_map={255: 1}), [0, 255]),
    "multichannel": (MaskFormat(["background", "a", "b"], multichannel_masks=True), [0, 1, 2]),
}


def save_image(folder: Path, name: str = "a.png", size: tuple[int, int] = (6, 9), **how: object) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    Image.fromarray(pixels).save(path, **how)
    return path


def labels_of(form: MaskFormat, size: tuple[int, int] = (6, 9)) -> torch.Tensor:
    ids = torch.arange(size[0] * size[1]).view(size) % len(form.ids)
    if form.activation == "softmax":
        return ids.to(torch.uint8)
    return torch.stack([ids == index for index in form.class_ids])


def scan_of(reader: ImagePredictionIO, path: Path):
    return reader.read(PredictionItem("a", (path,)))


class TestWritten:
    @pytest.mark.parametrize("format", ["png", "tiff"])
    @pytest.mark.parametrize("name", FORMATS)
    def test_has_the_values_of_the_trainings_masks_and_is_read_back(self, name, format, tmp_path):
        form, values = FORMATS[name]
        reader = ImagePredictionIO(form, GRAY)
        labels = labels_of(form)
        reader.write(tmp_path / "out", "sub/a", labels, scan_of(reader, save_image(tmp_path)), format)
        (file,) = reader.names("sub/a", format)
        stored = (
            tifffile.imread(tmp_path / "out" / file)
            if format == "tiff"
            else np.asarray(Image.open(tmp_path / "out" / file))
        )
        ids = labels if form.activation == "softmax" else labels[0]
        assert np.array_equal(stored, np.asarray(values)[ids.long().numpy()])
        assert torch.equal(reader.load(tmp_path / "out", "sub/a").long(), labels.long())
        # As training reads its masks.
        assert torch.equal(form.encode([form.read(read_image(tmp_path / "out" / file))]).long(), labels.long())

    def test_classes_that_overlap_have_a_folder_each(self, tmp_path):
        form = MaskFormat(["ma/EX", "he"], "sigmoid", label_map={255: 1})
        reader = ImagePredictionIO(form, GRAY)
        labels = torch.rand(2, 6, 9) < 0.5
        reader.write(tmp_path, "x", labels, scan_of(reader, save_image(tmp_path)))
        for name, plane in zip(("ma_EX", "he"), labels, strict=True):
            assert np.array_equal(np.asarray(Image.open(tmp_path / name / "x.png")), plane.numpy() * np.uint8(255))
        assert torch.equal(reader.load(tmp_path, "x").bool(), labels)

    def test_values_that_png_cannot_hold_are_refused(self, tmp_path):
        form = MaskFormat(["background", "a"], label_map={70000: 1, -3: 0, 0: 255})
        reader = ImagePredictionIO(form, GRAY)
        scan, labels = scan_of(reader, save_image(tmp_path)), labels_of(form)
        with pytest.raises(DataError, match=r"PNG cannot hold the values -3 to 70000.*format=tiff"):
            reader.write(tmp_path / "out", "a", labels, scan)
        assert not list((tmp_path / "out").iterdir())
        reader.write(tmp_path / "out", "a", labels, scan, "tiff")
        assert set(np.unique(tifffile.imread(tmp_path / "out" / "a.tif"))) == {-3, 70000}
        assert torch.equal(reader.load(tmp_path / "out", "a"), labels)

    def test_a_class_without_a_value_is_refused_at_once(self):
        with pytest.raises(DataError, match=r"no value of the masks means 'b' \(id 2\).*data\.label_map"):
            ImagePredictionIO(MaskFormat(["background", "a", "b"], label_map={2: 1}), GRAY)

    def test_fits_the_image_as_displayed(self, tmp_path):
        exif = Image.Exif()
        exif[274] = 6
        path = save_image(tmp_path, "turned.jpg", exif=exif)
        reader = ImagePredictionIO(LESION, GRAY)
        scan = scan_of(reader, path)
        assert scan.size == (9, 6)
        with pytest.raises(ValueError, match="the image's size"):
            reader.write(tmp_path, "m", torch.zeros(1, 6, 9, dtype=torch.bool), scan)
        reader.write(tmp_path, "m", torch.zeros(1, 9, 6, dtype=torch.bool), scan)
        with Image.open(tmp_path / "m.png") as mask:
            assert mask.size == (6, 9)

    def test_large_masks_are_tiled_tiffs(self, tmp_path, monkeypatch):
        monkeypatch.setattr("lightning_dice.data.images.prediction_io.TILE", 32)
        pixels = np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8)
        tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(32, 32))
        for form in (MaskFormat(["background", "a", "b"], label_map={255: 1}), FORMATS["colors"][0]):
            reader = ImagePredictionIO(form, GRAY, large=100)
            scan = scan_of(reader, tmp_path / "a.tif")
            assert isinstance(scan.image, LargeImage)
            assert scan.size == (70, 90)
            scan.image.close()
            folder = tmp_path / f"out{form.colors is None}"
            reader.write(folder, "a", labels_of(form, (70, 90)), scan)
            with tifffile.TiffFile(folder / "a.tif") as tiff:
                assert tiff.pages.first.is_tiled
                assert tiff.pages.first.compression != 1
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # It is ours, and no bomb.
            assert torch.equal(reader.load(folder, "a"), labels_of(form, (70, 90)))
            reader.write(folder / "png", "a", labels_of(form, (70, 90)), scan, "png")
            assert torch.equal(reader.load(folder / "png", "a"), labels_of(form, (70, 90)))
            monkeypatch.undo()
            monkeypatch.setattr("lightning_dice.data.images.prediction_io.TILE", 32)

    @pytest.mark.parametrize("classes", [1, 3])
    @pytest.mark.parametrize("size", [(6, 9), (600, 530)])
    def test_probabilities(self, classes, size, tmp_path):
        reader = ImagePredictionIO(MaskFormat(["c0", "c1", "c2"][:classes], "sigmoid"), GRAY)
        probs = torch.rand(classes, *size)
        scan = scan_of(reader, save_image(tmp_path, size=size))
        assert reader.write_probabilities(tmp_path / "p", "sub/a", probs, scan) == [tmp_path / "p" / "sub" / "a.tif"]
        with tifffile.TiffFile(tmp_path / "p" / "sub" / "a.tif") as tiff:
            assert len(tiff.pages) == 1
            stored = tiff.asarray()
        assert stored.dtype == np.float32
        assert np.array_equal(stored.reshape(probs.shape), probs.numpy())
        assert torch.equal(reader.load_probabilities(tmp_path / "p", "sub/a"), probs)
        assert reader.load_probabilities(tmp_path / "p", "a") is None
        with pytest.raises(DataError, match=rf"a\.tif: holds {classes} planes, but 2 are required"):
            ImagePredictionIO(MaskFormat(["x", "y"], "sigmoid"), GRAY).load_probabilities(tmp_path / "p", "sub/a")
        whole = (tmp_path / "p" / "sub" / "a.tif").read_bytes()
        (tmp_path / "p" / "sub" / "a.tif").write_bytes(whole[:100])
        with pytest.raises(DataError, match=r"a\.tif: cannot be decoded"):
            reader.load_probabilities(tmp_path / "p", "sub/a")

    @pytest.mark.parametrize("case", ["../a", "/a", "a/../../b", ""])
    def test_nothing_is_written_elsewhere(self, case):
        with pytest.raises(DataError, match="outside the folder"):
            ImagePredictionIO(LESION, GRAY).names(case)

    def test_another_format(self):
        with pytest.raises(DataError, match="format must be png or tiff for images, got nifti"):
            ImagePredictionIO(LESION, GRAY).names("a", "nifti")


class TestLoad:
    def test_missing_and_duplicate_masks(self, tmp_path):
        reader = ImagePredictionIO(LESION, GRAY)
        with pytest.raises(DataError, match=r"the mask of the case a does not exist: a\.png or a\.tif"):
            reader.load(tmp_path, "a")
        scan = scan_of(reader, save_image(tmp_path, "image.png"))
        for format in ("png", "tiff"):
            reader.write(tmp_path, "a", torch.zeros(1, 6, 9, dtype=torch.bool), scan, format)
        with pytest.raises(DataError, match="exists twice"):
            reader.load(tmp_path, "a")

    def test_strange_values(self, tmp_path):
        Image.fromarray(np.full((3, 3), 7, np.uint8)).save(tmp_path / "a.png")
        with pytest.raises(DataError, match=r"a\.png: holds the values 7 \(9 pixels\)"):
            ImagePredictionIO(LESION, GRAY).load(tmp_path, "a")

    def test_a_plane_that_is_missing_or_of_another_size(self, tmp_path):
        reader = ImagePredictionIO(MaskFormat(["a", "b"], "sigmoid"), GRAY)
        for name, size in (("a", (3, 3)), ("b", (3, 4))):
            (tmp_path / name).mkdir()
            Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / name / "x.png")
        with pytest.raises(DataError, match="differ in size"):
            reader.load(tmp_path, "x")
        (tmp_path / "b" / "x.png").unlink()
        with pytest.raises(DataError, match=r"b/x\.png: cannot be opened"):
            reader.load(tmp_path, "x")


class TestFind:
    def test_sub_folders_unicode_and_hidden_files(self, tmp_path):
        for name in ("b.png", "a c.jpg", "sub/ü.tif", "sub/deeper/a.BMP", ".hidden.png", ".git/x.png", "sub/.x.png"):
            save_image(tmp_path, name)
        (tmp_path / "notes.txt").write_text("no image")
        found = ImagePredictionIO(LESION, GRAY).find(tmp_path)
        assert [item.case for item in found] == ["a c", "b", "sub/deeper/a", "sub/ü"]
        assert [item.files for item in found][3] == (tmp_path / "sub" / "ü.tif",)

    def test_a_file(self, tmp_path):
        path = save_image(tmp_path, "sub/a.png")
        assert ImagePredictionIO(LESION, GRAY).find(path) == [PredictionItem("a", (path,))]

    def test_two_of_one_name(self, tmp_path):
        save_image(tmp_path, "x/a.png")
        save_image(tmp_path, "x/a.bmp")
        with pytest.raises(DataError, match=r"a\.bmp and a\.png would have masks of the same name"):
            ImagePredictionIO(LESION, GRAY).find(tmp_path)

    def test_links(self, tmp_path):
        home, away = tmp_path / "home", tmp_path / "away"
        save_image(home, "a.png")
        save_image(away, "b.png")
        save_image(away, "c.png")
        (home / "twin.png").symlink_to(home / "a.png")
        (home / "out.png").symlink_to(away / "b.png")
        (home / "gone.png").symlink_to(home / "missing.png")
        (home / "self.png").symlink_to(home / "self.png")
        (home / "loop").symlink_to(home)
        (home / "outside").symlink_to(away)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = ImagePredictionIO(LESION, GRAY).find(home)
        assert [item.case for item in found] == ["a", "gone", "self", "twin"]
        texts = {str(warning.message).split(": ")[0].rsplit("/")[-1]: warning.category for warning in caught}
        assert texts == {"loop": FileWarning, "out.png": SkippedWarning, "outside": SkippedWarning}
        for name in ("gone", "self"):
            with pytest.raises(DataError, match=rf"{name}\.png: "):
                ImagePredictionIO(LESION, GRAY).read(PredictionItem(name, (home / f"{name}.png",)))
        with pytest.warns(FileWarning, match="loop: is a link"):
            found = ImagePredictionIO(LESION, GRAY, follow_symlinks=True).find(home)
        assert [item.case for item in found] == ["a", "gone", "out", "outside/b", "outside/c", "self", "twin"]


class TestRead:
    def test_a_gif_named_png_is_read_with_a_warning(self, tmp_path):
        save_image(tmp_path, "a.gif").rename(tmp_path / "a.png")
        reader = ImagePredictionIO(LESION, GRAY)
        with pytest.warns(FileWarning, match=r"a\.png: is a GIF file by its content, and was read as one"):
            assert scan_of(reader, tmp_path / "a.png").image.shape == (1, 6, 9)

    @pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jpeg", "a.bmp", "a.tif", "a.TIFF"])
    def test_others_are_not(self, name, tmp_path):
        assert scan_of(ImagePredictionIO(LESION, GRAY), save_image(tmp_path, name)).size == (6, 9)

    def test_an_array_is_read_as_training_does(self, tmp_path):
        pixels = np.random.default_rng(0).random((6, 9), dtype=np.float32)
        np.save(tmp_path / "a.npy", pixels)
        assert np.array_equal(scan_of(ImagePredictionIO(LESION, GRAY), tmp_path / "a.npy").image[0].numpy(), pixels)


def test_sources_have_readers(tmp_path):
    form = MaskFormat(["background", "a"], label_map={255: 1})
    reader = folder_source(tmp_path / "nowhere", form, channels=1).reader
    assert reader == ImagePredictionIO(form, GRAY)
    drawn = SyntheticSource(size=(32, 32)).reader
    assert drawn == ImagePredictionIO(MaskFormat(["object"], "sigmoid"), GRAY)
    assert SyntheticSource(size=(32, 32, 32)).reader.names("a") == [Path("a.nii.gz")]
