"""Settings that reproduce the losses of MONAI, segmentation_models_pytorch (smp) and nnU-Net, from their arguments.

What the `like_...` constructors of the losses share. They take the peer's own names and defaults; targets keep this
library's layout: class ids `(batch, *space)`, not `(batch, 1, *space)`, with a softmax, and planes with a sigmoid,
whatever `to_onehot_y` says. Equality holds for labels of 0 and 1; soft labels are spoken of where they are meant. What
cannot be reproduced, or should not be, raises `ValueError`.

Checked against MONAI 1.6, smp 0.6 and nnU-Net 2.8, in value and gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor

from lightning_dice.argument_checks import check_choice, check_class_indices, check_number
from lightning_dice.functional import ClassWeighting
from lightning_dice.kernels import Activation
from lightning_dice.losses.overlap import OverlapSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

MonaiWeight = Sequence[float] | float | Tensor | None
SmpMode = Literal["binary", "multiclass", "multilabel"]

# Weights that are printed with six digits and copied still have a mean of 1.
_ROUNDING = 1e-5


class MonaiPixels(TypedDict, total=False):
    """Arguments that all overlap losses of MONAI have."""

    include_background: bool
    to_onehot_y: bool
    sigmoid: bool
    softmax: bool
    other_act: Callable[[Tensor], Tensor] | None
    reduction: Literal["mean", "sum", "none"]
    smooth_nr: float
    smooth_dr: float
    batch: bool


class MonaiOverlap(MonaiPixels, total=False):
    """Arguments of MONAI's `TverskyLoss`, its `alpha` and `beta` apart."""

    soft_label: bool
    ignore_index: int | None


class MonaiDice(MonaiOverlap, total=False):
    """Arguments of MONAI's `DiceLoss`, its `jaccard` apart."""

    squared_pred: bool
    weight: MonaiWeight


class MonaiCompound(MonaiPixels, total=False):
    """Arguments of the Dice part of MONAI's `DiceCELoss` and `DiceFocalLoss`."""

    squared_pred: bool
    jaccard: bool
    weight: MonaiWeight
    ignore_index: int | None


class MonaiFocal(TypedDict, total=False):
    """Arguments of MONAI's `FocalLoss`, its `gamma` apart."""

    include_background: bool
    to_onehot_y: bool
    alpha: float | Sequence[float] | None
    weight: MonaiWeight
    reduction: str
    use_softmax: bool
    ignore_index: int | None


class SmpFocal(TypedDict, total=False):
    """Arguments of smp's `FocalLoss` that are translated."""

    from_logits: bool
    eps: float
    reduction: str | None
    normalized: bool
    reduced_threshold: float | None
    class_weights: Sequence[float] | None


class SmpOverlap(TypedDict, total=False):
    """Arguments that all overlap losses of smp have, and the number of classes, which `classes` needs here."""

    classes: Sequence[int] | None
    from_logits: bool
    smooth: float
    ignore_index: int | None
    eps: float
    class_weights: Sequence[float] | None
    num_classes: int | None


def monai_overlap(
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    squared_pred: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: MonaiWeight = None,
    soft_label: bool = False,
    ignore_index: int | None = None,
) -> OverlapSettings:
    """Settings of `OverlapLoss` that equal MONAI's arguments.

    `to_onehot_y` has no counterpart: ids are never made one-hot.

    Raises:
        ValueError: `other_act`; a `weight` that would scale the loss, with the weight and the factor that do the same.

    >>> settings = monai_overlap(softmax=True, to_onehot_y=True, include_background=False)
    >>> settings["activation"], settings["smooth"], settings["pool"], settings["exclude_classes"]
    ('softmax', (1e-05, 1e-05), 'image', (0,))
    """
    return {
        "activation": _monai_activation(sigmoid, softmax, other_act),
        "smooth": (smooth_nr, smooth_dr),
        "pool": "batch" if batch else "image",
        "squared": squared_pred,
        # With squares MONAI's |p - t|^2 gives back the product, for soft labels too.
        "overlap": "minimum" if soft_label and not squared_pred else "product",
        "exclude_classes": () if include_background else (0,),
        "class_weights": _monai_weights(weight, include_background, reduction),
        "ignore_index": ignore_index,
        "reduction": reduction,
    }


