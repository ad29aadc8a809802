"""Losses that keep thin structures connected, by the skeletons of prediction and target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.argument_checks import (
    check_choice,
    check_class_indices,
    check_class_weights,
    check_count,
    check_flag,
    check_number,
    check_smooth,
    included_classes,
)
from lightning_dice.extras import require
from lightning_dice.functional import AbsentPolicy, DeferredReduction, Pool, pool_and_reduce, weighted_mean
from lightning_dice.functional.target_maps import TubedSkeleton
from lightning_dice.kernels import Activation, OverlapSums, Pixels, checked_pixels, total, wide_dtype
from lightning_dice.kernels.checks import check_shapes
from lightning_dice.kernels.overlap_sums import full_precision
from lightning_dice.kernels.sums import at_least, valid_pixels
from lightning_dice.losses.base import SegmentationLoss, class_weights_of
from lightning_dice.losses.tversky import TverskyLoss


def soft_skeleton(probs: Tensor, iterations: int, valid: Tensor | None = None, *, core: bool = False) -> Tensor:
    r"""Compute a soft skeleton by minima and maxima over neighbours (Shit et al., CVPR 2021, Algorithm 1).

    The skeleton collects what an opening removes from the image and from each of its erosions:

    .. math:: S_0 = [I_0 - \mathrm{open}(I_0)]_+, \qquad
        S_k = S_{k-1} + (1 - S_{k-1})\,[I_k - \mathrm{open}(I_k)]_+, \qquad I_k = \mathrm{erode}(I_{k-1})

    The minimum is over pixels that share a side, the maximum over pixels that touch, as in the published code.

    Args:
        probs: `(images, classes, *space)`, two or three space axes, in [0, 1].
        iterations: number of erosions: the radius, in pixels, of the widest structure that gets a skeleton.
        valid: bool, of a shape that broadcasts to probs. Invalid pixels are not neighbours of any pixel, as if
            they were outside the image.
        core: whether the pixels left after one more erosion belong to the skeleton. Without them, structures that are
            too wide for the iterations have no skeleton.

    Returns:
        The shape of probs, in [0, 1]; 0 where invalid.

    >>> line = torch.tensor([[[[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]]])
    >>> soft_skeleton(line.float(), iterations=1)
    tensor([[[[0., 0., 0., 0., 0.],
              [0., 0., 0., 0., 0.],
              [1., 1., 1., 1., 1.],
              [0., 0., 0., 0., 0.],
              [0., 0., 0., 0., 0.]]]])
    """
    if not probs.numel():
        return probs  # torch refuses to take a maximum of nothing.
    outside = None if valid is None else ~valid
    remains = probs
    skeleton = _removed_by_opening(remains, outside)
    for _ in range(iterations):
        remains = _erode(remains, outside)
        skeleton = skeleton + (1 - skeleton) * _removed_by_opening(remains, outside)
    if not core:
        return skeleton
    remains = _erode(remains, outside)
    remains = remains if outside is None else remains.masked_fill(outside, 0)
    return skeleton + (1 - skeleton) * remains


class ClDiceLoss(SegmentationLoss):
    r"""Centerline Dice loss: 1 minus clDice, in which a cut vessel costs more than a thin one.

    .. math:: L = 1 - \frac{2\,T_p\,T_s}{T_p + T_s}, \qquad T_p = \frac{\sum S(p)\,t + s}{\sum S(p) + s}, \qquad
        T_s = \frac{\sum S(t)\,p + s}{\sum S(t) + s}

    (Shit et al., CVPR 2021.) S is `soft_skeleton`: :math:`T_p` is the fraction of the prediction's skeleton inside the
    target, :math:`T_s` that of the target's skeleton inside the prediction. The paper adds the Dice loss, as skeletons
    ignore the width: use a `CompoundLoss` of both. Ignored pixels count as outside of the image.

    Each class has its own ratios, where the published code has one for all channels of the batch, and MONAI's
    `SoftclDiceLoss` one for all channels of an image. Unlike in MONAI, nothing is added to :math:`T_p + T_s`.

    The `core` is in neither of them. Without it, a prediction too wide for the iterations, such as the whole image, has
    no soft skeleton, hence a precision of 1, and as its sensitivity is 1 too, a loss of 0: training from scratch on
    thin structures ends there. With it, the pixels left after the erosions belong to the skeleton.

    Args:
        activation: `"sigmoid"`, `"softmax"`, or `None` where the input is probabilities.
        iterations: number of erosions: the radius, in pixels, of the widest structure.
        core: whether the inside of wider structures belongs to the skeleton; False is the published form.
        smooth: s above, in pixels of skeleton; a pair sets numerator and denominator separately. With 0, a class that
            neither side has is left out; a sigmoid or softmax has some of every class, see `AbsentPolicy`.
        pool: which images share one ratio: `"image"`: each has its own; `"batch"`: all of the batch, on all ranks.
        exclude_classes: indices of classes that do not count, such as `[0]` for the background.
        class_weights: one for each class, excluded ones too; only their ratios matter.
        ignore_index: label of the pixels to ignore.
        absent: how to count a class that the target does not have: `"smooth"`: by the formula; `"skip"`: not at all.
        across_ranks: in distributed training, compute the loss of all ranks together; see `OverlapLoss`.

    Raises:
        ValueError: an invalid setting; in a call, a shape that would broadcast, or not two or three space axes.

    >>> mask = torch.zeros(1, 1, 5, 7)
    >>> mask[..., 1:4, :] = 1
    >>> cut, thin = mask.clone(), mask.clone()
    >>> cut[..., 3] = 0
    >>> thin[..., 1, :] = thin[..., 3, :] = 0
    >>> loss = ClDiceLoss(activation=None, smooth=1e-5)
    >>> loss(mask, mask), loss(thin, mask), loss(cut, mask)
    (tensor(0.), tensor(0.), tensor(0.0769))
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        activation: Activation = "sigmoid",
        iterations: int = 3,
        core: bool = True,
        smooth: float | Sequence[float] = 1.0,
        pool: Literal["image", "batch"] = "batch",
        exclude_classes: Iterable[int] = (),
        class_weights: Iterable[float] | Tensor | None = None,
        ignore_index: int | None = None,
        absent: Literal["smooth", "skip"] = "smooth",
        across_ranks: bool = True,
    ) -> None:
        super().__init__(activation=activation, ignore_index=ignore_index)
        self.iterations = check_count("iterations", iterations, least=0)
        self.core = check_flag("core", core)
        self.smooth = check_smooth(smooth)
        self.pool: Literal["image", "batch"] = check_choice("pool", pool, ("image", "batch"))
        self.exclude_classes = check_class_indices("exclude_classes", exclude_classes)
        self.absent = AbsentPolicy(check_choice("absent", absent, ("smooth", "skip")))
        self.across_ranks = check_flag("across_ranks", across_ranks)
        self.register_setting("class_weights", check_class_weights(class_weights))

    def deferred(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        maps: Mapping[str, Tensor] | None = None,
    ) -> DeferredReduction:
        """Compute the loss up to the sums over the ranks; see `SegmentationLoss.forward`. It uses no maps."""
        with full_precision(logits):
            pixels = checked_pixels(
                logits,
                target,
                activation=self.activation,
                ignore_index=self.ignore_index,
                weight=weight,
                annotated=annotated,
            )
            if logits.ndim not in (4, 5):
                raise ValueError(f"clDice needs images of 2 or 3 space axes, got logits of {tuple(logits.shape)}")
            weights = None
            if self.class_weights is not None:
                weights = class_weights_of(self.class_weights, logits.shape[1], pixels.logits)
            included = included_classes(logits.shape[1], self.exclude_classes)
            weights = None if weights is None else weights[included]
            sums = self._sums(pixels, included, logits, target)

        def formula(precision: OverlapSums, sensitivity: OverlapSums) -> DeferredReduction:
            return self._mean(precision, sensitivity, weights)

        dtype = torch.promote_types(logits.dtype, torch.float32)
        mean = pool_and_reduce(sums, self.pool, formula, across_ranks=self.across_ranks)
        return mean.apply(lambda loss: loss.to(dtype))

    def _mean(self, precision: OverlapSums, sensitivity: OverlapSums, weights: Tensor | None) -> DeferredReduction:
        tprec = _ratio(precision.overlap, precision.predicted, self.smooth)
        tsens = _ratio(sensitivity.overlap, sensitivity.actual, self.smooth)
        both = tprec + tsens
        # The harmonic mean of two zeros is 0; NaN stays NaN.
        loss = 1 - 2 * tprec * tsens / both.where(both != 0, 1.0)
        kept = self.absent.kept(loss, precision)
        if self.smooth[1] == 0:
            kept = kept & ((precision.predicted != 0) | (sensitivity.actual != 0))
        return weighted_mean(loss, kept, weights)

    def _sums(self, pixels: Pixels, included: list[int], logits: Tensor, target: Tensor) -> list[OverlapSums]:
        """Return the sums of the prediction's skeleton with the target, and of the prediction with the target's."""
        shape = (logits.shape[0], len(included), *logits.shape[2:])
        p, t = pixels.probs()[:, included], pixels.target_planes()[:, included]
        w = pixels.weight
        w = w[:, included] if w is not None and w.shape[1] > 1 else w
        valid = valid_pixels(target, self.ignore_index)
        if valid is not None:
            valid = valid.unsqueeze(1) if not pixels.planes else valid
            valid = valid.all(1, keepdim=True) if pixels.activation == "softmax" else valid
            valid = valid[:, included] if valid.shape[1] > 1 else valid
        p_skeleton = soft_skeleton(p.reshape(shape), self.iterations, valid, core=self.core).flatten(2)
        with torch.no_grad():
            t_skeleton = soft_skeleton(t.reshape(shape), self.iterations, valid, core=self.core).flatten(2)
        count = p.new_full((1, 1), p.shape[2], dtype=wide_dtype(p)) if w is None else total(w)
        count = count.expand(shape[:2])

        def sums(overlap: Tensor, predicted: Tensor, actual: Tensor) -> OverlapSums:
            overlap, predicted, actual = (total(one if w is None else one * w) for one in (overlap, predicted, actual))
            predicted = predicted if pixels.activation is None else at_least(predicted, count)
            result = OverlapSums(overlap, predicted, actual, count)
            if pixels.annotated is None:
                return result
            kept = pixels.annotated[:, included]
            return result.map(lambda field: field.where(kept, torch.zeros((), dtype=field.dtype, device=field.device)))

        return [sums(p_skeleton * t, p_skeleton, t), sums(p * t_skeleton, p, t_skeleton)]


