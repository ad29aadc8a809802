from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lightning_dice.functional import coarser_target, coarser_weight, pad_target, pad_to_multiple

SIZES = [((9,), (4,)), ((8,), (4,)), ((13, 10), (7, 5)), ((6, 8), (3, 8)), ((5, 7), (1, 1)), ((6, 5, 4), (3, 2, 2))]


def cells(size, space):
    """Return the positions in each cell, by position in the coarser target."""
    for place in itertools.product(*map(range, space)):
        spans = [
            range(math.floor(i * n / m), math.ceil((i + 1) * n / m)) for i, n, m in zip(place, size, space, strict=True)
        ]
        yield place, list(itertools.product(*spans))


def random_ids(size, *, ignored, classes=4, dtype=torch.long):
    generator = torch.Generator().manual_seed(sum(size))
    ids = torch.randint(0, classes, (2, *size), generator=generator, dtype=dtype)
    if ignored:
        ids[torch.rand(ids.shape, generator=generator) < 0.6] = 255
        ids[1, ..., : size[-1] // 2 + 1] = 255  # Some cells hold nothing else.
    return ids


def random_planes(size, *, ignored, soft=False):
    generator = torch.Generator().manual_seed(sum(size))
    planes = torch.rand(2, 3, *size, generator=generator)
    planes = planes if soft else (planes > 0.7).float()
    if ignored:
        planes[torch.rand(planes.shape, generator=generator) < 0.6] = 255
        planes[1, ..., : size[-1] // 2 + 1] = 255
    return planes


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(("size", "space"), SIZES, ids=str)
class TestEqualsTheDefinition:
    def test_shares_of_ids(self, size, space, ignored):
        ids = random_ids(size, ignored=ignored)
        result = coarser_target(ids, space, activation="softmax", classes=4, ignore_index=255)
        assert result.shape == (2, 4, *space)
        assert result.dtype == torch.float32
        for (place, members), b in itertools.product(cells(size, space), range(2)):
            held = [int(ids[(b, *m)]) for m in members if ids[(b, *m)] != 255]
            expected = [held.count(c) / len(held) for c in range(4)] if held else [255.0] * 4
            assert result[(b, slice(None), *place)].tolist() == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("soft", [False, True])
    def test_means_of_planes(self, size, space, ignored, soft):
        planes = random_planes(size, ignored=ignored, soft=soft).double()
        result = coarser_target(planes, space, activation="sigmoid", classes=3, ignore_index=255)
        assert result.dtype == torch.float64
        for (place, members), b, c in itertools.product(cells(size, space), range(2), range(3)):
            held = [float(planes[(b, c, *m)]) for m in members if planes[(b, c, *m)] != 255]
            expected = math.fsum(held) / len(held) if held else 255.0
            assert float(result[(b, c, *place)]) == pytest.approx(expected, abs=1e-12)

    def test_means_of_soft_labels(self, size, space, ignored):
        soft = random_planes(size, ignored=False, soft=True).softmax(1)
        if ignored:
            # One ignored class makes the whole pixel ignored.
            soft[:, 1][random_planes(size, ignored=True)[:, 0] == 255] = 255
        result = coarser_target(soft, space, activation="softmax", classes=3, ignore_index=255)
        for (place, members), b in itertools.product(cells(size, space), range(2)):
            held = [soft[(b, slice(None), *m)] for m in members if soft[(b, 1, *m)] != 255]
            expected = torch.stack(held).mean(0) if held else torch.full((3,), 255.0)
            torch.testing.assert_close(result[(b, slice(None), *place)], expected)
            if held:
                assert float(result[(b, slice(None), *place)].sum()) == pytest.approx(1, abs=1e-6)

    def test_greatest_of_planes(self, size, space, ignored):
        planes = random_planes(size, ignored=ignored, soft=True)
        result = coarser_target(planes, space, activation="sigmoid", classes=3, ignore_index=255, reduce="max")
        for (place, members), b, c in itertools.product(cells(size, space), range(2), range(3)):
            held = [float(planes[(b, c, *m)]) for m in members if planes[(b, c, *m)] != 255]
            assert float(result[(b, c, *place)]) == (max(held) if held else 255.0)

    def test_rarest_of_ids(self, size, space, ignored):
        ids = random_ids(size, ignored=ignored)
        result = coarser_target(ids, space, activation="softmax", classes=4, ignore_index=255, reduce="max")
        assert result.dtype == ids.dtype
        for (place, members), b in itertools.product(cells(size, space), range(2)):
            held = {int(ids[(b, *m)]) for m in members} - {255}
            expected = min(held, key=lambda c: (int((ids[b] == c).sum()), -c)) if held else 255
            assert int(result[(b, *place)]) == expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64])
