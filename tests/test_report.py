"""Summary and report, from the files of an evaluation."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_dice import report
from lightning_dice.callbacks import CaseTable, Overlays

FACTS = report.Facts("Evaluation of <b>bold & brave", {"run": "/r"}, {"tolerance": 2.0, "lesion_iou": 0.0})
CLASSES = ["one <i>", "two"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What an evaluation of ten cases leaves, one of them empty, one missed altogether."""
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
    report.conclude(made, "test", FACTS)
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
        *("neither there nor predicted: no score: 1 case", "missed altogether: Dice 0, no distance: 1 case"),
        *("95% percentile bootstrap over cases, 10000 resamples, seed 0", "within 2.0 mm of the other", "any overlap"),
        *("Calibration", "&lt;b&gt;bold &amp; brave"),
    ):
        assert words in text, words


def test_the_summary(folder):
    with (folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    data = json.loads((folder / "summary.json").read_text())
    assert [(row["score"], row["class"]) for row in rows] == [(s["score"], s["class"]) for s in data["scores"]]
    with (folder / "cases.csv").open() as file:
        cases = list(csv.DictReader(file))
    for row, whole in zip(rows, data["scores"], strict=True):
        if row["class"] == "two":
            values = [float(case[f"{row['score']}/two"]) for case in cases if case[f"{row['score']}/two"]]
            assert float(row["mean"]) == pytest.approx(np.mean(values), rel=1e-5, abs=1e-5)
            assert float(row["low"]) <= np.mean(values) <= float(row["high"])
            assert int(row["cases"]) == len(values)
            assert whole["worst"][0]["value"] in values
    assert data["interval"].startswith("95% percentile bootstrap")
    assert (data["cases"], data["unit"], data["run"]) == (10, "mm", "/r")
    assert "monai" in data["versions"]
    undefined = {row["score"]: row["undefined"] for row in rows if row["class"] == "two"}
    assert (undefined["dice"], undefined["hd95"]) == ("0", "1")


def test_without_a_table_there_is_nothing_to_conclude(tmp_path):
    assert report.conclude(tmp_path, "test", FACTS) == []
    assert not list(tmp_path.iterdir())


def test_a_large_picture_is_made_to_fit(tmp_path):
    from lightning_dice.report.plots import of_file

    noise = np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    assert len(of_file(tmp_path / "noise.png", limit=400_000)) < 400_000
    assert of_file(tmp_path / "none.png") == ""
