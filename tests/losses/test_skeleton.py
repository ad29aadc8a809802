"""Losses of skeletons, against definitions in plain Python, drawings by hand and MONAI."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from definitions import probabilities, random_case
from monai.losses import SoftclDiceLoss
from monai.losses.cldice import soft_skel
from torch import nn

from lightning_dice import DiceLoss
from lightning_dice.losses import (
    ClDiceLoss,
    CompoundLoss,
    DeepSupervision,
    SkeletonRecallLoss,
)
from lightning_dice.losses.skeleton import soft_skeleton

SPACES = [pytest.param((6, 7), id="2d"), pytest.param((4, 3, 5), id="3d")]
KINDS = [ClDiceLoss, SkeletonRecallLoss]
CLASSES = 3


def built(kind, activation, **settings):
    return kind(activation=activation, **({"classes": CLASSES} if kind is SkeletonRecallLoss else {}), **settings)


def plain_skeleton(values, iterations, core=False):
    """Of a dict from places to values: only they are neighbours of each other."""

    def near(at, *, corners):
        for step in itertools.product((-1, 0, 1), repeat=len(at)):
            if corners or sum(map(abs, step)) <= 1:
                there = tuple(i + j for i, j in zip(at, step, strict=True))
                if there in values:
                    yield there

    def eroded(image):
        return {at: min(image[there] for there in near(at, corners=False)) for at in image}

    def taken(image):
        small = eroded(image)
        return {at: max(image[at] - max(small[there] for there in near(at, corners=True)), 0.0) for at in image}

    skeleton = taken(values)
    for _ in range(iterations):
        values = eroded(values)
        found = taken(values)
        skeleton = {at: 1 - (1 - skeleton[at]) * (1 - found[at]) for at in values}
    left = eroded(values) if core else dict.fromkeys(values, 0.0)
    return {at: 1 - (1 - skeleton[at]) * (1 - left[at]) for at in values}


def read(logits, target, b, c, activation):
    """Probability and label of the pixels of a class of an image that are not ignored (255), by place."""
    classes = logits.shape[1]
    planes = target.shape == logits.shape
    p, t = {}, {}
    for at in itertools.product(*(range(size) for size in logits.shape[2:])):
        labels = [target[(b, k, *at)].item() if planes else target[(b, *at)].item() for k in range(classes)]
        if any(label == 255 for label in labels) if activation == "softmax" or not planes else labels[c] == 255:
            continue
        p[at] = probabilities([logits[(b, k, *at)].item() for k in range(classes)], activation)[c]
        t[at] = float(labels[c]) if planes else float(labels[c] == c)
    return p, t


def plain_cldice(
    logits, target, *, activation, iterations=3, smooth=1.0, pool="batch", exclude=(), weight=None, core=True
):
    sums = {}
    for b, c in itertools.product(range(logits.shape[0]), range(logits.shape[1])):
        if c in exclude:
            continue
        p, t = read(logits, target, b, c, activation)
        sp, st = plain_skeleton(p, iterations, core), plain_skeleton(t, iterations, core)
        w = dict.fromkeys(p, 1.0)
        if weight is not None:
            w = {at: (weight[(b, c, *at)] if weight.shape == logits.shape else weight[(b, *at)]).item() for at in p}
        four = [(w[at] * sp[at] * t[at], w[at] * sp[at], w[at] * st[at] * p[at], w[at] * st[at]) for at in p]
        sums.setdefault((b, c) if pool == "image" else c, []).extend(four)
    losses = []
    for pixels in sums.values():
        if not pixels:
            continue
        a, b, c, d = (math.fsum(column) for column in zip(*pixels, strict=True))
        tprec, tsens = (a + smooth) / (b + smooth), (c + smooth) / (d + smooth)
        losses.append(1 - 2 * tprec * tsens / (tprec + tsens))
    return math.fsum(losses) / len(losses)


class TestSoftSkeleton:
    @pytest.mark.parametrize(
        ("iterations", "ignored", "core"), [(0, 0.3, True), (1, 0.0, False), (4, 0.3, False), (4, 0.3, True)]
    )
    @pytest.mark.parametrize("space", SPACES)
    def test_equals_the_definition(self, space, iterations, ignored, core):
        generator = torch.Generator().manual_seed(0)
        probs = torch.rand(2, 2, *space, generator=generator, dtype=torch.float64)
        valid = torch.rand(2, 2, *space, generator=generator) >= ignored
        found = soft_skeleton(probs, iterations, valid if ignored else None, core=core)
        for b, c in itertools.product(range(2), range(2)):
            places = [tuple(at) for at in valid[b, c].nonzero().tolist()]
            expected = plain_skeleton({at: probs[(b, c, *at)].item() for at in places}, iterations, core)
            for at in places:
                assert found[(b, c, *at)].item() == pytest.approx(expected[at], rel=1e-12)
        assert (found[~valid] == 0).all() or not ignored
        assert ((found >= 0) & (found <= 1)).all()

    @pytest.mark.parametrize("space", SPACES)
    def test_equals_monai(self, space):
        probs = torch.rand(2, 2, *space, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(soft_skeleton(probs, 3), soft_skel(probs, 3))

    def test_of_a_bar_drawn_by_hand(self):
        bar = torch.zeros(1, 1, 7, 11)
        bar[..., 1:6, 2:9] = 1
        # 5x7, eroded 3x5, eroded 1x3: of which alone nothing is left to grow back from.
        drawn = """
        ...........
        ...........
        ...........
        ....###....
        ...........
        ...........
        ..........."""
        expected = torch.tensor([[float(character == "#") for character in line] for line in drawn.split()])
        torch.testing.assert_close(soft_skeleton(bar, 3)[0, 0], expected)

    def test_too_few_iterations_leave_a_wide_structure_without(self):
        bar = torch.ones(1, 1, 9, 9)
        bar = torch.nn.functional.pad(bar, (3, 3, 3, 3))
        assert soft_skeleton(bar, 3)[0, 0, 7, 7] == 0
        assert soft_skeleton(bar, 4)[0, 0, 7, 7] == 1

    def test_the_core_is_what_is_too_wide(self):
        wide = torch.nn.functional.pad(torch.ones(1, 1, 9, 9), (3, 3, 3, 3))
        core = soft_skeleton(wide, 2, core=True)
        assert torch.equal(core, torch.nn.functional.pad(torch.ones(1, 1, 3, 3), (6, 6, 6, 6)))
        thin = torch.nn.functional.pad(torch.ones(1, 1, 3, 9), (3, 3, 3, 3))
        assert torch.equal(soft_skeleton(thin, 2, core=True), soft_skeleton(thin, 2))


class TestClDice:
    @pytest.mark.parametrize("target", ["ignored", "soft and ignored"])
    @pytest.mark.parametrize("activation", ["sigmoid", "softmax", None])
    @pytest.mark.parametrize("space", SPACES)
    def test_equals_the_definition(self, space, activation, target):
        soft, ignored = "soft" in target, "ignored" in target
        logits, mask = random_case(0, activation=activation, space=space, soft=soft, ignored=ignored)
        for pool, exclude, smooth, iterations in (("batch", (), 1.0, 3), ("image", (0,), 0.1, 1)):
            loss = ClDiceLoss(
                activation=activation,
                iterations=iterations,
                smooth=smooth,
                pool=pool,
                exclude_classes=exclude,
                ignore_index=255,
            )(logits, mask)
            settings = {"iterations": iterations, "smooth": smooth, "pool": pool, "exclude": exclude}
            assert loss.item() == pytest.approx(plain_cldice(logits, mask, activation=activation, **settings), rel=1e-9)

    @pytest.mark.parametrize("by_class", [False, True])
    def test_weights_are_those_of_the_definition(self, by_class):
        logits, mask = random_case(1, activation="softmax", ignored=True)
        shape = logits.shape if by_class else mask.shape
        weight = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        loss = ClDiceLoss(activation="softmax", ignore_index=255, exclude_classes=[1])(logits, mask, weight)
        expected = plain_cldice(logits, mask, activation="softmax", exclude=(1,), weight=weight)
        assert loss.item() == pytest.approx(expected, rel=1e-9)

    def test_a_cut_costs_and_a_thinner_line_does_not(self):
        mask = torch.zeros(1, 1, 5, 7)
        mask[..., 1:4, :] = 1
        cut, thin = mask.clone(), mask.clone()
        cut[..., 3] = 0
        thin[..., 1, :] = thin[..., 3, :] = 0
        loss = ClDiceLoss(activation=None, smooth=0)
        # 6 of 7 pixels of the skeleton are found, and nothing else.
        assert loss(cut, mask).item() == pytest.approx(1 - 2 * (6 / 7) / (1 + 6 / 7))
        assert loss(thin, mask).item() == loss(mask, mask).item() == 0
        assert DiceLoss(activation=None)(thin, mask) > DiceLoss(activation=None)(cut, mask)

    @pytest.mark.parametrize(
        ("found", "there", "smooth", "expected"),
        [
            (True, False, 1.0, 1 - 2 / 8 / (9 / 8)),
            (False, True, 1.0, 1 - 2 / 8 / (9 / 8)),
            (False, False, 1.0, 0.0),
            (True, False, 0.0, 1.0),
            (False, True, 0.0, 1.0),
            (False, False, 0.0, 0.0),
        ],
    )
    def test_what_is_absent_scores_as_in_dice(self, found, there, smooth, expected):
        line = torch.zeros(1, 1, 5, 7)
        line[..., 2, :] = 1
        probs = (line * found).requires_grad_()
        loss = ClDiceLoss(activation=None, smooth=smooth)(probs, line * there)
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        other = torch.zeros_like(line)
        other[..., 0, :] = 1  # Next to a class that is all wrong: a class without a score is left out of the mean.
        both = ClDiceLoss(activation=None, smooth=smooth)(
            torch.cat([probs.detach(), other], 1), torch.cat([line * there, other.flip(2)], 1)
        )
        wrong = ClDiceLoss(activation=None, smooth=smooth)(other, other.flip(2)).item()
        left_out = smooth == 0 and not found and not there
        assert both.item() == pytest.approx(wrong if left_out else (wrong + expected) / 2, abs=1e-6)
        assert probs.grad.isfinite().all()

    @pytest.mark.parametrize("logit", [-20.0, -70.0, -95.0, -120.0, -1e4])
    def test_a_network_predicts_some_of_an_absent_class_however_low_its_logits_are(self, logit):
        logits, mask = random_case(2, activation="sigmoid")
        mask[:, 1] = 0
        logits = logits.detach().index_fill(1, torch.tensor(1), logit)
        for dtype in (torch.float64, torch.float32):
            z = logits.detach().clone().to(dtype).requires_grad_()
            loss = ClDiceLoss(smooth=0)(z, mask)
            loss.backward()
            others = ClDiceLoss(smooth=0, exclude_classes=[1])(logits, mask).item()
            assert loss.item() == pytest.approx((2 * others + 1) / 3, rel=1e-5)
            assert z.grad.isfinite().all()

    def test_without_smoothing_two_zeros_have_the_mean_zero(self):
        probs, mask = torch.zeros(1, 1, 5, 7), torch.zeros(1, 1, 5, 7)
        probs[..., 1, :] = 1
        mask[..., 3, :] = 1
        probs.requires_grad_()
        loss = ClDiceLoss(activation=None, smooth=0)(probs, mask)
        loss.backward()
        assert loss.item() == 1
        assert probs.grad.isfinite().all()

    def test_an_absent_class_can_be_left_out(self):
        logits, mask = random_case(2, activation="sigmoid")
        mask[:, 1] = 0
        loss = ClDiceLoss(absent="skip")(logits, mask)
        torch.testing.assert_close(loss, ClDiceLoss(exclude_classes=[1])(logits, mask))
        assert not torch.isclose(loss, ClDiceLoss()(logits, mask))

    def test_class_weights_are_normalized(self):
        logits, mask = random_case(2, activation="softmax")
        each = [ClDiceLoss(activation="softmax", exclude_classes={0, 1, 2} - {c})(logits, mask) for c in range(3)]
        loss = ClDiceLoss(activation="softmax", class_weights=[10, 20, 30])(logits, mask)
        torch.testing.assert_close(loss, (each[0] + 2 * each[1] + 3 * each[2]) / 6)
        loss = ClDiceLoss(activation="softmax", class_weights=[10, 20, 30], exclude_classes=[1])(logits, mask)
        torch.testing.assert_close(loss, (each[0] + 3 * each[2]) / 4)

    @pytest.mark.parametrize("space", [(12, 11), (6, 7, 8)], ids=["2d", "3d"])
    def test_is_monai_for_one_channel_by_image(self, space):
        logits, mask = random_case(3, activation="sigmoid", classes=1, space=space)
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss = ClDiceLoss(pool="image", iterations=2, core=False)(ours, mask)
        expected = SoftclDiceLoss(iter_=2, sigmoid=True, smooth=1e-30)(theirs, mask.double())
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)

    @pytest.mark.parametrize("pool", ["image", "batch"])
    def test_a_plane_that_is_not_annotated_is_an_ignored_plane(self, pool):
        logits, mask = random_case(3, activation="sigmoid", classes=2, space=(9, 9))
        annotated = torch.tensor([[True, True], [True, False]])
        ignored = mask.clone()
        ignored[1, 1] = 255
        loss = ClDiceLoss(pool=pool, ignore_index=255)
        torch.testing.assert_close(loss(logits, mask, annotated=annotated), loss(logits, ignored))

    def test_predicting_everything_costs(self):
        mask = torch.zeros(1, 1, 40, 40)
        mask[..., 20, :] = 1
        everything = torch.ones(1, 1, 40, 40)
        something = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0)) / 2
        published = ClDiceLoss(activation=None, core=False)
        assert published(everything, mask) == 0  # better than
        assert published(something, mask) > 0.3
        loss = ClDiceLoss(activation=None)
        assert loss(everything, mask).item() == pytest.approx(1 - 2 * (41 / 1601) / (1 + 41 / 1601))
        assert loss(everything, mask) > loss(something, mask)

    def test_monai_has_one_ratio_for_all_channels(self):
        logits, mask = random_case(3, activation="sigmoid", classes=2, batch=1)
        expected = SoftclDiceLoss(sigmoid=True, smooth=1e-30)(logits, mask.double())
        assert not torch.isclose(ClDiceLoss(pool="image", core=False)(logits, mask), expected)

    @pytest.mark.parametrize("shape", [(2, 3, 9), (1, 3, 2, 2, 2, 2)], ids=["1d", "4d"])
    def test_other_dimensions_are_refused(self, shape):
        with pytest.raises(ValueError, match="clDice needs images of 2 or 3 space axes, got logits of"):
            ClDiceLoss()(torch.zeros(shape), torch.zeros(shape))


def drawn_case(activation):
    """Thin lines, which are their own skeletons; ids or planes, `(2, [3,] 5, 5)`."""
    ids = torch.zeros(2, 5, 5, dtype=torch.long)
    ids[0, 1] = 1
    ids[0, 3, :3] = 2
    ids[1].fill_diagonal_(1)
    logits = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits, ids if activation == "softmax" else nn.functional.one_hot(ids, 3).movedim(-1, 1)


class TestSkeletonRecall:
    @pytest.mark.parametrize("pool", ["image", "batch", "all"])
    @pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
    def test_equals_the_definition(self, activation, pool):
        logits, mask = drawn_case(activation)
        groups = {}
        for b, c in itertools.product(range(2), (1, 2)):
            p, t = read(logits, mask, b, c, activation)
            on_line = [p[at] for at in p if t[at] == 1]
            if on_line:
                groups.setdefault({"image": (b, c), "batch": c, "all": 0}[pool], []).extend(on_line)
        losses = [1 - (math.fsum(line) + 0.5) / (len(line) + 0.5) for line in groups.values()]
        loss = built(SkeletonRecallLoss, activation, pool=pool, smooth=0.5, exclude_classes=[0])(logits, mask)
        assert loss.item() == pytest.approx(math.fsum(losses) / len(losses), rel=1e-12)

    def test_only_the_tube_counts(self):
        mask = torch.zeros(1, 1, 15, 40)
        mask[..., 2:13, 2:38] = 1
        for radius, rows in ((0, 1), (1, 3), (2, 5)):
            loss = SkeletonRecallLoss(radius=radius, smooth=0, activation=None)
            tube = loss.maps["skeleton"](mask[0])
            assert tube[0, :, 20].sum() == rows
            assert loss(tube.unsqueeze(0), mask).item() == 0
            probs = (torch.full_like(mask, 0.25)).requires_grad_()
            found = loss(probs, mask)
            found.backward()
            assert found.item() == pytest.approx(0.75)
            assert torch.equal(probs.grad[0] != 0, tube > 0)

    def test_soft_labels_count_as_much_as_they_are(self):
        mask = torch.zeros(1, 1, 3, 4)
        mask[..., 1, :] = torch.tensor([0.5, 0.75, 1.0, 1.0])
        probs = torch.zeros(1, 1, 3, 4)
        probs[..., 1, :] = torch.tensor([1.0, 1.0, 0.0, 0.0])
        loss = SkeletonRecallLoss(activation=None, smooth=0)(probs, mask)
        assert loss.item() == pytest.approx(1 - 1.25 / 3.25)

    def test_a_class_without_a_skeleton_is_left_out(self):
        logits, mask = drawn_case("softmax")
        settings = {"pool": "image", "exclude_classes": [0]}
        loss = built(SkeletonRecallLoss, "softmax", **settings)
        parts = [loss(logits[b : b + 1], mask[b : b + 1]) for b in range(2)]
        # Two classes in the first image, one in the second.
        torch.testing.assert_close(loss(logits, mask), (2 * parts[0] + parts[1]) / 3)

    @pytest.mark.parametrize("by_class", [False, True])
    def test_weights_count(self, by_class):
        logits, mask = drawn_case("softmax")
        weight = torch.rand(
            logits.shape if by_class else mask.shape, generator=torch.Generator().manual_seed(0)
        ).double()
        loss = built(SkeletonRecallLoss, "softmax", exclude_classes=[0, 2], smooth=0)(logits, mask, weight)
        own = weight[:, 1] if by_class else weight
        line = mask == 1
        p = logits.softmax(1)[:, 1]
        torch.testing.assert_close(loss, 1 - (own * p)[line].sum() / own[line].sum())

    def test_one_dimension_is_refused(self):
        with pytest.raises(ValueError, match="a skeleton needs an image of 2 or 3 space axes, got 1"):
            SkeletonRecallLoss()(torch.zeros(1, 1, 5), torch.ones(1, 1, 5))

    def test_refuses_what_does_not_fit_the_logits(self):
        logits, mask = drawn_case("softmax")
        with pytest.raises(ValueError, match="classes is needed with class ids: classes=3"):
            SkeletonRecallLoss(activation="softmax")(logits, mask)
        with pytest.raises(ValueError, match="classes must be the number of channels of logits, 3, got 2"):
            SkeletonRecallLoss(activation="softmax", classes=2)(logits, mask)


@pytest.mark.parametrize("pool", ["image", "batch"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, activation, pool):
    logits, mask = random_case(4, activation=activation, space=(4, 3), ignored=True)
    loss = built(kind, activation, ignore_index=255, pool=pool)
    assert torch.autograd.gradcheck(lambda z: loss(z, mask), logits.requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
class TestInvariances:
    def test_images_permuted(self, kind, activation):
        logits, mask = random_case(5, activation=activation, batch=4)
        order = torch.tensor([2, 0, 3, 1])
        for pool in ("image", "batch"):
            loss = built(kind, activation, pool=pool)
            torch.testing.assert_close(loss(logits[order], mask[order]), loss(logits, mask))

    def test_classes_relabelled(self, kind, activation):
        logits, mask = random_case(5, activation=activation)
        order = torch.tensor([2, 0, 1])
        loss = built(kind, activation)
        other = mask[:, order] if activation == "sigmoid" else order.argsort()[mask]
        torch.testing.assert_close(loss(logits[:, order], other), loss(logits, mask))

    def test_by_image_an_image_does_not_know_its_neighbours(self, kind, activation):
        logits, mask = random_case(5, activation=activation, batch=3)
        loss = built(kind, activation, pool="image")
        alone = torch.stack([loss(logits[b : b + 1], mask[b : b + 1]) for b in range(3)])
        torch.testing.assert_close(loss(logits, mask), alone.mean())

    def test_saturated_logits_are_finite(self, kind, activation):
        logits, mask = random_case(5, activation=activation)
        for smooth in (0, 1):
            z = (logits.sign() * 1e4).requires_grad_()
            loss = built(kind, activation, smooth=smooth)(z, mask)
            loss.backward()
            assert loss.isfinite()
            assert z.grad.isfinite().all()

    def test_a_diverged_network_is_seen(self, kind, activation):
        logits, mask = random_case(5, activation=activation)
        logits[0] = torch.nan
        for smooth, pool in itertools.product((0, 1), ("image", "batch")):
            assert built(kind, activation, smooth=smooth, pool=pool)(logits, mask).isnan()

    def test_a_class_that_is_not_annotated_is_left_out(self, kind, activation):
        logits, mask = random_case(5, activation=activation)
        annotated = torch.tensor([[True, True, True], [True, True, False]])
        mask[1][mask[1] == 2] = 0
        loss = built(kind, activation, exclude_classes=[0], pool="image")
        logits.requires_grad_()
        found = loss(logits, mask, annotated=annotated)
        found.backward()
        if activation == "sigmoid":
            assert (logits.grad[1, 2] == 0).all()
            first = loss(logits[:1], mask[:1])
            second = built(kind, activation, exclude_classes=[0, 2], pool="image")(logits[1:], mask[1:])
            torch.testing.assert_close(found, (2 * first + second) / 3)
        else:
            # Its probability counts as background, so moving some from one to the other changes nothing.
            joined = logits.detach().clone()
            joined[1, 0] = joined[1, [0, 2]].logsumexp(0)
            joined[1, 2] = -1e3
            torch.testing.assert_close(loss(joined, mask, annotated=annotated), found.detach())

    def test_copies_and_pickles(self, kind, activation):
        logits, mask = random_case(9, activation=activation)
        loss = built(kind, activation, class_weights=[1, 2, 3])
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            torch.testing.assert_close(other(logits, mask), loss(logits, mask))
            assert other.maps == loss.maps

    def test_in_a_compound(self, kind, activation):
        logits, mask = random_case(9, activation=activation, ignored=True)
        dice, other = DiceLoss(activation=activation, ignore_index=255), built(kind, activation, ignore_index=255)
        loss = CompoundLoss({"dice": dice, "other": other}, {"dice": 0.5, "other": 0.5})
        expected = (dice(logits, mask) + other(logits, mask)) / 2
        torch.testing.assert_close(loss(logits, mask), expected)
        maps = {name: torch.stack([make(one) for one in mask]) for name, make in loss.maps.items()}
        assert set(maps) == ({"skeleton"} if kind is SkeletonRecallLoss else set())
        torch.testing.assert_close(loss(logits, mask, maps=maps), expected)

    def test_with_deep_supervision(self, kind, activation):
        logits, mask = random_case(9, activation=activation, space=(8, 8), ignored=True)
        loss = DeepSupervision(built(kind, activation, ignore_index=255))
        coarse = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        maps = {name: torch.stack([make(one) for one in mask]) for name, make in loss.maps.items()}
        torch.testing.assert_close(loss([logits, coarse], mask, maps=maps), loss([logits, coarse], mask))
