"""Prediction: what it writes, what it does about what is there already, and about what cannot be read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from helpers import SMALL, Forked, fork_command, rank_environments
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from lightning_dice.cli import run_folder
from lightning_dice.cli.command import hydra_escape, split_arguments
from lightning_dice.cli.config import CONF_DIR, register_resolvers
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.prediction_manifest import Manifest
from lightning_dice.data.images.prediction_io import ImagePredictionIO
from lightning_dice.predict import SETTINGS, predict

FILES = ["data=folder", "data.root=data", "data.classes=[object]", "data.channels=1", "data.nodata=nan"]


def made_run(folder: Path, *overrides: str, seed: int = 0) -> Path:
    """The folder of a run whose one convolution has random weights."""
    register_resolvers()
    small = [setting for setting in SMALL if "data=folder" not in overrides or "cases" not in setting]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("fit", overrides=hydra_escape([*small, f"folder={folder}", *overrides]))
    (folder / "checkpoints").mkdir(parents=True)
    run_folder.save_config(folder, config)
    torch.manual_seed(seed)
    module = run_folder.build_module(config)
    plain = OmegaConf.to_container(config, resolve=True)
    torch.save({"state_dict": module.state_dict(), "config": plain}, folder / "checkpoints" / "best.ckpt")
    return folder


def run_predict(*arguments: object) -> int:
    own, overrides = split_arguments(hydra_escape(map(str, arguments)), SETTINGS)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("predict", overrides=["device=cpu", *own])
    return predict(config, overrides, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    with pytest.raises(UserError) as told:
        run_predict(*arguments)
    return str(told.value)


def logits_of(run: Path, pixels: np.ndarray) -> torch.Tensor:
    """What the run's network makes of gray pixels, by the definitions of its parts."""
    image = torch.from_numpy(pixels.astype(np.float32) / np.float32(255))[None]
    image = (image - image.mean()) / image.std(correction=0)
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    return F.conv2d(image[None], state["net.weight"], state["net.bias"], padding=1)[0]


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (33, 50)), ("b.tif", (32, 32)), ("c d.bmp", (20, 64)), ("sub/ü.png", (17, 9))):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


CASES = {"a": "a.png", "b": "b.tif", "c d": "c d.bmp", "sub/ü": "sub/ü.png"}


