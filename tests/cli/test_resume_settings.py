"""Every setting, changed on `resume=`: the objects in memory have the new value, or the command refuses it by name."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import SMALL, as_a_process, refused, rows, run_command
from omegaconf import OmegaConf
from torch import nn

from lightning_dice import SegmentationModule
from lightning_dice.cli import run_folder
from lightning_dice.cli.adapt_checkpoint import check_changes
from lightning_dice.cli.config import CONF_DIR
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.experiment import Experiment
from lightning_dice.cli.setting_rules import BATCHES, BEST, RESUME, UNUSED, rule_of, table
from lightning_dice.loading import build_module

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
    "module.auxiliary_weight": 0.2,
    "module.micro_batch_size": 4,
    "module.interval": "step",
    "module.monitor": "val/loss",
    "module.lr_scaling": "linear",
    "trainer.max_epochs": 5,
    "trainer.min_epochs": 3,
    "trainer.max_steps": 9,
    "trainer.min_steps": 7,
    "trainer.max_time": "00:01:00:00",
    "trainer.gradient_clip_algorithm": "value",
    "trainer.val_check_interval": 0.5,
    "trainer.limit_train_batches": 2,
    "trainer.limit_val_batches": 3,
    "trainer.limit_test_batches": 0.5,
    "trainer.overfit_batches": 2,
    "trainer.profiler": "simple",
    "trainer.detect_anomaly": True,
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
    "callbacks.checkpoint.save_top_k": 2,
    "callbacks.checkpoint.save_weights_only": True,
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
    "callbacks.early_stopping.check_finite": True,
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
    "trainer.fast_dev_run": True,
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
    with as_a_process(folder):
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
        if path.endswith("_hooks"):
            return  # by running numbers
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


# They concern what follows the training, need several processes or another device, are refused by the data or by a
# plateau, or measure times.
NOT_IN_MEMORY = {
    *("test", "data.exclude_classes", "trainer.num_nodes", "trainer.devices", "trainer.strategy"),
    *("trainer.accelerator", "trainer.profiler", "module.interval"),
}
WALKED = {key: value for key, value in APPLIED.items() if key not in NOT_IN_MEMORY}
MONITORS = ("callbacks.early_stopping.monitor", "callbacks.early_stopping.mode", "module.monitor", "scheduler.mode")
LONGER = "trainer.max_epochs=4"  # Otherwise all is trained.
# What a training counts and measures.
STATE = (
    *("_time", "_started", "_start", "_printed", "_checked", ".scheduler.best", "._best", "_version", "_path"),
    *(".kth_value", "log_dir", "profiler.dirpath", "RunningStage.TRAINING"),  # numbered, and the start
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
    # The first does not go with overlap=minimum, the second validates before the training, the third sets other limits,
    # and with another monitor no state is loaded that could win.
    apart = ("loss.squared", "trainer.num_sanity_val_steps", "trainer.overfit_batches", *MONITORS)
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
    others = {"*.encoder_weights"}  # of other networks; see TestWeights
    for rule in RESUME:
        assert any(rule_of(key) is rule for key in (*APPLIED, *REFUSED)) or rule.settings[0] in others, rule


def saved(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


class TestCounters:
    """What a training has counted stays where its settings change."""

    def test_of_early_stopping(self, copied):
        path = copied / "checkpoints" / "last.ckpt"
        content = saved(copied)
        (key,) = (key for key in content["callbacks"] if key.startswith("EarlyStopping"))
        content["callbacks"][key]["wait_count"] = 19
        torch.save(content, path)
        made = experiment(copied, [LONGER, "callbacks.early_stopping.patience=40"], path)
        (stopping,) = (one for one in made.trainer.callbacks if type(one).__name__ == "EarlyStopping")
        assert (stopping.patience, stopping.wait_count) == (40, 19)

    @pytest.mark.parametrize(
        ("change", "counters"),
        [("scheduler.factor=0.25", (2, 0.5)), ("scheduler.mode=min", (0, float("inf")))],
        ids=["factor", "mode"],
    )
    def test_of_a_plateau(self, copied, change, counters):
        path = copied / "checkpoints" / "last.ckpt"
        content = saved(copied)
        content["lr_schedulers"][0] |= {"num_bad_epochs": 2, "best": 0.5, "_last_lr": [1e-4]}
        content["optimizer_states"][0]["param_groups"][0]["lr"] = 1e-4
        content["epoch_ends"] = False
        torch.save(content, path)
        made = experiment(copied, [LONGER, change], path)
        scheduler = made.trainer.lr_scheduler_configs[0].scheduler
        assert (scheduler.num_bad_epochs, scheduler.best) == counters
        # Lowered by the old settings, and not set again.
        assert made.trainer.optimizers[0].param_groups[0]["lr"] == scheduler.get_last_lr()[0] == 1e-4

    def test_of_the_best_checkpoint(self, copied):
        made = experiment(copied, [LONGER, "callbacks.checkpoint.filename=good"], copied / "checkpoints" / "last.ckpt")
        before = [state for state in saved(copied)["callbacks"].values() if state.get("best_model_score") is not None]
        assert float(made.checkpoint.best_model_score) == float(before[0]["best_model_score"])


class TestOptimizer:
    @pytest.mark.parametrize(
        ("overrides", "reason"),
        [
            (
                ["optimizer._target_=torch.optim.RMSprop"],
                "RMSprop starts with an empty state: the checkpoint is of AdamW",
            ),
            (["+optimizer.amsgrad=true"], "AdamW starts with an empty state: the checkpoint has no max_exp_avg_sq"),
        ],
        ids=["class", "amsgrad"],
    )
    def test_one_that_needs_another_state_starts_with_none_and_says_so(self, copied, overrides, reason):
        output = run_command("fit", f"resume={copied}", "trainer.max_epochs=3", *overrides, cwd=copied.parent).out
        assert reason in output
        assert [row["epoch"] for row in rows(copied / "metrics.csv")] == ["0", "1", "2"]

    def test_otherwise_it_keeps_its_state(self, run):
        path = run / "checkpoints" / "last.ckpt"
        made = experiment(run, [LONGER, "optimizer.weight_decay=0.5"], path)
        state = made.trainer.optimizers[0].state_dict()
        assert state["param_groups"][0]["weight_decay"] == 0.5
        for index, values in saved(run)["optimizer_states"][0]["state"].items():
            for name, value in values.items():
                assert torch.equal(value, state["state"][index][name])

    def test_a_schedule_in_place_of_a_plateau(self, run):
        """It continues as if it had been there from the start."""
        cosine = "scheduler={_target_: torch.optim.lr_scheduler.CosineAnnealingLR, _partial_: true, T_max: 4}"
        made = experiment(run, [LONGER, cosine], run / "checkpoints" / "last.ckpt")
        assert made.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5)

    def test_a_schedule_that_is_over_is_refused_by_name(self, copied):
        before = contents(copied)
        short = "scheduler={_target_: torch.optim.lr_scheduler.OneCycleLR, _partial_: true, max_lr: 1, total_steps: 2}"
        message = refused("fit", f"resume={copied}", LONGER, short, "module.interval=step", cwd=copied.parent)
        assert "scheduler: OneCycleLR has fewer steps than are trained" in message
        assert contents(copied) == before


class TestWeights:
    def test_averages_can_begin(self, tmp_path):
        run_command("fit", *SMALL, "test=false", "trainer.max_epochs=1", "folder=plain", cwd=tmp_path)
        path = tmp_path / "plain" / "checkpoints" / "last.ckpt"
        ema = "+callbacks.ema={_target_: lightning_dice.callbacks.WeightEMA, decay: 0.75}"
        made = experiment(tmp_path / "plain", [LONGER, ema], path)
        assert torch.equal(made.module.net.weight, saved(tmp_path / "plain")["state_dict"]["net.weight"])
        run_command("fit", f"resume={tmp_path / 'plain'}", "trainer.max_epochs=2", ema, cwd=tmp_path)
        assert "current_model_state" in saved(tmp_path / "plain")

    def test_averages_can_end(self, run):
        """A checkpoint holds both; the optimizer's moments belong to the weights that it steps."""
        made = experiment(run, [LONGER, "callbacks.ema=null"], run / "checkpoints" / "last.ckpt")
        content = saved(run)
        assert torch.equal(made.module.net.weight, content["current_model_state"]["net.weight"])
        assert not torch.equal(made.module.net.weight, content["state_dict"]["net.weight"])

    def test_initial_weights_are_refused(self):
        old = {"folder": "x", "model": {"encoder_weights": None}, "trainer": {"max_epochs": 3}}
        new = {"folder": "x", "model": {"encoder_weights": "imagenet"}, "trainer": {"max_epochs": 3}}
        loops = {"fit_loop": {"epoch_progress": {"current": {"processed": 1}}}}
        with pytest.raises(UserError, match=r"model.encoder_weights was None and cannot become imagenet"):
            check_changes({"config": old, "loops": loops}, new)

    def test_the_setting_that_does_not_fit_is_named(self, copied):
        message = refused("fit", f"resume={copied}", "model.kernel_size=5", cwd=copied.parent)
        assert "model.kernel_size was 3 and is now 5" in message


