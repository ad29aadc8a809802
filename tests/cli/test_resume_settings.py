"""Every setting, changed on `resume=`: the objects in memory have the new value, or the command refuses it by name."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import SMALL, refused, run_command
from omegaconf import OmegaConf

from lightning_dice.cli import run_folder
from lightning_dice.cli.config import CONF_DIR
from lightning_dice.cli.experiment import Experiment
from lightning_dice.cli.setting_rules import BEST, RESUME, rule_of, table

# A run with as many settings as one can have.
RUN = [
    *SMALL,
    "data.patch_size=[16,16]",
    "callbacks=[early_stopping,ema,frequent_checkpoint,learning_rate,median_pruner]",
    "scheduler=plateau",
    "trainer.max_epochs=2",
    "test=false",
]
# Setting -> another value.
APPLIED = {
    "model.padding": 2,
    "loss.smooth": 2.5,
    "loss.pool": "image",
    "loss.squared": True,
    "loss.overlap": "minimum",
    "loss.class_weights": [3.0],
    "loss.absent": "skip",
    "metrics.metrics.dice.pool": "dataset",
    "metrics.metrics.dice.average": "macro",
    "metrics.compute_groups": True,
    "augment.transforms": "[{_target_: torchvision.transforms.v2.RandomHorizontalFlip, p: 0.125}]",
    "inference.size": [16, 16],
    "inference.overlap": 0.25,
    "inference.importance_map": "constant",
    "inference.batch_size": 3,
    "inference.mirror_axes": [0],
    "inference.postprocessing.temperature": 2.0,
    "inference.postprocessing.thresholds": [0.25],
    "inference.postprocessing.min_size": 3,
    "inference.postprocessing.unit": "mm",
    "inference.postprocessing.keep_largest": [0],
    "inference.postprocessing.background": None,
    "data.exclude_classes": [5],
    "data.ignore_index": 254,
    "data.patch_size": [32, 32],
    "data.cases": "{train: 24, val: 5, test: 3}",
    "data.foreground_fraction": 0.04,
    "data.contrast": 0.3,
    "data.noise": 0.06,
    "data.batch_size": 4,
    "data.num_workers": 1,
    "optimizer.lr": 0.0625,
    "optimizer.weight_decay": 0.125,
    "scheduler.mode": "min",
    "scheduler.factor": 0.25,
    "scheduler.patience": 9,
    "module.threshold": 0.375,
    "module.size_divisor": 2,
    "module.channels_last": False,
    "module.micro_batch_size": 4,
    "module.interval": "step",
    "module.monitor": "val/loss",
    "module.lr_scaling": "linear",
    "trainer.max_epochs": 5,
    "trainer.log_every_n_steps": 3,
    "trainer.gradient_clip_val": 0.5,
    "trainer.accumulate_grad_batches": 2,
    "trainer.check_val_every_n_epoch": 2,
    "trainer.num_sanity_val_steps": 1,
    "trainer.deterministic": True,
    "trainer.num_nodes": 2,
    "trainer.plugins": "[{_target_: lightning_dice.checkpoints.SafeCheckpointIO, patience: 7}]",
    "trainer.accelerator": "auto",
    "trainer.devices": 2,
    "trainer.strategy": "ddp",
    "trainer.precision": "bf16-mixed",
    "callbacks.gradient_guard.action": "skip",
    "callbacks.gradient_guard.max_skips": 7,
    "callbacks.gradient_guard.max_files": 1,
    "callbacks.collapse_guard.patience": 8,
    "callbacks.collapse_guard.action": "stop",
    "callbacks.checkpoint.filename": "good",
    "callbacks.checkpoint.enable_version_counter": True,
    "callbacks.last_checkpoint.filename": "latest",
    "callbacks.last_checkpoint.enable_version_counter": True,
    "callbacks.last_checkpoint.save_on_train_epoch_end": False,
    "callbacks.frequent_checkpoint.filename": "often",
    "callbacks.frequent_checkpoint.enable_version_counter": True,
    "callbacks.frequent_checkpoint.every_n_train_steps": 50,
    "callbacks.case_table.surfaces": False,
    "callbacks.case_table.tolerance": 3.0,
    "callbacks.case_table.lesions": False,
    "callbacks.case_table.lesion_iou": 0.125,
    "callbacks.overlays.count": 3,
    "callbacks.overlays.typical": 4,
    "callbacks.overlays.best": 5,
    "callbacks.early_stopping.monitor": "val/loss",
    "callbacks.early_stopping.mode": "min",
    "callbacks.early_stopping.patience": 40,
    "callbacks.ema.decay": 0.5,
    "callbacks.ema.warmup": False,
    "callbacks.ema.update_every_n_steps": 2,
    "callbacks.learning_rate.logging_interval": "step",
    "callbacks.median_pruner.monitor": "val/loss",
    "callbacks.median_pruner.mode": "min",
    "callbacks.median_pruner.startup_trials": 6,
    "callbacks.median_pruner.warmup_epochs": 7,
    "logger.csv.name": "table",
    "seed": 5,
    "test": False,
}
REFUSED = {
    "model.kernel_size": 5,  # The weights do not fit.
    "folder": "elsewhere",
    "runs": "elsewhere",
    "name": "other",
    "retry_failed": True,
    "data.classes": ["thing"],
    "data.activation": "softmax",
    "data.channels": 3,
    "data.seed": 1,
    "callbacks.checkpoint.monitor": "val/loss",
    "callbacks.checkpoint.mode": "min",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run of two epochs, which no test may change."""
    home = tmp_path_factory.mktemp("resumed")
    run_command("fit", *RUN, "folder=run", cwd=home)
    return home / "run"


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def keys(config: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The settings that a user can change: neither classes nor what follows from another setting."""
    for name, value in config.items():
        key = f"{path}.{name}" if path else str(name)
        if isinstance(value, dict) and value and key != "data.cases":
            yield from keys(value, key)
        elif not str(name).startswith("_") and not (isinstance(value, str) and value.startswith("${")):
            yield key


class Loaded(Exception):
    keep_checkpoint = True


class Stop(L.Callback):
    """End a training before its first step."""

    def on_train_start(self, trainer, pl_module):
        raise Loaded


def experiment(folder: Path, overrides: list[str], checkpoint: Path | None) -> Experiment:
    """What a training with these overrides has in memory before its first step."""
    config = run_folder.resolve(run_folder.reopen(folder, overrides))
    made = Experiment(config, folder, trained=checkpoint is not None)
    made.trainer.callbacks.append(Stop())
    if checkpoint is not None:
        run_folder.check_weights(made.module, checkpoint, config)
    with pytest.raises(Loaded):
        made.trainer.fit(made.module, made.data, ckpt_path=checkpoint, weights_only=checkpoint is not None)
    return made


def settings(made: Experiment) -> dict[str, Any]:
    """All plain values in the objects of a training, by their paths; weights and their statistics are left out."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def walk(value: Any, path: str) -> None:
        if value is None or isinstance(value, (bool, int, float, str, Path)):
            found[path] = value
        elif isinstance(value, torch.Tensor):
            if not value.requires_grad and value.numel() < 100:
                found[path] = value.tolist()
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Mapping):
                for name, entry in value.items():
                    walk(entry, f"{path}.{name}")
            elif isinstance(value, (list, tuple, set, frozenset)):
                found[f"{path}.length"] = len(value)
                for index, entry in enumerate(value):
                    walk(entry, f"{path}.{index}")
            elif hasattr(value, "__dict__"):
                found[f"{path}.class"] = type(value).__name__
                walk(vars(value), path)

    trainer = made.trainer
    walk(made.module.loss, "loss")
    walk(made.module, "module")
    walk(trainer.optimizers, "optimizer")
    walk(trainer.lr_scheduler_configs, "scheduler")
    for index, callback in enumerate(trainer.callbacks):
        walk(callback, f"callbacks.{index}.{type(callback).__name__}")
    walk(made.data, "data")
    walk(trainer.loggers, "logger")
    walk(trainer, "trainer")
    return found


