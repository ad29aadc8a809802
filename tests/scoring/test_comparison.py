import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lightning_dice.scoring.comparison import adjust_p_values, check_same_cases, common_cases, compare_tables, holm
from lightning_dice.scoring.summary import MEAN_OF_CLASSES
from lightning_dice.scoring.table import ScoreTable


def cases(actual=None, split="test", unit="pixels", **scores):
    """Return a table of scores by class, `a=[...]`, the same for `dice`, `hd95` and `volume_error`."""
    count = len(next(iter(scores.values())))
    kinds = ("dice", "hd95", "volume_error")
    values = {f"{score}/{name}": np.array(v, float) for name, v in scores.items() for score in kinds}
    values |= {f"actual/{name}": np.array(actual or [5] * count, float) for name in scores}
    return ScoreTable(split, [f"c{n}" for n in range(count)], list(scores), values, unit)


def test_a_difference_by_hand():
    (line,) = compare_tables(cases(a=[0.5, 0.7, 0.9, 0.4]), cases(a=[0.6, 0.9, 0.8, 0.4]))
    assert (line.name, line.cases, line.wins, line.losses, line.ties) == ("a", 4, 2, 1, 1)
    assert (line.mean_a, line.mean_b, line.mean) == pytest.approx((0.625, 0.675, 0.05))
    assert line.differences == pytest.approx([0.1, 0.2, -0.1, 0])


def test_lower_distances_are_better():
    (line,) = compare_tables(cases(a=[5, 7, 9]), cases(a=[4, 8, 2]), "hd95")
    assert (line.wins, line.losses) == (2, 1)
    assert line.mean == pytest.approx(-7 / 3)


def test_volume_errors_closer_to_zero_are_better():
    (line,) = compare_tables(cases(a=[0.1, -0.8, 0.5, -0.2]), cases(a=[-0.3, 0.7, 0.2, 0.2]), "volume_error")
    assert (line.wins, line.losses, line.ties) == (2, 1, 1)


def test_resampling_depends_on_its_settings():
    random = np.random.default_rng(3)
    one = random.uniform(size=30)
    tables = cases(a=one), cases(a=one + random.normal(0.02, 0.1, 30))

    def ends(**settings):
        (line,) = compare_tables(*tables, **{"n_resamples": 400, **settings})
        return line.low, line.high, line.permutation

    assert ends() == ends()
    assert all(one != other for one, other in zip(ends(), ends(seed=1), strict=True))
    assert all(one != other for one, other in zip(ends(), ends(n_resamples=500), strict=True))
    narrow, wide = ends(confidence=0.5), ends(confidence=0.99)
    assert wide[0] < ends()[0] < narrow[0] < narrow[1] < ends()[1] < wide[1]


def test_p_values_are_exact_for_few_cases():
    random = np.random.default_rng(0)
    one = random.uniform(size=9)
    other = one + random.normal(0.1, 0.15, 9)
    (line,) = compare_tables(cases(a=one), cases(a=other))
    differences = other - one
    signs = np.array(list(itertools.product((1, -1), repeat=9)))
    flipped = np.abs((signs * differences).mean(1))
    # The fraction of all sign flips whose mean is at least as far from 0.
    assert line.permutation == pytest.approx((flipped >= abs(differences.mean()) - 1e-12).mean())
    assert line.wilcoxon == pytest.approx(stats.wilcoxon(other, one, method="exact").pvalue)


def test_many_cases_with_ties():
    random = np.random.default_rng(1)
    one = random.uniform(size=80).round(1)
    other = (one + random.normal(0.03, 0.1, 80)).round(1)
    (line,) = compare_tables(cases(a=one), cases(a=other))
    expected = stats.wilcoxon(np.round(other - one, 9), zero_method="pratt", method="approx").pvalue
    assert line.wilcoxon == pytest.approx(expected)
    assert line.permutation == pytest.approx(stats.ttest_rel(other, one).pvalue, abs=0.03)
    assert line.low < line.mean < line.high


@pytest.mark.filterwarnings("ignore:Sample size too small")  # SciPy before 1.15
def test_cases_without_a_difference_are_ranked():
    differences = np.array([0.1, -0.2, 0.3, 0.5, 0])
    (line,) = compare_tables(cases(a=np.zeros(5)), cases(a=differences))
    expected = stats.wilcoxon(differences, zero_method="pratt", method="approx").pvalue
    assert line.wilcoxon == pytest.approx(expected)


