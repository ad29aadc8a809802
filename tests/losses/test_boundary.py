"""Losses of distances, against definitions in plain Python and MONAI."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from definitions import probabilities, random_case
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from monai.losses import HausdorffDTLoss

from lightning_dice import DiceLoss, losses
from lightning_dice.cli.config import CONF_DIR, register_resolvers
from lightning_dice.losses import (
    BoundaryLoss,
    BoundaryWeightedLoss,
    CompoundLoss,
    CrossEntropyLoss,
    DeepSupervision,
    DiceCELoss,
)

SPACES = [pytest.param((7,), id="1d"), pytest.param((5, 4), id="2d"), pytest.param((3, 2, 4), id="3d")]


class HausdorffLoss(losses.HausdorffLoss):
    """With distances in pixels, as in the definition below and as published."""

    def __init__(self, *, relative=False, **settings):
        super().__init__(relative=relative, **settings)


KINDS = [BoundaryLoss, HausdorffLoss]
CLASSES = 3


def weighted(**settings):
    return BoundaryWeightedLoss(DiceCELoss(**settings), width=1.0, strength=3.0)


def built(kind, activation, **settings):
    if kind is weighted:
        settings.pop("spacing", None)
        return weighted(activation=activation, **settings)
    return kind(activation=activation, classes=CLASSES, **settings)


ALL = [*KINDS, weighted]


def plain(kind, logits, target, *, activation, exclude=(), spacing=None, alpha=2.0, weight=None, annotated=None):
    """Both losses, pixel by pixel, with distances over all pairs; 255 is ignored."""
    images, classes, *space = logits.shape
    spacing = spacing or [1.0] * len(space)
    places = list(itertools.product(*(range(size) for size in space)))
    planes = target.shape == logits.shape

    def apart(here, there):
        return math.sqrt(math.fsum(((i - j) * s) ** 2 for i, j, s in zip(here, there, spacing, strict=True)))

    def signed(inside, here):
        others = [apart(here, there) for there in places if inside[there] != inside[here]]
        nearest = min(others) if others else 0.0
        return -nearest if inside[here] else nearest

    means = []
    for b in range(images):
        for c in set(range(classes)) - set(exclude):
            if annotated is not None and not annotated[b, c]:
                continue
            t, p, hard, w = {}, {}, {}, {}
            for at in places:
                labels = [target[(b, k, *at)].item() if planes else target[(b, *at)].item() for k in range(classes)]
                if any(label == 255 for label in labels) if activation == "softmax" or not planes else labels[c] == 255:
                    t[at], p[at], hard[at] = 0.0, None, False
                    continue
                t[at] = float(labels[c]) if planes else float(labels[c] == c)
                z = [logits[(b, k, *at)].item() for k in range(classes)]
                probs = probabilities(z, activation)
                p[at] = probs[c]
                hard[at] = probs.index(max(probs)) == c if activation == "softmax" or not planes else p[at] > 0.5
                w[at] = 1.0
                if weight is not None:
                    w[at] = (weight[(b, c, *at)] if weight.shape == logits.shape else weight[(b, *at)]).item()
            inside = {at: t[at] >= 0.5 and p[at] is not None for at in places}
            values = []
            for at in w:
                if kind is BoundaryLoss:
                    values.append(w[at] * p[at] * signed(inside, at))
                else:
                    both = abs(signed(inside, at)) ** alpha + abs(signed(hard, at)) ** alpha
                    values.append(w[at] * (p[at] - t[at]) ** 2 * both)
            if math.fsum(w.values()) > 0:
                means.append(math.fsum(values) / math.fsum(w.values()))
    return math.fsum(means) / len(means) if means else 0.0


@pytest.mark.parametrize("target", ["ignored", "soft and ignored"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", None])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(kind, space, activation, target):
    logits, mask = random_case(
        0, activation=activation, space=space, soft="soft" in target, ignored="ignored" in target
    )
    for exclude, sizes in ((), None), ((0,), (0.5, 2.0, 1.5)[: len(space)]):
        loss = kind(activation=activation, classes=CLASSES, exclude_classes=exclude, spacing=sizes, ignore_index=255)(
            logits, mask
        )
        expected = plain(kind, logits, mask, activation=activation, exclude=exclude, spacing=sizes)
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(expected, rel=1e-6)  # the maps are float32


@pytest.mark.parametrize("kind", KINDS)
def test_ids_with_probabilities(kind):
    logits, mask = random_case(1, activation="softmax", ignored=True)
    probs = logits.softmax(1)
    loss = kind(activation=None, classes=CLASSES, ignore_index=255)
    torch.testing.assert_close(
        loss(probs, mask), kind(activation="softmax", classes=CLASSES, ignore_index=255)(logits, mask)
    )


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_definition(kind, by_class):
    logits, mask = random_case(2, activation="softmax", ignored=True)
    weight = torch.rand(logits.shape if by_class else mask.shape, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    loss = kind(activation="softmax", classes=CLASSES, ignore_index=255)(logits, mask, weight)
    assert loss.item() == pytest.approx(plain(kind, logits, mask, activation="softmax", weight=weight), rel=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_the_exponent_of_the_hausdorff_loss(alpha):
    logits, mask = random_case(3, activation="sigmoid")
    expected = plain(HausdorffLoss, logits, mask, activation="sigmoid", alpha=alpha)
    assert HausdorffLoss(alpha=alpha)(logits, mask).item() == pytest.approx(expected, rel=1e-6)


P, N = 50.0, -50.0


@pytest.mark.parametrize(
    ("logits", "mask", "boundary", "hausdorff"),
    [
        ([P, P, N, N], [1, 1, 0, 0], -3 / 4, 0.0),
        ([N, N, P, P], [1, 1, 0, 0], 3 / 4, (8 + 2 + 2 + 8) / 4),
        ([P, P, P, P], [1, 1, 0, 0], 0.0, (1 + 4) / 4),
        ([N, N, N, N], [1, 1, 0, 0], 0.0, (4 + 1) / 4),
        ([P, N, N, N], [0, 0, 0, 0], 0.0, 1 / 4),
        ([P, P, P, N], [1, 1, 1, 1], 0.0, 1 / 4),
        ([N, N, N, P], [1, 0, 0, 0], 3 / 4, ((1 + 9) + (9 + 1)) / 4),
    ],
    ids=["perfect", "disjoint", "all-foreground", "nothing-found", "class-absent", "class-everywhere", "far"],
)
def test_by_hand(logits, mask, boundary, hausdorff):
    logits, mask = torch.tensor([[logits]]), torch.tensor([[mask]])
    assert BoundaryLoss()(logits, mask).item() == pytest.approx(boundary, abs=1e-6)
    assert HausdorffLoss()(logits, mask).item() == pytest.approx(hausdorff, abs=1e-6)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_gradcheck(kind, activation):
    logits, mask = random_case(4, activation=activation, space=(3, 3), ignored=True)
    loss = built(kind, activation, ignore_index=255)
    assert torch.autograd.gradcheck(lambda z: loss(z, mask), logits.requires_grad_())


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
class TestInvariances:
    def test_images_permuted(self, kind, activation):
        logits, mask = random_case(5, activation=activation, batch=4)
        order = torch.tensor([2, 0, 3, 1])
        loss = built(kind, activation)
        torch.testing.assert_close(loss(logits[order], mask[order]), loss(logits, mask))

    def test_classes_relabelled(self, kind, activation):
        logits, mask = random_case(5, activation=activation)
        order = torch.tensor([2, 0, 1])
        loss = built(kind, activation)
        other = mask[:, order] if activation == "sigmoid" else order.argsort()[mask]
        torch.testing.assert_close(loss(logits[:, order], other), loss(logits, mask))

    def test_axes_transposed(self, kind, activation):
        logits, mask = random_case(5, activation=activation, ignored=True)
        loss = built(kind, activation, ignore_index=255)
        expected = loss(logits, mask)
        torch.testing.assert_close(loss(logits.transpose(-1, -2), mask.transpose(-1, -2)), expected)
        torch.testing.assert_close(loss(logits.contiguous(memory_format=torch.channels_last), mask), expected)

    def test_saturated_logits_are_finite(self, kind, activation):
        logits, mask = random_case(5, activation=activation)
        logits = (logits.sign() * 1e4).requires_grad_()
        loss = built(kind, activation)(logits, mask)
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()

    def test_a_class_that_is_not_annotated_is_left_out(self, kind, activation):
        logits, mask = random_case(5, activation=activation)
        annotated = torch.tensor([[True, True, True], [True, True, False]])
        mask[1][mask[1] == 2] = 0
        loss = built(kind, activation)
        logits.requires_grad_()
        found = loss(logits, mask, annotated=annotated)
        found.backward()
        if activation == "sigmoid":
            assert (logits.grad[1, 2] == 0).all()
            if kind is not weighted:
                expected = plain(kind, logits, mask, activation=activation, annotated=annotated)
                assert found.item() == pytest.approx(expected, rel=1e-6)
        else:
            # Its probability counts as background, so moving some from one to the other changes nothing.
            joined = logits.detach().clone()
            joined[1, 0] = joined[1, [0, 2]].logsumexp(0)
            joined[1, 2] = -1e3
            torch.testing.assert_close(loss(joined, mask, annotated=annotated), found.detach())

    def test_given_maps_are_taken(self, kind, activation):
        logits, mask = random_case(5, activation=activation)
        loss = built(kind, activation)
        ((name, make),) = loss.maps.items()
        maps = {name: torch.stack([make(one) for one in mask])}
        torch.testing.assert_close(loss(logits, mask, maps=maps), loss(logits, mask), rtol=0, atol=0)
        other = {name: 1 + 2 * maps[name], "another": torch.zeros(1)}
        assert not torch.isclose(loss(logits, mask, maps=other), loss(logits, mask))
        with pytest.raises(ValueError, match=f"maps\\['{name}'\\] must have the shape"):
            loss(logits, mask, maps={name: maps[name][..., :1]})


class TestMonai:
    """MONAI's HausdorffDTLoss: the same for planes, each of which it cuts at 1/2."""

    @pytest.mark.parametrize("alpha", [1.0, 2.0])
    @pytest.mark.parametrize("space", [(8, 9), (4, 5, 6)], ids=["2d", "3d"])
    def test_sigmoid(self, space, alpha):
        logits, mask = random_case(6, activation="sigmoid", space=space, dtype=torch.float32)
        mask[0, 0] = 0
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss = HausdorffLoss(alpha=alpha)(ours, mask)
        expected = HausdorffDTLoss(alpha=alpha, sigmoid=True, include_background=True)(theirs, mask.float())
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)

    def test_softmax_of_two_classes(self):
        logits, mask = random_case(6, activation="softmax", classes=2, space=(8, 9), dtype=torch.float32)
        settings = {"softmax": True, "to_onehot_y": True, "include_background": False}
        ours = HausdorffLoss(activation="softmax", classes=2, exclude_classes=[0])(logits, mask)
        torch.testing.assert_close(ours, HausdorffDTLoss(**settings)(logits, mask.unsqueeze(1)))

    def test_where_no_class_has_half_of_the_probability_ours_has_a_prediction(self):
        logits = torch.zeros(1, 3, 4, 4)
        logits[:, 1, :2] = 0.1
        mask = torch.zeros(1, 4, 4, dtype=torch.long)
        settings = {"softmax": True, "to_onehot_y": True}
        assert HausdorffDTLoss(**settings)(logits, mask.unsqueeze(1)) == 0
        assert HausdorffLoss(activation="softmax", classes=3, exclude_classes=[0])(logits, mask) > 0.1


