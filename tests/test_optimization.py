"""Optimizer, learning rate, accumulated gradients, and what Lightning's tools expect of a module."""

from __future__ import annotations

import copy
import logging
from functools import partial

import lightning as L
import pytest
import torch
from helpers import LEAN, SMALL, rows, run_command
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader

from lightning_dice import DiceLoss, SegmentationModule
from lightning_dice.losses import DeepSupervision

QUIET = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def pairs(count: int):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    return list(zip(images, (images > 0.5).float(), strict=True))


def fitted(batches: int, *callbacks, size: int = 2, **settings) -> nn.Module:
    """A network after plain gradient steps of rate 1 over one epoch."""
    torch.manual_seed(0)
    module = SegmentationModule(nn.Conv2d(1, 1, 3, padding=1), optimizer=partial(torch.optim.SGD, lr=1.0))
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=list(callbacks), **QUIET, **settings)
    trainer.fit(module, DataLoader(pairs(batches * size), size), DataLoader(pairs(2), 2))
    return module.net


def stepped(*steps: list[int], batches: int, size: int = 2) -> nn.Module:
    """The same by hand: in each step the mean of the losses of some batches."""
    torch.manual_seed(0)
    net = nn.Conv2d(1, 1, 3, padding=1)
    data = list(DataLoader(pairs(batches * size), size))
    for step in steps:
        net.zero_grad()
        torch.stack([DiceLoss()(net(data[index][0]), data[index][1]) for index in step]).mean().backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= parameter.grad
    return net


@pytest.mark.parametrize(
    ("accumulated", "steps"),
    [
        (1, [[0], [1], [2], [3], [4], [5]]),
        (2, [[0, 1], [2, 3], [4, 5]]),
        (4, [[0, 1, 2, 3], [4, 5]]),
        (64, [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_each_batch_of_a_step_has_the_same_share(accumulated, steps):
    net, expected = fitted(6, accumulate_grad_batches=accumulated), stepped(*steps, batches=6)
    torch.testing.assert_close(net.weight, expected.weight, rtol=1e-5, atol=1e-6)


def test_a_limited_epoch_ends_where_it_is_limited():
    net = fitted(6, accumulate_grad_batches=4, limit_train_batches=5)
    torch.testing.assert_close(net.weight, stepped([0, 1, 2, 3], [4], batches=6).weight, rtol=1e-5, atol=1e-6)


def test_a_number_of_batches_that_changes():
    net = fitted(5, GradientAccumulationScheduler({0: 3}))
    torch.testing.assert_close(net.weight, stepped([0, 1, 2], [3, 4], batches=5).weight, rtol=1e-5, atol=1e-6)


def test_the_first_line_counts_the_batches_that_there_are(tmp_path):
    out = run_command(
        "fit", *SMALL, *LEAN, "trainer.accumulate_grad_batches=64", "trainer.max_epochs=1", "folder=run", cwd=tmp_path
    ).out
    assert "batch   8 images x 2 accumulated, the 2 of an epoch = 16 a step" in out


class Batches(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def test_the_loss_of_a_step_is_logged(tmp_path):
    seen = Batches()
    module = SegmentationModule(nn.Conv2d(1, 1, 1), metrics={})
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=logger, log_every_n_steps=2, callbacks=[seen], **QUIET)
    trainer.fit(module, DataLoader(pairs(12), 2), DataLoader(pairs(2), 2))
    table = [row for row in rows(tmp_path / "metrics.csv") if row["train/loss_step"]]
    found = {int(row["step"]): float(row["train/loss_step"]) for row in table}
    assert found == pytest.approx({index: seen.losses[index] for index in (1, 3, 5)})
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(sum(seen.losses) / 6)
    assert (tmp_path / "hparams.yaml").read_text().count("threshold: 0.5") == 1


@pytest.mark.parametrize("optimizer", [None, partial(torch.optim.SGD, lr=0.25)])
def test_the_rate_can_be_read_and_set(optimizer):
    module = SegmentationModule(nn.Conv2d(1, 1, 1), optimizer=optimizer)
    assert module.lr == (1e-3 if optimizer is None else 0.25)
    module.lr = 0.5
    assert module.lr == module.configure_optimizers().param_groups[0]["lr"] == 0.5


def test_groups_keep_the_ratio_of_their_rates():
    def groups(parameters):
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.02}])

    module = SegmentationModule(nn.Conv2d(1, 1, 1), optimizer=groups)
    module.lr = 1.0
    assert [group["lr"] for group in module.configure_optimizers().param_groups] == pytest.approx([1.0, 0.2])


def test_a_rate_that_is_not_known():
    module = SegmentationModule(nn.Conv2d(1, 1, 1), optimizer=lambda parameters: torch.optim.SGD(parameters, lr="x"))
    assert not hasattr(module, "lr")


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*isinstance\\(treespec, LeafSpec\\)")
def test_the_tuner_finds_a_rate(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    module = SegmentationModule(nn.Conv2d(1, 1, 1), optimizer=partial(torch.optim.SGD, lr=0.1))
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path, **QUIET)
    found = Tuner(trainer).lr_find(module, DataLoader(pairs(40), 1), DataLoader(pairs(2), 2), num_training=20)
    assert found.suggestion() == module.lr
    trainer.fit(module, DataLoader(pairs(4), 2), DataLoader(pairs(2), 2))
    assert trainer.optimizers[0].param_groups[0]["lr"] == module.lr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])}, "optimizer must be .* made already: SGD"),
        ({"scheduler": 3}, "scheduler must be a function that makes one.* made already: int"),
        ({"interval": "batch"}, "interval must be"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        SegmentationModule(nn.Conv2d(1, 1, 1), **settings)


class Own(SegmentationModule):
    def __init__(self, net, teacher=None, **settings):
        super().__init__(net, **settings)
        self.teacher = teacher


@pytest.fixture
def checkpoint(tmp_path):
    module = Own(nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), threshold=0.25, class_names=["a", "b"], activation="sigmoid")
    trainer = L.Trainer(accelerator="cpu", logger=False, **QUIET)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    return tmp_path / "own.ckpt", module


