"""A batch in micro-batches trains as the whole batch does, and holds the activations of one of them."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import weakref
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_dice import DiceLoss, DiceScore, SegmentationModule
from lightning_dice.callbacks import InputCheck
from lightning_dice.cli.config import CONF_DIR, instantiate, register_resolvers
from lightning_dice.cli.errors import UserError
from lightning_dice.functional import read_logits
from lightning_dice.functional.micro_batches import micro_batched
from lightning_dice.functional.model_outputs import ModelOutput
from lightning_dice.losses import BoundaryLoss, DiceCELoss, HausdorffLoss

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")


def batch(images=5, classes=1, size=(13, 16), dtype=torch.float64):
    """Images of very different objects, on which means of ratios and ratios of sums differ."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(images, 1, *size, generator=generator, dtype=dtype)
    bar = torch.linspace(2, -1, images).view(-1, 1, 1, 1)
    mask = (image > bar).long()
    mask = mask if classes == 1 else mask[:, 0] + (image[:, 0] > bar[:, 0] + 0.5).long()
    return image, mask.masked_fill(torch.rand(mask.shape, generator=generator) < 0.2, 255)


class Net(nn.Module):
    """Two convolutions with perhaps something between; logits at half the size in any of the usual forms."""

    def __init__(self, form="tensor", between=None, classes=1):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, classes, 3, stride=2, padding=1)
        self.between, self.form, self.seen = between if between is not None else nn.Identity(), form, []

    def forward(self, image):
        self.seen.append(len(image))
        logits = self.last(self.between(self.first(image).tanh()))
        return {
            "tensor": logits,
            "out": {"out": logits, "aux": logits * 2},
            "logits": SimpleNamespace(logits=logits),
            "list": [logits, logits[..., ::2, ::2], logits[..., ::4, ::4] * 3],
        }[self.form]


def silent(module):
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    return module


def gradient(net):
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def step(net, loss, image, mask, most=None, **settings):
    """Loss and gradient of a training step, from the same random numbers each time."""
    score = DiceScore(net.last.out_channels, activation=loss.activation, ignore_index=255)
    module = silent(SegmentationModule(net, loss, score, micro_batch_size=most, **settings))
    net.zero_grad()
    torch.manual_seed(2)
    value = module.training_step((image, mask), 0)
    value.backward()
    return value.detach(), gradient(net)


