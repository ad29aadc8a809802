"""Two tables of cases, compared."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from lightning_dice.compare import arguments, compare
from lightning_dice.configs import CONF_DIR, UserError


def write(folder: Path, scores: list[float | None], split: str = "test", **others: object) -> Path:
    folder.mkdir(parents=True)
    found = [
        {"split": split, "case": f"c{n}", "dice": s, "dice/cell": s, "actual/cell": 7, "predicted/cell": 5} | others
        for n, s in enumerate(scores)
    ]
    with (folder / "cases.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(found[0]))
        table.writeheader()
        table.writerows(found)
    return folder


def run(*given: object) -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("compare", overrides=arguments([str(each) for each in given]))
    compare(config)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


OLD, NEW = [0.5, 0.7, 0.9, 0.4, 0.8], [0.6, 0.9, 0.8, 0.4, 0.9]


def test_as_a_user_runs_it(tmp_path):
    write(tmp_path / "runs" / "the old [1]", OLD)
    write(tmp_path / "new", NEW)
    line = [sys.executable, "-m", "lightning_dice.compare", "runs/the old [1]", "new", "resamples=500"]
    told = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "Dice of new less the old [1]; more is better, 5 test cases" in told
    made = tmp_path / "runs" / "the old [1]" / "compare_new"
    (row,) = rows(made / "compare.csv")
    assert (row["wins"], row["losses"], row["ties"], row["cases"]) == ("3", "1", "1", "5")
    assert float(row["difference"]) == pytest.approx(0.06)
    assert float(row["low"]) < 0.06 < float(row["high"])
    assert [float(case["difference"]) for case in rows(made / "compare_cases.csv")] == pytest.approx(
        [0.1, 0.2, -0.1, 0, 0.1]
    )
    with Image.open(made / "compare.png") as picture:
        assert picture.width > 800


def test_several_are_compared_with_the_first_and_adjusted_together(tmp_path, capsys):
    folders = [write(tmp_path / name, scores) for name, scores in (("a", OLD), ("b", NEW), ("c", [*NEW[:4], None]))]
    run(*folders, f"output={tmp_path / 'out'}", "resamples=200")
    b, c = rows(tmp_path / "out" / "compare.csv")
    assert (b["b"], c["b"], c["cases"], c["only_a"]) == ("b", "c", "4", "1")
    values = sorted(float(row["wilcoxon"]) for row in (b, c))
    assert min(float(row["wilcoxon_holm"]) for row in (b, c)) == pytest.approx(min(1, 2 * values[0]), abs=1e-5)
    assert "cell: 1 cases have a score in a alone and 0 in c alone" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing is overwritten"):
        run(*folders, f"output={tmp_path / 'out'}")


def test_cases_in_common(tmp_path):
    folders = [write(tmp_path / "a", OLD), write(tmp_path / "b", NEW[:3]), write(tmp_path / "c", NEW[:4])]
    run(*folders, "cases=common", f"output={tmp_path / 'out'}", "resamples=200")
    assert [row["cases"] for row in rows(tmp_path / "out" / "compare.csv")] == ["3", "3"]


def test_validation_where_there_is_no_test(tmp_path):
    folders = [write(tmp_path / "a", OLD, "val"), write(tmp_path / "b", NEW, "val")]
    run(*folders, f"output={tmp_path / 'out'}", "resamples=200")
    assert {row["split"] for row in rows(tmp_path / "out" / "compare_cases.csv")} == {"val"}


@pytest.mark.parametrize(
    ("second", "settings", "message"),
    [
        ({"scores": OLD[:3]}, [], r"b lacks 2 of the test cases, such as c3, c4.*cases=common"),
        ({"scores": NEW, "actual/cell": 8}, [], "the masks are not the same: of 5 cases, such as c0"),
        ({"scores": NEW, "split": "val"}, [], "no cases of the val split"),
        ({"scores": NEW}, ["score=hd95"], "a has no hd95; it has dice"),
        ({"scores": NEW}, ["score=dise"], "score must be one of dice, jaccard"),
        ({"scores": NEW}, ["cases=some"], "cases must be same or common"),
        ({"scores": NEW}, ["split=train"], "split must be val or test"),
        ({"scores": NEW}, ["resamples=1"], "resamples must be an integer of at least 100"),
    ],
)
def test_refuses(tmp_path, second, settings, message):
    one = write(tmp_path / "a", OLD)
    other = write(tmp_path / "b", second.pop("scores"), **second)
    with pytest.raises(UserError, match=message):
        run(one, other, *settings)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "cases.csv", "cases.csv"]


def test_one_run_or_none(tmp_path):
    one = write(tmp_path / "a", OLD)
    with pytest.raises(UserError, match="two runs or more are compared, got 1"):
        run(one)
    with pytest.raises(UserError, match="the same table is given twice"):
        run(one, one)
    with pytest.raises(UserError, match="is not there: give the folder of a run that was scored"):
        run(one, tmp_path)