def override(key: str, value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    return f"{key}={text}"


# They concern what follows the training, need several processes or another device, or a value that the data refuse.
NOT_IN_MEMORY = {
    *("test", "data.exclude_classes", "trainer.num_nodes", "trainer.devices", "trainer.strategy"),
    "trainer.accelerator",
}
WALKED = {key: value for key, value in APPLIED.items() if key not in NOT_IN_MEMORY}
LONGER = "trainer.max_epochs=4"  # Otherwise all is trained.
# What a training counts and measures.
STATE = (
    *("_time", "_started", "_start", "_printed", "_checked", ".scheduler.best", "._best", "_version", "_path"),
    *("log_dir", "profiler.dirpath"),  # numbered
)


@pytest.fixture(scope="module")
def unchanged(run) -> dict[str, Any]:
    return settings(experiment(run, [LONGER], None))


def not_applied(run: Path, old: dict[str, Any], overrides: list[str]) -> tuple[set[str], dict[str, Any]]:
    """Which values these overrides change, and which of them a resumed training does not have."""
    new = settings(experiment(run, [LONGER, *overrides], None))
    resumed = settings(experiment(run, [LONGER, *overrides], run / "checkpoints" / "last.ckpt"))
    differ = {path for path in new if new[path] != old.get(path) and not path.endswith(STATE)}
    wrong = {path: (new[path], resumed.get(path)) for path in differ if resumed.get(path) != new[path]}
    return differ, wrong


def test_all_settings_at_once(run, unchanged):
    # The former does not go with overlap=minimum; the latter validates before the training.
    apart = ("loss.squared", "trainer.num_sanity_val_steps")
    together = [override(key, value) for key, value in WALKED.items() if key not in apart]
    differ, wrong = not_applied(run, unchanged, together)
    assert wrong == {}
    assert len(differ) > len(WALKED)


@pytest.mark.slow
@pytest.mark.parametrize("key", WALKED)
def test_each_setting(run, unchanged, key):
    differ, wrong = not_applied(run, unchanged, [override(key, WALKED[key])])
    assert wrong == {}
    assert differ, f"no object has {key}"


def test_refused_settings_leave_the_folder_as_it_was(copied):
    before = contents(copied)
    for key, value in REFUSED.items():
        message = refused("fit", f"resume={copied}", override(key, value), cwd=copied.parent)
        assert key in message
        assert contents(copied) == before, key


def test_the_list_has_every_setting_of_the_run(run):
    template: Any = OmegaConf.to_container(run_folder.load_config(run, run_folder.TEMPLATE), resolve=False)
    assert set(keys(template)) == {"resume", *APPLIED, *REFUSED}, "say in APPLIED or REFUSED what resume= does with it"


def test_the_list_says_what_the_rules_say():
    conditional = {*BEST, "model.kernel_size"}
    for key in {*APPLIED, *REFUSED} - conditional:
        rule = rule_of(key)
        assert rule is not None, key
        assert rule.refused == (key in REFUSED), key


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=str(path.relative_to(CONF_DIR))) for path in sorted(CONF_DIR.rglob("*/*.yaml"))]
)
def test_every_file_of_settings_has_rules(path):
    config: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    group = str(path.parent.relative_to(CONF_DIR)).replace("/", ".")
    package = path.read_text().splitlines()[0].removeprefix("# @package ")
    prefix = {"_global_": "", "trainer": "trainer"}.get(package, group)
    for key in keys({name: value for name, value in config.items() if name != "defaults"}, prefix):
        assert rule_of(key) is not None, f"{key} has no rule in setting_rules.py"


def test_the_documentation_has_the_rules():
    page = (CONF_DIR.parent / "docs" / "how-to" / "resuming.md").read_text(encoding="utf-8")
    assert table() in page, "replace the table in docs/how-to/resuming.md by setting_rules.table()"


def test_each_rule_is_about_a_setting_that_is_tried():
    others = {
        # Of other data, networks and commands than those of the run here.
        "*.encoder_weights": "test_initial_weights",
        "scheduler.*": "",
    }
    for rule in RESUME:
        assert any(rule_of(key) is rule for key in (*APPLIED, *REFUSED)) or rule.settings[0] in others, rule
