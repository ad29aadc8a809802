import math

import lightning.pytorch as pl
import pytest
import torch
from helpers import LEAN, SMALL, refused, run_command, run_ranks
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from squares import Cases, Net, collate, load
from torch import nn
from torch.utils.data import DataLoader

from lightning_dice import SegmentationModule
from lightning_dice.callbacks import (
    CollapseError,
    CollapseGuard,
    GradientGuard,
    History,
    NonFiniteError,
    SaveOnInterrupt,
)


class Broken(Cases):
    """Cases of which some hold a value that is not finite."""

    def __init__(self, count, broken=(), value=math.nan):
        super().__init__(count)
        self.broken, self.bad = broken, value

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index in self.broken:
            sample.image[0, 0, 0] = self.bad
        return sample


def cases(count=8, broken=(), batch_size=2, value=math.nan):
    return load(Broken(count, broken, value), batch_size)


def module(loss=None, **kwargs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))
    return SegmentationModule(net, loss, {}, **kwargs)


class Steps(Callback):
    """The state after each batch."""

    def __init__(self):
        self.states, self.norms = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        numbers = [v for p in pl_module.parameters() for v in p.grad.double().flatten().tolist()]
        self.norms.append(math.sqrt(sum(v * v for v in numbers)))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def equal(one, two):
    return all(torch.equal(value, two[name]) for name, value in one.items())


def files(folder):
    return sorted(path.name for path in (folder / "non_finite").glob("*"))


@pytest.mark.parametrize("clip", [None, 1e-6])
def test_the_norm_before_clipping_is_logged_as_a_mean_over_steps(tmp_path, trainer, clip):
    steps = Steps()
    fit = trainer(
        History(tmp_path), steps, GradientGuard(tmp_path), max_epochs=1, accumulate_grad_batches=2,
        gradient_clip_val=clip,
    )  # fmt: skip
    fit.fit(module(), cases(), cases())
    assert len(steps.norms) == 2
    logged = float(fit.callback_metrics["train/grad_norm"])
    assert logged == pytest.approx(sum(steps.norms) / 2, rel=1e-5)
    assert f"{logged:.5g}"[:5] in (tmp_path / "metrics.csv").read_text()
    assert files(tmp_path) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_it_stops_before_the_weights_change_and_names_the_cases(tmp_path, trainer, value):
    steps, model = Steps(), module()
    fit = trainer(steps, GradientGuard(tmp_path), SaveOnInterrupt(tmp_path), max_epochs=2)
    with pytest.raises(NonFiniteError) as caught:
        fit.fit(model, cases(broken=[5], value=value), cases())
    message = str(caught.value)
    assert "the loss and the gradients of epoch 0, step 2 are not finite" in message
    assert "cases case04, case05 with images that are not finite: case05" in message
    for word in ("optimizer.lr", "trainer.gradient_clip_val=1", "bf16-mixed", "callbacks.gradient_guard.action=skip"):
        assert word in message
    assert equal(steps.states[1], model.state_dict())
    assert files(tmp_path) == ["epoch_0_step_2_rank0.pt"]
    saved = torch.load(tmp_path / "non_finite/epoch_0_step_2_rank0.pt", weights_only=True)
    assert saved["case"] == ["case04", "case05"]
    assert saved["not_finite"] == ["input", "logits", "loss", "gradient"]
    expected = collate([Broken(8, [5], value)[index] for index in (4, 5)])
    assert torch.equal(saved["image"].nan_to_num(), expected.image.nan_to_num())
    assert torch.equal(saved["mask"], expected.mask)
    assert (saved["epoch"], saved["step"], saved["rank"]) == (0, 2, 0)
    assert model.net.training
    assert not (tmp_path / "checkpoints").exists()


class Plus(nn.Module):
    """A loss to which something is added at certain calls."""

    def __init__(self, add, calls):
        super().__init__()
        self.add, self.calls, self.called = add, calls, 0

    def forward(self, logits, mask):
        self.called += 1
        loss = nn.functional.binary_cross_entropy_with_logits(logits, mask.float())
        return loss + self.add(logits) if self.called in self.calls else loss


