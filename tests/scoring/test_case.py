import math
import sys

import pytest
import torch

from lightning_dice.functional import hard_prediction
from lightning_dice.metrics import DiceScore
from lightning_dice.scoring import Scoring, lesion_scores, score_case, surface_scores

IDS = Scoring(["background", "a", "b"], "softmax", ignore_index=255, exclude_classes=[0])
PLANES = Scoring(["a", "b"], "sigmoid", ignore_index=255)


@pytest.mark.parametrize("scoring", [IDS, PLANES], ids=["ids", "planes"])
@pytest.mark.parametrize("space", [(31,), (9, 11), (5, 6, 7)])
def test_dice_equals_the_metric_to_the_last_digit(scoring, space):
    generator = torch.Generator().manual_seed(0)
    classes = len(scoring.classes)
    planes = scoring.activation == "sigmoid"
    for _ in range(5):
        logits = torch.randn(1, classes, *space, generator=generator)
        mask = torch.randint(0, 2 if planes else classes, (classes, *space) if planes else space, generator=generator)
        mask[torch.rand(mask.shape, generator=generator) < 0.2] = 255
        metric = DiceScore(
            classes,
            activation=scoring.activation,
            ignore_index=255,
            exclude_classes=sorted(scoring.exclude_classes),
            average="none",
        )
        metric.update(logits, mask[None])
        predicted = hard_prediction(logits, activation=scoring.activation)[0]
        for labels in (predicted, predicted.to(torch.uint8)):
            case = score_case(labels, mask, scoring)
            expected = metric.compute()
            for index in scoring.scored:
                assert torch.tensor(case.classes[index].dice).float() == expected[index]
                dice = case.classes[index].dice
                assert case.classes[index].jaccard == pytest.approx(dice / (2 - dice))
            assert case.mean == pytest.approx(expected.nanmean().item())


NAN = math.nan


@pytest.mark.parametrize(
    ("predicted", "actual", "dice", "surface", "distance", "volume", "error", "lesions"),
    [
        pytest.param([1, 1, 0, 0], [1, 1, 0, 0], 1, 1, 0, 0, 0, (1, 1, 1), id="perfect"),
        pytest.param([0, 0, 1, 1], [1, 1, 0, 0], 0, 1, 1.95, 0, 0, (0, 0, 0), id="disjoint"),
        pytest.param([0, 0, 0, 0], [1, 1, 0, 0], 0, 0, NAN, -2, -1, (NAN, 0, 0), id="missed"),
        pytest.param([1, 1, 0, 0], [0, 0, 0, 0], 0, 0, NAN, 2, NAN, (0, NAN, 0), id="not there"),
        pytest.param([0, 0, 0, 0], [0, 0, 0, 0], NAN, NAN, NAN, NAN, NAN, (NAN, NAN, NAN), id="absent from both"),
    ],
)
def test_hard_cases_by_hand(predicted, actual, dice, surface, distance, volume, error, lesions):
    case = score_case(torch.tensor([[predicted]]), torch.tensor([[actual]]), Scoring(["a"], "sigmoid", tolerance=2))
    (found,) = case.classes
    assert (found.dice, found.jaccard, case.mean) == pytest.approx((dice,) * 3, nan_ok=True)
    assert found.surface_dice == pytest.approx(surface, nan_ok=True)
    assert found.hd95 == pytest.approx(distance, nan_ok=True)
    assert found.volume_difference == pytest.approx(volume, nan_ok=True)
    assert found.volume_error == pytest.approx(error, nan_ok=True)
    assert found.lesions[2:] == pytest.approx(lesions, nan_ok=True)
    assert (found.predicted, found.actual) == (sum(predicted), sum(actual))


@pytest.mark.parametrize("scoring", [IDS, PLANES], ids=["ids", "planes"])
def test_ignored_pixels_belong_to_no_class(scoring):
    torch.manual_seed(3)
    planes = scoring.activation == "sigmoid"
    space = (2, 16, 14) if planes else (16, 14)
    mask, predicted, other = (torch.randint(0, 2 if planes else 3, space) for _ in range(3))
    ignored = torch.rand(space) < 0.3
    case = score_case(predicted, mask.where(~ignored, 255), scoring)
    assert score_case(other.where(ignored, predicted), mask.where(~ignored, 255), scoring) == case
    # They are like the area outside the image, of no class.
    for index in scoring.scored:
        masks = ((labels[index] == 1 if planes else labels == index) for labels in (predicted, mask))
        kept = ~ignored[index] if planes else ~ignored
        pair = [(each & kept).numpy() for each in masks]
        found = case.classes[index]
        assert (found.surface_dice, found.hd95, found.mean_surface_distance) == surface_scores(*pair, (1, 1), 2.0)
        assert found.lesions == lesion_scores(*pair)


