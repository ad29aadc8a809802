"""Evaluation of masks that lie in files."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import rows
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from PIL import Image
from rich.progress import Progress
from scipy import ndimage
from volume_files import AFFINES, blob, folders, write

from lightning_dice.callbacks import Overlays
from lightning_dice.cli import run_folder
from lightning_dice.cli.config import CONF_DIR, compose, register_resolvers
from lightning_dice.cli.errors import UserError
from lightning_dice.evaluate import evaluate
from lightning_dice.report import score_predictions


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Images, masks, and predictions of the test cases: the masks, eroded."""
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2), ("test", 5)):
        for place in range(count):
            noise = ndimage.gaussian_filter(random.standard_normal((24 + place, 30)), 3)
            mask = (noise > 0.02).astype(np.uint8) * (place != 3)
            for kind, pixels in (("images", noise * 300 + 90), ("masks", mask)):
                path = folder / "data" / kind / split / f"{split}{place}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
            if split == "test":
                (folder / "predictions").mkdir(exist_ok=True)
                eroded = ndimage.binary_erosion(mask).astype(np.uint8)
                Image.fromarray(eroded).save(folder / "predictions" / f"{split}{place}.png")
    return folder


@pytest.fixture(autouse=True)
def _without_charts(monkeypatch):
    """Those of the report, which have their own tests, would take most of the time."""
    monkeypatch.setattr("lightning_dice.plotting.report_plots.figure_url", lambda figure: "data:,")


def run(home, *settings):
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        given = [f"predictions={home / 'predictions'}", "device=cpu"]
        names = {setting.partition("=")[0] for setting in settings}
        own = [setting for setting in settings if setting.partition("=")[0] in OWN]
        config = hydra_compose("evaluate", overrides=[*(s for s in given if s.partition("=")[0] not in names), *own])
        others = [setting for setting in settings if setting not in own]
        data = [] if "data=synthetic" in others else ["data=folder", f"data.root={home / 'data'}"]
        evaluate(config, [*data, "data.num_workers=0", *others])


OWN = {"predictions", "run", "split", "missing", "output", "checkpoint", "calibration"}


@pytest.mark.slow
def test_scores_of_files_alone(home, tmp_path, capsys):
    home = shutil.copytree(home, tmp_path / "files")
    (home / "predictions" / "extra.png").write_bytes((home / "predictions" / "test0.png").read_bytes())
    before = sorted(path.name for path in (home / "predictions").iterdir())
    run(home)
    made, told = home / "predictions_scores_test", capsys.readouterr()
    found = rows(made / "cases.csv")
    assert [row["case"] for row in found] == [f"test{place}" for place in range(5)]
    for row in found:
        masks = [
            np.asarray(Image.open(home / folder / f"{row['case']}.png")) == 1
            for folder in ("predictions", "data/masks/test")
        ]
        both = sum(mask.sum() for mask in masks)
        assert row["dice"] == ("" if not both else f"{2 * (masks[0] & masks[1]).sum() / both:.6g}")
    for name in ("report.html", "summary.csv", "summary.json", "overlays.png", "dice_per_class.png"):
        assert (made / name).stat().st_size > 0, name
    assert "files that belong to no case, skipped (1): extra.png" in told.err
    assert "Hausdorff 95" in told.out
    # Another evaluation is numbered, and the predictions stay as they are.
    run(home, "callbacks.case_table.tolerance=0.5")
    again = rows(home / "predictions_scores_test-2" / "cases.csv")
    assert [row["dice"] for row in again] == [row["dice"] for row in found]
    key = "surface_dice/foreground"
    assert float(again[0][key]) < float(found[0][key])
    assert sorted(path.name for path in (home / "predictions").iterdir()) == before


