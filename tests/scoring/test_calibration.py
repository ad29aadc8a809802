import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from lightning_dice.functional import activations
from lightning_dice.scoring import calibration, reliability


def test_binary_errors_agree_with_torchmetrics():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 40, 30) * 2, torch.randint(0, 2, (2, 40, 30))
    target[1, :5] = 255
    found = reliability(logits, target, activation="sigmoid", ignore_index=255).calibration_error()
    for index in range(2):
        kept = target[index] != 255
        expected = binary_calibration_error(logits[index][kept].sigmoid(), target[index][kept], n_bins=15)
        assert found[index] == pytest.approx(expected.item(), abs=1e-6)


def test_multiclass_errors_agree_with_torchmetrics():
    torch.manual_seed(1)
    logits, target = torch.randn(4, 6, 7, 8) * 3, torch.randint(0, 4, (6, 7, 8))
    target[2] = 9
    (found,) = reliability(logits, target, activation="softmax", ignore_index=9).calibration_error()
    expected = multiclass_calibration_error(logits[None].softmax(1), target[None], 4, n_bins=15, ignore_index=9)
    assert found == pytest.approx(expected.item(), abs=1e-6)


def test_by_hand():
    # Two pixels of 0.9, one of them correct, and a correct one of 0.2.
    logits = torch.logit(torch.tensor([[0.9, 0.9, 0.2]]))
    found = reliability(logits, torch.tensor([[1, 0, 1]]), activation="sigmoid", bins=2)
    assert found.pixels.tolist() == [[1, 2]]
    assert found.correct.tolist() == [[1, 1]]
    assert found.confidence.tolist() == [pytest.approx([0.2, 1.8])]
    assert found.calibration_error() == pytest.approx([(0.8 + 0.8) / 3])


def test_chunks_and_cases_add_up(monkeypatch):
    torch.manual_seed(2)
    logits, target = torch.randn(3, 10, 11), torch.randint(0, 3, (10, 11))
    whole = reliability(logits, target, activation="softmax")
    halves = [reliability(logits[:, part], target[part], activation="softmax") for part in (slice(4), slice(4, 10))]
    monkeypatch.setattr(calibration, "CHUNK", 7)
    pieces = reliability(logits, target, activation="softmax")
    monkeypatch.setattr(activations, "CHUNK", 11)
    probs = activations.probabilities(logits, "softmax")
    of_probs = reliability(probs, target, activation="softmax", are_probabilities=True)
    for other in (pieces, halves[0].merge(halves[1]), of_probs):
        for one, two in zip(whole, other, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-12)


def test_certain_pixels_and_no_pixels():
    logits = torch.tensor([[1e4, -1e4]])
    assert reliability(logits, torch.tensor([[1, 0]]), activation="sigmoid").calibration_error() == [0]
    nothing = reliability(logits, torch.tensor([[255, 255]]), activation="sigmoid", ignore_index=255)
    assert math.isnan(nothing.calibration_error()[0])


def test_a_confidence_on_an_edge_belongs_to_the_bin_above():
    found = reliability(torch.zeros(1, 3), torch.ones(1, 3).long(), activation="sigmoid", bins=2)
    assert found.pixels.tolist() == [[0, 3]]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_half_precision_is_summed_as_float32(activation):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, generator=generator).bfloat16()
    target = torch.randint(0, 2, (3, 50) if activation == "sigmoid" else (50,), generator=generator)
    found, expected = (reliability(values, target, activation=activation) for values in (logits, logits.float()))
    np.testing.assert_array_equal(found.confidence, expected.confidence)
