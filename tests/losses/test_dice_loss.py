from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from definitions import plain_dice_loss, random_case
from torch import nn

from lightning_dice import DiceLoss
from lightning_dice.functional import AbsentPolicy


class ArticleDiceLoss(nn.Module):
    """The article's ten lines."""

    def forward(self, inputs, targets, smooth=1):
        inputs = F.sigmoid(inputs)
        inputs = inputs.view(-1)
        targets = targets.view(-1)
        intersection = (inputs * targets).sum()
        dice = (2.0 * intersection + smooth) / (inputs.sum() + targets.sum() + smooth)
        return 1 - dice


@pytest.mark.parametrize("space", [(9,), (7, 5), (4, 3, 5)], ids=["1d", "2d", "3d"])
def test_is_the_article_loss_and_gradient(space):
    logits, mask = random_case(0, activation="sigmoid", batch=4, classes=1, space=space)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = DiceLoss()(ours, mask), ArticleDiceLoss()(theirs, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=0)


def test_several_channels_in_one_ratio_are_the_article_too():
    logits, mask = random_case(0, activation="sigmoid", batch=4, classes=3)
    torch.testing.assert_close(DiceLoss(pool="all")(logits, mask), ArticleDiceLoss()(logits, mask))


def test_the_article_loop_step_by_step():
    def losses(criterion):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        images, masks = torch.randn(4, 1, 16, 16), (torch.rand(4, 1, 16, 16) > 0.8).float()
        history = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = criterion(net(images), masks)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return history

    ours, theirs = losses(DiceLoss()), losses(ArticleDiceLoss())
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert ours[-1] < ours[0]


P, N = 50.0, -50.0


@pytest.mark.parametrize(
    ("logits", "mask", "expected"),
    [
        ([P, P, N, N], [1, 1, 0, 0], 0.0),
        ([P, P, N, N], [0, 0, 1, 1], 1 - 1 / 5),
        ([P, P, P, P], [1, 0, 0, 0], 1 - 3 / 6),
        ([N, N, N, N], [0, 0, 0, 0], 0.0),
        ([P, P, P, P], [0, 0, 0, 0], 1 - 1 / 5),
        ([0.0, 0.0, 0.0, 0.0], [1, 1, 0, 0], 1 - 3 / 5),
    ],
    ids=["perfect", "disjoint", "all-foreground", "class-absent", "absent-but-predicted", "undecided"],
)
def test_by_hand(logits, mask, expected):
    loss = DiceLoss()(torch.tensor([[logits]]), torch.tensor([[mask]]))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", None])
@pytest.mark.parametrize("pool", ["image", "batch", "all"])
@pytest.mark.parametrize("absent", ["smooth", "skip", "penalize"])
def test_equals_the_definition(activation, pool, absent):
    logits, mask = random_case(3, activation=activation, ignored=True)
    if activation == "softmax":
        mask[0][mask[0] == 2] = 1  # a class absent from one image,
        mask[mask == 1] = 0  # and another from all
    else:
        mask[0, 2][mask[0, 2] == 1] = 0
        mask[:, 1][mask[:, 1] == 1] = 0
    for smooth, squared, excluded in (((1.0, 1.0), False, (0,)), ((0.0, 1e-5), True, ()), ((0.5, 2.0), False, ())):
        options = {
            "smooth": smooth, "pool": pool, "squared": squared, "absent": absent, "exclude_classes": excluded,
            "activation": activation, "ignore_index": 255,
        }  # fmt: skip
        expected = plain_dice_loss(logits, mask, **options)
        assert DiceLoss(**options)(logits, mask).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pool", ["image", "batch"])
def test_class_weights_are_normalized(pool):
    logits, mask = random_case(4, activation="softmax")
    loss = DiceLoss(activation="softmax", pool=pool, class_weights=[1, 2, 3])(logits, mask)
    tenfold = DiceLoss(activation="softmax", pool=pool, class_weights=[10, 20, 30])(logits, mask)
    expected = plain_dice_loss(logits, mask, activation="softmax", pool=pool, class_weights=[1, 2, 3])
    torch.testing.assert_close(loss, tenfold)
    assert loss.item() == pytest.approx(expected, rel=1e-7)  # the weights are float32


def test_weights_of_excluded_classes_do_not_count():
    logits, mask = random_case(4, activation="softmax")
    options = {"activation": "softmax", "exclude_classes": [0]}
    loss = DiceLoss(class_weights=[100, 1, 3], **options)(logits, mask)
    torch.testing.assert_close(loss, DiceLoss(class_weights=[0, 1, 3], **options)(logits, mask))


