"""Training patches, cut from the cases before augmentation, with a cache of decoded cases.

Patches need only `Cases`. If the cases have a method `open(index)` that returns a `CaseReader`, no more of a large file
is decoded than a patch needs, and other images are cached as they are stored. If they have a method `stamp(index)`,
decoded cases can be cached in files.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from lightning_dice.argument_checks import check_label
from lightning_dice.data.batch import Sample
from lightning_dice.data.interfaces import Cases
from lightning_dice.data.transforms import fit_normalization_to_blocks
from lightning_dice.io import write_atomically

MAX_CENTERS = 10_000  # voxels kept of each class to centre patches on, as in nnU-Net
GIB = 2**30
BLOCK = 2**22  # voxels of a mask searched in one step
CACHED_ARRAYS = ("image", "mask", "centers")


@dataclass(frozen=True)
class PatchSampler:
    """Cuts patches from the cases of a training split.

    With probability `oversample_foreground` a patch is centred, as far as the image's borders allow, on a voxel of a
    class drawn uniformly from the foreground classes of the case; otherwise it lies anywhere in the image. (nnU-Net
    centres the last third of each batch on foreground instead.) An image smaller than a patch is padded on both
    sides: the image by repeating its border, the mask with `ignore_index`, or 0 if that is `None`.

    Args:
        patch_size: pixels along each axis, at the network's spacing.
        oversample_foreground: share of patches that are centred on foreground.
        patches_per_image: patches of each case in an epoch. `None`: as many as fit into its volume, at least one.
        ignore_index: the label of ignored pixels, which are never foreground.
        cache: GiB of decoded images that each training process keeps in memory, divided among its workers.
        cache_folder: a folder for decoded images that do not fit into memory; patches are read from these files
            without the rest, and each takes about 5 bytes per voxel and channel. `None`: such images are decoded
            again for each patch. Runs can share the folder: files are looked up by a case's files and settings.

    Raises:
        ValueError: for a setting out of its range.

    >>> from lightning_dice.data import SyntheticSource
    >>> cases = SyntheticSource(size=(64, 64), cases=(3, 0, 0)).split("train")
    >>> patches = PatchSampler((32, 16), patches_per_image=2).cut(cases)
    >>> len(patches), patches[0].image.shape
    (6, torch.Size([1, 32, 16]))
    """

    patch_size: Sequence[int]
    oversample_foreground: float = 1 / 3
    patches_per_image: int | None = 1
    ignore_index: int | None = 255
    cache: float = 2.0
    cache_folder: str | Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.patch_size, (int, str)) or not all(isinstance(n, int) and n > 0 for n in self.patch_size):
            raise ValueError(f"patch_size must be the pixels of a patch along each axis, got {self.patch_size!r}")
        if not 0 <= self.oversample_foreground <= 1:
            raise ValueError(
                f"oversample_foreground must be a share of the patches in [0, 1], got {self.oversample_foreground!r}"
            )
        if self.patches_per_image is not None and (
            not isinstance(self.patches_per_image, int) or self.patches_per_image < 1
        ):
            raise ValueError(
                f"patches_per_image must be None or an integer of at least 1, got {self.patches_per_image!r}"
            )
        if not self.cache >= 0:
            raise ValueError(f"cache must be GiB, at least 0, got {self.cache!r}")
        check_label("ignore_index", self.ignore_index)
        object.__setattr__(self, "patch_size", tuple(int(n) for n in self.patch_size))

    @classmethod
    def from_read_size(
        cls,
        read_size: Sequence[int] | None,
        patches_per_image: int | None = None,
        oversample_foreground: float = 0.0,
        ignore_index: int | None = 255,
        cache: float = 2.0,
    ) -> PatchSampler | None:
        """Return the sampler for `data.read_size` of 2D images, or `None` if images are read whole.

        It cuts the regions to decode; `augment` then crops them to `data.patch_size`.

        Args:
            read_size: height and width of a region, or `None`.
            patches_per_image: as for the class, like the arguments below.
            oversample_foreground: the same.
            ignore_index: the same.
            cache: the same.

        Raises:
            ValueError: for a setting out of its range.

        >>> PatchSampler.from_read_size([768, 768], oversample_foreground=0.5).patch_size
        (768, 768)
        >>> print(PatchSampler.from_read_size(None))
        None
        """
        if read_size is None:
            return None
        if isinstance(read_size, (int, str)) or len(read_size) != 2:
            raise ValueError(f"read_size must be pixels along both axes, such as [768,768], got {read_size!r}")
        return cls(read_size, oversample_foreground, patches_per_image, ignore_index, cache)

    def cut(self, cases: Cases) -> PatchCases:
        """Return the patches of these cases as a data set.

        Raises:
            ValueError: the images have another number of axes than a patch, or `cache_folder` is set and the cases
                have no method `stamp`.
        """
        axes = {len(size) for size in cases.sizes[:1]}
        if axes and axes != {len(self.patch_size)}:
            raise ValueError(f"patch_size must have the images' {axes.pop()} axes, got {list(self.patch_size)}")
        if self.cache_folder is not None and not hasattr(cases, "stamp"):
            raise ValueError("cache_folder must be null for these cases, which have no stamp that shows changes")
        return PatchCases(cases, self)


class CaseReader(Protocol):
    """Reads parts of one case; see `Cases.open` in the module's docstring.

    Random choices, such as which annotator to use, belong in `read_region` and must use torch's random state.
    """

    @property
    def case(self) -> str:
        """Its name."""
        ...

    @property
    def size(self) -> tuple[int, ...]:
        """The space axes of the image, and of the mask."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that it holds in memory."""
        ...

    def read_region(self, region: tuple[slice, ...], /) -> Sample:
        """Read a region of image and mask, one slice within the image per space axis; it sets `Sample.whole`."""
        ...

    def mask_blocks(self) -> Iterable[tuple[int, NDArray[Any]]]:
        """Yield the mask in blocks of the first axis: the flat index of the first pixel, and ids or planes.

        Where several people made masks, several blocks may cover the same pixels.
        """
        ...


