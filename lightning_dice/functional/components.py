"""Connected components of the classes of a target, and the regions around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_dice.functional.target_reader import TargetReader

Regions = Literal["nearest", "blob"]


def component_regions(mask: Any, regions: Regions = "nearest", connectivity: int | None = None) -> Any:
    """Assign each pixel of a mask to the region of a connected component.

    Args:
        mask: bool array, any number of axes.
        regions: `"nearest"`: a pixel belongs to the nearest component, or to either of two equally near ones (the
            Voronoi cells by which Jaus et al., "Every Component Counts", match pixels to lesions). `"blob"`: a pixel
            outside all components belongs to each of them (blob loss, Kofler et al., IPMI 2023).
        connectivity: along how many axes at once neighbours may differ, from 1 to the number of axes, as in
            `scipy.ndimage.generate_binary_structure`. The default, the number of axes, joins pixels that touch at a
            corner.

    Returns:
        int32 array of the shape of mask: the number of the region, from 0; -1 for a pixel that belongs to all of
        several. With at most one component all pixels are 0, as the image is one region.

    Raises:
        ValueError: a connectivity below 1, or above the number of axes.

    >>> component_regions(np.array([0, 1, 0, 0, 0, 1, 1]) == 1).tolist()
    [0, 0, 0, 0, 1, 1, 1]
    >>> component_regions(np.array([0, 1, 0, 0, 0, 1, 1]) == 1, "blob").tolist()
    [-1, 0, -1, -1, -1, 1, 1]
    """
    from scipy import ndimage  # Imported here, as it would slow the start of every command.

    if connectivity is not None and not 1 <= connectivity <= mask.ndim:
        raise ValueError(f"connectivity must be from 1 to the number of space axes, {mask.ndim}, got {connectivity}")
    structure = ndimage.generate_binary_structure(mask.ndim, connectivity or mask.ndim)
    numbers, found = ndimage.label(mask, structure)
    if found <= 1:
        return np.zeros(mask.shape, dtype=np.int32)
    if regions == "nearest":
        nearest = ndimage.distance_transform_edt(numbers == 0, return_distances=False, return_indices=True)
        numbers = numbers[tuple(nearest)]
    return numbers.astype(np.int32) - 1


@dataclass(frozen=True)
class RegionMap(TargetReader):
    """Regions of each class of a target, see `component_regions`; one of the `SegmentationLoss.maps`.

    Call it with the target of one image on the CPU, ids `(*space)` or planes `(classes, *space)`; it returns int32
    `(classes, *space)`. Ignored pixels belong to no component.

    Args:
        activation: the loss's activation, see `TargetReader`.
        classes: number of classes; needed with class ids.
        ignore_index: label of the pixels to ignore.
        exclude_classes: indices of classes to skip; their regions are 0 everywhere.
        regions: see `component_regions`.
        connectivity: see `component_regions`.

    Raises:
        ValueError: in a call, ids without `classes`, or another number of planes.

    >>> RegionMap("softmax", classes=2)(torch.tensor([1, 0, 0, 0, 1]))
    tensor([[0, 0, 0, 0, 0],
            [0, 0, 0, 1, 1]], dtype=torch.int32)
    """

    regions: Regions = "nearest"
    connectivity: int | None = None

    def __call__(self, target: Tensor) -> Tensor:
        """Compute the regions, int32 `(classes, *space)`."""
        return self.map_classes(
            lambda mask: component_regions(mask, self.regions, self.connectivity), self.masks(target), torch.int32
        )
