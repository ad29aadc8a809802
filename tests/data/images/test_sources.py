"""Folders as people have them: the contents of their files, and everything that is refused."""

from __future__ import annotations

import pickle
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from omegaconf import OmegaConf
from PIL import Image

from lightning_dice.data.errors import DataError
from lightning_dice.data.images.mask_format import MaskFormat
from lightning_dice.data.images.sources import FolderSource
from tests.data.image_sources import folder_source

REAL = Path(__file__).parents[3].parent / "shared" / "data"
TWO = MaskFormat(["background", "lesion"])
MASK = np.array([[0, 0, 1], [0, 1, 1]], np.uint8)


def write(root: Path, *names: str, mask: object = MASK, size: tuple[int, int] = (2, 3)) -> None:
    """Files by their place under `root`: files below `masks` are masks, others are images."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = sum(name.encode())  # each image its own, that none is a duplicate
        image = np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype(np.uint8)
        array = np.asarray(mask, np.uint8) if "mask" in name else image
        Image.fromarray(array).save(path, **({"format": "PNG"} if "mask" in name else {}))


def pairs(root: Path, *stems: str, split: str = "", **settings: object) -> None:
    for stem in stems:
        write(root, f"images/{split}/{stem}.png", f"masks/{split}/{stem}.png", **settings)


def refusal(source: FolderSource) -> str:
    with pytest.raises(DataError) as caught:
        source.check()
    return str(caught.value)


def test_a_case(tmp_path):
    pairs(tmp_path, "a", split="train")
    pairs(tmp_path, "b", split="val")
    source = folder_source(tmp_path, TWO)
    cases = pickle.loads(pickle.dumps(source.split("train")))  # as a data loader's worker gets it
    sample = cases[0]
    with Image.open(tmp_path / "images/train/a.png") as image:
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    assert torch.equal(sample.image, expected)
    assert torch.equal(sample.mask, torch.from_numpy(MASK))
    assert sample.case == "a"
    assert (len(cases), list(cases.sizes)) == (1, [(2, 3)])
    assert source.split("test") is None
    with pytest.raises(IndexError):
        cases[1]


def test_hydras_containers(tmp_path):
    """As from the command line: lists and maps are OmegaConf's, keys may be strings."""
    pairs(tmp_path, "a", "b", mask=MASK * 255)
    given = OmegaConf.create({"classes": ["background", "lesion"], "label_map": {255: 1}, "fractions": [0.5, 0.5, 0]})
    mask_format = MaskFormat(given.classes, label_map=given["label_map"])
    source = folder_source(str(tmp_path), mask_format, fractions=given.fractions)
    report = source.check()
    assert "lesion" in report
    assert "Warning" not in report
    assert "omegaconf" not in pickle.dumps(source.split("train")).decode("latin")
    assert torch.equal(source.split("train")[0].mask, torch.from_numpy(MASK))


# Planes


def planes(root: Path, *classes: str) -> None:
    for case, values in {"a": MASK, "b": 1 - MASK}.items():
        write(root, f"images/train/{case}.png")
        for number, name in enumerate(classes):
            write(root, f"masks/train/{name}/{case}.png", mask=values if number else np.ones_like(MASK))


def test_a_folder_for_each_class(tmp_path):
    planes(tmp_path, "vein", "artery")
    source = folder_source(tmp_path, MaskFormat(["artery", "vein"], "sigmoid"), fractions=(1, 0, 0))
    assert torch.equal(source.split("train")[0].mask, torch.from_numpy(np.stack([MASK, np.ones_like(MASK)])))
    shares = source.survey().shares(["train"])
    assert (shares["artery"].fraction, shares["vein"].fraction, shares[None].fraction) == (0.5, 1, 0)


def test_a_class_without_its_mask(tmp_path):
    planes(tmp_path, "vein", "artery")
    (tmp_path / "masks/train/vein/b.png").unlink()
    source = folder_source(tmp_path, MaskFormat(["artery", "vein"], "sigmoid"))
    assert "images/train/b.png: has no mask in masks/train/vein" in refusal(source)
    source = folder_source(tmp_path, MaskFormat(["artery", "vein", "nerve"], "sigmoid"))
    assert "masks/train: has folders for the classes artery, vein, but none for nerve" in refusal(source)


