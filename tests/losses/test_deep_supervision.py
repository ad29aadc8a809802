from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from definitions import random_case
from torch import nn

from lightning_dice import DiceLoss
from lightning_dice.functional import RegionMap, coarser_target
from lightning_dice.losses import (
    CompoundLoss,
    CrossEntropyLoss,
    DeepSupervision,
    DiceCELoss,
    LesionWiseLoss,
    OnProbabilities,
    SegmentationLoss,
)


def levels_of(logits, *sizes):
    generator = torch.Generator().manual_seed(1)
    coarser = [torch.randn(*logits.shape[:2], *size, generator=generator, dtype=logits.dtype) for size in sizes]
    return [logits, *coarser]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("weights", [None, [1, 1, 1], [2, 0, 1], [0, 0, 5]])
def test_is_the_mean_of_the_losses_of_the_levels(activation, weights):
    logits, target = random_case(0, activation=activation, space=(9, 8), ignored=True)
    levels = levels_of(logits, (5, 4), (2, 2))
    loss = DiceCELoss(activation=activation, ignore_index=255)
    expected, given = 0.0, weights or [1, 1 / 2, 1 / 4]
    for level, weight in zip(levels, given, strict=True):
        own = coarser_target(target, level.shape[2:], activation=activation, classes=3, ignore_index=255)
        expected = expected + weight / sum(given) * loss(level, own)
    torch.testing.assert_close(DeepSupervision(loss, weights)(levels, target), expected)


def test_one_tensor_is_one_level():
    logits, target = random_case(1, activation="sigmoid")
    loss = DeepSupervision(DiceLoss(), [0, 1])
    assert torch.equal(loss(logits, target), DiceLoss()(logits, target))
    assert torch.equal(DeepSupervision(DiceLoss())([logits], target), DiceLoss()(logits, target))


def test_a_level_of_weight_zero_is_not_computed():
    logits, target = random_case(1, activation="sigmoid")
    loss = DeepSupervision(DiceLoss(), [1, 0])
    assert torch.equal(loss([logits, torch.full((2, 3, 2, 2), torch.nan)], target), DiceLoss()(logits, target))


@pytest.mark.parametrize("weights", [None, [3.0, 2.0, 1.0]])
def test_equals_monai_and_nnunet_at_full_size(weights):
    monai = pytest.importorskip("monai.losses")
    logits, target = random_case(2, activation="sigmoid", space=(8, 8), dtype=torch.float32)
    levels = levels_of(logits, (8, 8), (8, 8))
    ours = DeepSupervision(DiceLoss(pool="image", smooth=1e-5), weights)(levels, target)
    given = weights or [1, 0.5, 0.25]
    plain = monai.DiceLoss(sigmoid=True)
    theirs = monai.DeepSupervisionLoss(plain, weight_mode="exp", weights=weights)(levels, target.float())
    torch.testing.assert_close(ours * sum(given), theirs)
    wrapper = pytest.importorskip("nnunetv2.training.loss.deep_supervision").DeepSupervisionWrapper
    theirs = wrapper(plain, [weight / sum(given) for weight in given])(levels, [target.float()] * 3)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduce", ["area", "max"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_gradient(activation, reduce):
    logits, target = random_case(3, activation=activation, space=(5, 6), ignored=True)
    levels = [level.requires_grad_() for level in levels_of(logits, (3, 3), (1, 2))]
    loss = DeepSupervision(DiceLoss(activation=activation, ignore_index=255), reduce=reduce)
    assert torch.autograd.gradcheck(lambda *given: loss(given, target), levels)


