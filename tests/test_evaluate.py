"""Evaluation of masks that lie in files."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image
from scipy import ndimage
from volume_files import AFFINES, blob, folders, write

from lightning_dice.configs import CONF_DIR, UserError, register_resolvers
from lightning_dice.evaluate import evaluate


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


def run(home, *settings):
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        given = [f"predictions={home / 'predictions'}", "device=cpu"]
        names = {setting.partition("=")[0] for setting in settings}
        own = [setting for setting in settings if setting.partition("=")[0] in OWN]
        config = compose("evaluate", overrides=[*(s for s in given if s.partition("=")[0] not in names), *own])
        others = [setting for setting in settings if setting not in own]
        evaluate(config, ["data=folder", f"data.root={home / 'data'}", "data.num_workers=0", *others])


OWN = {"predictions", "run", "split", "missing", "output", "checkpoint"}


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_scores_of_files_alone(home, capsys):
    (home / "predictions" / "extra.png").write_bytes((home / "predictions" / "test0.png").read_bytes())
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
    assert "files of no case, passed over (1): extra.png" in told.err
    assert "Hausdorff 95" in told.out
    (home / "predictions" / "extra.png").unlink()


def test_another_evaluation_is_numbered_and_the_predictions_stay_as_they_are(home):
    before = sorted(path.name for path in (home / "predictions").iterdir())
    run(home, "callbacks.case_table.tolerance=0.5")
    again = home / "predictions_scores_test-2"
    first = home / "predictions_scores_test"
    assert [row["dice"] for row in rows(again / "cases.csv")] == [row["dice"] for row in rows(first / "cases.csv")]
    key = "surface_dice/foreground"
    assert float(rows(again / "cases.csv")[0][key]) < float(rows(first / "cases.csv")[0][key])
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["predictions=nowhere"], "nowhere is not a folder"),
        (["split=train"], "split must be val or test"),
        (["missing=no"], "missing must be error or skip"),
        (["checkpoint=last"], "leave them out with predictions="),
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
        config = compose("evaluate", overrides=[f"predictions={home / 'predictions'}"])
        with pytest.raises(UserError, match="predictions need masks to be compared with"):
            evaluate(config, ["module.threshold=0.3"])


def test_volumes_must_lie_where_their_images_do(tmp_path, capsys):
    """An affine that a tool has lost, or moved, would compare other voxels, and score them without a word."""
    folders(tmp_path / "data", {"train": 2, "val": 2}, AFFINES["LPS"])
    data = ["data=volumes", f"data.root={tmp_path / 'data'}", "data.classes=[background,front,back]"]
    files = [f"predictions={tmp_path / 'lost'}", "split=val"]
    for index, affine in enumerate((np.eye(4), AFFINES["LPS"])):
        write(tmp_path / f"lost/val{index}.nii.gz", blob(100 + index)[1], affine)
    with pytest.raises(UserError, match=r"lost/val0.nii.gz: lies elsewhere than val0.nii.gz: .*check_affine=false"):
        run(tmp_path, *files, *data)
    # Nor is it missing, whatever its suffix.
    (tmp_path / "lost/val1.nii.gz").rename(tmp_path / "lost/val1.nii.gz.part")
    write(tmp_path / "lost/val1.nii", blob(101)[1], np.eye(4))
    with pytest.raises(UserError, match=r"^2 predictions cannot be scored"):
        run(tmp_path, *files, *data, "missing=skip")
    run(tmp_path, *files, *data, "data.check_affine=false")
    assert [row["dice"] for row in rows(tmp_path / "lost_scores_val/cases.csv")] == ["1", "1"]
