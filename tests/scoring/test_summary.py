import math

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_dice.metrics import DiceScore
from lightning_dice.scoring import Scoring, score_case
from lightning_dice.scoring.summary import MEAN_OF_CLASSES, MOST_PROBABLE_CLASS, resampled_means, summarize, worst_first
from lightning_dice.scoring.table import column_names, format_row, parse_rows

CLASSES = ["background", "a", "b/c"]


def table(dice, **others):
    """Return the rows of a table with these scores of one class, `object`."""
    rows = []
    for place, value in enumerate(dice):
        extra = {key: str(values[place]) for key, values in others.items() if values[place] is not None}
        score = {} if value is None else {"dice": str(value), "dice/object": str(value)}
        rows.append(
            {"split": "test", "case": f"c{place}", "actual/object": "9", "predicted/object": "9"} | score | extra
        )
    return rows


def test_a_table_survives_writing_and_parsing():
    scoring = Scoring(CLASSES, "softmax", exclude_classes=[0])
    torch.manual_seed(0)
    masks = [(torch.randint(0, 3, (5, 6)), torch.randint(0, 3, (5, 6))) for _ in range(4)]
    cases = {f"case {n}": score_case(*pair, scoring, (0.5, 2)) for n, pair in enumerate(masks)}
    rows = [format_row("val", name, case, CLASSES, scoring.scored, {None: 0.25}) for name, case in cases.items()]
    found = parse_rows(rows)
    assert (found.split, found.classes, found.unit, found.axes) == ("val", ["a", "b/c"], "mm", 2)
    assert found.names == parse_rows(rows[::-1]).names == list(cases)
    assert set(found.values) <= set(column_names(CLASSES, scoring.scored))
    for place, case in enumerate(cases.values()):
        for index, name in ((1, "a"), (2, "b/c")):
            assert found.values[f"hd95/{name}"][place] == pytest.approx(case.classes[index].hd95, rel=1e-5)
            assert found.of("dice")[place, index - 1] == pytest.approx(case.classes[index].dice, rel=1e-5)
            assert found.values[f"lesion_f1/{name}"][place] == pytest.approx(case.classes[index].lesions.f1, rel=1e-5)
    assert rows[0]["spacing"] == "0.5 2"
    assert found.unit_of("hd95") == "mm"
    assert found.unit_of("volume_difference") == "mm²"
    assert found.unit_of("dice") == ""


def test_each_class_has_its_own_columns_in_a_row():
    mask, predicted = torch.zeros(2, 3, 1, 9, dtype=torch.int64)
    mask[1, 0, 1] = mask[2, 0, [0, 2, 4]] = predicted[2, 0, 2:5] = 1
    scoring = Scoring(CLASSES, "sigmoid", exclude_classes=[0])
    found = format_row(
        "test", "c", score_case(predicted, mask, scoring), CLASSES, scoring.scored, {1: 0.5, 2: math.nan}
    )
    # A missed class still has lesions; a class that is not scored has only pixels.
    assert {key: text for key, text in found.items() if "lesions" in key or "ece" in key} == {
        "lesions_actual/a": "1",
        "lesions_predicted/a": "0",
        "lesions_actual/b/c": "3",
        "lesions_predicted/b/c": "1",
        "ece/a": "0.5",
    }
    assert {key for key in found if key.endswith("background")} == {"actual/background", "predicted/background"}


def test_the_mean_of_classes_equals_the_metric():
    scoring = Scoring(CLASSES, "softmax", exclude_classes=[0])
    metric = DiceScore(3, activation="softmax", exclude_classes=[0])
    torch.manual_seed(1)
    rows = []
    for place in range(12):
        mask, logits = torch.randint(0, 3, (4, 5)), torch.randn(3, 4, 5)
        if place % 3 == 0:
            mask[mask == 1], logits[1] = 0, -9  # In these cases the class is absent.
        metric.update(logits[None], mask[None])
        rows.append(
            format_row("test", str(place), score_case(logits.argmax(0), mask, scoring), CLASSES, scoring.scored)
        )
    lines = {(line.score, line.name): line for line in summarize(parse_rows(rows), n_resamples=50)}
    assert lines["dice", MEAN_OF_CLASSES].mean == pytest.approx(metric.compute().item(), abs=1e-6)
    assert (lines["dice", "a"].cases, lines["dice", "a"].absent, lines["dice", "b/c"].cases) == (8, 4, 12)