class TestBoundaryWeighted:
    def test_is_the_loss_with_a_weight(self):
        logits, mask = random_case(7, activation="softmax", space=(2, 5))
        mask[:] = torch.tensor([0, 0, 1, 1, 1])
        distance = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0])
        weight = (1 + 5 * torch.exp(-((distance / 1.5) ** 2) / 2)).expand(2, 2, 5)
        inner = CrossEntropyLoss(activation="softmax")
        loss = BoundaryWeightedLoss(inner, width=1.5, strength=5.0)
        torch.testing.assert_close(loss(logits, mask), inner(logits, mask, weight))
        given = torch.rand(2, 2, 5, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(loss(logits, mask, given), inner(logits, mask, weight * given))
        each = torch.rand(2, 3, 2, 5, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(loss(logits, mask, each), inner(logits, mask, weight.unsqueeze(1) * each))

    def test_planes_have_weights_of_their_own(self):
        logits, mask = random_case(7, activation="sigmoid", classes=2, space=(5,))
        mask[:] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        distance = torch.tensor([[1.0, 0.0, 0.0, 1.0, 2.0], [torch.inf] * 5])
        weight = (1 + 5 * torch.exp(-((distance / 1.5) ** 2) / 2)).expand(2, 2, 5)
        loss = BoundaryWeightedLoss(DiceLoss(), width=1.5, strength=5.0)
        torch.testing.assert_close(loss(logits, mask), DiceLoss()(logits, mask, weight))
        given = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(loss(logits, mask, given), DiceLoss()(logits, mask, weight * given.unsqueeze(1)))

    def test_one_channel_takes_either_form_of_weight(self):
        logits, mask = random_case(7, activation="sigmoid", classes=1)
        loss = BoundaryWeightedLoss(DiceLoss())
        weight = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(loss(logits, mask, weight), loss(logits, mask, weight.unsqueeze(1)))
        assert not torch.isclose(loss(logits, mask, weight), loss(logits, mask))

    def test_without_strength_it_is_the_loss(self):
        logits, mask = random_case(7, activation="softmax")
        torch.testing.assert_close(
            BoundaryWeightedLoss(DiceLoss(activation="softmax"), strength=0)(logits, mask),
            DiceLoss(activation="softmax")(logits, mask),
        )

    def test_probabilities_with_ids_need_the_number_of_classes(self):
        logits, mask = random_case(7, activation="softmax")
        loss = BoundaryWeightedLoss(DiceLoss(activation=None), classes=3)
        expected = BoundaryWeightedLoss(DiceLoss(activation="softmax"))(logits, mask)
        torch.testing.assert_close(loss(logits.softmax(1), mask), expected)
        with pytest.raises(ValueError, match="classes is needed with class ids: classes=3"):
            BoundaryWeightedLoss(DiceLoss(activation=None))(logits.softmax(1), mask)

    def test_what_the_loss_needs_is_there_too(self):
        inner = BoundaryLoss(activation="softmax", classes=3, ignore_index=255)
        loss = BoundaryWeightedLoss(inner)
        assert set(loss.maps) == {"boundary_weight", "signed_distance"}
        assert (loss.activation, loss.ignore_index) == ("softmax", 255)
        logits, mask = random_case(7, activation="softmax", ignored=True)
        maps = {name: torch.stack([make(one) for one in mask]) for name, make in loss.maps.items()}
        torch.testing.assert_close(loss(logits, mask, maps=maps), loss(logits, mask), rtol=0, atol=0)
        other = {**maps, "signed_distance": 2 * maps["signed_distance"]}
        torch.testing.assert_close(loss(logits, mask, maps=other), 2 * loss(logits, mask))
        with pytest.raises(ValueError, match="loss must not be weighted by boundaries already"):
            BoundaryWeightedLoss(loss)

    def test_values_of_terms_are_kept(self):
        logits, mask = random_case(7, activation="sigmoid")
        loss = BoundaryWeightedLoss(DiceCELoss())
        loss(logits, mask)
        assert set(loss.values) == {"dice", "ce"}


@pytest.mark.parametrize("spacing", [None, (0.5, 2.0)])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_distances_as_shares_of_the_diagonal(spacing, alpha):
    logits, mask = random_case(9, activation="sigmoid", space=(6, 8))
    diagonal = 10.0 if spacing is None else (3.0**2 + 16.0**2) ** 0.5
    settings = {"alpha": alpha, "spacing": spacing}
    relative, pixels = (losses.HausdorffLoss(relative=one, **settings)(logits, mask) for one in (True, False))
    torch.testing.assert_close(relative * diagonal**alpha, pixels)
    assert losses.HausdorffLoss().relative


def test_the_hausdorff_term_does_not_outweigh_dice():
    """In pixels, as published, it pushes an undecided net into predicting nothing, harder in larger images."""
    mask = torch.zeros(1, 1, 256, 256)
    mask[..., 100:110, 60:70] = 1
    logits = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    assert losses.HausdorffLoss()(logits, mask) < 0.2
    assert HausdorffLoss()(logits, mask) > 1000


def test_a_map_of_integer_planes_made_one_image_at_a_time_is_not_taken():
    """A worker reads them as ids, and the classes as an axis of space."""
    logits, ids = random_case(9, activation="softmax", space=(6, 8))
    planes = torch.nn.functional.one_hot(ids, CLASSES).movedim(-1, 1)
    loss = BoundaryWeightedLoss(CrossEntropyLoss(activation="softmax"), width=1.0)
    worker = {"boundary_weight": torch.stack([loss.maps["boundary_weight"](one) for one in planes])}
    right = loss.maps["boundary_weight"](planes[0].float())
    assert not torch.equal(worker["boundary_weight"][0], right)
    torch.testing.assert_close(loss(logits, planes, maps=worker), loss(logits, planes), rtol=0, atol=0)


def test_the_catalogue_weighs_any_loss():
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        default = compose("fit", overrides=["loss=boundary_weighted", "data.activation=softmax", "data.classes=[a,b]"])
        focal = compose("fit", overrides=["loss=boundary_weighted", "loss@loss.loss=focal", "loss.loss.gamma=3"])
    loss = instantiate(default.loss)
    assert (type(loss.loss), loss.activation, loss.ignore_index, loss.classes) == (DiceLoss, "softmax", 255, 2)
    assert instantiate(focal.loss).loss.gamma == 3


class TestInACompound:
    def test_terms_add_up_and_share_a_map(self):
        logits, mask = random_case(8, activation="softmax", ignored=True)
        settings = {"activation": "softmax", "ignore_index": 255, "exclude_classes": [0]}
        terms = {
            "dice": DiceLoss(**settings),
            "boundary": BoundaryLoss(classes=3, **settings),
            "hausdorff": HausdorffLoss(classes=3, **settings),
        }
        loss = CompoundLoss(terms, {"boundary": 0.01, "hausdorff": 0.1})
        assert set(loss.maps) == {"signed_distance"}
        expected = sum(
            w * terms[name](logits, mask) for name, w in (("dice", 1), ("boundary", 0.01), ("hausdorff", 0.1))
        )
        torch.testing.assert_close(loss(logits, mask), expected)
        maps = {"signed_distance": torch.stack([loss.maps["signed_distance"](one) for one in mask])}
        torch.testing.assert_close(loss(logits, mask, maps=maps), expected)
        assert (maps["signed_distance"][:, 0] == 0).all()  # Nothing is computed for an excluded class.

    def test_different_maps_of_one_name_are_kept_apart(self):
        logits, mask = random_case(8, activation="sigmoid")
        terms = {"a": BoundaryLoss(), "b": HausdorffLoss(spacing=[1, 2])}
        loss = CompoundLoss(terms)
        assert set(loss.maps) == {"a.signed_distance", "b.signed_distance"}
        maps = {name: torch.stack([make(one) for one in mask]) for name, make in loss.maps.items()}
        expected = sum(term(logits, mask) for term in terms.values())
        torch.testing.assert_close(loss(logits, mask), expected)
        torch.testing.assert_close(loss(logits, mask, maps=maps), expected, rtol=0, atol=0)
        maps["a.signed_distance"] = maps["a.signed_distance"] * 0
        torch.testing.assert_close(loss(logits, mask, maps=maps), terms["b"](logits, mask))

    @pytest.mark.parametrize("kind", ALL)
    @pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
    def test_with_deep_supervision(self, kind, activation):
        logits, mask = random_case(8, activation=activation, space=(8, 8), ignored=True)
        loss = DeepSupervision(built(kind, activation, ignore_index=255))
        coarse = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        maps = {name: torch.stack([make(one) for one in mask]) for name, make in loss.maps.items()}
        torch.testing.assert_close(loss([logits, coarse], mask, maps=maps), loss([logits, coarse], mask))


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_what_does_not_fit_the_logits(kind):
    logits, mask = random_case(9, activation="softmax")
    with pytest.raises(ValueError, match="classes is needed with class ids: classes=3"):
        kind(activation="softmax")(logits, mask)
    with pytest.raises(ValueError, match="classes must be the number of channels of logits, 3, got 4"):
        kind(activation="softmax", classes=4)(logits, mask)
    with pytest.raises(ValueError, match="exclude_classes must name classes from 0 to 2"):
        kind(activation="softmax", classes=3, exclude_classes=[3])(logits, mask)
    with pytest.raises(ValueError, match=r"spacing must have one number for each of the 2 space axes, got \[1\]"):
        kind(activation="softmax", classes=3, spacing=[1])(logits, mask)


@pytest.mark.parametrize("kind", ALL)
def test_copies_and_pickles(kind):
    logits, mask = random_case(9, activation="softmax")
    loss = built(kind, "softmax")
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(other(logits, mask), loss(logits, mask))
        assert other.maps == loss.maps
    assert "classes=" in repr(loss)


def test_descending_moves_a_square_into_place():
    mask = torch.zeros(1, 1, 12, 12)
    mask[..., 6:10, 6:10] = 1
    logits = torch.full((1, 1, 12, 12), -1.0)
    logits[..., 1:5, 1:5] = 1.0
    for kind in KINDS:
        z = logits.clone().requires_grad_()
        loss = CompoundLoss({"dice": DiceLoss(), "other": kind()}, {"other": 0.1})
        optimizer = torch.optim.Adam([z], lr=0.2)
        for _ in range(60):
            optimizer.zero_grad()
            loss(z, mask).backward()
            optimizer.step()
        torch.testing.assert_close((z > 0).float(), mask)