def test_a_class_in_0_and_255(tmp_path):
    planes(tmp_path, "vein", "artery")
    for case in "ab":
        write(tmp_path, f"masks/train/vein/{case}.png", mask=MASK * 255)
    text = refusal(folder_source(tmp_path, MaskFormat(["artery", "vein"], "sigmoid")))
    assert "masks/train/vein: all masks hold 0 and 255 alone" in text
    for case in "ab":  # not annotated at all: nothing to learn, but the other class can be
        write(tmp_path, f"masks/train/vein/{case}.png", mask=np.full_like(MASK, 255))
    report = folder_source(tmp_path, MaskFormat(["artery", "vein"], "sigmoid")).check()
    assert "class 'vein' never occurs" in report
    assert "(ignored)       50% (1)" in report


# What is wrong


def test_every_problem_is_listed_at_once(tmp_path):
    pairs(tmp_path, "good", "small", "values", "broken", "turned", "colour")
    write(tmp_path, "masks/small.png", mask=[[0, 1]])
    write(tmp_path, "masks/turned.png", mask=MASK.T)
    write(tmp_path, "masks/values.png", mask=[[0, 7, 7], [9, 0, 1]])
    write(tmp_path, "masks/colour.png", mask=[[[255, 0, 0]] * 3] * 2)
    data = (tmp_path / "images/broken.png").read_bytes()
    (tmp_path / "images/broken.png").write_bytes(data[: len(data) - 30])
    write(tmp_path, "masks/orphan.png", "images/alone.png")
    (tmp_path / "masks/good.png").write_bytes(b"")
    text = refusal(folder_source(tmp_path, TWO))
    assert text.startswith(f"8 problems in {tmp_path}:\n")
    for line in [
        "masks/small.png: is 1x2 (height x width), but its image small.png is 2x3",
        "masks/turned.png: is 3x2 (height x width), but its image turned.png is 2x3, transposed",
        "masks/values.png: holds the values 7 (2 pixels), 9 (1 pixels), which are not ids: required 0 to 1 or 255",
        "masks/colour.png: is painted in colours ([255,0,0] 6 pixels), but ids are required",
        "images/broken.png: cannot be decoded",
        "masks/orphan.png: has no image",
        "images/alone.png: has no mask",
        "masks/good.png: is empty (0 bytes)",
    ]:
        assert f"- {line}" in text


def test_long_lists_are_cut_and_hide_no_other_kind(tmp_path):
    pairs(tmp_path, *(f"case{i}" for i in range(30)), mask=[[0, 1]])
    write(tmp_path, "images/alone.png")
    text = refusal(folder_source(tmp_path, TWO))
    assert text.startswith("31 problems")
    assert "- images/alone.png: has no mask" in text
    assert "- and 11 more of this kind\n  Give the mask the image's size" in text
    assert text.count("\n- ") == 21


def gif(path: Path) -> None:
    Image.fromarray(MASK[..., None].repeat(3, 2) * 90).save(path, format="GIF")


def bomb(path: Path) -> None:
    """A PNG's header of a billion pixels, in a file of a few bytes."""
    start = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    path.write_bytes(start + struct.pack(">I", zlib.crc32(start[12:])) + b"\0\0\0\0IDAT\x35\xaf\x06\x1e")


FAULTS = {
    "empty": (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-30]), "cannot be decoded"),
    "text": (lambda path: path.write_text("not found"), "is not a PNG, JPEG, BMP, TIFF or NumPy image"),
    "bomb": (bomb, "may be a decompression bomb"),
    "broken-link": (
        lambda path: (path.unlink(), path.symlink_to("nowhere.png")),
        "is a link to nowhere.png, which does not exist",
    ),
    "circle": (lambda path: (path.unlink(), path.symlink_to(path.name)), "is a link to|cannot be opened"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), None),
}


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_bad_files_are_all_in_one_report(tmp_path, kind):
    names = {name: f"{name} (1) größe" for name in FAULTS if name != "folder"}
    pairs(tmp_path, "good", "other", *names.values(), split="train")
    for name, stem in names.items():
        FAULTS[name][0](tmp_path / kind / "train" / f"{stem}.png")
    text = refusal(folder_source(tmp_path, TWO))
    assert text.startswith(f"{len(names)} problems in {tmp_path}:")
    for name, stem in names.items():
        assert re.search(rf"- {kind}/train/{re.escape(stem)}\.png: ({FAULTS[name][1]})", text), name