class WithState(nn.Module):
    """A loss with a setting and a state in its buffers."""

    def __init__(self, weight: list[float] | None = None) -> None:
        super().__init__()
        self.register_buffer("pos_weight", None if weight is None else torch.tensor(weight))
        self.register_buffer("mean", torch.zeros(()))
        self.activation = "sigmoid"

    def forward(self, logits, target):
        return nn.functional.binary_cross_entropy_with_logits(logits, target.float(), pos_weight=self.pos_weight)


class TestBuffersOfLosses:
    """They are settings, unless training has changed them."""

    @staticmethod
    def config(weight: list[float] | None) -> dict[str, Any]:
        net = {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 1, "kernel_size": 1}
        loss = {"_target_": f"{__name__}.WithState", "weight": weight}
        return {"folder": "x", "module": {"_target_": "lightning_dice.SegmentationModule", "net": net, "loss": loss}}

    @pytest.mark.parametrize("old", [None, [2.0]], ids=["none", "two"])
    @pytest.mark.parametrize("new", [None, [5.0]], ids=["none", "five"])
    def test_settings_win_and_state_stays(self, tmp_path, old, new):
        before, after = (build_module(self.config(weight)["module"]) for weight in (old, new))
        before.loss.mean.fill_(7)
        torch.save({"state_dict": before.state_dict(), "config": self.config(old)}, tmp_path / "x.ckpt")
        content = run_folder.check_weights(after, tmp_path / "x.ckpt", self.config(new))
        # As Lightning loads it: the file once more.
        for state in (content["state_dict"], torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]):
            after.load_state_dict(state)
            assert (after.loss.pos_weight is None) == (new is None)
            assert new is None or after.loss.pos_weight.tolist() == new
            assert after.loss.mean == 7
            assert torch.equal(after.net.weight, before.net.weight)

    @pytest.mark.parametrize("weights", [None, [5.0]], ids=["none", "five"])
    def test_a_checkpoint_of_version_02_that_holds_class_weights(self, copied, weights):
        for path in copied.glob("checkpoints/*.ckpt"):
            checkpoint = torch.load(path, weights_only=True)
            for name in ("state_dict", "current_model_state"):
                checkpoint[name]["loss.class_weights"] = torch.tensor([2.0])
            checkpoint["config"]["module"]["loss"]["class_weights"] = [2.0]
            torch.save(checkpoint, path)
        module = SegmentationModule.from_run(copied)
        module.load_state_dict({**checkpoint["state_dict"], "loss.class_weights": torch.tensor([9.0])}, strict=True)
        assert module.loss.class_weights.tolist() == [2.0]
        run_command("evaluate", f"run={copied}", cwd=copied.parent)
        change = [override("loss.class_weights", weights), "trainer.max_epochs=3"]
        run_command("fit", f"resume={copied}", *change, cwd=copied.parent)
        assert "loss.class_weights" not in saved(copied)["state_dict"]
        assert run_folder.load_config(copied).loss.class_weights == weights
        resumed = experiment(copied, ["trainer.max_epochs=4"], copied / "checkpoints" / "last.ckpt").module.loss
        assert (None if resumed.class_weights is None else resumed.class_weights.tolist()) == weights


