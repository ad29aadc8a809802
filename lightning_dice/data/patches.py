"""Training patches of large images, cut before anything else is done with them, and a cache of these images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from lightning_dice.data.batch import Sample
from lightning_dice.data.source import Cases
from lightning_dice.files import write_atomically

PLACES = 10_000  # voxels kept of each class to centre patches on, as in nnU-Net
GIB = 2**30
PARTS = ("image", "mask", "places")


@dataclass(frozen=True)
class PatchSampler:
    """How patches are cut from the cases of a training split.

    By a chance of `foreground` a patch lies around a voxel of a class drawn evenly from the classes that the case has,
    the background apart, as far as the image's borders allow; else it lies anywhere in the image. nnU-Net has the
    foreground in the last third of each batch instead. Where an image is smaller than a patch it lies in the middle:
    the image's border is repeated, and the mask there holds `ignore_index` (without one, 0).

    Args:
        size: of a patch, in pixels along each axis, at the network's spacing.
        foreground: the share of patches that are centred on foreground.
        per_case: patches of each case in an epoch.
        ignore_index: the label of pixels that count as nothing, which is no foreground either.
        cache: GiB of decoded images that each training process keeps in memory; its workers share them out.
        cache_folder: where decoded images that the memory has no room for are kept as files, from which a patch is read
            without the rest; each takes 5 bytes or so per voxel and channel. `None`: they are decoded anew. It may be
            shared by runs: a file is found again by its case's files and settings.

    Raises:
        ValueError: for a setting out of its range.
    """

    size: Sequence[int]
    foreground: float = 1 / 3
    per_case: int = 1
    ignore_index: int | None = 255
    cache: float = 2.0
    cache_folder: str | Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.size, (int, str)) or not all(isinstance(n, int) and n > 0 for n in self.size):
            raise ValueError(f"size must be the pixels of a patch along each axis, got {self.size!r}")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"foreground must be a share of the patches in [0, 1], got {self.foreground!r}")
        if not isinstance(self.per_case, int) or self.per_case < 1:
            raise ValueError(f"per_case must be an integer of at least 1, got {self.per_case!r}")
        if not self.cache >= 0:
            raise ValueError(f"cache must be GiB, at least 0, got {self.cache!r}")
        object.__setattr__(self, "size", tuple(int(n) for n in self.size))

    def of(self, cases: Cases) -> PatchCases:
        """The patches of some cases.

        Raises:
            ValueError: the images have another number of axes than a patch, or `cache_folder` is set for cases that do
                not tell whether they have changed.
        """
        axes = {len(size) for size in cases.sizes[:1]}
        if axes and axes != {len(self.size)}:
            raise ValueError(f"size must be of the images' {axes.pop()} axes, got {list(self.size)} (data.size)")
        if self.cache_folder is not None and not hasattr(cases, "stamp"):
            raise ValueError("cache_folder must be null for these cases, which do not tell whether they have changed")
        return PatchCases(cases, self)


@dataclass(frozen=True)
class _Decoded:
    """A case in memory, or mapped to it.

    Attributes:
        case: its name.
        image: `(channels, *space)`.
        mask: `(*space)` or `(classes, *space)`.
        places: class and flat index of some pixels of the foreground, `(pixels, 2)`, by class.
        spacing: of the mask.
    """

    case: str
    image: NDArray[np.float32]
    mask: NDArray[Any]
    places: NDArray[np.int64]
    spacing: tuple[float, ...] | None

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + self.mask.nbytes + self.places.nbytes


class PatchCases:
    """Patches as a data set: `per_case` of each case, drawn by torch's random state.

    Args:
        cases: whole images with masks of their size.
        sampler: how patches are cut.
    """

    def __init__(self, cases: Cases, sampler: PatchSampler) -> None:
        self.cases, self.sampler = cases, sampler
        self.sizes: Sequence[tuple[int, ...]] = [tuple(sampler.size)] * (len(cases) * sampler.per_case)
        self._kept: dict[int, _Decoded] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in 0 to {len(self) - 1}, got {index}")
        decoded = self._decoded(index // self.sampler.per_case)
        # Of torch's state alone, whatever was read from memory.
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        start = self._start(decoded, rng)
        image = _cut(decoded.image, start, self.sampler.size, None)
        mask = _cut(decoded.mask, start, self.sampler.size, self.sampler.ignore_index or 0)
        return Sample(image, mask, decoded.case, decoded.spacing)

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is started afresh reads for itself.
        return {**self.__dict__, "_kept": {}, "_bytes": 0}

    def _start(self, decoded: _Decoded, rng: np.random.Generator) -> tuple[int, ...]:
        """The first pixel of a patch; below 0 where the image is smaller."""
        space = decoded.image.shape[1:]
        low = [min(0, -((p - n) // 2)) for n, p in zip(space, self.sampler.size, strict=True)]
        high = [max(first, n - p) for first, n, p in zip(low, space, self.sampler.size, strict=True)]
        if rng.random() < self.sampler.foreground and len(decoded.places):
            ids = decoded.places[:, 0]
            first, last = np.searchsorted(ids, rng.choice(np.unique(ids)) + np.arange(2))
            center = np.unravel_index(int(decoded.places[rng.integers(first, last), 1]), space)
            wanted = [int(c) - p // 2 for c, p in zip(center, self.sampler.size, strict=True)]
            return tuple(min(max(w, a), b) for w, a, b in zip(wanted, low, high, strict=True))
        return tuple(int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True))

    def _decoded(self, number: int) -> _Decoded:
        if number in self._kept:
            return self._kept[number]
        file = self._file(number)
        if file is not None and file.is_file():
            return _mapped(file)
        decoded = _decode(self.cases[number], self.sampler.ignore_index)
        worker = get_worker_info()
        budget = self.sampler.cache * GIB / (worker.num_workers if worker is not None else 1)
        # What is kept stays: as the order is drawn anew in each epoch, nothing is gained by replacing it.
        if self._bytes + decoded.nbytes <= budget:
            self._kept[number] = decoded
            self._bytes += decoded.nbytes
        elif file is not None:
            _write(file, decoded)
        return decoded

    def _file(self, number: int) -> Path | None:
        """Where a decoded case lies: a name for its files as they are now."""
        if self.sampler.cache_folder is None:
            return None
        stamp: str = self.cases.stamp(number)  # type: ignore[attr-defined]  # `PatchSampler.of` sees to it.
        name = blake2b(f"{stamp} {self.sampler.ignore_index}".encode(), digest_size=16).hexdigest()
        return Path(self.sampler.cache_folder).expanduser() / f"{name}.json"


def _decode(sample: Sample, ignore_index: int | None) -> _Decoded:
    image, mask = sample.image.numpy(), sample.mask.numpy()
    if image.shape[1:] != mask.shape[-(image.ndim - 1) :]:
        raise ValueError(f"image and mask of {sample.case} must have one size, got {image.shape} and {mask.shape}")
    parts: list[NDArray[np.int64]] = []
    planes = mask.ndim == image.ndim
    ids = range(len(mask)) if planes else [n for n in np.unique(mask).tolist() if n not in (0, ignore_index)]
    for label in ids:
        found = np.flatnonzero(mask[label] == 1 if planes else mask == label)
        if len(found) > PLACES:
            found = np.sort(np.random.default_rng(0).choice(found, PLACES, replace=False))
        parts.append(np.stack([np.full_like(found, label), found], axis=1))
    places = np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)
    return _Decoded(sample.case, image, mask, places, sample.spacing)


def _cut(array: NDArray[Any], start: Sequence[int], size: Sequence[int], fill: int | None) -> Tensor:
    """A patch of the last axes as a tensor of its own; beyond the border `fill`, or the border's values."""
    space = array.shape[-len(size) :]
    inside: list[Any] = [...]
    padding = []
    for first, length, n in zip(start, size, space, strict=True):
        inside.append(slice(max(first, 0), min(first + length, n)))
        padding.append((max(-first, 0), max(first + length - n, 0)))
    patch = np.asarray(array[tuple(inside)])
    if any(any(pair) for pair in padding):
        padding = [(0, 0)] * (array.ndim - len(size)) + padding
        patch = np.pad(patch, padding, "edge") if fill is None else np.pad(patch, padding, constant_values=fill)
    return torch.from_numpy(np.array(patch, order="C"))


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
    return _Decoded(about["case"], image, mask, places, spacing)
