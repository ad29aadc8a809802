"""Overlap losses in which all lesions count the same, whatever their size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_dice.argument_checks import check_choice, check_count, included_classes
from lightning_dice.functional import DeferredReduction
from lightning_dice.functional.components import RegionMap, Regions
from lightning_dice.kernels import checked_pixels
from lightning_dice.kernels.overlap_sums import full_precision
from lightning_dice.kernels.regions import region_sums
from lightning_dice.losses.base import SegmentationLoss, class_weights_of
from lightning_dice.losses.dice import GeneralizedDiceLoss
from lightning_dice.losses.overlap import OverlapLoss


class LesionWiseLoss(SegmentationLoss):
    r"""Overlap loss of each lesion instead of each image, averaged over all lesions.

    .. math:: L = \frac{1}{K} \sum_{k=1}^K \ell\left(\sum_{i \in R_k} p_i t_i,\ \sum_{i \in R_k} p_i,\
        \sum_{i \in R_k} t_i\right)

    A lesion is a connected component of a class in the target; its region R holds the pixels where predictions count
    for or against it. `"nearest"`: the pixels that are nearer to it than to any other component of the class, as in the
    CC-DiceCE loss (Bouteille et al., "Learning to Look Closer", 2025) after the metrics of Jaus et al., "Every
    Component Counts". `"blob"`: all pixels except those of other components, as in the blob loss (Kofler et al., IPMI
    2023), so that a false positive counts against every lesion.

    Unlike those losses, this one

    - averages over the lesions of all images and ranks, not over the lesions of each image and then over images;
    - gives each class lesions of its own;
    - takes an image without a lesion as one region, to which the `absent` policy of the loss applies; they leave it
      out;
    - leaves the loss of the whole image, which the blob loss adds to keep large lesions whole, to another term of a
      `CompoundLoss`.

    A `smooth` of one pixel halves the cost of missing a lesion of one pixel. Choose a small one: the pixels of the
    lesion keep the denominator above 0. Without a lesion nothing does, hence use `absent="penalize"`. Exclude the
    background of a softmax, whose parts would count as lesions. For cross-entropy too, use a `CompoundLoss`.

    Components are found on the CPU, in each call unless the batch brings them.

    Args:
        loss: the loss of each region, with all other settings; it must have `pool="image"`. Its `class_weights` weigh
            lesions by class.
        classes: number of channels of the logits; needed with class ids.
        regions: `"nearest"` or `"blob"`.
        connectivity: along how many axes at once neighbouring pixels of a component may differ: 1 joins pixels that
            share a side; the default, the number of space axes, joins all pixels that touch.

    Raises:
        ValueError: a loss that is not an `OverlapLoss`, pools images or classes, or has `reduction="none"`; in a call,
            a wrong number of classes, and whatever the loss refuses.

    >>> from lightning_dice.losses import DiceLoss
    >>> mask = torch.tensor([[[1, 0, 0, 0, 0, 0, 1, 1, 1, 1]]])
    >>> found = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]])
    >>> loss = DiceLoss(activation=None, smooth=1e-5, pool="image")
    >>> loss(found, mask), LesionWiseLoss(loss)(found, mask)
    (tensor(0.1111), tensor(0.5000))
    """

    def __init__(
        self,
        loss: OverlapLoss,
        *,
        classes: int | None = None,
        regions: Regions = "nearest",
        connectivity: int | None = None,
    ) -> None:
        if not isinstance(loss, OverlapLoss):
            raise ValueError(f"loss must be an OverlapLoss, such as DiceLoss, got {type(loss).__name__}")
        if isinstance(loss, GeneralizedDiceLoss):
            raise ValueError(
                "loss must have a ratio for each class, as a lesion has one class; GeneralizedDiceLoss joins them"
            )
        if loss.pool != "image":
            raise ValueError(f'loss must have pool="image", as each lesion has its own ratio, got {loss.pool!r}')
        if loss.reduction == "none":
            raise ValueError('loss must have one value, got reduction="none", which would return one for each lesion')
        super().__init__(activation=loss.activation, ignore_index=loss.ignore_index)
        self.loss = loss
        self.classes = None if classes is None else check_count("classes", classes, optional=True)
        self.regions: Regions = check_choice("regions", regions, Regions)
        self.connectivity = None if connectivity is None else check_count("connectivity", connectivity, optional=True)
        self._regions = RegionMap(
            activation=self.activation,
            classes=self.classes,
            regions=self.regions,
            connectivity=self.connectivity,
            ignore_index=self.ignore_index,
            exclude_classes=loss.exclude_classes,
        )
        self.maps = {"regions": self._regions}

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

        Of `maps` it uses `"regions"`, integers `(batch, classes, *space)`.
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
            classes = logits.shape[1]
            regions = self.get_checked_map("regions", logits, target, maps)
            if regions.is_floating_point():
                raise ValueError(f'maps["regions"] must hold integers, got {regions.dtype}')
            sums, own_class = region_sums(pixels, regions.flatten(2), self.loss.required_sums)
        loss, kept = self.loss.class_losses(sums)
        if self.loss.exclude_classes:
            counted = torch.zeros(classes, dtype=torch.bool, device=kept.device)
            counted[included_classes(classes, self.loss.exclude_classes)] = True
            kept = kept & counted[own_class].unsqueeze(1)
        weights = None
        if self.loss.class_weights is not None:
            weights = class_weights_of(self.loss.class_weights, classes, loss)[own_class].unsqueeze(1)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        mean = self.loss.reduce_classes(loss, kept, weights).apply(lambda value: value.to(dtype))
        return mean if self.loss.across_ranks else mean.finish_locally()
