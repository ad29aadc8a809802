"""The presets equal the installed peers, in value and gradient; tests named after a peer show where it is wrong."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import pytest
import segmentation_models_pytorch.losses as smp
import torch
import torch.nn.functional as F
from definitions import plain_dice_loss, plain_sums, random_case
from monai import losses as monai
from torchvision.ops import sigmoid_focal_loss

from lightning_dice import DiceLoss
from lightning_dice.losses import (
    CompoundLoss,
    CrossEntropyLoss,
    DiceCELoss,
    DiceFocalLoss,
    FocalLoss,
    FocalTverskyLoss,
    GeneralizedDiceLoss,
    JaccardLoss,
    LogDiceLoss,
    LogJaccardLoss,
    LogTverskyLoss,
    TopKCrossEntropyLoss,
    TverskyLoss,
)

# Sums of float64, added in another order.
EXACT = {"rtol": 1e-10, "atol": 1e-13}
# The peer computes in float32, whatever the input.
SINGLE = {"rtol": 2e-5, "atol": 1e-7}
# Our class weights are float32.
WEIGHTS = {"rtol": 1e-6, "atol": 1e-9}

IGNORED = 255
SPACES = {"2d": (5, 4), "3d": (3, 4, 2)}


def pairwise(**options):
    """Parametrize a test by combinations of options in which any value of one option meets any value of another.

    Presets translate each argument on its own, so that all combinations would find no more.
    """
    rows = list(itertools.product(*(range(len(values)) for values in options.values())))

    def pairs_of(row):
        return set(itertools.combinations(enumerate(row), 2))

    missing, chosen = set().union(*map(pairs_of, rows)), []
    while missing:
        best = max(rows, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        chosen.append([values[index] for index, values in zip(best, options.values(), strict=True)])
    ids = ["-".join(f"{name}={value}" for name, value in zip(options, row, strict=True)) for row in chosen]
    return pytest.mark.parametrize(tuple(options), chosen, ids=ids)


def assert_same(ours, theirs, logits, target, peer_target=None, *, constant=0.0, factor=1.0, tolerance=EXACT):
    """Check `ours == factor * theirs + constant`, for values and gradients."""
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = ours(a, target), factor * theirs(b, target if peer_target is None else peer_target) + constant
    torch.testing.assert_close(loss.flatten(), expected.flatten().to(loss.dtype), **tolerance)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, **tolerance)
    assert a.grad.abs().sum() > 0


def case(activation, classes=3, space=(5, 4), *, soft=False, ignored=False, seed=0, batch=3):
    """Return logits and a target in this library's layout."""
    return random_case(
        seed, activation=activation, classes=classes, space=space, soft=soft, ignored=ignored, batch=batch
    )


def channel(ids):
    """Return ids in the layout of MONAI and nnU-Net."""
    return ids.unsqueeze(1)


def planes(ids, classes=3, ignored=IGNORED):
    """Return ids as one-hot planes; ignored pixels hold their label in all planes."""
    one_hot = F.one_hot(ids.where(ids != ignored, 0), classes).movedim(-1, 1)
    return one_hot.masked_fill((ids == ignored).unsqueeze(1), ignored)