def test_a_loss_that_is_not_finite_with_finite_gradients(tmp_path, trainer):
    with pytest.raises(
        NonFiniteError, match=r"^the loss of epoch 0, step 1 are not finite.*cases case02, case03 \(sav"
    ):
        trainer(GradientGuard(tmp_path), max_epochs=1, num_sanity_val_steps=0).fit(
            module(Plus(lambda logits: math.inf, [2])), cases(), cases()
        )
    saved = torch.load(tmp_path / "non_finite/epoch_0_step_1_rank0.pt", weights_only=True)
    assert saved["not_finite"] == ["loss"]


class InfiniteSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 0

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def test_gradients_that_are_not_finite_with_a_finite_loss(tmp_path, trainer):
    loss = Plus(lambda logits: InfiniteSlope.apply(logits).mean(), [3])
    with pytest.raises(NonFiniteError, match=r"^the gradients of epoch 0, step 1 are.*cases case00, .*, case03|case07"):
        trainer(GradientGuard(tmp_path), max_epochs=1, accumulate_grad_batches=2, num_sanity_val_steps=0).fit(
            module(loss), cases(), cases()
        )
    (name,) = files(tmp_path)
    assert torch.load(tmp_path / "non_finite" / name, weights_only=True)["not_finite"] == ["gradient"]


def test_the_cause_among_accumulated_batches(tmp_path, trainer):
    with pytest.raises(NonFiniteError, match="cases case02, case03 with images that are not finite: case02"):
        trainer(GradientGuard(tmp_path), max_epochs=1, accumulate_grad_batches=4).fit(
            module(), cases(broken=[2]), cases()
        )
    saved = torch.load(tmp_path / "non_finite/epoch_0_step_0_rank0.pt", weights_only=True)
    assert saved["case"] == ["case02", "case03"]


def test_a_large_norm_that_overflows_is_no_reason(tmp_path, trainer):
    loss = Plus(lambda logits: logits.mean() * 1e30, [1])
    model = module(loss, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    fit = trainer(GradientGuard(tmp_path), max_epochs=1, num_sanity_val_steps=0)
    fit.fit(model, cases(), cases())
    assert math.isfinite(fit.callback_metrics["train/grad_norm"])
    assert files(tmp_path) == []


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_leaves_everything_as_it_was(tmp_path, trainer, accumulate):
    """With momentum and weight decay, which would move weights without a gradient; and batch norm's statistics."""

    def optimizer(parameters):
        return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)

    steps, model = Steps(), module(optimizer=optimizer)
    fit = trainer(
        steps, GradientGuard(tmp_path, action="skip"), max_epochs=1, accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"case05.*The step is skipped, number 1 of 3 in a row"):
        fit.fit(model, cases(broken=[5]), cases())
    if accumulate == 1:
        assert equal(steps.states[1], steps.states[2])
        assert not equal(steps.states[2], steps.states[3])
        # As if the batch had never been there.
        without = DataLoader([Cases(8)[index] for index in (0, 1, 2, 3, 6, 7)], 2, collate_fn=collate)
        again = module(optimizer=optimizer)
        trainer(max_epochs=1, gradient_clip_val=1.0).fit(again, without, cases())
        assert equal(model.state_dict(), again.state_dict())
    else:
        assert equal(steps.states[1], model.state_dict())
    assert math.isfinite(fit.callback_metrics["train/grad_norm"])
    assert fit.global_step == 4 // accumulate


@pytest.mark.filterwarnings("ignore:.*number 1 of 2 in a row")
def test_too_many_skips_in_a_row_stop(tmp_path, trainer):
    guard = GradientGuard(tmp_path, action="skip", max_skips=2, max_files=1)
    with (
        pytest.raises(NonFiniteError, match="It follows 2 skipped steps"),
        pytest.warns(UserWarning, match="number 2 of 2"),
    ):
        trainer(guard, max_epochs=1).fit(module(), cases(broken=range(2, 8)), cases())
    assert files(tmp_path) == ["epoch_0_step_1_rank0.pt"]


def test_skips_that_are_not_in_a_row_do_not_add_up(tmp_path, trainer):
    with pytest.warns(UserWarning, match="number 1 of 1"):
        trainer(GradientGuard(tmp_path, action="skip", max_skips=1), max_epochs=2).fit(
            module(), cases(broken=[2, 6]), cases()
        )
    assert len(files(tmp_path)) == 4