class TestMasks:
    def test_are_what_the_network_says_of_each_image(self, run, pictures, tmp_path, capsys):
        (pictures / "notes.txt").write_text("no image")
        assert run_predict(f"run={run}", f"input={pictures}", f"output={tmp_path / 'm'}", "overlays=true") == 0
        assert f"4 of 4 images: masks in {tmp_path / 'm'}" in capsys.readouterr().out
        for case, file in CASES.items():
            mask = pixels_of(tmp_path / "m" / f"{case}.png")
            expected = logits_of(run, pixels_of(pictures / file))[0] > 0
            assert np.array_equal(mask, expected.numpy())
            assert mask.dtype == np.uint8
            assert pixels_of(tmp_path / "m" / "overlays" / f"{case}.png").shape == (*mask.shape, 3)
        assert 0 < expected.float().mean() < 1

    def test_of_a_file_as_tiff_with_probabilities(self, run, pictures, tmp_path):
        arguments = [f"run={run}", f"input={pictures / 'a.png'}", f"output={tmp_path / 'm'}"]
        assert run_predict(*arguments, "format=tiff", "probabilities=true", "module.threshold=0.3") == 0
        probs = logits_of(run, pixels_of(pictures / "a.png")).sigmoid().numpy()
        assert np.array_equal(tifffile.imread(tmp_path / "m" / "a.tif"), probs[0] > 0.3)
        written = tifffile.imread(tmp_path / "m" / "probabilities" / "a.tif")
        assert np.allclose(written, probs[0], atol=1e-6)

    def test_of_classes_that_overlap_and_of_some_that_do_not(self, pictures, tmp_path):
        overlapping = made_run(tmp_path / "r1", "data.classes=[x,y]")
        run_predict(f"run={overlapping}", f"input={pictures}", f"output={tmp_path / 'm1'}")
        exclusive = made_run(tmp_path / "r2", "data.classes=[z,x,y]", "data.activation=softmax")
        run_predict(f"run={exclusive}", f"input={pictures}", f"output={tmp_path / 'm2'}", "overlays=true")
        for case, file in CASES.items():
            logits = logits_of(overlapping, pixels_of(pictures / file))
            for name, plane in zip("xy", logits > 0, strict=True):
                assert np.array_equal(pixels_of(tmp_path / "m1" / name / f"{case}.png"), plane)
            ids = logits_of(exclusive, pixels_of(pictures / file)).argmax(0)
            assert np.array_equal(pixels_of(tmp_path / "m2" / f"{case}.png"), ids)

    def test_of_an_ensemble_are_of_the_mean_probability(self, run, pictures, tmp_path):
        other = made_run(tmp_path / "o, ther", seed=1)
        run_predict(f'run=["{run}", "{other}"]', f"input={pictures}", f"output={tmp_path / 'm'}")
        differ = False
        for case, file in CASES.items():
            each = [logits_of(folder, pixels_of(pictures / file))[0].sigmoid() for folder in (run, other)]
            assert np.array_equal(pixels_of(tmp_path / "m" / f"{case}.png"), sum(each) / 2 > 0.5)
            differ |= bool(((each[0] > 0.5) != (sum(each) / 2 > 0.5)).any())
        assert differ

    @pytest.mark.slow
    def test_of_an_ensemble_that_does_not_fit(self, run, pictures, tmp_path):
        where = [f"input={pictures}", f"output={tmp_path / 'm'}"]
        for overrides, name in (
            (["data.classes=[x,y]"], "data.classes"),
            (["data.classes=[z,object]", "data.activation=softmax"], "data.classes"),
            (["normalize=fixed"], "normalize"),
            (["module.threshold=0.3"], "threshold"),
        ):
            other = made_run(tmp_path / overrides[0], *overrides)
            assert f"must have the same {name}, got" in refused(f"run=[{run},'{other}']".replace("'", '"'), *where)
        several = [made_run(tmp_path / str(bands), *FILES, f"data.bands={bands}") for bands in ([1], [2])]
        assert "must preprocess images alike" in (told := refused(f"run=[{several[0]},{several[1]}]", *where))
        assert told.endswith("differ in bands.0: 1 there, 2 now")
        assert "checkpoint must be best or last" in refused(f"run=[{run},{run}]", *where, "checkpoint=x.ckpt")
        assert not (tmp_path / "m").exists()

    def test_are_decided_by_the_calibration(self, run, pictures, tmp_path, capsys):
        calibrated = tmp_path / "calibrated"
        shutil.copytree(run, calibrated)
        decision = {"version": 2, "postprocessing": {"thresholds": [0.4]}}
        (calibrated / "calibration.json").write_text(json.dumps(decision))
        for choice, threshold in (("auto", 0.4), ("none", 0.5)):
            output = tmp_path / choice
            run_predict(f"run={calibrated}", f"input={pictures}", f"output={output}", f"calibration={choice}")
            probs = logits_of(run, pixels_of(pictures / "a.png"))[0].sigmoid()
            assert np.array_equal(pixels_of(output / "a.png"), probs > threshold)
            assert ("calibrated by" in capsys.readouterr().err) == (choice == "auto")


