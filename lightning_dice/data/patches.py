"""Training patches of large images, cut before anything else is done with them, and a cache of these images.

`Cases` may have a method `open(number)`, which gives an `OpenCase`: then of large files no more is decoded than a patch
needs, and other images are kept as they are stored.
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

from lightning_dice.data.batch import Sample
from lightning_dice.data.interfaces import Cases
from lightning_dice.data.transforms import normalization_over
from lightning_dice.io import write_atomically

PLACES = 10_000  # voxels kept of each class to centre patches on, as in nnU-Net
GIB = 2**30
BLOCK = 2**22  # voxels of a mask looked at in one step
PARTS = ("image", "mask", "places")


@dataclass(frozen=True)
class PatchSampler:
    """How patches are cut from the cases of a training split.

    By a chance of `oversample_foreground` a patch lies around a voxel of a class drawn evenly from the classes that the case has,
    the background apart, as far as the image's borders allow; else it lies anywhere in the image. nnU-Net has the
    foreground in the last third of each batch instead. Where an image is smaller than a patch it lies in the middle:
    the image's border is repeated, and the mask there holds `ignore_index` (without one, 0).

    Args:
        patch_size: of a patch, in pixels along each axis, at the network's spacing.
        oversample_foreground: the share of patches that are centred on foreground.
        patches_per_image: patches of each case in an epoch. `None`: as many as its volume holds, at least one.
        ignore_index: the label of pixels that count as nothing, which is no foreground either.
        cache: GiB of decoded images that each training process keeps in memory; its workers share them out.
        cache_folder: where decoded images that the memory has no room for are kept as files, from which a patch is read
            without the rest; each takes 5 bytes or so per voxel and channel. `None`: they are decoded anew. It may be
            shared by runs: a file is found again by its case's files and settings.

    Raises:
        ValueError: for a setting out of its range.
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
        object.__setattr__(self, "patch_size", tuple(int(n) for n in self.patch_size))

    def of(self, cases: Cases) -> PatchCases:
        """The patches of some cases.

        Raises:
            ValueError: the images have another number of axes than a patch, or `cache_folder` is set for cases that do
                not tell whether they have changed.
        """
        axes = {len(size) for size in cases.sizes[:1]}
        if axes and axes != {len(self.patch_size)}:
            raise ValueError(f"patch_size must be of the images' {axes.pop()} axes, got {list(self.patch_size)}")
        if self.cache_folder is not None and not hasattr(cases, "stamp"):
            raise ValueError("cache_folder must be null for these cases, which do not tell whether they have changed")
        return PatchCases(cases, self)


def windows(
    read_size: Sequence[int] | None,
    patches_per_image: int | None = None,
    oversample_foreground: float = 0.0,
    ignore_index: int | None = 255,
    cache: float = 2.0,
) -> PatchSampler | None:
    """Windows of pictures as patches, by the words of `conf/data/folder.yaml`; `None` where pictures come whole.

    Raises:
        ValueError: as by `PatchSampler`.

    >>> windows(None)
    >>> windows([768, 768], oversample_foreground=0.5).patches_per_image
    """
    if read_size is None:
        return None
    if isinstance(read_size, (int, str)) or len(read_size) != 2:
        raise ValueError(f"read_size must be pixels along both axes, such as [768,768], got {read_size!r}")
    return PatchSampler(read_size, oversample_foreground, patches_per_image, ignore_index, cache)