def test_going_on_counts_on(tmp_path, trainer):
    def fit(epochs, resumed=None):
        guard = GradientGuard(tmp_path, action="skip", max_skips=1)
        saved = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
        trainer(guard, saved, max_epochs=epochs).fit(
            module(), cases(4, broken=[2] if resumed is None else [0]), cases(), ckpt_path=resumed, weights_only=True
        )

    with pytest.warns(UserWarning, match="number 1 of 1"):
        fit(1)
    with pytest.raises(NonFiniteError, match="It follows 1 skipped step"):
        fit(2, tmp_path / "last.ckpt")


def half(scale=2.0**16):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6))


def test_infinite_gradients_of_float16_are_the_scalers(tmp_path, trainer):
    precision = half(2.0**40)
    fit = trainer(GradientGuard(tmp_path), plugins=[precision], max_epochs=8)
    fit.fit(module(), cases(), cases())
    assert precision.scaler.get_scale() < 2.0**40
    assert files(tmp_path) == []


def test_a_loss_of_float16_that_is_not_finite_counts(tmp_path, trainer):
    with pytest.raises(NonFiniteError, match="case05"):
        trainer(GradientGuard(tmp_path), plugins=[half()], max_epochs=1).fit(module(), cases(broken=[5]), cases())
    model, steps = module(), Steps()
    with pytest.warns(UserWarning, match=r"case05.*The step is skipped"):
        trainer(steps, GradientGuard(tmp_path, action="skip"), plugins=[half()], max_epochs=1).fit(
            model, cases(broken=[5]), cases()
        )
    assert equal(steps.states[1], steps.states[2])
    assert not equal(steps.states[2], steps.states[3])


def test_a_file_that_cannot_be_written_does_not_hide_the_news(tmp_path, trainer):
    (tmp_path / "non_finite").write_text("a file where the folder should be")
    with pytest.raises(NonFiniteError, match=r"case05 \(could not save them"):
        trainer(GradientGuard(tmp_path), max_epochs=1).fit(module(), cases(broken=[5]), cases())


def test_batches_without_names(tmp_path, trainer):
    pairs = [(torch.full((3, 4, 4), math.nan if i == 3 else 1.0), torch.zeros(1, 4, 4)) for i in range(4)]
    with pytest.raises(NonFiniteError, match="images that are not finite: 1 of the batch"):
        trainer(GradientGuard(tmp_path), max_epochs=1).fit(module(), DataLoader(pairs, 2), DataLoader(pairs[:2], 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "warn"}, "action must be one of 'stop', 'skip', got 'warn'"),
        ({"max_skips": 0}, "max_skips must be an integer >= 1, got 0"),
        ({"max_files": -1}, "max_files must be an integer >= 0, got -1"),
    ],
)
def test_gradient_guard_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        GradientGuard("folder", **settings)


def test_a_run_that_diverges_ends_with_one_message_and_keeps_its_checkpoint(tmp_path):
    few = [*SMALL, *LEAN, "callbacks=[exact_resume,gradient_guard,checkpoint,interrupt]", "scheduler=constant"]
    run_command("fit", *few, "trainer.max_epochs=1", "data.batch_size=4", "folder=run", cwd=tmp_path)
    last = tmp_path / "run/checkpoints/last.ckpt"
    before = last.read_bytes()
    message = refused("fit", "resume=run", "trainer.max_epochs=3", "optimizer.lr=1e30", cwd=tmp_path)
    assert "are not finite (NaN or infinite): cases train" in message
    assert "last.ckpt is unchanged" in message
    assert last.read_bytes() == before
    assert len(files(tmp_path / "run")) == 1