class TestGoingOn:
    def test_only_what_is_missing_is_made(self, run, pictures, tmp_path, capsys):
        output = tmp_path / "m"
        arguments = [f"run={run}", f"input={pictures}", f"output={output}"]
        run_predict(*arguments)
        (output / "b.png").unlink()
        before = {name: (output / f"{name}.png").stat().st_mtime_ns for name in ("a", "c d")}
        capsys.readouterr()
        assert run_predict(*arguments) == 0
        assert "4 of 4 images" in (told := capsys.readouterr().out)
        assert "3 of them from before" in told
        assert (output / "b.png").is_file()
        assert before == {name: (output / f"{name}.png").stat().st_mtime_ns for name in before}

    def test_an_image_that_has_changed_is_predicted_again(self, run, pictures, tmp_path):
        output = tmp_path / "m"
        arguments = [f"run={run}", f"input={pictures}", f"output={output}"]
        run_predict(*arguments)
        Image.fromarray(np.zeros((5, 6), np.uint8)).save(pictures / "a.png")
        later = (output / "a.png").stat().st_mtime + 5
        os.utime(pictures / "a.png", (later, later))
        run_predict(*arguments)
        assert pixels_of(output / "a.png").shape == (5, 6)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("module.threshold=0.3", "networks.0.module.threshold: 0.5 there, 0.3 now"),
            ("inference.mirror_axes=[0]", "networks.0.module.inference.mirror_axes: [] there, [0] now"),
            ("format=tiff", 'format: null there, "tiff" now'),
            ("probabilities=true", "probabilities: false there, true now"),
            ("trainer.precision=bf16-mixed", 'precision: "32-true" there, "bf16-mixed" now'),
            ("large=500", "large: 100000000 there, 500 now"),
        ],
    )
    def test_other_settings_are_refused(self, run, pictures, tmp_path, change, message):
        arguments = [f"run={run}", f"input={pictures}", f"output={tmp_path / 'm'}"]
        run_predict(*arguments)
        told = refused(*arguments, change)
        assert "were made with other settings" in told
        assert message in told
        assert run_predict(*arguments, change, "overwrite=true") == 0
        assert run_predict(*arguments, change) == 0

    def test_other_settings_are_taken_where_nothing_is_done(self, run, pictures, tmp_path):
        arguments = [f"run={run}", f"input={pictures}", f"output={tmp_path / 'm'}"]
        assert run_predict(*arguments) == 0
        for path in [path for path in (tmp_path / "m").rglob("*.png")]:
            path.unlink()
        assert run_predict(*arguments, "inference.size=[16,16]") == 0
        assert "inference.size: [16, 16] there" in refused(*arguments)

    def test_a_run_that_was_trained_on_windows_predicts_by_windows(self, pictures, tmp_path, monkeypatch):
        monkeypatch.setattr("lightning_dice.cli.prediction._LARGEST_WHOLE", 1000)
        seen = []

        def by_windows(method):
            seen.append(method)
            return method.predictor

        monkeypatch.setattr("lightning_dice.cli.prediction.PredictionPipeline._windowed_predictor", by_windows)
        for window, large in (("null", 0), ("[64,64]", 3)):  # Of the pictures, three have more than 1000 pixels.
            folder = made_run(tmp_path / window, *FILES, f"data.read_size={window}")
            assert run_predict(f'run=["{folder}"]', f"input={pictures}", f"output={tmp_path / f'm{large}'}") == 0
            assert len(seen) == large

    def test_no_data_that_is_no_number_is_the_same_setting(self, pictures, tmp_path):
        arguments = [f"run={made_run(tmp_path / 'run', *FILES)}", f"input={pictures}", f"output={tmp_path / 'm'}"]
        assert run_predict(*arguments) == 0
        assert run_predict(*arguments) == 0

    def test_another_checkpoint_is_refused_and_the_same_run_elsewhere_is_not(self, run, pictures, tmp_path):
        moved = tmp_path / "moved"
        arguments = [f"input={pictures}", f"output={tmp_path / 'm'}"]
        run_predict(f"run={run}", *arguments)
        shutil.copytree(run, moved)
        assert run_predict(f"run={moved}", *arguments, "data.num_workers=1") == 0
        other = made_run(tmp_path / "other", seed=1)
        assert "networks.0.checkpoint: " in refused(f"run={other}", *arguments)

    def test_beginning_anew_leaves_no_old_mask_behind_an_interruption(self, run, pictures, tmp_path, monkeypatch):
        output = tmp_path / "m"
        arguments = [f"run={run}", f"input={pictures}", f"output={output}"]
        run_predict(*arguments, "module.threshold=0.01")
        write = ImagePredictionIO.write

        def write_one(self, folder, case, *rest):
            if case != "a":
                raise KeyboardInterrupt
            write(self, folder, case, *rest)

        monkeypatch.setattr(ImagePredictionIO, "write", write_one)
        assert run_predict(*arguments, "overwrite=true") == 130
        monkeypatch.undo()
        assert sorted(path.name for path in output.rglob("*.png")) == ["a.png"]
        assert run_predict(*arguments) == 0
        for case, file in CASES.items():
            assert np.array_equal(pixels_of(output / f"{case}.png"), logits_of(run, pixels_of(pictures / file))[0] > 0)

    def test_beginning_anew_leaves_nothing_of_other_settings(self, run, pictures, tmp_path):
        """Masks of another format, and probabilities, which an evaluation would take for those of the new masks."""
        output = tmp_path / "m"
        arguments = [f"run={run}", f"input={pictures}", f"output={output}"]
        run_predict(*arguments, "probabilities=true", "overlays=true", "format=tiff")
        (output / "probabilities/mine.tif").touch()
        assert run_predict(*arguments, "overwrite=true") == 0
        found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
        assert found == {"predictions.json", "probabilities/mine.tif", *(f"{case}.png" for case in CASES)}

    def test_what_is_of_unknown_origin_is_not_overwritten(self, run, pictures, tmp_path):
        output = tmp_path / "m"
        output.mkdir()
        (output / "a.png").write_bytes(b"mine")
        told = refused(f"run={run}", f"input={pictures}", f"output={output}")
        assert f"1 masks exist, such as {output / 'a.png'}" in told
        assert (output / "a.png").read_bytes() == b"mine"
        assert sorted(output.iterdir()) == [output / "a.png"]

    def test_images_of_two_folders(self, run, pictures, tmp_path):
        arguments = [f"run={run}", f"output={tmp_path / 'm'}"]
        run_predict(*arguments, f"input={pictures / 'a.png'}")
        assert run_predict(*arguments, f"input={pictures}") == 0  # of the same folder
        other = tmp_path / "other"
        other.mkdir()
        shutil.copy(pictures / "a.png", other / "z.png")
        assert run_predict(*arguments, f"input={other}") == 0
        assert Manifest.read(tmp_path / "m").inputs == [str(pictures), str(other)]
        shutil.copy(pictures / "b.tif", tmp_path / "a.tif")
        assert f"of the images in {pictures}, {other} and not in" in refused(*arguments, f"input={tmp_path / 'a.tif'}")


