"""Every loss of the table: its definition, its invariances and the hard cases.

What all losses inherit from the shared code is in `test_every_loss.py`.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from losses.family import (
    CASES,
    EACH,
    FIRST,
    FIRST_EACH,
    Case,
    close,
    ids_of,
    in_turn,
    make_case,
    make_target,
    value_and_gradient,
)

from lightning_dice.kernels import OverlapSums, overlap_sums
from lightning_dice.losses import CrossEntropyLoss, DiceCELoss, OverlapLoss


def each_of(table):
    return pytest.mark.parametrize(("case", "activation"), table, ids=ids_of(table))


each = each_of(EACH)
# One activation of each case, in turn, where the activation has little to do with what is tested.
each_in_turn = each_of(in_turn(CASES))
first = each_of(FIRST_EACH)
first_in_turn = each_of(in_turn(FIRST))

OVERLAPS = [case for case in FIRST if isinstance(case.loss(), OverlapLoss)]
RULES = ["smooth", "skip", "penalize"]

# Exact in float32, the dtype of class weights.
WEIGHTS = [1.0, 2.0, 0.5, 3.0, 0.25]


@st.composite
def problems(draw, case, activation):
    """Settings, logits, target and the other arguments of a call."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    batch, classes = draw(st.integers(1, 3)), draw(st.integers(2 if activation == "softmax" else 1, 5))
    shape = (batch, classes, *draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.5, 2.0, 4.0]))
    kinds = ["planes", "soft"] if activation == "sigmoid" or classes == 1 else ["ids", "planes", "soft"]
    kind = draw(st.sampled_from(kinds))
    exclusive = activation == "softmax" or kind == "ids"
    if activation is None:
        # Probabilities of exclusive classes sum to 1; those near 0 leave no room for a finite step.
        logits = 0.05 + 0.9 * (logits.softmax(1) if exclusive else logits.sigmoid())
        # Not all with the same sum, or pixels whose classes are joined would be equally hard.
        sums = 0.95 + 0.04 * torch.rand((batch, 1, *shape[2:]), generator=generator, dtype=torch.float64)
        logits = logits / logits.sum(1, keepdim=True) * sums if exclusive else logits
    ignore = draw(st.sampled_from([None, 255, 99]))
    target = make_target(generator, shape, activation, kind, 0.3 if ignore else 0.0)
    dtypes = [torch.float64] if kind == "soft" else [torch.uint8, torch.int16, torch.int32, torch.int64]
    dtypes += [torch.float32] * (kind == "planes") + [torch.bool] * (kind == "planes" and ignore is None)
    settings = {
        "ignore_index": ignore,
        "smooth": draw(st.sampled_from([(1.0, 1.0), (1e-5, 1e-5), (0.5, 2.0), (0.0, 0.0)])),
        "pool": draw(st.sampled_from(["image", "batch", "all"])),
        "absent": draw(st.sampled_from(["smooth", "skip", "penalize"])),
        "exclude_classes": sorted(draw(st.sets(st.integers(0, classes - 1), max_size=classes - 1))),
    }
    if settings["pool"] != "all" and draw(st.booleans()):
        settings["class_weights"] = WEIGHTS[:classes]
    more = {}
    if "weight" in case.row.takes:
        more = {"weight": None, "annotated": None}
        weighting = draw(st.sampled_from(["none", "pixel", "pixel-and-class"]))
        if weighting != "none":
            of = (batch, *shape[2:]) if weighting == "pixel" else shape
            more["weight"] = torch.rand(of, generator=generator, dtype=torch.float64) + 0.1
        if draw(st.booleans()):
            more["annotated"] = torch.rand(batch, classes, generator=generator) < 0.7
            if exclusive:  # Classes that are not annotated are labelled as background.
                target = background_where_not_annotated(target, more["annotated"], planes=kind != "ids")
    target = target.where(target != 255, ignore or 0).to(draw(st.sampled_from(dtypes)))
    return settings, logits, target, more


