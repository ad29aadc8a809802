"""The commands, run as a user runs them."""

from __future__ import annotations

import csv
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
from omegaconf import OmegaConf
from PIL import Image

from lightning_dice.cli.config import instantiate

# One convolution trains the whole pipeline in no time.
SMALL = [
    "model=custom",
    "data.patch_size=[32,32]",
    "data.cases={train:16,val:4,test:4}",
    "data.num_workers=0",
    "device=cpu",
]


def command(name: str, *arguments: str, cwd: Path, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", f"lightning_dice.{name}", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if status is not None:
        assert result.returncode == status, f"{result.stdout}\n{result.stderr}"
    return result


def refused(name: str, *arguments: str, cwd: Path, status: int = 2) -> str:
    """The message of a command that must fail, without a traceback."""
    result = command(name, *arguments, cwd=cwd, status=status)
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("somewhere else")


@pytest.fixture(scope="module")
def run(home):
    """A finished run of two epochs."""
    command("fit", *SMALL, "trainer.max_epochs=2", "folder=run", cwd=home)
    return home / "run"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


class TestFit:
    def test_leaves_everything_in_the_folder(self, run):
        for name in (
            *("config.yaml", "metrics.csv", "cases.csv", "curves.png", "dice_per_class.png", "overlays.png"),
            *("summary.csv", "summary.json", "report.html", "reliability.csv"),
            *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "logs/csv/version_0/metrics.csv"),
        ):
            assert (run / name).stat().st_size > 0, name
        assert [row["epoch"] for row in rows(run / "metrics.csv")] == ["0", "1"]
        assert {row["split"] for row in rows(run / "cases.csv")} == {"test"}
        assert len(rows(run / "cases.csv")) == 4

    def test_checkpoints_are_plain_values(self, run):
        checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
        assert checkpoint["config"]["loss"]["smooth"] == 1.0

    def test_shows_the_data_the_scores_and_the_paths(self, home):
        output = command("fit", *SMALL, "trainer.max_epochs=1", "runs=shown", cwd=home).stdout
        (folder,) = (home / "shown").iterdir()
        for text in ("train: 16 cases", "DiceLoss(", "val", "test", "dice", "best.ckpt", folder.name):
            assert text in output
        assert folder.name.endswith("_synthetic_custom")

    def test_paths_need_no_quotes_for_hydra(self, home):
        folder = home / "rüns (of) mine, [1]"
        command("fit", *SMALL, "trainer.max_epochs=1", f"folder={folder}", "test=false", cwd=home)
        command("evaluate", f"run={folder}", f"output={folder / 'again {2}'}", cwd=home)
        assert (folder / "again {2}" / "cases.csv").is_file()

    def test_a_setting_without_a_value(self, home):
        assert "data.root has no value: give data.root=" in refused("fit", "data=folder", cwd=home)

    def test_never_overwrites(self, home, run):
        before = (run / "metrics.csv").read_bytes()
        message = refused("fit", *SMALL, "folder=run", cwd=home)
        assert "exists, and nothing is overwritten" in message
        assert (run / "metrics.csv").read_bytes() == before

    def test_mistakes_leave_no_folder(self, home):
        message = refused("fit", *SMALL, "loss.smooth=-1", "runs=mistakes", cwd=home)
        assert "smooth must be a number of pixels >= 0" in message
        assert not list((home / "mistakes").iterdir())

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("loss.smoth=1", "Could not override 'loss.smoth'"),
            ("loss.smoth=1", "loss has _target_, activation, smooth"),
            ("trainer.max_epoch=1", "did you mean max_epochs?"),
            ("model=unett", "Could not find 'model/unett'"),
        ],
    )
    def test_typos_are_told_with_what_exists(self, home, override, message):
        assert message in refused("fit", *SMALL, override, cwd=home, status=1)

    def test_a_batch_larger_than_the_data(self, home):
        message = refused("fit", *SMALL, "data.batch_size=17", cwd=home)
        assert "batch_size" in message

    def test_a_folder_that_cannot_be_made(self, home):
        (home / "file").write_text("")
        assert "cannot make the run's folder" in refused("fit", *SMALL, "runs=file/runs", cwd=home)

    def test_a_missing_gpu(self, home):
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        told = refused("fit", *SMALL, "device=gpu", cwd=home)
        assert "trainer.accelerator=gpu, but torch finds no GPU: use device=cpu" in told

    def test_epochs_that_are_no_number(self, home):
        told = refused("fit", *SMALL, "trainer.max_epochs=two", cwd=home)
        assert "trainer.max_epochs must be a whole number, got two" in told

    def test_a_training_that_diverges_ends_and_says_why(self, home):
        """Its workers end with it, though they leave other signals to the training."""
        message = refused("fit", *SMALL, "data.num_workers=1", "optimizer.lr=1e30", "runs=diverged", cwd=home)
        assert "the steps so far have made weights that are not finite, or enormous" in message
        assert "lower optimizer.lr" in message

    def test_a_sweep_has_a_folder_for_each_trial(self, home):
        two = ["trainer.devices=2", "trainer.strategy=ddp"]
        command("fit", "-m", *SMALL, *two, "trainer.max_epochs=1", "loss.smooth=0.1,1", "runs=swept", cwd=home)
        (sweep,) = (home / "swept").iterdir()
        for number, smooth in (("0", "smooth: 0.1"), ("1", "smooth: 1")):
            assert smooth in (sweep / number / "config.yaml").read_text()
            assert (sweep / number / "cases.csv").is_file()

    def test_two_processes_write_one_folder(self, home):
        # Five cases on two processes, and no callback that happens to read metrics on both of them.
        five = ["data.cases={train:16,val:5,test:5}", "data.batch_size=2", "loss.pool=image", "runs=distributed"]
        lean = ["callbacks=[history,checkpoint,case_table]", "logger=none", "trainer.max_epochs=1"]
        distributed = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"]
        told = command("fit", *SMALL, *five, *lean, *distributed, cwd=home).stdout
        (folder,) = (home / "distributed").iterdir()
        assert len(rows(folder / "metrics.csv")) == 1
        # What one process says.
        again = command("evaluate", f"run={folder}", "output=distributed-again", "device=cpu", cwd=home).stdout
        assert rows(home / "distributed-again" / "cases.csv") == rows(folder / "cases.csv")
        assert len(rows(folder / "cases.csv")) == 5
        last_column = [
            [line.split()[-1] for line in text.splitlines() if "loss  " in line][-1] for text in (told, again)
        ]
        assert float(last_column[0]) == pytest.approx(float(last_column[1]), abs=1.1e-4)

    def test_without_validation_the_last_checkpoint_is_scored(self, home):
        told = command(
            "fit", *SMALL, "data.cases={train:16,val:0,test:4}", "trainer.max_epochs=1", "folder=no-val", cwd=home
        ).stdout
        assert "scoring the last one" in told
        assert len(rows(home / "no-val" / "cases.csv")) == 4

    def test_processes_started_from_outside_must_be_asked_for(self, home, monkeypatch):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        message = refused("fit", *SMALL, "folder=outside", cwd=home)
        assert "2 processes were started for trainer.devices=1" in message
        assert not (home / "outside").exists()

    def test_torchrun(self, home):
        processes = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29511", "-m"]
        distributed = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_epochs=1"]
        line = [sys.executable, *processes, "lightning_dice.fit", *SMALL, *distributed]
        subprocess.run([*line, "folder=torchrun"], cwd=home, capture_output=True, timeout=300, check=True)
        assert len(rows(home / "torchrun" / "cases.csv")) == 4