def test_intervals_agree_with_scipy():
    random = np.random.default_rng(2)
    values = random.beta(5, 2, 40)
    (line,) = summarize(parse_rows(table(values)))
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", random_state=np.random.default_rng(3)
    ).confidence_interval
    # Two bootstraps of 10000 resamples differ by their random error.
    assert (line.low, line.high) == pytest.approx((expected.low, expected.high), abs=0.003)
    assert (line.mean, line.median) == pytest.approx((values.mean(), np.median(values)), abs=1e-6)
    assert line == summarize(parse_rows(table(values)))[0]
    assert line != summarize(parse_rows(table(values)), seed=1)[0]


def test_intervals_of_classes_and_their_mean_by_definition():
    random = np.random.default_rng(4)
    scores = {"a": random.beta(5, 2, 9), "b": random.beta(2, 5, 9)}
    scores["a"][:3] = math.nan
    # The first class has no score in the first three cases: it is absent; only predicted; absent, like the other class.
    sizes = {"actual/a": "000999999", "predicted/a": "090999999", "actual/b": "990999999", "predicted/b": "990999999"}
    rows = [
        {"split": "test", "case": f"c{place}", **{column: digits[place] for column, digits in sizes.items()}}
        | {f"dice/{name}": f"{values[place]}" for name, values in scores.items() if place != 2 and values[place] > 0}
        for place in range(9)
    ]
    scores["b"][2] = math.nan
    drawn = np.random.default_rng(7).multinomial(9, np.full(9, 1 / 9), size=200)
    draws = []
    for times in drawn:
        chosen = np.repeat(np.arange(9), times)
        each = [values[chosen][np.isfinite(values[chosen])] for values in scores.values()]
        draws.append([part.mean() for part in each if len(part)] if all(map(len, each)) else [math.nan] * 2)
    assert np.isfinite(draws).all()
    draws = np.array(draws)
    for confidence in (0.95, 0.6):
        tails = [50 * (1 - confidence), 50 * (1 + confidence)]
        lines = summarize(parse_rows(rows), n_resamples=200, confidence=confidence, seed=7)
        assert [(line.name, line.cases, line.undefined, line.absent) for line in lines] == [
            *((MEAN_OF_CLASSES, 8, 0, 1), ("a", 6, 1, 2), ("b", 8, 0, 1)),
        ]
        for line, expected in zip(lines, (draws.mean(1), draws[:, 0], draws[:, 1]), strict=True):
            assert (line.low, line.high) == pytest.approx(tuple(np.percentile(expected, tails)))
        whole = [np.nanmean([values[place] for values in scores.values()]) for place in range(9) if place != 2]
        assert lines[0].median == pytest.approx(np.median(whole))
        assert lines[0].mean == pytest.approx(np.mean([np.nanmean(values) for values in scores.values()]))


def test_resampled_means_leave_out_missing_values():
    values = np.array([[0.2, math.nan], [0.4, 1.0], [math.nan, 3.0]])
    means = resampled_means({"x": values}, 4000, 0)["x"]
    # Each column is resampled over its own two cases.
    assert set(np.round(means[np.isfinite(means[:, 1]), 1], 9)) <= {1, 3, 2, round(5 / 3, 9), round(7 / 3, 9)}
    assert np.nanmean(means[:, 0]) == pytest.approx(0.3, abs=0.01)
    assert np.isnan(means[:, 0]).mean() == pytest.approx((1 / 3) ** 3, abs=0.02)


def test_undefined_scores_are_counted():
    rows = table([1, 0.5, 0, None], **{"hd95/object": [0, 3, None, None]})
    rows[2] |= {"predicted/object": "0"}
    rows[3] |= {"actual/object": "0", "predicted/object": "0"}
    dice, distance = summarize(parse_rows(rows), n_resamples=100)
    assert (dice.cases, dice.undefined, dice.absent) == (3, 0, 1)
    assert (distance.cases, distance.undefined, distance.absent) == (2, 1, 1)
    assert (dice.mean, distance.mean) == (0.5, 1.5)
    assert (dice.unit, distance.unit) == ("", "pixels")
    assert dice.worst == [("c2", 0.0), ("c1", 0.5), ("c0", 1.0)]
    assert distance.worst == [("c1", 3.0), ("c0", 0.0)]