def test_everything_wrong_is_told_at_once_and_nothing_is_left(home, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(home / "predictions", bad)
    (bad / "test0.png").unlink()
    (bad / "test4.png").unlink()
    Image.new("L", (9, 9)).save(bad / "test1.png")
    (bad / "test2.png").write_bytes(b"none")
    with pytest.raises(UserError) as told:
        run(home, f"predictions={bad}", f"output={tmp_path / 'scores'}")
    for words in ("lacks the predictions of 2 test cases", "test0\n  test4", "2 predictions cannot be scored", "9 x 9"):
        assert words in str(told.value)
    assert "test2.png" in str(told.value)
    assert not (tmp_path / "scores").exists()


def test_missing_predictions_can_be_skipped(home, tmp_path, capsys):
    shutil.copytree(home / "predictions", tmp_path / "some")
    (tmp_path / "some" / "test0.png").unlink()
    run(home, f"predictions={tmp_path / 'some'}", "missing=skip", f"output={tmp_path / 'scores'}")
    assert len(rows(tmp_path / "scores" / "cases.csv")) == 4
    assert "test cases without a prediction, left out (1): test0" in capsys.readouterr().err
    assert "test0" in (tmp_path / "scores" / "summary.json").read_text()


def test_a_folder_of_no_prediction_is_refused(home, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty has no prediction of any of the 5 test cases"):
        run(home, f"predictions={empty}", "missing=skip")
    # As `predict` writes those of several splits.
    shutil.copytree(home / "predictions", empty / "test")
    monkeypatch.setattr(score_predictions, "MAX_LISTED", 2)
    with pytest.raises(UserError, match=r"or predictions=\S+empty/test:\n  test0\n  test1\n  and 3 more$"):
        run(home, f"predictions={empty}")
    Image.new("L", (9, 9)).save(empty / "test0.png")
    with pytest.raises(UserError) as told:
        run(home, f"predictions={empty}", "missing=skip")
    assert "1 predictions cannot be scored" in str(told.value)
    assert "lacks" not in str(told.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_what_predict_writes_beside_the_masks_is_no_mask(home, tmp_path, capsys):
    folder = tmp_path / "masks"
    shutil.copytree(home / "predictions", folder)
    for name in ("overlays/test0.png", "probabilities/other.tif", ".cache/a.png", *(f"sub/{n}.png" for n in range(9))):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(home / "predictions" / "test0.png", folder / name)
    (folder / "notes.txt").write_text("")
    run(home, f"predictions={folder}")
    listed = ", ".join(f"sub/{n}.png" for n in range(8))
    assert f"files that belong to no case, skipped (9): {listed} ...\n" in capsys.readouterr().err


def test_each_case_is_shown_with_its_own_image(home, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        Overlays, "offer", lambda _, case, image, mask, predicted: seen.update({case: (image, mask, predicted)})
    )
    monkeypatch.setattr(Overlays, "draw", lambda *_: None)
    steps = []
    monkeypatch.setattr(Progress, "advance", lambda _, bar: steps.append(bar))
    data = home / "alike"
    for place in range(4):
        for kind in ("images", "masks"):
            (data / kind / "val").mkdir(parents=True, exist_ok=True)
            with Image.open(home / "data" / kind / "train" / f"train{place}.png") as picture:
                picture.resize((24, 24)).save(data / kind / "val" / f"c{place}.png")
        (data / "said").mkdir(exist_ok=True)
        shutil.copy(data / "masks" / "val" / f"c{place}.png", data / "said")
    for kind in ("images", "masks"):
        shutil.copytree(data / kind / "val", data / kind / "train")
    # Without a test split those of validation are scored.
    given = [f"predictions={data / 'said'}", f"data.root={data}", "data.batch_size=4", "data.eval_batch_size=4"]
    run(home, *given, f"output={tmp_path / 'scores'}")
    assert [row["split"] for row in rows(tmp_path / "scores" / "cases.csv")] == ["val"] * 4
    assert len(steps) == 4
    for place in range(4):
        image, mask, predicted = seen[f"c{place}"]
        pixels = np.asarray(Image.open(data / "images" / "val" / f"c{place}.png"), np.float32) / 255
        assert np.corrcoef(image[0].flatten(), pixels.flatten())[0, 1] > 0.999
        assert torch.equal(mask, predicted.to(mask.dtype))


@pytest.mark.parametrize("kept", [True, False], ids=["with callbacks", "without"])
def test_facts_of_the_data_have_their_part_without_callbacks_too(home, tmp_path, kept):
    data = tmp_path / "data"
    shutil.copytree(home / "data", data)
    for path in (data / "masks" / "test").iterdir():
        mask = np.asarray(Image.open(path)).copy()
        mask[:10] = 255
        Image.fromarray(mask).save(path)
    classes = ["data.classes=[background,thing]", "data.activation=softmax", "data.exclude_classes=[0]"]
    without = [] if kept else ["~callbacks.case_table", "~callbacks.overlays"]
    run(home, f"data.root={data}", *classes, *without, f"output={tmp_path / 'scores'}")
    found = rows(tmp_path / "scores" / "cases.csv")
    assert "dice/background" not in found[0]
    for row in found:
        said, there = (
            np.asarray(Image.open(folder / f"{row['case']}.png"))[10:] == 1
            for folder in (home / "predictions", data / "masks" / "test")
        )
        both = said.sum() + there.sum()
        assert row["dice"] == ("" if not both else f"{2 * (said & there).sum() / both:.6g}")
    assert (tmp_path / "scores" / "overlays.png").is_file() == kept


def test_the_data_are_those_of_the_run(home, tmp_path):
    register_resolvers()
    (tmp_path / "run").mkdir()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("fit", ["data=folder", f"data.root={home / 'data'}", "data.num_workers=0"])
        config.callbacks.case_table.tolerance = 0.25
        config.folder = str(tmp_path / "run")
        run_folder.save_config(tmp_path / "run", config)
        given = [f"run={tmp_path / 'run'}", "device=cpu"]
        config = hydra_compose("evaluate", overrides=[*given, f"predictions={home / 'predictions'}"])
        config.output = str(tmp_path / "scores")
        evaluate(config, [])
        data = json.loads((tmp_path / "scores" / "summary.json").read_text())
        assert (data["run"], data["settings"]["tolerance"]) == (str(tmp_path / "run"), 0.25)
        with pytest.raises(UserError, match="only device=cpu or device=gpu can be chosen"):
            evaluate(compose("evaluate", overrides=given), ["trainer.devices=2"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["predictions=nowhere"], "nowhere is not a folder"),
        (["split=train"], "split must be val or test"),
        (["missing=no"], "missing must be error or skip"),
        (["checkpoint=last"], "leave them out with predictions="),
        (["calibration=none"], "leave them out with predictions="),
        (["data=synthetic", "data.cases={train:8,val:2,test:0}", "split=test"], "the data have no test split"),
        (["predictions=null"], "run has no value: give run="),
        (["split=val"], "lacks the predictions of 2 val cases"),
    ],
)
def test_refuses(home, settings, message):
    with pytest.raises(UserError, match=message):
        run(home, *settings)


def test_an_output_that_exists_is_refused(home):
    with pytest.raises(UserError, match="exists, and nothing is overwritten"):
        run(home, f"output={home / 'data'}")


def test_the_masks_need_data(home):
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = hydra_compose("evaluate", overrides=[f"predictions={home / 'predictions'}"])
        with pytest.raises(UserError, match="predictions need masks to be compared with"):
            evaluate(config, ["module.threshold=0.3"])


def test_volumes_must_lie_where_their_images_do(tmp_path, capsys):
    """An affine that a tool has lost, or moved, would compare other voxels, and score them without a word."""
    folders(tmp_path / "data", {"train": 2, "val": 2}, AFFINES["LPS"])
    data = ["data=volumes", f"data.root={tmp_path / 'data'}", "data.classes=[background,front,back]"]
    files = [f"predictions={tmp_path / 'lost'}", "split=val"]
    for index, affine in enumerate((np.eye(4), AFFINES["LPS"])):
        write(tmp_path / f"lost/val{index}.nii.gz", blob(100 + index)[1], affine)
    with pytest.raises(UserError, match=r"lost/val0.nii.gz: is not aligned with val0.nii.gz: .*check_affine=false"):
        run(tmp_path, *files, *data)
    # Nor is it missing, whatever its suffix.
    (tmp_path / "lost/val1.nii.gz").rename(tmp_path / "lost/val1.nii.gz.part")
    write(tmp_path / "lost/val1.nii", blob(101)[1], np.eye(4))
    with pytest.raises(UserError, match=r"^2 predictions cannot be scored"):
        run(tmp_path, *files, *data, "missing=skip")
    run(tmp_path, *files, *data, "data.check_affine=false")
    assert [row["dice"] for row in rows(tmp_path / "lost_scores_val/cases.csv")] == ["1", "1"]


def test_volumes_are_measured_in_millimetres(tmp_path):
    folders(tmp_path / "data", {"train": 2, "val": 1}, AFFINES["RAS"])
    mask = blob(100)[1]
    mask[6] = 0  # Of the second class 16 of 32 voxels of 1 x 2 x 3 mm.
    write(tmp_path / "said/val0.nii.gz", mask, AFFINES["RAS"])
    data = ["data=volumes", f"data.root={tmp_path / 'data'}", "data.classes=[background,front,back]"]
    run(tmp_path, f"predictions={tmp_path / 'said'}", "split=val", *data)
    (row,) = rows(tmp_path / "said_scores_val/cases.csv")
    assert sorted(row["spacing"].split()) == ["1", "2", "3"]
    assert float(row["volume_difference/back"]) == pytest.approx(-16 * 6 / 1000)
    assert float(row["volume_error/back"]) == pytest.approx(-0.5)
    assert float(row["hd95/back"]) == 1


@pytest.mark.slow
def test_tiles_are_scored_by_the_predictions_of_whole_images(home, tmp_path):
    run(home, "data.tile=16", f"output={tmp_path / 'scores'}")
    found = rows(tmp_path / "scores" / "cases.csv")
    assert [row["case"] for row in found][:4] == ["test0@0-0", "test0@0-15", "test0@12-0", "test0@12-15"]
    assert len(found) == 20
    for row in found:
        case, _, place = row["case"].partition("@")
        top, left = map(int, place.split("-"))
        height = 24 + int(case[-1])
        part = np.s_[top : (height + 1) // 2 if top == 0 else height, left : 15 if left == 0 else 30]
        masks = [
            np.asarray(Image.open(home / folder / f"{case}.png"))[part] == 1
            for folder in ("predictions", "data/masks/test")
        ]
        both = sum(mask.sum() for mask in masks)
        assert row["dice"] == ("" if not both else f"{2 * (masks[0] & masks[1]).sum() / both:.6g}")
    shutil.copytree(home / "predictions", tmp_path / "some")
    (tmp_path / "some" / "test1.png").unlink()
    Image.new("L", (30, 40)).save(tmp_path / "some" / "test2.png")
    with pytest.raises(UserError) as told:
        run(home, f"predictions={tmp_path / 'some'}", "data.tile=16", f"output={tmp_path / 'none'}")
    assert "lacks the predictions of 1 test cases; missing=skip scores the others:\n  test1\n" in str(told.value)
    assert "the prediction of test2 has size 1 x 40 x 30, but its mask has 1 x 26 x 30" in str(told.value)
