"""`dice-calibrate`, and a training by windows, as a user runs them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import LEAN, SMALL, run_command
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torchmetrics import MeanMetric

from lightning_dice import DiceLoss, DiceScore, SegmentationModule
from lightning_dice.calibrate import (
    calibrate,
    calibration_error,
    collect,
    find_calibration,
    make_calibrator,
    score_table,
)
from lightning_dice.cli import run_folder
from lightning_dice.cli.config import CONF_DIR, register_resolvers
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.experiment import Experiment
from lightning_dice.data import Batch, DataError
from lightning_dice.evaluate import evaluate
from lightning_dice.functional import AbsentPolicy
from lightning_dice.inference import CALIBRATION, PostProcessing
from lightning_dice.inference.calibrator import Calibrator, Scores
from lightning_dice.scoring import reliability


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
    sliding = ["inference=sliding", "inference.size=[16,16]", "inference.mirror_axes=[1]"]
    callbacks = "callbacks=[progress_bar,history,checkpoint,case_table,interrupt]"
    # Few epochs leave a network that is far from calibrated.
    few = ["optimizer.lr=0.1", "trainer.max_epochs=2", "folder=run"]
    run_command("fit", *SMALL, *LEAN, callbacks, *sliding, *few, cwd=home)
    return home / "run"


@pytest.fixture(scope="module")
def printed(home, run):
    """What the command prints."""
    return run_command("calibrate", f"run={run}", "device=cpu", cwd=home).out


def content(path):
    return json.loads(path.read_text())


def test_a_training_by_windows_keeps_them(run):
    module = SegmentationModule.from_run(run, calibration="none")
    assert module.inference.window.size == (16, 16)
    assert module.inference.mirroring.axes == (1,)


def test_writes_what_it_found_and_from_what(run, printed):
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
        assert text in printed
    assert "no thresholds for a softmax" not in printed


@pytest.mark.usefixtures("printed")
def test_the_scores_are_those_of_an_evaluation(run):
    register_resolvers()
    scores = content(run / CALIBRATION)["scores"]
    config = run_folder.reopen(run)
    config.update(logger={}, callbacks={})
    session = Experiment(config, run, trained=True)
    for calibration, when in (("none", "before"), ("auto", "after")):
        module = SegmentationModule.from_run(run, calibration=calibration)
        (logged,) = session.trainer.validate(module, session.data, verbose=False)
        assert logged["val/dice"] == pytest.approx(scores[when]["dice"], rel=1e-6)


@pytest.mark.usefixtures("printed")
def test_the_command_evaluate_decides_by_it(home, run, monkeypatch):
    monkeypatch.setattr("lightning_dice.plotting.report_plots.figure_url", lambda figure: "data:,")
    register_resolvers()
    scores = content(run / CALIBRATION)["scores"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        given = [f"run={run}", "device=cpu", "split=val"]
        for choice, when in (("none", "before"), ("auto", "after")):
            chosen = [f"calibration={choice}", f"output={home / choice}"]
            evaluate(compose("evaluate", overrides=[*given, *chosen]), [])
            (line, *_) = content(home / choice / "summary.json")["scores"]
            assert line["mean"] == pytest.approx(scores[when]["dice"], rel=1e-5)
        # A mistake is reported before anything is written.
        with pytest.raises(UserError, match="has another architecture"):
            evaluate(compose("evaluate", overrides=[*given, f"output={home / 'none-made'}"]), ["model.kernel_size=5"])
    assert not (home / "none-made").exists()


@pytest.mark.usefixtures("printed")
def test_a_module_of_the_run_decides_by_it(run):
    module = SegmentationModule.from_run(run)
    decision = PostProcessing.load(run / CALIBRATION)
    assert module.inference.postprocessing == decision
    image = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        probs = (module.eval_logits(image) / decision.temperature).sigmoid()
        assert torch.equal(module.predict_step(image), probs > decision.thresholds[0])


@pytest.mark.usefixtures("printed")
def test_nothing_is_overwritten(home, run):
    before = (run / CALIBRATION).read_bytes()
    with pytest.raises(UserError, match=r"calibration\.json exists.*overwrite=true"):
        calibrated(run)
    assert (run / CALIBRATION).read_bytes() == before
    other = home / "other.json"
    calibrated(run, output=other, thresholds="false", pixels=50)
    assert content(other)["postprocessing"]["thresholds"] is None
    assert content(other)["pixels"] == 4 * 50
    drawn = content(other)["postprocessing"]["temperature"]
    calibrated(run, output=other, overwrite="true", seed=1, pixels=50, checkpoint="last")
    assert content(other)["postprocessing"]["thresholds"] is not None
    assert content(other)["postprocessing"]["temperature"] != drawn
    assert content(other)["checkpoint"]["file"] == str(run / "checkpoints" / "last.ckpt")


def test_the_network_is_in_evaluation_mode(home, run, monkeypatch):
    modes = []

    def seen(module, *others):
        modes.append(module.training)
        return collect(module, *others)

    monkeypatch.setattr("lightning_dice.calibrate.collect", seen)
    calibrated(run, output=home / "modes.json")
    assert modes == [False]


def test_what_has_no_score_is_null(home, run, monkeypatch):
    scores = {when: {"dice": math.nan, "nll": 0.5} for when in ("before", "after")}
    monkeypatch.setattr("lightning_dice.calibrate.find_calibration", lambda *_, **__: (PostProcessing(2.0), scores))
    calibrated(run, output=home / "null.json")
    assert content(home / "null.json")["scores"]["after"] == {"dice": None, "nll": 0.5}


@pytest.mark.usefixtures("printed")
def test_another_checkpoint_is_not_decided_by_it(home, run):
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    other = home / "other.ckpt"
    torch.save({**saved, "epoch": 7}, other)
    with pytest.raises(ValueError, match="was made for another checkpoint than"):
        SegmentationModule.from_run(run, other)
    assert SegmentationModule.from_run(run, other, calibration="none").inference.postprocessing == PostProcessing()
    assert (
        SegmentationModule.from_run(run, other, calibration=run / CALIBRATION).inference.postprocessing
        != PostProcessing()
    )
    with pytest.raises(UserError, match="calibrate again"):
        run_folder.calibrate(SegmentationModule.from_run(run, calibration="none"), run, "auto", other)


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        (["data.cases={train:16,val:0,test:4}"], {}, "the data have no val split"),
        (["inference.postprocessing.thresholds=[0.4]"], {}, "go before a calibration"),
        (["inference.postprocessing.temperature=2"], {}, "go before a calibration"),
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
    found, scores = find_calibration(calibrator, ["background", "a", "b"], thresholds=True)
    assert found.thresholds is None
    assert calibrator.drawn == 2 * 64
    assert scores["after"]["nll"] < scores["before"]["nll"]
    assert scores["after"]["ece"] < scores["before"]["ece"]
    assert scores["after"]["dice"] == scores["before"]["dice"]
    assert math.isnan(scores["after"]["dice/background"])
    lines = [column._cells for column in score_table(scores, found, ["background", "a", "b"]).columns]
    assert lines[0] == ["dice", "dice/a", "dice/b", "nll", "ece", "temperature"]
    assert set(lines[3]) == {""}
    assert lines[1] == [*(f"{scores['before'][name]:.4f}" for name in lines[0][:-1]), "1"]
    assert lines[2] == [*(f"{scores['after'][name]:.4f}" for name in lines[0][:-1]), f"{found.temperature:.4g}"]
    assert found.temperature == calibrator.temperature()


def test_a_case_that_cannot_be_is_named():
    module = SegmentationModule(torch.nn.Conv2d(1, 1, 1)).eval()
    batch = Batch(torch.full((1, 1, 4, 4), math.inf), torch.zeros(1, 1, 4, 4).long(), ["case 7"])
    with pytest.raises(DataError, match="case 7: logits must be finite"), torch.no_grad():
        collect(module, [batch], "cpu", Calibrator(1, "sigmoid"))


def test_a_class_of_two_has_its_threshold_beside_its_dice():
    shown = score_table(
        {when: {"dice": 0.5, "dice/a": math.nan, "dice/b": 0.5} for when in ("before", "after")},
        PostProcessing(2.0, [0.25, 0.125]),
        ["a", "b"],
    )
    lines = [column._cells for column in shown.columns]
    assert lines[0] == ["dice", "dice/a", "dice/b", "temperature"]
    assert lines[3] == ["", "0.250", "0.125", ""]


def test_logits_are_collected_at_the_size_of_the_mask():
    module = SegmentationModule(torch.nn.Conv2d(1, 1, 1)).eval()
    calibrator = Calibrator(1, "sigmoid")
    with torch.no_grad():
        collect(module, [Batch(torch.randn(1, 1, 4, 5), torch.ones(1, 1, 8, 10).long(), ["a"])], "cpu", calibrator)
    assert calibrator.drawn == 80


def test_the_calibration_error_is_over_all_cases_and_then_over_the_classes():
    generator = torch.Generator().manual_seed(0)
    calibrator = Calibrator(2, "sigmoid", ignore_index=255)
    logits = torch.randn(2, 2, 200, generator=generator)
    target = (torch.rand(2, 2, 200, generator=generator) < torch.tensor([[0.9], [0.5]])).long()
    target[0, 0, :50] = 255
    for one, truth in zip(logits, target, strict=True):
        calibrator.add(one, truth)
    joined, truth = (part.movedim(0, 1).flatten(1) for part in (logits, target))
    errors = reliability(joined / 3, truth, activation="sigmoid", ignore_index=255).calibration_error()
    assert errors[0] > 2 * errors[1]
    assert calibration_error(calibrator, 3.0) == pytest.approx(sum(errors) / 2)


class TestSettings:
    """What the calibrator counts is what the module's score counts."""

    @staticmethod
    def made(monkeypatch, activation, metrics, pixels=100, classes=3, **settings):
        monkeypatch.setattr("lightning_dice.calibrate.MEMORY", 6 * 3 * 10 * 50)
        loss = DiceLoss(activation=activation)
        module = SegmentationModule(torch.nn.Conv2d(1, classes, 1), loss, metrics, **settings)
        config = OmegaConf.create({"pixels": pixels, "seed": 5})
        data = {"classes": list("abc"[:classes]), "exclude_classes": [0], "ignore_index": 7}
        return make_calibrator(module, config, OmegaConf.create({"data": data}), cases=10)

    def test_of_the_first_dice_score(self, monkeypatch):
        policy = AbsentPolicy("skip")
        facts = {"exclude_classes": [1], "ignore_index": 9, "smooth": 2.0, "absent": policy, "pool": "dataset"}
        found = self.made(monkeypatch, "softmax", DiceScore(3, activation="softmax", **facts))
        assert (found.classes, found.activation, found.exclude_classes, found.ignore_index) == (3, "softmax", (1,), 9)
        assert (found.smooth, found.absent, found.pool) == ((2.0, 2.0), policy, "dataset")
        # No more are drawn from ten cases than the memory holds.
        assert (found.pixels, found.generator.initial_seed()) == (50, 5)
        assert self.made(monkeypatch, "softmax", DiceScore(3, activation="softmax"), pixels=20).pixels == 20

    def test_of_the_data_where_there_is_none(self, monkeypatch):
        found = self.made(monkeypatch, "sigmoid", MeanMetric(), threshold=0.25)
        assert (found.classes, found.exclude_classes, found.ignore_index) == (3, (0,), 7)
        assert found.threshold_logit == pytest.approx(math.log(0.25 / 0.75))


