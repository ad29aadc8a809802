from collections import OrderedDict

import lightning.pytorch as pl
import pytest
import torch
from helpers import LEAN, SMALL, refused, run_command, run_ranks
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from squares import Cases, load
from torch import nn

from lightning_dice import SegmentationModule
from lightning_dice.callbacks import FreezeSchedule, GradientGuard


class Net(nn.Module):
    def __init__(self, norm=True):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2) if norm else nn.Identity(), nn.Dropout(0.0))
        self.decoder = nn.Conv2d(2, 2, 1)
        self.head = nn.Conv2d(2, 1, 1)

    def forward(self, image):
        return self.head(self.decoder(self.encoder(image)).relu())


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def module(optimizer=adamw, **kwargs):
    torch.manual_seed(0)
    return SegmentationModule(Net(), nn.BCEWithLogitsLoss(), {}, optimizer, **kwargs)


class Watch(Callback):
    """At the start of each batch: weights, and who is in evaluation mode or without a gradient."""

    def __init__(self):
        self.states, self.evaluating, self.needing, self.norms = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.states.append({name: value.clone() for name, value in pl_module.net.state_dict().items()})
        self.evaluating.append({name for name, one in pl_module.net.named_modules() if not one.training})
        self.needing.append({name for name, one in pl_module.net.named_parameters() if one.requires_grad})

    def changed(self, epoch, batches=2):
        """The parts of which something changed in an epoch."""
        first, last = self.states[epoch * batches], self.states[(epoch + 1) * batches]
        return {name.split(".")[0] for name, value in first.items() if not torch.equal(value, last[name])}


@pytest.mark.parametrize("optimizer", [adamw, sgd])
def test_what_is_frozen_stays_and_the_rest_learns(trainer, loader, optimizer):
    watch, model = Watch(), module(optimizer)
    schedule = FreezeSchedule({"encoder": 2, "head": [3, None], "decoder": [1, 2]})
    trainer(watch, schedule, max_epochs=5).fit(model, loader(), loader())
    # Momentum of the head remains after epoch 2, and would move it.
    assert [watch.changed(epoch) for epoch in range(4)] == [
        {"decoder", "head"}, {"head"}, {"encoder", "decoder", "head"}, {"encoder", "decoder"},
    ]  # fmt: skip
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batch_norm_evaluates_while_it_is_frozen_and_dropout_does_not(trainer, loader):
    watch, model = Watch(), module()
    trainer(watch, FreezeSchedule({"encoder": 2}), max_epochs=4).fit(model, loader(), loader())
    # Two batches an epoch, with a validation after each epoch, which must not change it.
    assert watch.evaluating == [{"encoder.1"}] * 4 + [set()] * 4
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        values = [state[f"encoder.1.{name}"] for state in watch.states]
        assert all(torch.equal(values[0], value) for value in values[:5])
        assert not torch.equal(values[0], values[5])
    assert model.net.encoder[1].training


def test_one_process_needs_no_backward_pass_through_it(trainer, loader):
    watch = Watch()
    trainer(watch, FreezeSchedule({"encoder": 1}), max_epochs=2).fit(module(), loader(), loader())
    assert [any(name.startswith("encoder") for name in names) for names in watch.needing] == [False] * 2 + [True] * 2
    assert all({"decoder.weight", "head.weight"} <= names for names in watch.needing)


def test_the_optimizer_has_everything_from_the_start_and_a_second_training_too(trainer, loader):
    model = module()
    for _ in range(2):
        fit = trainer(FreezeSchedule({"encoder": 9}), max_epochs=1)
        fit.fit(model, loader(), loader())
        (group,) = fit.optimizers[0].param_groups
        assert {id(one) for one in group["params"]} == {id(one) for one in model.parameters()}


def test_with_micro_batches(trainer, loader):
    states = []
    for size in (None, 1):
        model = module(micro_batch_size=size)
        # In evaluation mode batch norm does not tell micro-batches from the batch.
        trainer(FreezeSchedule({"encoder": 9}), max_epochs=2).fit(model, loader(), loader())
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name])


