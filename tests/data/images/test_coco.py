"""Annotations in COCO's format become masks, or a list of all their problems."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_dice.data import CocoSource, MaskFormat
from lightning_dice.data.errors import DataError
from lightning_dice.data.images.coco import decode_run_lengths, rasterize
from tests.data.image_sources import coco_source

SIZE = (6, 8)
TWO = MaskFormat(["background", "cell", "nucleus"])
PLANES = MaskFormat(["cell", "nucleus"], "sigmoid")


def box(left: int, top: int, right: int, bottom: int) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def filled(*boxes: tuple[int, int, int, int, int]) -> np.ndarray:
    """Rectangles `(left, top, right, bottom, value)`, later ones on top."""
    mask = np.zeros(SIZE, np.uint8)
    for left, top, right, bottom, value in boxes:
        mask[top:bottom, left:right] = value
    return mask


def annotation(number: int, image: int, category: int, segmentation: Any, **others: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "segmentation": segmentation, **others}


def content(images: list[str], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    entries = [{"id": i, "file_name": name, "height": SIZE[0], "width": SIZE[1]} for i, name in enumerate(images)]
    names = {10: "cell", 20: "nucleus", 30: "dust"}
    categories = [{"id": key, "name": name} for key, name in names.items()]
    return {"images": entries, "annotations": annotations, "categories": categories}


def write(root: Path, given: object, split: str = "train", images: tuple[str, ...] = ("a.jpg",)) -> None:
    for name in images:
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(path)
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(given if isinstance(given, str) else json.dumps(given))


def mask_of(root: Path, mask_format: MaskFormat, **settings: Any) -> torch.Tensor:
    source = coco_source(root, mask_format, fractions=(1, 0, 0), **settings)
    source.check()
    cases = pickle.loads(pickle.dumps(source.split("train")))  # as a data loader's worker gets it
    return cases[0].mask


def refusal(source: CocoSource) -> str:
    with pytest.raises(DataError) as caught:
        source.check()
    return str(caught.value)


# Objects become masks

CELL, NUCLEUS = (1, 1, 7, 5), (3, 2, 5, 4)
CROWD = {"counts": [0, 12, 36], "size": list(SIZE)}  # the two leftmost columns
OBJECTS = [
    annotation(1, 0, 20, box(*NUCLEUS)),
    annotation(2, 0, 10, box(*CELL)),
    annotation(3, 0, 10, CROWD, iscrowd=1),
    annotation(4, 0, 30, box(0, 0, 8, 6)),
]


def test_the_smaller_object_lies_on_top(tmp_path):
    write(tmp_path, content(["a.jpg"], OBJECTS))
    expected = filled((0, 0, 2, 6, 255), (*CELL, 1), (*NUCLEUS, 2))
    assert torch.equal(mask_of(tmp_path, TWO), torch.from_numpy(expected))
    write(tmp_path, content(["a.jpg"], OBJECTS[::-1]))
    assert torch.equal(mask_of(tmp_path, TWO), torch.from_numpy(expected))


def test_classes_may_overlap_with_a_sigmoid(tmp_path):
    write(tmp_path, content(["a.jpg"], OBJECTS))
    planes = [filled((0, 0, 2, 6, 255), (*CELL, 1)), filled((*NUCLEUS, 1))]
    assert torch.equal(mask_of(tmp_path, PLANES), torch.from_numpy(np.stack(planes)))


def test_without_an_ignored_label_a_crowd_is_of_its_class(tmp_path):
    write(tmp_path, content(["a.jpg"], OBJECTS))
    expected = filled((0, 0, 2, 6, 1), (*CELL, 1), (*NUCLEUS, 2))
    form = MaskFormat(TWO.classes, ignore_index=None)
    assert torch.equal(mask_of(tmp_path, form), torch.from_numpy(expected))


def test_categories_may_be_merged(tmp_path):
    write(tmp_path, content(["a.jpg"], OBJECTS[:2]))
    form = MaskFormat(["tissue"], "sigmoid")
    mask = mask_of(tmp_path, form, categories={"cell": "tissue", "nucleus": "tissue"})
    assert torch.equal(mask[0], torch.from_numpy(filled((*CELL, 1))))


def test_the_report(tmp_path):
    write(tmp_path, content(["a.jpg", "sub/b c.jpg"], OBJECTS), images=("a.jpg", "sub/b c.jpg"))
    source = coco_source(tmp_path, TWO, fractions=(0.5, 0.5, 0))
    report = source.check()
    assert "Note: categories in instances_train.json without a class, which count as background: dust" in report
    assert "Note: 1 of 2 images in instances_train.json have no annotation of a class" in report
    cases = {pair.case: pair for split in ("train", "val") for pair in source.split(split).pairs}
    assert sorted(cases) == ["a", "sub/b c"]
    shares = source.survey().shares(["train", "val"])
    assert shares["nucleus"].fraction == 4 / 96
    assert (shares["cell"].fraction, shares[None].cases) == (20 / 96, 1)


def test_splits_by_other_words(tmp_path):
    for split, name in (("train2017", "a.jpg"), ("val2017", "b.jpg")):
        write(tmp_path, content([name], []), split, (name,))
    source = coco_source(tmp_path, TWO, splits={"train": "train2017", "val": "val2017"})
    assert [source.split(split)[0].case for split in ("train", "val")] == ["a", "b"]
    assert source.split("test") is None
    assert "annotations/instances_test.json: does not exist" in refusal(
        coco_source(tmp_path, TWO, splits={"train": "train2017", "test": "test"})
    )


# Pixels


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    return rasterize(np.array(decode_run_lengths(packed["counts"].decode())), packed["size"])


def test_run_lengths_are_exact():
    tool = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for size in ((1, 1), (7, 5), (40, 61), (300, 3)):
        for share in (0.0, 0.02, 0.5, 1.0):
            mask = (rng.random(size) < share).astype(np.uint8)
            assert np.array_equal(unpacked(tool.encode(np.asfortranarray(mask))), mask.astype(bool))


def test_outlines_against_cocos_own_tool():
    """Equal on whole pixels; elsewhere but for single pixels of the boundary, and without a bias."""
    tool = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    size = (60, 70)
    for _ in range(20):
        left, right = np.sort(rng.choice(71, 2, replace=False))
        top, bottom = np.sort(rng.choice(61, 2, replace=False))
        outline = box(int(left), int(top), int(right), int(bottom))
        theirs = unpacked(tool.merge(tool.frPyObjects(outline, *size)))
        assert np.array_equal(rasterize((np.reshape(np.float32(outline), (-1, 2)),), size), theirs)
    differ, more, total = 0, 0, 0
    for _ in range(60):
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(6, 30)))
        radius = 12 * rng.uniform(0.6, 1, len(angles))
        points = np.stack([35 + radius * np.cos(angles), 30 + radius * np.sin(angles)], 1).astype(np.float32)
        theirs = unpacked(tool.merge(tool.frPyObjects([points.ravel().tolist()], *size)))
        ours = rasterize((points,), size)
        differ, more, total = differ + (ours != theirs).sum(), more + ours.sum() - theirs.sum(), total + theirs.sum()
    assert differ < 0.025 * total
    assert abs(int(more)) < 0.005 * total


def test_an_outline_covers_the_pixels_whose_centres_it_holds():
    """Against the definition: the centre's winding by crossings, point by point."""
    rng = np.random.default_rng(1)
    size = (12, 14)
    for _ in range(10):
        points = rng.uniform(-2, 15, (rng.integers(3, 8), 2)).astype(np.float32)
        expected = np.zeros(size, bool)
        for row, column in np.ndindex(*size):
            x, y, inside = column + 0.5, row + 0.5, False
            for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
                if (y1 > y) != (y2 > y) and x < x1 + (y - y1) * (x2 - x1) / (y2 - y1):
                    inside = not inside
            expected[row, column] = inside
        assert np.array_equal(rasterize((points,), size), expected)


