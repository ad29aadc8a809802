import math
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from helpers import SMALL, refused, rows
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_dice import DiceLoss, SegmentationModule
from lightning_dice.callbacks import LossSchedule
from lightning_dice.losses import CompoundLoss, DeepSupervision, DiceCELoss, FocalLoss, TverskyLoss


def module(loss):
    torch.manual_seed(0)
    return SegmentationModule(torch.nn.Conv2d(3, 1, 1), loss, {})


class Read(Callback):
    """What the loss has in every epoch."""

    def __init__(self, read):
        self.read, self.values = read, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.values.append(self.read(pl_module.loss))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [100, 100, 67, 34, 1, 1]),
        ("cosine", [100, 100, 100 - 99 * 0.25, 100 - 99 * 0.75, 1, 1]),
        ("exponential", [100, 100, 100 ** (2 / 3), 100 ** (1 / 3), 1, 1]),
        ("step", [100, 100, 100, 100, 1, 1]),
    ],
)
def test_shapes(shape, expected):
    schedule = LossSchedule("smooth", 100, 1, begin_epoch=1, epochs=4, shape=shape)
    assert [schedule.value(epoch) for epoch in range(6)] == pytest.approx(expected)
    assert schedule.value(0) == 100.0
    assert schedule.value(99) == 1.0


def test_one_epoch_is_a_step():
    schedule = LossSchedule("smooth", 5, 2, begin_epoch=3, epochs=1)
    assert [schedule.value(epoch) for epoch in range(5)] == [5, 5, 5, 2, 2]


@pytest.mark.parametrize(("begin", "expected"), [(0, [4, 3, 2, 1]), (1, [4, 4, 2.5, 1]), (9, [4, 4, 4, 4])])
def test_without_a_length_it_changes_until_the_last_epoch(loader, trainer, begin, expected):
    seen = Read(lambda loss: loss.smooth[0])
    schedule = LossSchedule("smooth", 4, 1, begin_epoch=begin)
    trainer(schedule, seen, max_epochs=4).fit(module(DiceLoss()), loader(2), loader(2))
    assert seen.values == pytest.approx(expected)


def test_without_a_last_epoch_the_length_must_be_given(loader, trainer):
    with pytest.raises(ValueError, match=r"epochs of the change of 'smooth' must be given.*max_epochs=-1"):
        trainer(LossSchedule("smooth", 4, 1), max_epochs=-1, max_steps=1).fit(module(DiceLoss()), loader(2), loader(2))
    with pytest.raises(ValueError, match="until training starts"):
        LossSchedule("smooth", 4, 1).value(0)


def test_pairs():
    schedule = LossSchedule("smooth", [0, 4], 2, epochs=3)
    assert [schedule.value(epoch) for epoch in range(3)] == [(0, 4), (1, 3), (2, 2)]


def compound():
    return CompoundLoss({"dice": DiceLoss(), "focal": FocalLoss()}, {"focal": 0.5})


@pytest.mark.parametrize(
    ("make", "setting", "start", "end", "read", "expected"),
    [
        (DiceLoss, "smooth", 3, 1, lambda loss: loss.smooth, [(3.0, 3.0), (2.0, 2.0), (1.0, 1.0)]),
        (DiceLoss, "smooth", [0, 3], 1, lambda loss: loss.smooth, [(0.0, 3.0), (0.5, 2.0), (1.0, 1.0)]),
        (TverskyLoss, "alpha", 0.5, 0.3, lambda loss: loss.alpha, [0.5, 0.4, 0.3]),
        (compound, "weights.focal", 0, 1, lambda loss: loss.weights["focal"], [0.0, 0.5, 1.0]),
        (compound, "terms.focal.gamma", 1, 3, lambda loss: loss.terms["focal"].gamma, [1.0, 2.0, 3.0]),
        (DiceCELoss, "terms.ce.label_smoothing", 0.2, 0, lambda loss: loss.terms["ce"].label_smoothing, [0.2, 0.1, 0]),
        (
            lambda: DeepSupervision(compound()),
            "loss.terms.dice.smooth",
            3,
            1,
            lambda loss: loss.loss.terms["dice"].smooth,
            [(3.0, 3.0), (2.0, 2.0), (1.0, 1.0)],
        ),
    ],
    ids=["smooth", "pair", "alpha", "weight", "term", "label-smoothing", "deep"],
)
def test_the_loss_has_the_value_of_the_epoch(trainer, loader, make, setting, start, end, read, expected):
    model, seen = module(make()), Read(read)
    own = read(model.loss)
    trainer(LossSchedule(setting, start, end, epochs=3), seen, max_epochs=3).fit(model, loader(), loader())
    assert seen.values == [pytest.approx(value) for value in expected]
    assert read(model.loss) == own


