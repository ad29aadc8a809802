"""Overlap losses by which each lesion counts the same, whatever its size."""

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
    r"""An overlap loss of each lesion instead of each image, and the mean over all lesions.

    .. math:: L = \frac{1}{K} \sum_{k=1}^K \ell\left(\sum_{i \in R_k} p_i t_i,\ \sum_{i \in R_k} p_i,\
        \sum_{i \in R_k} t_i\right)

    A lesion is a connected component of a class of the target; its region R is where predictions count for or against
    it. `"nearest"`: the pixels to which no other component of the class is nearer, as in the CC-DiceCE loss (Bouteille
    et al., "Learning to Look Closer", 2025) after the metrics of Jaus et al., "Every Component Counts". `"blob"`: all
    pixels but those of the other components, as in the blob loss (Kofler et al., IPMI 2023): a false positive then
    counts against every lesion.

    Departs from both in the mean, which is over the lesions of all images and ranks, where theirs is over images of the
    mean over the lesions of each; in classes, each with lesions of its own; and in images without a lesion, which they
    leave out: here the whole image is one region, and `absent` of the loss decides. The blob loss adds the loss of the
    whole image, which keeps large lesions whole: that is another term of a `CompoundLoss`.

    A `smooth` of one pixel halves what a missed lesion of one pixel costs: make it small, as a region has at least
    the pixels of its lesion to be divided by. Without a lesion that is not so, hence `absent="penalize"`. Exclude the
    background of a softmax: its parts would count as lesions. With cross-entropy: a `CompoundLoss` of both.

    Components are found on the CPU; where the batch does not bring them, in each call.

    Args:
        loss: of each region, with all other settings; `pool="image"`. `class_weights` weigh lesions by their class.
        classes: the number of channels of the logits, needed with class ids.
        regions: `"nearest"` or `"blob"`.
        connectivity: along how many axes at once pixels of a component may lie apart: 1, those with a common side; the
            number of space axes by default, those that touch at all.

    Raises:
        ValueError: a loss that is no `OverlapLoss`, pools images or classes, or has no single value; in a call, a
            number of classes that the logits do not have, and whatever the loss refuses.

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
                "loss must have a ratio for each class: a lesion has one class, GeneralizedDiceLoss joins all"
            )
        if loss.pool != "image":
            raise ValueError(f'loss must have pool="image", as each lesion has a ratio of its own, got {loss.pool!r}')
        if loss.reduction == "none":
            raise ValueError('loss must have one value: reduction="none" would return as many as there are lesions')
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
        """The loss up to what the ranks sum; see `SegmentationLoss.forward`.

        Of maps it takes `"regions"`, `(batch, classes, *space)`.
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
        reduced = self.loss.reduce_classes(loss, kept, weights).apply(lambda value: value.to(dtype))
        return reduced if self.loss.across_ranks else reduced.finish_locally()