@pytest.mark.parametrize("reduce", ["area", "max"])
def test_ignored_pixels_do_no_harm_at_any_level(reduce):
    logits, target = random_case(4, activation="softmax", space=(8, 8))
    target[..., 4:] = 255
    levels = levels_of(logits, (4, 4), (2, 2))
    cropped = [level[..., : level.shape[-1] // 2] for level in levels]
    loss = DeepSupervision(DiceLoss(activation="softmax", ignore_index=255), reduce=reduce)
    expected = loss(cropped, target[..., :4])
    for level in levels:
        level[..., level.shape[-1] // 2 :] = torch.nan
    torch.testing.assert_close(loss(levels, target), expected)


def test_the_coarsest_level_learns_of_an_object_of_one_pixel():
    target = torch.zeros(1, 1, 64, 64)
    target[..., 13, 27] = 1
    coarse = torch.zeros(1, 1, 8, 8, requires_grad=True)
    for reduce in ("area", "max"):
        loss = DeepSupervision(DiceLoss(smooth=1e-5), [0, 1], reduce=reduce)
        (gradient,) = torch.autograd.grad(loss([target, coarse], target), coarse)
        assert (gradient < 0).nonzero().tolist() == [[0, 0, 1, 3]]


def test_where_the_loss_of_a_soft_label_is_least():
    # As in the docstring: with the product at a rounded label, with the minimum at the label.
    target = torch.zeros(1, 1, 10)
    target[..., :6] = 1
    p = torch.linspace(0.02, 1, 50)

    def least(**settings):
        loss = DeepSupervision(DiceLoss(activation=None, smooth=0, **settings), [0, 1])
        values = [loss([target, level.view(1, 1, 1)], target).item() for level in p]
        return p[values.index(min(values))].item(), min(values)

    assert least() == pytest.approx((1.0, 0.25))
    assert least(overlap="minimum") == pytest.approx((0.6, 0.0), abs=1e-6)


def test_a_weight_is_averaged_and_annotated_is_handed_on():
    logits, target = random_case(5, activation="sigmoid", space=(4, 4))
    levels = levels_of(logits, (2, 2))
    weight = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    annotated = torch.tensor([[True, False, True], [True, True, True]])
    given = {"annotated": annotated}
    expected = DiceLoss()(levels[0], target, weight, **given) * 2 / 3
    own = F.avg_pool2d(target.double(), 2)
    expected += DiceLoss()(levels[1], own, F.avg_pool2d(weight, 2), **given) / 3
    torch.testing.assert_close(
        DeepSupervision(DiceLoss())(levels, target, weight, **given), expected, rtol=1e-6, atol=0
    )


def test_maps_go_to_levels_of_the_targets_size():
    target = torch.zeros(1, 1, 8, 8)
    target[..., 1, 1] = target[..., 6, 5] = 1
    levels = levels_of(torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), (4, 4))
    plain = LesionWiseLoss(DiceLoss(pool="image"))
    loss = DeepSupervision(plain, [1, 1], reduce="max")
    assert loss.maps is plain.maps
    maps = {"regions": torch.zeros(1, 1, 8, 8, dtype=torch.int32)}
    own = coarser_target(target, (4, 4), activation="sigmoid", classes=1, reduce="max")
    expected = (plain(levels[0], target, maps=maps) + plain(levels[1], own)) / 2
    torch.testing.assert_close(loss(levels, target, maps=maps), expected)
    assert expected != (plain(levels[0], target) + plain(levels[1], own)) / 2


def test_the_values_of_a_compound_are_those_of_the_finest_level():
    logits, target = random_case(6, activation="sigmoid", space=(4, 4))
    terms = CompoundLoss({"dice": DiceLoss(), "ce": CrossEntropyLoss()})
    loss = DeepSupervision(terms)
    loss(levels_of(logits, (2, 2)), target)
    torch.testing.assert_close(loss.values["dice"], DiceLoss()(logits, target))
    assert DeepSupervision(DiceLoss()).values == {}


class TestOtherModules:
    def test_get_logits_and_target_alone(self):
        logits, target = random_case(7, activation="sigmoid", space=(4, 4))
        levels = levels_of(logits, (2, 2))
        loss = DeepSupervision(nn.BCEWithLogitsLoss(), [1, 1])
        plain = F.binary_cross_entropy_with_logits
        expected = (plain(levels[0], target.double()) + plain(levels[1], F.avg_pool2d(target.double(), 2))) / 2
        torch.testing.assert_close(loss(levels, target.double()), expected)
        assert (loss.activation, loss.ignore_index, dict(loss.maps)) == (None, None, {})
        with pytest.raises(ValueError, match="a BCEWithLogitsLoss, takes neither weight nor annotated"):
            loss(levels, target.double(), torch.ones(2, 4, 4))

    @pytest.mark.parametrize("reduce", ["area", "max"])
    def test_an_ignored_cell_of_soft_labels_adds_nothing(self, reduce):
        logits, target = random_case(8, activation="softmax", space=(4, 4))
        target[..., 2:] = -100
        levels = levels_of(logits, (2, 2))
        loss = DeepSupervision(nn.CrossEntropyLoss(reduction="sum"), [0, 1], reduce=reduce)
        assert loss.ignore_index == -100
        expected = loss([levels[0][..., :2], levels[1][..., :1]], target[..., :2])
        torch.testing.assert_close(loss(levels, target), expected)

    def test_settings_of_ours(self):
        loss = DeepSupervision(OnProbabilities(nn.MSELoss(), activation="softmax", ignore_index=7))
        assert (loss.activation, loss.ignore_index) == ("softmax", 7)


def test_state_copies_and_pickles():
    logits, target = random_case(9, activation="sigmoid", space=(4, 4))
    levels = levels_of(logits, (2, 2))
    loss = DeepSupervision(DiceLoss(class_weights=[1, 2, 3]), [1, 2], reduce="max")
    assert not loss.state_dict()  # Weights of classes are a setting.
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(levels, target), loss(levels, target))
    assert "weights=[1.0, 2.0], reduce='max'" in repr(loss)


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (F.cross_entropy, {}, "loss must be a module of logits and target, got function"),
        (DiceLoss(reduction="none"), {}, "loss must have one value"),
        (DiceLoss(), {"weights": [1, -1]}, "weights must be a number >= 0, got -1"),
        (DiceLoss(), {"weights": [0, 0]}, r"weights must not all be 0, got \[0.0, 0.0\]"),
        (DiceLoss(), {"weights": []}, r"weights must not all be 0, got \[\]"),
        (DiceLoss(), {"reduce": "nearest"}, "reduce must be one of 'area', 'max', got 'nearest'"),
    ],
)
def test_refuses_settings(loss, settings, message):
    with pytest.raises(ValueError, match=message):
        DeepSupervision(loss, **settings)