def test_the_worst_volume_errors_are_farthest_from_zero():
    lines = summarize(
        parse_rows(table([1, 1, 1], **{"volume_error/object": [0.1, -0.8, 0.5]})), n_resamples=100, worst=2
    )
    assert lines[-1].worst == [("c1", -0.8), ("c2", 0.5)]


@pytest.mark.parametrize(
    ("worst", "scores"),
    [
        (-3, ["dice", "jaccard", "surface_dice", "lesion_precision", "lesion_recall", "lesion_f1"]),
        (2, ["hd95", "mean_surface_distance", "ece"]),
        (-3, ["volume_difference", "volume_error"]),
    ],
    ids=["high is good", "low is good", "zero is good"],
)
def test_worst_first_for_each_score(worst, scores):
    values = np.array([1, 2, -3, 2, 0.5])
    for score in scores:
        place = worst_first(values, score)[0]
        assert (score, values[place]) == (score, worst)


def test_one_case_has_no_interval():
    (line,) = summarize(parse_rows(table([0.7])))
    assert (line.mean, line.cases) == (0.7, 1)
    assert math.isnan(line.low)
    assert math.isnan(line.high)


def test_the_calibration_error_of_the_most_probable_class_is_summarized():
    lines = summarize(parse_rows(table([1, 1], ece=[0.1, 0.3])), n_resamples=100)
    assert [(line.score, line.name) for line in lines] == [("dice", "object"), ("ece", MOST_PROBABLE_CLASS)]
    assert lines[1].mean == pytest.approx(0.2)
    assert lines[1].worst[0] == ("c1", 0.3)  # The larger error is worse.


@pytest.mark.parametrize(
    ("rows", "split", "message"),
    [
        ([], None, "no cases of the val split; it is empty"),
        (table([1]), "val", "no cases of the val split; it has test"),
        (table(["x"]), None, "column dice of the table: could not convert"),
    ],
)
def test_invalid_tables_are_refused(rows, split, message):
    with pytest.raises(ValueError, match=message):
        parse_rows(rows, split)


def test_units_are_mixed_if_some_spacings_are_unknown():
    rows = table([1, 1], **{"hd95/object": [1, 2], "spacing": ["1 1 3", None]})
    assert parse_rows(rows).unit == "mixed"
    assert parse_rows(rows).unit_of("hd95") == parse_rows(rows).unit_of("volume_difference") == "mm or pixels"
    assert parse_rows(rows[:1]).unit_of("volume_difference") == "ml"
    assert parse_rows(rows[1:]).unit == parse_rows(rows[1:]).unit_of("volume_difference") == "pixels"


def test_differences_that_cancel_are_0():
    # Of seven cases, as a seventh is no sum of powers of two; of three classes that exclude each other.
    random = np.random.default_rng(8)
    pixels = random.integers(-90, 90, (7, 3)).astype(float)
    pixels[:, 2] = -pixels[:, 0] - pixels[:, 1]
    pixels[6, 0] -= pixels[:, 0].sum()
    pixels[6, 2] = -pixels[6, 0] - pixels[6, 1]
    rows = [
        {"split": "test", "case": f"c{place}"}
        | {f"{size}/{name}": "9" for size in ("actual", "predicted") for name in "abc"}
        | {f"volume_difference/{name}": f"{value * 0.37:.6g}" for name, value in zip("abc", case, strict=True)}
        for place, case in enumerate(pixels)
    ]
    mean, first, second, third = summarize(parse_rows(rows))
    assert (mean.mean, mean.low, mean.high, mean.median, first.mean) == (0, 0, 0, 0, 0)
    assert second.mean == -third.mean == pytest.approx(pixels[:, 1].mean() * 0.37, rel=1e-5)
    assert -30 < first.low < -5 < 5 < first.high < 30


def test_a_small_mean_is_not_0():
    # One pixel in ten million of both signs.
    values = np.array([1e4, -1e4, 1e-3])
    (line,) = summarize(parse_rows(table([None] * 3, **{"volume_difference/object": values})), n_resamples=10)
    assert line.mean == pytest.approx(1e-3 / 3)


def test_resamples_that_cancel_are_0():
    values = np.array([[0.1], [0.2], [-0.3]])
    means = resampled_means({"x": values}, 1000, 0)["x"]
    assert np.abs(means).min() == 0
    assert np.abs(means[means != 0]).min() > 0.01
