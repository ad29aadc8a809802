"""A trained module from the values in its checkpoint."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import hydra
import pytest
import torch
from helpers import rows
from omegaconf import OmegaConf
from torch import nn

from lightning_dice import SegmentationModule
from lightning_dice.cli.config import CONF_DIR, register_resolvers
from lightning_dice.data import Standardize
from lightning_dice.inference.input_normalization import InputNormalization
from lightning_dice.loading import build, locate, without_pretrained


@pytest.fixture
def run(trained_run):
    return trained_run


class TestFromRun:
    def test_is_the_trained_one(self, run):
        module = SegmentationModule.from_run(run)
        saved = torch.load(run / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
        for name, value in module.state_dict().items():
            assert torch.equal(value, saved[name])
        assert not module.training
        assert module.class_names == ["object"]
        assert module.predict_step(torch.zeros(1, 1, 32, 32)).shape == (1, 1, 32, 32)

    def test_scores_what_the_run_scored(self, run):
        from lightning_dice.cli.run_folder import load_config

        config = load_config(run)
        data = hydra.utils.instantiate(config.data.datamodule)
        data.setup("test")
        module = SegmentationModule.from_run(run)
        with torch.no_grad():
            for batch in data.test_dataloader():
                module.test_metrics.update(module(batch.image), batch.mask)
        scores = [float(row["dice"]) for row in rows(run / "cases.csv") if row["dice"]]
        assert float(module.test_metrics.compute()["test/dice"]) == pytest.approx(sum(scores) / len(scores), abs=1e-5)

    def test_segments_images_as_they_are_read(self, run):
        module = SegmentationModule.from_run(run)
        stored = torch.randint(0, 256, (3, 1, 32, 40), dtype=torch.uint8)
        expected = module.predict_step(torch.stack([Standardize()(image.float() / 255) for image in stored]))
        assert 0 < expected.float().mean() < 1
        for images in (stored, stored.float() / 255, stored.int().mul(257).to(torch.uint16)):
            assert torch.equal(module.segment(images), expected)
        assert not torch.equal(module.predict_step(stored.float() / 255), expected)
        with pytest.raises(ValueError, match=r"floats, uint8 or uint16, got \(3, 1, 32, 40\) of torch.int32"):
            module.segment(stored.int())
        module.input_normalization = replace(module.input_normalization, max_value=100.0)
        assert torch.equal(module.segment(stored), module.segment(stored.float() / 100))
        module.input_normalization = InputNormalization(unavailable=["CT"])
        with pytest.raises(
            ValueError, match=r"normalized by \['CT'\], which the module cannot compute: use the predict command"
        ):
            module.segment(stored)

    @pytest.mark.process
    def test_needs_no_hydra(self, run):
        code = (
            "import sys; from lightning_dice import SegmentationModule\n"
            f"SegmentationModule.from_run({str(run)!r})\n"
            "print([name for name in sys.modules if name.startswith('hydra')])"
        )
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert told.stdout.strip() == "[]"

    def test_by_the_file(self, run):
        assert SegmentationModule.from_run(run, "checkpoints/last.ckpt")
        assert SegmentationModule.from_run(run, str(run / "checkpoints/last.ckpt"))

    def test_goes_on_training(self, run):
        module = SegmentationModule.from_run(run).train()
        optimizer = module.configure_optimizers()
        assert isinstance(optimizer, torch.optim.AdamW)

    def test_a_checkpoint_that_is_not_there(self, run):
        with pytest.raises(FileNotFoundError, match=r"fist\.ckpt does not exist; .* holds best\.ckpt, last\.ckpt"):
            SegmentationModule.from_run(run, "fist.ckpt")

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"folder must be a run's folder, got .*nope"):
            SegmentationModule.from_run(tmp_path / "nope")

    def test_a_checkpoint_of_something_else(self, tmp_path):
        torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match="not a checkpoint that fit has written"):
            SegmentationModule.from_run(tmp_path, "other.ckpt")

    def test_of_another_class(self, run):
        class Mine(SegmentationModule):
            pass

        with pytest.raises(ValueError, match="holds a SegmentationModule, not a Mine"):
            Mine.from_run(run)

    def test_runs_no_code_of_a_checkpoint(self, run, tmp_path):
        class Trap:
            def __reduce__(self):
                return print, ("trapped",)

        torch.save({"state_dict": {}, "config": Trap()}, tmp_path / "trap.ckpt")
        with pytest.raises(Exception, match=r"[Ww]eights.?only"):
            SegmentationModule.from_run(tmp_path, "trap.ckpt")


def composed(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in ("loss", "metrics", "model") for name in composed(group)]
)
def test_builds_what_hydra_builds(group, name):
    register_resolvers()
    softmax = ["data.activation=softmax", "data.classes=[background,one,two]"] if group == "loss" else []
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = hydra.compose("fit", overrides=[f"{group}={name}", "folder=x", *softmax])
    node = config[group]
    try:
        expected = hydra.utils.instantiate(node)
    except hydra.errors.InstantiationException as error:
        pytest.skip(str(error).splitlines()[0])
    built = build(OmegaConf.to_container(node, resolve=True))
    assert type(built) is type(expected)
    assert repr(built) == repr(expected)
    if isinstance(built, nn.Module):
        mine, theirs = built.state_dict(), expected.state_dict()
        assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in theirs.items()}


def test_directives():
    assert build({"_target_": "builtins.dict", "a": {"_target_": "builtins.int", "_args_": ["3"]}}) == {"a": 3}
    assert build([{"_target_": "str"}, 1, None]) == ["", 1, None]
    raw = {"_target_": "dict", "_recursive_": False, "inner": {"_target_": "int"}}
    assert build(raw) == {"inner": {"_target_": "int"}}
    made = build({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5, "_convert_": "all"})
    assert isinstance(made, partial)
    assert made.keywords == {"lr": 0.5}
    assert build({"_target_": "fractions.Fraction.from_float", "_args_": [0.5]}).denominator == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package.Net", "there is no module no_such_package"),
        ("torch.nn.Conv7d", "torch.nn has no Conv7d"),
        ("lightning_dice.losses.dice.Dise", "lightning_dice.losses.dice has no Dise"),
    ],
)
def test_a_target_that_is_not_there(name, message):
    with pytest.raises(ImportError, match=message):
        locate(name)


def test_what_a_targets_module_lacks_is_told(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import a_missing_library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_missing_library"):
        locate("needy.Net")


def test_pretrained_weights_are_not_fetched():
    config = {
        "net": {"_target_": "torchvision.models.x", "weights": "DEFAULT", "weights_backbone": "DEFAULT"},
        "own": {"_target_": "mine.Net", "weights": "even", "pretrained": True, "layers": [{"encoder_weights": "a"}]},
    }
    assert without_pretrained(config) == {
        "net": {"_target_": "torchvision.models.x", "weights": None, "weights_backbone": None},
        "own": {"_target_": "mine.Net", "weights": "even", "pretrained": False, "layers": [{"encoder_weights": None}]},
    }


def test_every_pretrained_setting_of_the_catalogue_is_known():
    """A new model's file whose weights are fetched under another name must be added to `objects`."""
    named = {
        key
        for path in Path(CONF_DIR / "model").glob("*.yaml")
        for key in OmegaConf.load(path)
        if "weights" in str(key) or "pretrained" in str(key)
    }
    assert named <= {"encoder_weights", "weights", "weights_backbone", "pretrained"}