def test_refuses_what_does_not_fit():
    logits, target = random_case(10, activation="sigmoid", space=(4, 4))
    with pytest.raises(ValueError, match="weights must have one for each of the 2 levels, got 3"):
        DeepSupervision(DiceLoss(), [1, 1, 1])([logits, logits], target)
    with pytest.raises(ValueError, match="at least one level, got none"):
        DeepSupervision(DiceLoss())([], target)
    with pytest.raises(ValueError, match=r"no larger than the target, \(2, 2\), got \(4, 4\)"):
        DeepSupervision(DiceLoss())([logits], target[..., :2, :2])
    with pytest.raises(ValueError, match=r"loss must return a scalar, got the shape \(2, 3, 4, 4\)"):
        DeepSupervision(nn.MSELoss(reduction="none"))([logits], target.double())


def test_levels_in_the_wrong_order_are_refused():
    levels = [torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 4)]
    with pytest.raises(ValueError, match=r"the same classes at all levels, got the shapes \[\(2, 3, 4, 4\), \(2, 64"):
        DeepSupervision(DiceLoss(activation="softmax"))(
            [torch.zeros(2, 3, 4, 4), torch.zeros(2, 64, 4, 4)], torch.zeros(2, 4, 4, dtype=torch.long)
        )
    with pytest.raises(ValueError, match=r"finest first, got levels of the sizes \[\(2, 2\), \(4, 4\)\]"):
        DeepSupervision(DiceLoss())(levels, torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="finest first, got dict"):
        DeepSupervision(DiceLoss())({"out": levels[0]}, torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("classes", [1, 3])
def test_a_flat_mask_is_not_taken_for_ids_with_a_sigmoid(classes):
    hint = "unsqueeze" if classes == 1 else "softmax"
    with pytest.raises(ValueError, match=rf"plane for each of the {classes} classes.*{hint}"):
        DeepSupervision(DiceLoss())([torch.zeros(1, classes, 4, 4)], torch.zeros(1, 8, 8, dtype=torch.long))


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("ignored", [False, True])
def test_maps_of_coarser_levels_know_small_objects(activation, ignored):
    """Maps cut soft labels at 1/2, and would lose a lesion smaller than a cell."""
    ids = torch.zeros(1, 16, 16, dtype=torch.uint8)
    ids[:, 2:8, 2:8] = ids[:, 12, 3] = ids[:, 4, 13] = 1
    if ignored:
        ids[:, 14:] = 255
    planes = activation == "sigmoid"
    target = ids.unsqueeze(1) if planes else ids
    classes = 1 if planes else 2

    class Recorder(SegmentationLoss):
        maps = {"regions": RegionMap(activation, classes, 255)}  # noqa: RUF012

        def forward(self, logits, target, weight=None, *, annotated=None, maps=None):
            self.regions = self.get_map("regions", target, maps)
            return logits.sum() * 0

    loss = Recorder(activation=activation, ignore_index=255)
    DeepSupervision(loss)([torch.zeros(1, classes, 4, 4)], target)
    assert loss.regions.shape == (1, classes, 4, 4)
    assert loss.regions[0, -1].unique().tolist() == [0, 1, 2]


def test_a_plain_module_gets_dtypes_it_takes():
    target = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    target[..., 3, 3] = 1
    levels = [torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(0)) for size in (8, 4)]
    loss = DeepSupervision(nn.BCEWithLogitsLoss())
    torch.testing.assert_close(loss(levels, target), loss(levels, target.float()))


def test_an_ignored_label_is_no_share_of_a_class():
    """One of torch's modules would take it for a probability."""
    logits, soft = random_case(8, activation="softmax", soft=True, space=(4, 4), dtype=torch.float32)
    soft = soft.float()
    holes = soft.clone()
    holes[..., :2] = -100
    expected = nn.CrossEntropyLoss()(logits, holes.masked_fill(holes == -100, 0))
    torch.testing.assert_close(DeepSupervision(nn.CrossEntropyLoss())([logits], holes), expected)
