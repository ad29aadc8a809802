"""Losses that depend on the distance of pixels to the boundary of the target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lightning_dice.argument_checks import check_class_indices, check_flag, check_number, included_classes
from lightning_dice.functional import DeferredReduction, weighted_mean
from lightning_dice.functional.target_maps import BoundaryWeight, SignedDistance
from lightning_dice.kernels import Activation, Pixels, checked_pixels, total, wide_dtype
from lightning_dice.kernels.checks import check_shapes
from lightning_dice.kernels.overlap_sums import full_precision
from lightning_dice.kernels.sums import valid_pixels
from lightning_dice.losses.base import SegmentationLoss, TargetMap
from lightning_dice.losses.each_image import apply_to_each_image

if TYPE_CHECKING:
    from typing import TypedDict

    from typing_extensions import Unpack

    class DistanceSettings(TypedDict, total=False):
        """Settings of `DistanceLoss`, to type the signatures of its subclasses."""

        activation: Activation
        classes: int | None
        spacing: Iterable[float] | None
        exclude_classes: Iterable[int]
        ignore_index: int | None
        across_ranks: bool


class DistanceLoss(SegmentationLoss):
    """Base of the losses that average, over pixels, a value that depends on the distance to the target's boundary.

    The mean is over the valid pixels of each class and image, then over classes and images, which count the same.
    Distances are `lightning_dice.functional.target_maps.SignedDistance`, computed on the CPU unless the batch brings
    them. For distances, soft labels are cut at 1/2, and ignored pixels are outside every class.

    Args:
        activation: `"sigmoid"`, `"softmax"`, or `None` where the input is probabilities.
        classes: number of channels of the logits; needed with class ids.
        spacing: size of a pixel along each axis, which sets the unit of distances; 1 by default.
        exclude_classes: indices of classes that do not count, such as `[0]` for the background.
        ignore_index: label of the pixels to ignore.
        across_ranks: in distributed training, compute the loss of all ranks together; see `OverlapLoss`.

    Raises:
        ValueError: an invalid setting; in a call, a wrong number of classes, or a shape that would broadcast.

    >>> class MeanDistance(DistanceLoss):
    ...     def per_pixel(self, pixels, distance, logits, target):
    ...         return distance.abs()
    >>> MeanDistance()(torch.zeros(1, 1, 1, 4), torch.tensor([[[[0, 0, 1, 1]]]]))
    tensor(1.5000)
    """

    def __init__(
        self,
        *,
        activation: Activation = "sigmoid",
        classes: int | None = None,
        spacing: Iterable[float] | None = None,
        exclude_classes: Iterable[int] = (),
        ignore_index: int | None = None,
        across_ranks: bool = True,
    ) -> None:
        super().__init__(activation=activation, ignore_index=ignore_index)
        self.exclude_classes = check_class_indices("exclude_classes", exclude_classes)
        self.across_ranks = check_flag("across_ranks", across_ranks)
        self._distance = SignedDistance(
            activation=self.activation,
            classes=classes,
            ignore_index=self.ignore_index,
            exclude_classes=self.exclude_classes,
            spacing=spacing,  # type: ignore[arg-type]  # made a tuple there
        )
        self.classes, self.spacing = classes, self._distance.spacing
        self.maps = {"signed_distance": self._distance}

    def per_pixel(self, pixels: Pixels, distance: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """Return the values to average, `(images, classes, pixels)`; `distance` has the same shape."""
        raise NotImplementedError

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

        Of `maps` it uses `"signed_distance"`, of the shape of logits.
        """
        with full_precision(logits):
            pixels = checked_pixels(
                logits,
                target,
                activation=self.activation,
                ignore_index=self.ignore_index,
                weight=weight,
                annotated=annotated,
            )
            included = included_classes(logits.shape[1], self.exclude_classes)
            distance = self.get_checked_map("signed_distance", logits, target, maps)
            values = self.per_pixel(pixels, distance.flatten(2).to(pixels.logits.dtype), logits, target)
            dtype = torch.promote_types(logits.dtype, torch.float32)
            mean = self._mean(values, pixels, included).apply(lambda loss: loss.to(dtype))
            return mean if self.across_ranks else mean.finish_locally()

    def _mean(self, values: Tensor, pixels: Pixels, included: list[int]) -> DeferredReduction:
        w = pixels.weight
        above = total(values if w is None else values * w)
        below = values.new_full((1, 1), values.shape[2], dtype=wide_dtype(values)) if w is None else total(w)
        kept = (below > 0).expand_as(above)
        if pixels.annotated is not None:
            kept = kept & pixels.annotated
        mean = above / below.where(below > 0, 1.0)
        return weighted_mean(mean[:, included], kept[:, included])