def background_where_not_annotated(target, annotated, *, planes):
    target = target.clone()
    for b, c in (~annotated).nonzero().tolist():
        if c and planes:
            given = target[b, c] * (target[b] != 255).all(0)
            target[b, 0] += given
            target[b, c] -= given
        elif c:
            target[b][target[b] == c] = 0
    return target


def rules_of(case: Case) -> list[str]:
    """Return the policies for absent classes that the loss has."""
    return RULES if case.row.overlaps else ["smooth"]


class TestDefinition:
    def check(self, case, activation, data):
        chosen, logits, target, more = data.draw(problems(case, activation))
        loss = case.loss(activation, **chosen)

        def plain(z):
            return case.plain(z, target, **more, activation=activation, **chosen)

        value, gradient = value_and_gradient(loss, logits, target, **more)
        close(value, plain(logits))
        step, scale = 1e-5, gradient.abs().max().item()
        for place in torch.randperm(logits.numel(), generator=torch.Generator().manual_seed(0))[:2].tolist():
            up, down = logits.clone(), logits.clone()
            up.view(-1)[place] += step
            down.view(-1)[place] -= step
            slope = (plain(up) - plain(down)) / (2 * step)
            assert gradient.flatten()[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-6 * scale + 1e-8)

    @each
    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_loss_and_gradient(self, case, activation, data):
        self.check(case, activation, data)

    @pytest.mark.slow
    @first
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_loss_and_gradient_of_more_problems(self, case, activation, data):
        self.check(case, activation, data)

    @each_in_turn
    def test_gradients_once_and_twice(self, case, activation):
        for kind in (None, "soft"):
            logits, target = make_case(3, activation, shape=(2, 3, 3), kind=kind)
            loss = case.loss(activation, ignore_index=255, pool="image")
            logits.requires_grad_()
            assert torch.autograd.gradcheck(lambda z: loss(z, target), logits)  # noqa: B023
            assert torch.autograd.gradgradcheck(lambda z: loss(z, target), logits)  # noqa: B023


@pytest.mark.parametrize("kind", ["ids", "soft"])
def test_the_hardest_pixels_with_weights_of_pixel_and_class(kind):
    case = next(case for case in CASES if case.id == "top_k-half")
    logits, target = make_case(0, "softmax", kind=kind, ignored=0.0)
    weight = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value = case.loss("softmax")(logits, target, weight)
    close(value, case.plain(logits, target, weight, activation="softmax"))


def test_smoothing_spreads_a_label_over_the_annotated_classes():
    """A class that is not annotated has no share, and a pixel of one has no label to spread."""
    logits = torch.tensor([0.0, 0.0, -1e4]).view(1, 3, 1).expand(2, 3, 4)
    ids = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]])
    annotated = torch.tensor([[True, True, False], [False, True, True]])
    for target in (ids, F.one_hot(ids, 3).movedim(-1, 1)):
        for loss in (CrossEntropyLoss, partial(DiceCELoss, dice_weight=0)):
            smoothed = loss(activation="softmax", label_smoothing=0.3)
            assert smoothed(logits[:1], target[:1], annotated=annotated[:1]).item() == pytest.approx(math.log(2))
            assert smoothed(logits, target, annotated=annotated).item() == pytest.approx(math.log(2))


def test_the_hardest_pixels_where_the_background_is_not_annotated():
    case = next(case for case in CASES if case.id == "top_k-all")
    logits, ids = make_case(0, "softmax", ignored=0.0)
    annotated = torch.tensor([[True, True, True], [False, True, True]])
    value = case.loss("softmax")(logits, ids, annotated=annotated)
    close(value, case.plain(logits, ids, annotated=annotated, activation="softmax"))
    close(case.loss("softmax")(logits, F.one_hot(ids, 3).movedim(-1, 1), annotated=annotated), value)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_penalty_of_a_generalized_loss_without_smoothing(activation):
    case = next(case for case in CASES if case.id == "generalized_dice")
    logits, target = make_case(0, activation, ignored=0.0)
    chosen = {"activation": activation, "absent": "penalize", "smooth": 0, "exclude_classes": [0]}
    close(case.loss(**chosen)(logits, target * 0), case.plain(logits, target * 0, **(chosen | {"smooth": (0, 0)})))