class TestBadInput:
    def test_is_told_and_skipped(self, run, pictures, tmp_path, capsys):
        good = (pictures / "a.png").read_bytes()
        (pictures / "truncated.png").write_bytes(good[: len(good) // 2])
        (pictures / "empty.png").write_bytes(b"")
        (pictures / "text.png").write_text("no image at all")
        Image.new("RGB", (9, 9)).save(pictures / "rgb.png")
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(pictures / "x.gif")
        (pictures / "x.gif").rename(pictures / "gif.png")
        (pictures / "gone.png").symlink_to(pictures / "nowhere.png")
        (tmp_path / "away.png").write_bytes(good)
        (pictures / "out.png").symlink_to(tmp_path / "away.png")
        assert run_predict(f"run={run}", f"input={pictures}", f"output={tmp_path / 'm'}") == 1
        told = capsys.readouterr()
        assert "5 of 11 images" in told.out
        at_once, _, at_the_end = told.err.partition("6 of the images could not be predicted:")
        for name, reason in {
            "truncated.png": "cannot be decoded",
            "empty.png": "is empty (0 bytes)",
            "text.png": "is not a PNG, JPEG",
            "rgb.png": "has 3 channels",
            "gone.png": "which does not exist",
            "out.png": "is a link out of the folder",
        }.items():
            for text in (at_once, at_the_end):
                (line,) = [line for line in text.splitlines() if f"/{name}: " in line]
                assert reason in line
        assert "gif.png: is a GIF file by its content" in at_once
        assert "gif.png" not in at_the_end
        made = {path.stem for path in (tmp_path / "m").rglob("*.png")}
        assert made == {"a", "b", "c d", "ü", "gif"}
        # The same command tries them again.
        (pictures / "empty.png").write_bytes(good)
        assert run_predict(f"run={run}", f"input={pictures}", f"output={tmp_path / 'm'}", "follow_symlinks=true") == 1
        assert "7 of 11 images" in capsys.readouterr().out

    def test_an_image_that_vanishes_after_it_was_found(self, run, pictures, tmp_path, monkeypatch, capsys):
        find = ImagePredictionIO.find

        def find_and_lose(self, path):
            items = find(self, path)
            (pictures / "b.tif").unlink()
            return items

        monkeypatch.setattr(ImagePredictionIO, "find", find_and_lose)
        assert run_predict(f"run={run}", f"input={pictures}", f"output={tmp_path / 'm'}") == 1
        told = capsys.readouterr()
        assert "3 of 4 images" in told.out
        assert "b.tif: cannot be opened (No such file or directory)" in told.err

    def test_one_that_the_network_cannot_take(self, run, pictures, tmp_path, monkeypatch, capsys):
        def too_large(self, image, *rest):
            if image.shape[1:] == (20, 64):
                raise torch.OutOfMemoryError
            return torch.ones(1, *image.shape[1:], dtype=torch.bool)

        monkeypatch.setattr("lightning_dice.inference.Predictor.labels", too_large)
        assert run_predict(f"run={run}", f"input={pictures}", f"output={tmp_path / 'm'}") == 1
        told = capsys.readouterr()
        assert "3 of 4 images" in told.out
        assert "c d.bmp: is too large for the memory; set inference.size" in told.err

    def test_a_bomb(self, run, pictures, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
        assert run_predict(f"run={run}", f"input={pictures / 'a.png'}", f"output={tmp_path / 'm'}") == 1
        assert "a.png: may be a decompression bomb" in capsys.readouterr().err


class TestOutput:
    def test_within_the_input_is_no_input(self, run, pictures):
        arguments = [f"run={run}", f"input={pictures}", f"output={pictures / 'sub' / 'masks'}"]
        assert run_predict(*arguments) == 0
        assert run_predict(*arguments) == 0
        assert len(list((pictures / "sub" / "masks").rglob("*.png"))) == 4

    def test_that_would_lose_something(self, run, pictures, tmp_path):
        one = [f"run={run}", f"input={pictures}"]
        assert "is the folder of the images" in refused(*one, f"output={pictures}")
        assert "is the folder of the images" in refused(*one[:1], f"input={pictures / 'b.tif'}", f"output={pictures}")
        (pictures / "overlays").mkdir()
        shutil.copy(pictures / "a.png", pictures / "overlays" / "a.png")
        assert "would lie among the overlays" in refused(*one, f"output={tmp_path / 'm'}", "overlays=true")
        (tmp_path / "link").mkdir()
        (tmp_path / "link" / "a.png").symlink_to(pictures / "a.png")
        told = refused(*one, f"output={tmp_path / 'link'}", "overwrite=true")
        assert "is one of the images, and would be overwritten" in told
        assert (pictures / "a.png").is_file()

    def test_that_cannot_be_made(self, run, pictures, tmp_path):
        (tmp_path / "file").write_text("")
        assert "cannot make the output folder" in refused(
            f"run={run}", f"input={pictures}", f"output={tmp_path / 'file' / 'm'}"
        )

    def test_on_a_disk_that_is_full(self, run, pictures, tmp_path, monkeypatch):
        write, output = ImagePredictionIO.write, tmp_path / "m"

        def full(self, folder, case, *rest):
            if case == "b":
                raise OSError(errno.ENOSPC, "No space left on device")
            write(self, folder, case, *rest)

        monkeypatch.setattr(ImagePredictionIO, "write", full)
        told = refused(f"run={run}", f"input={pictures}", f"output={output}")
        assert f"cannot write the mask of b to {output}: No space left on device; finished masks are kept" in told
        monkeypatch.undo()
        assert [path.name for path in output.glob("*.png")] == ["a.png"]
        assert run_predict(f"run={run}", f"input={pictures}", f"output={output}") == 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["input=/nowhere"], "input /nowhere: is neither a file nor a folder"),
            (["input=."], "holds no PNG, JPEG, BMP, TIFF or NumPy file"),
            (["format=nifti"], "format must be png or tiff"),
            (["trainer.devices=0"], "trainer.devices must be a number of processes >= 1, got 0"),
            (["calibration=nowhere.json"], "there is no calibration file"),
            (["trainer.precision=int8"], "trainer.precision=int8 is not supported by predict"),
            (["module.treshold=0.5"], "module has no treshold"),
        ],
    )
    def test_mistakes_are_told_before_anything_is_written(
        self, run, pictures, tmp_path, monkeypatch, arguments, message
    ):
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        assert message in refused(f"run={run}", f"input={pictures}", f"output={tmp_path / 'm'}", *arguments)
        assert not (tmp_path / "m").exists()