def test_the_loss_is_computed_with_it(trainer, loader):
    model = module(DiceLoss())
    schedule = LossSchedule("smooth", 1000, 1000, epochs=1)
    fit = trainer(schedule, max_epochs=1)
    fit.fit(model, loader(), loader())
    assert float(fit.callback_metrics["val/loss"]) < 0.5
    (after,) = trainer().validate(model, loader(), verbose=False)
    assert after["val/loss"] > 0.6


def test_it_is_logged_each_epoch(tmp_path, trainer, loader):
    logger = CSVLogger(tmp_path)
    trainer(LossSchedule("smooth", [3, 2], 1, epochs=3), max_epochs=3, logger=logger, log_every_n_steps=1).fit(
        module(DiceLoss()), loader(), loader()
    )
    logged = [row for row in rows(Path(logger.log_dir) / "metrics.csv") if row["loss/smooth/0"]]
    assert [float(row["loss/smooth/0"]) for row in logged] == [3.0, 2.0, 1.0]
    assert [float(row["loss/smooth/1"]) for row in logged] == [2.0, 1.5, 1.0]
    assert [row["epoch"] for row in logged] == ["0", "1", "2"]


def test_a_resumed_training_goes_on_exactly(tmp_path, trainer, loader):
    def fit(name, epochs, resumed=None):
        model, seen = module(DiceLoss()), Read(lambda loss: loss.smooth)
        saved = ModelCheckpoint(tmp_path / name, save_last=True, enable_version_counter=False)
        schedule = LossSchedule("smooth", 100, 1, epochs=4, shape="exponential")
        trainer(schedule, seen, saved, max_epochs=epochs).fit(model, loader(), loader(), ckpt_path=resumed)
        return model, seen.values

    whole, values = fit("whole", 4)
    _, first = fit("parts", 2)
    resumed, second = fit("parts", 4, tmp_path / "parts" / "last.ckpt")
    assert first + second == values
    assert len(set(values)) == 4
    assert torch.equal(whole.net.weight, resumed.net.weight)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's own
@pytest.mark.slow
def test_a_compiled_loss_follows(trainer, loader):
    loss = DiceLoss()
    model = module(torch.compile(loss, backend="eager"))
    seen = Read(lambda loss: float(loss(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))))
    trainer(LossSchedule("smooth", 1, 99, epochs=2), seen, max_epochs=2, num_sanity_val_steps=0).fit(
        model, loader(), loader()
    )
    assert seen.values == pytest.approx([1 - 1 / (32 + 1), 1 - 99 / (32 + 99)])