@pytest.mark.parametrize("absent", RULES)
def test_a_class_that_is_ignored_has_no_weight_in_a_generalized_loss(absent):
    case = next(case for case in CASES if case.id == "generalized_dice")
    logits, target = make_case(0, "sigmoid", ignored=0.0)
    target[:, 1] = 255
    chosen = {"absent": absent, "ignore_index": 255, "pool": "image"}
    value, gradient = value_and_gradient(case.loss(**chosen), logits, target)
    close(value, case.plain(logits, target, **chosen))
    close(value, case.loss(absent=absent, pool="image")(logits[:, [0, 2]], target[:, [0, 2]]))
    assert (gradient[:, 1] == 0).all()


class TestInvariances:
    """Changes of the input that must not change the loss."""

    @each_in_turn
    def test_classes_relabelled(self, case, activation):
        logits, target = make_case(6, activation)
        order = torch.tensor([2, 0, 1])
        new = (
            target[:, order] if target.ndim == logits.ndim else order.argsort()[target % 255].where(target != 255, 255)
        )
        weights = torch.tensor(WEIGHTS[:3])
        options = {"activation": activation, "ignore_index": 255, "pool": "image"}
        value = case.loss(class_weights=weights, exclude_classes=[1], **options)(logits, target)
        moved = case.loss(class_weights=weights[order], exclude_classes=[2], **options)(logits[:, order], new)
        close(moved, value)

    @each_of([(case, activation) for case, activation in in_turn(CASES) if case.of_sums])
    def test_batch_split_and_sums_added(self, case, activation):
        logits, target = make_case(6, activation, shape=(5, 3, 4))
        for pool in ("image", "batch", "all"):
            loss = case.loss(activation, ignore_index=255, pool=pool, absent="penalize")
            options = {"activation": activation, "ignore_index": 255, "required": loss.required_sums}
            value, gradient = value_and_gradient(loss, logits, target)
            z = logits.clone().requires_grad_()
            parts = [overlap_sums(z[part], target[part], **options) for part in (slice(0, 2), slice(2, 5))]
            added = loss.from_sums(OverlapSums.cat(parts))
            close(added.detach(), value)
            close(torch.autograd.grad(added, z)[0], gradient)

    @first_in_turn
    def test_ignored_pixels_are_cropped_pixels(self, case, activation):
        logits, target = make_case(6, activation, shape=(2, 3, 4, 6), ignored=0.0)
        ignored = target.clone()
        ignored[..., 4:] = 255
        for pool in ("image", "batch", "all"):
            loss = case.loss(activation, ignore_index=255, pool=pool)
            value, gradient = value_and_gradient(loss, logits[..., :4], target[..., :4])
            whole, whole_gradient = value_and_gradient(loss, logits, ignored)
            close(whole, value)
            close(whole_gradient[..., :4], gradient)
            assert (whole_gradient[..., 4:] == 0).all()

    @first_in_turn
    def test_an_ignored_image_does_not_dilute_the_mean(self, case, activation):
        logits, target = make_case(7, activation, shape=(3, 3, 6))
        target[2] = 255
        loss = case.loss(activation, ignore_index=255, pool="image")
        close(loss(logits, target), loss(logits[:2], target[:2]))

    @first_in_turn
    def test_with_a_ratio_for_each_image_it_does_not_know_its_neighbours(self, case, activation):
        logits, target = make_case(7, activation, shape=(3, 3, 6), ignored=0.0)
        if case.row.name in ("cross_entropy", "focal", "top_k") or (case.row.overlaps and case.of_sums):
            loss = case.loss(activation, pool="image")
            alone = torch.stack([loss(logits[b : b + 1], target[b : b + 1]) for b in range(3)])
            close(loss(logits, target), alone.mean())
        if isinstance(case.loss(), OverlapLoss):
            table = case.loss(activation, pool="image", absent="penalize")
            table.reduction = "none"
            alone = torch.cat([table(logits[b : b + 1], target[b : b + 1]) for b in range(3)])
            torch.testing.assert_close(table(logits, target), alone, rtol=0, atol=0)

    @first_in_turn
    def test_scale_of_class_weights(self, case, activation):
        logits, target = make_case(7, activation)
        once = case.loss(activation, ignore_index=255, class_weights=WEIGHTS[:3])
        tenfold = case.loss(activation, ignore_index=255, class_weights=[8 * w for w in WEIGHTS[:3]])
        close(tenfold(logits, target), once(logits, target))


