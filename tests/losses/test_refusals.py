"""Input that other libraries turn into a plausible, wrong number is refused, and the message names the mistake.

Each refusal is tested once, with one loss; one test sees that every loss goes through the shared checks.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from losses.family import LOSSES
from torch import nn

from lightning_dice import losses
from lightning_dice.losses import (
    BoundaryWeightedLoss,
    CompoundLoss,
    DeepSupervision,
    DiceLoss,
    FocalLoss,
    GeneralizedDiceLoss,
    LesionWiseLoss,
    OnProbabilities,
    TverskyLoss,
)

each_loss = pytest.mark.parametrize("name", LOSSES)


def each(*cases):
    """Return each case, `(id, ...)`."""
    return pytest.mark.parametrize("case", [pytest.param(case[1:], id=case[0]) for case in cases])


LOGITS = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(3, (2, 8, 12), generator=torch.Generator().manual_seed(0))
PLANES = (LOGITS > 0).long()
ONE_HOT = torch.nn.functional.one_hot(IDS, 3).movedim(-1, 1).float()
BINARY = LOGITS[:, :1]


def changed(tensor, value, dtype=None):
    tensor = tensor.to(dtype or tensor.dtype).clone()
    tensor[1, ..., 0, 0] = value
    return tensor


@each(
    ("ids-batch-1", "softmax", LOGITS, IDS[:1], "target must"),
    ("ids-transposed", "softmax", LOGITS, IDS.transpose(1, 2), "target must"),
    ("ids-with-axis", "softmax", LOGITS, IDS.unsqueeze(1), r"target\.squeeze\(1\)"),
    ("ids-flat", "softmax", LOGITS, IDS.flatten(1), "target must"),
    ("ids-smaller", "softmax", LOGITS, IDS[:, :4], "target must"),
    ("ids-float", "softmax", LOGITS, IDS.float(), r"integer dtype, got torch.float32; use target\.long\(\)"),
    ("ids-fractional", "softmax", LOGITS, changed(IDS, 0.5, torch.float32), "integer dtype"),
    ("ids-bool", "softmax", LOGITS, IDS.bool(), "integer dtype"),
    ("soft-batch-1", "softmax", LOGITS, ONE_HOT[:1], "target must"),
    ("soft-transposed", "softmax", LOGITS, ONE_HOT.transpose(2, 3), "target must"),
    ("soft-channels-last", "softmax", LOGITS, ONE_HOT.movedim(1, -1), "target must"),
    ("planes-batch-1", "sigmoid", LOGITS, PLANES[:1], "target must"),
    ("planes-transposed", "sigmoid", LOGITS, PLANES.transpose(2, 3), "target must"),
    ("planes-one-of-three", "sigmoid", LOGITS, PLANES[:, :1], "target must"),
    ("planes-without-axis", "sigmoid", BINARY, PLANES[:, 0], r"target\.unsqueeze\(1\)"),
    ("ids-for-planes", "sigmoid", LOGITS, IDS, "target must"),
    ("probs-batch-1", None, LOGITS.sigmoid(), PLANES[:1], "target must"),
    ("probs-transposed", None, LOGITS.sigmoid(), PLANES.transpose(2, 3), "target must"),
    ("logits-flat", "sigmoid", LOGITS.flatten(1), PLANES.flatten(1), r"logits must have the shape \(batch, classes"),
    ("logits-without-classes", "sigmoid", LOGITS[:, :0], PLANES[:, :0], r"one class, got the shape \(2, 0"),
    ("probs-without-classes", None, LOGITS[:, :0], IDS, "logits must have at least one class"),
    ("logits-of-integers", "sigmoid", PLANES, PLANES, "logits must be floating point"),
    ("target-of-numpy", "softmax", LOGITS, IDS.numpy(), "target must be a tensor, got ndarray"),
    ("softmax-of-one", "softmax", BINARY, PLANES[:, 0], "softmax needs at least 2 classes"),
)
def test_shapes_and_dtypes(case):
    activation, logits, target, message = case
    with pytest.raises(ValueError, match=message):
        DiceLoss(activation=activation)(logits, target)


@each(
    ("ids-above", "softmax", LOGITS, changed(IDS, 3), "class ids from 0 to 2, got values from 0 to 3"),
    ("ids-negative", "softmax", LOGITS, changed(IDS, -1), "class ids from 0 to 2, got values from -1"),
    ("ids-255", "softmax", LOGITS, changed(IDS, 255, torch.uint8), "class ids from 0 to 2, .*ignore_index"),
    ("mask-255", "sigmoid", LOGITS, PLANES * 255, "target == 255"),
    ("mask-255-uint8", "sigmoid", LOGITS, (PLANES * 255).byte(), "target == 255"),
    ("mask-255-float", "sigmoid", LOGITS, PLANES * 255.0, "target == 255"),
    ("planes-of-2", "sigmoid", LOGITS, changed(PLANES, 2), r"target must lie in \[0, 1\], got values from 0 to 2"),
    ("planes-negative", "sigmoid", LOGITS, changed(PLANES, -1), r"target must lie in \[0, 1\]"),
    ("soft-above", "sigmoid", LOGITS, changed(PLANES.float(), 1.5), r"target must lie in \[0, 1\], .* to 1.5"),
    ("soft-below", "sigmoid", LOGITS, changed(PLANES.float(), -0.1), r"target must lie in \[0, 1\]"),
    ("soft-nan", "sigmoid", LOGITS, changed(PLANES.float(), math.nan), r"target must lie in \[0, 1\]"),
    ("soft-infinite", "sigmoid", LOGITS, changed(PLANES.float(), math.inf), r"target must lie in \[0, 1\]"),
    ("softmax-soft-above", "softmax", LOGITS, changed(ONE_HOT, 1.5), r"target must lie in \[0, 1\]"),
    ("softmax-soft-nan", "softmax", LOGITS, changed(ONE_HOT, math.nan), r"target must lie in \[0, 1\]"),
    ("softmax-soft-sums", "softmax", LOGITS, ONE_HOT * 0.9, "must sum to 1"),
    ("softmax-planes-overlap", "softmax", LOGITS, PLANES, "must sum to 1"),
    ("probs-of-logits", None, LOGITS, PLANES, r"takes probabilities in \[0, 1\]"),
    ("softmax-twice", "softmax", LOGITS.softmax(1), IDS, "logits are probabilities"),
    ("sigmoid-of-mask", "sigmoid", PLANES.float(), PLANES, "logits are a mask"),
)
def test_values(case):
    activation, logits, target, message = case
    with pytest.raises(ValueError, match=message):
        DiceLoss(activation=activation)(logits, target)


WEIGHT = torch.ones(2, 8, 12)
ANNOTATED = torch.ones(2, 3, dtype=torch.bool)


@each(
    ("weight-batch-1", {"weight": WEIGHT[:1]}, "weight must have the shape"),
    ("weight-transposed", {"weight": WEIGHT.transpose(1, 2)}, "weight must have the shape"),
    ("weight-with-axis", {"weight": WEIGHT.unsqueeze(1)}, "weight must have the shape"),
    ("weight-of-classes", {"weight": torch.ones(3)}, "weight must have the shape"),
    ("weight-of-integers", {"weight": WEIGHT.long()}, "weight must be floating point"),
    ("weight-negative", {"weight": changed(WEIGHT, -1)}, "weight must be finite and >= 0"),
    ("weight-nan", {"weight": changed(WEIGHT, math.nan)}, "weight must be finite and >= 0"),
    ("annotated-batch-1", {"annotated": ANNOTATED[:1]}, "annotated must be bool"),
    ("annotated-classes", {"annotated": ANNOTATED[:, :2]}, "annotated must be bool"),
    ("annotated-float", {"annotated": ANNOTATED.float()}, "annotated must be bool"),
)
def test_weights_of_pixels_and_classes(case):
    given, message = case
    with pytest.raises(ValueError, match=message):
        DiceLoss(activation="softmax")(LOGITS, IDS, **given)


@each_loss
def test_every_loss_goes_through_the_shared_checks(name):
    """Shapes, dtypes and values of logits, target, weight and annotated, with one case of each."""
    softmax, sigmoid, none = (LOSSES[name](activation=activation) for activation in ("softmax", "sigmoid", None))
    for loss, logits, target, more, message in (
        (softmax, LOGITS, IDS[:1], {}, "target must"),
        (softmax, LOGITS, IDS.transpose(1, 2), {}, "target must"),
        (softmax, LOGITS, IDS.float(), {}, "integer dtype"),
        (sigmoid, LOGITS, PLANES[:1], {}, "target must"),
        (sigmoid, LOGITS, PLANES[:, :1], {}, "target must"),
        (sigmoid, LOGITS, IDS, {}, "target must"),
        (none, LOGITS.sigmoid(), PLANES.transpose(2, 3), {}, "target must"),
        (sigmoid, PLANES, PLANES, {}, "logits must be floating point"),
        (sigmoid, LOGITS[:, :0], PLANES[:, :0], {}, "logits must have at least one class"),
        (softmax, LOGITS, changed(IDS, 3), {}, "class ids from 0 to 2"),
        (sigmoid, LOGITS, PLANES * 255, {}, "target == 255"),
        (sigmoid, LOGITS, changed(PLANES.float(), math.nan), {}, r"target must lie in \[0, 1\]"),
        (softmax, LOGITS, ONE_HOT * 0.9, {}, "must sum to 1"),
        (none, LOGITS, PLANES, {}, r"takes probabilities in \[0, 1\]"),
        (softmax, LOGITS.softmax(1), IDS, {}, "logits are probabilities"),
        (softmax, LOGITS, IDS, {"weight": WEIGHT.transpose(1, 2)}, "weight must have the shape"),
        (softmax, LOGITS, IDS, {"weight": changed(WEIGHT, -1)}, "weight must be finite and >= 0"),
        (softmax, LOGITS, IDS, {"annotated": ANNOTATED[:1]}, "annotated must be bool"),
    ):
        if name == "OnProbabilities" and more:
            message = "takes neither weight nor annotated"
        if name == "DeepSupervision":
            message += "|space must"  # Levels may be smaller than the target.
        with pytest.raises(ValueError, match=message):
            loss(logits, target, **more)


def test_a_network_with_several_outputs_is_sent_to_deep_supervision():
    mask = torch.zeros(1, 3, 4, 4)
    for name in set(LOSSES) - {"DeepSupervision"}:
        loss = LOSSES[name](activation="sigmoid")
        # Those that check the shapes before anything else give no advice.
        plain = name in ("BoundaryWeightedLoss", "SkeletonRecallLoss", "TopKCrossEntropyLoss")
        advice = "" if plain else ": .*DeepSupervision"
        with pytest.raises(ValueError, match=f"logits must be a tensor, got list{advice}"):
            loss([mask, mask], mask)
        advice = "" if plain else r': use logits\["out"\]'
        with pytest.raises(ValueError, match=f"logits must be a tensor, got dict{advice}"):
            loss({"out": mask}, mask)


@each_loss
def test_common_settings(name):
    for settings in (
        {"activation": "tanh"},
        {"activation": "Softmax"},
        {"ignore_index": "255"},
        {"ignore_index": 255.0},
        {"ignore_index": True},
        {"ignore_indx": 255},
    ):
        (wrong,) = settings
        # The compound of the table needs an activation.
        common = {"activation": "sigmoid"} if name == "CompoundLoss" else {}
        with pytest.raises((ValueError, TypeError), match=wrong):
            LOSSES[name](**common | settings)


# Settings that only some have; each with all that must be refused.
NOT_PIXELS = [-1, math.nan, math.inf, "1", True, [1], [1, 2, 3], [1, -1], [True, 1], None]
NOT_POSITIVE = [0, -1, math.nan, math.inf, "1", True, None]
NOT_NEGATIVE = [-1, math.nan, math.inf, "1", True]
NOT_WEIGHTS = [[1, -1, 1], [0, 0, 0], [1, math.nan, 1], [1, math.inf, 1], [[1, 1, 1]], "111", 1.0, [True, False, True]]
OVERLAP = {
    "smooth": NOT_PIXELS,
    "pool": ["batches", None, True],
    "squared": ["no", None],
    "overlap": ["min", None],
    "exclude_classes": [0, "0", [-1], [0, 0], [0.5], [True]],
    "class_weights": NOT_WEIGHTS,
    "absent": ["ignore", None],
    "reduction": ["avg", "means", None],
    "across_ranks": ["no", None],
}
BY_PIXEL = {
    "pool": ["all", "batches", None],
    "class_weights": NOT_WEIGHTS,
    "across_ranks": ["no", None],
}
DISTANCE = {
    "classes": [0, -1, 1.5, "3", True],
    "spacing": [[0, 1], [-1, 1], [math.nan, 1], "11", 1],
    "exclude_classes": OVERLAP["exclude_classes"],
    "across_ranks": ["no", None],
}
SETTINGS = {
    "BoundaryLoss": DISTANCE,
    "ClDiceLoss": {
        "iterations": [-1, 1.5, "3", True, None],
        "core": ["no", None],
        "smooth": NOT_PIXELS,
        "pool": ["all", None],
        "exclude_classes": OVERLAP["exclude_classes"],
        "class_weights": NOT_WEIGHTS,
        "absent": ["penalize", None],
        "across_ranks": ["no", None],
    },
    "CrossEntropyLoss": {**BY_PIXEL, "label_smoothing": [-0.1, 1, 1.5, math.nan, "0", True, None]},
    "DiceCELoss": {**OVERLAP, "dice_weight": NOT_NEGATIVE, "ce_weight": NOT_NEGATIVE, "label_smoothing": [-1, 1, True]},
    "DiceFocalLoss": {
        **OVERLAP,
        "dice_weight": NOT_NEGATIVE,
        "focal_weight": NOT_NEGATIVE,
        "gamma": NOT_NEGATIVE,
        "alpha": [-0.1, 1.1, "1", True],
    },
    "DiceLoss": OVERLAP,
    "FocalLoss": {**BY_PIXEL, "gamma": [*NOT_NEGATIVE, None], "alpha": [-0.1, 1.1, math.nan, "1", True]},
    "FocalTverskyLoss": {**OVERLAP, "gamma": NOT_POSITIVE, "alpha": NOT_NEGATIVE, "beta": NOT_NEGATIVE},
    "GeneralizedDiceLoss": {
        **{name: values for name, values in OVERLAP.items() if name != "class_weights"},
        "weighting": ["square", None, True],
        "class_weights": [[1, 1, 1]],
    },
    "HausdorffLoss": {**DISTANCE, "alpha": NOT_POSITIVE, "relative": ["no", None]},
    "JaccardLoss": OVERLAP,
    "LogCoshDiceLoss": OVERLAP,
    "LogDiceLoss": {**OVERLAP, "gamma": NOT_POSITIVE},
    "LogJaccardLoss": {**OVERLAP, "gamma": NOT_POSITIVE},
    "LogTverskyLoss": {**OVERLAP, "gamma": NOT_POSITIVE, "alpha": NOT_NEGATIVE, "beta": NOT_NEGATIVE},
    "SkeletonRecallLoss": {
        "radius": [-1, math.nan, "2", True, None],
        "across_ranks": ["no", None],
        "classes": DISTANCE["classes"],
        "smooth": NOT_PIXELS,
        "pool": ["batches", None],
        "exclude_classes": OVERLAP["exclude_classes"],
        "class_weights": NOT_WEIGHTS,
    },
    "TopKCrossEntropyLoss": {
        "k": [0, -0.1, 1.1, math.nan, "1", True, None],
        "class_weights": NOT_WEIGHTS,
        "across_ranks": ["no", None],
    },
    "TverskyLoss": {**OVERLAP, "alpha": [*NOT_NEGATIVE, None], "beta": [*NOT_NEGATIVE, None]},
}


def test_every_setting_is_in_the_table():
    shared = {"activation", "ignore_index"}  # tested for all
    for name, them in SETTINGS.items():
        declared = set()
        for kind in getattr(losses, name).__mro__:
            if kind is not nn.Module and "__init__" in vars(kind) and issubclass(kind, losses.SegmentationLoss):
                parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
                declared |= {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}
        assert set(them) <= declared | set(OVERLAP), name
        assert declared - shared <= set(them), name


def refusal(make):
    """Return the message of the error that a call raises."""
    try:
        make()
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("name", SETTINGS)
def test_own_settings(name):
    named = {
        "dice_weight": "the weight of dice",
        "ce_weight": "the weight of ce",
        "focal_weight": "the weight of focal",
    }
    for setting, values in SETTINGS[name].items():
        for value in values:
            message = refusal(lambda: getattr(losses, name)(**{setting: value}))  # noqa: B023
            assert named.get(setting, setting) in message, f"{setting}={value!r}: {message}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiceLoss(overlap="minimum", squared=True), 'overlap="minimum" needs squared=False'),
        (lambda: DiceLoss(class_weights=[1, 2], pool="all"), "class_weights need a ratio for each class"),
        (lambda: TverskyLoss(squared=True), "squared must be False"),
        (lambda: FocalLoss(alpha=0.5, activation="softmax"), "alpha weighs foreground against background"),
        (lambda: GeneralizedDiceLoss(pool="all"), "classes are weighted by their sizes"),
        (lambda: GeneralizedDiceLoss(class_weights=[1, 2]), "classes are weighted by their sizes"),
        (lambda: GeneralizedDiceLoss(reduction="sum"), 'reduction="sum" has no meaning'),
    ],
)
def test_settings_that_exclude_each_other(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", [name for name, them in SETTINGS.items() if them.get("class_weights") is NOT_WEIGHTS])
def test_class_weights_of_another_number(name):
    loss = LOSSES[name](activation="softmax", class_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="class_weights must have one for each of the 3 classes, got 2"):
        loss(LOGITS, IDS)


@pytest.mark.parametrize("name", [name for name, them in SETTINGS.items() if "exclude_classes" in them])
def test_excluded_classes(name):
    for indices, message in (([3], "must name classes from 0 to 2"), ([0, 1, 2], "leaves no class")):
        with pytest.raises(ValueError, match=f"exclude_classes {message}"):
            LOSSES[name](activation="softmax", exclude_classes=indices)(LOGITS, IDS)


NOT_A_LOSS = [None, "dice", DiceLoss, lambda logits, target: logits.mean()]


@pytest.mark.parametrize(
    "wrap",
    [
        BoundaryWeightedLoss,
        DeepSupervision,
        LesionWiseLoss,
        OnProbabilities,
        lambda one: CompoundLoss([one]),
        lambda one: CompoundLoss({"dice": one}),
    ],
    ids=["BoundaryWeightedLoss", "DeepSupervision", "LesionWiseLoss", "OnProbabilities", "list", "mapping"],
)
def test_what_is_wrapped_is_a_module(wrap):
    for wrong in NOT_A_LOSS:
        with pytest.raises((ValueError, TypeError), match="must be"):
            wrap(wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BoundaryWeightedLoss(DiceLoss(), width=0), "width"),
        (lambda: BoundaryWeightedLoss(DiceLoss(), width="5"), "width"),
        (lambda: BoundaryWeightedLoss(DiceLoss(), strength=-1), "strength"),
        (lambda: BoundaryWeightedLoss(DiceLoss(), spacing=[0, 1]), "spacing"),
        (lambda: LesionWiseLoss(DiceLoss(pool="image"), classes=True), "classes"),
        (lambda: LesionWiseLoss(DiceLoss(pool="image"), regions="near"), "regions"),
        (lambda: LesionWiseLoss(DiceLoss(pool="image"), connectivity=0), "connectivity"),
        (lambda: LesionWiseLoss(DiceLoss()), "pool"),
        (lambda: DeepSupervision(DiceLoss(), weights=[0, 0]), "weights"),
        (lambda: DeepSupervision(DiceLoss(), weights=[1, -1]), "weights"),
        (lambda: DeepSupervision(DiceLoss(), weights=["1"]), "weights"),
        (lambda: DeepSupervision(DiceLoss(), weights=[True]), "weights"),
        (lambda: DeepSupervision(DiceLoss(), weights=[]), "weights"),
        (lambda: DeepSupervision(DiceLoss(), reduce="mean"), "reduce"),
        (lambda: DeepSupervision(DiceLoss(reduction="none")), "reduction"),
        (lambda: CompoundLoss([]), "terms"),
        (lambda: CompoundLoss({"a": DiceLoss()}, {"b": 1}), "weights"),
        (lambda: CompoundLoss({"a": DiceLoss()}, {"a": "1"}), "weight of a"),
        (lambda: CompoundLoss({"a": DiceLoss()}, {"a": math.nan}), "weight of a"),
        (lambda: CompoundLoss({"a": DiceLoss()}, {"a": True}), "weight of a"),
        (lambda: CompoundLoss([DiceLoss()], [1, 2]), "weights"),
        (lambda: CompoundLoss([DiceLoss(), FocalLoss(activation="softmax")]), "activation"),
        (lambda: CompoundLoss([DiceLoss(), FocalLoss(ignore_index=1)]), "ignore_index"),
        (lambda: CompoundLoss([DiceLoss(reduction="none")]), "reduction"),
    ],
)
def test_settings_of_wrappers(make, message):
    with pytest.raises(ValueError, match=message):
        make()
