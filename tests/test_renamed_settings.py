"""Old names of settings, and runs that version 0.1 wrote, are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import refused
from omegaconf import OmegaConf
from safetensors.torch import save_file

from lightning_dice import SegmentationModule
from lightning_dice.cli.command import refuse_renamed
from lightning_dice.cli.config import CONF_DIR, apply_overrides
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.run_folder import reopen
from lightning_dice.renamed_settings import RENAMED, RENAMED_IN_COMMANDS, new_name, refuse_old_config

OLD = {
    "data": {"size": [32, 32], "classes": ["object"]},
    "module": {"_target_": "lightning_dice.SegmentationModule", "net": {}, "divisor": 32},
}


@pytest.mark.parametrize("new", sorted({*RENAMED.values(), *RENAMED_IN_COMMANDS["export"].values()}))
def test_the_new_name_exists(new):
    leaf = new.split()[0].rpartition(".")[2]
    assert any(f"{leaf}:" in path.read_text() for path in CONF_DIR.rglob("*.yaml"))


def test_no_config_has_an_old_name():
    for path in CONF_DIR.rglob("*.yaml"):
        config = OmegaConf.to_container(OmegaConf.load(path))
        # `@package _global_`, as in experiments, or a file of its group.
        for whole in (config, {path.parent.name: config}):
            refuse_old_config(whole, path)
            data = whole.get("data")
            assert not isinstance(data, dict) or not {f"data.{key}" for key in data} & set(RENAMED), path
        command = RENAMED_IN_COMMANDS.get(path.stem, {}) if path.parent == CONF_DIR else {}
        assert not set(command) & set(config)


@pytest.mark.parametrize(
    ("command", "argument", "new"),
    [
        ("fit", "data.size=[64,64]", "data.patch_size"),
        ("fit", "data.values={255:1}", "data.label_map"),
        ("predict", "inference.decision.smallest=20", "inference.postprocessing.min_size"),
        ("predict", "follow_links=true", "follow_symlinks"),
        ("export", "graph=labels", "output_type"),
        ("compare", "resamples=100", "n_resamples"),
        ("inspect", "data.foreground=0.3", "data.oversample_foreground"),
    ],
)
def test_a_command_names_the_new_one(command, argument, new, tmp_path):
    told = refused(command, argument, cwd=tmp_path)
    old = argument.partition("=")[0]
    assert told.strip().startswith(f"error: {old} has been renamed: give {new}")
    assert not list(tmp_path.iterdir())


def test_data_of_ones_own_may_have_such_names(tmp_path):
    mine = OmegaConf.create({"data": {"size": [32, 32]}, "module": {"size_divisor": 1}})
    refuse_old_config(OmegaConf.to_container(mine), tmp_path)
    refuse_renamed(["run=a", "data.size=[64,64]"])
    refuse_renamed(["--config-dir", "mine", "data.size=[64,64]"])
    apply_overrides(mine, ["data.size=[64,64]"])
    assert mine.data.size == [64, 64]
    with pytest.raises(UserError, match=r"data\.values has been renamed: give data\.label_map"):
        apply_overrides(mine, ["data.values={255:1}"])
    with pytest.raises(UserError, match=r"data\.size has been renamed"):
        refuse_renamed(["data.size=[64,64]"])


def test_below_a_renamed_group():
    assert new_name("inference.decision.background") == "inference.postprocessing.background"
    assert new_name("data.sizes") is None


class TestOldRuns:
    def test_the_folder_is_refused(self, tmp_path):
        for name in ("config.yaml", "config_unresolved.yaml"):
            (tmp_path / name).write_text(OmegaConf.to_yaml(OmegaConf.create(OLD)))
        with pytest.raises(ValueError, match=r"written by lightning-dice 0\.1.*train it again, or use"):
            reopen(tmp_path)

    def test_its_checkpoint_too(self, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        torch.save({"state_dict": {}, "config": {"module": OLD["module"]}}, tmp_path / "checkpoints" / "best.ckpt")
        with pytest.raises(ValueError, match=r"best\.ckpt was written by lightning-dice 0\.1, where module\.size_div"):
            SegmentationModule.from_run(tmp_path)

    def test_and_its_safetensors(self, tmp_path):
        metadata = {"lightning_dice": json.dumps({"module": OLD["module"]})}
        save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors", metadata)
        with pytest.raises(ValueError, match=r"model\.safetensors was written by lightning-dice 0\.1"):
            SegmentationModule.from_safetensors(tmp_path / "model.safetensors")