class TestAbsentClasses:
    def test_the_penalty_pushes_as_hard_as_cross_entropy(self):
        logits = torch.linspace(-6, 6, 50, dtype=torch.float64).view(1, 1, 50).requires_grad_()
        empty = torch.zeros_like(logits)
        (ours,) = torch.autograd.grad(DiceLoss(absent="penalize")(logits, empty), logits)
        (entropy,) = torch.autograd.grad(F.binary_cross_entropy_with_logits(logits, empty), logits)
        (smooth,) = torch.autograd.grad(DiceLoss()(logits, empty), logits)
        assert (ours >= entropy * (1 - 1e-9)).all()
        assert smooth.max() < ours.max() / 10  # what the smoothed formula alone would do

    def test_the_penalty_in_softmax(self):
        logits = torch.randn(1, 3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
        logits.requires_grad_()
        mask = torch.zeros(1, 40, dtype=torch.long)
        loss = DiceLoss(activation="softmax", absent="penalize", exclude_classes=[0, 1])(logits, mask)
        (ours,) = torch.autograd.grad(loss, logits)
        (entropy,) = torch.autograd.grad(F.cross_entropy(logits, mask), logits)
        torch.testing.assert_close(ours[:, 2], entropy[:, 2])

    def test_without_smoothing_nothing_divided_by_nothing_is_left_out(self):
        probs = torch.tensor([[[0.0, 0.0], [0.5, 0.5]]], requires_grad=True)
        loss = DiceLoss(activation=None, smooth=0)(probs, torch.tensor([[[0, 0], [1, 0]]]))
        loss.backward()
        assert loss.item() == pytest.approx(0.5)
        assert probs.grad.isfinite().all()


def test_an_infinite_logit_is_a_sure_pixel_of_a_sigmoid():
    logits, mask = random_case(8, activation="sigmoid")
    logits[0, 0, 0, 0] = torch.inf
    for absent in ("smooth", "skip", "penalize"):
        assert DiceLoss(absent=absent)(logits, mask).isfinite()


def test_reductions_agree():
    logits, mask = random_case(8, activation="softmax")
    options = {"activation": "softmax", "pool": "image"}
    table = DiceLoss(reduction="none", **options)(logits, mask)
    assert table.shape == (2, 3)
    torch.testing.assert_close(DiceLoss(**options)(logits, mask), table.mean())
    torch.testing.assert_close(DiceLoss(reduction="sum", **options)(logits, mask), table.sum())
    mask[0][mask[0] == 1] = 0
    skipped = DiceLoss(reduction="none", absent="skip", **options)(logits, mask)
    assert skipped.isnan().tolist() == [[False, True, False], [False, False, False]]
    torch.testing.assert_close(DiceLoss(absent="skip", **options)(logits, mask), skipped.nanmean())
    torch.testing.assert_close(DiceLoss(reduction="sum", absent="skip", **options)(logits, mask), skipped.nansum())


def test_half_precision_does_not_overflow():
    logits = torch.randn(1, 1, 512, 512, generator=torch.Generator().manual_seed(0))
    mask = (logits > 1).float()
    expected = DiceLoss()(logits.half().double(), mask)
    assert DiceLoss()(logits.half(), mask).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "relu"}, "activation must be one of 'sigmoid', 'softmax', None, got 'relu'"),
        ({"smooth": -1}, "smooth must be a number of pixels >= 0"),
        ({"smooth": [1, 2, 3]}, "smooth must be"),
        ({"smooth": float("nan")}, "smooth must be"),
        ({"pool": "batches"}, "pool must be one of 'image', 'batch', 'all'"),
        ({"exclude_classes": 0}, r"exclude_classes must be a list of class indices such as \[0\], got 0"),
        ({"exclude_classes": [-1]}, "exclude_classes must hold distinct"),
        ({"class_weights": [1, -1]}, "class_weights must be"),
        ({"class_weights": [0, 0]}, "class_weights must be"),
        ({"class_weights": [1, 2], "pool": "all"}, "classes share one"),
        ({"absent": "ignore"}, "absent must be one of 'smooth', 'skip', 'penalize'"),
        ({"reduction": "avg"}, "reduction must be"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DiceLoss(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_weights": [1, 2]}, "one for each of the 3 classes, got 2"),
        ({"exclude_classes": [3]}, "classes from 0 to 2"),
        ({"exclude_classes": [0, 1, 2]}, "leaves no class"),
    ],
)
def test_refuses_settings_that_do_not_fit_the_logits(settings, message):
    with pytest.raises(ValueError, match=message):
        DiceLoss(**settings)(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))


def test_copies_and_pickles():
    loss = DiceLoss(activation="softmax", class_weights=[1, 2, 3], absent=AbsentPolicy("skip"))
    logits, mask = random_case(9, activation="softmax")
    assert list(loss.state_dict()) == []
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(other(logits, mask), loss(logits, mask))
    assert "absent='skip'" in repr(loss)