def plain(net, image, most):
    """Forward passes of the micro-batches with nothing dropped and nothing computed again."""
    parts = [read_logits(net(part)) for part in image.tensor_split(-(-len(image) // most))]
    return [torch.cat(level) for level in zip(*parts, strict=True)]


def backward(run, net, image, most):
    net.zero_grad()
    torch.manual_seed(2)
    logits = run(net, image, most)[0]
    noise = torch.rand(3)  # What is drawn after the network must not move either.
    DiceLoss()(logits, (logits > 0).long()).backward()
    return logits.detach(), noise, torch.rand(3), gradient(net)


LOSSES = {
    "dice": (DiceLoss(pool="batch", ignore_index=255), 1),
    "dice-image": (DiceLoss(pool="image", ignore_index=255), 1),
    "dice-softmax": (DiceLoss(activation="softmax", ignore_index=255), 3),
    "dice-ce": (DiceCELoss(activation="softmax", ignore_index=255, class_weights=[1, 2, 3]), 3),
    "boundary": (BoundaryLoss(ignore_index=255), 1),
    "hausdorff": (HausdorffLoss(ignore_index=255), 1),
}


@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_the_whole_batch(name, most):
    loss, classes = LOSSES[name]
    net, (image, mask) = Net(classes=classes).double(), batch(classes=classes)
    whole = step(net, loss, image, mask)
    torch.testing.assert_close(step(net, loss, image, mask, most), whole, rtol=1e-12, atol=1e-15)
    assert max(net.seen[1:]) <= most


def test_accumulating_gradients_is_another_loss():
    net, (image, mask) = Net().double(), batch(6)
    loss = DiceLoss(ignore_index=255)
    _, whole = step(net, loss, image, mask)
    pairs = zip(image.split(2), mask.split(2), strict=True)
    mean = torch.stack([step(net, loss, *pair)[1] for pair in pairs]).mean(0)
    assert (mean - whole).norm() > 0.05 * whole.norm()


@pytest.mark.parametrize("size_divisor", [1, 8])
@pytest.mark.parametrize("form", ["tensor", "out", "logits", "list"])
def test_networks_of_any_output(form, size_divisor):
    net, (image, mask) = Net(form).double(), batch()
    whole = step(net, DiceLoss(ignore_index=255), image, mask, size_divisor=size_divisor)
    parts = step(net, DiceLoss(ignore_index=255), image, mask, 2, size_divisor=size_divisor)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-15)
    assert parts[1][:6].abs().min() > 0  # Of the first convolution, although no image needs a gradient.


def test_micro_batches_are_as_equal_as_can_be():
    net = Net()
    micro_batched(net, batch(9, dtype=torch.float32)[0], 4)
    assert net.seen == [3, 3, 3]
    net.seen.clear()
    step(net, DiceLoss(ignore_index=255), *batch(4, dtype=torch.float32), 4)
    assert net.seen == [4]  # Fits: nothing is computed again.


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_running_statistics_see_each_image_once(norm, momentum, train):
    layer = norm(6, momentum=momentum, track_running_stats=True, affine=True)
    net = Net(between=nn.Sequential(layer, nn.BatchNorm2d(6))).double().train(train)
    twin = copy.deepcopy(net)
    image = batch()[0]
    for _ in range(2):
        # To the last bit: they are the same operations.
        torch.testing.assert_close(
            backward(micro_batched, net, image, 2), backward(plain, twin, image, 2), rtol=0, atol=0
        )
        torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=0)
    if norm is nn.BatchNorm2d:
        assert layer.num_batches_tracked == (6 if train else 0)
    assert layer.momentum == momentum


class Counted(nn.Module):
    """Depends on a buffer that it changes, as spectral norm and batch renormalization do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, features):
        self.calls.add_(1)
        return (features * self.calls.item()).sin()


@pytest.mark.parametrize("layer", ["counted", "spectral-norm"])
def test_layers_that_read_what_they_change(layer):
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 1))
    net = Net(between=Counted() if layer == "counted" else conv).double()
    twin, image = copy.deepcopy(net), batch()[0]
    torch.testing.assert_close(backward(micro_batched, net, image, 2), backward(plain, twin, image, 2), rtol=0, atol=0)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_a_second_backward_pass_is_the_same():
    net = Net(between=nn.Sequential(Counted(), nn.Dropout2d(0.5))).double()
    loss = micro_batched(net, batch()[0], 2)[0].square().mean()
    loss.backward(retain_graph=True)
    first = gradient(net)
    net.zero_grad()
    loss.backward()
    assert torch.equal(gradient(net), first)


@pytest.mark.parametrize("layer", [nn.Dropout, nn.Dropout2d])
def test_dropout_is_replayed(layer):
    net, image = Net(between=layer(0.5)).double(), batch()[0]
    parts = backward(micro_batched, net, image, 2)
    torch.testing.assert_close(parts, backward(plain, net, image, 2), rtol=0, atol=0)
    other = backward(lambda *given: (torch.rand(1), plain(*given))[1], net, image, 2)
    assert (other[-1] - parts[-1]).norm() > 0.01 * parts[-1].norm()


class Fails(nn.Module):
    """Fails on one of its calls."""

    def __init__(self, call):
        super().__init__()
        self.norm, self.left = nn.BatchNorm2d(6), call

    def forward(self, features):
        features = self.norm(features)
        self.left -= 1
        if not self.left:
            raise RuntimeError("a full memory")
        return features


def test_an_error_leaves_the_network_as_it_was():
    net = Net(between=Fails(5)).double()  # Three micro-batches, and the second that is computed again.
    addresses = [buffer.data_ptr() for buffer in net.buffers()]
    loss = micro_batched(net, batch()[0], 2)[0].sum()
    after = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="a full memory"):
        loss.backward()
    torch.testing.assert_close(net.state_dict(), after, rtol=0, atol=0)
    assert [buffer.data_ptr() for buffer in net.buffers()] == addresses


def test_without_gradients_nothing_is_computed_again():
    module = module_of(Net().double().eval(), 2)
    image, mask = batch()
    with torch.no_grad():
        logits = module(image)
        assert module.net.seen == [2, 2, 1]
        module.micro_batch_size = None
        torch.testing.assert_close(module(image), logits, rtol=1e-12, atol=1e-14)
    module.micro_batch_size, module.net.seen = 2, []
    data = DataLoader(list(zip(image, mask, strict=True)), 5)
    trainer().validate(module, data, verbose=False)
    trainer().predict(module, data)
    assert module.net.seen == [2, 2, 1] * 2
    module.net.requires_grad_(False)
    assert not module(image).requires_grad  # Nothing to learn, but gradients are on.


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made in here that live at the same time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, weakref.WeakSet()

    def gone(self, size):
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.gone, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out


def peak_bytes(run, net, image, most):
    with LiveBytes() as memory:
        run(net, image, most)[0].square().mean().backward()
    return memory.peak


def test_the_activations_of_one_micro_batch_live_at_a_time():
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())]
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *layers, nn.Conv2d(8, 1, 1))
    image = torch.randn(16, 1, 32, 32)
    peaks = [peak_bytes(micro_batched, net, image, most) for most in (16, 8, 4, 2)]
    logits = 16 * 32 * 32 * 4
    # What does not shrink is a few tensors of the size of the logits.
    for more, fewer in itertools.pairwise(peaks):
        assert fewer < more / 2 + 3 * logits
    assert peaks[-1] < 0.2 * peaks[0]
    # All but what backward itself needs, which is smaller in parts.
    assert peak_bytes(plain, net, image, 2) > 0.8 * peaks[0]


def trainer(**settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "num_sanity_val_steps": 0, **settings})


def fit(module, image, mask, batch_size, **settings):
    data = DataLoader(list(zip(image, mask, strict=True)), batch_size)
    trainer(max_epochs=2, **settings).fit(module, data)
    return {name: value.clone() for name, value in module.net.state_dict().items()}


def module_of(net, most):
    optimizer = partial(torch.optim.SGD, lr=1.0)
    loss, score = DiceLoss(ignore_index=255), DiceScore(ignore_index=255)
    return SegmentationModule(net, loss, score, optimizer=optimizer, micro_batch_size=most)


def test_half_precision_is_the_same_when_computed_again(monkeypatch):
    dtypes = []
    fitted = []
    for run in (micro_batched, plain):
        monkeypatch.setattr(
            "lightning_dice.module.micro_batched_output",
            lambda net, image, size, _read, run=run: ModelOutput(run(net, image, size), []),
        )
        net = Net(between=nn.Sequential(nn.BatchNorm2d(6), nn.Dropout(0.2)))
        net.first.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
        torch.manual_seed(3)
        fitted.append(fit(module_of(net, 2), *batch(6, dtype=torch.float32), 6, precision="bf16-mixed"))
    assert dtypes == [torch.bfloat16] * (2 * (3 + 3) + 2 * 3)
    # The plain passes share one half-precision copy of the weights.
    torch.testing.assert_close(*fitted, rtol=1e-2, atol=1e-3)


def test_gradients_add_up_in_full_precision():
    net, image = Net(), batch(64, dtype=torch.float32)[0]
    errors = []
    backward(plain, net, image, 64)
    exact = gradient(net)
    for run in (micro_batched, plain):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = run(net, image, 1)[0]
        DiceLoss()(logits, (logits > 0).long()).backward()
        errors.append((gradient(net) - exact).norm() / exact.norm())
    assert errors[0] < errors[1] / 2


def test_clipping_and_accumulation_stay_possible():
    image, mask = batch(10)
    settings = {"gradient_clip_val": 1e-3, "accumulate_grad_batches": 2, "precision": "64-true"}
    parts, whole = (fit(module_of(Net().double(), most), image, mask, 5, **settings) for most in (2, None))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)
    assert not torch.equal(whole["last.weight"], Net().double().last.weight)


def test_the_check_of_the_first_output_does_not_disturb():
    data = DataLoader(list(zip(*batch(4, dtype=torch.float32), strict=True)), 4)
    check = InputCheck(["object"], "sigmoid", ignore_index=255)
    trainer(max_epochs=1, callbacks=[check]).fit(module_of(Net(), 2), data)


SCRIPT = """
import sys
import torch
from test_micro_batches import Net, batch, fit, module_of

if __name__ == "__main__":
    state = fit(module_of(Net().double(), 2), *batch(10), 5, precision="64-true", devices=2, strategy="ddp")
    torch.save(state, f"{sys.argv[1]}/{torch.distributed.get_rank()}.pt")
    # A process that ends while the other still talks to it may be killed by torch's own threads.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.process
def test_two_processes_equal_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(__file__).rpartition('/')[0]!r})\n{SCRIPT}")
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=180, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    # Five images a process, two at a time, against ten at once.
    one = fit(module_of(Net().double(), None), *batch(10), 10, precision="64-true")
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(state, one, rtol=1e-10, atol=1e-12)
    assert (one["first.weight"] - Net().double().first.weight).abs().max() > 1e-3


@pytest.mark.parametrize("value", [0, -1, True, False, 2.0, "2"])
def test_refuses_settings(value):
    with pytest.raises(ValueError, match="micro_batch_size must be None or an integer >= 1, got"):
        SegmentationModule(nn.Identity(), micro_batch_size=value)


@pytest.mark.parametrize(("value", "most"), [("2", 2), ("null", None)])
def test_is_a_setting_of_the_command(value, most):
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("fit", overrides=[f"module.micro_batch_size={value}", "folder=x"])
    assert instantiate(config.module, "module").micro_batch_size == most
    config.module.micro_batch_size = 0
    with pytest.raises(UserError, match="micro_batch_size must be None or an integer >= 1"):
        instantiate(config.module, "module")
