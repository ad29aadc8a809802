from __future__ import annotations

import pytest
import torch
from definitions import random_case
from torch import nn

from lightning_dice.losses import (
    BoundaryLoss,
    CompoundLoss,
    DiceLoss,
    FocalLoss,
    FocalTverskyLoss,
    OnProbabilities,
    OverlapLoss,
    TverskyLoss,
)


class TestAnyModule:
    def test_planes_and_ids_of_small_dtypes(self):
        """Data sets store them, and torch's losses refuse them."""
        logits, mask = random_case(0, activation="sigmoid", dtype=torch.float32)
        loss = CompoundLoss({"dice": DiceLoss(), "bce": nn.BCEWithLogitsLoss()})
        expected = DiceLoss()(logits, mask) + nn.BCEWithLogitsLoss()(logits, mask.float())
        torch.testing.assert_close(loss(logits, mask.to(torch.uint8)), expected)
        logits, ids = random_case(0, activation="softmax", dtype=torch.float32)
        loss = CompoundLoss({"dice": DiceLoss(activation="softmax"), "ce": nn.CrossEntropyLoss()})
        expected = DiceLoss(activation="softmax")(logits, ids) + nn.CrossEntropyLoss()(logits, ids)
        torch.testing.assert_close(loss(logits, ids.to(torch.uint8)), expected)

    def test_the_ignored_label_is_not_taken_for_a_label(self):
        logits, mask = random_case(0, activation="sigmoid", ignored=True)
        loss = CompoundLoss({"dice": DiceLoss(ignore_index=255), "bce": nn.BCEWithLogitsLoss()})
        with pytest.raises(ValueError, match=r"term 'bce', a BCEWithLogitsLoss, takes the ignored label 255"):
            loss(logits, mask)
        loss(logits, mask.where(mask != 255, 0))
        logits, ids = random_case(0, activation="softmax", ignored=True)
        for_ids = DiceLoss(activation="softmax", ignore_index=255)
        CompoundLoss({"dice": for_ids, "ce": nn.CrossEntropyLoss(ignore_index=255)})(logits, ids)
        with pytest.raises(ValueError, match="set its ignore_index=255"):
            CompoundLoss({"dice": for_ids, "ce": nn.CrossEntropyLoss()})(logits, ids)

    def test_an_error_of_a_module_comes_with_a_remedy(self):
        logits, ids = random_case(0, activation="softmax")
        loss = CompoundLoss({"dice": DiceLoss(activation="softmax"), "l1": nn.L1Loss()})
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"L1Loss failed on logits .*OnProbabilities"):  # noqa: PT030
            loss(logits, ids)