def test_a_training_that_breaks_off_leaves_the_loss_as_it_was(trainer, loader):
    class Breaks(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("out of luck")

    model = module(DiceLoss())
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(LossSchedule("smooth", 5, 5, epochs=1), Breaks(), max_epochs=1).fit(model, loader(), loader())
    assert model.loss.smooth == (1.0, 1.0)


@pytest.mark.parametrize(
    ("make", "setting", "start", "message"),
    [
        (DiceLoss, "smoth", 1, r"the loss, a DiceLoss, has no number 'smoth', only smooth; did you mean smooth\?"),
        (DiceLoss, "pool", 1, "has no number 'pool', only smooth$"),
        (DiceLoss, "squared", 1, "has no number 'squared'"),
        (DiceLoss, "exclude_classes", 1, "has no number 'exclude_classes'"),
        (compound, "weights.dise", 1, r"weights, a dict, has no number 'dise', only dice, focal; did you mean dice\?"),
        (compound, "wieghts.dice", 1, r"has no number 'wieghts', only weights, terms; did you mean weights\?"),
        (compound, "terms.dice.smooht", 1, r"dice, a DiceLoss, has no number 'smooht', .*mean smooth\?"),
        (compound, "terms.boundary", 1, r"terms, a ModuleDict, has no number 'boundary', only dice, focal"),
        (compound, "terms.dice", 1, "must lead to a number, got DiceLoss"),
        (compound, "weights", 1, "must lead to a number, got dict"),
        (DiceLoss, "smooth.x", 1, "smooth, a tuple, has no number 'x', only none at all"),
        (DiceLoss, "smooth", -1, "setting 'smooth': smooth must be a number of pixels >= 0"),
        (TverskyLoss, "smooth", [1, -1], "setting 'smooth': smooth must be a number of pixels >= 0"),
        (DiceLoss, "smooth", [1, 2, 3], "setting 'smooth' takes 2, got 3 numbers"),
        (TverskyLoss, "alpha", -0.5, "setting 'alpha': alpha must be a number >= 0"),
        (TverskyLoss, "alpha", [1, 2], "setting 'alpha' takes one number, got 2 numbers"),
        (compound, "weights.dice", -0.1, "setting 'weights.dice': the weight of dice must be a number >= 0"),
        (DiceCELoss, "weights.ce", -0.1, "setting 'weights.ce': the weight of ce must be a number >= 0"),
        (DiceCELoss, "terms.ce.label_smoothing", 1.5, r"label_smoothing must be a number in \[0, 1\]"),
        (lambda: DeepSupervision(DiceLoss()), "smooth", 1, "a DeepSupervision, has no number 'smooth', only loss"),
    ],
)
@pytest.mark.parametrize("end", ["start", "end"])
def test_what_the_loss_does_not_have_or_refuses(trainer, loader, make, setting, start, message, end):
    values = {"start": 0.5, "end": 0.5, end: start}
    model = module(make())
    with pytest.raises(ValueError, match=message):
        trainer(LossSchedule(setting, **values, epochs=2), max_epochs=2).fit(model, loader(), loader())
    assert model.global_step == 0


def test_a_module_without_a_loss(trainer, net, loader):
    with pytest.raises(ValueError, match="the module has no loss"):
        trainer(LossSchedule("smooth", 1, 2, epochs=2), max_epochs=2).fit(net(), loader(), loader())


class Frozen(torch.nn.Module):
    """A loss of somebody else, whose setting is for reading."""

    def __init__(self, margin, device):
        super().__init__()
        self.options = MappingProxyType({"margin": margin})

    def forward(self, logits, target):
        return logits.mean()


def test_a_setting_for_reading_is_refused(trainer, loader):
    with pytest.raises(ValueError, match=r"setting 'options.margin' cannot be changed: a mappingproxy is read-only"):
        trainer(LossSchedule("options.margin", 1, 2, epochs=2), max_epochs=2).fit(
            module(Frozen(1.0, None)), loader(), loader()
        )


class Foreign(torch.nn.Module):
    """Its constructor asks for more than its attributes tell."""

    def __init__(self, path, margin=1.0):
        super().__init__()
        self.margin = margin

    def forward(self, logits, target):
        return (self.margin - logits).clamp(min=0).mean()


def test_a_loss_of_somebody_else_is_followed(trainer, loader):
    seen = Read(lambda loss: loss.margin)
    trainer(LossSchedule("margin", 1, 2, epochs=2), seen, max_epochs=2).fit(module(Foreign("x")), loader(), loader())
    assert seen.values == [1, 2]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"setting": ""}, "setting must be names with dots between them"),
        ({"setting": "weights..x"}, "setting must be names with dots between them"),
        ({"start": "1"}, "start must be a finite number, or several, got '1'"),
        ({"start": True}, "start must be a finite number"),
        ({"end": math.nan}, "end must be a finite number"),
        ({"end": [1, math.inf]}, "end must be a finite number"),
        ({"start": [1, 2], "end": [1, 2, 3]}, "start and end must have equally many numbers"),
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"epochs": -1}, "epochs must be an integer >= 1, got -1"),
        ({"epochs": 1.5}, "epochs must be an integer >= 1, got 1.5"),
        ({"begin_epoch": -1}, "begin_epoch must be an integer >= 0, got -1"),
        ({"shape": "quadratic"}, "shape must be one of 'linear', 'cosine', 'exponential', 'step', got 'quadratic'"),
        ({"shape": "exponential", "end": 0}, "must be > 0 with shape='exponential'"),
        ({"shape": "exponential", "start": [1, -1]}, "must be > 0 with shape='exponential'"),
    ],
)
def test_settings_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LossSchedule(**{"setting": "smooth", "start": 1, "end": 2, "epochs": 3} | kwargs)


def test_from_the_command_line(tmp_path):
    message = refused("fit", *SMALL, "callbacks=loss_schedule", "callbacks.loss_schedule.end=-1", cwd=tmp_path)
    assert "must be > 0 with shape='exponential'" in message


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (
            LossSchedule("smooth", 100, 1, epochs=12, shape="exponential"),
            "smooth of the loss from 100 to 1 in epochs 0 to 11, exponential",
        ),
        (
            LossSchedule("smooth", [0, 2.5], 1, epochs=1, begin_epoch=3),
            "smooth of the loss from 0 and 2.5 to 1 in epoch 3",
        ),
    ],
)
def test_it_is_said(trainer, loader, capsys, schedule, expected):
    trainer(schedule, max_epochs=1).fit(module(DiceLoss()), loader(), loader())
    assert capsys.readouterr().out == f"change  {expected}\n"


def test_going_on_in_the_middle_of_an_epoch(tmp_path, trainer, loader):
    """Lightning does not call `on_train_epoch_start` then."""

    def saved():
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    class Each(Callback):
        values = ()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.values += (pl_module.loss.smooth[0],)

    def schedule():
        return LossSchedule("smooth", 5, 4, epochs=9)

    trainer(schedule(), saved(), max_epochs=1).fit(module(DiceLoss()), loader(8), loader())
    each, path = Each(), tmp_path / "step=1.ckpt"
    trainer(schedule(), each, saved(), max_epochs=1).fit(module(DiceLoss()), loader(8), loader(), ckpt_path=path)
    assert set(each.values) == {5.0}
