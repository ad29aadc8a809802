"""The command that compares tables of cases."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from helpers import rows, run_command
from hydra import compose, initialize_config_dir
from PIL import Image

from lightning_dice.cli.config import CONF_DIR
from lightning_dice.cli.errors import UserError
from lightning_dice.compare import compare, quote_folders
from lightning_dice.plotting import comparison_plot


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
        config = compose("compare", overrides=quote_folders([str(each) for each in given]))
    compare(config)


OLD, NEW = [0.5, 0.7, 0.9, 0.4, 0.8], [0.6, 0.9, 0.8, 0.4, 0.9]


def test_as_a_user_runs_it(tmp_path):
    write(tmp_path / "runs" / "the old [1]", OLD)
    write(tmp_path / "new", NEW)
    output = run_command("compare", "runs/the old [1]", "new", "n_resamples=500", cwd=tmp_path).out
    assert "Dice of new minus the old [1]; higher is better, 5 test cases" in output
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
    run(*folders, f"output={tmp_path / 'out'}", "n_resamples=200")
    b, c = rows(tmp_path / "out" / "compare.csv")
    assert [float(row["difference"]) for row in (b, c)] == pytest.approx([0.06, 0.05])
    assert (b["b"], c["b"], c["cases"], c["only_a"]) == ("b", "c", "4", "1")
    values = sorted(float(row["wilcoxon"]) for row in (b, c))
    assert min(float(row["wilcoxon_holm"]) for row in (b, c)) == pytest.approx(min(1, 2 * values[0]), abs=1e-5)
    assert (
        "cell: cases with a score in only one of the runs are not compared (1 in a, 0 in c)" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="nothing is overwritten"):
        run(*folders, f"output={tmp_path / 'out'}")


def test_paths_of_tables_and_names_with_an_equals_sign(tmp_path, monkeypatch):
    write(tmp_path / "runs" / "lr=1", OLD)
    write(tmp_path / "new" / "test", NEW)
    monkeypatch.chdir(tmp_path / "runs")
    run("lr=1/cases.csv", "../new/test", "n_resamples=200")
    (row,) = rows(tmp_path / "runs" / "lr=1" / "compare_test" / "compare.csv")
    assert (row["a"], row["b"]) == ("lr=1", "test")


def test_output_and_plot(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(comparison_plot, "save_figure", lambda path, figure, dpi: drawn.append(figure.axes[0]))
    spaced = {"spacing": "1 1"}
    worse = {f"{score}/nucleus": 3 for score in ("hd95", "actual", "predicted")}
    a = write(tmp_path / "a", OLD, **{f"{score}/cell": 9 for score in ("hd95", "actual")}, **worse, **spaced)
    table = (a / "cases.csv").read_text().splitlines()
    b = write(tmp_path / "b", OLD)
    # For the first class all distances are smaller in b, for the second some; the last case has none in b.
    head, *body = (line.split(",") for line in table)
    for place, line in enumerate(body):
        line[head.index("hd95/cell")] = str(5 - place)
        line[head.index("hd95/nucleus")] = ("2", "4.5", "3", "3.5", "")[place]
    (b / "cases.csv").write_text("\n".join(map(",".join, [head, *body])))
    run(a, b, "score=hd95", f"output={tmp_path / 'out'}", "n_resamples=200", "seed=3")
    output = capsys.readouterr().out
    assert "Hausdorff 95 (mm) of b minus a; lower is better, 5 test cases" in output
    assert "nucleus: cases with a score in only one of the runs are not compared (1 in a, 0 in b)" in output
    lines = {line["class"]: line for line in rows(tmp_path / "out" / "compare.csv")}
    for name, (first, second, wins, losses, ties) in {
        "cell": (9, 3, 5, 0, 0),
        "nucleus": (3, 3.25, 1, 2, 1),
    }.items():
        line = {key: float(value) for key, value in lines[name].items() if key not in ("a", "b", "score", "class")}
        cells = [
            *(f"{first:.4f}", f"{second:.4f}", f"{second - first:+.4g}", f"{line['low']:+.4g} to {line['high']:+.4g}"),
            *map(str, (wins, losses, ties)),
            *(f"{line[f'{test}_holm']:.3g}" for test in ("wilcoxon", "permutation")),
        ]
        (shown,) = (text.split() for text in output.splitlines() if text.split()[:1] == [name] and "to" in text)
        assert shown == [name, *" ".join(cells).split()]
    assert lines["cell"]["wilcoxon"] != lines["cell"]["wilcoxon_holm"]
    assert lines["nucleus"]["wilcoxon_holm"] != lines["nucleus"]["permutation_holm"]
    cases = {(case["class"], case["case"]): case["difference"] for case in rows(tmp_path / "out" / "compare_cases.csv")}
    assert [cases["cell", f"c{n}"] for n in range(5)] == ["-4", "-5", "-6", "-7", "-8"]
    assert cases["nucleus", "c4"] == ""
    (axes,) = drawn
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mean of classes", "cell", "nucleus"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # The first row is at the top.
    assert axes.get_xlim()[0] == -axes.get_xlim()[1] < -8
    points, bars, means = (axes.lines[place:-1:3] for place in range(3))
    assert points[1].get_xdata().tolist() == [-4, -5, -6, -7, -8]
    assert points[2].get_xdata().tolist() == [-1, 1.5, 0, 0.5]
    for name, bar, mean in zip(("cell", "nucleus"), bars[1:], means[1:], strict=True):
        assert bar.get_xdata() == pytest.approx([float(lines[name]["low"]), float(lines[name]["high"])], rel=1e-5)
        assert list(mean.get_xdata()) == pytest.approx([float(lines[name]["difference"])], rel=1e-5)
    assert [text.get_text() for text in axes.texts][1:] == ["5 : 0 : 0", "1 : 2 : 1", "wins : losses : ties"]
    assert axes.get_xlabel().endswith("left of 0 b is better")
    assert axes.get_title(loc="left") == "Hausdorff 95 (mm) of b\nminus a"


def test_ties_are_drawn_too(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(comparison_plot, "save_figure", lambda path, figure, dpi: drawn.append(figure.axes[0]))
    folders = [write(tmp_path / name, OLD[:1]) for name in "abc"]
    run(*folders, f"output={tmp_path / 'out'}")
    (axes,) = drawn
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b: cell", "c: cell"]
    assert axes.get_xlabel().endswith("right of 0 each run is better")
    assert axes.get_xlim()[1] > 1


def test_resampling_depends_on_its_settings(tmp_path):
    scores = [place % 7 / 10 for place in range(30)]
    folders = [write(tmp_path / "a", scores), write(tmp_path / "b", [score * score for score in scores])]
    found = []
    for name, settings in enumerate((["seed=0"], ["seed=1"], ["n_resamples=101"], ["seed=0"])):
        run(*folders, f"output={tmp_path / str(name)}", "n_resamples=100", *settings)
        (line,) = rows(tmp_path / str(name) / "compare.csv")
        found.append((line["low"], line["high"]))
    assert found[0] == found[3]
    assert len(set(found)) == 3


def test_cases_in_common(tmp_path):
    folders = [write(tmp_path / "a", OLD), write(tmp_path / "b", NEW[:4]), write(tmp_path / "c", NEW[:3])]
    run(*folders, "cases=common", f"output={tmp_path / 'out'}", "n_resamples=200")
    assert [row["cases"] for row in rows(tmp_path / "out" / "compare.csv")] == ["3", "3"]
    found = [case["difference"] for case in rows(tmp_path / "out" / "compare_cases.csv")]
    assert found == ["0.1", "0.2", "-0.1"] * 2


def test_every_table_is_checked(tmp_path):
    a, b = write(tmp_path / "a", OLD), write(tmp_path / "b", NEW)
    with pytest.raises(UserError, match=r"actual/cell of c0 is 7 pixels in a and 8 in c"):
        run(a, b, write(tmp_path / "c", NEW, **{"actual/cell": 8}))
    distance = {"hd95/cell": 2}
    a, b = write(tmp_path / "d", OLD, **distance), write(tmp_path / "e", NEW, **distance)
    with pytest.raises(UserError, match="distances are in pixels in d and in mm in f"):
        run(a, b, write(tmp_path / "f", NEW, **distance, spacing="1 2"), "score=hd95")
    with pytest.raises(UserError, match="c has no hd95; it has dice"):
        run(a, b, write(tmp_path / "g" / "c", NEW), "score=hd95")


def test_validation_is_used_without_a_test_split(tmp_path):
    folders = [write(tmp_path / "a", OLD, "val"), write(tmp_path / "b", NEW, "val")]
    with (tmp_path / "b" / "cases.csv").open("a") as file:
        file.write("test,c0,0.5,0.5,7,5\n")  # Only one of the runs has a test split.
    run(*folders, f"output={tmp_path / 'out'}", "n_resamples=200")
    assert {row["split"] for row in rows(tmp_path / "out" / "compare_cases.csv")} == {"val"}


@pytest.mark.parametrize(
    ("second", "settings", "message"),
    [
        ({"scores": OLD[:3]}, [], r"b lacks 2 of the test cases, such as c3, c4.*cases=common"),
        ({"scores": NEW, "actual/cell": 8}, [], "the masks differ in 5 cases: actual/cell of c0"),
        ({"scores": NEW, "split": "val"}, [], "no cases of the val split"),
        ({"scores": NEW}, ["score=hd95"], "a has no hd95; it has dice"),
        ({"scores": NEW}, ["score=dise"], "score must be one of dice, jaccard"),
        ({"scores": NEW}, ["cases=some"], "cases must be same or common"),
        ({"scores": NEW}, ["split=train"], "split must be val or test"),
        ({"scores": NEW}, ["n_resamples=1"], "n_resamples must be an integer of at least 100"),
    ],
)
def test_refuses(tmp_path, second, settings, message):
    one = write(tmp_path / "a", OLD)
    other = write(tmp_path / "b", second.pop("scores"), **second)
    with pytest.raises(UserError, match=message):
        run(one, other, *settings)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "cases.csv", "cases.csv"]


def test_runs_that_cannot_be_compared(tmp_path):
    one = write(tmp_path / "a", OLD)
    with pytest.raises(UserError, match="runs must be the folders of two or more runs, got 1"):
        run(one)
    with pytest.raises(UserError, match="the same table is given twice"):
        run(one, one)
    with pytest.raises(UserError, match="does not exist: give the folder of a scored run"):
        run(one, tmp_path)