def test_max_keeps_the_dtype(dtype):
    planes = (torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.8).to(dtype)
    result = coarser_target(planes, (3, 3), activation="sigmoid", classes=2, ignore_index=255, reduce="max")
    assert result.dtype == dtype
    assert torch.equal(result.float(), F.max_pool2d(planes.float(), 2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_of_every_dtype(dtype):
    ids = random_ids((6, 6), ignored=True)
    for reduce in ("area", "max"):
        expected = coarser_target(ids, (3, 3), activation="softmax", classes=4, ignore_index=255, reduce=reduce)
        small = ids.to(dtype)
        # Also for uint8, whose 255 is the same label.
        result = coarser_target(small, (3, 3), activation="softmax", classes=4, ignore_index=255, reduce=reduce)
        torch.testing.assert_close(result, expected if reduce == "area" else expected.to(dtype))


def test_a_few_ignored_pixels_give_way_to_any_class():
    ids = torch.tensor([[0, 255, 0, 0, 1, 255, 255, 255]])
    result = coarser_target(ids, (4,), activation="softmax", classes=2, ignore_index=255, reduce="max")
    assert result.tolist() == [[0, 0, 1, 255]]
    few = ids[:, :4]
    result = coarser_target(few, (2,), activation="softmax", classes=2, ignore_index=255, reduce="max")
    assert result.tolist() == [[0, 0]]


def test_the_ignored_label_may_be_that_of_a_class():
    ids = torch.tensor([[0, 1, 2, 2, 0, 0]])
    shares = coarser_target(ids, (3,), activation="softmax", classes=3, ignore_index=0)
    assert shares[0].tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
    hard = coarser_target(ids, (3,), activation="softmax", classes=3, ignore_index=0, reduce="max")
    assert hard.tolist() == [[1, 2, 0]]


def test_more_classes_than_the_dtype_holds():
    ids = torch.tensor([[0, 0, 1, 1]], dtype=torch.uint8)
    shares = coarser_target(ids, (2,), activation="softmax", classes=300)
    assert shares.sum(1).tolist() == [[1, 1]]


def test_a_label_that_the_dtype_cannot_hold_is_nowhere():
    planes = torch.tensor([[[255, 255, 0, 0]]], dtype=torch.uint8) // 255
    assert coarser_target(planes, (2,), activation="sigmoid", classes=1, ignore_index=-1).tolist() == [[[1, 0]]]


def test_the_same_size_is_the_target_itself():
    ids = torch.zeros(2, 4, 4, dtype=torch.uint8)
    assert coarser_target(ids, (4, 4), activation="softmax", classes=2) is ids


@pytest.mark.parametrize("space", [(8, 8), (5, 7)])
def test_an_object_of_one_pixel_survives(space):
    ids = torch.zeros(1, 64, 64, dtype=torch.long)
    ids[0, 13, 27] = 1
    planes = ids.unsqueeze(1).float()
    assert F.interpolate(planes, size=space, mode="nearest").sum() == 0
    assert F.interpolate(planes, size=space, mode="nearest-exact").sum() == 0
    hard = coarser_target(ids, space, activation="softmax", classes=2, reduce="max")
    assert hard.sum() >= 1
    assert torch.equal(coarser_target(planes, space, activation="sigmoid", classes=1, reduce="max")[:, 0], hard)
    shares = coarser_target(ids, space, activation="softmax", classes=2)[:, 1]
    torch.testing.assert_close(coarser_target(planes, space, activation="sigmoid", classes=1)[:, 0], shares)
    assert torch.equal(shares > 0, hard == 1)
    if space == (8, 8):
        assert shares.max() == 1 / 64


def test_a_weight_becomes_its_mean():
    weight = torch.rand(2, 13, 10, generator=torch.Generator().manual_seed(0))
    by_class = torch.stack([weight, weight.flip(0)], 1)
    result = coarser_weight(weight, (7, 5))
    for (place, members), b in itertools.product(cells((13, 10), (7, 5)), range(2)):
        expected = math.fsum(float(weight[(b, *m)]) for m in members) / len(members)
        assert float(result[(b, *place)]) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(coarser_weight(by_class, (7, 5)), torch.stack([result, result.flip(0)], 1))
    assert coarser_weight(weight, (13, 10)) is weight


@pytest.mark.parametrize(
    ("target", "space", "settings", "message"),
    [
        (torch.zeros(1, 4, 4).long(), (5, 2), {}, r"space must be no larger than the target, \(4, 4\), got \(5, 2\)"),
        (torch.zeros(1, 4, 4), (2, 2), {}, "must be of an integer dtype, got torch.float32"),
        (torch.zeros(4, 4).long(), (2, 2), {}, r"with 2 axes of size, got \(4, 4\)"),
        (torch.zeros(1, 1, 4, 4), (2, 2), {}, r"for each of the 2 classes, got 1; .*target.squeeze\(1\)"),
        (torch.zeros(1, 2, 4, 4), (2, 2), {"reduce": "max"}, "do not sum to 1"),
        (torch.full((1, 4, 4), 2), (2, 2), {}, "class ids from 0 to 1, got values from 2 to 2"),
        (torch.full((1, 4, 4), -1), (2, 2), {"reduce": "max"}, "class ids from 0 to 1, got values from -1 to -1"),
        (torch.zeros(1, 2, 2, 2, 2).long(), (1, 1, 1, 1), {}, "space must have 1 to 3 axes"),
    ],
)
def test_refuses(target, space, settings, message):
    with pytest.raises(ValueError, match=message):
        coarser_target(target, space, activation="softmax", classes=2, **settings)


class TestPadding:
    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
    @pytest.mark.parametrize(("size", "space"), [((3,), (5,)), ((5, 4), (8, 4)), ((3, 2, 3), (4, 4, 4))], ids=str)
    def test_by_replication_is_what_the_image_gets(self, size, space, dtype):
        planes = (torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) > 0.5).to(dtype)
        padded = pad_target(planes, space)
        assert padded.dtype == dtype
        padding = [n for a, b in zip(reversed(size), reversed(space), strict=True) for n in (0, b - a)]
        expected = F.pad(planes.float(), padding, mode="replicate")
        assert torch.equal(padded.float(), expected)
        assert torch.equal(pad_target(planes[:, 0], space), padded[:, 0])

    def test_agrees_with_the_padded_image(self):
        image = torch.rand(1, 1, 30, 45)
        padded = pad_to_multiple(image, 32)
        assert torch.equal(pad_target(image, padded.shape[2:]), padded)

    def test_by_the_ignored_label(self):
        ids = torch.tensor([[[1, 0], [0, 1]]], dtype=torch.uint8)
        padded = pad_target(ids, (3, 4), ignore_index=255)
        assert padded.dtype == torch.uint8
        assert padded.tolist() == [[[1, 0, 255, 255], [0, 1, 255, 255], [255] * 4]]

    @pytest.mark.parametrize(
        ("dtype", "label", "expected"),
        [
            (torch.bool, 255, torch.int16),
            (torch.uint8, -1, torch.int16),
            (torch.int32, -100, torch.int32),
            (torch.uint8, 100_000, torch.int64),
            (torch.float16, 255, torch.float16),
        ],
    )
    def test_in_a_dtype_that_holds_it(self, dtype, label, expected):
        padded = pad_target(torch.ones(1, 1, 2).to(dtype), (3,), ignore_index=label)
        assert padded.dtype == expected
        assert padded.tolist() == [[[1, 1, label]]]

    def test_the_same_size_is_the_target_itself(self):
        mask = torch.ones(1, 1, 2, dtype=torch.bool)
        assert pad_target(mask, (2,), ignore_index=255) is mask

    def test_refuses_a_smaller_size(self):
        with pytest.raises(ValueError, match=r"at least the size of the target, .*\(1, 4, 4\), got \(4, 3\)"):
            pad_target(torch.zeros(1, 4, 4), (4, 3))
