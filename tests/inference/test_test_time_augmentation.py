from __future__ import annotations

import math

import pytest
import torch

from lightning_dice.inference import Mirroring, mean_logits
from lightning_dice.inference.test_time_augmentation import mirror


def softmax(values):
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def test_the_mean_of_probabilities_by_definition():
    generator = torch.Generator().manual_seed(0)
    predictions = [torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) * 3 for _ in range(4)]
    soft, planes = mean_logits(predictions, "softmax"), mean_logits(predictions, "sigmoid")
    for image in range(2):
        for pixel in range(5):
            each = [softmax(p[image, :, pixel].tolist()) for p in predictions]
            mean = [sum(p[c] for p in each) / 4 for c in range(3)]
            assert soft[image, :, pixel].softmax(0).tolist() == pytest.approx(mean)
            assert sum(math.exp(value) for value in soft[image, :, pixel].tolist()) == pytest.approx(1)
            for c in range(3):
                p = sum(1 / (1 + math.exp(-float(z[image, c, pixel]))) for z in predictions) / 4
                assert float(planes[image, c, pixel]) == pytest.approx(math.log(p / (1 - p)))


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_probabilities_next_to_0_and_1_keep_their_digits(activation):
    z = torch.tensor([[40.0, -60.0, 200.0], [0.0, 0.0, 0.0]]).unsqueeze(0)
    found = mean_logits([z, z.clone()], activation)
    # The mean of equals: the same logits, for softmax but for a constant.
    if activation == "softmax":
        found, z = found[:, :1] - found[:, 1:], z[:, :1] - z[:, 1:]
    torch.testing.assert_close(found, z)


def test_half_precision_is_averaged_in_single():
    assert mean_logits([torch.zeros(1, 1, 2).half()], "sigmoid").dtype == torch.float32


def test_no_prediction_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        mean_logits([], "softmax")


def test_flips():
    assert Mirroring([0, 2]).combinations == [(), (0,), (2,), (0, 2)]
    assert Mirroring().combinations == [()]
    image = torch.arange(6).view(1, 1, 2, 3)
    assert mirror(image, (1,)).tolist() == [[[[2, 1, 0], [5, 4, 3]]]]
    assert mirror(image, (0, 1)).tolist() == [[[[5, 4, 3], [2, 1, 0]]]]
    assert mirror(image, ()) is image
    with pytest.raises(ValueError, match=r"mirror_axes must be distinct space axes, counted from 0, .* got \[0, 0\]"):
        Mirroring([0, 0])
    with pytest.raises(ValueError, match=r"from 0 to 1, got \[2\]"):
        Mirroring([2]).check(2)
