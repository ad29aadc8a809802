"""The commands, run as a user runs them."""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LEAN, SMALL, Forked, refused, rows, run_command, start_command
from omegaconf import OmegaConf
from PIL import Image

from lightning_dice.cli import rendezvous
from lightning_dice.cli.config import instantiate

# With scores and their tables, without pictures and logs.
SCORED = ["logger=none", "callbacks=[progress_bar,history,checkpoint,case_table,interrupt]"]


@pytest.fixture(autouse=True)
def _without_charts(monkeypatch):
    """The report's charts have their own tests, and take most of the time of an evaluation."""
    monkeypatch.setattr("lightning_dice.plotting.report_plots.figure_url", lambda figure: "data:,")


@pytest.fixture
def copied(trained_run, tmp_path):
    """A finished run of two epochs, which a test may change."""
    return shutil.copytree(trained_run, tmp_path / "copied")


@pytest.fixture(scope="module")
def lean_run(tmp_path_factory):
    """A finished run of two epochs without pictures; for reading only."""
    home = tmp_path_factory.mktemp("lean")
    run_command("fit", *SMALL, *LEAN, "trainer.max_epochs=2", "folder=run", cwd=home)
    return home / "run"


@pytest.fixture
def lean(lean_run, tmp_path):
    """A copy of it, which a test may resume."""
    return shutil.copytree(lean_run, tmp_path / "lean")


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