def test_several_outlines_are_one_object():
    halves = tuple(np.reshape(np.float32(box(*corners)), (-1, 2)) for corners in ((0, 0, 4, 6), (3, 0, 8, 6)))
    assert rasterize(halves, SIZE).all()


def test_no_gap_between_objects_that_share_an_edge():
    """Here the edge runs through the centres of pixels. The direction of an outline does not matter."""
    corners = np.float32([[0, 0], [8, 0], [8, 8], [0, 8]])
    above, below = (corners[list(part)] for part in ((0, 1, 2), (0, 2, 3)))
    assert np.array_equal(rasterize((above,), (8, 8)), np.triu(np.ones((8, 8), bool)))
    assert np.array_equal(rasterize((below,), (8, 8)), np.tril(np.ones((8, 8), bool)))
    for outline in (above, below):
        assert np.array_equal(rasterize((outline[::-1],), (8, 8)), rasterize((outline,), (8, 8)))


# What is wrong


def test_every_problem_is_listed_at_once(tmp_path):
    given = content(["a.jpg", "gone.jpg", "a.jpg", "../out.jpg", "a.png", "small.jpg"], [])
    given["images"].append({"id": 9, "file_name": "no-size.jpg"})
    given["annotations"] = [
        annotation(1, 0, 10, box(0, 0, 2, 2)),
        annotation(1, 0, 10, box(0, 0, 2, 2)),
        annotation(2, 77, 10, box(0, 0, 2, 2)),
        annotation(3, 0, 99, box(0, 0, 2, 2)),
        annotation(4, 0, 10, [[1, 2, 3]]),
        annotation(5, 0, 10, None),
        annotation(6, 0, 10, {"counts": [3, 3], "size": list(SIZE)}),
        annotation(7, 0, 10, {"counts": [48], "size": [8, 6]}),
        annotation(8, 0, 10, {"counts": "0P", "size": list(SIZE)}),
        annotation(9, 0, 10, [["x", 1, 2, 3, 4, 5]]),
    ]
    write(tmp_path, given, images=("a.jpg", "a.png"))
    Image.new("RGB", (3, 3)).save(tmp_path / "train/small.jpg")
    text = refusal(coco_source(tmp_path, TWO, fractions=(1, 0, 0)))
    file = "annotations/instances_train.json"
    for line in [
        f"{file}: the image 'a.jpg' (id 2) is listed twice",
        f"{file}: the file_name '../out.jpg' is not below train",
        f"{file}: the image 'no-size.jpg' has the height and width (None, None)",
        "train/gone.jpg: does not exist, and instances_train.json lists it",
        "train/a.jpg: has the name of another image, except for the suffix",
        f"{file}: small.jpg: is 6x8 (height x width), but its image small.jpg is 3x3",
        f"{file}: annotation 1 is listed twice",
        f"{file}: 1 annotations are of an image that is not listed, such as annotation 2 of the image 77",
        f"{file}: 1 annotations are of a category that is not listed, such as annotation 3 of 99",
        f"{file}: annotation 4 has an outline that is not [x, y, x, y ...] of at least three points",
        f"{file}: annotation 5 has no segmentation",
        f"{file}: annotation 6 has run lengths of 6 pixels, but 48 are required",
        f"{file}: annotation 7 has run lengths of the size [8, 6], its image is listed with [6, 8]",
        f"{file}: annotation 8 has run lengths that cannot be read (its end is missing)",
        f"{file}: annotation 9 has a segmentation that is not a list of outlines",
    ]:
        assert f"- {line}" in text
    assert text.startswith("15 problems")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"images": [', r"instances_train\.json: is not JSON \(Expecting value: line 1"),
        ("[]", "must be an object with lists of images, annotations and categories, got a list"),
        ('{"images": {}}', "got an object of images"),
    ],
    ids=["truncated", "list", "other"],
)
def test_invalid_annotation_files_are_refused(tmp_path, given, message):
    write(tmp_path, given)
    with pytest.raises(DataError, match=message):
        coco_source(tmp_path, TWO).check()


@pytest.mark.parametrize(
    ("classes", "settings", "message"),
    [
        (["background", "cat"], {}, "has no category for the classes cat, only cell, nucleus, dust"),
        (["background", "cell"], {"categories": {"car": "cell"}}, "has no category car, only cell, nucleus, dust"),
    ],
)
def test_classes_without_a_category(tmp_path, classes, settings, message):
    write(tmp_path, content(["a.jpg"], []))
    assert message in refusal(coco_source(tmp_path, MaskFormat(classes), **settings))


def test_no_annotations(tmp_path):
    assert "does not exist, but a folder is required" in refusal(coco_source(tmp_path / "none", TWO))
    (tmp_path / "labels").mkdir()
    assert f"there is no annotations/instances_train.json; {tmp_path.name} holds labels/" in refusal(
        coco_source(tmp_path, TWO)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mask_format": MaskFormat(["a"], "sigmoid", label_map={255: 1})},
            "label_map, colors and multichannel_masks must not be set",
        ),
        ({"annotations": "all.json"}, "annotations must have {split} in it if images does, got 'all.json'"),
        ({"categories": {"car": "vehicle"}}, "categories must map to classes"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        coco_source(**{"root": "data", "mask_format": TWO, **settings})