class TestMonai:
    @pairwise(
        kind=["ids", "planes", "probabilities"],
        jaccard=[False, True],
        space=list(SPACES),
        batch=[False, True],
        squared_pred=[False, True],
        include_background=[True, False],
        smooth=[(1e-5, 1e-5), (0.0, 1.0)],
    )
    def test_dice_and_jaccard(self, kind, jaccard, space, batch, squared_pred, include_background, smooth):
        activation = {"ids": "softmax", "planes": "sigmoid", "probabilities": None}[kind]
        logits, target = case(activation, space=SPACES[space])
        acts = {"softmax": activation == "softmax", "sigmoid": activation == "sigmoid"}
        given = {
            "smooth_nr": smooth[0], "smooth_dr": smooth[1], "batch": batch, "squared_pred": squared_pred,
            "include_background": include_background, "to_onehot_y": kind == "ids", "jaccard": jaccard, **acts,
        }  # fmt: skip
        ours = (JaccardLoss if jaccard else DiceLoss).like_monai(**given)
        peer_target = channel(target) if kind == "ids" else target.double()
        # MONAI's one-hot copy of ids is float32, and so is the norm that it squares again.
        tolerance = SINGLE if kind == "ids" and squared_pred else EXACT
        assert_same(ours, monai.DiceLoss(**given), logits, target, peer_target, tolerance=tolerance)

    @pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
    @pytest.mark.parametrize("batch", [False, True])
    def test_dice_of_one_channel(self, space, batch):
        logits, target = case("sigmoid", 1, space)
        given = {"sigmoid": True, "batch": batch}
        assert_same(DiceLoss.like_monai(**given), monai.DiceLoss(**given), logits, target, target.double())

    @pairwise(reduction=["mean", "sum", "none"], batch=[False, True], loss=["dice", "jaccard", "tversky"])
    def test_reductions(self, reduction, batch, loss):
        logits, target = case("softmax")
        given = {"softmax": True, "to_onehot_y": True, "reduction": reduction, "batch": batch}
        ours = {"dice": DiceLoss, "jaccard": JaccardLoss, "tversky": TverskyLoss}[loss].like_monai(**given)
        theirs = monai.TverskyLoss(**given) if loss == "tversky" else monai.DiceLoss(jaccard=loss == "jaccard", **given)
        assert_same(ours, theirs, logits, target, channel(target))

    @pairwise(
        soft_label=[True, False],
        squared_pred=[False, True],
        jaccard=[False, True],
        activation=["sigmoid", "softmax"],
    )
    def test_soft_labels(self, squared_pred, jaccard, soft_label, activation):
        logits, target = case(activation, soft=True)
        given = {"squared_pred": squared_pred, "jaccard": jaccard, "soft_label": soft_label, activation: True}
        ours = (JaccardLoss if jaccard else DiceLoss).like_monai(**given)
        assert_same(ours, monai.DiceLoss(**given), logits, target)

    @pairwise(
        loss=["dice", "jaccard", "tversky"],
        label=[IGNORED, -1, 2],
        include_background=[True, False],
        batch=[False, True],
    )
    def test_ignored_ids(self, loss, include_background, batch, label):
        logits, target = case("softmax", ignored=True)
        target = target.where(target != IGNORED, label)
        given = {
            "softmax": True, "to_onehot_y": True, "include_background": include_background, "batch": batch,
            "ignore_index": label,
        }  # fmt: skip
        ours = {"dice": DiceLoss, "jaccard": JaccardLoss, "tversky": TverskyLoss}[loss].like_monai(**given)
        theirs = monai.TverskyLoss(**given) if loss == "tversky" else monai.DiceLoss(jaccard=loss == "jaccard", **given)
        assert_same(ours, theirs, logits, target, channel(target))

    @pytest.mark.parametrize("batch", [False, True])
    @pytest.mark.parametrize("loss", ["dice", "jaccard", "tversky"])
    def test_an_absent_class(self, loss, batch):
        logits, target = case("softmax")
        target = target.where(target != 2, 0)
        given = {"softmax": True, "to_onehot_y": True, "batch": batch}
        ours = {"dice": DiceLoss, "jaccard": JaccardLoss, "tversky": TverskyLoss}[loss].like_monai(**given)
        theirs = monai.TverskyLoss(**given) if loss == "tversky" else monai.DiceLoss(jaccard=loss == "jaccard", **given)
        assert_same(ours, theirs, logits, target, channel(target))

    def test_ignored_pixels_of_one_channel(self):
        logits, target = case("sigmoid", 1, ignored=True)
        given = {"sigmoid": True, "ignore_index": IGNORED}
        assert_same(DiceLoss.like_monai(**given), monai.DiceLoss(**given), logits, target, target.double())

    def test_ignored_pixels_of_one_hot_planes(self):
        """MONAI marks them by zeros in all planes, ours by the label."""
        logits, ids = case("softmax", ignored=True)
        one_hot = planes(ids)
        given = {"softmax": True, "ignore_index": IGNORED}
        theirs = one_hot.where(one_hot != IGNORED, 0).double()
        assert_same(DiceLoss.like_monai(**given), monai.DiceLoss(**given), logits, ids, theirs)

    @pytest.mark.parametrize("include_background", [True, False])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_weights(self, include_background, reduction):
        logits, target = case("softmax")
        weight = [0.5, 1.0, 1.5] if include_background else [0.25, 1.75]
        given = {
            "softmax": True, "to_onehot_y": True, "include_background": include_background, "reduction": reduction,
            "weight": weight if reduction == "mean" else [10 * w for w in weight],
        }  # fmt: skip
        loss = DiceLoss.like_monai(**given)
        assert_same(loss, monai.DiceLoss(**given), logits, target, channel(target), tolerance=WEIGHTS)

    def test_the_remedy_for_other_weights(self):
        logits, target = case("softmax")
        given = {"softmax": True, "to_onehot_y": True}
        with pytest.raises(ValueError, match=r"give \[0.5, 1, 1.5\] and multiply by 2"):
            DiceLoss.like_monai(weight=[1, 2, 3], **given)
        ours, theirs = DiceLoss.like_monai(weight=[0.5, 1, 1.5], **given), monai.DiceLoss(weight=[1, 2, 3], **given)
        assert_same(ours, theirs, logits, target, channel(target), factor=0.5, tolerance=WEIGHTS)

    @pairwise(
        kind=["ids", "planes"],
        alpha=[0.5, 0.2],
        include_background=[True, False],
        batch=[False, True],
        soft_label=[False, True],
    )
    def test_tversky(self, kind, alpha, include_background, batch, soft_label):
        activation = "softmax" if kind == "ids" else "sigmoid"
        logits, target = case(activation)
        given = {
            activation: True, "to_onehot_y": kind == "ids", "alpha": alpha, "beta": 1 - alpha, "batch": batch,
            "include_background": include_background, "soft_label": soft_label, "smooth_nr": 0.5, "smooth_dr": 1.0,
        }  # fmt: skip
        peer_target = channel(target) if kind == "ids" else target.double()
        assert_same(TverskyLoss.like_monai(**given), monai.TverskyLoss(**given), logits, target, peer_target)

    @pairwise(
        w_type=["square", "simple", "uniform"],
        batch=[False, True],
        include_background=[True, False],
        absent=[False, True],
    )
    def test_generalized(self, w_type, batch, include_background, absent):
        logits, target = case("softmax", space=(6, 5))
        if absent:
            target = target.where(target != 2, 1)
        smooth = 1e-3 if w_type == "uniform" else 0.0
        given = {
            "softmax": True, "to_onehot_y": True, "w_type": w_type, "batch": batch, "smooth_nr": smooth,
            "smooth_dr": smooth, "include_background": include_background,
        }  # fmt: skip
        ours, theirs = GeneralizedDiceLoss.like_monai(**given), monai.GeneralizedDiceLoss(**given)
        # Its weights are float32.
        assert_same(ours, theirs, logits, target, channel(target), tolerance=SINGLE)

    def test_generalized_with_soft_labels_and_without_reduction(self):
        logits, target = case("sigmoid", soft=True)
        given = {"sigmoid": True, "soft_label": True, "smooth_nr": 0, "smooth_dr": 0}
        ours, theirs = GeneralizedDiceLoss.like_monai(**given), monai.GeneralizedDiceLoss(**given)
        assert_same(ours, theirs, logits, target, tolerance=SINGLE)
        table = GeneralizedDiceLoss.like_monai(reduction="none", **given)(logits, target)
        expected = monai.GeneralizedDiceLoss(reduction="none", **given)(logits, target).flatten(1)
        torch.testing.assert_close(table, expected.expand_as(table), **SINGLE)

    @pairwise(
        space=list(SPACES.values()),
        batch=[False, True],
        squared_pred=[False, True],
        include_background=[True, False],
        label_smoothing=[0.0, 0.1],
        weight=[None, (0.4, 0.8, 1.2)],
    )
    def test_dice_ce(self, space, batch, squared_pred, include_background, label_smoothing, weight):
        logits, target = case("softmax", space=space)
        given = {
            "softmax": True, "to_onehot_y": True, "batch": batch, "squared_pred": squared_pred,
            "include_background": include_background, "label_smoothing": label_smoothing, "lambda_ce": 0.5,
            "lambda_dice": 2.0,
        }  # fmt: skip
        if weight is not None and include_background:
            weight = (weight[0] + 0.6, *weight[1:])  # a mean of 1 over what counts
        theirs = monai.DiceCELoss(weight=None if weight is None else torch.tensor(weight).double(), **given)
        # MONAI's one-hot copy of ids is float32, and so is the norm that it squares again.
        tolerance = SINGLE if squared_pred else EXACT if weight is None else WEIGHTS
        assert_same(
            DiceCELoss.like_monai(weight=weight, **given), theirs, logits, target, channel(target), tolerance=tolerance
        )

    @pytest.mark.parametrize("batch", [False, True])
    def test_dice_ce_of_one_channel(self, batch):
        logits, target = case("sigmoid", 1)
        given = {"sigmoid": True, "batch": batch}
        assert_same(DiceCELoss.like_monai(**given), monai.DiceCELoss(**given), logits, target, target.double())

    def test_dice_ce_of_soft_labels(self):
        logits, target = case("softmax", soft=True)
        assert_same(DiceCELoss.like_monai(softmax=True), monai.DiceCELoss(softmax=True), logits, target)

    @pairwise(classes=[1, 3], alpha=[None, 0.25], gamma=[0.5, 2.0], weight=[None, (0.5, 1.0, 1.5)])
    def test_dice_focal(self, classes, alpha, gamma, weight):
        logits, target = case("sigmoid", classes)
        weight = None if classes == 1 else weight
        given = {"sigmoid": True, "alpha": alpha, "gamma": gamma, "weight": weight, "lambda_focal": 2.0}
        ours, theirs = DiceFocalLoss.like_monai(**given), monai.DiceFocalLoss(**given)
        assert_same(ours, theirs, logits, target, target.double(), tolerance=SINGLE)

    @pytest.mark.parametrize("loss", ["dice_focal", "focal"])
    def test_focal_without_background(self, loss):
        logits, target = case("sigmoid")
        given = {"include_background": False, "weight": [0.5, 1.5]}
        if loss == "focal":
            ours, theirs = FocalLoss.like_monai(**given), monai.FocalLoss(**given)
        else:
            ours = DiceFocalLoss.like_monai(sigmoid=True, **given)
            theirs = monai.DiceFocalLoss(sigmoid=True, **given)
        assert_same(ours, theirs, logits, target, target.double(), tolerance=SINGLE)

    @pairwise(gamma=[0.0, 0.5, 2.0], alpha=[None, 0.25], classes=[1, 3], space=list(SPACES.values()))
    def test_focal(self, classes, space, alpha, gamma):
        logits, target = case("sigmoid", classes, space)
        given = {"alpha": alpha, "gamma": gamma}
        assert_same(
            FocalLoss.like_monai(**given), monai.FocalLoss(**given), logits, target, target.double(), tolerance=SINGLE
        )

    def test_focal_with_ids_made_one_hot(self):
        logits, ids = case("softmax")
        ours, theirs = FocalLoss.like_monai(to_onehot_y=True), monai.FocalLoss(to_onehot_y=True)
        assert_same(ours, theirs, logits, planes(ids), channel(ids), tolerance=SINGLE)

    def test_focal_with_ignored_pixels_of_one_channel(self):
        logits, target = case("sigmoid", 1, ignored=True)
        ours, theirs = FocalLoss.like_monai(ignore_index=IGNORED), monai.FocalLoss(ignore_index=IGNORED)
        assert_same(ours, theirs, logits, target, target.double(), tolerance=SINGLE)

    def test_the_remedy_for_a_focal_softmax(self):
        logits, target = case("softmax")
        ours = CompoundLoss([FocalLoss(activation="softmax")], [1 / 3])
        theirs = monai.FocalLoss(use_softmax=True, to_onehot_y=True)
        assert_same(ours, theirs, logits, target, channel(target), tolerance=SINGLE)