class TestResume:
    def test_goes_on_to_more_epochs(self, home, run):
        folder = home / "longer"
        shutil.copytree(run, folder)
        command("fit", f"resume={folder}", "trainer.max_epochs=4", cwd=home)
        assert [row["epoch"] for row in rows(folder / "metrics.csv")] == ["0", "1", "2", "3"]
        assert rows(folder / "metrics.csv")[:2] == rows(run / "metrics.csv")

    def test_equals_the_uninterrupted_run(self, home):
        # The second run's cosine is stretched when it goes on, and so the first two epochs of both must be alike.
        whole = [*SMALL, "scheduler.T_max=4"]
        command("fit", *whole, "trainer.max_epochs=4", "folder=whole", cwd=home)
        command("fit", *whole, "trainer.max_epochs=2", "folder=parts", cwd=home)
        command("fit", "resume=parts", "trainer.max_epochs=4", cwd=home)
        rates = [[row["lr"] for row in rows(home / name / "metrics.csv")] for name in ("whole", "parts")]
        assert rates[0] == rates[1]
        one, two = (torch.load(home / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "parts"))
        for key, value in one["state_dict"].items():
            assert torch.equal(value, two["state_dict"][key]), key

    def test_new_settings_of_optimizer_and_schedule_take_effect(self, home, run):
        folder = home / "changed"
        shutil.copytree(run, folder)
        command("fit", f"resume={folder}", "trainer.max_epochs=4", "optimizer.lr=0.01", "scheduler.eta_min=0", cwd=home)
        expected = [0.01 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in (2, 3)]
        assert [float(row["lr"]) for row in rows(folder / "metrics.csv")[2:]] == pytest.approx(expected, rel=1e-4)

    def test_last_is_the_last_epoch_whatever_its_score(self, home, run):
        # With a rate of 0 no epoch is better than the first.
        command("fit", *SMALL, "trainer.max_epochs=3", "optimizer.lr=0", "scheduler=constant", "folder=flat", cwd=home)
        epochs = [
            torch.load(home / "flat/checkpoints" / name, weights_only=True)["epoch"]
            for name in ("best.ckpt", "last.ckpt")
        ]
        assert epochs == [0, 2]

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"])
    def test_signals_leave_a_checkpoint(self, home, number, status):
        folder = home / f"signal-{status}"
        process = subprocess.Popen(
            [sys.executable, "-m", "lightning_dice.fit", *SMALL, "trainer.max_epochs=100000", f"folder={folder}"],
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(600):
            if (folder / "metrics.csv").is_file():
                break
            time.sleep(0.1)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == status, output
        assert "resume=" in output
        done = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["epoch"]
        command("fit", f"resume={folder}", f"trainer.max_epochs={done + 2}", cwd=home)
        assert rows(folder / "metrics.csv")[-1]["epoch"] == str(done + 1)

    def test_not_a_run(self, home):
        (home / "empty").mkdir()
        assert "is not the folder of a run" in refused("fit", "resume=empty", cwd=home)

    def test_another_architecture(self, home, run):
        folder = home / "another"
        shutil.copytree(run, folder)
        message = refused("fit", f"resume={folder}", "model.kernel_size=5", cwd=home)
        assert "kernel_size: 3" in (folder / "config.yaml").read_text()
        assert "another architecture or number of classes" in message
        assert "net.weight: (1, 1, 3, 3) in the checkpoint, (1, 1, 5, 5) in the module" in message


class TestEvaluate:
    def test_gives_the_scores_of_the_run(self, home, run):
        output = command("evaluate", f"run={run}", cwd=home).stdout
        assert rows(run / "evaluate_test" / "cases.csv") == rows(run / "cases.csv")
        assert "dice" in output

    def test_written_predictions_have_the_scores_of_the_run_to_the_last_digit(self, home, run):
        # Images of the embedded data are of 8 bits, and so survive as files.
        (home / "drawn").mkdir()
        source = instantiate(OmegaConf.load(run / "config.yaml").data.datamodule.source, "source")
        for image, _, case, *_ in source.split("test"):
            Image.fromarray((image[0] * 255).round().byte().numpy()).save(home / "drawn" / f"{case}.png")
        command("predict", f"run={run}", "input=drawn", "output=drawn-masks", cwd=home)
        told = command("evaluate", f"run={run}", "predictions=drawn-masks", "output=drawn-scores", cwd=home).stdout
        assert "4 test cases of" in told
        found, expected = rows(home / "drawn-scores" / "cases.csv"), rows(run / "cases.csv")
        # Calibration is a matter of probabilities, which masks do not have.
        assert found == [{key: value for key, value in row.items() if not key.startswith("ece")} for row in expected]
        command("predict", f"run={run}", "input=drawn", "output=drawn-sure", "probabilities=true", cwd=home)
        command("evaluate", f"run={run}", "predictions=drawn-sure", "output=drawn-sure-scores", cwd=home)
        assert rows(home / "drawn-sure-scores" / "cases.csv") == expected
        test = [row for row in rows(run / "reliability.csv") if row["split"] == "test"]
        assert rows(home / "drawn-sure-scores" / "reliability.csv") == test

    def test_again_in_another_folder(self, home, run):
        command("evaluate", f"run={run}", "split=val", "checkpoint=last", cwd=home)
        command("evaluate", f"run={run}", "split=val", "module.threshold=0.9", cwd=home)
        assert (run / "evaluate_val" / "cases.csv").read_bytes() != (run / "evaluate_val-2" / "cases.csv").read_bytes()

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
    def test_refuses(self, home, run, override, message):
        assert message in refused("evaluate", f"run={run}", override, cwd=home)

    def test_a_truncated_checkpoint(self, home, run):
        data = (run / "checkpoints" / "best.ckpt").read_bytes()
        (home / "half.ckpt").write_bytes(data[: len(data) // 2])
        assert "cannot be read as a checkpoint" in refused("evaluate", f"run={run}", "checkpoint=half.ckpt", cwd=home)


class TestPredict:
    def test_writes_masks_of_the_name_and_size_of_the_images(self, home, run):
        (home / "my pictures").mkdir()
        for name, size in (("a.png", (33, 50)), ("c d.bmp", (20, 64))):
            pixels = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
            Image.fromarray(pixels).save(home / "my pictures" / name)
        command("predict", f"run={run}", "input=my pictures", "output=masks", "module.threshold=0.01", cwd=home)
        for name, size in (("a", (50, 33)), ("c d", (64, 20))):
            with Image.open(home / "masks" / f"{name}.png") as mask:
                assert mask.size == size
                assert np.asarray(mask).all()

    def test_needs_an_output(self, home, run):
        assert "output has no value: give output=..." in refused("predict", f"run={run}", "input=.", cwd=home)


def test_help_and_config_need_nothing_heavy():
    """What makes `--help` fast: that the command's module does not import what it does not need."""
    code = "import sys, lightning_dice.fit; print([m for m in ('torch', 'lightning', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["fit", "evaluate", "predict"])
def test_help(name, home):
    assert f"lightning_dice.{name}" in command(name, "--help", cwd=home).stdout