class TestFit:
    def test_leaves_everything_in_the_folder(self, trained_run):
        for name in (
            *("config.yaml", "metrics.csv", "cases.csv", "curves.png", "dice_per_class.png", "overlays.png"),
            *("summary.csv", "summary.json", "report.html", "reliability.csv"),
            *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "logs/csv/version_0/metrics.csv"),
        ):
            assert (trained_run / name).stat().st_size > 0, name
        assert [row["epoch"] for row in rows(trained_run / "metrics.csv")] == ["0", "1"]
        assert {row["split"] for row in rows(trained_run / "cases.csv")} == {"test"}
        assert len(rows(trained_run / "cases.csv")) == 4

    def test_checkpoints_are_plain_values(self, trained_run):
        checkpoint = torch.load(trained_run / "checkpoints" / "best.ckpt", weights_only=True)
        assert checkpoint["config"]["loss"]["smooth"] == 1.0

    def test_shows_the_data_the_scores_and_the_paths(self, tmp_path):
        output = run_command("fit", *SMALL, *SCORED, "trainer.max_epochs=1", "runs=shown", cwd=tmp_path).out
        (folder,) = (tmp_path / "shown").iterdir()
        for text in ("train: 16 cases", "DiceLoss(", "val", "test", "dice", "best.ckpt", folder.name):
            assert text in output
        assert folder.name.endswith("_synthetic_custom")

    @pytest.mark.process
    def test_as_a_user_starts_it(self, tmp_path):
        done = start_command("fit", *SMALL, *LEAN, "trainer.max_epochs=1", "folder=run", cwd=tmp_path)
        assert "best.ckpt" in done.out
        assert not done.err.strip()
        assert len(rows(tmp_path / "run" / "metrics.csv")) == 1
        told = start_command("fit", *SMALL, "folder=run", cwd=tmp_path, status=2)
        assert "exists, and nothing is overwritten" in told.err

    def test_paths_need_no_quotes_for_hydra(self, tmp_path):
        folder = tmp_path / "rüns (of) mine, [1]"
        run_command("fit", *SMALL, *SCORED, "test=false", "trainer.max_epochs=1", f"folder={folder}", cwd=tmp_path)
        run_command("evaluate", f"run={folder}", f"output={folder / 'again {2}'}", cwd=tmp_path)
        assert (folder / "again {2}" / "cases.csv").is_file()

    def test_a_setting_without_a_value(self, tmp_path):
        assert "data.root has no value: give data.root=" in refused("fit", "data=folder", cwd=tmp_path)

    def test_never_overwrites(self, copied):
        before = (copied / "metrics.csv").read_bytes()
        message = refused("fit", *SMALL, "folder=copied", cwd=copied.parent)
        assert "exists, and nothing is overwritten" in message
        assert (copied / "metrics.csv").read_bytes() == before

    def test_mistakes_leave_no_folder(self, tmp_path):
        message = refused("fit", *SMALL, "loss.smooth=-1", "runs=mistakes", cwd=tmp_path)
        assert "smooth must be a number of pixels >= 0" in message
        assert not list((tmp_path / "mistakes").iterdir())

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("loss.smoth=1", "Could not override 'loss.smoth'"),
            ("loss.smoth=1", "loss has _target_, activation, smooth"),
            ("trainer.max_epoch=1", "did you mean max_epochs?"),
            ("model=unett", "Could not find 'model/unett'"),
        ],
    )
    def test_typos_are_explained_with_what_exists(self, tmp_path, override, message):
        assert message in refused("fit", *SMALL, override, cwd=tmp_path, status=1)

    def test_a_batch_larger_than_the_data(self, tmp_path):
        message = refused("fit", *SMALL, "data.batch_size=17", cwd=tmp_path)
        assert "batch_size" in message

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        assert "cannot make the run's folder" in refused("fit", *SMALL, "runs=file/runs", cwd=tmp_path)

    def test_a_missing_gpu(self, tmp_path):
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        told = refused("fit", *SMALL, "device=gpu", cwd=tmp_path)
        assert "trainer.accelerator=gpu, but torch finds no GPU: use device=cpu" in told

    def test_epochs_that_are_no_number(self, tmp_path):
        told = refused("fit", *SMALL, "trainer.max_epochs=two", cwd=tmp_path)
        assert "trainer.max_epochs must be a whole number >= 1, or -1 for no limit, got two" in told

    def test_a_training_that_diverges_ends_and_says_why(self, tmp_path):
        """Its workers end with it, though they leave other signals to the training."""
        message = refused("fit", *SMALL, "data.num_workers=1", "optimizer.lr=1e30", "folder=diverged", cwd=tmp_path)
        assert "the steps so far have made weights that are not finite, or enormous" in message
        assert "lower optimizer.lr" in message

    @pytest.mark.slow
    def test_a_sweep_has_a_folder_for_each_trial(self, tmp_path):
        settings = ["trainer.max_epochs=1", "loss.smooth=0.1,1", "runs=swept"]
        run_command("fit", "-m", *SMALL, *LEAN, *settings, cwd=tmp_path)
        (sweep,) = (tmp_path / "swept").iterdir()
        for number, smooth in (("0", "smooth: 0.1"), ("1", "smooth: 1")):
            assert smooth in (sweep / number / "config.yaml").read_text()
            assert len(rows(sweep / number / "metrics.csv")) == 1

    def test_without_validation_the_last_checkpoint_is_scored(self, tmp_path):
        few = ["data.cases={train:16,val:0,test:4}", "trainer.max_epochs=1", "folder=no-val"]
        assert "scoring the last one" in run_command("fit", *SMALL, *SCORED, *few, cwd=tmp_path).out
        assert len(rows(tmp_path / "no-val" / "cases.csv")) == 4

    def test_processes_started_from_outside_must_be_asked_for(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(rendezvous, "LINGER", 0.1)  # There is no second process that would notice.
        message = refused("fit", *SMALL, "folder=outside", cwd=tmp_path)
        assert "2 processes were started for trainer.devices=1" in message
        assert not (tmp_path / "outside").exists()


class TestResume:
    def test_goes_on_to_more_epochs(self, lean, lean_run):
        run_command("fit", f"resume={lean}", "trainer.max_epochs=3", cwd=lean.parent)
        assert [row["epoch"] for row in rows(lean / "metrics.csv")] == ["0", "1", "2"]
        assert rows(lean / "metrics.csv")[:2] == rows(lean_run / "metrics.csv")

    @pytest.mark.slow
    def test_equals_the_uninterrupted_run(self, tmp_path):
        # The second run's cosine is stretched when it goes on, and so the first epochs of both must be alike.
        whole = [*SMALL, *LEAN, "scheduler.T_max=3"]
        run_command("fit", *whole, "trainer.max_epochs=3", "folder=whole", cwd=tmp_path)
        run_command("fit", *whole, "trainer.max_epochs=2", "folder=parts", cwd=tmp_path)
        run_command("fit", "resume=parts", "trainer.max_epochs=3", cwd=tmp_path)
        rates = [[row["lr"] for row in rows(tmp_path / name / "metrics.csv")] for name in ("whole", "parts")]
        assert rates[0] == rates[1]
        one, two = (weights(tmp_path / name) for name in ("whole", "parts"))
        for key, value in one.items():
            assert torch.equal(value, two[key]), key

    def test_new_settings_of_optimizer_and_schedule_take_effect(self, lean):
        new = ["trainer.max_epochs=4", "optimizer.lr=0.01", "scheduler.eta_min=0"]
        run_command("fit", f"resume={lean}", *new, cwd=lean.parent)
        expected = [0.01 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in (2, 3)]
        assert [float(row["lr"]) for row in rows(lean / "metrics.csv")[2:]] == pytest.approx(expected, rel=1e-4)

    def test_last_is_the_last_epoch_whatever_its_score(self, tmp_path):
        # With a rate of 0 no epoch is better than the first.
        flat = ["trainer.max_epochs=3", "optimizer.lr=0", "scheduler=constant", "folder=flat"]
        run_command("fit", *SMALL, *LEAN, *flat, cwd=tmp_path)
        epochs = [
            torch.load(tmp_path / "flat/checkpoints" / name, weights_only=True)["epoch"]
            for name in ("best.ckpt", "last.ckpt")
        ]
        assert epochs == [0, 2]

    @pytest.mark.process
    @pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"])
    def test_signals_leave_a_checkpoint(self, tmp_path, number, status):
        folder = tmp_path / "run"
        process = Forked("fit", *SMALL, *LEAN, "trainer.max_epochs=100000", f"folder={folder}", cwd=tmp_path)
        for _ in range(600):
            if (folder / "metrics.csv").is_file():
                break
            time.sleep(0.1)
        process.send_signal(number)
        assert "resume=" in process.wait(status).err
        done = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["epoch"]
        run_command("fit", f"resume={folder}", f"trainer.max_epochs={done + 2}", cwd=tmp_path)
        assert rows(folder / "metrics.csv")[-1]["epoch"] == str(done + 1)

    def test_not_a_run(self, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "is not the folder of a run" in refused("fit", "resume=empty", cwd=tmp_path)

    def test_another_architecture(self, lean):
        message = refused("fit", f"resume={lean}", "model.kernel_size=5", cwd=lean.parent)
        assert "kernel_size: 3" in (lean / "config.yaml").read_text()
        assert "another architecture or number of classes" in message
        assert "net.weight: (1, 1, 3, 3) in the checkpoint, (1, 1, 5, 5) in the module" in message


class TestEvaluate:
    def test_gives_the_scores_of_the_run(self, copied):
        output = run_command("evaluate", f"run={copied}", cwd=copied.parent).out
        assert rows(copied / "evaluate_test" / "cases.csv") == rows(copied / "cases.csv")
        assert "dice" in output

    @pytest.mark.slow
    def test_written_predictions_have_the_scores_of_the_run_to_the_last_digit(self, tmp_path, trained_run):
        # Images of the embedded data are of 8 bits, and so survive as files.
        (tmp_path / "drawn").mkdir()
        source = instantiate(OmegaConf.load(trained_run / "config.yaml").data.datamodule.source, "source")
        for image, _, case, *_ in source.split("test"):
            Image.fromarray((image[0] * 255).round().byte().numpy()).save(tmp_path / "drawn" / f"{case}.png")

        def scored(name: str, *settings: str) -> str:
            run_command("predict", f"run={trained_run}", "input=drawn", f"output={name}", *settings, cwd=tmp_path)
            where = [f"predictions={name}", f"output={name}-scores"]
            return run_command("evaluate", f"run={trained_run}", *where, cwd=tmp_path).out

        assert "4 test cases of" in scored("masks")
        found, expected = rows(tmp_path / "masks-scores" / "cases.csv"), rows(trained_run / "cases.csv")
        # Calibration is a matter of probabilities, which masks do not have.
        assert found == [{key: value for key, value in row.items() if not key.startswith("ece")} for row in expected]
        scored("sure", "probabilities=true")
        assert rows(tmp_path / "sure-scores" / "cases.csv") == expected
        test = [row for row in rows(trained_run / "reliability.csv") if row["split"] == "test"]
        assert rows(tmp_path / "sure-scores" / "reliability.csv") == test

    @pytest.mark.slow
    def test_again_in_another_folder(self, copied):
        run_command("evaluate", f"run={copied}", "split=val", "checkpoint=last", cwd=copied.parent)
        run_command("evaluate", f"run={copied}", "split=val", "module.threshold=0.9", cwd=copied.parent)
        one, two = (copied / name / "cases.csv" for name in ("evaluate_val", "evaluate_val-2"))
        assert one.read_bytes() != two.read_bytes()

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("split=train", "split must be val or test"),
            ("checkpoint=beste", "checkpoint must be best, last or the path of a file"),
            ("data.root=x", "data has no root, only channels"),
            ("splitt=val", "splitt=val: there is no such setting; did you mean split"),
            ("module.treshold=0.3", "did you mean threshold"),
            ("model.out_channels=2", "another architecture or number of classes"),
        ],
    )
    def test_refuses(self, tmp_path, trained_run, override, message):
        assert message in refused("evaluate", f"run={trained_run}", override, cwd=tmp_path)

    def test_a_truncated_checkpoint(self, tmp_path, trained_run):
        data = (trained_run / "checkpoints" / "best.ckpt").read_bytes()
        (tmp_path / "half.ckpt").write_bytes(data[: len(data) // 2])
        told = refused("evaluate", f"run={trained_run}", "checkpoint=half.ckpt", cwd=tmp_path)
        assert "cannot be read as a checkpoint" in told


class TestPredict:
    def test_writes_masks_of_the_name_and_size_of_the_images(self, tmp_path, trained_run):
        (tmp_path / "my pictures").mkdir()
        for name, size in (("a.png", (33, 50)), ("c d.bmp", (20, 64))):
            pixels = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "my pictures" / name)
        where = ["input=my pictures", "output=masks"]
        run_command("predict", f"run={trained_run}", *where, "module.threshold=0.01", cwd=tmp_path)
        for name, size in (("a", (50, 33)), ("c d", (64, 20))):
            with Image.open(tmp_path / "masks" / f"{name}.png") as mask:
                assert mask.size == size
                assert np.asarray(mask).all()

    def test_needs_an_output(self, tmp_path, trained_run):
        told = refused("predict", f"run={trained_run}", "input=.", cwd=tmp_path)
        assert "output has no value: give output=..." in told


@pytest.mark.process
def test_help_and_config_need_nothing_heavy():
    """What makes `--help` fast: that the command's module does not import what it does not need."""
    code = "import sys, lightning_dice.fit; print([m for m in ('torch', 'lightning', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.process
@pytest.mark.parametrize("name", ["fit", "evaluate", "predict", "inspect", "plan", "compare", "calibrate", "export"])
def test_help(name, tmp_path):
    done = start_command(name, "--help", cwd=tmp_path)
    assert f"lightning_dice.{name}" in done.out
    assert done.out == run_command(name, "--help", cwd=tmp_path).out
