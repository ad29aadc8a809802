"""Summary and report, from the files of an evaluation."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from helpers import rows
from PIL import Image

from lightning_dice import report
from lightning_dice.callbacks import CaseTable, Overlays
from lightning_dice.plotting import report_plots, style
from lightning_dice.report.html import render_report
from lightning_dice.scoring.summary import summarize
from lightning_dice.scoring.table import parse_rows

PROVENANCE = report.ScoreProvenance(
    "Evaluation of <b>bold & brave", {"run": "/r <i>"}, {"tolerance": 2.0, "lesion_iou": 0.0}
)
CLASSES = ["one <i>", "two"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of an evaluation of ten cases, one of them empty, one missed altogether."""
    made = tmp_path_factory.mktemp("evaluation")
    generator = torch.Generator().manual_seed(0)
    table = CaseTable(made, CLASSES, "sigmoid")
    overlays = Overlays(made, CLASSES, "sigmoid", count=3)
    for place in range(10):
        mask = torch.zeros(2, 40, 30, dtype=torch.uint8)
        mask[:, 5 : 20 + place, 4:20] = place != 0
        logits = torch.randn(2, 40, 30, generator=generator) + 3 * mask - 2
        predicted = (logits > 0) & (place > 1)
        name = f'<script src="x">{place}'
        table.add(name, predicted, mask, (0.5, 0.5), logits)
        overlays.offer(name, torch.rand(1, 40, 30, generator=generator), mask, predicted)
    table.write("test")
    overlays.draw("test")
    report.write_report(made, "test", PROVENANCE)
    return made


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.pictures, self.links, self.seen = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)
        self.pictures += [value for key, value in attrs if tag == "img" and key == "src"]
        self.links += [value for key, value in attrs if key in ("href", "src") and not value.startswith("data:")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_needs_nothing_else(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert len(text) < 3_000_000
    page = _Page(text)
    assert not page.open
    assert not page.links
    # Names of cases and classes are text, whatever they hold.
    assert not {"script", "i", "link", "iframe"} & set(page.seen)
    assert "http" not in re.sub(r'src="data:[^"]*"', "", text)
    assert "url(" not in text
    assert len(page.pictures) == 8  # five distributions, sizes, cases, calibration
    for source in page.pictures:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
            assert np.asarray(picture).std() > 5


def test_the_report_says_what_there_is(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    for words in (
        *("10 test cases, 2 classes", "mean of classes", "one &lt;i&gt;", "Hausdorff 95 <small>mm</small>"),
        *("neither in the mask nor predicted: no score: 1 case", "missed altogether: Dice 0, no distance: 1 case"),
        *("95% percentile bootstrap over cases, 10000 resamples, seed 0", "within 2.0 mm of the other", "any overlap"),
        *("Calibration", "&lt;b&gt;bold &amp; brave", "/r &lt;i&gt;"),
    ):
        assert words in text, words


def test_the_summary(folder):
    table = rows(folder / "summary.csv")
    data = json.loads((folder / "summary.json").read_text())
    assert [(row["score"], row["class"]) for row in table] == [(s["score"], s["class"]) for s in data["scores"]]
    cases = rows(folder / "cases.csv")
    for row, whole in zip(table, data["scores"], strict=True):
        if row["class"] == "two":
            values = [float(case[f"{row['score']}/two"]) for case in cases if case[f"{row['score']}/two"]]
            assert float(row["mean"]) == pytest.approx(np.mean(values), rel=1e-5, abs=1e-5)
            assert float(row["low"]) <= np.mean(values) <= float(row["high"])
            assert int(row["cases"]) == len(values)
            assert whole["worst"][0]["value"] in values
    assert data["interval"].startswith("95% percentile bootstrap")
    assert (data["cases"], data["unit"], data["run"]) == (10, "mm", "/r <i>")
    assert "monai" in data["versions"]
    undefined = {row["score"]: row["undefined"] for row in table if row["class"] == "two"}
    assert (undefined["dice"], undefined["hd95"]) == ("0", "1")


def test_without_a_table_there_is_nothing_to_conclude(tmp_path):
    assert report.write_report(tmp_path, "test", PROVENANCE) == []
    assert not list(tmp_path.iterdir())
    (tmp_path / "cases.csv").write_text("split,case,dice,dice/a,actual/a,predicted/a\nval,c,1,1,4,4\n")
    assert report.write_report(tmp_path, "test", PROVENANCE) == []
    assert [path.name for path in tmp_path.iterdir()] == ["cases.csv"]


def test_of_one_case_there_is_no_interval(tmp_path):
    lines = ["split,case,dice,dice/a,actual/a,predicted/a,spacing"]
    lines += ["test,c,0.25,0.25,4,4,1 1", "val,c,0.5,0.5,4,4,1 1", "test,d,,,0,0,"]
    (tmp_path / "cases.csv").write_text("\n".join(lines))
    (line,) = report.write_report(tmp_path, "test", PROVENANCE)
    assert line.mean == 0.25
    data = json.loads((tmp_path / "summary.json").read_text())
    assert (data["scores"][0]["mean"], data["scores"][0]["low"], data["scores"][0]["high"]) == (0.25, None, None)
    assert (data["unit"], data["cases"], data["split"]) == ("mixed", 2, "test")
    assert "no interval: one case" in (tmp_path / "report.html").read_text()
    (row,) = rows(tmp_path / "summary.csv")
    assert (row["low"], row["high"], row["median"], row["absent"]) == ("", "", "0.25", "1")
    (line,) = report.write_report(tmp_path, "val", PROVENANCE)
    assert line.mean == 0.5


@pytest.fixture
def charts(monkeypatch):
    """The figures that are drawn."""
    figures = []
    monkeypatch.setattr(report_plots, "figure_url", lambda figure: figures.append(figure) or "source")
    return figures


def rows_of(count, classes, **scores):
    """Rows of a table: of each case, Dice `score(case, class)`, and other scores that are given as such functions."""
    rows = []
    for case in range(count):
        row = {"split": "test", "case": f"case {case}"}
        for place, name in enumerate(classes):
            row |= {f"{score}/{name}": value for score, of in scores.items() if (value := str(of(case, place)))}
        means = [float(row[f"dice/{name}"]) for name in classes if f"dice/{name}" in row]
        rows.append(row | ({"dice": str(sum(means) / len(means))} if means else {}))
    return rows


def sections(tmp_path, rows, **settings):
    """The report of a table, and its text by section, with a bar for tags."""
    cases = parse_rows(rows)
    text = render_report(tmp_path, cases, summarize(cases, n_resamples=200), PROVENANCE._replace(settings=settings))
    parts = re.split(r"<h2>(.*?)</h2>", text)
    plain = [" ".join(re.sub(r"(\s*<[^>]*>)+", " | ", part).split()) for part in parts[2::2]]
    return text, dict(zip(parts[1::2], plain, strict=True))


@pytest.mark.usefixtures("charts")
def test_the_worst_cases_and_the_means_of_a_large_table(tmp_path):
    dice = lambda case, place: (case * 7 % 25) / 25 if place else 1 - case**2 / 1000  # noqa: E731
    facts = {"actual": lambda case, place: 9, "predicted": lambda case, place: 9 if place or case < 3 else 0}
    distance = lambda case, place: "" if facts["predicted"](case, place) == 0 else 1500 + case  # noqa: E731
    error = lambda case, place: -12.25 if place else 0  # noqa: E731
    rows = rows_of(25, ["a", "b"], dice=dice, hd95=distance, volume_error=error, **facts)
    text, parts = sections(tmp_path, rows, tolerance=2, lesion_iou=0.5)
    order = sorted(rows, key=lambda row: float(row["dice"]))
    expected = [
        " | ".join([row["case"], *(f"{float(row[key]):.3f}" for key in ("dice", "dice/a", "dice/b"))])
        for row in order[:10]
    ]
    found = re.findall(r"case \d+(?: \| [\d.–]+)+", parts["Worst cases"])
    assert found == expected
    lines = {(line.score, line.name): line for line in summarize(parse_rows(rows), n_resamples=200)}
    whole = lines["dice", "mean of classes"]
    assert f"<b>{whole.mean:.3f}</b><span>{whole.low:.3f} to {whole.high:.3f}</span>" in text
    far = lines["hd95", "mean of classes"]
    assert f"Hausdorff 95, mean</span><b>{far.mean:,.0f} pixels</b>" in text
    for (score, _), line in lines.items():
        value = {"dice": "{:.3f}", "hd95": "{:,.0f}", "volume_error": "{:.1f}" if line.name == "b" else "{:.3f}"}[score]
        if (score, line.name) != ("volume_error", "mean of classes"):
            cell = f"{value} | {value} to {value} | median {value}".format(line.mean, line.low, line.high, line.median)
            assert cell + (" | 22 undefined" if line.name == "a" and score == "hd95" else "") in parts["Scores"]
    assert "undefined" not in parts["Scores"].partition("Hausdorff")[0]
    missed = parts["Empty masks and undefined scores"].rstrip(" |\n")
    assert "missed altogether: Dice 0, no distance: 22 cases: case 10, case 11" in missed
    assert missed.endswith("case 6, case 7 and 2 more")
    assert "is the mean of the classes' means" in parts["Definitions"]


@pytest.mark.usefixtures("charts")
def test_the_report_of_one_class(tmp_path):
    rows = rows_of(
        3,
        ["a"],
        dice=lambda case, _: (0.5, 0.25, "")[case],
        hd95=lambda case, _: (4, 6, "")[case],
        lesion_precision=lambda case, _: (1, 0.5, "")[case],
        actual=lambda case, _: (5, 6, 0)[case],
        predicted=lambda case, _: (5, 6, 0)[case],
    )
    _, parts = sections(tmp_path, rows, tolerance=2, lesion_iou=0.5)
    assert "case 1 | 0.250 | 6.000 | case 0 | 0.500 | 4.000 | By" in parts["Worst cases"]
    assert "Distances and errors of the same cases" in parts["Worst cases"]
    assert "mean of the classes" not in parts["Definitions"]
    assert "match an actual one by an intersection over union above 0.5, one to one." in parts["Definitions"]
    # Two absent, and no distance that a mask would have and does not.
    assert "undefined" not in parts["Scores"].partition("Mean over the cases")[0]
    assert "neither in the mask nor predicted: no score: 1 case: case 2" in parts["Empty masks and undefined scores"]
    assert "Calibration" not in parts


@pytest.mark.usefixtures("charts")
def test_the_calibration_of_classes_that_exclude_each_other(tmp_path):
    rows = rows_of(2, ["a", "b"], **dict.fromkeys(("dice", "actual", "predicted"), lambda case, place: 1))
    rows = [row | {"ece": ("0.125", "0.375")[place]} for place, row in enumerate(rows)]
    line = "val,,0,1,3,0.5,1\n"
    (tmp_path / "reliability.csv").write_text("split,class,lower,upper,pixels,confidence,right\n" + line)
    text, parts = sections(tmp_path, rows)
    assert "calibration error, mean</span><b>0.250</b>" in text
    assert re.search(r"calibration error \| 0.250 \| 0.125 to 0.375 \| median 0.250 \| – \| –", parts["Scores"])
    assert "Expected calibration error" in parts["Definitions"]
    assert "Calibration" not in parts  # There is none of this split.
    assert "None: every class is in every mask and in every prediction" in parts["Empty masks and undefined scores"]


@pytest.mark.usefixtures("charts")
def test_many_classes_run_down_the_page(tmp_path):
    classes = [f"<{n}>" for n in range(13)]
    rows = rows_of(2, classes, **dict.fromkeys(("dice", "actual", "predicted"), lambda case, place: case))
    text, parts = sections(tmp_path, rows)
    assert "2 test cases, 13 classes" in text
    assert "The first 12 of 13 classes; all are in the table." in parts["Distribution over the cases"]
    assert re.search(r"class \| Dice \| mean of classes \| ", parts["Scores"])
    assert "<0>" not in text


def test_a_table_without_any_score_has_a_report_that_says_so(tmp_path):
    table = CaseTable(tmp_path, ["a", "b"], "sigmoid")
    table.add("empty", *torch.zeros(2, 2, 8, 8).long())
    table.write("test")
    assert report.write_report(tmp_path, "test", PROVENANCE) == []
    assert "No case has a score" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["scores"] == []


def test_the_summary_for_a_terminal():
    rows = rows_of(
        3,
        ["a", "b"],
        dice=lambda case, place: case**2 / 8 + place / 8,
        volume_difference=lambda case, place: (-12345.6, 3.0)[place] if case else "",
        actual=lambda case, place: 1,
        predicted=lambda case, place: 1,
    )
    lines = summarize(parse_rows(rows), n_resamples=200)
    columns = [list(map(str, column._cells)) for column in report.score_table(lines).columns]
    score, name, mean, interval, median, cases, undefined = columns
    assert score == ["Dice", "", "", "volume difference (pixels)", "", ""]
    assert name == ["mean of classes", "a", "b"] * 2
    assert mean[1:] == ["0.2083", "0.3333", "-6171", "-1.235e+04", "3.0000"]
    assert interval == [f"{report.format_score(line.low)} to {report.format_score(line.high)}" for line in lines]
    assert (median[1], cases[3:], undefined) == ("0.1250", ["2"] * 3, ["", "", "", "1", "1", "1"])


def test_the_points_of_the_charts(charts, monkeypatch):
    drawn = []
    monkeypatch.setattr(style, "_draw_scores", lambda axes, row, values, random: drawn.append((row, values.tolist())))
    cases = parse_rows(
        rows_of(
            3,
            ["a", "b"],
            dice=lambda case, place: ((0.5, 0.25, ""), (0.75, 1, 0))[place][case],
            actual=lambda case, place: ((5, 60, 0), (7, 8, 0))[place][case],
            predicted=lambda case, place: ((9, 1, 0), (2, 3, 4))[place][case],
        )
    )
    assert report_plots.distribution_chart(cases, "dice") == "source"
    assert drawn == [(0, [0.5, 0.25]), (1, [0.75, 1, 0])]
    assert [label.get_text() for label in charts[0].axes[0].get_yticklabels()] == ["a  (n=2)", "b  (n=3)"]
    assert report_plots.size_chart(cases) == "source"
    axes = charts[1].axes[0]
    # A class that is not there has no size.
    assert [np.transpose(line.get_xydata()).tolist() for line in axes.lines] == [
        [[5, 60], [0.5, 0.25]],
        [[7, 8], [0.75, 1]],
    ]
    assert axes.get_xscale() == "log"
    near = parse_rows(rows_of(2, ["a"], dice=lambda *_: 1, actual=lambda case, _: 5 + case, predicted=lambda *_: 5))
    report_plots.size_chart(near)
    assert charts[2].axes[0].get_xscale() == "linear"
    absent = parse_rows(rows_of(2, ["a"], dice=lambda *_: 0, actual=lambda *_: 0, predicted=lambda *_: 5))
    assert report_plots.size_chart(absent) == ""


def test_the_points_of_the_reliability_chart(charts):
    names = ("class", "lower", "upper", "pixels", "confidence", "right")
    bins = [("", 0, 0.5, 6, 0.25, 0.125), ("", 0.5, 1, 2, 0.75, 1)]
    report_plots.reliability_chart([dict(zip(names, map(str, each), strict=True)) for each in bins])
    curve, pixels = charts[0].axes
    assert curve.lines[1].get_xydata().tolist() == [[0.25, 0.125], [0.75, 1]]
    assert pixels.lines[0].get_xydata().tolist() == [[0.25, 0.75], [0.75, 0.25]]
    assert curve.get_ylabel() == "share of right pixels"


def test_a_large_picture_is_made_to_fit(tmp_path):
    from lightning_dice.plotting.report_plots import image_file_url

    noise = np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    small, large = (len(image_file_url(tmp_path / "noise.png", max_chars=limit)) for limit in (400_000, 2_000_000))
    assert small < 400_000 < large
    Image.new("RGB", (20_000, 40), "red").save(tmp_path / "long.png")
    source = base64.b64decode(image_file_url(tmp_path / "long.png").partition(",")[2])
    with Image.open(io.BytesIO(source)) as picture:
        assert picture.size == (16383, 32)
    assert image_file_url(tmp_path / "none.png") == ""