def test_a_large_picture_is_read_by_windows(run, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 411), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "slide.tif", pixels, tile=(64, 64), compression="zlib")
    Image.fromarray(pixels).save(tmp_path / "in" / "same.png")
    windows = ["inference.size=[96,64]", "inference.overlap=0.25"]
    arguments = [f"run={run}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'm'}", "large=50000", "overlays=true"]
    assert run_predict(*arguments, *windows) == 0
    with tifffile.TiffFile(tmp_path / "m" / "slide.tif") as tiff:
        mask = tiff.asarray()
    whole = pixels_of(tmp_path / "m" / "same.png")
    # The mean over a picture, in float32 or by parts in float64, may differ in its last digit.
    assert (mask != whole).mean() < 1e-4
    assert np.array_equal(pixels_of(tmp_path / "m" / "overlays" / "slide.png").shape, (*pixels.shape, 3))
    assert run_predict(*arguments, *windows) == 0
    assert "2 of them from before" in capsys.readouterr().out
    # Without windows of its own, those of the training's crops.
    assert run_predict(*arguments, "overwrite=true") == 0
    expected = logits_of(run, pixels)[0] > 0
    inner = (slice(1, -1), slice(1, -1))
    assert (tifffile.imread(tmp_path / "m" / "slide.tif") != expected.numpy())[inner].mean() < 0.1
    (tmp_path / "in" / "same.png").unlink()
    assert run_predict(*arguments[:2], f"output={tmp_path / 'p'}", "large=50000", "probabilities=true") == 1
    assert "too large for probabilities=true" in capsys.readouterr().err