class TestCollapse:
    @pytest.mark.parametrize(
        ("activation", "excluded", "predicted", "actual", "count", "expected"),
        [
            ("sigmoid", [], [0], [5], [100], "no pixel has been predicted as 'a', though the masks hold 5"),
            ("sigmoid", [], [1], [5], [100], None),
            ("sigmoid", [], [0], [0], [100], None),
            ("sigmoid", [], [100], [5], [100], "every pixel has been predicted as 'a', though only 5.0% are"),
            ("sigmoid", [], [100], [100], [100], None),
            ("sigmoid", [], [0], [0], [0], None),
            ("sigmoid", [], [0, 0], [0, 7], [100, 100], "no pixel has been predicted as 'a' or 'b', though the masks"),
            ("sigmoid", [], [0, 1], [7, 7], [100, 100], None),
            ("sigmoid", [], [100, 90], [3, 7], [100, 90], "every pixel has been predicted as 'a' and 'b', though only"),
            ("sigmoid", [], [100, 89], [3, 7], [100, 90], None),
            ("sigmoid", [1], [0, 90], [3, 7], [100, 90], "no pixel has been predicted as 'a', though the masks hold 3"),
            ("softmax", [0], [100, 0, 0], [90, 5, 5], [100] * 3, "no pixel has been predicted as 'b' or 'c', though"),
            ("softmax", [0], [99, 1, 0], [90, 5, 5], [100] * 3, None),
            ("softmax", [0], [100, 0, 0], [100, 0, 0], [100] * 3, None),
            ("softmax", [], [100, 0, 0], [100, 0, 0], [100] * 3, None),
            ("softmax", [0], [0, 100, 0], [90, 5, 5], [100] * 3, "every pixel has been predicted as 'b', though only"),
            (
                "softmax",
                [],
                [100, 0, 0],
                [90, 5, 5],
                [100] * 3,
                "every pixel has been predicted as 'a', though only 90",
            ),
            ("softmax", [0, 1], [60, 40, 0], [90, 5, 5], [100] * 3, "no pixel has been predicted as 'c', though the"),
        ],
    )
    def test_table(self, activation, excluded, predicted, actual, count, expected):
        guard = CollapseGuard(["a", "b", "c"][: len(count)], activation, exclude_classes=excluded)
        message = guard.describe_collapse(predicted, actual, count)
        assert message is None if expected is None else message.startswith(expected)

    @staticmethod
    def still(net, bias, **kwargs):
        """A net that predicts the same everywhere, and does not learn."""
        model = net(**kwargs)
        model.net.weight.data.zero_()
        model.net.bias.data.copy_(torch.tensor(bias))
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
        return model

    @pytest.mark.parametrize(
        ("bias", "description"),
        [
            (-3.0, "no pixel has been predicted as 'a', though the masks hold 132"),
            (3.0, "every pixel has been predicted"),
        ],
    )
    def test_it_warns_once_with_causes_and_remedies(self, trainer, net, loader, bias, description):
        def fit(epochs):
            trainer(CollapseGuard(["a"], "sigmoid"), max_epochs=epochs).fit(self.still(net, [bias]), loader(), loader())

        fit(2)
        with pytest.warns(UserWarning, match="in a row") as caught:
            fit(6)
        (message,) = [str(one.message) for one in caught if "in a row" in str(one.message)]
        assert message.startswith(f"for 3 validations in a row {description}")
        for word in ("loss=dice_ce", "loss.absent=penalize", "optimizer.lr", "warmup_cosine", "normalize=image"):
            assert word in message

    def test_softmax_with_ignored_pixels(self, trainer, net):
        """The only pixels predicted as the class are ignored."""

        class Ignored(Cases):
            def __getitem__(self, index):
                sample = super().__getitem__(index)
                sample.image[:, 0] = 100.0
                sample.image[:, 1:] = -100.0
                sample.mask[0] = 255
                return sample

        data = DataLoader(Ignored(4, activation="softmax"), 2, collate_fn=collate)
        clean = [sample._replace(mask=sample.mask.clamp(max=1)) for sample in Ignored(4, activation="softmax")]

        def fit(validated, ignore_index):
            model = self.still(net, [0.0, 0.0], classes=2, activation="softmax")
            model.net.weight.data[1].fill_(1.0)
            facts = {"classes": ["back", "a"], "activation": "softmax", "exclude_classes": [0], "patience": 1}
            guard = CollapseGuard(**facts, ignore_index=ignore_index, action="stop")
            trainer(guard, max_epochs=1).fit(model, data, validated)

        fit(DataLoader(clean, 2, collate_fn=collate), None)
        with pytest.raises(CollapseError, match="for 1 validation in a row no pixel has been predicted as 'a'"):
            fit(data, 255)

    def test_recovering_starts_anew(self, trainer, net, loader):
        class Recovers(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                pl_module.net.bias.data.fill_(3.0 if trainer.current_epoch == 2 else -3.0)
                pl_module.net.weight.data[0, 0].fill_(100.0 if trainer.current_epoch == 2 else 0.0)

        trainer(CollapseGuard(["a"], "sigmoid", action="stop"), Recovers(), max_epochs=5).fit(
            self.still(net, [-3.0]), loader(), loader()
        )
        with pytest.raises(CollapseError):
            trainer(CollapseGuard(["a"], "sigmoid", action="stop"), Recovers(), max_epochs=6).fit(
                self.still(net, [-3.0]), loader(), loader()
            )

    def test_going_on_counts_on(self, tmp_path, trainer, net, loader):
        def fit(epochs, resumed=None):
            saved = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
            trainer(CollapseGuard(["a"], "sigmoid", action="stop"), saved, max_epochs=epochs).fit(
                self.still(net, [-3.0]), loader(), loader(), ckpt_path=resumed, weights_only=True
            )

        fit(2)
        with pytest.raises(CollapseError, match="for 3 validations in a row"):
            fit(3, tmp_path / "last.ckpt")

    def test_scoring_alone_is_not_watched(self, trainer, net, loader):
        trainer(CollapseGuard(["a"], "sigmoid", patience=1, action="stop")).validate(
            self.still(net, [-3.0]), loader(), verbose=False
        )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"activation": None}, "activation must be one of 'sigmoid', 'softmax', got None"),
            ({"action": "skip"}, "action must be one of 'warn', 'stop', got 'skip'"),
            ({"patience": 0}, "patience must be an integer >= 1, got 0"),
        ],
    )
    def test_refuses(self, settings, message):
        with pytest.raises(ValueError, match=message):
            CollapseGuard(**{"classes": ["a"], "activation": "sigmoid"} | settings)