def test_files_are_recognized_by_content_not_name(tmp_path):
    pairs(tmp_path, "a", "b")
    gif(tmp_path / "images/a.png")
    pairs(tmp_path / "elsewhere", "c")
    for kind in ("images", "masks"):  # Links are followed, out of the folder too.
        (tmp_path / kind / "c.png").symlink_to(tmp_path / "elsewhere" / kind / "c.png")
    source = folder_source(tmp_path, TWO, fractions=(1, 0, 0), masks="images/../masks")
    source.check()
    assert [sample.case for sample in source.split("train")] == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["images", "masks"])
@pytest.mark.parametrize("fault", ["empty", "truncated", "folder", "broken-link"])
def test_a_file_that_changes_after_the_check_is_named(tmp_path, kind, fault):
    pairs(tmp_path, "a", "b")
    source = folder_source(tmp_path, TWO, fractions=(1, 0, 0))
    source.check()
    cases = source.split("train")
    FAULTS[fault][0](tmp_path / kind / "a.png")
    with pytest.raises(DataError, match=rf"{kind}/a\.png: (is empty|cannot be|is a link)"):
        cases[0]
    assert cases[1].case == "b"


def test_a_mask_of_another_size_after_the_check_is_named(tmp_path):
    pairs(tmp_path, "a")
    cases = folder_source(tmp_path, TWO).split("train")
    write(tmp_path, "masks/a.png", mask=[[0, 1]])
    with pytest.raises(DataError, match=r"masks/a\.png: is 1x2 .*but its image a\.png is 2x3"):
        cases[0]


# Other ways to store a mask


def test_channels_that_are_classes(tmp_path):
    pairs(tmp_path, "a", "b")
    channels = np.stack([MASK, 1 - MASK])
    for case in "ab":
        (tmp_path / f"masks/{case}.png").unlink()
    np.save(tmp_path / "masks/a.npy", channels)
    tifffile.imwrite(tmp_path / "masks/b.tif", channels[1:], photometric="minisblack")
    form = MaskFormat(["artery", "vein"], "softmax", multichannel_masks=True)
    source = folder_source(tmp_path, form, fractions=(1, 0, 0))
    report = source.check()
    assert "2 cases, one mask for each class, softmax" in report
    assert [sample.mask.tolist() for sample in source.split("train")] == [(1 - MASK).tolist()] * 2
    shares = source.survey().shares(["train"])
    assert (shares["artery"].fraction, shares["vein"].fraction) == (0.5, 0.5)
    assert (shares["artery"].cases, shares["vein"].cases) == (2, 2)


def test_a_folder_for_each_class_of_a_softmax(tmp_path):
    planes(tmp_path, "vein", "artery")
    source = folder_source(tmp_path, MaskFormat(["background", "artery", "vein"]), fractions=(1, 0, 0))
    text = refusal(source)
    assert "2 problems" in text
    assert "masks/train/artery/a.png: holds 3 pixels of several classes" in text
    for case in "ab":
        write(tmp_path, f"masks/train/vein/{case}.png", mask=[[1, 0, 0], [0, 0, 0]])
    write(tmp_path, "masks/train/artery/b.png", mask=MASK)
    source = folder_source(tmp_path, MaskFormat(["background", "artery", "vein"]), fractions=(1, 0, 0))
    source.check()
    expected = MASK.copy()
    expected[0, 0] = 2
    assert [sample.mask.tolist() for sample in source.split("train")] == [expected.tolist()] * 2
    shares = source.survey().shares(["train"])
    assert [shares[name].fraction for name in ("background", "artery", "vein")] == pytest.approx([1 / 3, 1 / 2, 1 / 6])


