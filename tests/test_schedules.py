"""The rate's curve against its formula, alone and through a Trainer and a resumed run."""

from __future__ import annotations

import math
import warnings
from functools import partial

import lightning as L
import pytest
import torch
from helpers import LEAN, SMALL, rows, run_command
from hydra import compose, initialize_config_dir
from torch.optim.lr_scheduler import CosineAnnealingLR, PolynomialLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from lightning_dice import SegmentationModule
from lightning_dice.cli.config import CONF_DIR, instantiate, register_resolvers
from lightning_dice.schedules import UnknownLengthError, warmup, with_length


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates(schedule, count: int) -> list[list[float]]:
    seen = []
    for _ in range(count):
        seen.append([group["lr"] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return seen


def rising(epoch: int, epochs: int, factor: float) -> float:
    return factor + (1 - factor) * epoch / epochs


def cosine(epoch: int, total: int, least: float, rate: float) -> float:
    return least + (rate - least) * (1 + math.cos(math.pi * epoch / total)) / 2


@pytest.mark.parametrize(("epochs", "factor"), [(1, 0.1), (3, 0.01), (4, 1.0)])
def test_cosine_after_a_warmup(epochs, factor):
    schedule = warmup(
        optimizer(0.2, 0.05), partial(CosineAnnealingLR, T_max=6, eta_min=0.01), epochs=epochs, start_factor=factor
    )
    for epoch, seen in enumerate(rates(schedule, epochs + 7)):
        for rate, one in zip((0.2, 0.05), seen, strict=True):
            expected = rate * rising(epoch, epochs, factor) if epoch < epochs else cosine(epoch - epochs, 6, 0.01, rate)
            assert one == pytest.approx(expected, rel=1e-9), epoch


def test_poly_after_a_warmup():
    schedule = warmup(optimizer(0.2), partial(PolynomialLR, total_iters=5, power=0.9), epochs=2, start_factor=0.5)
    expected = [0.1, 0.15, *(0.2 * (1 - epoch / 5) ** 0.9 for epoch in range(6))]
    assert [one for (one,) in rates(schedule, 8)] == pytest.approx(expected)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_saved_schedule_goes_on(stop):
    def make():
        return warmup(optimizer(0.2), partial(CosineAnnealingLR, T_max=6), epochs=3, start_factor=0.1)

    whole = rates(make(), 8)
    first, second = make(), make()
    begun = rates(first, stop)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert begun + rates(second, 8 - stop) == whole


def test_no_warning_from_torch_releases_that_warn_of_themselves(monkeypatch):
    def warns(self):
        warnings.warn("The epoch parameter in `scheduler.step()` was not necessary", UserWarning, stacklevel=2)

    monkeypatch.setattr(torch.optim.lr_scheduler.SequentialLR, "step", warns)
    schedule = warmup(optimizer(0.2), partial(CosineAnnealingLR, T_max=6), epochs=3)
    schedule.step()  # Warnings are errors in these tests.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"epochs": 1.5}, "epochs must be an integer >= 1, got 1.5"),
        ({"epochs": 1, "start_factor": 0}, r"start_factor must be a fraction of the full rate in \(0, 1\], got 0"),
        ({"epochs": 1, "start_factor": 1.1}, "start_factor must be"),
        ({"epochs": 1, "start_factor": math.nan}, "start_factor must be"),
        ({"epochs": 1, "scheduler": ReduceLROnPlateau}, "scheduler must follow the epochs"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        warmup(**{"optimizer": optimizer(0.1), "scheduler": partial(CosineAnnealingLR, T_max=6)} | settings)


class Rates(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


PAIRS = [(torch.randn(1, 4, 4), torch.zeros(1, 4, 4)) for _ in range(8)]


def rates_in_training(scheduler, interval, **settings) -> list[float]:
    """The rate at every batch; two batches of four images in an epoch, unless `data` are given."""
    module = SegmentationModule(
        torch.nn.Conv2d(1, 1, 1), optimizer=partial(torch.optim.SGD, lr=1.0), scheduler=scheduler, interval=interval
    )
    seen = Rates()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    data = settings.pop("data", DataLoader(PAIRS, batch_size=4))
    L.Trainer(callbacks=[seen], accelerator="cpu", **quiet, **settings).fit(module, data, DataLoader(PAIRS[:1]))
    return seen.seen


FALLING = partial(PolynomialLR, total_iters=None, power=1.0)


@pytest.mark.parametrize(
    ("scheduler", "interval", "settings", "expected"),
    [
        (FALLING, "step", {"max_epochs": 2}, [1, 0.75, 0.5, 0.25]),
        (FALLING, "epoch", {"max_epochs": 2}, [1, 1, 0.5, 0.5]),
        (FALLING, "step", {"max_epochs": 4, "accumulate_grad_batches": 2}, [1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]),
        (FALLING, "step", {"max_epochs": -1, "max_steps": 3}, [1, 2 / 3, 1 / 3]),
        (FALLING, "step", {"max_epochs": 9, "max_steps": 2}, [1, 0.5]),
        (FALLING, "epoch", {"max_epochs": -1, "max_steps": 3}, [1, 1, 0.5]),
        (FALLING, "epoch", {"max_epochs": 9, "max_steps": 4}, [1, 1, 0.5, 0.5]),
        (FALLING, "epoch", {"max_epochs": 2, "max_steps": 99}, [1, 1, 0.5, 0.5]),
        (FALLING, "step", {"max_epochs": 2, "limit_train_batches": 1}, [1, 0.5]),
        (partial(CosineAnnealingLR, T_max=None, eta_min=0.5), "step", {"max_epochs": 1}, [1, 0.75]),
        (
            partial(warmup, scheduler=FALLING, epochs=1, start_factor=0.5),
            "step",
            {"max_epochs": 2},
            [0.5, 1, 2 / 3, 1 / 3],
        ),
        (partial(warmup, scheduler=FALLING, epochs=1, start_factor=0.5), "epoch", {"max_epochs": 2}, [0.5, 0.5, 1, 1]),
        (partial(warmup, scheduler=FALLING, epochs=9, start_factor=0.1), "step", {"max_epochs": 1}, [0.1, 0.2]),
        (partial(CosineAnnealingLR, T_max=1, eta_min=0.5), "epoch", {"max_epochs": 2}, [1, 1, 0.5, 0.5]),
        (partial(CosineAnnealingLR, T_max=1, eta_min=0.5), "step", {"max_epochs": 2}, [1, 0.5, 1, 0.5]),  # a cycle
    ],
)
def test_a_schedule_without_a_length_has_that_of_the_training(scheduler, interval, settings, expected):
    assert rates_in_training(scheduler, interval, **settings) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scheduler", "interval", "message"),
    [
        (
            partial(CosineAnnealingLR, T_max=3),
            "step",
            "CosineAnnealingLR with T_max=3 ends after 3 of 6 optimizer steps",
        ),
        (
            partial(PolynomialLR, total_iters=3),
            "step",
            "PolynomialLR with total_iters=3 ends after 3 of 6 optimizer steps",
        ),
        (PolynomialLR, "step", "PolynomialLR with total_iters=5 ends after 5 of 6 steps, and the learning rate is 0"),
        (
            partial(PolynomialLR, total_iters=2),
            "epoch",
            "total_iters=2 ends after 2 of 3 epochs, and the learning rate is",
        ),
        (
            partial(warmup, scheduler=partial(CosineAnnealingLR, T_max=2), epochs=1),
            "step",
            "CosineAnnealingLR with T_max=2 ends after 3 of 6 optimizer steps",
        ),
        (
            partial(warmup, scheduler=partial(PolynomialLR, total_iters=2), epochs=2),
            "step",
            "total_iters=2 ends after 4 of 6 steps",
        ),
    ],
)
def test_a_schedule_that_ends_before_the_training_is_refused(scheduler, interval, message):
    with pytest.raises(ValueError, match=message):
        rates_in_training(scheduler, interval, max_epochs=3)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(PAIRS * 99)


@pytest.mark.parametrize(
    ("interval", "settings"),
    [
        ("epoch", {"max_epochs": -1}),
        ("step", {"max_epochs": -1}),
        ("step", {"max_epochs": 2, "data": DataLoader(Endless())}),
        ("epoch", {"max_epochs": -1, "max_steps": 2, "data": DataLoader(Endless())}),
    ],
)
def test_a_training_without_an_end_has_no_length(interval, settings):
    with pytest.raises(UnknownLengthError, match=f"how many {interval}s the training has is not known"):
        rates_in_training(FALLING, interval, **settings)


def test_the_length_of_steps_may_be_given_where_the_data_have_none():
    settings = {"max_epochs": -1, "max_steps": 2, "data": DataLoader(Endless())}
    assert rates_in_training(FALLING, "step", **settings) == [1.0, 0.5]


def test_without_a_trainer_the_optimizer_is_alone():
    module = SegmentationModule(torch.nn.Conv2d(1, 1, 1), scheduler=FALLING)
    assert isinstance(module.configure_optimizers(), torch.optim.AdamW)


def test_by_optimizer_step_with_accumulation():
    pairs = [(torch.randn(1, 4, 4), torch.zeros(1, 4, 4)) for _ in range(8)]
    module = SegmentationModule(
        torch.nn.Conv2d(1, 1, 1),
        optimizer=partial(torch.optim.SGD, lr=1.0),
        scheduler=partial(warmup, scheduler=partial(PolynomialLR, total_iters=2), epochs=2, start_factor=0.5),
        interval="step",
    )
    seen = Rates()
    L.Trainer(
        max_epochs=2, accumulate_grad_batches=2, callbacks=[seen], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, DataLoader(pairs, batch_size=2), DataLoader(pairs, batch_size=2))  # fmt: skip
    assert seen.seen == pytest.approx([0.5, 0.5, 0.75, 0.75, 1, 1, 0.5, 0.5])


@pytest.mark.parametrize(("name", "end"), [("cosine", 1e-6), ("poly", 0.0)])
def test_schedules_without_a_warmup_end_with_the_training(name, end):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("fit", overrides=[f"scheduler={name}"])
    seen = rates(with_length(instantiate(config.scheduler, "scheduler"), lambda: 7)(optimizer(1.0)), 8)
    assert seen[0] == [1.0]
    assert seen[6][0] > 0.01
    assert seen[7] == pytest.approx([end], abs=1e-12)


@pytest.mark.parametrize(("name", "end"), [("warmup_cosine", 1e-6), ("warmup_poly", 0.0)])
@pytest.mark.parametrize(("total", "epochs"), [(12, 3), (3, 3), (1, 3)])
def test_the_catalogues_schedules_end_with_the_training(name, end, total, epochs):
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("fit", overrides=[f"scheduler={name}", f"trainer.max_epochs={total}"])
    schedule = with_length(instantiate(config.scheduler, "scheduler"), lambda: total)(optimizer(1.0))
    seen = [one for (one,) in rates(schedule, total + 1)]
    assert seen[: min(total, epochs)] == pytest.approx([rising(epoch, 3, 0.1) for epoch in range(min(total, epochs))])
    if total > epochs:
        assert seen[3] == 1.0
        assert seen[total] == pytest.approx(end, abs=1e-12)


def test_a_resumed_run_follows_the_curve_of_its_new_length(tmp_path):
    few = ["optimizer.lr=0.01", "scheduler=warmup_cosine", "trainer.max_epochs=2", "folder=run"]
    run_command("fit", *SMALL, *LEAN, *few, cwd=tmp_path)
    run_command("fit", "resume=run", "trainer.max_epochs=6", "scheduler.start_factor=0.4", cwd=tmp_path)
    expected = [0.01 * rising(epoch, 3, 0.1) for epoch in (0, 1)] + [0.01 * rising(2, 3, 0.4)]
    expected += [cosine(epoch, 3, 1e-6, 0.01) for epoch in range(3)]
    # The table has six digits.
    learned = [float(row["lr"]) for row in rows(tmp_path / "run" / "metrics.csv")]
    assert learned == pytest.approx(expected, rel=1e-5)