class TestSmp:
    PAIRS: ClassVar = {
        "dice": (DiceLoss, smp.DiceLoss, {}),
        "log_dice": (LogDiceLoss, smp.DiceLoss, {"log_loss": True}),
        "jaccard": (JaccardLoss, smp.JaccardLoss, {}),
        "log_jaccard": (LogJaccardLoss, smp.JaccardLoss, {"log_loss": True}),
        "tversky": (TverskyLoss, smp.TverskyLoss, {"alpha": 0.3, "beta": 0.7}),
        "log_tversky": (LogTverskyLoss, smp.TverskyLoss, {"alpha": 0.3, "beta": 0.7, "log_loss": True}),
    }

    @staticmethod
    def case(mode, **options):
        return case("softmax" if mode == "multiclass" else "sigmoid", 1 if mode == "binary" else 3, **options)

    @pairwise(
        pair=list(PAIRS),
        mode=["binary", "multilabel", "multiclass"],
        space=list(SPACES),
        smooth=[0.0, 0.5],
        ignored=[False, True],
    )
    def test_overlap(self, pair, mode, space, smooth, ignored):
        logits, target = self.case(mode, space=SPACES[space], ignored=ignored)
        loss, peer, more = self.PAIRS[pair]
        more = {**more, "smooth": smooth, "ignore_index": IGNORED if ignored else None}
        assert_same(loss.like_smp(mode, **more), peer(mode, **more), logits, target)

    @pytest.mark.parametrize("pair", PAIRS)
    @pytest.mark.parametrize("mode", ["binary", "multilabel", "multiclass"])
    def test_probabilities(self, pair, mode):
        logits, target = self.case(mode)
        probs = logits.softmax(1) if mode == "multiclass" else logits.sigmoid()
        loss, peer, more = self.PAIRS[pair]
        assert_same(
            loss.like_smp(mode, from_logits=False, **more), peer(mode, from_logits=False, **more), probs, target
        )

    @pytest.mark.parametrize("pair", PAIRS)
    def test_soft_labels(self, pair):
        logits, target = case("sigmoid", 1, soft=True)
        loss, peer, more = self.PAIRS[pair]
        assert_same(loss.like_smp("binary", **more), peer("binary", **more), logits, target)

    @pairwise(pair=list(PAIRS), mode=["multilabel", "multiclass"], weights=[None, [1.0, 2.0, 5.0]])
    def test_some_classes(self, pair, mode, weights):
        logits, target = self.case(mode)
        loss, peer, more = self.PAIRS[pair]
        given = {"classes": [2, 0], "class_weights": weights, **more}
        ours = loss.like_smp(mode, num_classes=None if weights else 3, **given)
        assert_same(ours, peer(mode, **given), logits, target, tolerance=EXACT if weights is None else WEIGHTS)

    def test_an_empty_mask_is_a_perfect_match(self):
        """Not the default of this library, but reproduced."""
        logits = torch.ones(1, 1, 4)
        empty = torch.zeros(1, 1, 4)
        assert DiceLoss.like_smp("binary")(logits, empty) == smp.DiceLoss("binary")(logits, empty) == 0
        assert DiceLoss()(logits, empty).item() == pytest.approx(1 - 1 / (4 / (1 + math.exp(-1)) + 1))

    @pairwise(
        mode=["multiclass", "binary", "multilabel"],
        alpha=[None, 0.25],
        gamma=[0.5, 2.0],
        space=list(SPACES),
        weights=[None, [1.0, 2.0, 5.0]],
    )
    def test_focal(self, mode, alpha, gamma, space, weights):
        logits, target = self.case(mode, space=SPACES[space])
        given = {"alpha": alpha, "gamma": gamma}
        given["class_weights"] = None if mode == "binary" else weights
        ours_target = planes(target) if mode == "multiclass" else target
        tolerance = EXACT if given["class_weights"] is None else WEIGHTS
        # 1 - exp(-nll) loses digits where it is small.
        tolerance = {**tolerance, "rtol": max(tolerance["rtol"], 1e-8)}
        assert_same(
            FocalLoss.like_smp(mode, **given), smp.FocalLoss(mode, **given), logits, ours_target, target,
            tolerance=tolerance,
        )  # fmt: skip

    @pytest.mark.parametrize("mode", ["binary", "multiclass"])
    def test_focal_with_ignored_pixels(self, mode):
        logits, target = self.case(mode, ignored=True)
        ours, theirs = FocalLoss.like_smp(mode, ignore_index=IGNORED), smp.FocalLoss(mode, ignore_index=IGNORED)
        ours_target = planes(target) if mode == "multiclass" else target
        assert_same(ours, theirs, logits, ours_target, target, tolerance={"rtol": 1e-8, "atol": 1e-12})

    @pytest.mark.parametrize("mode", ["binary", "multilabel"])
    def test_focal_of_probabilities(self, mode):
        logits, target = self.case(mode)
        ours, theirs = FocalLoss.like_smp(mode, from_logits=False), smp.FocalLoss(mode, from_logits=False)
        assert_same(ours, theirs, logits.sigmoid(), target, tolerance={"rtol": 1e-8, "atol": 1e-12})

    def test_focal_tversky_of_one_class(self):
        logits, target = case("sigmoid", 1)
        ours = FocalTverskyLoss(gamma=1.5, alpha=0.3, beta=0.7, smooth=0)
        assert_same(ours, smp.TverskyLoss("binary", alpha=0.3, beta=0.7, gamma=1.5), logits, target)


