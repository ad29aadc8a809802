"""Stored values become ids or planes, or are refused with the setting that would fix them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_dice.data.errors import DataError
from lightning_dice.data.images.image_reader import DecodedImage, read_image
from lightning_dice.data.images.mask_format import MaskFormat
from lightning_dice.data.label_map import suggest_label_map

TWO = ["background", "lesion"]


def decoded_of(values: object, dtype: type = np.uint8, **settings: object) -> DecodedImage:
    pixels = np.asarray(values, dtype)
    return DecodedImage(pixels[..., None] if pixels.ndim == 2 else pixels, Path("m.png"), 255, **settings)


@pytest.mark.parametrize(
    ("settings", "stored", "expected"),
    [
        ({"classes": TWO}, [[0, 1, 255]], [[0, 1, 255]]),
        ({"classes": TWO, "label_map": {255: 1}}, [[0, 255]], [[0, 1]]),
        ({"classes": TWO, "label_map": {"255": "1", 7: 255}}, [[0, 255, 7]], [[0, 1, 255]]),
        ({"classes": TWO, "label_map": {0: 1, 1: 0}}, [[0, 1]], [[1, 0]]),
        ({"classes": TWO, "ignore_index": -100, "label_map": {9: -100}}, [[0, 1, 9]], [[0, 1, -100]]),
        ({"classes": TWO, "ignore_index": None}, [[0, 1]], [[0, 1]]),
        ({"classes": ["lesion"], "activation": "sigmoid"}, [[0, 1, 255]], [[[0, 1, 255]]]),
        ({"classes": ["a", "b"], "activation": "sigmoid"}, [[0, 1, 2, 255]], [[[0, 1, 0, 255]], [[0, 0, 1, 255]]]),
    ],
    ids=["ids", "0-255", "yaml-strings", "swapped", "ignore-negative", "ignore-none", "binary", "planes"],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_masks_become_ids_or_planes(settings, stored, expected, dtype):
    mask_format = MaskFormat(**settings)
    mask = mask_format.encode([mask_format.read(decoded_of(stored, dtype))])
    assert mask.tolist() == expected
    assert mask.dtype == (torch.int32 if mask_format.ignore_index == -100 else torch.uint8)


def test_many_classes_need_more_than_8_bit():
    mask_format = MaskFormat([f"class {i}" for i in range(300)], ignore_index=65535)
    mask = mask_format.encode([np.array([[0, 299, 65535]], np.uint16)])
    assert mask.dtype == torch.int32
    assert mask.tolist() == [[0, 299, 65535]]


def test_planes_of_their_own():
    mask_format = MaskFormat(["a", "b"], "sigmoid")
    mask = mask_format.encode([np.array([[0, 1]], np.uint8), np.array([[1, 255]], np.uint8)], planes=True)
    assert mask.tolist() == [[[0, 1]], [[1, 255]]]
    with pytest.raises(ValueError, match=r"the values 2 \(1 pixels\), which are not ids: required 0 to 1 or 255"):
        mask_format.encode([np.array([[0, 2]], np.uint8)] * 2, planes=True)


@pytest.mark.parametrize("alpha", [False, True])
def test_equal_channels_are_ids(alpha):
    values = np.array([[0, 1, 1]], np.uint8)
    pixels = np.stack([values] * 3 + [values * 0 + 9] * alpha, -1)
    assert MaskFormat(TWO).read(decoded_of(pixels, alpha=alpha)).tolist() == [[0, 1, 1]]


RED, BLACK, BLUE = [255, 0, 0], [0, 0, 0], [0, 0, 255]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"colors": [BLACK, RED, BLUE], "classes": ["a", "b", "c"]}, [[0, 1, 2]]),
        ({"colors": [RED, BLUE, BLACK], "classes": ["a", "b", "c"]}, [[2, 0, 1]]),
        ({"colors": [BLACK, RED, BLUE], "classes": TWO, "label_map": {2: 255}}, [[0, 1, 255]]),
        ({"colors": [BLACK, RED, BLUE], "classes": ["b", "c"], "activation": "sigmoid"}, [[[0, 1, 0]], [[0, 0, 1]]]),
    ],
    ids=["in-order", "order-counts", "ignored-colour", "sigmoid"],
)
def test_colors(settings, expected):
    mask_format = MaskFormat(**settings)
    assert mask_format.encode([mask_format.read(decoded_of([[BLACK, RED, BLUE]]))]).tolist() == expected


CHECKER = np.kron(np.array([[0, 1], [1, 0]], np.uint8), np.ones((5, 5), np.uint8))


@pytest.mark.parametrize(
    ("settings", "decoded", "message"),
    [
        ({}, decoded_of([[BLACK, RED]]), r"painted in colours.*\[255,0,0\] 1 pixels.*'data.colors=\[\[0,0,0\]"),
        ({"colors": [BLACK, RED]}, decoded_of([[BLUE, BLUE]]), r"data.colors does not list: \[0,0,255\] 2 pixels"),
        ({"colors": [BLACK, RED]}, decoded_of([[1]], np.uint16), "data.colors needs 8-bit RGB"),
        ({}, decoded_of([[0, 0.5]], np.float32), "holds fractions.*Threshold"),
        ({}, decoded_of([[0, np.nan]], np.float32), "holds fractions"),
        ({}, decoded_of([[0, 1]], lossy=True), "JPEG.*Save masks as PNG"),
        ({"label_map": {255: 1}}, decoded_of([[0, 3, 252, 255]], lossy=True), r"JPEG.*\(0, 3, 252, 255 \.\.\.\)"),
        ({}, decoded_of([[BLACK, RED]], lossy=True), "JPEG"),
    ],
    ids=["colours", "unlisted", "colours-16", "fractions", "nan", "jpeg-ids", "jpeg-blurred", "jpeg-colours"],
)
def test_masks_that_are_refused(settings, decoded, message):
    with pytest.raises(DataError, match=f"m.png.*{message}"):
        MaskFormat(TWO, **settings).read(decoded)


def test_clean_jpeg_masks_are_read(tmp_path):
    Image.fromarray(np.kron(np.array([[0, 255]], np.uint8), np.ones((8, 8), np.uint8))).save(tmp_path / "m.jpg")
    mask_format = MaskFormat(TWO, label_map={255: 1})
    mask = mask_format.encode([mask_format.read(read_image(tmp_path / "m.jpg"))])
    assert mask[0].tolist() == [0] * 8 + [1] * 8


def test_a_values_count_is_in_the_message():
    with pytest.raises(ValueError, match=r"the values 2 \(2 pixels\), 9 \(1 pixels\), .* required 0 to 1 or 255 \(ign"):
        MaskFormat(TWO).encode([np.array([[0, 2, 2, 9]], np.uint8)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": "lesion"}, r"classes must be a list of names, got 'lesion'.*\[background,lesion\]"),
        ({"classes": []}, "classes must be a list"),
        ({"classes": ["a", "a"]}, "classes must differ"),
        ({"classes": ["lesion"]}, r"every id.*data.classes=\[background,lesion\].*data.activation=sigmoid"),
        ({"activation": None}, "activation must be"),
        (
            {"ignore_index": 0},
            r"ignore_index must be no class's id, got 0, the id of 'background'.*data.label_map=\{0:255\}",
        ),
        ({"activation": "sigmoid", "ignore_index": 2}, "got 2, the id of 'lesion'"),
        ({"classes": [str(i) for i in range(256)]}, "got 255, the id of '255'"),
        ({"ignore_index": 1.5}, "ignore_index must hold whole numbers, got 1.5"),
        ({"label_map": {255: 2}}, "label_map must map to the ids 0 to 1 or ignore_index=255, got 255:2"),
        ({"label_map": {"x": 1}}, "label_map must hold whole numbers, got 'x'"),
        ({"label_map": [1]}, "label_map must map stored values to ids"),
        ({"colors": [BLACK, [1, 2]]}, r"colors must be \[red, green, blue\] of 0 to 255 each, got \[1, 2\]"),
        ({"colors": [BLACK, [256, 0, 0]]}, "colors must be"),
        ({"colors": [BLACK, BLACK]}, "colors must differ"),
        ({"colors": [BLACK]}, "got none for 'lesion'"),
        ({"colors": [BLACK, RED, BLUE]}, r"got 3 entries.*'data.label_map=\{2:255\}'"),
        ({"colors": 5}, "colors must be a list"),
        ({"colors": [0, 0, 0]}, r"got \[0\]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskFormat(**{"classes": TWO, **settings})


@pytest.mark.parametrize(
    ("values", "ids", "expected"),
    [
        ({0, 255}, 2, "Set 'data.label_map={255:1}'."),
        ({0, 7, 8, 9}, 3, "'data.label_map={7:255}'"),
        ({0, 128, 255}, 3, "Set 'data.label_map={128:1,255:2}'."),
        (
            {0, 1, 2},
            2,
            "Name all classes in data.classes, or map values to ids, or to 255 to ignore them: "
            "'data.label_map={2:255}'.",
        ),
    ],
)
def test_suggested_label_maps(values, ids, expected):
    assert expected in suggest_label_map(values, range(ids), 255)


# A plane for each class


def exclusive(*planes: object, classes: tuple[str, ...] = ("background", "cell", "nucleus"), **settings: object):
    mask_format = MaskFormat(classes, **settings)
    return mask_format.encode([np.asarray(plane, np.uint8) for plane in planes], planes=True)


@pytest.mark.parametrize(
    ("planes", "expected"),
    [
        ([[[0, 1, 0, 0]], [[0, 0, 1, 0]]], [[0, 1, 2, 0]]),
        ([[[1, 0, 0, 1]], [[0, 1, 0, 0]], [[0, 0, 1, 0]]], [[0, 1, 2, 0]]),
        ([[[0, 1, 255, 255]], [[0, 255, 0, 255]]], [[0, 255, 255, 255]]),
    ],
    ids=["without-background", "with-background", "ignored-by-any"],
)
def test_planes_that_exclude_each_other_become_ids(planes, expected):
    mask = exclusive(*planes)
    assert mask.tolist() == expected
    assert mask.dtype == torch.uint8


def test_planes_of_0_and_255():
    assert exclusive([[0, 255]], [[255, 0]], label_map={255: 1}).tolist() == [[2, 1]]


def test_planes_that_overlap_or_leave_holes_are_refused():
    with pytest.raises(ValueError, match=r"holds 2 pixels of several classes.*data\.activation=sigmoid"):
        exclusive([[1, 1, 1, 0, 1]], [[1, 1, 0, 1, 255]])
    with pytest.raises(ValueError, match="holds 1 pixels of no class"):
        exclusive([[1, 0]], [[0, 0]], [[0, 0]])


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_channels_that_are_classes(activation):
    mask_format = MaskFormat(["a", "b", "c"], activation, label_map={255: 1}, multichannel_masks=True)
    pixels = np.eye(3, dtype=np.uint8)[np.array([[0, 1, 2, 2]])] * 255
    stored = mask_format.read_planes(decoded_of(pixels))
    expected = [[[1, 0, 0, 0]], [[0, 1, 0, 0]], [[0, 0, 1, 1]]] if activation == "sigmoid" else [[0, 1, 2, 2]]
    assert mask_format.encode(stored, planes=True).tolist() == expected
    if activation == "softmax":
        assert mask_format.encode(mask_format.read_planes(decoded_of(pixels[..., 1:])), True).tolist() == expected
    with pytest.raises(DataError, match=r"has 1 channels .*needs one for each of 3 classes"):
        mask_format.read_planes(decoded_of(pixels[..., :1]))


def test_alpha_may_be_a_class():
    mask_format = MaskFormat(["a", "b", "c", "d"], "sigmoid", multichannel_masks=True)
    stored = mask_format.read_planes(decoded_of(np.ones((1, 1, 4)), alpha=True))
    assert mask_format.encode(stored, planes=True).tolist() == [[[1]]] * 4


def test_multichannel_masks_have_no_colors():
    with pytest.raises(ValueError, match="multichannel_masks=true needs masks without colors"):
        MaskFormat(TWO, multichannel_masks=True, colors=[[0, 0, 0], [1, 1, 1]])
