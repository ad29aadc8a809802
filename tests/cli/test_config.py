"""Every YAML of the catalogue composes, and what it describes can be made."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

from lightning_dice import SegmentationModule
from lightning_dice.cli.command import hydra_escape
from lightning_dice.cli.config import CONF_DIR, apply_overrides, explain_typos, instantiate, register_resolvers
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.experiment import instantiate_each
from lightning_dice.data import SegmentationData

FILES = sorted(CONF_DIR.rglob("*.yaml"))
GROUPS = [path for path in FILES if path.parent != CONF_DIR]
COMMANDS = sorted(path.stem for path in FILES if path.parent == CONF_DIR)


def composed(*overrides: str, name: str = "fit"):
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def named(path: Path) -> str:
    return f"{path.parent.relative_to(CONF_DIR)}={path.stem}"


def choosing(path: Path, folder: Path) -> list[str]:
    """Overrides that choose this file, and give what it leaves open."""
    overrides = [named(path), f"folder={folder}"]
    text = path.read_text()
    if path.stem == "nnunet":
        facts = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
        (folder / "dataset.json").write_text(json.dumps(facts))
    if "root: ???" in text or "/data: folder" in text or "/data: volumes" in text or "\n  - folder\n" in text:
        overrides.append(f"data.root={folder}")
    if path.parent.name == "sampler":
        overrides.append("hydra/sweeper=search")
    # The rest of the catalogue asks for the default data's one channel; this network takes three.
    return [*overrides, "data.channels=3"] if path.stem.startswith(("torchvision", "imagenet")) else overrides


def test_the_catalogue_is_all_yaml():
    assert len(FILES) > 40
    assert not [path for path in CONF_DIR.rglob("*") if path.is_file() and path.suffix != ".yaml"]
    assert COMMANDS == ["calibrate", "compare", "evaluate", "export", "fit", "inspect", "plan", "predict"]


# What does not depend on the network is tried with a single convolution, which is made at once.
WITHOUT_NETWORK = {"augment", "device", "logger", "loss", "metrics", "normalize", "optimizer", "scheduler", "trainer"}


@pytest.mark.parametrize("path", GROUPS, ids=named)
def test_composes_and_instantiates(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")  # Nothing is sent before the first value is logged.
    others = ["device=cpu" if path.parent.name != "device" else "seed=0"]
    others += ["model=custom"] if path.parent.name in WITHOUT_NETWORK else []
    config = composed(*choosing(path, tmp_path), *others)
    OmegaConf.resolve(config)
    module = instantiate(config.module, "module")
    assert isinstance(module, SegmentationModule)
    assert isinstance(instantiate(config.data.datamodule, "data"), SegmentationData)
    callbacks = instantiate_each(config.callbacks, "callbacks")
    assert all(isinstance(callback, L.Callback) for callback in callbacks)
    assert all(isinstance(logger, L.pytorch.loggers.Logger) for logger in instantiate_each(config.logger, "logger"))
    optimizer = module.configure_optimizers()
    assert optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer
    if config.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        with pytest.raises(UserError, match="No supported gpu backend found"):
            instantiate(config.trainer, "trainer")
    else:
        assert isinstance(instantiate(config.trainer, "trainer", callbacks=callbacks), L.Trainer)


@pytest.mark.parametrize("path", [p for p in GROUPS if p.parent.name == "model"], ids=named)
def test_every_network_gives_logits_of_its_images(path, tmp_path):
    config = composed(*choosing(path, tmp_path))
    module = instantiate(config.module, "module").eval()
    image = torch.randn(1, config.data.channels, 70, 45)
    with torch.no_grad():
        assert module(image).shape == (1, 1, 70, 45)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_commands_compose(command):
    config = composed("run=somewhere", name=command)
    assert config.run == "somewhere"


def test_facts_of_the_data_reach_everything():
    config = composed(
        "data.classes=[background,a,b]", "data.activation=softmax", "data.exclude_classes=[0]", "data.ignore_index=7"
    )
    assert (config.model.classes, config.loss.activation, config.loss.ignore_index) == (3, "softmax", 7)
    dice = config.metrics.metrics.dice
    assert (dice.num_classes, dice.activation, dice.exclude_classes, dice.ignore_index) == (3, "softmax", [0], 7)
    assert config.callbacks.case_table.classes == ["background", "a", "b"]


def test_any_trainer_flag_and_device_is_an_override():
    config = composed("device=multi_gpu", "trainer.devices=4", "trainer.strategy=ddp", "trainer.num_nodes=2")
    assert (config.trainer.accelerator, config.trainer.devices, config.trainer.num_nodes) == ("gpu", 4, 2)


@pytest.mark.parametrize("base", [["data=folder"], ["experiment=camvid"], ["data=torchvision"]], ids=str)
def test_a_map_of_the_users_own_takes_the_place_of_the_configs(base):
    config = composed(*base, *hydra_escape(["data.root=x", "data.label_map={255:1}"]))
    assert dict(config.data["label_map"]) == {255: 1}


def test_a_typo_is_refused_with_what_exists():
    with pytest.raises(ConfigCompositionException, match=r"Could not override 'loss.smoth'"):
        composed("loss.smoth=1")
    with pytest.raises(MissingConfigException, match=r"(?s)unett.*unetplusplus"):
        composed("model=unett")


def test_typos_are_explained_and_nothing_else(capsys):
    explain_typos("fit", ["data=folder", "data.root=x", "loss.smoth=1", "-m"])
    told = capsys.readouterr().err
    assert "loss has _target_, activation, smooth" in told
    assert "did you mean smooth?" in told
    assert "root" not in told


def test_a_choice_that_there_is_not_is_explained(capsys):
    explain_typos("fit", ["loss=lesionwise"])
    assert "there is no loss=lesionwise; did you mean lesion_wise?" in capsys.readouterr().err


def test_what_is_added_is_no_typo(capsys):
    explain_typos("fit", ["loss=compound", "+loss.terms.bce={_target_: torch.nn.BCELoss}", "+loss@loss.terms.f=focal"])
    assert not capsys.readouterr().err


class TestInstantiate:
    def test_a_refused_setting_is_told(self):
        with pytest.raises(UserError, match=r"^loss: smooth must be a number of pixels >= 0.*-1"):
            instantiate(composed("loss.smooth=-1").loss, "loss")

    def test_a_missing_package_names_its_extra(self):
        config = {"_target_": "monai.no_such_room.Net"}
        with pytest.raises(UserError, match=r"model: .*monai"):
            instantiate(config, "model")


class TestApplyOverrides:
    @staticmethod
    def config():
        return OmegaConf.create({"trainer": {"max_epochs": 3}, "model": {"_target_": "x"}, "label_map": {}})

    def test_values_change(self):
        config = self.config()
        apply_overrides(config, ["trainer.max_epochs=20", "label_map={255:1}", "+trainer.devices=2"])
        assert config.trainer.devices == 2
        assert config.trainer.max_epochs == 20
        assert dict(config["label_map"]) == {255: 1}

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("trainer.max_epoch=20", "trainer has no max_epoch, only max_epochs"),
            ("trainr.max_epochs=20", "trainr"),
            ("seed=1", "the config has no seed, only trainer, model, label_map"),
            ("model=fpn", "only values of this run's config can be changed"),
            ("+trainr.devices=2", "trainr has no devices"),
            ("~model", "only values"),
            ("trainer.max_epochs=1,2", "only values"),
            ("trainer.max_epochs=[", "trainer.max_epochs="),
        ],
    )
    def test_the_rest_is_refused(self, override, message):
        with pytest.raises(UserError, match=message):
            apply_overrides(self.config(), [override])
