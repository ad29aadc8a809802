"""Each internal of Lightning, torch, torchmetrics and Hydra that the package uses still does what is relied on."""

from __future__ import annotations

import ast
import copy
import inspect
import logging
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.wrappers import MinMaxMetric, Running

import lightning_dice
from lightning_dice.library_internals import LIBRARIES, MissingInternalError, internal, set_internal
from lightning_dice.library_internals import hydra as of_hydra
from lightning_dice.library_internals import lightning as of_lightning
from lightning_dice.library_internals import torch as of_torch
from lightning_dice.library_internals import torchmetrics as of_torchmetrics

PACKAGE = Path(lightning_dice.__file__).parent
FIT_LOOP = "lightning.pytorch.loops.fit_loop._FitLoop"
EPOCH_LOOP = "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop"


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.metric = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).mean()
        self.metric.update(float(batch_idx))
        self.log("mean", float(batch_idx), on_step=False, on_epoch=True, batch_size=1)
        self.log("sum", float(batch_idx), on_step=False, on_epoch=True, reduce_fx="sum", batch_size=1)
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Look(pl.Callback):
    """Calls a function at the end of each training batch, and keeps what it returns."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(self.look(trainer, pl_module))


@pytest.fixture
def fit(tmp_path, caplog):
    """Train for two epochs of four batches, with a look at the trainer after each batch."""
    caplog.set_level(logging.ERROR, "lightning.pytorch")

    def fit(look, *callbacks, **settings):
        looks, module = Look(look), Module()
        settings = {"max_epochs": 2, **settings}
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, callbacks=[looks, *callbacks], **settings,
        )  # fmt: skip
        data = torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=2)
        trainer.fit(module, data, data)
        return looks.seen, trainer, module

    return fit


class TestLightning:
    def test_attached_trainer(self, fit):
        assert of_lightning.attached_trainer(Module()) is None
        _, trainer, module = fit(lambda *_: None)
        assert of_lightning.attached_trainer(module) is trainer

    def test_is_accumulating(self, fit):
        seen, _, _ = fit(lambda trainer, _: of_lightning.is_accumulating(trainer), accumulate_grad_batches=3)
        assert seen == [True, True, False, False] * 2  # The last batch of an epoch always steps.

    def test_epoch_and_batch_progress(self, fit):
        def look(trainer, _):
            epoch, batch = of_lightning.epoch_progress(trainer), of_lightning.batch_progress(trainer)
            return epoch.ready, epoch.processed, batch.ready, batch.processed

        seen, trainer, _ = fit(look)
        assert seen == [(epoch + 1, epoch, batch, batch) for epoch in range(2) for batch in range(1, 5)]
        assert of_lightning.epoch_progress(trainer).processed == 2

    def test_is_last_batch(self, fit):
        assert fit(lambda trainer, _: of_lightning.is_last_batch(trainer))[0] == [False, False, False, True] * 2

    def test_validation_is_due(self, fit):
        def look(trainer, _):
            return of_lightning.is_fetching(trainer), of_lightning.validation_is_due(trainer)

        seen, trainer, _ = fit(look, val_check_interval=0.5)
        assert seen == [(True, False), (True, True)] * 4
        assert not of_lightning.is_fetching(trainer)
        assert [due for _, due in fit(look, limit_val_batches=0)[0]] == [False] * 8

    def test_mark_as_fresh(self, fit):
        _, trainer, _ = fit(lambda *_: None, max_steps=8)
        loop = trainer.fit_loop
        loop.restarting = True
        assert loop.epoch_loop.val_loop.restarting
        loop.restarting = False
        assert loop.restarting, "the fit loop's setter now obeys with max_steps, and mark_as_fresh is not needed"
        of_lightning.mark_as_fresh(trainer)
        assert not any(each.restarting for each in (loop, loop.epoch_loop, loop.epoch_loop.val_loop))

    def test_mark_epoch_as_fresh(self, fit):
        _, trainer, _ = fit(lambda *_: None, max_steps=8)
        trainer.fit_loop.restarting = True
        of_lightning.mark_epoch_as_fresh(trainer)
        assert not trainer.fit_loop.restarting
        assert trainer.fit_loop.epoch_loop.restarting
        # Schedulers that follow a metric read the mark at the end of an epoch.
        assert "update_plateau_schedulers=not self.restarting" in inspect.getsource(type(trainer.fit_loop))

    def test_callback_metrics(self, fit):
        _, trainer, _ = fit(lambda *_: None)
        metrics = of_lightning.callback_metrics(trainer)
        assert float(metrics["mean"]) == 1.5
        metrics["other"] = torch.tensor(1.0)
        assert float(trainer.callback_metrics["other"]) == 1

    def test_dump_checkpoint(self, fit):
        _, trainer, module = fit(lambda *_: None)
        checkpoint = of_lightning.dump_checkpoint(trainer)
        assert {"epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "loops"} <= set(checkpoint)
        assert torch.equal(checkpoint["state_dict"]["layer.weight"], module.layer.weight)

    def test_read_optimizers(self):
        optimizers, schedulers = of_lightning.read_optimizers(Module().configure_optimizers())
        assert isinstance(optimizers[0], torch.optim.SGD)
        assert isinstance(schedulers[0], torch.optim.lr_scheduler.StepLR)

    def test_saved_loop_state(self, fit):
        seen, _, _ = fit(lambda trainer, _: of_lightning.dump_checkpoint(trainer))
        counts = {"ready", "started", "processed", "completed"}
        for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
            state = of_lightning.saved_loop_state(seen[0], name)
            assert counts <= set(state["total"]), name
            assert counts <= set(state["current"]), name
        batches = of_lightning.saved_loop_state(seen[-1], "epoch_loop.batch_progress")
        assert batches["is_last_batch"]
        # Callbacks save before Lightning counts the batch as completed.
        assert batches["current"] == {"ready": 4, "started": 4, "processed": 4, "completed": 3}
        before = seen[0]["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
        of_lightning.count_step_of_loggers(seen[0])
        assert seen[0]["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] == before + 1
        with pytest.raises(MissingInternalError, match=r"has no checkpoint\['loops'\]\['fit_loop'\]\['no_progress'\]"):
            of_lightning.saved_loop_state(seen[0], "no_progress")
        with pytest.raises(MissingInternalError, match="_batches_that_stepped"):
            of_lightning.count_step_of_loggers({"loops": {"fit_loop": {"epoch_loop.state_dict": {}}}})

    def test_epoch_means(self, fit):
        seen, _, _ = fit(lambda trainer, _: of_lightning.epoch_means(trainer), max_epochs=1)
        by_name = {row["settings"]["name"]: row for row in seen[2]}
        assert by_name["mean"] | {"settings": None} == {
            "settings": None, "sync": False, "rank_zero_only": False, "reduce": "mean", "value": 3.0, "count": 3,
        }  # fmt: skip
        assert (by_name["sum"]["reduce"], float(by_name["sum"]["value"])) == ("sum", 3.0)
        assert by_name["metric"]["metric"] == "metric"

    def test_restore_epoch_means(self, fit):
        rows = fit(lambda trainer, _: of_lightning.epoch_means(trainer), max_epochs=1)[0][-1]
        for row in rows:
            if "value" in row:
                row["value"] = row["value"] + 10

        class Restore(pl.Callback):
            def on_train_start(self, trainer, pl_module):
                of_lightning.restore_epoch_means(trainer, pl_module, rows)

        _, trainer, _ = fit(lambda *_: None, Restore(), max_epochs=1)
        # (6 + 10 + 6) / 8 batches: Lightning has not reset what was restored.
        assert float(trainer.callback_metrics["mean"]) == 22 / 8
        assert float(trainer.callback_metrics["sum"]) == 22

    def test_accessible_weight_averaging(self, fit):
        averaging = of_lightning.AccessibleWeightAveraging(device=None)
        averaging.set_default_device(torch.device("cpu"))
        states = []

        class Swaps(pl.Callback):
            def on_validation_batch_start(self, *_):
                states.append(averaging.swapped)

        seen, _, _ = fit(lambda *_: averaging.average_model, averaging, Swaps(), num_sanity_val_steps=0)
        assert isinstance(seen[0], torch.optim.swa_utils.AveragedModel)
        assert seen[0].n_averaged.device.type == "cpu"
        assert states == [True] * 8
        assert not averaging.swapped
        averaging.drop_average_model()
        assert averaging.average_model is None
        assert of_lightning.AccessibleWeightAveraging(device="meta")._device == torch.device("meta")


class TestTorch:
    def test_is_batch_norm(self):
        for norm in (nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.InstanceNorm2d(2), nn.SyncBatchNorm(2)):
            assert of_torch.is_batch_norm(norm)
        assert not of_torch.is_batch_norm(nn.LayerNorm(2))

    def test_original_module_and_name(self):
        layer = nn.Linear(1, 1)
        compiled = torch.compile(layer)
        assert of_torch.original_module(compiled) is layer
        assert of_torch.original_module(layer) is layer
        assert [of_torch.original_name(name) for name, _ in compiled.named_parameters()] == ["weight", "bias"]

    def test_copy_without_hooks(self):
        net = nn.Sequential(nn.Linear(1, 1))
        lock = threading.Lock()  # cannot be copied
        net[0].register_forward_hook(lambda *_, lock=lock: None)
        net[0].register_forward_pre_hook(partial(lambda *_: None, lock))
        with pytest.raises(TypeError):
            copy.deepcopy(net)
        other = of_torch.copy_without_hooks(net)
        assert torch.equal(other[0].weight, net[0].weight)
        assert other[0].weight is not net[0].weight
        assert [len(net[0]._forward_hooks), len(net[0]._forward_pre_hooks)] == [1, 1]
        assert not other[0]._forward_hooks
        assert not other[0]._forward_pre_hooks

    def test_is_compiled_in_place(self):
        layer = nn.Linear(1, 1)
        assert not of_torch.is_compiled_in_place(layer)
        layer.compile()
        assert of_torch.is_compiled_in_place(layer)

    def test_foreach(self):
        tensors, ends = [torch.zeros(2), torch.ones(1)], [torch.ones(2), torch.zeros(1)]
        of_torch.foreach_lerp_(tensors, ends, 0.25)
        assert [tensor.tolist() for tensor in tensors] == [[0.25, 0.25], [0.75]]
        of_torch.foreach_copy_(tensors, ends)
        assert [tensor.tolist() for tensor in tensors] == [[1, 1], [0]]

    def test_constant_in_graphs(self):
        def theirs(): ...

        def ours(): ...

        assert vars(of_torch.constant_in_graphs(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}

    def test_is_transforming(self):
        seen = []

        def square(x):
            seen.append((of_torch.is_transforming(), of_torch.is_vmapped(x)))
            return (x * x).sum()

        square(torch.ones(2))
        torch.func.grad(square)(torch.ones(2))
        torch.func.vmap(square)(torch.ones(2, 2))
        torch.func.vmap(torch.func.grad(square))(torch.ones(2, 2))
        with torch.autograd.forward_ad.dual_level():
            square(torch.ones(2))
        square(torch.ones(2))
        assert seen == [(False, False), (True, False), (True, True), (True, True), (True, False), (False, False)]

    def test_storage_id(self):
        one, other = torch.empty(4, device="meta"), torch.empty(4, device="meta")
        assert of_torch.storage_id(one) == of_torch.storage_id(one.view(2, 2)) != of_torch.storage_id(other)

    def test_unspecialized_sizes(self):
        import torch.fx.experimental._config as config

        before = getattr(config, "backed_size_oblivious", None)  # torch 2.6 does not have it.
        with of_torch.unspecialized_sizes():
            assert getattr(config, "backed_size_oblivious", None) == (None if before is None else True)
        assert getattr(config, "backed_size_oblivious", None) == before


class TestTorchmetrics:
    def test_state_names(self):
        assert of_torchmetrics.state_names(MeanMetric()) == ["mean_value", "weight"]

    def test_update_count(self):
        metric = MeanMetric()
        assert of_torchmetrics.update_count(metric) == 0
        metric.update(1.0)
        assert of_torchmetrics.update_count(metric) == 1

    def test_set_update_count(self):
        metric = MeanMetric()
        metric.update(1.0)
        assert metric.compute() == 1
        metric.mean_value = torch.tensor(3.0)
        assert metric.compute() == 1  # cached
        of_torchmetrics.set_update_count(metric, 5)
        assert (metric.compute(), metric.update_count) == (3, 5)

    def test_memory(self):
        extremes, last = MinMaxMetric(MeanMetric()), Running(SumMetric(), window=2)
        for value in (1.0, 3.0, 8.0):
            extremes.update(value)
            extremes.compute()
            last.update(value)
        assert last.compute() == 11
        assert of_torchmetrics.memory(extremes) == {"min_val": 1, "max_val": 4}
        assert of_torchmetrics.memory(last) == {"_num_vals_seen": 3}
        assert of_torchmetrics.memory(MeanMetric()) == {}
        of_torchmetrics.set_memory(last, {"_num_vals_seen": 4})
        last.update(2.0)  # Takes the place of the oldest.
        assert last.compute() == 5
        of_torchmetrics.set_memory(extremes, {"min_val": torch.tensor(-1.0)})
        assert extremes.compute()["min"] == -1

    def test_a_wrapper_without_its_memory_is_named(self):
        metric = Running(MeanMetric())
        object.__delattr__(metric, "_num_vals_seen")
        with pytest.raises(MissingInternalError, match=r"has no Running\._num_vals_seen"):
            of_torchmetrics.memory(metric)


class TestHydra:
    def test_parse_override(self):
        override = of_hydra.parse_override("+loss.smooth=[1,2]")
        assert (override.key_or_group, override.value(), override.is_add()) == ("loss.smooth", [1, 2], True)
        assert (override.is_delete(), override.is_sweep_override(), override.package) == (False, False, None)

    def test_parse_overrides(self):
        from hydra.errors import HydraException

        first, second = of_hydra.parse_overrides(["loss=dice,boundary", "seed=1"])
        assert (first.is_sweep_override(), first.get_key_element(), first.input_line) == (
            True,
            "loss",
            "loss=dice,boundary",
        )
        assert second.value() == 1
        with pytest.raises(HydraException, match="no viable alternative at input"):
            of_hydra.parse_overrides(["a=[1"])

    @pytest.mark.process
    def test_they_are_there_without_torch(self):
        module = "lightning_dice.library_internals.hydra"
        code = f"import sys; from {module} import *; parse_override('a=1'); print('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# What an upgrade may take away: the internal, and how the package comes to use it.
REMOVED = {
    "_trainer": (f"{__name__}.Module", lambda trainer: of_lightning.attached_trainer(Module())),
    "_should_accumulate": (EPOCH_LOOP, of_lightning.is_accumulating),
    "_should_check_val_fx": (EPOCH_LOOP, of_lightning.validation_is_due),
    "restarting": ("lightning.pytorch.loops.loop._Loop", of_lightning.mark_as_fresh),
    "_configure_optimizers": ("lightning.pytorch.core.optimizer", lambda _: of_lightning.read_optimizers(None)),
    "dump_checkpoint": (
        "lightning.pytorch.trainer.connectors.checkpoint_connector._CheckpointConnector",
        of_lightning.dump_checkpoint,
    ),
    "_NormBase": ("torch.nn.modules.batchnorm", lambda _: of_torch.is_batch_norm(nn.Identity())),
    "_foreach_lerp_": ("torch", lambda _: of_torch.foreach_lerp_([], [], 0.0)),
    "_foreach_copy_": ("torch", lambda _: of_torch.foreach_copy_([], [])),
    "_are_functorch_transforms_active": ("torch._C", lambda _: of_torch._transforms.__wrapped__()),
    "create": (
        "hydra.core.override_parser.overrides_parser.OverridesParser",
        lambda _: of_hydra.parse_override("a=1"),
    ),
}


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_internal_is_named(monkeypatch, name):
    owner, use = REMOVED[name]
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module, _, attribute = owner.rpartition(".")
    holder = pl.LightningModule if name == "_trainer" else None
    if holder is None:
        holder = sys.modules.get(owner) or getattr(sys.modules[module], attribute)
    if name == "_trainer":
        monkeypatch.setattr(Module, "__init__", lambda self: nn.Module.__init__(self))
    else:
        monkeypatch.delattr(holder, name)
    with pytest.raises(MissingInternalError, match=rf"has no \S*{name}, an internal .* install '"):
        use(trainer)


@pytest.mark.parametrize(
    ("path", "use"),
    [
        ("fit_loop._data_fetcher", of_lightning.is_fetching),
        ("fit_loop._restarting", of_lightning.mark_epoch_as_fresh),
        ("fit_loop.epoch_progress", of_lightning.epoch_progress),
        ("fit_loop.epoch_loop.batch_progress", of_lightning.batch_progress),
        ("fit_loop.epoch_loop._results", of_lightning.epoch_means),
        ("_logger_connector._callback_metrics", of_lightning.callback_metrics),
        ("_logger_connector._first_loop_iter", lambda trainer: of_lightning.restore_epoch_means(trainer, None, [])),
    ],
)
def test_a_removed_attribute_of_the_trainer_is_named(path, use):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    *parents, name = path.split(".")
    delattr(internal(trainer, ".".join(parents), "lightning"), name)
    with pytest.raises(MissingInternalError, match=rf"lightning {pl.__version__} has no Trainer\.{re.escape(path)}"):
        use(trainer)


@pytest.mark.parametrize("name", ["_average_model", "_device"])
def test_a_removed_attribute_of_weight_averaging_is_named(name):
    averaging = of_lightning.AccessibleWeightAveraging(device=None)
    delattr(averaging, name)
    use = {"_average_model": lambda: averaging.average_model, "_device": lambda: averaging.set_default_device(None)}
    with pytest.raises(MissingInternalError, match=rf"has no AccessibleWeightAveraging\.{name}"):
        use[name]()
    assert "_swap_models" in vars(WeightAveraging)


@pytest.mark.parametrize("name", ["_defaults", "_update_count", "_computed"])
def test_a_removed_attribute_of_a_metric_is_named(name):
    metric = MeanMetric()
    object.__delattr__(metric, name)
    with pytest.raises(MissingInternalError, match=rf"torchmetrics .* has no MeanMetric\.{name}"):
        of_torchmetrics.state_names(metric) if name == "_defaults" else of_torchmetrics.set_update_count(metric, 0)


def test_what_does_not_exist_is_not_set():
    metric = MeanMetric()
    with pytest.raises(MissingInternalError, match=r"MeanMetric\._renamed"):
        set_internal(metric, "_renamed", 1, "torchmetrics")
    assert not hasattr(metric, "_renamed")


def test_the_supported_releases_are_those_of_the_project():
    project = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    for library, (_, supported) in LIBRARIES.items():
        assert f'"{library}{supported}"' in project


# Of NamedTuple, of `os`, of Hydra's configs, an extension point that torchmetrics documents, and the list of files that
# some data sets have: without it, cases have other names.
DOCUMENTED = {"_asdict", "_replace", "_fields", "_exit", "_target_", "_plot", "_images"}
UNDOCUMENTED_MODULES = ("hydra.core.override_parser", "lightning.pytorch.loops", "lightning.pytorch.trainer.connectors")
UNDOCUMENTED = {"fit_loop", "validate_loop", "test_loop", "predict_loop"}  # of a Trainer


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def own_names(tree: ast.AST) -> set[str]:
    """The names that a file defines: functions, classes, variables, and attributes of its own objects."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and own(node.value):
            found.add(node.attr)
    return found