def monai_generalized(w_type: str, **arguments: Unpack[MonaiOverlap]) -> tuple[ClassWeighting, OverlapSettings]:
    """The weighting and the settings that equal MONAI's `GeneralizedDiceLoss`.

    Raises:
        ValueError: see `GeneralizedDiceLoss.like_monai`.
    """
    names: dict[str, ClassWeighting] = {"square": "inverse_square", "simple": "inverse", "uniform": "uniform"}
    weighting = names[check_choice("w_type", w_type, tuple(names))]
    settings = monai_overlap(**arguments)
    if weighting != "uniform" and settings["smooth"] != (0, 0):
        raise ValueError(
            f"smooth_nr and smooth_dr must be 0 with w_type={w_type!r}, got {settings['smooth']}: MONAI adds them to "
            "sums that it has divided by the (squared) size of a class, so that 1e-5 acts as 10 pixels on a class of "
            "1000 and as 100000 on one of 100000. Set them to 0, or set GeneralizedDiceLoss(smooth=...), in pixels of "
            "the rarest class"
        )
    if settings["reduction"] == "sum":
        raise ValueError(
            'reduction must be "mean" or "none": "sum" adds the one ratio of an image once for each class here, and '
            "once in MONAI"
        )
    return weighting, settings


def monai_compound(pixel_term: str, *, jaccard: bool = False, **arguments: Any) -> OverlapSettings:
    """What the compounds of MONAI share: the settings of the Dice term.

    Raises:
        ValueError: no activation, a Jaccard term, or another reduction than the mean.
    """
    if jaccard:
        raise ValueError(
            "jaccard must be False; give CompoundLoss the terms JaccardLoss.like_monai(...) and "
            f"{pixel_term}(...) instead"
        )
    if arguments.get("other_act") is None and not (arguments.get("sigmoid") or arguments.get("softmax")):
        raise ValueError(
            "sigmoid=True or softmax=True must be given: without them MONAI takes the same numbers as probabilities in "
            "the Dice term and as logits in the other"
        )
    if arguments.get("reduction", "mean") != "mean":
        raise ValueError(f'reduction must be "mean": two terms add up as means, got {arguments["reduction"]!r}')
    return monai_overlap(**arguments)


def monai_dice_ce(*, label_smoothing: float = 0.0, weight: MonaiWeight = None, **arguments: Any) -> OverlapSettings:
    """Settings of `DiceCELoss` that equal MONAI's.

    Raises:
        ValueError: see `DiceCELoss.like_monai`.
    """
    settings = monai_compound("CrossEntropyLoss", **arguments)
    if arguments.get("sigmoid") and label_smoothing:
        raise ValueError("label_smoothing must be 0 with sigmoid=True: MONAI leaves it out of the binary cross-entropy")
    if weight is None:
        return settings
    if arguments.get("sigmoid"):
        raise ValueError(
            "weight must be None with sigmoid=True: in MONAI it then weighs the foreground's pixels in the "
            "cross-entropy, not classes; use DiceFocalLoss(gamma=0, alpha=...) to set foreground against background"
        )
    if not arguments.get("to_onehot_y"):
        raise ValueError(
            "weight needs to_onehot_y=True: of one-hot targets MONAI's cross-entropy is not divided by the weights, "
            "of ids it is"
        )
    weights = torch.as_tensor(weight, dtype=torch.float64).flatten().tolist()
    counted = weights if arguments.get("include_background", True) else weights[1:]
    _monai_weights(counted, True, "mean")
    return {**settings, "class_weights": weights}