class SkeletonRecallLoss(SegmentationLoss):
    r"""Skeleton recall loss: how much of the target's widened skeleton is missed (Kirchhoff et al., ECCV 2024).

    .. math:: L = 1 - \frac{\sum_i k_i\,p_i\,t_i + s}{\sum_i k_i\,t_i + s}

    where k is 1 inside the class within `radius` of its skeleton, else 0: see
    `lightning_dice.functional.target_maps.TubedSkeleton`. Let the batch bring it, as skeletons are computed on the CPU.
    The loss needs no more memory than cross-entropy, while clDice keeps a skeleton of the prediction with its gradient.
    On its own it asks for foreground everywhere: use it as a term of a `CompoundLoss`.

    Unlike in the published code, each class has its own skeleton, where that has one for all classes but the
    background; and classes without a skeleton in an image (or in the pooled batch) are left out of the mean, where that
    counts them as perfect.

    Args:
        activation: `"sigmoid"`, `"softmax"`, or `None` where the input is probabilities.
        radius: around the skeleton, in pixels, >= 0.
        classes: number of channels of the logits; needed with class ids.
        smooth: s above, in pixels; a pair sets numerator and denominator separately.
        pool: which pixels share one ratio: `"image"`, `"batch"` or `"all"`, see `OverlapLoss`.
        exclude_classes: indices of classes that do not count, such as `[0]` for the background.
        class_weights: one for each class, excluded ones too; only their ratios matter.
        ignore_index: label of the pixels to ignore.
        across_ranks: in distributed training, compute the loss of all ranks together; see `OverlapLoss`.

    Raises:
        ValueError: an invalid setting; in a call, a wrong number of classes, not two or three space axes, or a shape
            that would broadcast.

    >>> mask = torch.tensor([[[[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]]])
    >>> wide, cut = torch.ones(1, 1, 3, 5), mask.float()
    >>> cut[..., 2] = 0
    >>> loss = SkeletonRecallLoss(activation=None, smooth=0)
    >>> loss(wide, mask), loss(cut, mask)
    (tensor(0.), tensor(0.2000))
    """

    def __init__(
        self,
        *,
        activation: Activation = "sigmoid",
        radius: float = 2.0,
        classes: int | None = None,
        smooth: float | Sequence[float] = 1.0,
        pool: Pool = "batch",
        exclude_classes: Iterable[int] = (),
        class_weights: Iterable[float] | Tensor | None = None,
        ignore_index: int | None = None,
        across_ranks: bool = True,
    ) -> None:
        require("skimage", needed_by="SkeletonRecallLoss")
        super().__init__(activation=activation, ignore_index=ignore_index)
        # With these two weights the Tversky index is the recall.
        self.recall = TverskyLoss(
            alpha=0.0,
            beta=1.0,
            activation=activation,
            smooth=smooth,
            pool=pool,
            exclude_classes=exclude_classes,
            class_weights=class_weights,
            ignore_index=ignore_index,
            across_ranks=across_ranks,
        )
        self.radius = check_number("radius", radius)
        self.classes = classes
        self._skeleton = TubedSkeleton(
            activation=self.activation,
            classes=classes,
            ignore_index=self.ignore_index,
            exclude_classes=self.recall.exclude_classes,
            radius=self.radius,
        )
        self.maps = {"skeleton": self._skeleton}

    def deferred(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        maps: Mapping[str, Tensor] | None = None,
    ) -> DeferredReduction:
        """Compute the loss up to the sums over the ranks; see `SegmentationLoss.forward`.

        Of `maps` it uses `"skeleton"`, `(batch, classes, *space)`.
        """
        # Checked first, as a map cannot be computed from wrong shapes.
        check_shapes(logits, target, activation=self.activation, weight=weight, annotated=annotated)
        skeleton = self.get_checked_map("skeleton", logits, target, maps)
        if weight is not None:
            skeleton = skeleton * (weight if weight.ndim == logits.ndim else weight.unsqueeze(1))
        return self.recall.deferred(logits, target, skeleton, annotated=annotated)