class TestHardCases:
    @first
    def test_classes_absent_from_the_target(self, case, activation):
        logits, target = make_case(8, activation, ignored=0.0)
        logits = 0.98 * logits / logits.sum(1, keepdim=True) if activation is None else logits
        # Class 2 is absent from both images, and all (but the background) from the second.
        target[target == 2] = 0
        if target.ndim == logits.ndim:
            target[:, 2] = 0
        target[1] = 0
        for absent in rules_of(case):
            for pool, smooth in (("image", (1.0, 1.0)), ("batch", (0.0, 0.0)), ("image", (0.0, 0.0))):
                chosen = {"activation": activation, "absent": absent, "pool": pool, "smooth": smooth}
                value, gradient = value_and_gradient(case.loss(**chosen), logits, target)
                close(value, case.plain(logits, target, **chosen))
                assert gradient.isfinite().all()

    @first
    def test_a_class_absent_from_both(self, case, activation):
        logits, target = make_case(8, activation, ignored=0.0)
        if target.ndim == logits.ndim:
            target[:, 2] = 0
        target[target == 2] = 0
        logits[:, 2] = 0.0 if activation is None else -1e3
        for absent in rules_of(case):
            for smooth in ((1.0, 1.0), (0.0, 0.0)):
                chosen = {"activation": activation, "absent": absent, "smooth": smooth}
                value, gradient = value_and_gradient(case.loss(**chosen), logits, target)
                if activation is None:
                    close(value, case.plain(logits, target, **chosen))
                assert value.isfinite()
                assert gradient.isfinite().all()

    @first
    def test_a_perfect_prediction(self, case, activation):
        logits, target = make_case(8, activation, ignored=0.0)
        planes = target if target.ndim == logits.ndim else F.one_hot(target, 3).movedim(-1, 1)
        perfect = planes.double() if activation is None else (planes * 2.0 - 1) * 500
        for absent in rules_of(case):
            value, gradient = value_and_gradient(case.loss(activation, absent=absent), perfect, target)
            # A prediction never equals smoothed labels.
            assert "label_smoothing" in case.own or value.item() == pytest.approx(0, abs=1e-12)
            assert gradient.isfinite().all()

    @each_in_turn
    def test_nothing_to_learn_from(self, case, activation):
        """Everything is ignored, or there are no images."""
        logits, target = make_case(8, activation)
        for absent in rules_of(case):
            for pool in ("image", "batch", "all"):
                loss = case.loss(activation, ignore_index=255, absent=absent, pool=pool, smooth=0)
                ignored = torch.full_like(target, 255)
                for z, t in ((logits * math.nan, ignored), (logits[:0], target[:0])):
                    value, gradient = value_and_gradient(loss, z, t)
                    assert value == 0
                    assert gradient.shape == z.shape
                    assert (gradient == 0).all()

    @pytest.mark.parametrize("case", [case for case in FIRST if case.row.overlaps], ids=lambda case: case.id)
    def test_the_penalty_pushes_as_hard_as_cross_entropy(self, case):
        logits = torch.linspace(-6, 6, 50, dtype=torch.float64).view(1, 1, 50)
        empty = torch.zeros_like(logits)
        for pool in ("image", "batch"):
            _, gradient = value_and_gradient(case.loss(absent="penalize", pool=pool), logits, empty)
            _, entropy = value_and_gradient(F.binary_cross_entropy_with_logits, logits, empty)
            assert (gradient >= entropy * (1 - 1e-9)).all()

    @each_of([(case, activation) for case, activation in FIRST_EACH if activation is not None])
    def test_a_diverged_network_is_seen(self, case, activation):
        for absent in rules_of(case):
            for pool in ("image", "batch", "all"):
                # Valid: a sigmoid of infinity is 1, and a softmax gives a class at -inf a probability of 0.
                for value in [math.nan, math.inf] if activation == "softmax" else [math.nan]:
                    logits, target = make_case(8, activation, ignored=0.0)
                    target[(0, 0, 0, 0)[: target.ndim]] = 0 if activation == "softmax" else 1
                    logits[0, 0, 0, 0] = value
                    assert case.loss(activation, absent=absent, pool=pool)(logits, target).isnan()

    @pytest.mark.parametrize("case", OVERLAPS, ids=lambda case: case.id)
    def test_a_diverged_network_is_seen_in_a_class_that_is_skipped(self, case):
        logits, target = make_case(8, "sigmoid", ignored=0.0)
        target[:, 1] = 0
        logits[0, 1, 0, 0] = math.nan
        assert case.loss(absent="skip")(logits, target).isnan()


