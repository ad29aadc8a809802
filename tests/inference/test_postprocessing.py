from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch

from lightning_dice.functional import hard_prediction
from lightning_dice.functional.activations import probabilities
from lightning_dice.inference import CALIBRATION, PostProcessing, combine_postprocessing, find_postprocessing


def logits(classes, *space):
    return torch.randn(classes, *space, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize(("activation", "threshold"), [("softmax", 0.5), ("sigmoid", 0.5), ("sigmoid", 0.2)])
def test_without_settings_labels_are_those_of_the_module(activation, threshold):
    z = logits(3, 9, 8)
    expected = hard_prediction(z[None], activation=activation, threshold=threshold)[0]
    found = PostProcessing().labels(z, activation=activation, threshold=threshold)
    assert torch.equal(found.long(), expected.long())
    assert not PostProcessing().changes_labels(activation, threshold)
    assert found.dtype == (torch.uint8 if activation == "softmax" else torch.bool)


@pytest.mark.parametrize("temperature", [None, 0.5, 3.0])
@pytest.mark.parametrize("thresholds", [None, [0.1, 0.5, 0.8]])
def test_planes_by_probabilities(temperature, thresholds):
    z = logits(3, 40).double()
    postprocessing = PostProcessing(temperature, thresholds)
    found = postprocessing.labels(z, activation="sigmoid", threshold=0.3)
    probs = probabilities(z, "sigmoid", temperature or 1.0)
    for c in range(3):
        limit = 0.3 if thresholds is None else thresholds[c]
        for pixel in range(40):
            p = 1 / (1 + math.exp(-float(z[c, pixel]) / (temperature or 1)))
            assert float(probs[c, pixel]) == pytest.approx(p)
            assert bool(found[c, pixel]) == (p > limit)


@pytest.mark.parametrize("temperature", [None, 0.5, 3.0])
def test_ids_by_probabilities(temperature):
    z, thresholds = logits(3, 60).double(), [0.7, 0.2, 0.4]
    postprocessing = PostProcessing(temperature, thresholds)
    found = postprocessing.labels(z, activation="softmax")
    for pixel in range(60):
        each = [math.exp(value / (temperature or 1)) for value in z[:, pixel].tolist()]
        p = [value / sum(each) for value in each]
        assert probabilities(z, "softmax", temperature or 1.0)[:, pixel].tolist() == pytest.approx(p)
        ratios = [a / b for a, b in zip(p, thresholds, strict=True)]
        assert int(found[pixel]) == ratios.index(max(ratios))


def test_the_threshold_of_two_classes_is_a_probability():
    z = logits(2, 500).double()
    found = PostProcessing(2.0, [0.8, 0.2]).labels(z, activation="softmax")
    assert torch.equal(found.bool(), (z / 2).softmax(0)[1] > 0.2)
    equal = PostProcessing(thresholds=[0.3, 0.3]).labels(z, activation="softmax")
    assert torch.equal(equal.long(), z.argmax(0))


@pytest.mark.parametrize(
    ("postprocessing", "activation", "threshold", "changes"),
    [
        (PostProcessing(temperature=2), "softmax", 0.5, False),
        (PostProcessing(temperature=2), "sigmoid", 0.5, False),
        (PostProcessing(temperature=2), "sigmoid", 0.4, True),
        (PostProcessing(temperature=1), "sigmoid", 0.4, False),
        (PostProcessing(thresholds=[0.5]), "sigmoid", 0.5, True),
        (PostProcessing(min_size=0), "sigmoid", 0.5, False),
        (PostProcessing(min_size=[0, 3]), "softmax", 0.5, True),
        (PostProcessing(keep_largest=[1]), "softmax", 0.5, True),
    ],
)
def test_whether_labels_change(postprocessing, activation, threshold, changes):
    assert postprocessing.changes_labels(activation, threshold) is changes


def test_components_go_by_pixels_or_millimetres():
    z = torch.tensor([[5.0, 5.0, -5.0, 5.0, -5.0, 5.0, 5.0, 5.0]])
    assert PostProcessing(min_size=2).labels(z, activation="sigmoid").int().tolist() == [[1, 1, 0, 0, 0, 1, 1, 1]]
    measured = PostProcessing(min_size=1.5, unit="mm")
    assert measured.labels(z, activation="sigmoid", spacing=(0.5,)).int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    with pytest.raises(ValueError, match="the spacing of the image is not known"):
        measured.labels(z, activation="sigmoid")
    with pytest.raises(ValueError, match="one number for each of the 1 axes"):
        measured.labels(z, activation="sigmoid", spacing=(0.5, 0.5))
    two = torch.stack([-z[0], z[0]])
    assert PostProcessing(min_size=[9, 2]).labels(two, activation="softmax").tolist() == [1, 1, 0, 0, 0, 1, 1, 1]
    everywhere = PostProcessing(min_size=2, background=None).labels(two, activation="softmax")
    assert everywhere.tolist() == [1] * 8  # The gaps, of class 0, come first.


def test_many_classes_have_ids_that_fit():
    assert PostProcessing().labels(torch.eye(257), activation="softmax").tolist() == list(range(257))


def test_own_settings_go_before_defaults():
    calibration = PostProcessing(1.5, [0.4], min_size=3, unit="mm", origin="file")
    own = PostProcessing(min_size=7, keep_largest=[1], background=None)
    expected = PostProcessing(1.5, [0.4], min_size=7, keep_largest=[1], background=None)
    assert own.with_defaults(calibration) == expected
    assert own.with_defaults(calibration).origin == "file"
    assert PostProcessing(2.0, [0.9]).with_defaults(calibration) == PostProcessing(2.0, [0.9], min_size=3, unit="mm")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature must be a number > 0, got 0"),
        ({"thresholds": 0.5}, "thresholds must be a list"),
        ({"thresholds": [0.5, 1.0]}, r"thresholds must be a number in \(0, 1\), got 1.0"),
        ({"min_size": -1}, "min_size must be a number >= 0"),
        ({"min_size": "2"}, "min_size must be a number >= 0"),
        ({"unit": "cm"}, "unit must be one of 'pixels', 'mm'"),
        ({"keep_largest": 1}, "keep_largest must be a list of class indices"),
        ({"background": "0"}, "background must be None or an integer label"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PostProcessing(**settings)


def test_refuses_another_number_of_classes():
    with pytest.raises(ValueError, match="one for each of the 3 classes, got 1 from here"):
        PostProcessing(thresholds=[0.5], origin="here").labels(logits(3, 4), activation="sigmoid")


class TestCombined:
    def test_equal_ones_are_one(self):
        assert combine_postprocessing([PostProcessing(2.0, [0.5])] * 3) == PostProcessing(2.0, [0.5])

    def test_thresholds_are_averaged_and_temperatures_gone(self):
        found = combine_postprocessing(
            [PostProcessing(2.0, [0.2, 0.4], min_size=3), PostProcessing(None, None, min_size=3)], 0.5
        )
        assert found.temperature is None
        assert found.thresholds == pytest.approx([0.35, 0.45])
        assert found.min_size == 3

    def test_refuses_what_does_not_fit(self):
        with pytest.raises(ValueError, match="must remove the same components"):
            combine_postprocessing([PostProcessing(min_size=2), PostProcessing(min_size=3)])
        with pytest.raises(ValueError, match="different numbers of classes"):
            combine_postprocessing([PostProcessing(thresholds=[0.2]), PostProcessing(thresholds=[0.2, 0.3])])


class TestFile:
    full = PostProcessing(1.25, (0.3, 0.6), min_size=(0, 12.5), unit="mm", keep_largest=[1], background=None)

    def test_comes_back(self, tmp_path):
        path = tmp_path / CALIBRATION
        self.full.save(path, {"cases": 4})
        assert PostProcessing.load(path) == self.full
        assert PostProcessing.load(path).origin == str(path)
        assert json.loads(path.read_text())["cases"] == 4
        assert [entry.name for entry in tmp_path.iterdir()] == [CALIBRATION]

    def test_is_found(self, tmp_path):
        checkpoint = tmp_path / "best.ckpt"
        checkpoint.write_bytes(b"weights")
        assert find_postprocessing(tmp_path, "auto", checkpoint) == PostProcessing()
        path = tmp_path / CALIBRATION
        self.full.save(path, {"checkpoint": {"sha256": hashlib.sha256(b"other weights").hexdigest()}})
        assert find_postprocessing(tmp_path, "none", checkpoint) == PostProcessing()
        assert find_postprocessing(tmp_path) == self.full
        with pytest.raises(ValueError, match=r"was made for another checkpoint .*overwrite=true"):
            find_postprocessing(tmp_path, "auto", checkpoint)
        assert find_postprocessing(tmp_path, path, checkpoint) == self.full
        self.full.save(path, {"checkpoint": {"sha256": hashlib.sha256(b"weights").hexdigest()}})
        assert find_postprocessing(tmp_path, "auto", checkpoint) == self.full
        with pytest.raises(FileNotFoundError, match="there is no calibration file"):
            find_postprocessing(tmp_path, tmp_path / "another.json")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is not a calibration file"),
            ("[]", 'it holds no "postprocessing"'),
            ('{"version": 1}', 'it holds no "postprocessing"'),
            ('{"version": 9, "postprocessing": {}}', "has version 9, and this package reads 2"),
            ('{"version": 2, "postprocessing": {"treshold": 1}}', "post-processing has no treshold, only background, "),
            ('{"version": 2, "postprocessing": {"temperature": -1}}', "temperature must be a number > 0"),
        ],
    )
    def test_is_checked(self, tmp_path, content, message):
        path = tmp_path / CALIBRATION
        path.write_text(content)
        for read in (PostProcessing.load, lambda _: find_postprocessing(tmp_path)):
            with pytest.raises(ValueError, match=message) as error:
                read(path)
            assert str(path) in str(error.value)
