"""Losses in transforms of `torch.func` and in forward mode, and their refusal of TorchScript."""

from __future__ import annotations

import pytest
import torch
from losses.family import LOSSES, close, make_case, value_and_gradient
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, jvp, vmap

from lightning_dice.kernels import forced
from lightning_dice.losses import DiceCELoss, DiceLoss

SHAPE = (2, 3, 8, 6)
# The number of pixels, or of lesions, is a shape.
NOT_VMAPPED = {"LesionWiseLoss": "number is a shape", "OnProbabilities": "not ignored is a shape"}

# torch's own, at the first use of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
each = pytest.mark.parametrize("name", LOSSES)


def cases(name):
    """Yield a loss, logits and target, for each activation."""
    for activation in ("sigmoid", "softmax", None):
        loss = LOSSES[name](activation=activation, ignore_index=255)
        yield loss, *make_case(1, activation, shape=SHAPE)


@each
def test_gradient(name):
    for loss, logits, target in cases(name):
        expected, gradient = value_and_gradient(loss, logits, target)
        other_gradient, value = grad_and_value(loss)(logits, target)
        close(value, expected)
        close(other_gradient, gradient)


@each
def test_tangent(name):
    """As forward-mode derivatives, of the loss and of its gradient, in `torch.func` and in `torch.autograd`."""
    for loss, logits, target in cases(name):
        direction = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        value, gradient = value_and_gradient(loss, logits, target)

        def of_logits(z, loss=loss, target=target):
            return loss(z, target)

        result, tangent = jvp(of_logits, (logits,), (direction,))
        close(result, value)
        close(tangent, (gradient * direction).sum())
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(logits, direction), target))
        close(dual.primal, value)
        close(dual.tangent, (gradient * direction).sum())

        z = logits.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(z, target), z, create_graph=True)
        second = torch.zeros_like(z)
        if first.requires_grad:  # Not of the boundary loss of probabilities, which is linear.
            (second,) = torch.autograd.grad((first * direction).sum(), z)
        close(jvp(grad(of_logits), (logits,), (direction,))[1], second, atol=1e-12)


@each
def test_vmap(name):
    """Over logits, targets or both, and of the gradient, as the loop of them."""
    for loss, logits, target in cases(name):
        several = torch.stack([logits, logits.flip(0).contiguous()]), torch.stack([target, target.flip(2)])
        if name in NOT_VMAPPED:
            with pytest.raises(ValueError, match=NOT_VMAPPED[name]):
                vmap(loss)(*several)
            continue
        for dims in ((0, 0), (0, None), (None, 0)):
            given = [all_of if dim == 0 else all_of[0] for all_of, dim in zip(several, dims, strict=True)]
            pairs = [
                [one[turn] if dim == 0 else one for one, dim in zip(given, dims, strict=True)] for turn in range(2)
            ]
            close(vmap(loss, in_dims=dims)(*given), torch.stack([loss(*pair) for pair in pairs]))
            expected = torch.stack([value_and_gradient(loss, *pair)[1] for pair in pairs])
            close(vmap(grad(loss), in_dims=dims)(*given), expected)


def test_gradient_of_each_sample():
    """The use that torch's own tutorial shows, with weights of pixels and classes that are not annotated."""
    torch.manual_seed(0)
    net = nn.Conv2d(1, 3, 3, padding=1)
    loss = DiceCELoss(activation="softmax", absent="penalize", class_weights=[1, 2, 3])
    image, target = torch.randn(4, 1, 8, 6), torch.randint(0, 2, (4, 8, 6))
    weight, annotated = torch.rand(4, 8, 6), torch.tensor([[True, True, index % 2 == 0] for index in range(4)])

    def of_sample(parameters, image, target, weight, annotated):
        logits = functional_call(net, parameters, image[None])
        return loss(logits, target[None], weight[None], annotated=annotated[None])

    parameters = {name: one.detach() for name, one in net.named_parameters()}
    found = vmap(grad(of_sample), in_dims=(None, 0, 0, 0, 0))(parameters, image, target, weight, annotated)
    for index in range(4):
        one = slice(index, index + 1)
        net.zero_grad()
        loss(net(image[one]), target[one], weight[one], annotated=annotated[one]).backward()
        torch.testing.assert_close(found["weight"][index], net.weight.grad)
        torch.testing.assert_close(found["bias"][index], net.bias.grad)


def test_a_loss_of_other_tensors_within_a_transform():
    """The fast kernels know no transforms, even where no argument of the loss is transformed."""
    logits, target = make_case(1, "sigmoid", shape=SHAPE)
    loss = DiceLoss(ignore_index=255)
    slope = grad(lambda factor: factor * loss(logits, target))(torch.tensor(1.0, dtype=torch.float64))
    close(slope, loss(logits, target))
    with pytest.raises(ValueError, match="'native' does not support"), forced("native", strict=True):
        grad(loss)(logits, target)


def test_values_are_checked_where_they_can_be_read():
    logits, target = make_case(1, "sigmoid", shape=SHAPE, ignored=0.0)
    wrong = target.masked_fill(target == 1, 7)
    with pytest.raises(ValueError, match=r"target must lie in \[0, 1\], got values from 0 to 7"):
        grad(DiceLoss())(logits, wrong)
    assert vmap(DiceLoss(), in_dims=(None, 0))(logits, wrong[None]).shape == (1,)


@each
def test_torchscript_is_refused(name):
    loss = LOSSES[name](activation="sigmoid")
    for module in (loss, nn.Sequential(nn.Conv2d(1, 1, 1), loss)):
        with pytest.raises(TypeError, match=f"torch.jit.script cannot compile {name}: use torch.compile"):
            torch.jit.script(module)
