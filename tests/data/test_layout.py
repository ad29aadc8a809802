"""Which files belong together is known from their names alone: the files of these tests are empty."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_dice.data.folder import FolderSource
from lightning_dice.data.layout import scan
from lightning_dice.data.masks import MaskFormat
from lightning_dice.data.source import DataError

TWO = MaskFormat(["background", "lesion"])


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def pairs(root: Path, *stems: str, split: str = "") -> None:
    write(root, *(f"{kind}/{split}/{stem}.png" for stem in stems for kind in ("images", "masks")))


def names(root: Path, images="images", masks="masks", fractions=(0.7, 0.15, 0.15), seed=0) -> dict[str, list[str]]:
    layout = scan(root, images, masks, (), fractions, seed)
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


def test_other_files_are_passed_over(tmp_path):
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
    "no-root": (lambda root: None, ["does not exist, a folder is required", "Set data.root=/path/to/folder"]),
    "file": (lambda root: root.write_text(""), ["is a file, a folder is required"]),
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
def test_what_does_not_fit_together(tmp_path, make, expected):
    make(tmp_path / "data")
    source = FolderSource(tmp_path / "data", TWO)
    with pytest.raises(DataError) as caught:
        source.split("train")
    for part in expected:
        assert part in str(caught.value)
    with pytest.raises(DataError):
        source.check()