def monai_dice_focal(
    *, include_background: bool = True, weight: MonaiWeight = None, **arguments: Any
) -> OverlapSettings:
    """Settings of `DiceFocalLoss` that equal MONAI's.

    Raises:
        ValueError: see `DiceFocalLoss.like_monai`.
    """
    if arguments.get("softmax"):
        raise ValueError(
            "softmax must be False: MONAI's focal term is a sigmoid for each class even then; "
            'use DiceFocalLoss(activation="softmax"), whose two terms agree'
        )
    settings = monai_compound("FocalLoss", include_background=include_background, weight=weight, **arguments)
    _background_needs_weights(include_background, settings["class_weights"])
    return settings


def monai_focal(
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    alpha: float | Sequence[float] | None = None,
    weight: MonaiWeight = None,
    reduction: str = "mean",
    use_softmax: bool = False,
    ignore_index: int | None = None,
) -> dict[str, Any]:
    """Settings of `FocalLoss` that equal MONAI's, but for gamma.

    Raises:
        ValueError: see `FocalLoss.like_monai`.
    """
    if use_softmax:
        raise ValueError(
            "use_softmax must be False: MONAI divides by the pixels of all planes, ours by the pixels; "
            'CompoundLoss([FocalLoss(activation="softmax")], [1 / classes]) is its loss'
        )
    if alpha is not None and not isinstance(alpha, (int, float)):
        raise ValueError(
            "alpha must be one number: in MONAI one for each class weighs the foreground alone; give class_weights"
        )
    if reduction != "mean":
        raise ValueError(f'reduction must be "mean", got {reduction!r}')
    weights = _monai_weights(weight, include_background, "mean")
    _background_needs_weights(include_background, weights)
    return {"activation": "sigmoid", "alpha": alpha, "class_weights": weights, "ignore_index": ignore_index}


def smp_overlap(
    mode: str,
    *,
    classes: Sequence[int] | None = None,
    from_logits: bool = True,
    smooth: float = 0.0,
    ignore_index: int | None = None,
    eps: float = 1e-7,
    class_weights: Sequence[float] | None = None,
    num_classes: int | None = None,
    smooth_pixels: float = 1.0,
) -> OverlapSettings:
    """Settings of `OverlapLoss` that equal smp's arguments.

    Args:
        mode: "binary", "multiclass" or "multilabel".
        classes: the classes that count; the others are `exclude_classes`.
        from_logits: False: the input is probabilities.
        smooth: in smp's unit.
        ignore_index: pixels whose target holds this value count as nothing.
        eps: where smp clamps; nothing is clamped here.
        class_weights: one for each class.
        num_classes: how many there are: `classes` needs it, unless `class_weights` tell.
        smooth_pixels: smp's unit of `smooth`, in pixels.

    Raises:
        ValueError: see `DiceLoss.like_smp`.

    >>> smp_overlap("multiclass", classes=[1, 2], num_classes=3)["exclude_classes"]
    (0,)
    """
    check_choice("mode", mode, SmpMode)
    check_number("eps", eps, 0, 1e-3)
    if mode == "binary" and (classes is not None or class_weights is not None):
        raise ValueError('mode="binary" has one class: leave out classes and class_weights')
    excluded: tuple[int, ...] = ()
    if classes is not None:
        wanted = check_class_indices("classes", classes)
        total = num_classes if class_weights is None else len(class_weights)
        if total is None:
            raise ValueError("classes need num_classes: losses here are told which classes to leave out")
        if not wanted or max(wanted) >= total:
            raise ValueError(f"classes must name classes from 0 to {total - 1}, got {list(wanted)}")
        excluded = tuple(index for index in range(total) if index not in wanted)
    return {
        "activation": _smp_activation(mode, from_logits),
        "smooth": smooth * smooth_pixels,
        "pool": "batch",
        "overlap": "minimum",
        "exclude_classes": excluded,
        "class_weights": class_weights,
        "ignore_index": ignore_index,
        "absent": "skip",
    }


