"""Losses compiled, copied, pickled and moved; a net with its activation exported."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import shutil

import pytest
import torch
from losses.family import CASES, FIRST, LOSSES, ids_of, in_turn, make_case, value_and_gradient
from torch import nn

from lightning_dice.losses import OnProbabilities

first_in_turn = pytest.mark.parametrize(("case", "activation"), in_turn(FIRST), ids=ids_of(in_turn(FIRST)))
# The losses whose code differs, each with one activation, as a compilation takes seconds; compounds have the others.
NAMES = ("dice_ce", "compound", "generalized_dice", "focal_tversky", "log_dice", "on_probabilities")
COMPILED = [
    (case, ("sigmoid", "softmax")[turn % 2]) for turn, case in enumerate(case for case in FIRST if case.id in NAMES)
]
QUICK = ("dice_ce",)
WEIGHTS = [1.0, 2.0, 0.5]
UNWEIGHTED = {"BoundaryLoss", "GeneralizedDiceLoss", "HausdorffLoss", "OnProbabilities"}
WEIGHTED = set(LOSSES) - UNWEIGHTED


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    # Later releases set it with `fullgraph=True`.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


def assert_same(compiled, loss, logits, target):
    value, gradient = value_and_gradient(compiled, logits, target)
    expected, expected_gradient = value_and_gradient(loss, logits, target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize(
    ("case", "activation"),
    [
        pytest.param(*pair, id=name, marks=[] if pair[0].id in QUICK else pytest.mark.slow)
        for pair, name in zip(COMPILED, ids_of(COMPILED), strict=True)
    ],
)
def test_compiles_without_a_break(case, activation):
    loss = case.loss(activation, ignore_index=255, class_weights=WEIGHTS, absent="penalize")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(compiled, loss, *make_case(1, activation, shape=(2, 3, 8, 6)))
    # Another size of batch and image, which makes the shapes dynamic.
    assert_same(compiled, loss, *make_case(2, activation, shape=(3, 3, 5, 9)))


@pytest.mark.slow
@pytest.mark.parametrize("inner", [nn.SmoothL1Loss(), nn.BCELoss(), nn.MSELoss(reduction="sum")], ids=repr)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", None])
def test_a_loss_of_probabilities_compiles_with_any_number_of_ignored_pixels(inner, activation):
    loss = OnProbabilities(inner, activation=activation, ignore_index=255)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logits, target = make_case(1, activation, ignored=0.3)
    some_more = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    for ignored in (target, target.masked_fill(some_more, 255), torch.full_like(target, 255)):
        assert_same(compiled, loss, logits, ignored)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize(("name", "activation"), [("dice", "sigmoid"), ("dice_ce", "softmax")])
def test_compiles_to_machine_code(name, activation):
    loss = next(case for case in CASES if case.id == name).loss(activation, ignore_index=255)
    compiled = torch.compile(loss, fullgraph=True)
    assert_same(compiled, loss, *make_case(1, activation, shape=(2, 3, 8, 6), dtype=torch.float32))


@first_in_turn
def test_copies_and_pickles(case, activation):
    loss = case.loss(activation, ignore_index=255, class_weights=WEIGHTS)
    logits, target = make_case(3, activation)
    value = loss(logits, target)
    saved = io.BytesIO()
    torch.save(loss, saved)
    saved.seek(0)
    for same in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), torch.load(saved, weights_only=False)):
        assert same(logits, target) == value
        assert repr(same) == repr(loss)
        same.load_state_dict({name: torch.ones(7) for name, _ in loss.named_buffers()})
        assert same(logits, target) == value


@first_in_turn
def test_moved_to_another_dtype(case, activation):
    weights = [0.3, 0.5, 0.2]  # rounded in float16
    loss = case.loss(activation, ignore_index=255, class_weights=weights)
    logits, target = make_case(3, activation, dtype=torch.float32)
    for dtype, rtol in ((torch.float64, 1e-6), (torch.float16, 1e-3)):
        moved = copy.deepcopy(loss).to(dtype)
        assert all(buffer.dtype == dtype for buffer in moved.buffers())
        value = moved(logits, target)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(logits, target), rtol=rtol, atol=0)


@pytest.mark.parametrize("case", FIRST, ids=lambda case: case.id)
def test_class_weights_are_buffers(case):
    if "class_weights" not in case.row.takes:
        pytest.skip("has no class weights")
    buffers = dict(case.loss(class_weights=WEIGHTS).named_buffers())
    assert buffers
    assert all(name.split(".")[-1] == "class_weights" for name in buffers)
    assert not list(case.loss(class_weights=WEIGHTS).parameters())
    assert all(buffer.is_meta for buffer in case.loss(class_weights=WEIGHTS).to("meta").buffers())


@pytest.mark.parametrize("name", LOSSES)
def test_class_weights_are_a_setting_and_no_state(name):
    """A state of version 0.2, which holds them, is loaded into a loss with other weights or none without effect."""
    losses = [LOSSES[name](activation="softmax")]
    with contextlib.suppress(TypeError, ValueError):
        losses.append(LOSSES[name](activation="softmax", class_weights=WEIGHTS))
    logits, target = make_case(3, "softmax", shape=(2, 3, 8, 6), ignored=0.0)
    former = {key: torch.tensor([9.0, 1.0, 1.0]) for loss in losses for key, _ in loss.named_buffers()}
    for loss in losses:
        value = loss(logits, target)
        assert not loss.state_dict()
        loss.load_state_dict(former, strict=True)
        assert loss(logits, target) == value
        with pytest.raises(RuntimeError, match="Unexpected key"):
            loss.load_state_dict({"other": torch.zeros(1)})
    assert (len(former) > 0) == (name in WEIGHTED)


class Probabilities(nn.Module):
    """A net and the activation of the loss that trained it."""

    def __init__(self, net, activation):
        super().__init__()
        self.net, self.activation = net, activation

    def forward(self, image):
        logits = self.net(image)
        return logits.sigmoid() if self.activation == "sigmoid" else logits.softmax(1)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.filterwarnings("ignore")  # the exporter's own
class TestExport:
    def net(self, activation):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
        loss = FIRST[0].loss(activation)
        return Probabilities(net, loss.activation).eval(), torch.randn(2, 1, 8, 8)

    def test_torch_export(self, activation):
        net, image = self.net(activation)
        size = torch.export.Dim.AUTO
        program = torch.export.export(net, (image,), dynamic_shapes=({0: size, 2: size, 3: size},))
        other = torch.randn(3, 1, 6, 10)
        torch.testing.assert_close(program.module()(other), net(other))

    def test_onnx(self, activation, tmp_path):
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")
        net, image = self.net(activation)
        path = tmp_path / "net.onnx"
        torch.onnx.export(net, (image,), path, dynamo=False, input_names=["image"], output_names=["probs"])
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (probs,) = session.run(None, {"image": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(probs), net(image).detach(), rtol=1e-5, atol=1e-6)
