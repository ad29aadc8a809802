from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_dice.inference import Inference, Mirroring, PostProcessing, Predictor, SlidingWindow
from lightning_dice.inference import sliding_window as windows_file

SPACE, SIZE = (19, 23), (26, 15)


def nets(number, classes=3):
    torch.manual_seed(0)
    return [nn.Conv2d(2, classes, 3, padding=1) for _ in range(number)]


def image():
    return torch.randn(2, *SPACE, generator=torch.Generator().manual_seed(1)) * 4


@pytest.mark.parametrize("chunk", [2**26, 1])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", [None, SIZE])
@pytest.mark.parametrize(
    "postprocessing",
    [
        PostProcessing(),
        PostProcessing(2.0, [0.3, 0.5, 0.6]),
        PostProcessing(thresholds=[0.1, 0.2, 0.3], min_size=4, keep_largest=[1]),
    ],
    ids=["plain", "thresholds", "components"],
)
@pytest.mark.parametrize("window", [None, SlidingWindow([8, 8])], ids=["whole", "sliding"])
def test_labels_are_those_of_the_logits(window, postprocessing, size, activation, chunk, monkeypatch):
    monkeypatch.setattr(windows_file, "CHUNK_BYTES", chunk)
    predictor = Predictor(nets(1), window, postprocessing=postprocessing, activation=activation)
    with torch.no_grad():
        logits = predictor.logits(image(), size)
        labels = predictor.labels(image(), size)
    space = SPACE if size is None else SIZE
    assert logits.shape == (3, *space)
    assert labels.shape == (space if activation == "softmax" else (3, *space))
    assert labels.dtype == (torch.uint8 if activation == "softmax" else torch.bool)
    assert torch.equal(predictor.labels_from_logits(logits), labels)


def test_one_network_has_its_own_logits():
    (net,) = nets(1)
    with torch.no_grad():
        expected = net(image()[None])[0]
    predictor = Predictor([net], postprocessing=PostProcessing(temperature=3.0), activation="softmax")
    assert torch.equal(predictor.logits(image()), expected)
    torch.testing.assert_close(predictor.probabilities(expected), (expected / 3).softmax(0))