def own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign_internals(source: str, own_everywhere: set[str]) -> list[str]:
    """The places where a file uses a private name that is not the package's own."""
    tree = ast.parse(source)
    here, found = own_names(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            known = own_everywhere | here if own(node.value) else here
            if node.attr not in known:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Attribute) and node.attr in UNDOCUMENTED and not own(node.value):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", "") or ""
            for alias in node.names:
                name = f"{module}.{alias.name}".strip(".")
                if not name.startswith("lightning_dice") and (
                    any(map(is_private, name.split("."))) or name.startswith(UNDOCUMENTED_MODULES)
                ):
                    found.append(f"{node.lineno}: {name}")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        ):
            name = getattr(node.args[1], "value", None) if len(node.args) > 1 else None
            if isinstance(name, str) and is_private(name) and name not in here:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if "library_internals" not in path.parts)
EVERYWHERE = {name for path in FILES for name in own_names(ast.parse(path.read_text(encoding="utf-8")))}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_internals_are_used_in_one_package_only(path):
    found = foreign_internals(path.read_text(encoding="utf-8"), EVERYWHERE)
    assert not found, f"{path.relative_to(PACKAGE)} uses internals that belong in library_internals: {found}"


@pytest.mark.parametrize(
    "line",
    [
        "from torch.nn.modules.batchnorm import _NormBase",
        "import torch.fx.experimental._config as settings",
        "from hydra._internal.utils import create_config_search_path",
        "from hydra.core.override_parser.overrides_parser import OverridesParser",
        "trainer._logger_connector.x",
        "trainer.fit_loop._restarting = False",
        "trainer.fit_loop.epoch_progress",
        "self._update_count_of_torchmetrics",
        'getattr(module, "_orig_mod", module)',
    ],
)
def test_the_search_finds(line):
    assert foreign_internals(line, EVERYWHERE)


def test_the_search_passes_what_is_our_own():
    assert not foreign_internals("class A:\n    def f(self, other):\n        self._x = other._x\n", set())
    assert not foreign_internals("from lightning_dice.plotting.curves import _plain\nrow._replace(a=1)", set())