def test_a_class_of_a_softmax_that_holds_no_ids(tmp_path):
    planes(tmp_path, "vein", "artery")
    write(tmp_path, "masks/train/vein/a.png", mask=MASK * 7)
    text = refusal(folder_source(tmp_path, MaskFormat(["background", "artery", "vein"])))
    assert "masks/train/vein/a.png: holds the values 7 (3 pixels), which are not ids: required 0 to 1" in text


@pytest.mark.parametrize(
    ("activation", "classes", "values", "expected"),
    [
        ("softmax", ["background", "lesion"], (0, 255), "'data.label_map={255:1}'"),
        ("sigmoid", ["lesion"], (0, 255), "'data.label_map={255:1}'"),
        ("softmax", ["background", "cell", "nucleus"], (0, 128, 255), "'data.label_map={128:1,255:2}'"),
        ("softmax", ["background", "cell"], (0, 128, 255), "'data.label_map={128:1}'"),
        ("sigmoid", ["cell", "nucleus"], (0, 128, 255), "'data.label_map={128:1,255:2}'"),
        ("softmax", ["background", "lesion"], (255,), "'data.label_map={255:1}'"),
        ("softmax", ["background", "lesion"], (1, 2), "map values to ids"),
    ],
)
def test_masks_of_0_and_255_are_refused(tmp_path, activation, classes, values, expected):
    pairs(tmp_path, "a", "b", mask=np.resize(values, (2, 3)))
    pairs(tmp_path, "c", mask=np.zeros((2, 3)) + values[0])
    assert expected in refusal(folder_source(tmp_path, MaskFormat(classes, activation)))


def test_masks_of_0_and_255_without_an_ignored_label(tmp_path):
    pairs(tmp_path, "a", mask=MASK * 255)
    text = refusal(folder_source(tmp_path, MaskFormat(["background", "lesion"], ignore_index=None)))
    assert "holds the values 255 (3 pixels), which are not ids: required 0 to 1" in text
    assert "Set 'data.label_map={255:1}'." in text


def test_the_remedies_for_0_and_255_work(tmp_path):
    pairs(tmp_path, "a", "b", mask=MASK * 255)
    source = folder_source(tmp_path, MaskFormat(["background", "lesion"], label_map={255: 1}))
    source.check()
    assert torch.equal(source.split("train")[0].mask, torch.from_numpy(MASK))


@pytest.mark.parametrize(
    ("mask", "settings"),
    [(MASK * 7, {}), (MASK, {"channels": 1}), (MASK.T, {})],
    ids=["values", "channels", "size"],
)
def test_a_case_that_changed_after_the_check_is_refused_by_name(tmp_path, mask, settings):
    pairs(tmp_path, "a", mask=mask)
    cases = folder_source(tmp_path, TWO, **settings).split("train")
    with pytest.raises(DataError, match=r"a\.png"):
        cases[0]