@pytest.mark.parametrize(
    ("spacing", "difference"), [((2.0, 2.0, 5.0), 50 * 20 / 1000), (None, 50)], ids=["ml", "voxels"]
)
def test_volumes(spacing, difference):
    mask, predicted = torch.zeros(2, 1, 4, 10, 10, dtype=torch.int64)
    mask[0, 0], predicted[0, 0] = 1, 1
    predicted[0, 1, :5] = 1
    (found,) = score_case(predicted, mask, Scoring(["a"], "sigmoid", surfaces=False), spacing).classes
    assert found.volume_difference == pytest.approx(difference)
    assert found.volume_error == pytest.approx(0.5)


def test_areas_are_in_square_millimetres():
    mask, predicted = torch.tensor([[[1, 1, 0]]]), torch.tensor([[[1, 0, 0]]])
    (found,) = score_case(predicted, mask, Scoring(["a"], "sigmoid"), (0.5, 4.0)).classes
    assert found.volume_difference == -2
    assert found.hd95 == pytest.approx(0.95 * 4)


def test_disabled_scores_are_nan():
    mask, predicted = torch.randint(0, 3, (2, 9, 9), generator=torch.Generator().manual_seed(0))
    whole, lesions, surfaces = (
        score_case(predicted, mask, Scoring(["background", "a", "b"], "softmax", exclude_classes=[0], **settings))
        for settings in ({}, {"surfaces": False}, {"lesions": False})
    )
    assert all(math.isnan(value) for value in (*whole.classes[0][4:9], *whole.classes[0].lesions[2:]))
    for index in (1, 2):
        assert lesions.classes[index].lesions == whole.classes[index].lesions
        assert surfaces.classes[index][:7] == whole.classes[index][:7]
        assert math.isnan(lesions.classes[index].surface_dice)
        assert math.isnan(surfaces.classes[index].lesions.f1)


def test_lesions_match_according_to_the_settings():
    mask, predicted = torch.zeros(2, 1, 4, 8, dtype=torch.int64)
    mask[0, 0, :4], predicted[0, 0, :2] = 1, 1
    mask[0, 1, 4] = 1  # Touches the other at a corner.

    def found(**settings):
        return score_case(predicted, mask, Scoring(["a"], "sigmoid", **settings)).classes[0].lesions

    assert (found().actual, found().recall) == (1, 1)
    assert (found(connectivity=1).actual, found(connectivity=1).recall) == (2, 0.5)
    assert found(connectivity=1, lesion_iou=0.5).recall == 0


def test_a_large_mask_is_counted_in_chunks(monkeypatch):
    mask, predicted = torch.randint(0, 3, (2, 9, 11), generator=torch.Generator().manual_seed(0))
    whole = score_case(predicted, mask, IDS)
    monkeypatch.setattr(sys.modules[score_case.__module__], "CHUNK", 7)
    assert score_case(predicted, mask, IDS) == whole


def test_an_image_without_pixels_has_no_score():
    nothing = torch.zeros(0, 5, dtype=torch.int64)
    assert math.isnan(score_case(nothing, nothing, IDS).mean)


def test_each_class_has_its_tolerance():
    mask, predicted = torch.zeros(2, 2, 1, 12, dtype=torch.int64)
    mask[:, 0, 2:6], predicted[:, 0, 4:8] = 1, 1
    case = score_case(predicted, mask, Scoring(["a", "b"], "sigmoid", tolerance=[2, 1]))
    assert case.classes[0].surface_dice == 1
    assert case.classes[1].surface_dice < 1


@pytest.mark.parametrize(
    ("predicted", "mask", "spacing", "scoring", "message"),
    [
        (torch.zeros(4, 4), torch.zeros(4, 5), None, IDS, r"one shape, got \(4, 4\) and \(4, 5\)"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), None, PLANES, "a plane for each of 2 classes, got 3"),
        (torch.zeros(4, 4), torch.full((4, 4), 3), None, IDS, "target must hold class ids from 0 to 2"),
        (torch.full((4, 4), 7), torch.zeros(4, 4), None, IDS, "predicted must hold class ids from 0 to 2"),
        (torch.zeros(2, 4, 4), torch.full((2, 4, 4), 2), None, PLANES, "target"),
        (torch.zeros(4, 4), torch.zeros(4, 4), (1.0,), IDS, r"spacing must be 2 numbers > 0, in mm.*got \(1.0,\)"),
        (torch.zeros(4, 4), torch.zeros(4, 4), (1.0, 0.0), IDS, "spacing must be 2 numbers > 0"),
    ],
)
def test_mismatched_arguments_are_refused(predicted, mask, spacing, scoring, message):
    with pytest.raises(ValueError, match=message):
        score_case(predicted.long(), mask.long(), scoring, spacing)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ["a", "a"]}, "classes must be distinct names"),
        ({"exclude_classes": [2]}, "exclude_classes must be indices of 2 classes"),
        ({"tolerance": -1}, "tolerance must be a number >= 0"),
        ({"tolerance": [1, 2, 3]}, "tolerance must be one number, or one for each of 2 classes"),
        ({"lesion_iou": 1}, r"lesion_iou must be in \[0, 1\), got 1"),
        ({"surfaces": "no"}, "surfaces must be True or False"),
        ({"activation": "none"}, "activation must be one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Scoring(**{"classes": ["a", "b"], "activation": "sigmoid"} | settings)
