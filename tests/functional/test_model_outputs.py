from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_dice.functional import pad_to_multiple, read_logits
from lightning_dice.functional.model_outputs import crop_to, read_output, resize_to

FINE, COARSE = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (FINE, [FINE]),
        ({"out": FINE, "aux": COARSE}, [FINE]),
        ({"logits": FINE}, [FINE]),
        (SimpleNamespace(logits=COARSE), [COARSE]),
        ([FINE, COARSE], [FINE, COARSE]),
        ({"out": (FINE, COARSE)}, [FINE, COARSE]),
    ],
    ids=["tensor", "torchvision", "mapping", "transformers", "deep-supervision", "nested"],
)
def test_reads(output, expected):
    assert all(a is b for a, b in zip(read_logits(output), expected, strict=True))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"masks": FINE}, r"a mapping without \"out\" or \"logits\": \['masks'\]"),
        ([], "must return a tensor"),
        ("logits", "must return a tensor.* got a str"),
        (None, "must return a tensor.* got None"),
        ([None, FINE], "must return a tensor.* got a list of None, a tensor"),
        ((FINE, None), r"a tuple of a tensor \(1, 2, 8, 8\), None: each of them must be logits of the same classes"),
        (
            (FINE, torch.zeros(1, 64, 8, 8)),
            r"a tensor \(1, 64, 8, 8\): each of them must be logits of the same classes",
        ),
        ((FINE, torch.tensor(0.5)), r"a tensor \(\): each of them"),
        ((FINE, torch.zeros(1, 2)), r"a tensor \(1, 2\): each of them"),  # smp's aux_params: labels of the image
        ({"out": FINE, "aux": torch.zeros(1, 3, 4, 4)}, "of an auxiliary head, a tensor"),
        ({"out": FINE, "aux": [COARSE, "x"]}, "of an auxiliary head, a str"),
        (torch.zeros(1, 8, 8), "with 2 space axes, got a tensor"),
        (torch.zeros(1, 2, 8, 8, 8, 8), "with 2 space axes, got a tensor"),
        (torch.zeros(1, 2, 9, 8), "logits of 9x8 for an image of 8x8 pixels: they must be as large as the image"),
        (torch.zeros(1, 2, 8, 7), "logits of 8x7 for an image of 8x8 pixels"),
        (torch.zeros(1, 2, 5, 8), "logits of 5x8 for an image of 8x8 pixels"),
    ],
)
def test_refuses(output, message):
    with pytest.raises(ValueError, match=message):
        read_logits(output, (8, 8))


def test_auxiliary_heads():
    output = read_output({"aux_deep": [COARSE, FINE], "out": FINE, "features": COARSE, "aux": COARSE, "aux_none": None})
    assert all(a is b for a, b in zip(output.levels, [FINE], strict=True))
    assert all(a is b for a, b in zip(output.auxiliary, [COARSE, FINE, COARSE], strict=True))


def test_stacked_levels():
    """As MONAI's DynUNet returns them while it trains."""
    levels = torch.randn(2, 3, 4, 8, 8)
    assert [level.tolist() for level in read_logits(levels, (8, 8))] == levels.movedim(1, 0).tolist()
    assert [level is levels for level in read_logits(levels, (4, 8, 8))] == [True]


@pytest.mark.parametrize(("size", "image"), [((3, 8), (5, 8)), ((1, 2), (64, 3)), ((1,), (1,)), ((17,), (65,))])
def test_coarser_logits(size, image):
    assert read_logits(torch.zeros(1, 2, *size), image)[0].shape[2:] == size


@pytest.mark.parametrize("space", [(33,), (33, 64), (5, 6, 7)])
def test_padding_is_undone(space):
    image = torch.rand(2, 3, *space)
    padded = pad_to_multiple(image, 16)
    assert all(size % 16 == 0 for size in padded.shape[2:])
    torch.testing.assert_close(crop_to(padded, space), image, rtol=0, atol=0)


def test_padding_repeats_the_edge():
    assert pad_to_multiple(torch.tensor([[[1.0, 2.0, 3.0]]]), 4).tolist() == [[[1, 2, 3, 3]]]


def test_nothing_to_pad_nothing_copied():
    assert pad_to_multiple(FINE, 8) is FINE


@pytest.mark.parametrize("space", [(8,), (8, 6), (4, 6, 8)])
def test_resizing_constant_logits(space):
    half = torch.full((1, 2, *(size // 2 for size in space)), 3.0)
    assert resize_to(half, space).shape == (1, 2, *space)
    torch.testing.assert_close(resize_to(half, space), torch.full((1, 2, *space), 3.0))