class TestInputs:
    @first
    def test_targets_of_any_dtype(self, case, activation):
        loss = case.loss(activation)
        for dtype in (torch.int8, torch.uint16, torch.bool, torch.float16):
            logits, target = make_case(9, activation, ignored=0.0)
            if target.ndim < logits.ndim and (dtype.is_floating_point or dtype == torch.bool):
                logits, target = make_case(9, activation, ignored=0.0, kind="planes")
            value, gradient = value_and_gradient(loss, logits, target)
            other, other_gradient = value_and_gradient(loss, logits, target.to(dtype))
            # Floating-point labels of 0 and 1 are summed in another order, or by another implementation.
            torch.testing.assert_close(other, value, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(other_gradient, gradient, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize(
        "case", [case for case in CASES if "softmax" in case.activations], ids=lambda case: case.id
    )
    def test_ids_are_one_hot_planes(self, case):
        logits, ids = make_case(9, "softmax", ignored=0.0)
        loss = case.loss("softmax", class_weights=WEIGHTS[:3], absent="skip")
        value, gradient = value_and_gradient(loss, logits, ids)
        other, other_gradient = value_and_gradient(loss, logits, F.one_hot(ids, 3).movedim(-1, 1))
        close(other, value)
        close(other_gradient, gradient)

    @first_in_turn
    @pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # see the next test
    def test_targets_may_have_a_gradient(self, case, activation):
        logits, target = make_case(9, activation, kind="soft", ignored=0.0, shape=(2, 3, 3))
        loss = case.loss(activation)
        # Within their range: labels of a softmax must sum to 1.
        inside = (lambda t: t.softmax(1)) if activation == "softmax" else torch.sigmoid
        assert torch.autograd.gradcheck(lambda t: loss(logits, inside(t)), target.requires_grad_())

    def test_targets_that_have_a_gradient_give_no_warning(self):
        logits, target = make_case(9, "sigmoid", kind="soft", ignored=0.0)
        torch.set_warn_always(True)
        try:
            CASES[0].loss()(logits, target.requires_grad_())
        finally:
            torch.set_warn_always(False)
