"""The sums per region of an image instead of per image: what lesion-wise losses are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dice.kernels.pixels import Pixels
from lightning_dice.kernels.reference import minus_log_complement
from lightning_dice.kernels.sums import OverlapSums, RequiredSums, wide_dtype


def region_sums(pixels: Pixels, regions: Tensor, wanted: RequiredSums = RequiredSums()) -> tuple[OverlapSums, Tensor]:  # noqa: B008
    """Sum over each region of each class in each image.

    Each pixel is added once: to its region or, where it belongs to all regions of its class and image, to a sum that
    all of them then take. An index target is never made one-hot: outside its own class a pixel adds to `predicted` and
    `count` alone.

    Args:
        pixels: logits and target.
        regions: integers `(images, classes, pixels)`: for each class and image the regions are numbered from 0, and
            a pixel below 0 belongs to all of them.
        wanted: sums beyond the four that are always there; squares, minimum and absent_nll can be.

    Returns:
        The sums, `(regions, 1)`, ordered by image, then class, then number; and the class of each, `(regions,)`.
        In float64 (float32 on devices without it), differentiable in the logits, twice.

    Raises:
        ValueError: another sum is wanted.

    >>> from lightning_dice.kernels import checked_pixels
    >>> probs, mask = torch.tensor([[[1.0, 0.5, 0.5, 0.5]]]), torch.tensor([[[1, 0, 0, 1]]])
    >>> sums, _ = region_sums(checked_pixels(probs, mask, activation=None), torch.tensor([[[0, 0, 1, 1]]]))
    >>> sums.predicted.squeeze(1).tolist(), sums.overlap.squeeze(1).tolist()
    ([1.5, 1.0], [1.0, 0.5])
    """
    if wanted.nll or wanted.all_nll or wanted.focal:
        raise ValueError(f"regions have no sums of cross-entropy but absent_nll, wanted {wanted}")
    z, w = pixels.logits, pixels.weight
    places = _Places(regions)
    p = pixels.probs()
    count = places.add(torch.ones_like(z[:1, :1]) if w is None else w)
    predicted = places.add(_weighted(p, w))
    more: dict[str, Tensor] = {}
    if wanted.squares:
        more["predicted_squares"] = places.add(_weighted(p * p, w))
    if wanted.absent_nll:
        more["absent_nll"] = places.add(_weighted(minus_log_complement(z, p, pixels.activation), w))
    if pixels.planes:
        t = pixels.target.to(z.dtype)
        soft = pixels.target.is_floating_point()
        overlap, actual = places.add(_weighted(p * t, w)), places.add(_weighted(t, w))
        if wanted.squares:
            more["actual_squares"] = places.add(_weighted(t * t, w)) if soft else actual
        if wanted.minimum:
            more["minimum"] = places.add(_weighted(torch.minimum(p, t), w)) if soft else overlap
    else:
        ids = pixels.target.long()
        own = None if w is None else w if w.shape[1] == 1 else w.gather(1, ids)
        p_true = p.gather(1, ids)
        overlap = places.add(_weighted(p_true, own), ids)
        actual = places.add(torch.ones_like(p_true) if own is None else own, ids)
        if wanted.squares:
            more["actual_squares"] = actual
        if wanted.minimum:
            more["minimum"] = overlap
    exclusive = pixels.activation == "softmax" or not pixels.planes
    sums = OverlapSums(overlap, predicted, actual, count, **more, exclusive=exclusive)
    if pixels.annotated is not None:
        kept = pixels.annotated.flatten()[places.group].unsqueeze(1)
        sums = sums.map(lambda field: field.where(kept, torch.zeros((), dtype=field.dtype, device=field.device)))
    return sums, places.group % regions.shape[1]


class _Places:
    """Where each pixel of each class is added: one number for every region, and behind them one for every group.

    A group is a class in an image; its own number takes the pixels that belong to all of its regions.

    Attributes:
        index: `(images, classes, pixels)`.
        group: of each region, `(regions,)`.
    """

    def __init__(self, regions: Tensor) -> None:
        images, classes = regions.shape[:2]
        number = (regions.amax(2) + 1).long().flatten()
        ends = number.cumsum(0)
        # The number of regions is a shape: the only value for which a GPU must wait.
        self.regions = int(ends[-1]) if ends.numel() else 0
        groups = torch.arange(images * classes, device=regions.device)
        self.group = groups.repeat_interleave(number, output_size=self.regions)
        first = (ends - number).view(images, classes, 1)
        self.index = torch.where(regions >= 0, regions + first, groups.view(images, classes, 1) + self.regions)

    def add(self, values: Tensor, ids: Tensor | None = None) -> Tensor:
        """Sums `(regions, 1)` of `(images, classes, pixels)`; with ids, each pixel is added to its class alone."""
        index = self.index if ids is None else self.index.gather(1, ids)
        images, classes = self.index.shape[:2]
        zeros = values.new_zeros(self.regions + images * classes, dtype=wide_dtype(values))
        # One accumulator may take millions of terms, hence float64.
        summed = zeros.scatter_add(0, index.flatten(), values.to(zeros.dtype).expand(index.shape).flatten())
        return (summed[: self.regions] + summed[self.regions :][self.group]).unsqueeze(1)


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else values * weight