class BoundaryLoss(DistanceLoss):
    r"""Boundary loss: the mean of probability times signed distance to the target's boundary.

    .. math:: L = \frac{1}{N} \sum_i p_i\,\phi_i

    (Kervadec et al., MIDL 2019.) :math:`\phi` is negative inside the class and positive outside, so that a pixel on the
    wrong side costs more the farther it is from the boundary. The loss is least, and negative, for the target itself.
    On its own it hardly moves an empty prediction: use it as a term of a `CompoundLoss` with a small weight. In the
    paper that weight grows from 0.01 while that of the other term falls, as with `callbacks=loss_schedule`. Distances
    are in pixels, so the loss grows with the size of the image.

    Unlike in the published code, pixels on the inner side of the boundary have the distance -1, not 0, and so a
    gradient. As in it, a class that the target does not have, or that is everywhere, has none.

    All settings are those of `DistanceLoss`.

    Raises:
        ValueError: as `DistanceLoss`.

    >>> mask = torch.tensor([[[[0, 0, 1, 1]]]])
    >>> near, far = torch.tensor([[[[0.0, 1.0, 1.0, 1.0]]]]), torch.tensor([[[[1.0, 0.0, 1.0, 1.0]]]])
    >>> loss = BoundaryLoss(activation=None)
    >>> loss(mask.float(), mask), loss(near, mask), loss(far, mask)
    (tensor(-0.7500), tensor(-0.5000), tensor(-0.2500))
    """

    def per_pixel(self, pixels: Pixels, distance: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """Return probability times distance."""
        return pixels.probs() * distance


class HausdorffLoss(DistanceLoss):
    r"""Hausdorff distance loss: the squared error, weighted by the distances to both boundaries.

    .. math:: L = \frac{1}{N} \sum_i (p_i - t_i)^2 \left(d_t(i)^\alpha + d_p(i)^\alpha\right)

    The distance transform form of Karimi and Salcudean (IEEE TMI 2020, "Reducing the Hausdorff Distance").
    :math:`d_t` is the distance to the boundary of the target, :math:`d_p` to that of the prediction: the pixels with
    p > 1/2, or with exclusive classes the most probable class. :math:`d_p` has no gradient and changes in every step,
    so it is computed on the CPU in each call, which is slow when training on GPUs. Without a boundary (nothing, or
    everything) the distance is 0.

    Unlike in the paper and in MONAI's `HausdorffDTLoss`, distances are fractions of the image's diagonal, which keeps
    the loss in [0, 2]: squared distances in pixels make it grow with the image, to hundreds, and push an undecided
    network into predicting nothing. MONAI cuts the prediction at 1/2 for exclusive classes too.

    Args:
        alpha: exponent, > 0.
        relative: whether distances are fractions of the image's diagonal; False: in pixels, or the unit of `spacing`,
            as published.
        **settings: settings of `DistanceLoss`.

    Raises:
        ValueError: as `DistanceLoss`, or an invalid alpha.

    >>> mask = torch.tensor([[[[0, 0, 0, 1, 1]]]])
    >>> loss = HausdorffLoss(activation=None, relative=False)
    >>> near, far = torch.tensor([[[[0.0, 0.0, 1.0, 1.0, 1.0]]]]), torch.tensor([[[[1.0, 0.0, 0.0, 1.0, 1.0]]]])
    >>> loss(near, mask), loss(far, mask)
    (tensor(0.4000), tensor(2.))
    """

    def __init__(self, *, alpha: float = 2.0, relative: bool = True, **settings: Unpack[DistanceSettings]) -> None:
        super().__init__(**settings)
        self.alpha = check_number("alpha", alpha, open_ends=True)
        self.relative = check_flag("relative", relative)

    def per_pixel(self, pixels: Pixels, distance: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """Return the weighted squared error."""
        p = pixels.probs()
        predicted = self._predicted_distance(pixels, logits, target).to(p.dtype)
        unit = 1.0
        if self.relative:
            space = logits.shape[2:]
            steps = self.spacing or [1.0] * len(space)
            unit = math.hypot(*(size * step for size, step in zip(space, steps, strict=True)))
        distances = (distance.abs() / unit) ** self.alpha + (predicted.abs() / unit) ** self.alpha
        return (p - pixels.target_planes()) ** 2 * distances

    @torch.no_grad()
    def _predicted_distance(self, pixels: Pixels, logits: Tensor, target: Tensor) -> Tensor:
        """Return the distances to the boundaries of the prediction, `(images, classes, pixels)`."""
        z = pixels.logits
        if pixels.activation == "softmax" or not pixels.planes:
            classes = torch.arange(z.shape[1], device=z.device).view(-1, 1)
            planes = z.argmax(1, keepdim=True) == classes
        else:
            planes = pixels.probs() > 0.5
        valid = valid_pixels(target, self.ignore_index)
        if valid is not None:
            valid = valid.reshape(z.shape if pixels.planes else (z.shape[0], 1, z.shape[2]))
            planes = planes & (valid.all(1, keepdim=True) if pixels.activation == "softmax" else valid)
        return apply_to_each_image(self._distance.of_masks, planes.reshape(logits.shape)).flatten(2)


class BoundaryWeightedLoss(SegmentationLoss):
    r"""Wrapper that gives pixels near the boundaries of the target more weight in any loss of this library.

    .. math:: w(x) = 1 + a\,\exp\left(-\frac{d(x)^2}{2\sigma^2}\right)

    with d the distance to the nearest pixel beside another label; for a comparison with the weight of U-Net see
    `lightning_dice.functional.target_maps.BoundaryWeight`. With class ids a pixel has one weight, for the boundaries of
    all classes; with planes it has one in each plane, for the boundaries of that class.

    Args:
        loss: the loss, with all other settings. It gets this weight, times the `weight` that is passed in.
        width: :math:`\sigma`, in pixels (or the unit of `spacing`), > 0.
        strength: a, >= 0.
        classes: number of channels of the logits; needed with class ids if `activation` is `None`.
        spacing: size of a pixel along each axis; 1 by default.

    Raises:
        ValueError: a loss that is not one of this library, or is already weighted by boundaries; an invalid setting; in
            a call, whatever the loss refuses.

    >>> from lightning_dice.losses import CrossEntropyLoss
    >>> mask = torch.tensor([[[[0, 0, 0, 0, 1, 1, 1, 1]]]])
    >>> near = torch.tensor([[[[-4.0, -4.0, -4.0, 0.0, 4.0, 4.0, 4.0, 4.0]]]])
    >>> far = torch.tensor([[[[0.0, -4.0, -4.0, -4.0, 4.0, 4.0, 4.0, 4.0]]]])
    >>> loss = BoundaryWeightedLoss(CrossEntropyLoss(), width=1.0, strength=4.0)
    >>> loss(near, mask), loss(far, mask)
    (tensor(0.1714), tensor(0.0502))
    """

    def __init__(
        self,
        loss: SegmentationLoss,
        *,
        width: float = 5.0,
        strength: float = 10.0,
        classes: int | None = None,
        spacing: Iterable[float] | None = None,
    ) -> None:
        if not isinstance(loss, SegmentationLoss):
            raise ValueError(f"loss must be a SegmentationLoss, such as DiceLoss, got {type(loss).__name__}")
        super().__init__(activation=loss.activation, ignore_index=loss.ignore_index)
        self.loss = loss
        self._weight = BoundaryWeight(
            activation=self.activation,
            classes=classes,
            ignore_index=self.ignore_index,
            width=check_number("width", width, open_ends=True),
            strength=check_number("strength", strength),
            spacing=spacing,  # type: ignore[arg-type]  # made a tuple there
        )
        self.classes, self.spacing = classes, self._weight.spacing
        if "boundary_weight" in loss.maps:
            raise ValueError("loss must not be weighted by boundaries already")

    @property
    def maps(self) -> Mapping[str, TargetMap]:  # type: ignore[override]
        """The boundary weight, and the maps of the loss."""
        return {"boundary_weight": self._weight, **self.loss.maps}

    @property
    def values(self) -> Mapping[str, Tensor]:
        """The values of the terms of a `CompoundLoss` in the last call."""
        return cast("Mapping[str, Tensor]", getattr(self.loss, "values", {}))

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

        Of `maps` it uses `"boundary_weight"`, of the shape of target.
        """
        # Checked first, as a map cannot be computed from wrong shapes.
        check_shapes(logits, target, activation=self.activation, weight=weight, annotated=annotated)
        own = self.get_checked_map("boundary_weight", logits, target, maps, by_pixel=True)
        if weight is not None:
            own, weight = (one if one.ndim == logits.ndim else one.unsqueeze(1) for one in (own, weight))
            own = own * weight
            own = own.squeeze(1) if own.shape[1] == 1 else own
        return self.loss.deferred_call(logits, target, own, annotated=annotated, maps=maps)

    def repr_settings(self) -> dict[str, object]:
        """Return the settings that `print(loss)` shows."""
        # They are kept in the map, which is made once: changing them during training has no effect.
        shape = {"width": self._weight.width, "strength": self._weight.strength}
        return {**shape, "classes": self.classes, "spacing": self.spacing}