class Odd(Net):
    """Its loss is not finite for one case, and its gradients are; it sees foreground in one case at most."""

    def __init__(self, sees):
        super().__init__()
        self.sees = sees

    def training_step(self, batch, batch_idx):
        loss, _ = self._step(batch)
        return loss + math.nan if "case05" in batch.case else loss

    def validation_step(self, batch, batch_idx):
        seen = [1.0 if case == self.sees else -1.0 for case in batch.case]
        return {"logits": torch.tensor(seen).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)


class Weights(Callback):
    """The weights after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append([v for p in pl_module.parameters() for v in p.detach().flatten().tolist()])


def guarded(folder, action, sees):
    """Train as one of two ranks; returns what stopped it, and the weights after each step."""
    torch.manual_seed(0)
    weights = Weights()
    guards = [GradientGuard(folder, action=action), CollapseGuard(["a"], "sigmoid", patience=1, action="stop")]
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False, max_epochs=1,
        enable_progress_bar=False, callbacks=[*guards, weights], num_sanity_val_steps=0,
    )  # fmt: skip
    message = None
    try:
        trainer.fit(Odd(sees), load(Cases(8)), load(Cases(8)))
    except (NonFiniteError, CollapseError) as error:
        message = str(error)
    return message, weights.seen


@pytest.mark.process
def test_two_processes_stop_together_and_the_one_that_knows_saves(tmp_path):
    ranks = run_ranks(guarded, tmp_path, "stop", "case03")
    assert files(tmp_path) == ["epoch_0_step_1_rank1.pt"]
    saved = torch.load(tmp_path / "non_finite/epoch_0_step_1_rank1.pt", weights_only=True)
    assert "case05" in saved["case"]
    assert "loss" in saved["not_finite"]
    for message, weights in ranks.results:
        assert f"cases {', '.join(saved['case'])} on rank 1 (saved" in message
        assert "rank 0" not in message
        assert len(weights) == 1


@pytest.mark.process
def test_two_processes_skip_together(tmp_path):
    ranks = run_ranks(guarded, tmp_path, "skip", "case03")
    assert ranks.err.count("The step is skipped, number 1 of 3") == 1
    (message, first), (other, second) = ranks.results
    assert first == second
    assert first[0] == first[1]
    assert message is other is None


@pytest.mark.process
def test_two_processes_judge_all_predictions(tmp_path):
    pixels = sum(int(sample.mask.sum()) for sample in Cases(8))
    for message, _ in run_ranks(guarded, tmp_path, "skip", "none").results:
        assert message.startswith("for 1 validation in a row no pixel has been predicted as 'a'")
        assert f"though the masks hold {pixels}" in message
