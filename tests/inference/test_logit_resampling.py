from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from lightning_dice.inference import logit_resampling
from lightning_dice.inference.logit_resampling import resample_chunks

SIZES = [
    ((7,), (19,)),
    ((19,), (7,)),
    ((1,), (5,)),
    ((9, 12), (9, 31)),
    ((9, 12), (20, 12)),
    ((23, 12), (5, 30)),
    ((40, 3), (2, 3)),
    ((6, 8, 5), (11, 4, 9)),
    ((3, 4, 5), (30, 4, 5)),
]
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def chunks(logits, cuts):
    edges = [0, *cuts, logits.shape[1]]
    return [(a, b, logits[:, a:b]) for a, b in pairwise(edges)]


@pytest.mark.parametrize(("space", "size"), SIZES)
def test_equals_torch_in_any_chunks(space, size, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, *space, generator=generator)
    expected = F.interpolate(logits[None], size=size, mode=MODES[len(space)], align_corners=False)[0]
    for chunk in (2**26, 1):
        monkeypatch.setattr(logit_resampling, "CHUNK_BYTES", chunk)
        for cuts in ([], range(1, space[0]), range(2, space[0], 3)):
            rows, parts = 0, []
            for start, stop, part in resample_chunks(chunks(logits, cuts), space, size):
                assert start == rows
                rows = stop
                parts.append(part)
            torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_rows_come_as_soon_as_they_can():
    taken = []

    def counted():
        for chunk in chunks(torch.randn(2, 10, 4), range(1, 10)):
            taken.append(chunk[0])
            yield chunk

    first = next(resample_chunks(counted(), (10, 4), (20, 4)))
    # Row 0 of the new image lies above the centre of the old one's, and row 1 between rows 0 and 1.
    assert first[:2] == (0, 3)
    assert taken == [0, 1]


def test_what_has_the_size_is_not_touched():
    given = chunks(torch.randn(2, 6, 4), [3])
    for (*_, mine), (*_, theirs) in zip(resample_chunks(given, (6, 4), (6, 4)), given, strict=True):
        assert mine is theirs


def test_rows_that_are_done_with_are_let_go(monkeypatch):
    kept = []
    concatenate = torch.cat

    def recorded(tensors, dim):
        kept.append(tensors[0].shape[dim])
        return concatenate(tensors, dim)

    monkeypatch.setattr(logit_resampling.torch, "cat", recorded)
    for _ in resample_chunks(chunks(torch.randn(2, 40, 4), range(1, 40)), (40, 4), (50, 4)):
        pass
    assert len(kept) == 39
    assert max(kept) <= 2
