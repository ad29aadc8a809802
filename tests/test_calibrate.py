"""`dice-calibrate`, and a training by windows, as a user runs them."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir

from lightning_dice import SegmentationModule, runs
from lightning_dice.calibrate import calibrate, collect, decide, table
from lightning_dice.configs import CONF_DIR, UserError, register_resolvers
from lightning_dice.data import Batch, DataError
from lightning_dice.inference import CALIBRATION, Decision
from lightning_dice.inference.calibration import Calibrator
from lightning_dice.session import Session

# Small enough for seconds; few epochs leave a network that is far from calibrated.
SMALL = ["model=custom", "data.size=[32,32]", "data.cases={train:16,val:4,test:4}", "data.num_workers=0", "device=cpu"]


def command(name, *arguments, cwd, status=0):
    line = [sys.executable, "-m", f"lightning_dice.{name}", *map(str, arguments)]
    result = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == status, f"{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    return result


def calibrated(run, *overrides, **settings):
    """The command, called in this process."""
    register_resolvers()
    given = [f"{name}={value}" for name, value in settings.items()]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("calibrate", overrides=[f"run={run}", "device=cpu", *given])
    return calibrate(config, list(overrides))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def run(home):
    """A run that evaluates by windows and flips, which was never calibrated."""
    sliding = ["inference=sliding", "inference.size=[16,16]", "inference.flips=[1]"]
    command("fit", *SMALL, *sliding, "optimizer.lr=0.1", "trainer.max_epochs=2", "folder=run", cwd=home)
    return home / "run"


@pytest.fixture(scope="module")
def told(home, run):
    """What the command prints."""
    return command("calibrate", f"run={run}", "device=cpu", cwd=home).stdout


def content(path):
    return json.loads(path.read_text())


def test_a_training_by_windows_keeps_them(run):
    module = SegmentationModule.from_run(run, calibration="none")
    assert module.inference.window.size == (16, 16)
    assert module.inference.flips.axes == (1,)
    assert (run / "cases.csv").is_file()


def test_writes_what_it_found_and_from_what(run, told):
    found = content(run / CALIBRATION)
    checkpoint = run / "checkpoints" / "best.ckpt"
    assert found["checkpoint"]["file"] == str(checkpoint)
    assert found["checkpoint"]["epoch"] == torch.load(checkpoint, weights_only=True)["epoch"]
    assert (found["split"], found["cases"], found["pixels"]) == ("val", 4, 4 * 32 * 32)
    before, after = found["scores"]["before"], found["scores"]["after"]
    assert set(before) == set(after) == {"dice", "dice/object", "nll", "ece"}
    assert after["nll"] < before["nll"]
    assert after["dice"] > before["dice"]
    for text in (f"{before['dice']:.4f}", f"{after['nll']:.4f}", "temperature", str(run / CALIBRATION)):
        assert text in told


@pytest.mark.usefixtures("told")
def test_the_scores_are_those_of_an_evaluation(run):
    register_resolvers()
    scores = content(run / CALIBRATION)["scores"]
    config = runs.reopen(run)
    config.update(logger={}, callbacks={})
    session = Session(config, run, trained=True)
    for calibration, when in (("none", "before"), ("auto", "after")):
        module = SegmentationModule.from_run(run, calibration=calibration)
        (logged,) = session.trainer.validate(module, session.data, verbose=False)
        assert logged["val/dice"] == pytest.approx(scores[when]["dice"], rel=1e-6)


@pytest.mark.usefixtures("told")
def test_a_module_of_the_run_decides_by_it(run):
    module = SegmentationModule.from_run(run)
    decision = Decision.load(run / CALIBRATION)
    assert module.inference.decision == decision
    image = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        probs = (module.evaluated(image) / decision.temperature).sigmoid()
        assert torch.equal(module.predict_step(image), probs > decision.thresholds[0])


@pytest.mark.usefixtures("told")
def test_nothing_is_overwritten(home, run):
    before = (run / CALIBRATION).read_bytes()
    with pytest.raises(UserError, match=r"calibration\.json exists.*overwrite=true"):
        calibrated(run)
    assert (run / CALIBRATION).read_bytes() == before
    other = home / "other.json"
    calibrated(run, output=other, thresholds="false", pixels=50)
    assert content(other)["decision"]["thresholds"] is None
    assert content(other)["pixels"] == 4 * 50
    calibrated(run, output=other, overwrite="true", seed=1, pixels=50)
    assert content(other)["decision"]["thresholds"] is not None


@pytest.mark.usefixtures("told")
def test_another_checkpoint_is_not_decided_by_it(home, run):
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    other = home / "other.ckpt"
    torch.save({**saved, "epoch": 7}, other)
    with pytest.raises(ValueError, match="was made for another checkpoint than"):
        SegmentationModule.from_run(run, other)
    assert SegmentationModule.from_run(run, other, calibration="none").inference.decision == Decision()
    assert SegmentationModule.from_run(run, other, calibration=run / CALIBRATION).inference.decision != Decision()
    with pytest.raises(UserError, match="calibrate again"):
        runs.calibrate(SegmentationModule.from_run(run, calibration="none"), run, "auto", other)


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        (["data.cases={train:16,val:0,test:4}"], {}, "the data have no val split"),
        (["inference.decision.thresholds=[0.4]"], {}, "go before a calibration"),
        ([], {"checkpoint": "beste"}, "checkpoint must be best, last or the path of a file"),
        ([], {"pixels": 0}, "pixels must be an integer >= 1"),
        ([], {"output": "no/such/folder/file.json"}, "output must be a file in a folder that exists"),
        (["inference.sise=[4,4]"], {}, "inference has no sise"),
    ],
)
def test_refuses(home, run, overrides, settings, message):
    with pytest.raises(UserError, match=message):
        calibrated(run, *overrides, **{"output": home / "refused.json", **settings})
    assert not (home / "refused.json").exists()


def test_a_softmax_of_more_classes_has_a_temperature_alone():
    torch.manual_seed(0)
    module = SegmentationModule(torch.nn.Conv2d(1, 3, 1), activation="softmax").eval()
    image, mask = torch.randn(3, 1, 8, 8) * 9, torch.randint(3, (3, 8, 8))
    mask[0] = 255  # No pixel of this case counts.
    batches = [Batch(image[:2], mask[:2], ["a", "b"]), Batch(image[2:], mask[2:], ["c"])]
    calibrator = Calibrator(3, "softmax", exclude_classes=(0,), ignore_index=255)
    with torch.no_grad():
        collect(module, batches, "cpu", calibrator)
    found, scores = decide(calibrator, ["background", "a", "b"], thresholds=True)
    assert found.thresholds is None
    assert calibrator.drawn == 2 * 64
    assert scores["after"]["nll"] < scores["before"]["nll"]
    assert scores["after"]["ece"] < scores["before"]["ece"]
    assert scores["after"]["dice"] == scores["before"]["dice"]
    assert math.isnan(scores["after"]["dice/background"])
    lines = [column._cells for column in table(scores, found, ["background", "a", "b"]).columns]
    assert lines[0] == ["dice", "dice/a", "dice/b", "nll", "ece", "temperature"]
    assert set(lines[3]) == {""}


def test_a_case_that_cannot_be_is_named():
    module = SegmentationModule(torch.nn.Conv2d(1, 1, 1)).eval()
    batch = Batch(torch.full((1, 1, 4, 4), math.inf), torch.zeros(1, 1, 4, 4).long(), ["case 7"])
    with pytest.raises(DataError, match="case 7: logits must be finite"), torch.no_grad():
        collect(module, [batch], "cpu", Calibrator(1, "sigmoid"))
