"""Losses compiled, copied, pickled and moved; a net with its activation exported."""

from __future__ import annotations

import copy
import io
import pickle
import shutil

import pytest
import torch
from losses.family import CASES, FIRST, ids_of, in_turn, make_case, value_and_gradient
from torch import nn

first_in_turn = pytest.mark.parametrize(("case", "activation"), in_turn(FIRST), ids=ids_of(in_turn(FIRST)))
# The losses whose code differs, each with one activation, as a compilation takes seconds; compounds have the others.
NAMES = ("dice_ce", "compound", "generalized_dice", "focal_tversky", "log_dice", "on_probabilities")
COMPILED = [
    (case, ("sigmoid", "softmax")[turn % 2]) for turn, case in enumerate(case for case in FIRST if case.id in NAMES)
]
QUICK = ("dice_ce",)
WEIGHTS = [1.0, 2.0, 0.5]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
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
    # The number of pixels that are not ignored depends on the data, which a graph cannot express.
    ignore = None if case.id == "on_probabilities" else 255
    loss = case.loss(activation, ignore_index=ignore, class_weights=WEIGHTS, absent="penalize")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ignored = 0.0 if ignore is None else 0.2
    assert_same(compiled, loss, *make_case(1, activation, shape=(2, 3, 8, 6), ignored=ignored))
    # Another size of batch and image, which makes the shapes dynamic.
    assert_same(compiled, loss, *make_case(2, activation, shape=(3, 3, 5, 9), ignored=ignored))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize(("name", "activation"), [("dice", "sigmoid"), ("dice_ce", "softmax")])
def test_compiles_to_machine_code(name, activation):
    loss = next(case for case in CASES if case.id == name).loss(activation, ignore_index=255)
    compiled = torch.compile(loss, fullgraph=True)
    assert_same(compiled, loss, *make_case(1, activation, shape=(2, 3, 8, 6), dtype=torch.float32))


@first_in_turn
def test_state_copies_and_pickles(case, activation):
    loss = case.loss(activation, ignore_index=255, class_weights=WEIGHTS)
    logits, target = make_case(3, activation)
    value = loss(logits, target)
    saved = io.BytesIO()
    torch.save(loss.state_dict(), saved)
    saved.seek(0)
    other = case.loss(activation, ignore_index=255, class_weights=[3, 3, 1])
    other.load_state_dict(torch.load(saved, weights_only=True))
    for same in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), other):
        assert same(logits, target) == value
        assert repr(same) == repr(loss)


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
    assert case.loss(class_weights=WEIGHTS).to("meta").state_dict()[next(iter(buffers))].is_meta


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