def test_a_turned_photograph_must_match_its_mask(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    pairs(tmp_path, "a", "b")
    (tmp_path / "images/a.png").unlink()
    Image.new("RGB", (3, 2)).save(tmp_path / "images/a.jpg", exif=exif)
    source = folder_source(tmp_path, TWO)
    assert "a.jpg is 3x2 after the turn that its orientation tag asks for, transposed" in refusal(source)
    write(tmp_path, "masks/a.png", mask=MASK.T)
    sizes = {
        pair.case: size
        for split in ("train", "val")
        for pair, size in zip(folder_source(tmp_path, TWO).split(split).pairs, source.split(split).sizes, strict=True)
    }
    assert sizes == {"a": (3, 2), "b": (2, 3)}
    assert folder_source(tmp_path, TWO).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": ""}, "root must name a folder, got ''; set data.root="),
        ({"channels": 0}, "channels must be 1 or more, got 0"),
        ({"fractions": [0.7, 0.3]}, r"fractions must be the shares.*got \[0.7, 0.3\]"),
        ({"fractions": [0.7, 0.3, 0.3]}, "which sum to 1"),
        ({"fractions": [0, 0.5, 0.5]}, "fractions must"),
        ({"fractions": [1.2, -0.1, -0.1]}, "fractions must"),
        ({"workers": -1}, "workers must be 0 or more"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        folder_source(**{"root": "data", "mask_format": TWO, **settings})


# The report


def test_report(tmp_path):
    pairs(tmp_path, "a", split="train", mask=[[0, 0, 1], [0, 255, 255]])
    pairs(tmp_path, "b", split="train", mask=np.zeros((2, 5)), size=(2, 5))
    pairs(tmp_path, "c", split="val", mask=[[0, 0, 2], [0, 0, 255]])
    pairs(tmp_path, "d", split="val", mask=[[0, 255, 255], [0, 0, 255]])
    (tmp_path / "images/val/c.png").write_bytes((tmp_path / "images/train/a.png").read_bytes())
    Image.new("L", (3, 2)).save(tmp_path / "images/val/d.png")
    report = folder_source(tmp_path, MaskFormat(["background", "cell", "nucleus"])).check()
    assert report == "\n".join(
        [
            f"{tmp_path}: 4 cases, masks of ids, softmax",
            "",
            "split  cases  height x width  images",
            "train  2      2x3 to 2x5      8-bit RGB",
            "val    2      2x3             8-bit RGB (1), 8-bit gray (1)",
            "",
            "pixels (cases)  train      val",
            "background      81.2% (2)  58.3% (2)",
            "cell            6.25% (1)  0% (0)",
            "nucleus         0% (0)     8.33% (1)",
            "(ignored)       12.5% (1)  33.3% (2)",
            "",
            "Warning: class 'nucleus' never occurs in the train split",
            "Warning: no foreground but ignored pixels (255) in 1 masks: val/d; "
            "if 255 is foreground there, set 'data.label_map={255:1}'",
            "Warning: 1 image is in more than one split: train/a = val/c",
        ]
    )


# Real images

CAMVID = ["Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicycle"]
STREETS = [0.15814, 0.24096, 0.00987, 0.29324, 0.06686, 0.11185, 0.01078, 0.01427, 0.04643, 0.00639, 0.00535]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "mask_format", "settings", "splits", "fractions", "ignored"),
    [
        pytest.param(
            *("wbc", MaskFormat(["background", "cytoplasm", "nucleus"]), {}),
            *((210, 70, 70), [0.73606, 0.15115, 0.11279], 0),
            id="wbc",
        ),
        pytest.param(
            *("dsb2018", MaskFormat(["nucleus"], "sigmoid"), {}, (115, 26, 34), [0.14601], 0),
            id="dsb2018",
        ),
        pytest.param(
            *("camvid", MaskFormat(CAMVID, label_map={11: 255}), {}, (367, 101, 233), STREETS, 0.03587),
            id="camvid",
        ),
        pytest.param(
            *("idrid_lesions", MaskFormat(["MA", "HE", "EX", "SE", "OD"], "sigmoid"), {}),
            *((44, 10, 27), [0.00104, 0.01013, 0.00900, 0.00186, 0.01781], 0),
            id="idrid",
        ),
        pytest.param(
            *("chase_db1", MaskFormat(["background", "vessel"]), {"masks": "masks/{split}/2ndHO"}),
            *((16, 4, 8), [0.93362, 0.06638], 0),
            id="chase-rater-2",
        ),
        pytest.param(
            *("hrf_av", MaskFormat(["artery", "vein"], "sigmoid"), {"fractions": (0.8, 0.2, 0)}),
            *((19, 5, 21), [0.04020, 0.04525], 0),
            id="hrf-val-drawn",
        ),
    ],
)
def test_real_images(folder, mask_format, settings, splits, fractions, ignored):
    """The fractions are those of each folder's README, over all splits, to its last digit."""
    if not (REAL / folder).is_dir():
        pytest.skip(f"no real images here ({folder})")
    source = folder_source(REAL / folder, mask_format, workers=1, **settings)
    survey = source.survey()
    shares = survey.shares(["train", "val", "test"])
    assert [shares[name].fraction for name in mask_format.classes] == pytest.approx(fractions, abs=6e-6)
    assert shares[None].fraction == pytest.approx(ignored, abs=6e-6)
    assert tuple(len(survey.facts[split]) for split in ("train", "val", "test")) == splits
    sample = source.split("test")[0]
    assert tuple(sample.image.shape[1:]) == tuple(sample.mask.shape[-2:]) == source.split("test").sizes[0]