class TestOnProbabilities:
    def test_losses_of_this_library_are_refused(self):
        with pytest.raises(ValueError, match=r"must not be one of lightning_dice\.losses, got DiceLoss"):
            OnProbabilities(DiceLoss())

    def test_a_sum_and_a_mean(self):
        logits, mask = random_case(1, activation="sigmoid")
        mean, total = (OnProbabilities(nn.MSELoss(reduction=one))(logits, mask) for one in ("mean", "sum"))
        torch.testing.assert_close(mean * logits.numel(), total)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DiceLoss()], "terms must be losses by name, or a list of losses, got DiceLoss"),
        (["dice"], "terms must be losses by name"),
        ([{}], "at least one loss"),
        ([{"dice": 1}], "terms must be modules of logits and target, got int for 'dice'"),
        ([{"a.b": DiceLoss()}], "names of terms must have no dots"),
        ([[DiceLoss(), DiceLoss()]], "terms of one class need names"),
        ([{"dice": DiceLoss()}, 2.0], "weights must be numbers by the names of the terms"),
        ([{"dice": DiceLoss()}, [1, 2]], "one for each of the 1 terms, got 2"),
        ([{"dice": DiceLoss()}, {"ce": 1}], r"weights must name terms, dice; got ce: .*'~loss.weights.<term>'"),
        ([{"dice": DiceLoss()}, {"dice": -1}], "the weight of dice must be a number >= 0, got -1"),
        ([{"a": DiceLoss(), "b": DiceLoss(activation="softmax")}], "terms must have the same activation"),
        ([{"a": DiceLoss(), "b": FocalLoss(ignore_index=255)}], "terms must have the same ignore_index"),
        ([{"a": DiceLoss(reduction="none")}], "term 'a' must have one value"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        CompoundLoss(*arguments)


def test_terms_of_any_mapping_and_a_list():
    logits, mask = random_case(2, activation="sigmoid")
    expected = DiceLoss()(logits, mask) + FocalLoss()(logits, mask)
    for terms in (
        nn.ModuleDict({"a": DiceLoss(), "b": FocalLoss()}),
        [DiceLoss(), FocalLoss()],
        {1: DiceLoss(), 2: FocalLoss()},
    ):
        torch.testing.assert_close(CompoundLoss(terms)(logits, mask), expected)


def test_without_a_weight_there_is_nothing():
    """For all logits: 0 times their sum, which may be infinite, would be NaN."""
    logits = torch.full((1, 1, 64, 64), 100.0, dtype=torch.float16, requires_grad=True)
    loss = CompoundLoss({"dice": DiceLoss()}, {"dice": 0})(logits, torch.zeros(1, 1, 64, 64))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_a_term_of_weight_zero_is_not_computed():
    logits, mask = random_case(3, activation="sigmoid")
    loss = CompoundLoss({"dice": DiceLoss(), "boundary": BoundaryLoss()}, {"boundary": 0})
    torch.testing.assert_close(loss(logits, mask), DiceLoss()(logits, mask))
    assert set(loss.values) == {"dice"}


class TestALossOfOnesOwn:
    def test_what_it_must_return(self):
        class Volume(OverlapLoss):
            def per_class(self, sums):
                return (sums.predicted - sums.actual).abs().mean()

        with pytest.raises(ValueError, match=r"Volume.per_class must return a loss for each class, \(1, 3\), got \(\)"):
            Volume()(*random_case(4, activation="sigmoid"))

    def test_what_it_must_define(self):
        class Empty(OverlapLoss):
            pass

        with pytest.raises(NotImplementedError, match=r"Empty must define per_class\(self, sums\)"):
            Empty()(*random_case(4, activation="sigmoid"))

    def test_its_settings_are_shown_and_an_unknown_one_is_refused(self):
        class Power(OverlapLoss):
            def __init__(self, *, power=2.0, **settings):
                super().__init__(**settings)
                self.power = power

        assert repr(Power(power=3.0, pool="image")) == "Power(power=3.0, activation='sigmoid', pool='image')"
        with pytest.raises(TypeError, match=r"Power has no setting 'powr' \(did you mean 'power'\?\)"):
            Power(powr=2)


def test_repr():
    assert repr(DiceLoss()) == "DiceLoss(activation='sigmoid')"
    loss = TverskyLoss(smooth=1e-5, class_weights=[1, 2], absent="skip")
    assert "alpha=0.3, beta=0.7" in repr(loss)
    assert "smooth=1e-05" in repr(loss)
    assert "class_weights=[1.0, 2.0]" in repr(loss)
    assert "absent='skip'" in repr(loss)
    assert "2 x dice: DiceLoss(activation='sigmoid')" in repr(CompoundLoss({"dice": DiceLoss()}, {"dice": 2}))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (DiceLoss, {"sigmoid": True}, "DiceLoss has no setting 'sigmoid'; it has absent.*like_monai"),
        (TverskyLoss, {"alfa": 1}, r"'alfa' \(did you mean 'alpha'\?\)"),
        (FocalLoss, {"gama": 1}, r"FocalLoss has no setting 'gama' \(did you mean 'gamma'\?\)"),
    ],
)
def test_an_unknown_setting_is_refused(kind, settings, message):
    with pytest.raises(TypeError, match=message):
        kind(**settings)


def test_focal_tversky_is_no_peers():
    for make in (
        lambda: FocalTverskyLoss.like_monai(sigmoid=True),
        lambda: FocalTverskyLoss.like_smp("binary", gamma=2),
    ):
        with pytest.raises(ValueError, match=r"use TverskyLoss.like_"):
            make()