class TestEpochs:
    def test_fewer_than_are_trained(self, copied):
        before = contents(copied)
        message = refused("fit", f"resume={copied}", "trainer.max_epochs=1", cwd=copied.parent)
        assert "trainer.max_epochs=1, but 2 epochs are trained already" in message
        assert contents(copied) == before

    def test_a_run_that_has_nothing_to_train_keeps_the_new_settings(self, copied):
        run_command("fit", f"resume={copied}", "module.threshold=0.25", cwd=copied.parent)
        assert run_folder.load_config(copied).module.threshold == 0.25

    @pytest.mark.parametrize("key", BATCHES)
    def test_between_optimizer_steps_batches_cannot_change(self, key):
        def config(value):
            config = OmegaConf.create({"folder": "x", "trainer": {"max_epochs": 3}})
            OmegaConf.update(config, key, value, force_add=True)
            return OmegaConf.to_container(config)

        loops = {"fit_loop": {"epoch_progress": {"current": {"processed": 1}}}}
        checkpoint = {"config": config(1), "loops": loops, "ranks": [None, {"logged": {}}]}
        check_changes(checkpoint, config(2))
        checkpoint["ranks"] = [None, {"gradients": {}}]
        with pytest.raises(UserError, match=f"{key} was 1 and cannot become 2 .* between two optimizer steps"):
            check_changes(checkpoint, config(2))


class TestWithoutEffect:
    """Settings that a command would ignore are refused."""

    @pytest.mark.parametrize(
        "override", ["hydra.sweeper.n_trials=3", "retry_failed=true", "-m", "--cfg", "device=cpu", "loss=tversky"]
    )
    def test_of_a_single_run(self, copied, override):
        before = contents(copied)
        assert override.partition("=")[0] in refused("fit", f"resume={copied}", override, cwd=copied.parent)
        assert contents(copied) == before

    @pytest.mark.parametrize(
        ("command", "override"),
        [
            ("evaluate", "optimizer.lr=1"),
            ("evaluate", "callbacks.early_stopping.patience=3"),
            ("evaluate", "trainer.max_epochs=3"),
            ("calibrate", "loss.smooth=3"),
            ("predict", "metrics.metrics.dice.pool=dataset"),
            ("export", "trainer.precision=16-mixed"),
        ],
    )
    def test_of_a_trained_run(self, copied, command, override):
        own = {"predict": ["input=images", "output=masks"]}.get(command, [])
        message = refused(command, f"run={copied}", *own, override, cwd=copied.parent)
        assert f"{override.partition('=')[0]} is a setting of" in message
        assert f"which {command} does not use" in message

    def test_every_setting_of_an_evaluation_is_one_of_the_run(self, run):
        for command, patterns in UNUSED.items():
            used = [key for key in APPLIED if not any(fnmatchcase(key, pattern) for pattern in patterns)]
            assert "module.threshold" in used, command
            assert "inference.size" in used, command