@pytest.fixture(scope="module")
def nnunet():
    """nnU-Net's compound losses."""
    return pytest.importorskip(
        "nnunetv2.training.loss.compound_losses",
        reason="nnU-Net's losses are compared if they are there: pip install --no-deps nnunetv2",
    )


class TestNnunet:
    @staticmethod
    def case(regions, space, **options):
        return case("sigmoid" if regions else "softmax", space=space, **options)

    @pairwise(
        space=list(SPACES),
        batch_dice=[False, True],
        smooth=[1e-5, 1.0],
        regions=[False, True],
        do_bg=[False, True],
        peer=["SoftDiceLoss", "MemoryEfficientSoftDiceLoss"],
    )
    def test_dice(self, nnunet, space, batch_dice, smooth, regions, do_bg, peer):
        logits, target = self.case(regions, SPACES[space])
        given = {"batch_dice": batch_dice, "smooth": smooth, "do_bg": do_bg}
        activation = torch.sigmoid if regions else lambda z: z.softmax(1)
        theirs = getattr(nnunet, peer)(apply_nonlin=activation, ddp=False, **given)
        ours = DiceLoss.like_nnunet(regions=regions, **given)
        assert_same(ours, theirs, logits, target, target if regions else channel(target), constant=1, tolerance=SINGLE)

    @pairwise(space=list(SPACES), batch_dice=[False, True], ignored=[False, True])
    def test_as_its_trainer_builds_it_for_labels(self, nnunet, space, batch_dice, ignored):
        logits, target = self.case(False, SPACES[space], ignored=ignored)
        label = IGNORED if ignored else None
        dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
        theirs = nnunet.DC_and_CE_loss(
            dice, {}, weight_ce=1, weight_dice=1, ignore_label=label, dice_class=nnunet.MemoryEfficientSoftDiceLoss
        )
        ours = DiceCELoss.like_nnunet(batch_dice=batch_dice, ignore_label=label)
        assert_same(ours, theirs, logits, target, channel(target), constant=1, tolerance=SINGLE)

    def test_a_class_that_one_image_lacks(self, nnunet):
        logits, target = self.case(False, (5, 4))
        target[0] = target[0].where(target[0] != 2, 0)
        dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
        ours, theirs = DiceCELoss.like_nnunet(), nnunet.DC_and_CE_loss(dice, {})
        assert_same(ours, theirs, logits, target, channel(target), constant=1, tolerance=SINGLE)

    @pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
    @pytest.mark.parametrize("batch_dice", [False, True])
    def test_as_its_trainer_builds_it_for_regions(self, nnunet, space, batch_dice):
        logits, target = self.case(True, space)
        dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": True, "ddp": False}
        theirs = nnunet.DC_and_BCE_loss({}, dice, use_ignore_label=False)
        ours = DiceCELoss.like_nnunet(batch_dice=batch_dice, regions=True)
        assert_same(ours, theirs, logits, target, constant=1, tolerance=SINGLE)

    def test_weights_of_the_terms(self, nnunet):
        logits, target = self.case(False, (5, 4))
        weights = {"weight_ce": 0.5, "weight_dice": 3.0}
        dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": True, "ddp": False}
        theirs = nnunet.DC_and_CE_loss(dice, {}, **weights)
        ours = DiceCELoss.like_nnunet(do_bg=True, **weights)
        assert_same(ours, theirs, logits, target, channel(target), constant=3, tolerance=SINGLE)

    @pytest.mark.filterwarnings("ignore:size_average and reduce args")  # nnU-Net's
    @pytest.mark.parametrize("k", [10, 25, 100])
    def test_top_k_of_one_image(self, nnunet, k):
        logits, target = case("softmax", batch=1, space=(10, 10))
        ours = TopKCrossEntropyLoss(activation="softmax", k=k / 100)
        assert_same(ours, nnunet.TopKLoss(k=k), logits, target, channel(target))

    def test_an_ignored_label_multiplies_the_cross_entropy_of_regions_in_nnunet(self, nnunet):
        """Its sum over all planes is divided by the pixels of one."""
        logits, target = self.case(True, (5, 4))
        ids = torch.arange(20).view(5, 4).expand(3, 5, 4)
        ignored = ids % 4 == 0
        marked = target.masked_fill(ignored.unsqueeze(1), IGNORED)
        ours = DiceCELoss.like_nnunet(regions=True, ignore_label=IGNORED, weight_dice=0)(logits, marked)
        dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": True, "ddp": False}
        loss = nnunet.DC_and_BCE_loss({}, dice, use_ignore_label=True, weight_dice=0)
        with_mask = torch.cat([target, ignored.unsqueeze(1)], 1)
        table = plain_sums(logits, marked, activation="sigmoid", ignore_index=IGNORED)
        sums = [sums for image in table for sums in image]
        mean = math.fsum(s.total("nll") for s in sums) / math.fsum(s.total("count") for s in sums)
        assert ours.item() == pytest.approx(mean, rel=1e-12)
        assert loss(logits, with_mask).item() == pytest.approx(3 * mean, rel=1e-6)

    @pytest.mark.filterwarnings("ignore:size_average and reduce args")  # nnU-Net's
    def test_ignored_pixels_are_among_those_of_which_nnunet_takes_a_share(self, nnunet):
        logits = torch.zeros(1, 2, 10)
        ids = torch.tensor([[0, 1, *[IGNORED] * 8]])
        theirs = nnunet.TopKLoss(k=50, ignore_index=IGNORED)(logits, channel(ids))
        ours = TopKCrossEntropyLoss(activation="softmax", k=0.5, ignore_index=IGNORED)(logits, ids)
        assert theirs.item() == pytest.approx(2 * math.log(2) / 5)  # five hardest, three of them ignored
        assert ours.item() == pytest.approx(math.log(2))