def _ratio(above: Tensor, below: Tensor, smooth: tuple[float, float]) -> Tensor:
    """Return the smoothed ratio; 0/0 is 0."""
    below = below + smooth[1]
    return (above + smooth[0]) / below.where(below != 0, 1.0)


def _removed_by_opening(values: Tensor, outside: Tensor | None) -> Tensor:
    eroded = _erode(values, outside)
    opened = _maximum(eroded if outside is None else eroded.masked_fill(outside, -torch.inf), range(values.ndim - 2))
    removed = values - opened
    # Replace the infinities outside before anything is multiplied: 0 times infinity is NaN in the gradient.
    removed = removed if outside is None else removed.masked_fill(outside, 0)
    # The maximum reaches farther than the minimum, so that an opening may also add.
    return F.relu(removed)


def _erode(values: Tensor, outside: Tensor | None) -> Tensor:
    """Return the minimum over each pixel and those that share a side with it."""
    values = -values if outside is None else (-values).masked_fill(outside, -torch.inf)
    result = values
    for axis in range(values.ndim - 2):
        result = torch.maximum(result, _maximum(values, [axis]))
    return -result


def _maximum(values: Tensor, axes: Iterable[int]) -> Tensor:
    """Return the maximum over each pixel and its neighbours along these space axes."""
    space = values.ndim - 2
    size = [3 if axis in axes else 1 for axis in range(space)]
    pool = F.max_pool2d if space == 2 else F.max_pool3d
    return pool(values, size, 1, [one // 2 for one in size])