def test_logits_that_say_nothing_have_no_temperature():
    calibrator = Calibrator(1, "sigmoid")
    calibrator.add(torch.zeros(1, 6), torch.tensor([[1, 0, 1, 0, 1, 1]]))
    assert calibrator.temperature() == 1


@pytest.mark.parametrize(("scale", "temperature"), [(1e-3, 0.1), (1e3, 10)])
def test_a_temperature_stays_within_reason(scale, temperature):
    calibrator = Calibrator(1, "sigmoid")
    calibrator.add(scale * torch.tensor([[2.0, -1, 1, -2, -2, 2]]), torch.tensor([[1, 0, 1, 0, 1, 1]]))
    assert calibrator.temperature() == pytest.approx(temperature, rel=1e-3)


def test_thresholds_are_probabilities_whatever_the_temperature():
    calibrator = Calibrator(1, "sigmoid")
    calibrator.add(torch.tensor([[11.9, 11.0, 2.5, 0.5]]), torch.tensor([[1, 0, 0, 0]]))
    (found,) = calibrator.thresholds(0.1)
    assert 0.5 < found < 1
    assert PostProcessing(0.1, [found]).labels(torch.tensor([[11.9, 2.0]]), activation="sigmoid").tolist() == [
        [True, False]
    ]


def test_a_class_that_no_case_has_keeps_its_threshold_whatever_is_predicted():
    logits = torch.full((2, 50), -20.0)
    logits[0, :5], logits[1, 7] = 1, -3
    target = torch.zeros(2, 50, dtype=torch.long)
    target[0, :9] = 1
    calibrator = Calibrator(2, "sigmoid")
    calibrator.add(logits, target)
    assert calibrator.thresholds(1.0)[1] == 0.5