class TestWhereAPeerIsWrong:
    """Both numbers are asserted: theirs, and ours against an independent definition."""

    @pytest.mark.parametrize("pair", ["dice", "jaccard"])
    def test_smp_counts_an_absent_class_as_perfect(self, pair):
        loss, peer, _ = TestSmp.PAIRS[pair]
        logits, target = case("softmax")
        target = target.where(target != 2, 0)
        ours, theirs = loss.like_smp("multiclass"), peer("multiclass")
        assert_same(ours, theirs, logits, target, factor=3 / 2)
        if pair == "dice":
            options = {"activation": "softmax", "smooth": (0.0, 0.0)}
            expected = plain_dice_loss(logits, target, absent="skip", **options)
            assert ours(logits, target).item() == pytest.approx(expected, rel=1e-12)

    def test_smp_lets_nan_under_an_ignored_pixel_spoil_the_loss(self):
        logits, target = case("softmax", ignored=True)
        spoiled = logits.masked_fill((target == IGNORED).unsqueeze(1), torch.nan)
        assert smp.DiceLoss("multiclass", ignore_index=IGNORED)(spoiled, target).isnan()
        ours = DiceLoss.like_smp("multiclass", ignore_index=IGNORED)
        assert ours(spoiled, target) == ours(logits, target)

    def test_smp_divides_the_cross_entropy_by_ignored_pixels_too(self):
        logits = torch.zeros(1, 1, 4)
        target = torch.tensor([[[1, 0, IGNORED, IGNORED]]])
        theirs = smp.SoftBCEWithLogitsLoss(ignore_index=IGNORED)(logits, target.float())
        ours = CrossEntropyLoss(ignore_index=IGNORED)(logits, target)
        assert theirs.item() == pytest.approx(math.log(2) / 2)
        assert ours.item() == pytest.approx(math.log(2))

    def test_smp_cannot_ignore_pixels_in_a_multilabel_focal_loss(self):
        logits, target = case("sigmoid", ignored=True)
        with pytest.raises(IndexError):
            smp.FocalLoss("multilabel", ignore_index=IGNORED)(logits, target)
        ours = FocalLoss.like_smp("multilabel", ignore_index=IGNORED)(logits, target)
        table = [s for image in plain_sums(logits, target, activation="sigmoid", ignore_index=IGNORED) for s in image]
        expected = math.fsum(s.total("focal") for s in table) / math.fsum(s.total("count") for s in table)
        assert ours.item() == pytest.approx(expected, rel=1e-12)

    def test_smp_raises_the_mean_of_the_classes_to_gamma(self):
        """Focal Tversky (Abraham and Khan, ISBI 2019) adds up the powers."""
        probs = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0]]])
        target = torch.tensor([[[1, 0, 0, 0], [0, 1, 0, 0]]])
        theirs = smp.TverskyLoss("multilabel", from_logits=False, gamma=2.0)(probs, target)
        ours = FocalTverskyLoss(activation=None, gamma=2.0, alpha=0.5, beta=0.5, smooth=0)(probs, target)
        assert theirs.item() == pytest.approx(((0 + 1 / 3) / 2) ** 2)
        assert ours.item() == pytest.approx((0 + (1 / 3) ** 2) / 2)

    def test_monai_weights_multiply_the_loss(self):
        logits, target = case("softmax")
        plain = monai.DiceLoss(softmax=True, to_onehot_y=True)(logits, channel(target))
        tens = monai.DiceLoss(softmax=True, to_onehot_y=True, weight=[10.0, 10.0, 10.0])(logits, channel(target))
        torch.testing.assert_close(tens, 10 * plain)
        ours = DiceLoss(activation="softmax", smooth=1e-5, pool="image", class_weights=[10, 10, 10])(logits, target)
        expected = plain_dice_loss(logits, target, activation="softmax", smooth=(1e-5, 1e-5), pool="image")
        assert ours.item() == pytest.approx(expected, rel=1e-12)

    def test_monai_without_smoothing_is_nan_for_a_class_that_is_nowhere(self):
        probs = torch.tensor([[[0.5, 0.5], [0.0, 0.0]]])
        target = torch.tensor([[[1, 0], [0, 0]]])
        given = {"smooth_nr": 0.0, "smooth_dr": 0.0}
        assert monai.DiceLoss(**given)(probs, target).isnan()
        assert DiceLoss.like_monai(**given)(probs, target).item() == pytest.approx(0.5)

    def test_monai_dice_ce_has_no_ignored_label(self):
        logits, target = case("softmax", space=(4, 6))
        ignored = target.clone()
        ignored[..., 4:] = IGNORED
        with pytest.raises((AssertionError, RuntimeError, IndexError)):
            monai.DiceCELoss(softmax=True, to_onehot_y=True)(logits, channel(ignored))
        ours = DiceCELoss.like_monai(softmax=True, to_onehot_y=True, ignore_index=IGNORED)(logits, ignored)
        cropped = monai.DiceCELoss(softmax=True, to_onehot_y=True)(logits[..., :4], channel(target[..., :4]))
        torch.testing.assert_close(ours, cropped)

    def test_monai_dice_ce_takes_a_softmax_of_classes_that_overlap(self):
        logits = torch.zeros(1, 3, 4)
        target = torch.ones(1, 3, 4, dtype=torch.long)  # every pixel of all three classes
        entropy = {"sigmoid": True, "lambda_dice": 0.0}
        theirs, ours = monai.DiceCELoss(**entropy)(logits, target), DiceCELoss.like_monai(**entropy)(logits, target)
        assert theirs.item() == pytest.approx(3 * math.log(3))  # labels that sum to 3, of probabilities that sum to 1
        assert ours.item() == pytest.approx(math.log(2))

    def test_monai_smooths_generalized_dice_by_the_square_of_the_object(self):
        """1e-5 is added to sums divided by (128 · 256)²: it acts as 10737 pixels on halves of 32768 pixels each."""
        ids = torch.zeros(1, 256, 256, dtype=torch.long)
        ids[:, 128:] = 1
        wrong = planes(1 - ids, 2).double()  # every pixel
        theirs = monai.GeneralizedDiceLoss(to_onehot_y=True)(wrong, channel(ids))
        ours = GeneralizedDiceLoss(activation=None, smooth=1e-5)(wrong, ids)
        smooth = 1e-5 * 32768**2
        assert theirs.item() == pytest.approx(1 - smooth / (4 * 32768 + smooth), rel=1e-5)
        assert theirs.item() < 0.93
        assert ours.item() == pytest.approx(1, abs=1e-9)

    def test_monai_generalized_dice_of_an_empty_mask_is_perfect(self):
        """Without any class present its weights are all 0."""
        probs = torch.ones(1, 1, 4)
        empty = torch.zeros(1, 1, 4)
        assert monai.GeneralizedDiceLoss()(probs, empty) == 0
        assert GeneralizedDiceLoss(activation=None, smooth=1e-5)(probs, empty).item() == pytest.approx(1, abs=1e-5)

    def test_monai_takes_the_background_of_several_planes_for_ignored(self):
        logits = torch.full((1, 2, 4), 3.0)
        target = torch.tensor([[[1, 0, 0, 0], [0, 1, 0, 0]]])  # two pixels of neither class, none ignored
        given = {"sigmoid": True, "ignore_index": IGNORED}
        theirs = monai.DiceLoss(**given)(logits, target.float())
        ours = DiceLoss.like_monai(**given)(logits, target)
        p = 1 / (1 + math.exp(-3))
        assert ours.item() == pytest.approx(1 - 2 * p / (4 * p + 1), rel=1e-4)
        assert theirs.item() == pytest.approx(1 - 2 * p / (2 * p + 1), rel=1e-4)

    def test_monai_focal_with_an_ignored_label_is_multiplied_by_the_classes(self):
        logits, ids = case("softmax")
        one_hot = planes(ids)
        without = monai.FocalLoss(to_onehot_y=True)(logits, channel(ids))
        same = monai.FocalLoss(to_onehot_y=True, ignore_index=IGNORED)(logits, channel(ids))  # which nothing holds
        torch.testing.assert_close(same, 3 * without)
        table = [s for image in plain_sums(logits, one_hot, activation="sigmoid") for s in image]
        expected = math.fsum(s.total("focal") for s in table) / math.fsum(s.total("count") for s in table)
        ours = FocalLoss.like_monai(to_onehot_y=True, ignore_index=IGNORED)(logits, one_hot)
        assert ours.item() == pytest.approx(expected, rel=1e-12)

    def test_monai_focal_softmax_is_divided_by_the_classes(self):
        logits, ids = torch.zeros(1, 4, 3), torch.tensor([[0, 1, 2]])
        hand = 0.75**2 * math.log(4)
        theirs = monai.FocalLoss(use_softmax=True, to_onehot_y=True)(logits, channel(ids))
        ours = FocalLoss(activation="softmax")(logits, ids)
        assert theirs.item() == pytest.approx(hand / 4)
        assert ours.item() == pytest.approx(hand)

    def test_soft_labels_of_the_focal_loss_differ_everywhere(self):
        """A label of 1/2 at p = 0.9: ours is the mean of the losses of 0 and 1, as of two raters who disagree."""
        logits, target = torch.full((1, 1, 1), math.log(9)), torch.full((1, 1, 1), 0.5)
        present, absent = 0.1**2 * -math.log(0.9), 0.9**2 * -math.log(0.1)
        entropy = -(math.log(0.9) + math.log(0.1)) / 2
        assert FocalLoss()(logits, target).item() == pytest.approx((present + absent) / 2, rel=1e-6)
        assert monai.FocalLoss()(logits, target).item() == pytest.approx(0.5**2 * entropy, rel=1e-6)
        by_smp = (1 - math.exp(-entropy)) ** 2 * entropy
        assert smp.FocalLoss("binary")(logits, target).item() == pytest.approx(by_smp, rel=1e-6)
        assert sigmoid_focal_loss(logits, target, alpha=-1).item() == pytest.approx(0.5**2 * entropy, rel=1e-6)

    def test_monai_dice_focal_takes_a_sigmoid_beside_the_softmax(self):
        logits, ids = torch.zeros(1, 4, 3), torch.tensor([[0, 1, 2]])
        theirs = monai.DiceFocalLoss(softmax=True, to_onehot_y=True, lambda_dice=0.0)(logits, channel(ids))
        ours = DiceFocalLoss(activation="softmax", dice_weight=0)(logits, ids)
        assert theirs.item() == pytest.approx(0.5**2 * math.log(2))  # of probabilities that sum to 2
        assert ours.item() == pytest.approx(0.75**2 * math.log(4))