def test_the_norm_that_clips_does_not_count_it(tmp_path, trainer, loader):
    fit = trainer(GradientGuard(tmp_path), FreezeSchedule({"encoder": 9}), max_epochs=1)
    fit.fit(module(), loader(), loader())
    logged = float(fit.callback_metrics["train/grad_norm"])
    model = module()
    for parameter in model.net.encoder.parameters():
        parameter.requires_grad_(False)
    model.net.encoder[1].eval()
    norms, optimizer = [], adamw(model.parameters())
    for batch in loader():
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model.net(batch.image), batch.mask.float()).backward()
        grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        norms.append(float(torch.cat(grads).norm()))
        optimizer.step()
    assert logged == pytest.approx(sum(norms) / 2, rel=1e-5)


def test_going_on_in_the_middle_of_the_schedule_is_exact(tmp_path, trainer, loader):
    def fit(epochs, resumed=None):
        model, saved = module(), ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
        watch = Watch()
        trainer(watch, FreezeSchedule({"encoder": 3, "head": [1, 3]}), saved, max_epochs=epochs).fit(
            model, loader(), loader(), ckpt_path=resumed, weights_only=True
        )
        return model.state_dict(), watch

    whole, _ = fit(5)
    fit(2)
    resumed, watch = fit(5, tmp_path / "last.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert watch.changed(0) == {"decoder"}


def test_going_on_in_the_middle_of_an_epoch(tmp_path, trainer, loader):
    """Lightning does not call `on_train_epoch_start` then."""
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(FreezeSchedule({"encoder": 3}), saved, max_epochs=1).fit(module(), loader(8), loader())
    watch = Watch()
    again = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(watch, FreezeSchedule({"encoder": 3}), again, max_epochs=1).fit(
        module(), loader(8), loader(), ckpt_path=tmp_path / "step=1.ckpt", weights_only=True
    )
    assert watch.evaluating == [{"encoder.1"}] * len(watch.evaluating)
    assert len(watch.evaluating) > 1


def test_a_training_that_breaks_off_leaves_the_net_as_it_was(trainer, loader):
    class Breaks(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("out of luck")

    model = module()
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(FreezeSchedule({"encoder": 9}), Breaks(), max_epochs=1).fit(model, loader(), loader())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.net.encoder[1].training


def test_what_was_frozen_by_hand_stays_so(trainer, loader):
    model = module()
    model.net.encoder[0].weight.requires_grad_(False)
    before = model.net.encoder[0].weight.clone()
    trainer(FreezeSchedule({"encoder": 1}), max_epochs=2).fit(model, loader(), loader())
    assert torch.equal(before, model.net.encoder[0].weight)
    assert not model.net.encoder[0].weight.requires_grad


def test_parts_of_a_compiled_net_and_beginnings_of_names(trainer, loader):
    torch.manual_seed(0)
    net = Net()
    model = SegmentationModule(torch.compile(net, backend="eager"), nn.BCEWithLogitsLoss(), {}, adamw)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trainer(FreezeSchedule({"encoder.0": 9, "de": 9}), max_epochs=1).fit(model, loader(), loader())
    changed = {name for name, value in net.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"encoder.1.weight", "encoder.1.bias", "head.weight", "head.bias"}


def test_it_is_said(trainer, loader, capsys):
    parts = {"encoder": 5, "decoder": 1, "head": [2, None], "head.bias": 0}
    trainer(FreezeSchedule(parts), max_epochs=1).fit(module(), loader(), loader())
    assert capsys.readouterr().out == (
        "freeze  encoder in epochs 0 to 4, decoder in epoch 0, head from epoch 2 on, head.bias in no epoch\n"
    )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["encoder"], "parts must map names, such as 'encoder', to epochs, got"),
        ({"": 1}, "parts must map names"),
        ({"encoder": -1}, r"parts\['encoder'\] must be the first epoch in which the part is trained, or a pair"),
        ({"encoder": True}, r"parts\['encoder'\] must be"),
        ({"encoder": 1.5}, r"parts\['encoder'\] must be"),
        ({"encoder": "ab"}, r"parts\['encoder'\] must be"),
        ({"encoder": [1]}, r"parts\['encoder'\] must be"),
        ({"encoder": [None, 1]}, r"parts\['encoder'\] must be"),
        ({"encoder": [3, 2]}, r"parts\['encoder'\] must not end before it begins, got \[3, 2\]"),
    ],
)
def test_refuses(parts, message):
    with pytest.raises(ValueError, match=message):
        FreezeSchedule(parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"encodr": 1},
            "net, a Net, has no parameters in 'encodr', only in encoder, decoder, head; did you mean enc",
        ),
        ({"encoder.2": 1}, "no parameters in 'encoder.2'"),
        (None, "parts names nothing to freeze: .* has encoder, decoder, head"),
        (
            {"encoder": 4, "decoder": [2, 3], "head": [1, 3]},
            r"parts must leave something to train: in epoch 2, \['decoder', 'encoder', 'head'\] is the whole network",
        ),
    ],
)
def test_refuses_before_training(trainer, loader, parts, message):
    with pytest.raises(ValueError, match=message):
        trainer(FreezeSchedule(parts), max_epochs=1).fit(module(), loader(), loader())


