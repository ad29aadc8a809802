from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import sliding_window_inference
from torch import nn

from lightning_dice.inference import SlidingWindow, sliding_window

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# Odd sizes, axes that are smaller than the window, windows that fit exactly, and an image of one window.
IMAGES = [
    ((37,), (8,)),
    ((5,), (8,)),
    ((37, 50), (16, 12)),
    ((32, 24), (16, 12)),
    ((7, 50), (16, 12)),
    ((5, 6), (16, 13)),
    ((13, 21, 9), (8, 6, 12)),
    ((9, 5, 16), (4, 8, 8)),
]


def net(axes):
    torch.manual_seed(0)
    return CONVOLUTIONS[axes](2, 3, 3, padding=1)


def joined(chunks):
    """The logits of chunks that follow each other without a gap."""
    parts, rows = [], 0
    for start, stop, logits in chunks:
        assert start == rows < stop
        assert logits.shape[1] == stop - start
        assert logits.dtype == torch.float32
        rows = stop
        parts.append(logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("importance_map", ["gaussian", "constant"])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5])
@pytest.mark.parametrize(("space", "size"), IMAGES)
def test_equals_monai(space, size, overlap, importance_map):
    image = torch.randn(2, *space, generator=torch.Generator().manual_seed(1))
    convolution = net(len(space))
    with torch.no_grad():
        expected = sliding_window_inference(image[None], size, 4, convolution, overlap=overlap, mode=importance_map)[0]
    found = joined(SlidingWindow(size, overlap, importance_map).chunks(image, convolution))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [[1], [7, 12], [512, 512], [12, 20, 28]], ids=str)
def test_weights_equal_monai_to_the_last_bit(size):
    for importance_map in ("gaussian", "constant"):
        expected = compute_importance_map(tuple(size), mode=importance_map, sigma_scale=0.125)
        assert torch.equal(SlidingWindow(size, importance_map=importance_map).weights(), expected)


def test_starts_equal_monai():
    for length, window, overlap in itertools.product((1, 6, 17, 40), (1, 6, 7), (0.0, 0.3, 0.5, 0.95)):
        stride = window if length <= window else max(1, int(window * (1 - overlap)))
        expected = dense_patch_slices((max(length, window),), (window,), (stride,), return_slice=False)
        assert SlidingWindow([window], overlap).starts([length]) == [[start for ((start, _),) in expected]]


@pytest.mark.parametrize(("space", "size"), IMAGES)
def test_rows_come_the_same_in_any_parts(space, size, monkeypatch):
    image = torch.randn(2, *space, generator=torch.Generator().manual_seed(1))
    window, convolution = SlidingWindow(size, 0.7), net(len(space))
    whole = joined(window.chunks(image, convolution))
    monkeypatch.setattr(sliding_window, "CHUNK_BYTES", 1)
    parts = list(window.chunks(image, convolution))
    assert len(parts) == space[0]
    assert torch.equal(joined(parts), whole)


def test_rows_are_handed_on_as_soon_as_they_are_finished():
    asked = []

    def recorded(batch):
        asked.append(len(batch))
        return batch

    chunks = SlidingWindow([4, 4], overlap=0.5, batch_size=3).chunks(torch.zeros(1, 40, 10), recorded)
    _, stop, _ = next(chunks)
    # Four windows in a row: the first two rows are finished once the second batch brings the first of the next row.
    assert (stop, asked) == (2, [3, 3])
    for _ in chunks:
        pass
    assert asked == [3] * 25 + [1]  # 19 rows of 4 windows


def test_an_image_is_read_by_windows_alone():
    image = torch.randn(2, 20, 7)
    read = []

    class File:
        shape = (2, 20, 7)

        def __getitem__(self, index):
            channels, *space = index
            assert channels == slice(None)
            assert all(0 <= s.start < s.stop <= size for s, size in zip(space, (20, 7), strict=True))
            read.append(tuple(s.stop - s.start for s in space))
            return image[index]

    window = SlidingWindow([8, 8])
    assert torch.equal(joined(window.chunks(File(), net(2))), joined(window.chunks(image, net(2))))
    assert set(read) == {(8, 7)}


@pytest.mark.parametrize("form", ["out", "logits", "list", "coarse"])
def test_networks_may_return_what_a_module_takes(form):
    def returned(batch):
        coarse = nn.functional.avg_pool2d(batch, 2)
        return {
            "out": {"out": batch, "aux": coarse},
            "logits": SimpleNamespace(logits=batch),
            "list": [batch, coarse],
            "coarse": coarse,
        }[form]

    image = torch.ones(1, 9, 11)
    torch.testing.assert_close(joined(SlidingWindow([4, 4]).chunks(image, returned)), image)


def test_half_precision_is_added_up_in_single():
    image = torch.full((1, 30, 30), 0.1)
    found = joined(SlidingWindow([8, 8], 0.8).chunks(image, lambda batch: batch.half()))
    torch.testing.assert_close(found, image.half().float())


def test_gradients_are_not_kept():
    assert not joined(SlidingWindow([4, 4]).chunks(torch.zeros(2, 9, 9), net(2))).requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": []}, "size must be a number of pixels for each space axis"),
        ({"size": 64}, "size must be a number of pixels for each space axis"),
        ({"size": [8, 0]}, "size must be an integer >= 1, got 0"),
        ({"overlap": 1.0}, r"overlap must be a number in \[0, 1\)"),
        ({"overlap": -0.1}, "overlap must be a number in"),
        ({"importance_map": "gauss"}, "importance_map must be one of 'gaussian', 'constant'"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindow(**{"size": [8, 8], **settings})


@pytest.mark.parametrize(
    ("shape", "function", "message"),
    [
        ((1, 9), nn.Identity(), r"the space axes of the window, 2 \(size \[4, 4\]\), got .*\(1, 9\)"),
        ((1, 0, 9), nn.Identity(), r"pixels along each axis, got \(1, 0, 9\)"),
        ((1, 9, 9), lambda batch: batch[0], r"net must return logits .* got a tensor \(1, 4, 4\)"),
    ],
)
def test_refuses_images_and_networks(shape, function, message):
    with pytest.raises(ValueError, match=message):
        list(SlidingWindow([4, 4]).chunks(torch.zeros(shape), function))