@dataclass(frozen=True)
class _DecodedCase:
    """A `CaseReader` for a decoded case, in memory or memory-mapped.

    Attributes:
        case: its name.
        image: `(channels, *space)`.
        mask: `(*space)` or `(classes, *space)`.
        spacing: the mask's pixel spacing.
        centers: from `_find_centers`, if known.
    """

    case: str
    image: NDArray[np.float32]
    mask: NDArray[Any]
    spacing: tuple[float, ...] | None
    centers: NDArray[np.int64] | None = None

    @classmethod
    def from_sample(cls, sample: Sample) -> _DecodedCase:
        image, mask = sample.image.numpy(), sample.mask.numpy()
        if image.shape[1:] != mask.shape[-(image.ndim - 1) :]:
            raise ValueError(f"image and mask of {sample.case} must have one size, got {image.shape} and {mask.shape}")
        return cls(sample.case, image, mask, sample.spacing)

    @classmethod
    def load(cls, file: Path) -> _DecodedCase:
        about = json.loads(file.read_text(encoding="utf-8"))
        image, mask, centers = (np.load(file.with_suffix(f".{name}.npy"), mmap_mode="r") for name in CACHED_ARRAYS)
        spacing = None if about["spacing"] is None else tuple(about["spacing"])
        return cls(about["case"], image, mask, spacing, centers)

    def save(self, file: Path) -> None:
        # The description comes last: if it exists, all arrays do.
        for name in CACHED_ARRAYS:
            write_atomically(file.with_suffix(f".{name}.npy"), partial(np.save, arr=getattr(self, name)))
        text = json.dumps({"case": self.case, "spacing": self.spacing})
        write_atomically(file, lambda part: part.write_text(text, encoding="utf-8"))

    @property
    def size(self) -> tuple[int, ...]:
        return self.image.shape[1:]

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + self.mask.nbytes

    def read_region(self, region: tuple[slice, ...]) -> Sample:
        index: tuple[Any, ...] = (..., *region)
        image, mask = (torch.from_numpy(np.array(part[index], order="C")) for part in (self.image, self.mask))
        return Sample(image, mask, self.case, self.spacing, self)

    def normalization(self, normalize: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return fit_normalization_to_blocks(normalize, lambda: [torch.from_numpy(np.array(self.image))])

    def mask_blocks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        axis = self.mask.ndim - len(self.size)
        slab = math.prod(self.size[1:])
        step = max(1, BLOCK // slab)
        for first in range(0, self.size[0], step):
            yield first * slab, self.mask[(slice(None),) * axis + (slice(first, first + step),)]


class PatchCases:
    """Patches as a data set: `patches_per_image` of each case, drawn with torch's random state.

    Args:
        cases: whole images with masks of their size.
        sampler: how patches are cut.

    >>> from lightning_dice.data import SyntheticSource
    >>> patches = PatchCases(SyntheticSource(size=(64, 64)).split("train"), PatchSampler((32, 16)))
    >>> patches[3].case, patches[3].mask.shape
    ('train-0003', torch.Size([1, 32, 16]))
    """

    def __init__(self, cases: Cases, sampler: PatchSampler) -> None:
        self.cases, self.sampler = cases, sampler
        patch = math.prod(sampler.patch_size)
        counts = [sampler.patches_per_image or max(1, math.prod(size) // patch) for size in cases.sizes]
        self._ends = list(accumulate(counts))
        self.sizes: Sequence[tuple[int, ...]] = [tuple(sampler.patch_size)] * sum(counts)
        self._cached: dict[int, CaseReader] = {}
        self._centers: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be between 0 and {len(self) - 1}, got {index}")
        number = bisect_right(self._ends, index)
        reader = self._open_case(number)
        # Seeded by torch's state alone, so that the cache makes no difference.
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        start = self._draw_start(number, reader, rng)
        region, margins = [], []
        for first, length, n in zip(start, self.sampler.patch_size, reader.size, strict=True):
            region.append(slice(max(first, 0), min(first + length, n)))
            margins.append((max(-first, 0), max(first + length - n, 0)))
        sample = reader.read_region(tuple(region))
        self._cache_case(number, reader)
        if not any(any(pair) for pair in margins):
            return sample
        image = _pad(sample.image, margins, None)
        return sample._replace(image=image, mask=_pad(sample.mask, margins, self.sampler.ignore_index or 0))

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker fills a cache of its own.
        return {**self.__dict__, "_cached": {}, "_centers": {}}

    def _draw_start(self, number: int, reader: CaseReader, rng: np.random.Generator) -> tuple[int, ...]:
        """Draw the first pixel of a patch; below 0 where the image is smaller."""
        space = reader.size
        low = [min(0, -((p - n) // 2)) for n, p in zip(space, self.sampler.patch_size, strict=True)]
        high = [max(first, n - p) for first, n, p in zip(low, space, self.sampler.patch_size, strict=True)]
        if rng.random() < self.sampler.oversample_foreground and len(centers := self._centers_of(number, reader)):
            ids = centers[:, 0]
            first, last = np.searchsorted(ids, rng.choice(np.unique(ids)) + np.arange(2))
            center = np.unravel_index(int(centers[rng.integers(first, last), 1]), space)
            wanted = [int(c) - p // 2 for c, p in zip(center, self.sampler.patch_size, strict=True)]
            return tuple(min(max(w, a), b) for w, a, b in zip(wanted, low, high, strict=True))
        return tuple(int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True))

    def _centers_of(self, number: int, reader: CaseReader) -> NDArray[np.int64]:
        if number not in self._centers:
            known = reader.centers if isinstance(reader, _DecodedCase) else None
            if known is None:
                known = _find_centers(reader.mask_blocks(), len(reader.size), self.sampler.ignore_index)
            self._centers[number] = known
        return self._centers[number]

    def _open_case(self, number: int) -> CaseReader:
        if number in self._cached:
            return self._cached[number]
        file = self._cache_file(number)
        if file is not None and file.is_file():
            return _DecodedCase.load(file)
        if hasattr(self.cases, "open"):
            reader: CaseReader = self.cases.open(number)
            return reader
        return _DecodedCase.from_sample(self.cases[number])

    def _cache_case(self, number: int, reader: CaseReader) -> None:
        file = self._cache_file(number)
        if number in self._cached or (file is not None and file.is_file()):
            return
        worker = get_worker_info()
        budget = self.sampler.cache * GIB / (worker.num_workers if worker is not None else 1)
        # Cached cases are never evicted: the order is random in each epoch, so replacing them gains nothing.
        if sum(one.nbytes for one in self._cached.values()) + reader.nbytes <= budget:
            self._cached[number] = reader
        elif file is not None and isinstance(reader, _DecodedCase):
            replace(reader, centers=self._centers_of(number, reader)).save(file)

    def _cache_file(self, number: int) -> Path | None:
        """Return the file for a decoded case, named by the present state of its files."""
        if self.sampler.cache_folder is None:
            return None
        stamp: str = self.cases.stamp(number)  # type: ignore[attr-defined]  # `PatchSampler.cut` checks for it.
        name = blake2b(f"{stamp} {self.sampler.ignore_index}".encode(), digest_size=16).hexdigest()
        return Path(self.sampler.cache_folder).expanduser() / f"{name}.json"


def _find_centers(blocks: Iterable[tuple[int, NDArray[Any]]], axes: int, ignore_index: int | None) -> NDArray[np.int64]:
    """Return class and flat index of some foreground pixels, `(pixels, 2)`, sorted by class and index.

    The selection does not depend on how the mask is divided into blocks.

    Args:
        blocks: from `CaseReader.mask_blocks`.
        axes: number of space axes.
        ignore_index: the label that is not foreground.
    """
    kept: dict[int, NDArray[np.int64]] = {}
    for first, block in blocks:
        planes = block.ndim > axes
        ids = range(len(block)) if planes else [n for n in np.unique(block).tolist() if n not in (0, ignore_index)]
        for label in ids:
            found = _subsample(np.flatnonzero(block[label] == 1 if planes else block == label) + first)
            if len(found):
                kept[label] = _subsample(np.union1d(kept[label], found)) if label in kept else found
    parts = [np.stack([np.full_like(kept[label], label), kept[label]], axis=1) for label in sorted(kept)]
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)


def _subsample(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return at most `MAX_CENTERS` of some ascending indices: those with the smallest hashes, a pseudorandom choice."""
    if len(indices) <= MAX_CENTERS:
        return indices
    # The finalizer of splitmix64.
    key = (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        key = (key ^ (key >> np.uint64(shift))) * np.uint64(factor)
    key ^= key >> np.uint64(31)
    return np.sort(indices[np.argpartition(key, MAX_CENTERS)[:MAX_CENTERS]])


def _pad(part: Tensor, margins: Sequence[tuple[int, int]], fill: int | None) -> Tensor:
    """Pad the last axes with `fill`, or with the border's values if it is `None`."""
    pairs = [(0, 0)] * (part.ndim - len(margins)) + list(margins)
    array = part.numpy()
    array = np.pad(array, pairs, "edge") if fill is None else np.pad(array, pairs, constant_values=fill)
    return torch.from_numpy(array)
