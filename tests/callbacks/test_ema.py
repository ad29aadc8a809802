import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from helpers import SMALL, rows, run_command, run_ranks
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from squares import Cases, load
from torch import nn

from lightning_dice import SegmentationModule
from lightning_dice.callbacks import SaveOnInterrupt, WeightEMA


def module():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))
    net.register_buffer("table", torch.tensor([7, 3, 250]))
    net.register_buffer("constant", torch.tensor([0.1, 1 / 3, 1e-9]))
    return SegmentationModule(net)


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class Watch(Callback):
    """The optimizer's weights after every step, and the weights in every validation."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(values(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0 and not trainer.sanity_checking:
            self.validated.append(values(pl_module))


def averages(steps, decay, warmup, name):
    """The definition, one number at a time."""
    seen, result = None, []
    for n, step in enumerate(steps):
        numbers = step[name].double().flatten().tolist()
        d = 0.0 if n == 0 else min(decay, (1 + n) / (10 + n)) if warmup else decay
        seen = numbers if seen is None else [d * a + (1 - d) * b for a, b in zip(seen, numbers, strict=True)]
        result.append(seen)
    return result


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.3, True), (0.999, True)])
def test_validation_sees_the_average_of_the_steps(trainer, loader, decay, warmup):
    watch = Watch()
    model = module()
    trainer(watch, WeightEMA(decay, warmup=warmup), max_epochs=3).fit(model, loader(), loader())
    assert len(watch.steps) == 6
    for name, value in watch.steps[0].items():
        if value.is_floating_point():
            expected = averages(watch.steps, decay, warmup, name)
            for epoch, seen in enumerate(watch.validated):
                close = pytest.approx(expected[2 * epoch + 1], rel=1e-5, abs=1e-7)
                assert seen[name].flatten().tolist() == close, name
    assert all(torch.equal(value, watch.validated[-1][name]) for name, value in values(model).items())
    assert not torch.equal(watch.steps[-1]["net.0.weight"], watch.validated[-1]["net.0.weight"])


def test_constants_stay_and_counts_are_the_last(trainer, loader):
    before, model = values(module()), module()
    watch = Watch()
    trainer(watch, WeightEMA(0.9), max_epochs=4).fit(model, loader(), loader())
    for name in ("net.table", "net.constant"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert int(model.state_dict()["net.1.num_batches_tracked"]) == 8


def test_every_other_step(trainer, loader):
    watch = Watch()
    trainer(watch, WeightEMA(0.5, warmup=False, update_every_n_steps=2), max_epochs=2).fit(module(), loader(), loader())
    expected = averages(watch.steps[::2], 0.5, False, "net.0.weight")[-1]
    assert watch.validated[-1]["net.0.weight"].flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")  # left out on purpose
def test_a_checkpoint_is_tested_alike_after_fit_and_afresh(tmp_path, trainer, loader):
    kept = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1, filename="{epoch}")
    same = trainer(WeightEMA(0.9), kept, max_epochs=3)
    same.fit(module(), loader(), loader())
    path = tmp_path / "epoch=0.ckpt"
    scores = []
    for one, model in ((same, module()), (trainer(WeightEMA(0.9)), module()), (trainer(), module())):
        (tested,) = one.test(model, loader(), ckpt_path=path, weights_only=True, verbose=False)
        (validated,) = one.validate(model, loader(), ckpt_path=path, weights_only=True, verbose=False)
        assert tested["test/loss"] == validated["val/loss"]
        scores.append(tested["test/loss"])
    assert scores[0] == scores[1] == scores[2]
    checkpoint = torch.load(path, weights_only=True)
    assert not torch.equal(checkpoint["state_dict"]["net.0.weight"], checkpoint["current_model_state"]["net.0.weight"])


def test_going_on_is_exact(tmp_path, trainer, loader):
    def fit(epochs, resumed=None):
        model, saved = module(), ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
        trainer(WeightEMA(0.9), saved, max_epochs=epochs).fit(
            model, loader(), loader(), ckpt_path=resumed, weights_only=True
        )
        return values(model), torch.load(tmp_path / "last.ckpt", weights_only=True)

    whole, kept = fit(4)
    fit(2)
    resumed, kept_again = fit(4, tmp_path / "last.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert all(torch.equal(value, kept_again[part][name]) for name, value in kept[part].items())


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_saved_at_a_batchs_end_holds_its_step_once(tmp_path, trainer, loader, first):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    watch, ema = Watch(), WeightEMA(0.9, warmup=False)
    trainer(watch, *([Saves(), ema] if first else [ema, Saves()]), max_epochs=2).fit(module(), loader(), loader())
    for step, expected in enumerate(averages(watch.steps, 0.9, False, "net.0.weight"), 1):
        saved = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
        assert saved["state_dict"]["net.0.weight"].flatten().tolist() == pytest.approx(expected, rel=1e-5)
        assert saved["averaging_state"]["n_averaged"] == step
        assert saved["callbacks"]["WeightEMA"] == {"latest_update_step": step}


def test_a_checkpoint_saved_within_a_validation_has_each_in_its_place(tmp_path, trainer, loader):
    class Breaks(Callback):
        def on_validation_batch_start(self, trainer, *_):
            if not trainer.sanity_checking:
                raise RuntimeError("out of luck")

    watch = Watch()
    fit = trainer(SaveOnInterrupt(tmp_path), watch, WeightEMA(0.9), Breaks(), max_epochs=1)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit.fit(module(), loader(), loader())
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert torch.equal(saved["current_model_state"]["net.0.weight"], watch.steps[-1]["net.0.weight"])
    assert torch.equal(saved["state_dict"]["net.0.weight"], watch.validated[-1]["net.0.weight"])


def test_the_average_lies_where_the_module_is_trained(trainer, loader):
    """Without a GPU: the strategy's device is asked for, not the one on which the module happens to lie in setup."""
    ema, model = WeightEMA(), module()
    one = trainer(max_epochs=1)
    one.strategy._root_device = torch.device("meta")
    one.strategy.connect(model)
    ema.setup(one, model, "fit")
    assert {parameter.device.type for parameter in ema.average_model.module.parameters()} == {"meta"}
    # The count is read on every update, which must not wait for a GPU.
    assert ema.average_model.n_averaged.device.type == "cpu"


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")  # left out on purpose
def test_a_run_that_was_begun_without_goes_on_with(tmp_path, trainer, loader):
    saved = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    model = module()
    trainer(saved, max_epochs=1).fit(model, loader(), loader())
    begun, again, watch = values(model), module(), Watch()
    with pytest.warns(UserWarning, match="not created with WeightAveraging"):
        trainer(WeightEMA(0.5, warmup=False), watch, max_epochs=2).fit(
            again, loader(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )
    expected = averages(watch.steps, 0.5, False, "net.0.weight")[-1]
    assert values(again)["net.0.weight"].flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert not torch.equal(begun["net.0.weight"], watch.steps[0]["net.0.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1}, r"decay must be a number in \[0, 1\), got 1"),
        ({"decay": math.nan}, "decay must be"),
        ({"warmup": 10}, "warmup must be True or False, got 10"),
        ({"update_every_n_steps": 0}, "update_every_n_steps must be an integer >= 1, got 0"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        WeightEMA(**settings)


def test_it_can_be_copied():
    assert copy.deepcopy(WeightEMA(0.9)).decay == 0.9


@pytest.mark.slow
def test_commands(tmp_path):
    """The best checkpoint's score is that of its averaged weights, in the run and in every later command."""
    few = [*SMALL, "callbacks=ema", "~callbacks.overlays", "logger=none", "optimizer.lr=0.05", "scheduler=constant"]
    few += ["data.batch_size=4"]
    run_command("fit", *few, "trainer.max_epochs=2", "folder=whole", cwd=tmp_path)
    run_command("fit", *few, "trainer.max_epochs=1", "folder=parts", "test=false", cwd=tmp_path)
    run_command("fit", "resume=parts", "trainer.max_epochs=2", cwd=tmp_path)
    whole, parts = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "parts")
    )
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert all(torch.equal(value, parts[part][name]) for name, value in whole[part].items()), part
    assert whole["state_dict"]["net.weight"].ne(whole["current_model_state"]["net.weight"]).any()
    run_command("evaluate", "run=whole", "output=test", cwd=tmp_path)
    assert rows(tmp_path / "test/cases.csv") == rows(tmp_path / "whole/cases.csv")
    run_command("evaluate", "run=whole", "output=val", "split=val", "checkpoint=last", cwd=tmp_path)
    seen = [float(row["dice"]) for row in rows(tmp_path / "val/cases.csv")]
    assert float(rows(tmp_path / "whole/metrics.csv")[-1]["val/dice"]) == pytest.approx(sum(seen) / len(seen), abs=2e-6)


def average_as_a_rank(folder):
    """Train in one go and in two parts; returns both last checkpoints, and scores in the fit and of the checkpoint."""

    def fit(name, epochs, resumed=None):
        saved = ModelCheckpoint(folder / name, filename="last", enable_version_counter=False)
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False, max_epochs=epochs,
            num_sanity_val_steps=0, callbacks=[WeightEMA(0.5), saved],
        )  # fmt: skip
        trainer.fit(module(), load(Cases(8)), load(Cases(4)), ckpt_path=resumed, weights_only=True)
        return trainer, float(trainer.callback_metrics["val/loss"])

    trainer, score = fit("whole", 2)
    fit("parts", 1)
    fit("parts", 2, folder / "parts/last.ckpt")
    (tested,) = trainer.test(
        module(), load(Cases(4)), ckpt_path=folder / "whole/last.ckpt", weights_only=True, verbose=False
    )
    return score, tested["test/loss"]


@pytest.mark.process
def test_two_processes_share_one_average(tmp_path):
    first, second = run_ranks(average_as_a_rank, tmp_path).results
    assert first == second
    assert first[0] == first[1]
    whole, parts = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert all(torch.equal(value, parts[part][name]) for name, value in whole[part].items()), part
    assert whole["state_dict"]["net.0.weight"].ne(whole["current_model_state"]["net.0.weight"]).any()