def test_logits_at_another_size():
    (net,) = nets(1)
    with torch.no_grad():
        expected = F.interpolate(net(image()[None]), size=SIZE, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(Predictor([net], activation="softmax").logits(image(), SIZE), expected)


@pytest.mark.parametrize("temperature", [None, 2.0])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_mirroring_averages_the_mirrored_predictions(activation, temperature):
    (net,) = nets(1)
    predictor = Predictor(
        [net], mirroring=Mirroring([0, 1]), postprocessing=PostProcessing(temperature), activation=activation
    )
    probs = []
    with torch.no_grad():
        for axes in ([], [1], [2], [1, 2]):
            z = net(image().flip(axes)[None])[0].flip(axes)
            probs.append(z.softmax(0) if activation == "softmax" else z.sigmoid())
    mean = torch.stack(probs).mean(0)
    found = predictor.logits(image())
    torch.testing.assert_close(found.softmax(0) if activation == "softmax" else found.sigmoid(), mean)
    # The temperature is applied to the mean, as a calibration with these flips has seen it.
    tempered = predictor.probabilities(found)
    expected = found / (temperature or 1)
    torch.testing.assert_close(tempered, expected.softmax(0) if activation == "softmax" else expected.sigmoid())


@pytest.mark.parametrize("window", [None, SlidingWindow([32, 32])], ids=["whole", "one window"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_an_ensemble_is_the_mean_after_each_temperature(activation, window):
    several = nets(3)
    each = [PostProcessing(temperature, [0.2 * temperature] * 3) for temperature in (0.5, 1.0, 2.0)]
    predictor = Predictor(several, window, postprocessing=each, activation=activation)
    probs = []
    padded = image() if window is None else F.pad(image(), (4, 5, 6, 7))
    with torch.no_grad():
        for net, postprocessing in zip(several, each, strict=True):
            z = net(padded[None])[0] / postprocessing.scale
            probs.append(z.softmax(0) if activation == "softmax" else z.sigmoid())
    mean = torch.stack(probs).mean(0)
    mean = mean if window is None else mean[:, 6:-7, 4:-5]
    logits = predictor.logits(image())
    torch.testing.assert_close(predictor.probabilities(logits), mean)
    limit = 0.2 * 3.5 / 3
    expected = mean.argmax(0) if activation == "softmax" else mean > limit
    assert torch.equal(predictor.labels_from_logits(logits).long(), expected.long())


def test_equal_temperatures_stay_with_the_post_processing():
    several, postprocessing = nets(2), PostProcessing(2.0, [0.3, 0.3, 0.3])
    predictor = Predictor(several, postprocessing=postprocessing, activation="softmax")
    with torch.no_grad():
        mean = torch.stack([(net(image()[None])[0] / 2).softmax(0) for net in several]).mean(0)
    assert predictor.postprocessing == postprocessing
    torch.testing.assert_close(predictor.probabilities(predictor.logits(image())), mean)


def test_predictors_are_joined():
    several = nets(2)
    settings = [PostProcessing(1), PostProcessing(3)]
    each = [Predictor([net], postprocessing=p, activation="softmax") for net, p in zip(several, settings, strict=True)]
    joined = Predictor.ensemble(each)
    expected = Predictor(several, postprocessing=settings, activation="softmax")
    assert torch.equal(joined.logits(image()), expected.logits(image()))
    with pytest.raises(ValueError, match="must have the same activation, got sigmoid, softmax"):
        Predictor.ensemble([each[0], Predictor(several, activation="sigmoid")])


def test_coarse_logits_are_resized():
    predictor = Predictor([lambda batch: {"out": batch[..., ::2, ::2]}], activation="sigmoid")
    assert predictor.logits(image()).shape == (2, *SPACE)
    mirrored = Predictor([lambda batch: [batch[..., ::2, ::2]]], mirroring=Mirroring([1]), activation="sigmoid")
    assert mirrored.logits(image()).shape == (2, *SPACE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nets": []}, "nets must be at least one network"),
        ({"activation": None}, "activation must be one of 'sigmoid', 'softmax', got None"),
        ({"threshold": 1}, r"threshold must be a number in \(0, 1\)"),
        ({"postprocessing": [PostProcessing()] * 3}, "one for each of the 2 nets, got 3"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Predictor(**{"nets": [nn.Identity()] * 2, "activation": "sigmoid", **settings})


@pytest.mark.parametrize(
    ("size", "mirror_axes", "message"),
    [
        ((4,), [], r"size must be one number of pixels >= 1 for each of the axes \(19, 23\)"),
        ((4, 0), [], "size must be one number of pixels >= 1"),
        (None, [2], r"mirror_axes must be space axes from 0 to 1, got \[2\]"),
    ],
)
def test_refuses_calls(size, mirror_axes, message):
    predictor = Predictor([nn.Identity()], mirroring=Mirroring(mirror_axes), activation="sigmoid")
    with pytest.raises(ValueError, match=message):
        predictor.labels(image(), size)


def test_settings_of_a_module_are_checked_at_once():
    assert Inference().is_single_pass
    assert not Inference(mirror_axes=[0]).is_single_pass
    assert not Inference([4, 4]).is_single_pass
    with pytest.raises(ValueError, match="overlap must be"):
        Inference(overlap=2)
    with pytest.raises(ValueError, match="importance_map must be one of"):
        Inference([4], importance_map="cosine")


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_logits_that_are_no_numbers_are_refused(activation):
    """Half precision that overflows: no mask, rather than one of whatever class argmax gives."""

    def net(batch):
        return torch.cat([batch, batch.clone().index_fill(-1, torch.tensor([3]), torch.nan)], 1)

    for window in (None, SlidingWindow([8, 8])):
        predictor = Predictor([net], window, activation=activation)
        with pytest.raises(ValueError, match="the network's logits are NaN"):
            predictor.labels(image())
        with pytest.raises(ValueError, match="the network's logits are NaN"):
            predictor.labels_from_logits(predictor.logits(image()))