class TestProcesses:
    """As a user runs them."""

    @staticmethod
    def many(tmp_path: Path, number: int) -> Path:
        folder = tmp_path / "many"
        folder.mkdir()
        rng = np.random.default_rng(0)
        for index in range(number):
            Image.fromarray(rng.integers(0, 255, (40, 30 + index), dtype=np.uint8)).save(folder / f"{index:03}.png")
        (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        return folder

    @pytest.mark.process
    @pytest.mark.parametrize("launcher", ["own", "torchrun"])
    def test_share_the_cases(self, run, tmp_path, launcher):
        folder = self.many(tmp_path, 7)
        assert run_predict(f"run={run}", f"input={folder}", f"output={tmp_path / 'one'}") == 1
        line = [f"run={run}", f"input={folder}", f"output={tmp_path / 'two'}", "device=cpu"]
        if launcher == "own":
            both = [fork_command("predict", *line, "trainer.devices=2", cwd=tmp_path, status=1, OMP_NUM_THREADS="1")]
        else:
            ranks = [
                Forked("predict", *line, cwd=tmp_path, environment={**environment, "OMP_NUM_THREADS": "1"})
                for environment in rank_environments(2)
            ]
            both = [rank.wait(status=None) for rank in ranks]
            assert [(rank.status, bool(rank.out)) for rank in both] == [(1, True), (0, False)]
        assert both[0].out == f"7 of 8 images: masks in {tmp_path / 'two'}\n"
        # At once, by the process that read it, and at the end by the first.
        assert "".join(rank.err for rank in both).count("broken.png: is not a PNG") == 2
        assert "broken.png: is not a PNG" in both[0].err
        names = sorted(path.name for path in (tmp_path / "one").iterdir())
        assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
        for name in names:
            if name.endswith(".png"):
                assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    @pytest.mark.process
    def test_that_are_stopped_go_on(self, run, tmp_path, capsys):
        folder, output = self.many(tmp_path, 3), tmp_path / "m"
        (folder / "broken.png").unlink()
        pixels = np.random.default_rng(0).integers(0, 255, (300, 300), dtype=np.uint8)
        for index in range(3, 60):
            Image.fromarray(pixels).save(folder / f"{index:03}.png", compress_level=1)
        line = [f"run={run}", f"input={folder}", f"output={output}", "device=cpu", "inference.mirror_axes=[0,1]"]
        process = Forked("predict", *line, cwd=tmp_path)
        for _ in range(3000):
            if (output / "003.png").is_file():
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        told = process.wait(143).err
        assert "Stopped by SIGTERM: run the same command again to continue." in told
        done = len(list(output.glob("*.png")))
        assert 4 <= done < 60
        assert len(list(output.iterdir())) == done + 1  # predictions.json, and no part of a file
        for path in sorted(folder.iterdir())[10:]:
            path.unlink()
        assert run_predict(f"run={run}", f"input={folder}", f"output={output}", "inference.mirror_axes=[0,1]") == 0
        assert "10 of 10 images" in (told := capsys.readouterr().out)
        assert f"{min(done, 10)} of them from before" in told

    def test_ctrl_c_lets_the_image_be_finished(self, run, tmp_path, monkeypatch, capfd):
        folder, output = self.many(tmp_path, 4), tmp_path / "m"
        write = ImagePredictionIO.write

        def interrupted(self, folder, case, *rest):
            os.kill(os.getpid(), signal.SIGINT)
            write(self, folder, case, *rest)

        monkeypatch.setattr(ImagePredictionIO, "write", interrupted)
        assert run_predict(f"run={run}", f"input={folder}", f"output={output}") == 130
        told = capfd.readouterr()
        assert "1 of 5 images" in told.out
        assert "Stopped by Ctrl-C: run the same command again to continue." in told.err
        assert sorted(path.name for path in output.iterdir()) == ["000.png", "predictions.json"]
