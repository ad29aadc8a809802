from __future__ import annotations

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from definitions import plain_sums
from torch import nn

from lightning_dice import DiceLoss
from lightning_dice.functional import RegionMap, finish_reductions
from lightning_dice.kernels import OverlapSums, RequiredSums, checked_pixels, region_sums
from lightning_dice.losses import (
    CompoundLoss,
    FocalTverskyLoss,
    GeneralizedDiceLoss,
    JaccardLoss,
    LesionWiseLoss,
    LogDiceLoss,
)


def lesions(seed, *, activation, batch=2, classes=3, space=(7, 6), ignored=False, soft=False):
    """Return logits (or probabilities) and a target of small components; the last image lacks the last class."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, *space, generator=generator, dtype=torch.float64) * 2
    if activation is None:
        logits = logits.sigmoid()
    shape = (batch, *space) if activation == "softmax" else (batch, classes, *space)
    target = (torch.rand(shape, generator=generator) < 0.2).long()
    if activation == "softmax":
        target *= torch.randint(1, classes, shape, generator=generator)
        target[-1][target[-1] == classes - 1] = 0
    else:
        target[-1, -1] = 0
    if soft:
        target = target * torch.rand(shape, generator=generator, dtype=torch.float64)
    if ignored:
        target[torch.rand(shape, generator=generator) < 0.2] = 255
    return logits, target


def flood(places, connectivity):
    """Return the connected components of a set of positions."""
    places, components = set(places), []
    while places:
        front = [places.pop()]
        component = set(front)
        while front:
            place = front.pop()
            near = {
                other
                for other in places
                if max(abs(a - b) for a, b in zip(place, other, strict=True)) == 1
                and sum(abs(a - b) for a, b in zip(place, other, strict=True)) <= connectivity
            }
            places -= near
            component |= near
            front += near
        components.append(component)
    return components


def nearest(place, components, tie):
    """Return the number of the component nearest to a position; of equally near ones, the one with `tie`."""
    squares = [
        min(sum((a - b) ** 2 for a, b in zip(place, pixel, strict=True)) for pixel in component)
        for component in components
    ]
    near = [number for number, square in enumerate(squares) if square == min(squares)]
    return next((number for number in near if tie in components[number]), near[0])


def plain_lesion_loss(
    logits,
    target,
    *,
    activation,
    regions="nearest",
    connectivity=None,
    smooth=1.0,
    squared=False,
    minimum=False,
    exclude_classes=(),
    class_weights=None,
    ignore_index=None,
    absent="smooth",
    weight=None,
):
    """Average the loss over lesions, taking the region of each as an image whose other pixels are ignored."""
    batch, classes = logits.shape[:2]
    space = logits.shape[2:]
    connectivity = connectivity or len(space)
    planes = target.shape == logits.shape
    every = list(itertools.product(*map(range, space)))
    made = RegionMap(activation, classes, ignore_index, (), regions, connectivity)
    values, norms = [], []
    for b, c in itertools.product(range(batch), range(classes)):
        if c in exclude_classes:
            continue
        labels = target[b, c] if planes else target[b]
        ignored = {
            place
            for place in every
            if labels[place] == ignore_index
            or (planes and activation == "softmax" and (target[(b, slice(None), *place)] == ignore_index).any())
        }
        inside = {p for p in every if (labels[p] >= 0.5 if planes else labels[p] == c)} - ignored
        components = flood(inside, connectivity)
        ours = made(target[b])[c]
        if not components:
            members = [every]
        elif regions == "blob":
            members = [[p for p in every if p in own or p not in inside] for own in components]
        else:
            members = [[] for _ in components]
            for place in every:
                # Either of two components at the same distance is right: use the one that was taken.
                tie = next(p for p in inside if ours[p] == ours[place])
                members[nearest(place, components, tie)].append(place)
        for own in members:
            kept = torch.tensor([place in set(own) for place in every]).view(space)
            w = torch.ones(batch, *space, dtype=torch.float64) if weight is None else weight
            shape = (batch, 1, *space) if w.shape == logits.shape else (batch, *space)
            sums = plain_sums(
                logits[b : b + 1],
                target[b : b + 1],
                activation=activation,
                ignore_index=ignore_index,
                weight=(w * kept.expand(shape))[b : b + 1],
            )[0][c]
            squares = "_squares" if squared else ""
            count, actual = sums.total("count"), sums.total("actual")
            below = sums.total(f"predicted{squares}") + sums.total(f"actual{squares}") + smooth
            if count == 0 or below == 0 or (absent == "skip" and actual == 0):
                continue
            value = 1 - (2 * sums.total("minimum" if minimum else "overlap") + smooth) / below
            if absent == "penalize" and actual == 0:
                value = sums.total("absent_nll") / count
            norm = 1.0 if class_weights is None else class_weights[c]
            values.append(norm * value)
            norms.append(norm)
    return math.fsum(values) / math.fsum(norms) if norms else 0.0


OPTIONS = [
    {"smooth": 1e-5, "absent": "penalize"},
    {"smooth": 0.0, "absent": "smooth", "squared": True},
    {"smooth": 1.0, "absent": "skip", "exclude_classes": (0,)},
    {"smooth": 1.0, "absent": "smooth", "class_weights": [1.0, 2.0, 3.0]},
]


class TestEqualsTheDefinition:
    @pytest.mark.parametrize("regions", ["nearest", "blob"])
    @pytest.mark.parametrize(
        ("space", "activation"),
        [((19,), "sigmoid"), ((7, 6), "softmax"), ((7, 6), None), ((4, 5, 3), "sigmoid")],
        ids=["1d-sigmoid", "2d-softmax", "2d-probabilities", "3d-sigmoid"],
    )
    @pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
    def test_for_every_setting(self, options, activation, space, regions):
        logits, target = lesions(sum(space), activation=activation, space=space, ignored=True)
        classes = None if activation is None else 3
        loss = LesionWiseLoss(
            DiceLoss(activation=activation, pool="image", ignore_index=255, **options), regions=regions, classes=classes
        )
        # `RegionMap` would read integer planes as ids if nothing tells them apart.
        own = target.double() if activation is None else target
        expected = plain_lesion_loss(logits, own, activation=activation, regions=regions, ignore_index=255, **options)
        assert loss(logits, target).item() == pytest.approx(expected, rel=1e-11)

    @pytest.mark.parametrize("regions", ["nearest", "blob"])
    @pytest.mark.parametrize("shape", ["pixel", "plane"])
    @pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
    def test_with_a_pixel_weight(self, activation, shape, regions):
        logits, target = lesions(5, activation=activation)
        weight = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        weight = weight[:, 0] if shape == "pixel" else weight
        loss = LesionWiseLoss(DiceLoss(activation=activation, pool="image"), regions=regions, classes=3)
        expected = plain_lesion_loss(logits, target, activation=activation, regions=regions, weight=weight)
        assert loss(logits, target, weight).item() == pytest.approx(expected, rel=1e-11)

    @pytest.mark.parametrize("regions", ["nearest", "blob"])
    def test_with_connectivity(self, regions):
        logits, target = lesions(6, activation="sigmoid", space=(8, 8))
        results = []
        for connectivity in (1, 2):
            loss = LesionWiseLoss(DiceLoss(pool="image"), regions=regions, connectivity=connectivity)
            results.append(loss(logits, target).item())
            expected = plain_lesion_loss(
                logits, target, activation="sigmoid", regions=regions, connectivity=connectivity
            )
            assert results[-1] == pytest.approx(expected, rel=1e-11)
        assert results[0] != pytest.approx(results[1], rel=1e-3)

    @pytest.mark.parametrize("regions", ["nearest", "blob"])
    @pytest.mark.parametrize("squared", [False, True])
    def test_with_soft_labels(self, squared, regions):
        logits, target = lesions(7, activation="sigmoid", soft=True)
        plain = DiceLoss(pool="image", squared=squared, overlap="product" if squared else "minimum")
        given = {"activation": "sigmoid", "regions": regions, "squared": squared, "minimum": not squared}
        expected = plain_lesion_loss(logits, target, **given)
        assert LesionWiseLoss(plain, regions=regions)(logits, target).item() == pytest.approx(expected, rel=1e-11)

    @pytest.mark.parametrize("integers", [False, True])
    def test_with_one_hot_planes_of_a_softmax(self, integers):
        logits, ids = lesions(8, activation="softmax")
        planes = torch.nn.functional.one_hot(ids, 3).movedim(-1, 1)
        loss = LesionWiseLoss(DiceLoss(activation="softmax", pool="image"), classes=3)
        torch.testing.assert_close(loss(logits, planes if integers else planes.double()), loss(logits, ids))


def test_a_small_and_a_large_lesion_count_the_same():
    # A lesion of one pixel and one of four: missed, found in half, found.
    mask = torch.tensor([[[1, 0, 0, 0, 0, 0, 1, 1, 1, 1]]])

    def of(*probs, regions="nearest", smooth=0.0):
        loss = LesionWiseLoss(DiceLoss(activation=None, pool="image", smooth=smooth), regions=regions)
        return loss(torch.tensor([[probs]], dtype=torch.float64), mask).item()

    assert of(1, 0, 0, 0, 0, 0, 1, 1, 1, 1) == pytest.approx(0)
    assert of(0, 0, 0, 0, 0, 0, 1, 1, 1, 1) == pytest.approx(1 / 2)
    assert of(1, 0, 0, 0, 0, 0, 0, 0, 0, 0) == pytest.approx(1 / 2)
    assert of(1, 0, 0, 0, 0, 0, 1, 1, 0, 0) == pytest.approx((1 - 4 / 6) / 2)
    # A false positive counts against the nearest lesion, or against both.
    assert of(1, 1, 0, 0, 0, 0, 1, 1, 1, 1) == pytest.approx((1 - 2 / 3) / 2)
    assert of(1, 1, 0, 0, 0, 0, 1, 1, 1, 1, regions="blob") == pytest.approx((1 - 2 / 3 + 1 - 8 / 9) / 2)
    # The smoothing of a pixel halves what the small one costs.
    assert of(0, 0, 0, 0, 0, 0, 1, 1, 1, 1, smooth=1.0) == pytest.approx(1 / 4)


@pytest.mark.parametrize("regions", ["nearest", "blob"])
@pytest.mark.parametrize(
    "plain",
    [
        DiceLoss(pool="image", absent="penalize"),
        DiceLoss(pool="image", squared=True),
        DiceLoss(pool="image", overlap="minimum"),
        DiceLoss(pool="image", class_weights=[1, 2], reduction="sum"),
        JaccardLoss(pool="image"),
        LogDiceLoss(pool="image"),
        FocalTverskyLoss(pool="image", gamma=0.75),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_of_one_lesion_in_an_image_it_is_the_plain_loss(plain, regions):
    logits = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.zeros(3, 2, 6, 6)
    target[0, 0, 1:3, 2:5] = target[0, 1, 4:, 4:] = target[1, 1, 2, 2] = 1
    torch.testing.assert_close(LesionWiseLoss(plain, regions=regions)(logits, target), plain(logits, target))


class TestInvariances:
    @pytest.mark.parametrize("regions", ["nearest", "blob"])
    def test_classes_relabelled(self, regions):
        logits, target = lesions(9, activation="softmax")
        order = torch.tensor([2, 0, 1])
        loss = LesionWiseLoss(DiceLoss(activation="softmax", pool="image"), classes=3, regions=regions)
        torch.testing.assert_close(loss(logits[:, order], order.argsort()[target]), loss(logits, target))

    def test_images_in_another_order(self):
        logits, target = lesions(9, activation="sigmoid", batch=4)
        loss = LesionWiseLoss(DiceLoss(pool="image"))
        torch.testing.assert_close(loss(logits.flip(0), target.flip(0)), loss(logits, target))

    @pytest.mark.parametrize("regions", ["nearest", "blob"])
    def test_batch_split_and_tables_added(self, regions):
        logits, target = lesions(10, activation="sigmoid", batch=5)
        plain = DiceLoss(pool="image")
        made = RegionMap(regions=regions)
        parts = []
        for part in (slice(0, 2), slice(2, 5)):
            found = torch.stack([made(one) for one in target[part]]).flatten(2)
            parts.append(region_sums(checked_pixels(logits[part], target[part]), found)[0])
        whole = LesionWiseLoss(plain, regions=regions)(logits, target)
        (added,) = finish_reductions([plain.reduce_classes(*plain.class_losses(OverlapSums.cat(parts)), None)])
        torch.testing.assert_close(added, whole)

    def test_the_sums_of_regions_add_up_to_those_of_the_image(self):
        logits, target = lesions(11, activation="softmax", ignored=True)
        pixels = checked_pixels(logits, target, activation="softmax", ignore_index=255)
        made = RegionMap("softmax", classes=3, ignore_index=255)
        regions = torch.stack([made(one) for one in target]).flatten(2)
        wanted = RequiredSums(squares=True, minimum=True, absent_nll=True)
        parts, own_class = region_sums(pixels, regions, wanted)
        table = plain_sums(logits, target, activation="softmax", ignore_index=255)
        for name, field in parts.fields.items():
            expected = [math.fsum(table[b][c].total(name) for b in range(2)) for c in range(3)]
            ours = [field.squeeze(1)[own_class == c].sum().item() for c in range(3)]
            assert ours == pytest.approx(expected, rel=1e-12), name


class TestHardCases:
    def test_an_image_without_a_lesion_pushes_false_positives_down(self):
        logits = torch.zeros(1, 1, 5, 5, requires_grad=True)
        plain = DiceLoss(pool="image", smooth=1e-5, absent="penalize")
        value = LesionWiseLoss(plain)(logits, torch.zeros(1, 1, 5, 5))
        value.backward()
        assert value.item() == pytest.approx(math.log(2))
        torch.testing.assert_close(logits.grad, torch.full_like(logits, 0.5 / 25))

    def test_a_class_that_is_not_annotated_is_left_out(self):
        logits, target = lesions(13, activation="sigmoid", batch=1)
        loss = LesionWiseLoss(DiceLoss(pool="image"))
        annotated = torch.tensor([[True, False, True]])
        kept = [0, 2]
        torch.testing.assert_close(loss(logits, target, annotated=annotated), loss(logits[:, kept], target[:, kept]))

    def test_many_lesions_in_a_large_image(self):
        logits = torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(0))
        target = torch.zeros(1, 1, 256, 256)
        target[..., ::4, ::4] = 1
        loss = LesionWiseLoss(DiceLoss(pool="image"))
        made = loss.maps["regions"](target[0])
        assert made.max() == 64 * 64 - 1
        p = logits.double().sigmoid().flatten()
        predicted = np.bincount(made.flatten().numpy(), p.numpy())
        found = made[0, ::4, ::4].flatten()
        overlap = np.zeros(64 * 64)
        overlap[found] = logits[0, 0, ::4, ::4].double().sigmoid().flatten()
        expected = (1 - (2 * overlap + 1) / (predicted + 1 + 1)).mean()
        assert loss(logits, target).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("activation", "regions", "options"),
    [
        ("sigmoid", "nearest", {"squared": True}),
        ("softmax", "blob", {"overlap": "minimum"}),
        (None, "nearest", {"absent": "penalize"}),
    ],
)
def test_gradient(activation, regions, options):
    logits, target = lesions(15, activation=activation, space=(4, 4), ignored=True)
    plain = DiceLoss(activation=activation, pool="image", ignore_index=255, **options)
    loss = LesionWiseLoss(plain, classes=3 if activation == "softmax" else None, regions=regions)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, target), logits)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, target), logits)


class TestMaps:
    @pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
    def test_given_ones_are_taken(self, activation):
        logits, target = lesions(17, activation=activation)
        loss = LesionWiseLoss(DiceLoss(activation=activation, pool="image"), classes=3)
        made = torch.stack([loss.maps["regions"](one) for one in target])
        assert torch.equal(loss(logits, target, maps={"regions": made}), loss(logits, target))
        one_region = loss(logits, target, maps={"regions": torch.zeros_like(made)})
        torch.testing.assert_close(one_region, loss.loss(logits, target))

    def test_of_another_shape_are_refused(self):
        logits, target = lesions(17, activation="sigmoid")
        loss = LesionWiseLoss(DiceLoss(pool="image"))
        with pytest.raises(ValueError, match=r"maps\['regions'\] must have the shape"):
            loss(logits, target, maps={"regions": torch.zeros(2, 7, 6, dtype=torch.int32)})
        with pytest.raises(ValueError, match=r'maps\["regions"\] must hold integers'):
            loss(logits, target, maps={"regions": torch.zeros(logits.shape)})

    def test_in_a_compound(self):
        logits, target = lesions(17, activation="sigmoid")
        lesion_wise, plain = LesionWiseLoss(DiceLoss(pool="image")), DiceLoss()
        both = CompoundLoss({"lesions": lesion_wise, "dice": plain}, {"dice": 2.0})
        assert dict(both.maps) == dict(lesion_wise.maps)
        torch.testing.assert_close(both(logits, target), lesion_wise(logits, target) + 2 * plain(logits, target))

    def test_state_copies_and_pickles(self):
        logits, target = lesions(17, activation="sigmoid")
        loss = LesionWiseLoss(DiceLoss(pool="image", class_weights=[1, 2, 3]), connectivity=1)
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert torch.equal(other(logits, target), loss(logits, target))
            assert other.maps == loss.maps
        assert "regions='nearest', connectivity=1" in repr(loss)


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (nn.BCEWithLogitsLoss(), {}, "loss must be an OverlapLoss, such as DiceLoss, got BCEWithLogitsLoss"),
        (GeneralizedDiceLoss(pool="image"), {}, "GeneralizedDiceLoss joins them"),
        (DiceLoss(), {}, "must have pool=\"image\", as each lesion has its own ratio, got 'batch'"),
        (DiceLoss(pool="image", reduction="none"), {}, 'must have one value, got reduction="none"'),
        (DiceLoss(pool="image"), {"regions": "voronoi"}, "regions must be one of 'nearest', 'blob', got 'voronoi'"),
        (DiceLoss(pool="image"), {"connectivity": 0}, "connectivity must be None or an integer >= 1, got 0"),
        (DiceLoss(pool="image"), {"classes": 2.0}, "classes must be None or an integer >= 1, got 2.0"),
    ],
)
def test_refuses_settings(loss, settings, message):
    with pytest.raises(ValueError, match=message):
        LesionWiseLoss(loss, **settings)


def test_refuses_settings_that_do_not_fit_the_call():
    softmax = DiceLoss(activation="softmax", pool="image")
    logits, target = lesions(18, activation="softmax")
    with pytest.raises(ValueError, match="classes is needed with class ids: classes=3"):
        LesionWiseLoss(softmax)(logits, target)
    with pytest.raises(ValueError, match="classes must be the number of channels of logits, 3, got 2"):
        LesionWiseLoss(softmax, classes=2)(logits, target)
    with pytest.raises(ValueError, match="connectivity must be from 1 to the number of space axes, 2, got 3"):
        LesionWiseLoss(softmax, classes=3, connectivity=3)(logits, target)
    with pytest.raises(ValueError, match="one for each of the 3 classes, got 2"):
        LesionWiseLoss(DiceLoss(pool="image", class_weights=[1, 2]))(*lesions(18, activation="sigmoid"))
    with pytest.raises(ValueError, match="must be squares, minimum or absent_nll"):
        region_sums(
            checked_pixels(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)), torch.zeros(1, 1, 2), RequiredSums(nll=True)
        )