def smp_focal(
    mode: str,
    *,
    from_logits: bool = True,
    eps: float = 1e-7,
    reduction: str | None = "mean",
    normalized: bool = False,
    reduced_threshold: float | None = None,
    class_weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Settings of `FocalLoss` that equal smp's, but for gamma, alpha and the ignored label.

    Raises:
        ValueError: see `FocalLoss.like_smp`.
    """
    check_choice("mode", mode, SmpMode)
    check_number("eps", eps, 0, 1e-3)
    if normalized or reduced_threshold is not None:
        raise ValueError("normalized must be False and reduced_threshold None: these are other losses")
    if reduction != "mean":
        raise ValueError(f'reduction must be "mean", got {reduction!r}')
    if mode == "binary" and class_weights is not None:
        raise ValueError('mode="binary" has one class: leave out class_weights')
    if mode == "multiclass" and not from_logits:
        raise ValueError(
            'from_logits must be True with mode="multiclass": smp takes a sigmoid of the logarithm of probabilities, '
            "p / (1 + p); use FocalLoss(activation=None)"
        )
    # In smp a class of a multiclass task is a binary task of its own: one against the rest.
    return {"activation": "sigmoid" if from_logits else None, "class_weights": class_weights}


def nnunet_dice(
    *,
    batch_dice: bool = False,
    do_bg: bool | None = None,
    smooth: float = 1e-5,
    regions: bool = False,
    ignore_label: int | None = None,
) -> OverlapSettings:
    """Settings of `OverlapLoss` that equal nnU-Net's Dice loss, by default as its trainer builds it.

    >>> nnunet_dice()["exclude_classes"], nnunet_dice(regions=True)["exclude_classes"]
    ((0,), ())
    """
    return {
        "activation": "sigmoid" if regions else "softmax",
        "smooth": smooth,
        "pool": "batch" if batch_dice else "image",
        "exclude_classes": () if (regions if do_bg is None else do_bg) else (0,),
        "ignore_index": ignore_label,
    }


def _monai_activation(sigmoid: bool, softmax: bool, other_act: object) -> Activation:
    if other_act is not None:
        raise ValueError(
            "other_act must be None; apply it to the net's output and leave out sigmoid and softmax, if it gives "
            "probabilities in [0, 1]"
        )
    if sigmoid and softmax:
        raise ValueError("sigmoid and softmax must not both be True")
    return "sigmoid" if sigmoid else "softmax" if softmax else None


def _monai_weights(weight: MonaiWeight, include_background: bool, reduction: str) -> list[float] | None:
    """MONAI's weights as `class_weights`, with one for a background that is left out."""
    if weight is None:
        return None
    given = torch.as_tensor(weight, dtype=torch.float64)
    if given.ndim == 0:
        if given != 1:
            raise ValueError(
                f"weight must be one for each class, got {float(given):g}: multiply the loss by it instead"
            )
        return None
    if reduction == "none":
        raise ValueError('weight must be None with reduction="none": multiply the table by it instead')
    mean = float(given.mean())
    # A sum over classes is weighted without being divided, here too.
    if reduction == "mean" and abs(mean - 1) > _ROUNDING:
        remedy = "" if mean == 0 else f": give [{', '.join(f'{w:g}' for w in given / mean)}] and multiply by {mean:g}"
        raise ValueError(
            f"weight must have a mean of 1 over the classes that count, got {mean:g}; in MONAI it scales the loss "
            f"by its mean, here only the ratios matter{remedy}"
        )
    return [*([] if include_background else [0.0]), *given.tolist()]


def _background_needs_weights(include_background: bool, weights: object) -> None:
    if not include_background and weights is None:
        raise ValueError(
            "include_background=False needs weight=[1.0, ...], a 1 for each other class: the focal term leaves a class "
            "out by a weight of 0, and must know how many there are"
        )


def _smp_activation(mode: str, from_logits: bool) -> Activation:
    if not from_logits:
        return None
    return "softmax" if mode == "multiclass" else "sigmoid"
