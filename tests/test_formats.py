"""Data sets in other forms than a folder of ids, trained on as a user does it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import LEAN, rows, run_command
from PIL import Image

TINY = [
    *("model=custom", "data.patch_size=[16,16]", "data.batch_size=4", "data.num_workers=0", "data.channels=1"),
    *(*LEAN, "callbacks=[progress_bar,history,checkpoint,case_table]", "test=true", "device=cpu"),
    *("trainer.max_epochs=1", "folder=run"),
]
SIZE = (20, 24)


@pytest.fixture(autouse=True)
def _without_charts(monkeypatch):
    """The report's charts have their own tests."""
    monkeypatch.setattr("lightning_dice.plotting.report_plots.figure_url", lambda figure: "data:,")


def fit(*arguments: str, cwd: Path) -> str:
    done = run_command("fit", *TINY, *arguments, cwd=cwd)
    assert "Traceback" not in done.err
    return done.out + done.err


def image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_soft_labels_of_several_raters(tmp_path, rng):
    """Exclusive classes, a file each beside each other, of two raters; scored against one of them."""
    ids = {}
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            case = f"{split} {number}"
            image(tmp_path / f"data/images/{split}/{case}.png", rng.integers(0, 255, SIZE).astype(np.uint8))
            for rater in ("anna", "ben"):
                mask = ids[case, rater] = rng.integers(0, 3, SIZE)
                for label, name in enumerate(("cell", "nucleus"), 1):
                    image(tmp_path / f"data/masks/{split}/{case}_{rater}_{name}.png", np.uint8(mask == label) * 255)
    shown = fit(
        *("data=folder", "data.root=data", "data.activation=softmax", "data.classes=[background,cell,nucleus]"),
        *("data.masks='masks/{split}/{case}_{rater}_{class}'", "data.raters=[anna,ben]", "data.reference=ben"),
        *("data.label_map={255:1}", "loss=dice_semimetric"),
        cwd=tmp_path,
    )
    assert "6 cases, one mask for each class by 2 raters, softmax" in shown
    table = {row["case"]: row for row in rows(tmp_path / "run/cases.csv")}
    assert set(table) == {"val 0", "val 1"}
    for case, row in table.items():
        for label, name in enumerate(("background", "cell", "nucleus")):
            assert int(row[f"actual/{name}"]) == (ids[case, "ben"] == label).sum()


def test_annotations_of_coco(tmp_path):
    """Splits by names of their own, categories of another name, an image without an object."""
    for split, number in (("train2017", 4), ("val2017", 2)):
        entries, annotations = [], []
        for index in range(number):
            name = f"{index:012d}.png"
            image(tmp_path / "data" / split / name, np.full(SIZE, 20 * index, np.uint8))
            entries.append({"id": index, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
            corners = [2, 3, 2 + index, 3, 2 + index, 9, 2, 9]
            if index:
                annotations.append({"id": index, "image_id": index, "category_id": 3, "segmentation": [corners]})
        given = {"images": entries, "annotations": annotations, "categories": [{"id": 3, "name": "car"}]}
        (tmp_path / "data/annotations").mkdir(exist_ok=True)
        (tmp_path / f"data/annotations/instances_{split}.json").write_text(json.dumps(given))
    shown = fit(
        *("data=coco", "data.root=data", "data.classes=[vehicle]", "data.categories={car: vehicle}"),
        "data.splits={train: train2017, val: val2017}",
        cwd=tmp_path,
    )
    assert "Note: 1 of 2 images in instances_val2017.json have no annotation of a class" in shown
    table = {row["case"]: row for row in rows(tmp_path / "run/cases.csv")}
    assert [int(table[f"{index:012d}"]["actual/vehicle"]) for index in range(2)] == [0, 6]
