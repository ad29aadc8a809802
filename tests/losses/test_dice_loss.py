from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from definitions import plain_dice_loss, random_case
from torch import nn

from lightning_dice import DiceLoss
from lightning_dice.functional import AbsentPolicy
from lightning_dice.kernels import OverlapSums, overlap_sums


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


OPTIONS = [
    {"smooth": s, "pool": pool, "squared": squared, "absent": absent, "exclude_classes": excluded}
    for s, pool, squared, absent, excluded in itertools.product(
        [(1.0, 1.0), (0.0, 1e-5)], ["image", "batch", "all"], [False, True], ["smooth", "skip", "penalize"], [(), (0,)]
    )
]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", None])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_equals_the_definition(activation, options):
    logits, mask = random_case(3, activation=activation, ignored=True)
    if activation == "softmax":
        mask[0][mask[0] == 2] = 1  # a class absent from one image,
        mask[mask == 1] = 0  # and another from all
    else:
        mask[0, 2][mask[0, 2] == 1] = 0
        mask[:, 1][mask[:, 1] == 1] = 0
    loss = DiceLoss(activation=activation, ignore_index=255, **options)(logits, mask)
    expected = plain_dice_loss(logits, mask, activation=activation, ignore_index=255, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


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


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("pool", ["image", "batch", "all"])
@pytest.mark.parametrize("absent", ["smooth", "skip", "penalize"])
def test_gradcheck(activation, pool, absent):
    logits, mask = random_case(5, activation=activation, space=(3, 2), ignored=True)
    mask = mask.where(mask != 1, 0)
    loss = DiceLoss(activation=activation, pool=pool, absent=absent, ignore_index=255)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, mask), logits)


class TestInvariances:
    def test_pixels_permuted(self):
        logits, mask = random_case(6, activation="softmax", space=(20,))
        order = torch.randperm(20)
        loss = DiceLoss(activation="softmax")
        torch.testing.assert_close(loss(logits[..., order], mask[..., order]), loss(logits, mask))

    def test_classes_relabelled(self):
        logits, mask = random_case(6, activation="softmax")
        order = torch.tensor([2, 0, 1])
        loss = DiceLoss(activation="softmax", pool="image")
        torch.testing.assert_close(loss(logits[:, order], order.argsort()[mask]), loss(logits, mask))

    def test_batch_split_and_sums_added(self):
        logits, mask = random_case(6, activation="sigmoid", batch=5)
        loss = DiceLoss()
        parts = [overlap_sums(logits[part], mask[part]) for part in (slice(0, 2), slice(2, 5))]
        torch.testing.assert_close(loss.from_sums(OverlapSums.cat(parts)), loss(logits, mask))

    def test_ignored_pixels_are_cropped_pixels(self):
        logits, mask = random_case(6, activation="softmax", space=(4, 6))
        ignored = mask.clone()
        ignored[..., 4:] = 255
        loss = DiceLoss(activation="softmax", pool="image", ignore_index=255)
        torch.testing.assert_close(loss(logits, ignored), loss(logits[..., :4], mask[..., :4]))

    def test_in_image_mode_an_image_does_not_know_its_neighbours(self):
        logits, mask = random_case(6, activation="softmax", batch=3)
        loss = DiceLoss(activation="softmax", pool="image", reduction="none")
        alone = torch.cat([loss(logits[b : b + 1], mask[b : b + 1]) for b in range(3)])
        torch.testing.assert_close(loss(logits, mask), alone, rtol=0, atol=0)


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

    def test_everything_ignored_is_zero_with_a_zero_gradient(self):
        logits = torch.full((2, 1, 4), torch.nan).requires_grad_()
        loss = DiceLoss(ignore_index=255)(logits, torch.full((2, 1, 4), 255))
        loss.backward()
        assert loss.item() == 0
        assert (logits.grad == 0).all()

    def test_an_empty_batch_is_zero(self):
        logits = torch.zeros(0, 1, 4, requires_grad=True)
        loss = DiceLoss(pool="image")(logits, torch.zeros(0, 1, 4))
        loss.backward()
        assert loss.item() == 0

    def test_an_ignored_image_does_not_dilute_the_mean(self):
        logits, mask = random_case(7, activation="sigmoid", batch=3)
        alone = DiceLoss(pool="image", ignore_index=255)(logits[:2], mask[:2])
        mask[2] = 255
        torch.testing.assert_close(DiceLoss(pool="image", ignore_index=255)(logits, mask), alone)

    def test_without_smoothing_nothing_divided_by_nothing_is_left_out(self):
        probs = torch.tensor([[[0.0, 0.0], [0.5, 0.5]]], requires_grad=True)
        loss = DiceLoss(activation=None, smooth=0)(probs, torch.tensor([[[0, 0], [1, 0]]]))
        loss.backward()
        assert loss.item() == pytest.approx(0.5)
        assert probs.grad.isfinite().all()


@pytest.mark.parametrize("pool", ["image", "batch", "all"])
@pytest.mark.parametrize("absent", ["smooth", "skip", "penalize"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_diverged_network_is_seen(pool, absent, value, activation):
    logits, mask = random_case(8, activation=activation)
    logits[0, 0, 0, 0] = value
    if activation == "sigmoid" and value == float("inf"):
        value = 0.0  # A sigmoid of infinity is 1, and nothing is wrong.
    loss = DiceLoss(activation=activation, pool=pool, absent=absent)(logits, mask)
    assert loss.isnan() == (value != 0)


def test_reductions_agree():
    logits, mask = random_case(8, activation="softmax")
    options = {"activation": "softmax", "pool": "image"}
    table = DiceLoss(reduction="none", **options)(logits, mask)
    assert table.shape == (2, 3)
    torch.testing.assert_close(DiceLoss(**options)(logits, mask), table.mean())
    torch.testing.assert_close(DiceLoss(reduction="sum", **options)(logits, mask), table.sum())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float16, torch.float32)],
)
def test_dtype_of_the_loss(dtype, expected):
    logits = torch.zeros(1, 1, 4, dtype=dtype, requires_grad=True)
    loss = DiceLoss()(logits, torch.ones(1, 1, 4))
    loss.backward()
    assert loss.dtype == expected
    assert logits.grad.dtype == dtype


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


def test_state_copies_and_pickles():
    loss = DiceLoss(activation="softmax", class_weights=[1, 2, 3], absent=AbsentPolicy("skip"))
    logits, mask = random_case(9, activation="softmax")
    assert list(loss.state_dict()) == ["class_weights"]
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(other(logits, mask), loss(logits, mask))
    assert "absent='skip'" in repr(loss)