class TestTorch:
    @pairwise(
        space=list(SPACES.values()), ignored=[False, True], label_smoothing=[0.0, 0.2], weights=[None, [1.0, 2.0, 5.0]]
    )
    def test_cross_entropy_of_ids(self, space, ignored, label_smoothing, weights):
        logits, ids = case("softmax", space=space, ignored=ignored)
        label = IGNORED if ignored else None
        ours = CrossEntropyLoss(
            activation="softmax", label_smoothing=label_smoothing, class_weights=weights, ignore_index=label
        )
        theirs = torch.nn.CrossEntropyLoss(
            weight=None if weights is None else torch.tensor(weights, dtype=torch.float64),
            label_smoothing=label_smoothing, ignore_index=IGNORED,
        )  # fmt: skip
        assert_same(ours, theirs, logits, ids)

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
    def test_cross_entropy_of_soft_labels(self, label_smoothing):
        logits, target = case("softmax", soft=True)
        ours = CrossEntropyLoss(activation="softmax", label_smoothing=label_smoothing)
        assert_same(ours, torch.nn.CrossEntropyLoss(label_smoothing=label_smoothing), logits, target)

    def test_weighted_soft_labels_are_not_divided_by_their_weights_in_torch(self):
        logits = torch.zeros(1, 2, 1)
        ids, one_hot = torch.tensor([[0]]), torch.tensor([[[1.0], [0.0]]])
        weighted = torch.nn.CrossEntropyLoss(weight=torch.tensor([10.0, 1.0]))
        assert weighted(logits, ids).item() == pytest.approx(math.log(2))
        assert weighted(logits, one_hot).item() == pytest.approx(10 * math.log(2))  # the same label
        ours = CrossEntropyLoss(activation="softmax", class_weights=[10, 1])
        assert ours(logits, ids).item() == pytest.approx(math.log(2))
        assert ours(logits, one_hot).item() == pytest.approx(math.log(2))

    @pytest.mark.parametrize("classes", [1, 3])
    @pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
    @pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
    def test_binary_cross_entropy(self, classes, space, soft):
        logits, target = case("sigmoid", classes, space, soft=soft)
        theirs = torch.nn.BCEWithLogitsLoss()
        assert_same(CrossEntropyLoss(), theirs, logits, target, target.double())

    def test_smoothed_binary_cross_entropy(self):
        logits, target = case("sigmoid")
        smoothed = target.double() * 0.8 + 0.1
        assert_same(CrossEntropyLoss(label_smoothing=0.2), torch.nn.BCEWithLogitsLoss(), logits, target, smoothed)

    @pairwise(alpha=[-1, 0.0, 0.25, 1.0], gamma=[0, 0.5, 2], classes=[1, 3])
    def test_torchvision_focal(self, alpha, gamma, classes):
        logits, target = case("sigmoid", classes)
        ours = FocalLoss(gamma=gamma, alpha=None if alpha == -1 else alpha)
        assert_same(
            ours, lambda z, t: sigmoid_focal_loss(z, t, alpha, gamma, reduction="mean"), logits, target,
            target.double(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "arguments", "message"),
    [
        (DiceLoss.like_monai, {"jaccard": True}, r"use JaccardLoss.like_monai\(...\)"),
        (DiceLoss.like_monai, {"other_act": torch.tanh}, "other_act must be None; apply it to the net's output"),
        (DiceLoss.like_monai, {"sigmoid": True, "softmax": True}, "must not both be True"),
        (DiceLoss.like_monai, {"weight": 2.0}, "got 2: multiply the loss by it"),
        (DiceLoss.like_monai, {"weight": [1, 1], "reduction": "none"}, "multiply the table by it"),
        (DiceLoss.like_monai, {"weight": [0, 0]}, "weight must have a mean of 1"),
        (DiceLoss.like_monai, {"reduction": "avg"}, "reduction must be one of"),
        (JaccardLoss.like_monai, {"jaccard": False}, "otherwise use DiceLoss.like_monai"),
        (GeneralizedDiceLoss.like_monai, {"softmax": True}, "smooth_nr and smooth_dr must be 0 with w_type='square'"),
        (GeneralizedDiceLoss.like_monai, {"w_type": "cubic"}, "w_type must be one of 'square', 'simple', 'uniform'"),
        (GeneralizedDiceLoss.like_monai, {"w_type": "uniform", "reduction": "sum"}, "once for each class here"),
        (DiceCELoss.like_monai, {}, "sigmoid=True or softmax=True must be given"),
        (DiceCELoss.like_monai, {"softmax": True, "jaccard": True}, "give CompoundLoss the terms"),
        (DiceCELoss.like_monai, {"softmax": True, "reduction": "sum"}, 'reduction must be "mean"'),
        (DiceCELoss.like_monai, {"softmax": True, "weight": [1, 1]}, "weight needs to_onehot_y=True"),
        (DiceCELoss.like_monai, {"softmax": True, "to_onehot_y": True, "weight": [2, 2]}, "and multiply by 2"),
        (DiceCELoss.like_monai, {"sigmoid": True, "weight": [0.5]}, "weight must be None with sigmoid=True"),
        (DiceCELoss.like_monai, {"sigmoid": True, "label_smoothing": 0.1}, "label_smoothing must be 0 with sigmoid"),
        (DiceFocalLoss.like_monai, {"softmax": True}, "a sigmoid for each class even then"),
        (DiceFocalLoss.like_monai, {}, "sigmoid=True or softmax=True must be given"),
        (DiceFocalLoss.like_monai, {"sigmoid": True, "include_background": False}, r"needs weight=\[1.0, ...\]"),
        (FocalLoss.like_monai, {"use_softmax": True}, r"CompoundLoss\(\[FocalLoss"),
        (FocalLoss.like_monai, {"alpha": [0.5, 0.5]}, "alpha must be one number"),
        (FocalLoss.like_monai, {"reduction": "sum"}, 'reduction must be "mean"'),
        (FocalLoss.like_monai, {"include_background": False}, r"needs weight=\[1.0, ...\]"),
        (DiceLoss.like_smp, {"mode": "softmax"}, "mode must be one of 'binary', 'multiclass', 'multilabel'"),
        (DiceLoss.like_smp, {"mode": "binary", "log_loss": True}, r"use the like_smp\(...\) of LogDiceLoss"),
        (DiceLoss.like_smp, {"mode": "binary", "classes": [0]}, "leave out classes and class_weights"),
        (DiceLoss.like_smp, {"mode": "multiclass", "classes": [0]}, "classes need num_classes"),
        (DiceLoss.like_smp, {"mode": "multiclass", "classes": [3], "num_classes": 3}, "from 0 to 2, got"),
        (DiceLoss.like_smp, {"mode": "binary", "eps": 1.0}, r"eps must be a number in \[0, 0.001\]"),
        (LogDiceLoss.like_smp, {"mode": "binary", "log_loss": False}, "use DiceLoss.like_smp"),
        (JaccardLoss.like_smp, {"mode": "binary", "log_loss": True}, "LogJaccardLoss or LogTverskyLoss"),
        (TverskyLoss.like_smp, {"mode": "binary", "log_loss": True}, "LogJaccardLoss or LogTverskyLoss"),
        (LogJaccardLoss.like_smp, {"mode": "binary", "log_loss": False}, "use JaccardLoss.like_smp"),
        (LogTverskyLoss.like_smp, {"mode": "binary", "log_loss": False}, "use TverskyLoss.like_smp"),
        (LogTverskyLoss.like_smp, {"mode": "binary", "gamma": 2.0}, "gamma must be 1, got 2.0"),
        (TverskyLoss.like_smp, {"mode": "binary", "gamma": 2.0}, "gamma must be 1, got 2.0"),
        (FocalLoss.like_smp, {"mode": "binary", "normalized": True}, "normalized must be False"),
        (FocalLoss.like_smp, {"mode": "binary", "reduced_threshold": 0.5}, "reduced_threshold None"),
        (FocalLoss.like_smp, {"mode": "binary", "reduction": "sum"}, 'reduction must be "mean"'),
        (FocalLoss.like_smp, {"mode": "binary", "class_weights": [1]}, "leave out classes and class_weights"),
        (FocalLoss.like_smp, {"mode": "multiclass", "from_logits": False}, r"p / \(1 \+ p\)"),
    ],
)
def test_refuses(preset, arguments, message):
    with pytest.raises(ValueError, match=message):
        preset(**arguments)


