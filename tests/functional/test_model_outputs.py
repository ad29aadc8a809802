from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_dice.functional import pad_to_multiple, read_logits
from lightning_dice.functional.model_outputs import crop_to, resize_to

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


@pytest.mark.parametrize("output", [{"masks": FINE}, [], "logits", [FINE, None]])
def test_refuses(output):
    with pytest.raises(ValueError, match="net"):
        read_logits(output)


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
