"""From samples to batches: augmentation, normalization, stacking."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision import tv_tensors

from lightning_dice.data.batch import Batch, Sample
from lightning_dice.data.errors import DataError
from lightning_dice.data.interfaces import Cases
from lightning_dice.data.samplers import seeded
from lightning_dice.data.transforms import fit_normalization

Augment = Callable[[Tensor, Tensor], Sequence[Tensor]]
Normalize = Callable[[Tensor], Tensor]
Maps = Mapping[str, Callable[[Tensor], Tensor]]


class PreparedSample(NamedTuple):
    """A sample, ready to be stacked into a batch."""

    image: Tensor
    mask: Tensor
    case: str
    maps: dict[str, Tensor]
    spacing: tuple[float, ...] | None


def prepare_sample(
    sample: Sample, augment: Augment | None, normalize: Normalize | None, ignore_index: int | None, maps: Maps
) -> PreparedSample:
    """Augment and normalize a sample, and compute its maps; takes arguments of `SegmentationData`.

    Raises:
        DataError: `normalize` changes the shape of the image.

    >>> sample = Sample(torch.ones(1, 2, 2), torch.ones(2, 2, dtype=torch.uint8), "a")
    >>> prepare_sample(sample, None, lambda image: image / 2, None, {"count": torch.sum}).maps
    {'count': tensor(4)}
    """
    image, mask, case, spacing, whole = sample
    # Prediction sees the whole image, so a part is normalized by the statistics of the whole.
    if normalize is not None and whole is not None:
        normalize = whole.normalization(normalize)
    elif normalize is not None and augment is not None:
        normalize = fit_normalization(normalize, image)
    if augment is not None:
        image, mask = apply_augment(augment, image, mask, ignore_index)
    if normalize is not None:
        shape, image = tuple(image.shape), normalize(image)
        if tuple(image.shape) != shape:
            # Three means for an image of one channel would broadcast into three channels.
            raise DataError(
                f"normalize must keep the shape (channels, *space) of an image, {shape}, got {tuple(image.shape)}: "
                f"give it one value for each of the {shape[0]} channels (data.channels), or choose normalize=image"
            )
    return PreparedSample(image, mask, case, {name: make(mask) for name, make in maps.items()}, spacing)


def apply_augment(augment: Augment, image: Tensor, mask: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Augment an image and its mask, so that pixels from outside the image become `ignore_index`.

    Args:
        augment: as for `SegmentationData`.
        image: `(channels, *space)`.
        mask: `(*space)` or `(classes, *space)`.
        ignore_index: the ignored label; `None`: pixels from outside become label 0.

    Returns:
        Image and mask as plain tensors; the mask in its own dtype, or int64 if that cannot hold `ignore_index`.

    >>> from torchvision.transforms import v2
    >>> apply_augment(v2.Pad(1), torch.ones(1, 1, 1), torch.ones(1, 1, dtype=torch.uint8), ignore_index=255)[1]
    tensor([[255, 255, 255],
            [255,   1, 255],
            [255, 255, 255]], dtype=torch.uint8)
    """
    # int32 holds 1 + any label, and torchvision's detour through float32 is exact up to 2**24. Soft labels must be
    # sampled by nearest neighbour, or the ignored label would mix with them; the shift costs them 6e-8.
    shifted = mask if mask.is_floating_point() else mask.to(torch.int32)
    if ignore_index is not None:
        shifted = (shifted + 1).masked_fill(shifted == ignore_index, 0)
    image, shifted = augment(tv_tensors.Image(image), tv_tensors.Mask(shifted))
    image, shifted = image.as_subclass(Tensor), shifted.as_subclass(Tensor)
    if ignore_index is None:
        return image, shifted.to(mask.dtype)
    if mask.is_floating_point():
        return image, (shifted - 1).clamp_(0, 1).masked_fill_(shifted == 0, ignore_index)
    limits = torch.iinfo(mask.dtype)
    dtype = mask.dtype if limits.min <= ignore_index <= limits.max else torch.int64
    return image, (shifted - 1).masked_fill(shifted == 0, ignore_index).to(dtype)


class TrainItems(Dataset[PreparedSample]):
    """Training samples by the index and seed that `TrainSampler` yields."""

    def __init__(self, cases: Cases, prepare: Callable[[Sample], PreparedSample]) -> None:
        self.cases = cases
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: int | tuple[int, int]) -> PreparedSample:
        if isinstance(key, int):  # from the sampler that Lightning puts in for `overfit_batches`
            return self.prepare(self.cases[key])
        index, seed = key
        with seeded(seed):  # `cases` may draw random numbers too, such as the position of a patch.
            return self.prepare(self.cases[index])


class EvalBatches(Dataset[Batch]):
    """Whole batches by the indices that `EvalSampler` yields."""

    def __init__(self, cases: Cases, prepare: Callable[[Sample], PreparedSample]) -> None:
        self.cases = cases
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: int | list[int]) -> Batch:
        indices = [key] if isinstance(key, int) else key
        # An empty batch gets the shapes and maps of the first case.
        batch = collate([self.prepare(self.cases[i]) for i in indices or [0]])
        if indices:
            return batch
        return batch.select(slice(0))


def collate(samples: Sequence[PreparedSample]) -> Batch:
    """Stack samples into a batch.

    Raises:
        DataError: the images have different sizes.
    """
    shapes = {tuple(s.image.shape) for s in samples}
    if len(shapes) > 1:
        found = ", ".join(f"{s.case}: {'x'.join(map(str, s.image.shape[1:]))}" for s in samples)
        raise DataError(
            f"the images of a training batch must share one size, got {found}: crop them to one "
            "(data.patch_size=[256,256]), or set data.batch_size=1"
        )
    return Batch(
        default_collate([s.image for s in samples]),
        default_collate([s.mask for s in samples]),
        [s.case for s in samples],
        {name: default_collate([s.maps[name] for s in samples]) for name in samples[0].maps},
        [s.spacing for s in samples],
    )


def identity(batch: Batch) -> Batch:
    """Return a batch that is already collated."""
    return batch
