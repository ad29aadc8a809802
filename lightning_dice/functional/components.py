"""Which lesion of a target each pixel counts with: the connected components of a class, and the regions around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_dice.functional.target_reader import TargetReader

Regions = Literal["nearest", "blob"]


def component_regions(mask: Any, regions: Regions = "nearest", connectivity: int | None = None) -> Any:
    """The region of each pixel of a mask.

    Args:
        mask: a bool array, any number of axes.
        regions: `"nearest"`: a pixel belongs to the component that is nearest to it, of equally near ones to either
            (the Voronoi cells by which Jaus et al., "Every Component Counts", match pixels to lesions). `"blob"`: a
            pixel outside all components belongs to each of them (blob loss, Kofler et al., IPMI 2023).
        connectivity: along how many axes at once neighbours may lie apart, 1 to the number of axes, as in
            `scipy.ndimage.generate_binary_structure`; the number of axes by default, by which pixels that touch at a
            corner are one component.

    Returns:
        An int32 array of the shape of mask: regions from 0; -1 where a pixel belongs to each of several. 0 everywhere
        where there is no component or a single one: then the image is the region.

    Raises:
        ValueError: a connectivity of more than the axes.

    >>> component_regions(np.array([0, 1, 0, 0, 0, 1, 1]) == 1).tolist()
    [0, 0, 0, 0, 1, 1, 1]
    >>> component_regions(np.array([0, 1, 0, 0, 0, 1, 1]) == 1, "blob").tolist()
    [-1, 0, -1, -1, -1, 1, 1]
    """
    from scipy import ndimage  # Here, as it would slow the start of every command.

    if connectivity is not None and not 1 <= connectivity <= mask.ndim:
        raise ValueError(f"connectivity must be from 1 to the number of space axes, {mask.ndim}, got {connectivity}")
    structure = ndimage.generate_binary_structure(mask.ndim, connectivity or mask.ndim)
    numbers, found = ndimage.label(mask, structure)
    if found <= 1:
        return np.zeros(mask.shape, dtype=np.int32)
    if regions == "nearest":
        places = ndimage.distance_transform_edt(numbers == 0, return_distances=False, return_indices=True)
        numbers = numbers[tuple(places)]
    return numbers.astype(np.int32) - 1


@dataclass(frozen=True)
class RegionMap(TargetReader):
    """A target's regions, class by class: a map in the sense of `SegmentationLoss.maps`.

    Called with the target of one image on the CPU, ids `(*space)` or planes `(classes, *space)`, it returns int32
    `(classes, *space)`; see `component_regions`. Ignored pixels belong to no component.

    Args:
        activation: of the loss; this and the following as in `TargetReader`.
        classes: how many there are; needed with class ids.
        ignore_index: the label of pixels that count as nothing.
        exclude_classes: indices of classes whose regions are not computed but 0 everywhere.
        regions: see `component_regions`.
        connectivity: see `component_regions`.

    Raises:
        ValueError: in a call, ids without a number of classes, or planes of another number.

    >>> RegionMap("softmax", classes=2)(torch.tensor([1, 0, 0, 0, 1]))
    tensor([[0, 0, 0, 0, 0],
            [0, 0, 0, 1, 1]], dtype=torch.int32)
    """

    regions: Regions = "nearest"
    connectivity: int | None = None

    def __call__(self, target: Tensor) -> Tensor:
        """The regions; of the same shape whatever the target holds, so that they stack."""
        return self.of_each_class(
            lambda mask: component_regions(mask, self.regions, self.connectivity), self.masks(target), torch.int32
        )