class Pixels(nn.BCEWithLogitsLoss):
    """Cross-entropy in float64."""

    def forward(self, logits, mask):
        return super().forward(logits, mask.to(logits))


class Weights(Callback):
    """The weights after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append([parameter.detach().flatten().tolist() for parameter in pl_module.net.parameters()])


def train_in_parts(folder, processes):
    """Train on one or two processes, of which each step sees all cases; returns weights, the last norm."""
    torch.manual_seed(0)
    data = load(Cases(8), 4 // processes)
    net = nn.Sequential(OrderedDict(encoder=nn.Conv2d(3, 2, 1), relu=nn.ReLU(), head=nn.Conv2d(2, 1, 1)))
    module = SegmentationModule(net, Pixels(), {}, lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1))
    weights = Weights()
    trainer = pl.Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, max_epochs=6, precision="64-true",
        callbacks=[GradientGuard(folder), FreezeSchedule({"encoder": 2, "head": [4, None]}), weights],
        gradient_clip_val=0.05, num_sanity_val_steps=0, accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(module, data, data)
    return weights.seen, float(trainer.callback_metrics["train/grad_norm"])


@pytest.mark.process
def test_two_processes_are_one(tmp_path, capsys):
    one = train_in_parts(tmp_path, 1)
    ranks = run_ranks(train_in_parts, tmp_path, 2)
    first, second = ranks.results
    for printed in (capsys.readouterr().out, ranks.out):
        assert printed.count("freeze  encoder in epochs 0 to 1, head from epoch 4 on") == 1
    assert first == second
    assert first[1] == pytest.approx(one[1], rel=1e-9)
    assert len(one[0]) == len(first[0]) == 12
    for alone, together in zip(one[0], first[0], strict=True):
        for a, b in zip(alone, together, strict=True):
            assert a == pytest.approx(b, rel=1e-9, abs=1e-12)
    for seen in (one[0], first[0]):
        encoder, head = ([weights[part : part + 2] for weights in seen] for part in (0, 2))
        assert all(weights == encoder[0] for weights in encoder[:4])
        assert encoder[4] != encoder[5] != encoder[11]
        assert head[3] != head[5]
        assert all(weights == head[7] for weights in head[7:])


def test_as_a_command(tmp_path):
    few = [*SMALL, *LEAN, "callbacks=[freeze]", "~callbacks.overlays", "~callbacks.history", "trainer.max_epochs=1"]
    out = run_command("fit", *few, "callbacks.freeze.parts={bias: 2, weight: [2, null]}", cwd=tmp_path).out
    assert "freeze  bias in epochs 0 to 1, weight from epoch 2 on" in out
    message = refused("fit", *few, "callbacks.freeze.parts={head: 1}", cwd=tmp_path)
    assert "net, a Conv2d, has no parameters in 'head', only in weight, bias" in message
