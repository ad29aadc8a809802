"""Folders of runs: made once, never overwritten."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from omegaconf import OmegaConf

from lightning_dice.cli import run_folder
from lightning_dice.cli.errors import UserError


def test_folders_of_the_same_second_are_numbered(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: run_folder.new_folder(tmp_path / "runs", "net", dated=False), range(20)))
    assert len(set(folders)) == 20
    assert {folder.name for folder in folders} == {"net", *(f"net-{number}" for number in range(2, 21))}


def test_dated_folders_sort_by_time(tmp_path):
    folder = run_folder.new_folder(tmp_path, "net")
    assert folder.is_dir()
    assert folder.name.endswith("_net")
    assert folder.name[:2] == "20"


def test_an_exact_folder_must_be_new(tmp_path):
    folder = run_folder.exact_folder(tmp_path / "a" / "b")
    with pytest.raises(UserError, match=r"exists, and nothing is overwritten: choose a new folder$"):
        run_folder.exact_folder(folder)


def test_configs_are_saved_as_they_are_and_resolved(tmp_path):
    run_folder.save_config(tmp_path, OmegaConf.create({"a": 1, "b": "${a}", "folder": "x"}))
    assert run_folder.load_config(tmp_path).b == 1
    config = run_folder.reopen(tmp_path, ["a=2"])
    assert config.b == 2
    assert config.folder == str(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [run_folder.CONFIG, run_folder.TEMPLATE]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data": {"root": "???"}}, r"data.root has no value: give data.root="),
        ({"a": "${nowhere}"}, "nowhere"),
    ],
)
def test_configs_with_gaps_are_refused(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        run_folder.save_config(tmp_path, OmegaConf.create(config))
    assert not list(tmp_path.iterdir())


def test_weights_that_a_checkpoint_replaces_are_not_fetched():
    net = {
        "_target_": "segmentation_models_pytorch.Unet",
        "encoder_name": "resnet18",
        "encoder_weights": "no such weights",
    }
    config = OmegaConf.create({"module": {"_target_": "lightning_dice.SegmentationModule", "net": net}})
    assert run_folder.build_module(config, trained=True).net.encoder
    with pytest.raises(UserError, match="no such weights"):
        run_folder.build_module(config)