def test_no_threshold_is_a_little_worse():
    """Of 2001 pixels a single one is at stake."""
    calibrator = Calibrator(1, "sigmoid")
    calibrator.add(torch.tensor([[1.0] * 2000 + [-0.5, -5]]), torch.tensor([[1] * 2001 + [0]]))
    assert calibrator.scores().dice[0] == pytest.approx(4000 / 4001)
    (found,) = calibrator.thresholds(1.0)
    assert found < 0.37
    assert calibrator.scores(1.0, [found]).dice == [1]


def test_both_classes_of_a_softmax_have_the_dice_of_the_metric():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 90, generator=generator), torch.randint(2, (90,), generator=generator)
    calibrator = Calibrator(2, "softmax")
    calibrator.add(logits, target)
    score = DiceScore(2, activation="softmax", average="none")
    score.update(logits[None], target[None])
    assert calibrator.scores().dice == pytest.approx(score.compute().tolist())


def test_the_mean_dice_is_over_the_classes_that_have_one():
    assert Scores([0.5, math.nan, 0.75], 1.0).mean_dice == 0.625
    assert math.isnan(Scores([math.nan], 1.0).mean_dice)


def test_large_cases_are_counted_part_by_part(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(1, 100, generator=generator), torch.randint(2, (1, 100), generator=generator)
    found = []
    for chunk in (2**21, 7):
        monkeypatch.setattr("lightning_dice.inference.calibrator._CHUNK", chunk)
        calibrator = Calibrator(1, "sigmoid")
        calibrator.add(logits, target)
        found.append((calibrator.thresholds(1.0), calibrator.scores()))
    assert found[0] == found[1]
