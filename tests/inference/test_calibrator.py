from __future__ import annotations

import math

import pytest
import torch

from lightning_dice import DiceScore
from lightning_dice.functional import AbsentPolicy
from lightning_dice.inference import PostProcessing
from lightning_dice.inference.calibrator import Calibrator


def cases(activation, classes, count=6, *, scale=1.0, size=(20, 30), ignore_index=None):
    """Logits `scale` times as large as labels drawn from them deserve, and the labels."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        z = torch.randn(classes, *size, generator=generator) * 1.5 - 1
        if activation == "sigmoid":
            target = (torch.rand(z.shape, generator=generator) < z.sigmoid()).long()
        else:
            target = torch.multinomial(z.flatten(1).softmax(0).T, 1, generator=generator)[:, 0].view(size)
        if ignore_index is not None:
            target[..., :4] = ignore_index
        yield z * scale, target


def filled(activation, classes, given, **settings):
    calibrator = Calibrator(classes, activation, **settings)
    for logits, target in given:
        calibrator.add(logits, target)
    return calibrator


@pytest.mark.parametrize(("activation", "classes"), [("sigmoid", 1), ("sigmoid", 3), ("softmax", 2), ("softmax", 5)])
@pytest.mark.parametrize("scale", [0.4, 2.5])
def test_finds_the_temperature_that_labels_were_drawn_with(activation, classes, scale):
    calibrator = filled(activation, classes, cases(activation, classes, 10, scale=scale, size=(60, 60)))
    # 36000 pixels: a relative error of 1 or 2 percent.
    assert calibrator.temperature() == pytest.approx(scale, rel=0.06)


@pytest.mark.parametrize(("activation", "classes"), [("sigmoid", 2), ("softmax", 3)])
def test_the_likelihood_by_definition(activation, classes):
    given = list(cases(activation, classes, 2, size=(3, 6), ignore_index=255))
    if activation == "sigmoid":
        given[0][1][1, :, 5] = 255  # One plane alone.
    calibrator = filled(activation, classes, given, ignore_index=255)
    losses = []
    for logits, target in given:
        for y in range(3):
            for x in range(4, 6):
                z = [value / 1.7 for value in logits[:, y, x].tolist()]
                if activation == "softmax":
                    losses.append(math.log(sum(map(math.exp, z))) - z[int(target[y, x])])
                else:
                    known = [(int(t), value) for t, value in zip(target[:, y, x], z, strict=True) if t != 255]
                    losses += [math.log1p(math.exp((1 - 2 * t) * value)) for t, value in known]
    assert calibrator.nll(1.7) == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_a_case_of_many_pixels_weighs_as_much_as_it_has():
    given = list(cases("sigmoid", 1, 2, size=(100, 100)))
    # The small case is the one that is wrong: drawn as often as the large one, it would weigh ten times as much.
    given[0] = (-given[0][0][:, :10], given[0][1][:, :10])
    all_of_them = filled("sigmoid", 1, given)
    some = filled("sigmoid", 1, given, pixels=1000)
    assert all_of_them.drawn == 11_000
    assert some.drawn == 2000
    assert some.nll() == pytest.approx(all_of_them.nll(), rel=0.05)
    assert some.nll() == filled("sigmoid", 1, given, pixels=1000).nll()
    assert some.nll() != filled("sigmoid", 1, given, pixels=1000, seed=1).nll()


def scored(given, decision, activation, classes, **settings):
    """The Dice of labels that a decision makes, as `DiceScore` has it."""
    score = DiceScore(classes, activation=activation, average="none", **settings)
    for logits, target in given:
        labels = decision.labels(logits, activation=activation)
        if activation == "softmax":
            preds = torch.nn.functional.one_hot(labels.long(), classes).movedim(-1, 0) * 10.0
        else:
            preds = labels * 20.0 - 10
        score.update(preds.unsqueeze(0), target.unsqueeze(0))
    return score.compute().double().reshape(classes)


SETTINGS = [
    {},
    {"ignore_index": 255},
    {"absent": "skip"},
    {"smooth": 1.0},
    {"pool": "dataset"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("activation", "classes"), [("sigmoid", 1), ("sigmoid", 3), ("softmax", 2)])
def test_no_threshold_is_better(activation, classes, settings):
    given = list(cases(activation, classes, scale=2.0, ignore_index=settings.get("ignore_index")))
    # A case without the last class, and one that is all of it.
    given[0][1][-1 if activation == "sigmoid" else ...] = 0
    given[1][1][-1 if activation == "sigmoid" else ...] = 1
    excluded = (0,) if activation == "softmax" else ()
    policy = {**settings, "absent": AbsentPolicy(settings.get("absent", "smooth"))}
    calibrator = filled(activation, classes, given, exclude_classes=excluded, **policy)
    temperature = 1.6
    found = calibrator.thresholds(temperature)
    decision = PostProcessing(temperature, found)
    dice = scored(given, decision, activation, classes, exclude_classes=excluded, **settings)
    # What was found is what the metric says of the labels that come of it.
    assert calibrator.scores(temperature, found).dice == pytest.approx(dice.tolist(), rel=1e-6, nan_ok=True)
    before = scored(given, PostProcessing(), activation, classes, exclude_classes=excluded, **settings)
    assert calibrator.scores().dice == pytest.approx(before.tolist(), rel=1e-6, nan_ok=True)
    for p in torch.arange(0.02, 1, 0.04).tolist():
        each = [1 - p, p] if activation == "softmax" else [p] * classes
        other = scored(
            given, PostProcessing(temperature, each), activation, classes, exclude_classes=excluded, **settings
        )
        # Thresholds between those that are tried differ by some pixels.
        assert (other[other.isfinite()] <= dice[other.isfinite()] + 5e-3).all()
    assert dice.nansum() > before.nansum()


def test_a_logit_at_a_threshold_is_not_above_it():
    generator = torch.Generator().manual_seed(0)
    given = [(torch.randint(-4, 5, (1, 200), generator=generator) / 4.0, torch.randint(2, (1, 200)))]
    calibrator = filled("sigmoid", 1, given)
    assert calibrator.scores().dice == pytest.approx(scored(given, PostProcessing(), "sigmoid", 1).tolist(), rel=1e-6)


def test_of_equally_good_thresholds_the_present_one_stays():
    logits = torch.tensor([[6.0, 5.0, -5.0, -6.0]])
    calibrator = filled("sigmoid", 1, [(logits, torch.tensor([[1, 1, 0, 0]]))], threshold=0.3)
    assert calibrator.thresholds(1.0) == pytest.approx([0.3])


def test_a_class_that_is_never_there_keeps_its_threshold():
    logits = torch.full((2, 50), -20.0)
    logits[0, :5] = 1
    target = torch.zeros(2, 50, dtype=torch.long)
    target[0, :9] = 1
    calibrator = filled("sigmoid", 2, [(logits, target)])
    assert calibrator.thresholds(1.0)[1] == pytest.approx(0.5)
    assert math.isnan(calibrator.scores().dice[1])
    assert not math.isnan(calibrator.scores().mean_dice)


def test_a_softmax_of_more_classes_has_a_temperature_alone():
    given = list(cases("softmax", 4))
    calibrator = filled("softmax", 4, given, exclude_classes=(0,))
    assert not calibrator.has_thresholds
    with pytest.raises(ValueError, match=r"no thresholds of 6 cases with 4 classes \(softmax\)"):
        calibrator.thresholds(1.0)
    expected = scored(given, PostProcessing(), "softmax", 4, exclude_classes=[0])
    assert calibrator.scores(3.0).dice == pytest.approx(expected.tolist(), rel=1e-6, nan_ok=True)


def test_nothing_but_ignored_pixels_decides_nothing():
    calibrator = filled("sigmoid", 1, [(torch.zeros(1, 4), torch.full((1, 4), 255))], ignore_index=255)
    assert calibrator.temperature() == 1
    assert calibrator.thresholds(1.0) == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(2, 4).long(), "of 1 classes, got"),
        (torch.full((1, 4), math.nan), torch.zeros(1, 4).long(), "logits must be finite"),
        (torch.zeros(1, 4), torch.zeros(1, 5).long(), "target must"),
        (torch.zeros(1, 4), torch.full((1, 4), 7), "target"),
    ],
)
def test_refuses_cases(logits, target, message):
    with pytest.raises(ValueError, match=message):
        Calibrator(1, "sigmoid").add(logits, target)