class OpenCase(Protocol):
    """A case, in memory or not, of which parts are read.

    What is drawn at random in `window`, and nowhere else, must be by torch's random state.
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
        """What it holds in memory."""
        ...

    def window(self, window: tuple[slice, ...], /) -> Sample:
        """What lies in a slice of each space axis, within the image; a part of the `Sample.whole` that it names."""
        ...

    def labels(self) -> Iterable[tuple[int, NDArray[Any]]]:
        """The mask in blocks of the first axis: the flat index of the first pixel, and ids or planes.

        Several blocks may be of one place, where masks of several people are.
        """
        ...


@dataclass(frozen=True)
class _Decoded:
    """A case in memory, or mapped to it.

    Attributes:
        case: its name.
        image: `(channels, *space)`.
        mask: `(*space)` or `(classes, *space)`.
        places: as of `_places`, where they are known.
        spacing: of the mask.
    """

    case: str
    image: NDArray[np.float32]
    mask: NDArray[Any]
    spacing: tuple[float, ...] | None
    places: NDArray[np.int64] | None = None

    @property
    def size(self) -> tuple[int, ...]:
        return self.image.shape[1:]

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + self.mask.nbytes

    def window(self, window: tuple[slice, ...]) -> Sample:
        index: tuple[Any, ...] = (..., *window)
        image, mask = (torch.from_numpy(np.array(part[index], order="C")) for part in (self.image, self.mask))
        return Sample(image, mask, self.case, self.spacing, self)

    def normalization(self, normalize: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return normalization_over(normalize, lambda: [torch.from_numpy(np.array(self.image))])

    def labels(self) -> Iterator[tuple[int, NDArray[Any]]]:
        axis = self.mask.ndim - len(self.size)
        slab = math.prod(self.size[1:])
        step = max(1, BLOCK // slab)
        for first in range(0, self.size[0], step):
            yield first * slab, self.mask[(slice(None),) * axis + (slice(first, first + step),)]


class PatchCases:
    """Patches as a data set: `patches_per_image` of each case, drawn by torch's random state.

    Args:
        cases: whole images with masks of their size.
        sampler: how patches are cut.
    """

    def __init__(self, cases: Cases, sampler: PatchSampler) -> None:
        self.cases, self.sampler = cases, sampler
        patch = math.prod(sampler.patch_size)
        each = [sampler.patches_per_image or max(1, math.prod(size) // patch) for size in cases.sizes]
        self._ends = list(accumulate(each))
        self.sizes: Sequence[tuple[int, ...]] = [tuple(sampler.patch_size)] * sum(each)
        self._kept: dict[int, OpenCase] = {}
        self._places: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in 0 to {len(self) - 1}, got {index}")
        number = bisect_right(self._ends, index)
        opened = self._open(number)
        # Of torch's state alone, whatever was read from memory.
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        start = self._start(number, opened, rng)
        inside, margins = [], []
        for first, length, n in zip(start, self.sampler.patch_size, opened.size, strict=True):
            inside.append(slice(max(first, 0), min(first + length, n)))
            margins.append((max(-first, 0), max(first + length - n, 0)))
        sample = opened.window(tuple(inside))
        self._keep(number, opened)
        if not any(any(pair) for pair in margins):
            return sample
        image = _padded(sample.image, margins, None)
        return sample._replace(image=image, mask=_padded(sample.mask, margins, self.sampler.ignore_index or 0))

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is started afresh reads for itself.
        return {**self.__dict__, "_kept": {}, "_places": {}}

    def _start(self, number: int, opened: OpenCase, rng: np.random.Generator) -> tuple[int, ...]:
        """The first pixel of a patch; below 0 where the image is smaller."""
        space = opened.size
        low = [min(0, -((p - n) // 2)) for n, p in zip(space, self.sampler.patch_size, strict=True)]
        high = [max(first, n - p) for first, n, p in zip(low, space, self.sampler.patch_size, strict=True)]
        if rng.random() < self.sampler.oversample_foreground and len(places := self._places_of(number, opened)):
            ids = places[:, 0]
            first, last = np.searchsorted(ids, rng.choice(np.unique(ids)) + np.arange(2))
            center = np.unravel_index(int(places[rng.integers(first, last), 1]), space)
            wanted = [int(c) - p // 2 for c, p in zip(center, self.sampler.patch_size, strict=True)]
            return tuple(min(max(w, a), b) for w, a, b in zip(wanted, low, high, strict=True))
        return tuple(int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True))

    def _places_of(self, number: int, opened: OpenCase) -> NDArray[np.int64]:
        if number not in self._places:
            known = opened.places if isinstance(opened, _Decoded) else None
            found = _places(opened.labels(), len(opened.size), self.sampler.ignore_index) if known is None else known
            self._places[number] = found
        return self._places[number]

    def _open(self, number: int) -> OpenCase:
        if number in self._kept:
            return self._kept[number]
        file = self._file(number)
        if file is not None and file.is_file():
            return _mapped(file)
        if hasattr(self.cases, "open"):
            opened: OpenCase = self.cases.open(number)
            return opened
        return _decode(self.cases[number])

    def _keep(self, number: int, opened: OpenCase) -> None:
        file = self._file(number)
        if number in self._kept or (file is not None and file.is_file()):
            return
        worker = get_worker_info()
        budget = self.sampler.cache * GIB / (worker.num_workers if worker is not None else 1)
        # What is kept stays: as the order is drawn anew in each epoch, nothing is gained by replacing it.
        if sum(one.nbytes for one in self._kept.values()) + opened.nbytes <= budget:
            self._kept[number] = opened
        elif file is not None and isinstance(opened, _Decoded):
            _write(file, replace(opened, places=self._places_of(number, opened)))

    def _file(self, number: int) -> Path | None:
        """Where a decoded case lies: a name for its files as they are now."""
        if self.sampler.cache_folder is None:
            return None
        stamp: str = self.cases.stamp(number)  # type: ignore[attr-defined]  # `PatchSampler.of` sees to it.
        name = blake2b(f"{stamp} {self.sampler.ignore_index}".encode(), digest_size=16).hexdigest()
        return Path(self.sampler.cache_folder).expanduser() / f"{name}.json"


def _decode(sample: Sample) -> _Decoded:
    image, mask = sample.image.numpy(), sample.mask.numpy()
    if image.shape[1:] != mask.shape[-(image.ndim - 1) :]:
        raise ValueError(f"image and mask of {sample.case} must have one size, got {image.shape} and {mask.shape}")
    return _Decoded(sample.case, image, mask, sample.spacing)


def _places(blocks: Iterable[tuple[int, NDArray[Any]]], axes: int, ignore_index: int | None) -> NDArray[np.int64]:
    """Class and flat index of some pixels of the foreground, `(pixels, 2)`, by class and place.

    Which ones does not hang on the blocks.

    Args:
        blocks: as of `OpenCase.labels`.
        axes: of space.
        ignore_index: the label that is no foreground.
    """
    kept: dict[int, NDArray[np.int64]] = {}
    for first, block in blocks:
        planes = block.ndim > axes
        ids = range(len(block)) if planes else [n for n in np.unique(block).tolist() if n not in (0, ignore_index)]
        for label in ids:
            found = _some(np.flatnonzero(block[label] == 1 if planes else block == label) + first)
            if len(found):
                kept[label] = _some(np.union1d(kept[label], found)) if label in kept else found
    parts = [np.stack([np.full_like(kept[label], label), kept[label]], axis=1) for label in sorted(kept)]
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)


def _some(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most `PLACES` of some ascending indices: those of the smallest hashes, hence as good as drawn."""
    if len(indices) <= PLACES:
        return indices
    # The finalizer of splitmix64.
    key = (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        key = (key ^ (key >> np.uint64(shift))) * np.uint64(factor)
    key ^= key >> np.uint64(31)
    return np.sort(indices[np.argpartition(key, PLACES)[:PLACES]])


def _padded(part: Tensor, margins: Sequence[tuple[int, int]], fill: int | None) -> Tensor:
    """The last axes with a margin: of `fill`, or of the border's values."""
    pairs = [(0, 0)] * (part.ndim - len(margins)) + list(margins)
    array = part.numpy()
    array = np.pad(array, pairs, "edge") if fill is None else np.pad(array, pairs, constant_values=fill)
    return torch.from_numpy(array)


def _write(file: Path, decoded: _Decoded) -> None:
    # One after the other, the description last: where it is, all are.
    for name in PARTS:
        write_atomically(file.with_suffix(f".{name}.npy"), partial(np.save, arr=getattr(decoded, name)))
    text = json.dumps({"case": decoded.case, "spacing": decoded.spacing})
    write_atomically(file, lambda part: part.write_text(text, encoding="utf-8"))


def _mapped(file: Path) -> _Decoded:
    about = json.loads(file.read_text(encoding="utf-8"))
    image, mask, places = (np.load(file.with_suffix(f".{part}.npy"), mmap_mode="r") for part in PARTS)
    spacing = None if about["spacing"] is None else tuple(about["spacing"])
    return _Decoded(about["case"], image, mask, spacing, places)
