"""Without an optional package, what needs it says so and how to install it, and all else works."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import tifffile
import torch
from helpers import LEAN, SMALL, refused, run_command
from PIL import Image

import lightning_dice
from lightning_dice import models
from lightning_dice.cli.config import CONF_DIR, instantiate, register_resolvers
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.required_extras import check_extras
from lightning_dice.data import FolderSource, MaskFormat, MonaiAugment, VolumeSource
from lightning_dice.data.images.image_reader import read_image
from lightning_dice.data.label_map import LabelMap
from lightning_dice.exporting import FORMATS
from lightning_dice.extras import EXTRAS, MissingExtra, require
from lightning_dice.functional import TubedSkeleton
from lightning_dice.losses import SkeletonRecallLoss

PACKAGE = Path(lightning_dice.__file__).parent
OPTIONAL = sorted({name for names in EXTRAS.values() for name in names})
CHOICES = [
    (group, path.stem)
    for group in ("augment", "data", "logger", "loss", "model")
    for path in sorted((CONF_DIR / group).glob("*.yaml"))
]
VOLUME_DATA = [("data", "nnunet"), ("data", "volumes")]
VOLUMES = r"pip install 'lightning-dice\[volumes\]'"
TIFF = "needs tifffile and imagecodecs: pip install 'lightning-dice[tiff]'"


def hide(monkeypatch, *names):
    """Make these modules, and what is below them, as if they were not installed."""
    for module in {*names, *sys.modules}:
        if module.split(".")[0] in names:
            monkeypatch.setitem(sys.modules, module, None)


@pytest.fixture
def core(monkeypatch):
    """An environment without any optional package."""
    hide(monkeypatch, *OPTIONAL)


def compose(*overrides):
    register_resolvers()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose("fit", [f"folder={CONF_DIR}", *overrides])


def folder_of_tiffs(path):
    for part in ("images", "masks"):
        (path / part).mkdir(parents=True)
        for name in "abcdef":
            tifffile.imwrite(path / part / f"{name}.tif", np.eye(16, dtype=np.uint8))
    return path


class TestTheTable:
    def test_extras_install_the_packages(self):
        # pyproject.toml, read without a parser: Python 3.10 has none.
        text = (PACKAGE.parent / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
        text = text.split("[project.scripts]")[0]
        distributions = {
            "skimage": "scikit-image",
            "hydra_plugins.hydra_joblib_launcher": "hydra-joblib-launcher",
            "hydra_plugins.hydra_submitit_launcher": "hydra-submitit-launcher",
        }
        for extra, modules in EXTRAS.items():
            listed = text.split(f"\n{extra} = [")[1].split("\n]" if f"\n{extra} = [\n" in text else "]")[0]
            for module in modules:
                assert f'"{distributions.get(module, module)}' in listed, (extra, module)

    def test_imports_of_optional_packages_wait_until_they_are_used(self):
        """A module at whose top one is imported must itself be imported late, behind a check."""
        found = set()
        for path in PACKAGE.rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if {name.split(".")[0] for name in names} & set(OPTIONAL):
                    found.add(path.relative_to(PACKAGE).as_posix())
        assert found == {"models/dynunet.py"}

    @pytest.mark.slow
    @pytest.mark.parametrize(("group", "choice"), CHOICES, ids=["=".join(choice) for choice in CHOICES])
    def test_the_check_of_a_config_is_right(self, group, choice, core, tmp_path):
        """It refuses the configs whose objects cannot be made, and no others."""
        config = compose(*(["data.root=/nowhere"] if (group, choice) in VOLUME_DATA else []), f"{group}={choice}")
        needs = None
        try:
            check_extras(config, leave_out=tuple({str(name) for name in config} - {group}))
        except UserError as error:
            needs = str(error)
        if group == "data":
            made = VolumeSource if (group, choice) in VOLUME_DATA else FolderSource
            arguments = (tmp_path, LabelMap.of_ids(["a", "b"]), 1) if made is VolumeSource else None
            arguments = arguments or (tmp_path, MaskFormat(["a", "b"]))
            build = lambda: made(*arguments)  # noqa: E731
        elif group == "logger":
            # Lightning asks the list of installed packages, from which none can be hidden.
            assert (needs is None) == (choice in ("csv", "none"))
            return
        else:
            build = lambda: instantiate(config[group], group)  # noqa: E731
        if needs is None:
            build()
        else:
            assert "pip install 'lightning-dice[" in needs
            with pytest.raises((UserError, ImportError)):
                build()


class TestConstructors:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: SkeletonRecallLoss(), r"SkeletonRecallLoss needs skimage, .* 'lightning-dice\[skeletons\]'"),
            (lambda: TubedSkeleton(), r"TubedSkeleton needs skimage, .* 'lightning-dice\[skeletons\]'"),
            (lambda: MonaiAugment([]), f"MonaiAugment needs monai, .* {VOLUMES}"),
            (lambda: models.DynUNet, f"DynUNet needs monai, .* {VOLUMES}"),
            (
                lambda: VolumeSource("/data", LabelMap.of_ids(["a", "b"]), 1),
                f"VolumeSource needs nibabel, which is not installed: {VOLUMES}",
            ),
            (
                lambda: FORMATS["onnx"]().require(),
                r"format=onnx needs onnx, onnxscript and onnxruntime: pip install 'lightning-dice\[export\]'",
            ),
        ],
        ids=["skeletons", "skeleton", "augment", "dynunet", "volumes", "onnx"],
    )
    def test_say_what_is_missing(self, make, message, core):
        with pytest.raises(MissingExtra, match=message):
            make()

    def test_an_installed_package_is_not_missing(self):
        require(*OPTIONAL, needed_by="this test")


class TestImages:
    def test_a_tiff_of_any_name(self, core, tmp_path):
        path = tmp_path / "a.png"
        Image.new("L", (3, 2)).save(path, format="TIFF")
        with pytest.raises(MissingExtra, match=r"a\.png needs tifffile and imagecodecs: .*\[tiff\]"):
            read_image(path)

    def test_a_png_of_deep_colour(self, tmp_path, monkeypatch):
        import imagecodecs

        (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(np.zeros((2, 3, 3), np.uint16)))
        hide(monkeypatch, "imagecodecs")
        with pytest.raises(MissingExtra, match=r"a\.png, a PNG of 16-bit colour, needs imagecodecs, .*\[tiff\]"):
            read_image(tmp_path / "a.png")

    @pytest.mark.parametrize(("dtype", "ending"), [("uint8", "png"), ("uint16", "png"), ("uint8", "bmp")])
    def test_others_need_nothing(self, dtype, ending, core, tmp_path):
        stored = np.arange(12).reshape(3, 4).astype(dtype) * (257 if dtype == "uint16" else 1)
        Image.fromarray(stored).save(tmp_path / f"a.{ending}")
        assert np.array_equal(read_image(tmp_path / f"a.{ending}").pixels[..., 0], stored)

    def test_a_source_refuses_a_folder_before_it_reads(self, tmp_path, monkeypatch):
        folder_of_tiffs(tmp_path)
        hide(monkeypatch, *OPTIONAL)
        monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"read {path}"))
        with pytest.raises(MissingExtra, match=r"[a-f]\.tif needs tifffile and imagecodecs"):
            FolderSource(tmp_path, MaskFormat(["a", "b"])).check()


class TestCommands:
    @pytest.mark.parametrize(
        ("choice", "needs", "extra"),
        [
            ("data=nnunet", "data=nnunet needs nibabel", "volumes"),
            ("data=volumes", "data=volumes needs nibabel", "volumes"),
            ("model=dynunet", "model=dynunet needs monai", "volumes"),
            ("model=swinunetr", "model=swinunetr needs einops and monai", "volumes"),
            ("loss=skeleton_recall", "loss=skeleton_recall needs skimage", "skeletons"),
            ("logger=[csv,tensorboard]", "needs tensorboard", "tensorboard"),
            ("logger=tensorboard", "logger=tensorboard needs tensorboard", "tensorboard"),
            ("logger=wandb", "logger=wandb needs wandb", "loggers"),
            ("logger=mlflow", "logger=mlflow needs mlflow", "loggers"),
        ],
    )
    def test_fit(self, choice, needs, extra, core, tmp_path):
        message = refused("fit", "device=cpu", choice, cwd=tmp_path)
        assert needs in message
        assert f"pip install 'lightning-dice[{extra}]'\n" in message
        assert not list(tmp_path.iterdir())

    def test_all_that_is_missing_is_named_at_once(self, core, tmp_path):
        message = refused("fit", "data=nnunet", "logger=tensorboard", cwd=tmp_path)
        for needs in ("data=nnunet needs nibabel", "augment=volume needs monai", "logger=tensorboard needs"):
            assert needs in message
        assert message.endswith(": pip install 'lightning-dice[tensorboard,volumes]'\n")

    @pytest.mark.parametrize("command", ["fit", "inspect", "plan"])
    def test_volumes(self, command, core, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data/dataset.json").write_text(json.dumps({"labels": {}}))
        message = refused(command, "data=nnunet", "data.root=data", cwd=tmp_path)
        assert "needs nibabel" in message
        assert "'lightning-dice[volumes]'" in message
        assert [path.name for path in tmp_path.iterdir()] == ["data"]

    @pytest.mark.parametrize("command", ["fit", "inspect"])
    def test_tiffs_in_a_folder(self, command, tmp_path, monkeypatch):
        folder_of_tiffs(tmp_path / "data")
        hide(monkeypatch, *OPTIONAL)
        data = ["data=folder", "data.root=data", "data.classes=[a]", "runs=runs"]
        small = ["model=custom", "device=cpu"] if command == "fit" else []
        assert TIFF in refused(command, *data, *small, cwd=tmp_path)
        assert not list((tmp_path / "runs").glob("*"))

    def test_predict(self, trained_run, tmp_path, monkeypatch):
        folder_of_tiffs(tmp_path / "data")
        (tmp_path / "pngs").mkdir()
        Image.new("L", (32, 32)).save(tmp_path / "pngs/a.png")
        hide(monkeypatch, *OPTIONAL)
        common = [f"run={trained_run}", "device=cpu", "output=out"]
        assert TIFF in refused("predict", *common, "input=data/images", cwd=tmp_path)
        for setting in ("format=tiff", "probabilities=true"):
            assert f"{setting} {TIFF}" in refused("predict", *common, "input=pngs", setting, cwd=tmp_path)
        assert not (tmp_path / "out").exists()
        run_command("predict", *common, "input=pngs", cwd=tmp_path)
        assert (tmp_path / "out/a.png").is_file()

    def test_export(self, trained_run, tmp_path, core):
        message = refused("export", f"run={trained_run}", "output=out", cwd=tmp_path)
        assert "format=onnx needs onnx" in message
        assert "pip install 'lightning-dice[export]'\n" in message
        assert not list(tmp_path.iterdir())
        run_command("export", f"run={trained_run}", "output=out", "format=safetensors", cwd=tmp_path)

    @pytest.mark.parametrize("command", ["evaluate", "calibrate", "predict", "export"])
    def test_a_run_whose_network_needs_one(self, command, trained_run, tmp_path, core):
        run = shutil.copytree(trained_run, tmp_path / "run")
        for name in ("config.yaml", "config_unresolved.yaml"):
            text = (run / name).read_text()
            assert "torch.nn.Conv2d" in text
            (run / name).write_text(text.replace("torch.nn.Conv2d", "monai.networks.nets.UNet"))
        before = sorted(run.rglob("*"))
        settings = {
            "evaluate": ["device=cpu"],
            "calibrate": ["device=cpu", "overwrite=true"],
            "predict": ["device=cpu", "input=.", "output=out"],
            "export": ["format=safetensors", "output=out"],
        }[command]
        message = refused(command, "run=run", *settings, cwd=tmp_path)
        assert "model needs monai, which is not installed: pip install 'lightning-dice[volumes]'" in message
        assert sorted(run.rglob("*")) == before
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_training_and_scoring_need_none(core, tmp_path):
    """All that a run writes by default, and the windows and surfaces that MONAI was used for."""
    settings = ["trainer.max_epochs=1", "folder=run", "inference=sliding", "inference.size=[32,32]"]
    run_command("fit", *SMALL, *settings, cwd=tmp_path)
    assert "surface_dice" in (tmp_path / "run/cases.csv").read_text().splitlines()[0]
    assert (tmp_path / "run/logs/csv").is_dir()
    run_command("evaluate", "run=run", "split=val", "device=cpu", cwd=tmp_path)
    run_command("calibrate", "run=run", "device=cpu", cwd=tmp_path)


def test_a_sweep_is_refused_for_what_all_trials_lack(core, tmp_path):
    message = refused("fit", "-m", *SMALL[1:], *LEAN, "model=dynunet", "loss.smooth=1,2", "folder=sweep", cwd=tmp_path)
    assert "model=dynunet needs monai" in message
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_records_what_a_trial_lacks(core, tmp_path):
    refused("fit", "-m", *SMALL[1:], *LEAN, "model=dynunet,custom", "folder=sweep", cwd=tmp_path, status=1)
    assert "model=dynunet needs monai" in (tmp_path / "sweep/0/error.txt").read_text()
    assert (tmp_path / "sweep/1/checkpoints/best.ckpt").is_file()


def test_values_of_a_loss_do_not_depend_on_it(core):
    loss = lightning_dice.DiceLoss(activation="softmax")
    assert torch.isfinite(loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)))