def test_without_a_difference_nothing_is_significant():
    for count in (1, 5):
        (line,) = compare_tables(cases(a=[0.5] * count), cases(a=[0.5] * count))
        assert (line.mean, line.wilcoxon, line.permutation, line.ties) == (0, 1, 1, count)


def test_one_case_is_no_evidence():
    (line,) = compare_tables(cases(a=[0.5]), cases(a=[0.9]))
    assert (line.mean, line.wins, line.wilcoxon, line.permutation) == (0.4, 1, 1, 1)
    assert math.isnan(line.low)
    assert math.isnan(line.high)


def test_cases_that_only_one_scores_are_counted_separately():
    nan = math.nan
    first = cases(a=[nan, 0, 1, nan, 0], b=[1, 1, 0, nan, nan])
    second = cases(a=[0, nan, 0.5, nan, nan], b=[0.5, 1, 1, nan, nan])
    whole, a, _ = compare_tables(first, second, n_resamples=100)
    assert (a.cases, a.only_a, a.only_b) == (1, 2, 1)
    assert (a.mean_a, a.mean_b, a.mean) == (1, 0.5, -0.5)
    # Each case's mean is over the classes that both have: b, b, both, none, none.
    assert (whole.name, whole.cases) == (MEAN_OF_CLASSES, 3)
    assert whole.differences == pytest.approx([-0.5, 0, 0.25, nan, nan], nan_ok=True)


def test_holm():
    values = [0.01, 0.04, 0.03, 0.5]
    assert holm(values) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([0.2]) == [0.2]


def test_p_values_are_adjusted_over_classes_and_pairs():
    random = np.random.default_rng(2)
    table = {name: random.uniform(size=12) for name in "ab"}
    others = [{name: values + random.normal(0.05, 0.1, 12) for name, values in table.items()} for _ in range(2)]
    lines = [line for other in others for line in compare_tables(cases(**table), cases(**other))]
    found = adjust_p_values(lines)
    single = [place for place, line in enumerate(lines) if line.name != MEAN_OF_CLASSES]
    assert [found[p].wilcoxon_holm for p in single] == holm([lines[p].wilcoxon for p in single])
    whole = [place for place, line in enumerate(lines) if line.name == MEAN_OF_CLASSES]
    assert [found[p].permutation_holm for p in whole] == holm([lines[p].permutation for p in whole])


def test_different_cases_or_masks_are_refused():
    one = cases(a=[1, 1, 1])
    fewer = cases(a=[1, 1])
    with pytest.raises(ValueError, match=r"new lacks 1 of the test cases, such as c2.*cases=common"):
        check_same_cases(one, fewer, ("old", "new"))
    with pytest.raises(ValueError, match="old lacks 1 of the test cases"):
        check_same_cases(fewer, one, ("old", "new"))
    with pytest.raises(ValueError, match="old scores the classes a; new, a, b"):
        check_same_cases(one, cases(a=[1, 1, 1], b=[1, 1, 1]), ("old", "new"))
    with pytest.raises(ValueError, match="differ in 2 cases: actual/a of c1 is 5 pixels in old and 6 in new"):
        check_same_cases(one, cases(actual=[5, 6, 7], a=[1, 1, 1]), ("old", "new"))


def test_common_cases_keep_their_scores():
    one, other = cases(a=[0.1, 0.2, 0.3]), replace(cases(a=[0.4, 0.6]), names=["c1", "c2"])
    for pair in (common_cases(one, other), common_cases(other, one)[::-1]):
        check_same_cases(*pair, ("old", "new"))
        assert pair[0].names == ["c1", "c2"]
        assert compare_tables(*pair)[0].differences == pytest.approx([0.2, 0.3])
    with pytest.raises(ValueError, match="the tables have no test case in common"):
        common_cases(cases(a=[1]), other)


def test_differences_that_cancel_have_a_mean_of_0():
    a = ScoreTable("test", ["x", "y", "z"], ["cell"], {"dice/cell": np.array([0.4, 0.4, 0.4])}, "mm")
    b = replace(a, values={"dice/cell": np.array([0.5, 0.6, 0.1])})
    (cell,) = compare_tables(a, b, n_resamples=50)
    assert cell.mean == 0