def test_a_checkpoint_of_ones_own_project_keeps_the_plain_settings(checkpoint):
    path, module = checkpoint
    loaded = Own.load_from_checkpoint(path, net=nn.Conv2d(1, 2, 1), teacher=nn.Conv2d(1, 2, 1), weights_only=True)
    assert (loaded.threshold, loaded.class_names, loaded.activation) == (0.25, ["a", "b"], "sigmoid")
    assert torch.equal(loaded.net.weight, module.net.weight)
    assert dict(loaded.hparams) == dict(module.hparams)
    with pytest.raises(ValueError, match=r"give load_from_checkpoint the network, net="):
        Own.load_from_checkpoint(path)


def test_a_checkpoint_of_fit_needs_nothing(trained_run):
    loaded = SegmentationModule.load_from_checkpoint(trained_run / "checkpoints" / "best.ckpt")
    expected = SegmentationModule.from_run(trained_run)
    image = torch.rand(1, 1, 32, 32)
    assert torch.equal(loaded.eval()(image), expected(image))
    assert loaded.hparams["threshold"] == 0.5


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def test_compiled_networks_and_plain_ones_share_checkpoints():
    def net():
        return nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.BatchNorm2d(2)), nn.Conv2d(2, 1, 1))

    plain, whole, part = SegmentationModule(net()), SegmentationModule(compiled(net())), SegmentationModule(net())
    part.net[1] = compiled(part.net[1])
    old = {name.replace("net.", "net._orig_mod.", 1): value for name, value in plain.state_dict().items()}
    for one in (whole, part, copy.deepcopy(whole)):
        assert sorted(one.state_dict()) == sorted(plain.state_dict())
        for state in (plain.state_dict(), old):
            with torch.no_grad():
                next(one.net.parameters()).zero_()
            one.load_state_dict(dict(state))
            assert torch.equal(next(one.net.parameters()), next(plain.net.parameters()))
        plain.load_state_dict(one.state_dict())
    plain.load_state_dict(old)
    average = torch.optim.swa_utils.AveragedModel(whole)
    names = [name for name in average.state_dict() if name.startswith("module.net")]
    assert sorted(names) == sorted(f"module.{name}" for name in plain.state_dict() if name.startswith("net"))
    average.load_state_dict(average.state_dict())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own reading
@pytest.mark.parametrize("levels", [False, True])
def test_a_compiled_loss_gets_the_weight(levels):
    loss = DeepSupervision(compiled(DiceLoss())) if levels else compiled(DiceLoss())
    module = SegmentationModule(nn.Conv2d(1, 1, 1), loss, {})
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    image, mask = (torch.stack(parts) for parts in zip(*pairs(2), strict=True))
    weight = torch.rand(2, 8, 8)
    found = module.training_step({"image": image, "mask": mask, "weight": weight}, 0)
    torch.testing.assert_close(found, DiceLoss()(module(image), mask, weight))