def test_one_channel_without_background_is_refused():
    """MONAI warns and keeps it."""
    logits, mask = case("sigmoid", 1)
    given = {"sigmoid": True, "include_background": False}
    with pytest.warns(UserWarning, match="single channel prediction"):
        monai.DiceLoss(**given)(logits, mask)
    with pytest.raises(ValueError, match="exclude_classes leaves no class"):
        DiceLoss.like_monai(**given)(logits, mask)


def test_presets_of_a_subclass():
    class Mine(DiceLoss):
        pass

    assert isinstance(Mine.like_monai(sigmoid=True), Mine)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("nnunet", lambda **given: DiceCELoss.like_nnunet(do_bg=False, ignore_label=IGNORED, **given)),
        (
            "monai_dice_ce",
            lambda **_: DiceCELoss.like_monai(
                softmax=True, to_onehot_y=True, include_background=False, ignore_index=IGNORED
            ),
        ),
        ("smp_dice", lambda **_: DiceLoss.like_smp("multiclass", classes=[1], num_classes=2, ignore_index=IGNORED)),
    ],
)
def test_the_catalogue_has_the_presets(name, preset):
    from hydra import compose, initialize_config_dir

    from lightning_dice.cli.config import CONF_DIR, instantiate, register_resolvers

    register_resolvers()
    overrides = [
        f"loss={name}", "data=synthetic", "data.activation=softmax", "data.classes=[background,object]",
        "data.exclude_classes=[0]", f"data.ignore_index={IGNORED}",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        loss = instantiate(compose("fit", overrides=overrides).loss, "loss")
    assert repr(loss) == repr(preset())
