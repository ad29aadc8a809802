"""Files are matched by their names: the files of these tests are empty."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_dice.data.errors import DataError
from lightning_dice.data.images.file_layout import Layout, find_pairs
from lightning_dice.data.images.mask_format import MaskFormat
from lightning_dice.data.splits import SplitSettings
from tests.data.image_sources import folder_source

TWO = MaskFormat(["background", "lesion"])


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def pairs(root: Path, *stems: str, split: str = "") -> None:
    write(root, *(f"{kind}/{split}/{stem}.png" for stem in stems for kind in ("images", "masks")))


def names(root: Path, images="images", masks="masks", fractions=(0.7, 0.15, 0.15), seed=0) -> dict[str, list[str]]:
    layout = find_pairs(root, images, masks, SplitSettings(fractions, seed))
    assert not layout.problems
    return {split: [pair.case for pair in part] for split, part in layout.pairs.items()}


@pytest.mark.parametrize(
    ("files", "settings", "expected"),
    [
        (
            [f"{kind}/{place}.png" for place in ("train/a", "val/b", "test/c") for kind in ("images", "masks")],
            {},
            {"train": ["a"], "val": ["b"], "test": ["c"]},
        ),
        (
            ["images/training/a.png", "masks/train/a.png", "images/valid/b.png", "masks/validation/b.png"],
            {},
            {"train": ["a"], "val": ["b"]},
        ),
        (
            ["train/images/a.png", "train/masks/a.png", "val/images/b.png", "val/masks/b.png"],
            {"images": "{split}/images", "masks": "{split}/masks"},
            {"train": ["a"], "val": ["b"]},
        ),
        (
            [
                *("images/train/a.png", "masks/train/1/a.png", "masks/train/2/a.png"),
                *("images/val/b.png", "masks/val/1/b.png", "masks/val/2/b.png"),
            ],
            {"masks": "masks/{split}/1"},
            {"train": ["a"], "val": ["b"]},
        ),
        (
            ["images/train/a.png", "images/val/b.png", "masks/a.png", "masks/b.png"],
            {},
            {"train": ["a"], "val": ["b"]},
        ),
        (
            ["scans/a.png", "labels/masks/a.png"],
            {"images": "scans", "masks": "labels/masks"},
            {"train": ["a"]},
        ),
        (
            ["all/a.png", "all/a_mask.png"],
            {"images": "all", "masks": "all"},
            {"train": ["a"]},
        ),
    ],
    ids=["splits", "other-words", "split-first", "rater", "masks-together", "other-names", "side-by-side"],
)
def test_layouts(tmp_path, files, settings, expected):
    write(tmp_path, *files)
    assert names(tmp_path, **settings) == expected


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        *[("a", f"a{suffix}") for suffix in ("", "_mask", "-mask", "_masks", "_seg", "_segmentation", "_label")],
        *[("a", f"a{suffix}") for suffix in ("_labels", "_gt", "_groundtruth", "_manual1", "_annotation", "_MASK")],
        ("a_image", "a_mask"),
        ("a_img", "a"),
        ("case_0000", "case"),
        ("a_img", "a_img_mask"),
        ("frame.1", "frame.1"),
        ("benign (1)", "benign (1)_mask"),
    ],
)
def test_pairs_by_stem(tmp_path, image, mask):
    write(tmp_path, f"images/{image}.PNG", f"masks/{mask}.Png")
    assert names(tmp_path)["train"] == [image]


def test_numbered_frames_are_not_stripped_into_one(tmp_path):
    pairs(tmp_path, "frame_0000", "frame_0001")
    assert names(tmp_path) == {"train": ["frame_0001"], "val": ["frame_0000"]}


def test_other_files_are_ignored(tmp_path):
    pairs(tmp_path, "a", "b")
    for name in ("Thumbs.db", ".DS_Store", "._a.png", "notes.txt"):
        (tmp_path / "images" / name).write_bytes(b"?")
    assert names(tmp_path) == {"train": ["a"], "val": ["b"]}


# Splits


@pytest.mark.parametrize(
    ("count", "fractions", "sizes"),
    [
        (1, (0.7, 0.15, 0.15), (1, 0, 0)),
        (2, (0.7, 0.15, 0.15), (1, 1, 0)),
        (4, (0.7, 0.15, 0.15), (2, 1, 1)),
        (20, (0.7, 0.15, 0.15), (14, 3, 3)),
        (20, (0.8, 0.2, 0), (16, 4, 0)),
        (4, (1, 0, 0), (4, 0, 0)),
    ],
)
def test_drawn_splits(tmp_path, count, fractions, sizes):
    pairs(tmp_path, *(f"case{i}" for i in range(count)))
    found = names(tmp_path, fractions=fractions)
    assert tuple(len(found.get(split, [])) for split in ("train", "val", "test")) == sizes
    drawn = [case for cases in found.values() for case in cases]
    assert sorted(drawn) == sorted(f"case{i}" for i in range(count))


def test_a_draw_is_its_seeds_alone(tmp_path, monkeypatch):
    pairs(tmp_path, *(f"case{i}" for i in range(20)))
    first = names(tmp_path, seed=1)
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: reversed(sorted(listed(path))))
    assert names(tmp_path, seed=1) == first
    assert names(tmp_path, seed=2) != first
    assert first["val"] == ["case3", "case5", "case8"]  # on any machine, with any Python


def test_val_is_drawn_from_train(tmp_path):
    pairs(tmp_path, *(f"case{i}" for i in range(20)), split="train")
    pairs(tmp_path, "other", split="test")
    found = names(tmp_path, fractions=(0.6, 0.2, 0.2))
    assert (len(found["train"]), len(found["val"]), found["test"]) == (15, 5, ["other"])


def empty_folder(root: Path) -> None:
    for name in ("images", "masks", "notes"):
        (root / name).mkdir(parents=True)


def other_names(root: Path) -> None:
    write(root, "scans/a.png", "masks/a.png")


def split_first(root: Path) -> None:
    write(root, "train/images/a.png", "train/masks/a.png")


def raters(root: Path) -> None:
    write(root, "images/train/a.png", "masks/train/one/a.png", "masks/train/two/a.png")


LAYOUTS = {
    "no-root": (lambda root: None, ["does not exist, but a folder is required", "Set data.root=/path/to/folder"]),
    "file": (lambda root: root.write_text(""), ["is a file, but a folder is required"]),
    "empty-root": (lambda root: root.mkdir(), ["images: there is no such folder; data is empty"]),
    "empty": (empty_folder, ["images: holds no image (.png .jpg", "images is empty", "masks: holds no mask"]),
    "other-names": (other_names, ["images: there is no such folder; data holds masks/, scans/", "Set data.images="]),
    "split-first": (split_first, ["""Set 'data.images="{split}/images"' 'data.masks="{split}/masks"'"""]),
    "raters": (raters, ["masks/train: holds no mask", "one/, two/", """'data.masks="masks/{split}/one"'"""]),
    "no-mask": (lambda root: write(root, "images/a.png", "images/b.png", "masks/b.png"), ["images/a.png: has no mask"]),
    "no-image": (lambda root: write(root, "images/b.png", "masks/a.png", "masks/b.png"), ["masks/a.png: has no image"]),
    "two-masks": (
        lambda root: write(root, "images/a.png", "masks/a.png", "masks/a_mask.tif"),
        ["images/a.png: several masks fit it: a.png, a_mask.tif"],
    ),
    "two-images": (
        lambda root: write(root, "images/a.png", "images/a.jpg", "masks/a.png"),
        ["1 problem in", "images/a.jpg: several images have one stem: a.jpg, a.png"],
    ),
    "one-mask-for-two": (
        lambda root: write(root, "images/a.png", "images/a_img.png", "masks/a.png"),
        ["masks/a.png: fits several images: a.png, a_img.png"],
    ),
    "no-train": (
        lambda root: write(root, "images/test/a.png", "masks/test/a.png"),
        ["images: has no split to train on, only test"],
    ),
    "split-without-masks": (
        lambda root: write(root, "images/train/a.png", "masks/train/a.png", "images/test/b.png"),
        ["images/test: has no folder of masks beside it; masks found for: train", "Add masks/test"],
    ),
    "loose": (
        lambda root: write(root, "images/train/a.png", "images/b.png", "masks/train/a.png"),
        ["images: holds 1 images such as b.png beside the folders train"],
    ),
    "two-words": (
        lambda root: write(root, "images/train/a.png", "images/val/b.png", "images/valid/c.png", "masks/train/a.png"),
        ["images of the split val are in several folders: val, valid"],
    ),
}


@pytest.mark.parametrize(("make", "expected"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_files_that_do_not_match(tmp_path, make, expected):
    make(tmp_path / "data")
    source = folder_source(tmp_path / "data", TWO)
    with pytest.raises(DataError) as caught:
        source.split("train")
    for part in expected:
        assert part in str(caught.value)
    with pytest.raises(DataError):
        source.check()


# Patterns, lists, names of splits


def layout_of(root: Path, *, images="images", masks="masks", splits=None, split_files=None, **settings) -> Layout:
    return find_pairs(root, images, masks, SplitSettings((1, 0, 0), 0, splits, split_files), **settings)


def pairing(root: Path, **settings) -> dict[str, dict[str, list[str]]]:
    """The files of each case of each split, below the root."""
    layout = layout_of(root, **settings)
    assert not layout.problems
    return {
        split: {pair.case: [path.relative_to(root).as_posix() for path in (pair.image, *pair.masks)] for pair in part}
        for split, part in layout.pairs.items()
    }


PATTERNS = {
    "cityscapes": (
        {"images": "left/{split}/*/{case}_left.png", "masks": "gt/{split}/*/{case}_gt_ids.png"},
        [
            *("left/train/bonn/b_1_left.png", "gt/train/bonn/b_1_gt_ids.png", "gt/train/bonn/b_1_gt_color.png"),
            *("left/val/ulm/u_1_left.png", "gt/val/ulm/u_1_gt_ids.png", "left/val/ulm/u_1_left.json"),
        ],
        {
            "train": {"b_1": ["left/train/bonn/b_1_left.png", "gt/train/bonn/b_1_gt_ids.png"]},
            "val": {"u_1": ["left/val/ulm/u_1_left.png", "gt/val/ulm/u_1_gt_ids.png"]},
        },
    ),
    "classes-beside-each-other": (
        {"masks": "masks/{case}_{class}", "planes": ("upper", "left_upper")},
        ["images/a.png", "masks/a_upper.png", "masks/a_left_upper.PNG"],
        {"train": {"a": ["images/a.png", "masks/a_upper.png", "masks/a_left_upper.PNG"]}},
    ),
    "classes-in-the-images-folder": (
        {"images": "all/{case}", "masks": "all/{case}_{class}.png", "planes": ("artery", "vein")},
        ["all/a (1).jpg", "all/a (1)_vein.png", "all/a (1)_artery.png"],
        {"train": {"a (1)": ["all/a (1).jpg", "all/a (1)_artery.png", "all/a (1)_vein.png"]}},
    ),
    "a-folder-for-each-case": (
        {"images": "{case}/{case}_image.tif", "masks": "{case}/{class}", "planes": ("artery", "vein")},
        ["a/b_image.tif", *(f"{c}/{name}" for c in "ab" for name in (f"{c}_image.tif", "artery.png", "vein.png"))],
        None,
    ),
    "raters": (
        {"masks": "masks/{split}", "raters": ("r1", "r2"), "planes": ("artery", "vein")},
        ["images/train/a.png", *(f"masks/train/{r}/{c}/a.png" for r in ("r2", "r1") for c in ("vein", "artery"))],
        {
            "train": {
                "a": [
                    "images/train/a.png",
                    *(f"masks/train/{r}/{c}/a.png" for r in ("r1", "r2") for c in ("artery", "vein")),
                ]
            }
        },
    ),
    "raters-by-name": (
        {"masks": "masks/{case}.{rater}", "raters": ("r1", "r2")},
        ["images/a.png", "masks/a.r2.png", "masks/a.r1.png"],
        {"train": {"a": ["images/a.png", "masks/a.r1.png", "masks/a.r2.png"]}},
    ),
    "rater-before-split": (
        {"masks": "masks/{rater}/{split}", "raters": ("r1", "r2")},
        ["images/train/a.png", "masks/r1/train/a.png", "masks/r2/train/a_mask.png"],
        {"train": {"a": ["images/train/a.png", "masks/r1/train/a.png", "masks/r2/train/a_mask.png"]}},
    ),
    "other-words": (
        {"splits": {"train": "train2017", "val": "val2017", "test": None}},
        [f"{kind}/{place}.png" for place in ("train2017/a", "val2017/b", "test/c") for kind in ("images", "masks")],
        {
            "train": {"a": ["images/train2017/a.png", "masks/train2017/a.png"]},
            "val": {"b": ["images/val2017/b.png", "masks/val2017/b.png"]},
        },
    ),
    "no-background": (
        {"planes": ("background", "vein"), "background": "background"},
        ["images/a.png", "masks/vein/a.png"],
        {"train": {"a": ["images/a.png", "masks/vein/a.png"]}},
    ),
}


@pytest.mark.parametrize(("settings", "files", "expected"), PATTERNS.values(), ids=PATTERNS.keys())
def test_patterns(tmp_path, settings, files, expected):
    write(tmp_path, *files)
    found = pairing(tmp_path, **settings)
    if expected is None:
        expected = {"train": {c: [f"{c}/{c}_image.tif", f"{c}/artery.png", f"{c}/vein.png"] for c in "ab"}}
    assert found == expected


def voc(root: Path, **lists: str) -> None:
    write(root, *(f"JPEGImages/{name}.jpg" for name in ("a", "b c", "d", "extra")))
    write(root, *(f"Masks/{name}.png" for name in ("a", "b c", "d", "nobody's")))
    (root / "Sets").mkdir()
    for split, text in lists.items():
        (root / f"Sets/{split}.txt").write_text(text)


VOC = {"images": "JPEGImages", "masks": "Masks", "split_files": "Sets/{split}.txt"}


def test_split_files(tmp_path):
    voc(tmp_path, train="a\nb c\n\n", val="# names\n/some/where/d.jpg /masks/d.png 1\n", trainval="a\nb c\nd")
    found = pairing(tmp_path, **VOC)
    assert {split: list(part) for split, part in found.items()} == {"train": ["a", "b c"], "val": ["d"]}
    found = pairing(tmp_path, **VOC, splits={"train": "trainval"})
    assert list(found["train"]) == ["a", "b c", "d"]


def test_problems_of_split_files(tmp_path):
    voc(tmp_path, train="a\nb c\nmissing\na", val="a\nd")
    problems = layout_of(tmp_path, **VOC).problems
    text = "\n".join(map(str, problems))
    assert len(problems) == 3
    assert "train.txt: names 'missing', of which there is no image" in text
    assert "train.txt: names 'a', twice" in text
    assert "val.txt: names 'a', which the list of train names too" in text
    (tmp_path / "Masks/d.png").unlink()
    problems = layout_of(tmp_path, **VOC).problems
    assert any("d.jpg: has no mask in" in str(problem) for problem in problems)


MISFITS = {
    "no-image-of-the-pattern": (
        ["images/a.png", "masks/a.png"],
        {"images": "images/{case}_rgb"},
        ["images/{case}_rgb: no file matches", "Set data.images"],
    ),
    "no-mask-of-the-pattern": (
        ["images/a.png", "masks/a.png"],
        {"masks": "masks/{case}_gt"},
        ["masks/{case}_gt: no file matches", "Set data.masks"],
    ),
    "no-masks-of-a-class": (
        ["images/a.png", "masks/a_vein.png"],
        {"masks": "masks/{case}_{class}", "mask_format": MaskFormat(["artery", "vein"], "sigmoid")},
        ["masks/{case}_artery: no mask matches"],
    ),
    "one-mask-of-a-class-missing": (
        ["images/a.png", "images/b.png", *(f"masks/{n}.png" for n in ("a_artery", "a_vein", "b_vein", "c_vein"))],
        {"masks": "masks/{case}_{class}", "mask_format": MaskFormat(["artery", "vein"], "sigmoid")},
        ["images/b.png: has no mask in masks/{case}_artery", "masks/c_vein.png: has no image"],
    ),
    "one-name-in-two-cities": (
        ["images/x/a.png", "images/y/a.png", "masks/a.png"],
        {"images": "images/*/{case}"},
        ["several images have one stem: a.png, a.png"],
    ),
    "no-such-rater": (
        ["images/a.png", "masks/one/a.png"],
        {"raters": ["one", "two"]},
        ["masks: has no folder for the rater two; masks holds one/"],
    ),
    "a-background-by-one-rater-alone": (
        ["images/a.png", "masks/one/background/a.png", *(f"masks/{r}/lesion/a.png" for r in ("one", "two"))],
        {"raters": ["one", "two"]},
        ["images: raters have masks of different classes: one: background, lesion; two: lesion"],
    ),
    "two-lists": (
        ["images/a.png", "masks/a.png", "sets/val.txt", "sets/valid.txt", "sets/train.txt"],
        {"split_files": "sets/{split}.txt"},
        ["cases of the split val are in several lists: val.txt, valid.txt"],
    ),
    "no-such-split": (
        ["images/train/a.png", "masks/train/a.png"],
        {"splits": {"train": "train", "val": "val2017"}},
        ["images: there is nothing for the split val, which data.splits calls 'val2017'"],
    ),
    "no-list": (
        ["images/a.png", "masks/a.png"],
        {"split_files": "sets/{split}.txt"},
        ["there is no list of cases; looked for sets/train.txt"],
    ),
}


@pytest.mark.parametrize(("files", "settings", "expected"), MISFITS.values(), ids=MISFITS.keys())
def test_patterns_that_do_not_fit(tmp_path, files, settings, expected):
    write(tmp_path, *files)
    source = folder_source(tmp_path, **{"mask_format": TWO, **settings})
    with pytest.raises(DataError) as caught:
        source.split("train")
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masks": "masks/{spilt}"}, r"masks must be a place .*\{split\}, \{case\}, .*got 'masks/\{spilt\}'"),
        ({"images": "images/*"}, r"with \* in it, it must name files by \{case\}"),
        ({"masks": "masks/{rater}"}, "raters must list the names for"),
        ({"masks": "masks/{case}", "raters": ["a", "b"]}, r"masks must have \{rater\} in it"),
        ({"split_files": "train.txt"}, r"split_files must have \{split\} in it"),
        ({"splits": {"training": "x"}}, "splits must map train, and perhaps val and test, to their names"),
        ({"splits": {"val": "x"}}, "splits must map train, and perhaps val and test"),
        ({"raters": ["a"]}, "raters must be a list of at least two names"),
        ({"raters": ["a", "mean"]}, "must differ from each other and from mean"),
        ({"raters": ["a", "b"], "fusion": "vote"}, "fusion must be mean, majority, random or one of"),
        ({"raters": ["a", "b"], "reference": "mean"}, "a score needs one hard mask"),
        (
            {"raters": ["a", "b"], "mask_format": MaskFormat(["x"], "sigmoid", None)},
            "fusion=mean needs an ignore_index",
        ),
        ({"nodata": 0, "mask_format": MaskFormat(["x"], "sigmoid", None)}, "nodata needs an ignore_index"),
        (
            {"masks": "m/{case}_{class}", "mask_format": MaskFormat(["a", "b"], multichannel_masks=True)},
            "masks must not have {class} in it",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        folder_source(**{"root": "data", "mask_format": TWO, **settings})
