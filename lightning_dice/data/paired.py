"""Images and their masks, two by two: what all sources of pictures share."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_dice.data.batch import Sample
from lightning_dice.data.images import ImageFormat
from lightning_dice.data.layout import Layout, Pair
from lightning_dice.data.masks import MaskFormat, read_masks
from lightning_dice.data.pictures import PictureReader
from lightning_dice.data.raters import Raters, fuse
from lightning_dice.data.readers import Picture, Problem, read_picture, read_size
from lightning_dice.data.source import DataError, Split
from lightning_dice.data.survey import Survey, error, survey


@dataclass(frozen=True)
class FolderCases:
    """The cases of one split of pairs of files; each is read when it is asked for.

    Attributes:
        pairs: images and masks.
        sizes: `(height, width)` of each image, upright.
        image_format: how images are stored.
        mask_format: how masks are stored.
        planes: the classes of a mask's planes; empty for masks of ids.
        raters: who made the masks, if several people did.
        way: what is made of their masks: `fusion` or `reference` of `Raters`.
    """

    pairs: Sequence[Pair]
    sizes: Sequence[tuple[int, ...]]
    image_format: ImageFormat
    mask_format: MaskFormat
    planes: Sequence[str] = ()
    raters: Raters | None = None
    way: str = "majority"

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        picture = read_picture(pair.image)
        mask = self._mask(pair, picture)
        missing = self.image_format.missing(picture)
        if missing is not None:
            mask = _ignoring(mask, torch.from_numpy(missing), self.mask_format)
        return Sample(self.image_format.image(picture), mask, pair.case)

    def _mask(self, pair: Pair, picture: Picture) -> Tensor:
        if self.raters is None:
            return self._one(pair, picture, 0, 1)
        count = len(self.raters.files)
        masks = [self._one(pair, picture, index, count) for index in self.raters.chosen(self.way)]
        if len(masks) == 1:
            return masks[0]
        return fuse(masks, "mean" if self.way == "mean" else "majority", self.mask_format)

    def _one(self, pair: Pair, picture: Picture, index: int, count: int) -> Tensor:
        """The mask of one of several raters."""
        each = len(pair.masks) // count
        files = pair.masks[index * each : (index + 1) * each]
        stored = read_masks(picture, files, self.mask_format)
        try:
            return self.mask_format.encode(stored, bool(self.planes))
        except ValueError as wrong:
            raise Problem(str(wrong), ", ".join(map(str, files)), "Set data.values or data.classes.") from wrong


def _ignoring(mask: Tensor, where: Tensor, mask_format: MaskFormat) -> Tensor:
    label = mask_format.ignore_index
    if label is None:
        raise ValueError("nodata needs an ignore_index, by which masks say so; set data.ignore_index=255")
    fits = mask.is_floating_point() or torch.iinfo(mask.dtype).min <= label <= torch.iinfo(mask.dtype).max
    return (mask if fits else mask.int()).masked_fill(where, label)


class PictureSource(ABC):
    """A source of pictures: what is said of them, and what reads further ones.

    Attributes:
        root: the folder.
        image_format: how images are stored.
        mask_format: how masks are stored.
        fractions: of the cases for train, val and test, where there is nothing that says so.
        seed: of this draw.
        workers: threads that read.

    Raises:
        ValueError: for settings that cannot be.
    """

    def __init__(
        self,
        root: str | Path,
        image_format: ImageFormat,
        mask_format: MaskFormat,
        fractions: Sequence[float],
        seed: int,
        workers: int | None,
    ) -> None:
        if not root:
            raise ValueError(f"root must name a folder, got {root!r}; set data.root=/path/to/folder")
        self.root = Path(root).expanduser()
        self.image_format = image_format
        self.mask_format = mask_format
        self.fractions, self.seed = checked_fractions(fractions), int(seed)
        self.workers = count_workers(workers)

    @property
    def channels(self) -> int:
        """Of the images as the network sees them."""
        return self.image_format.channels

    @property
    def reader(self) -> PictureReader:
        """Reads further images as these are read, and writes masks as these are stored."""
        return PictureReader(self.mask_format, self.image_format)

    def check(self) -> str:
        """Read everything once.

        Returns:
            Cases, sizes and depth of each split, each class's share of pixels and the cases it occurs in, warnings.

        Raises:
            DataError: with everything that is wrong: file, reason, remedy.
        """
        return self.survey().report(self.root)

    @abstractmethod
    def survey(self) -> Survey:
        """What `check` finds, in numbers.

        Raises:
            DataError: as in `check`.
        """


class PairSource(PictureSource):
    """A source of images and masks that are files; what finds them is another class's business.

    Attributes:
        raters: who made the masks, if several people did.

    Raises:
        ValueError: for settings that cannot be.
    """

    def __init__(
        self,
        root: str | Path,
        image_format: ImageFormat,
        mask_format: MaskFormat,
        fractions: Sequence[float],
        seed: int,
        workers: int | None,
        raters: Raters | None = None,
    ) -> None:
        super().__init__(root, image_format, mask_format, fractions, seed, workers)
        if image_format.nodata is not None and mask_format.ignore_index is None:
            raise ValueError("nodata needs an ignore_index, by which masks say so; set data.ignore_index=255")
        self.raters = raters
        self._layout: Layout | None = None
        self._cases: dict[Split, FolderCases] = {}
        self._kinds: dict[tuple[Split, str], str] = {}

    @abstractmethod
    def _scan(self) -> Layout:
        """Find the files; called once."""

    def survey(self) -> Survey:
        """What `check` finds, in numbers.

        Raises:
            DataError: as in `check`.
        """
        layout = self.layout()
        found = survey(layout, self.image_format, self.mask_format, self.workers)
        self._kinds = {(split, one.pair.case): one.kind for split, part in found.facts.items() for one in part}
        problems = [*layout.problems, *found.problems()]
        if problems:
            raise error(self.root, problems)
        return found

    def split(self, name: Split) -> FolderCases | None:
        """The cases of a split, or `None` where there is no such split.

        Of several raters, train has their masks as `fusion` says, the other splits as `reference` does.

        Raises:
            DataError: where images and masks do not pair, or a header cannot be read.
        """
        layout = self.layout()
        if layout.problems:
            raise error(self.root, layout.problems)
        if name not in layout.pairs:
            return None
        if name not in self._cases:
            self._cases[name] = self._open(name, read_size)
        return self._cases[name]

    def readable(self, name: Split) -> FolderCases | None:
        """The cases of a split whose files belong together; each may fail when it is read, and has then no size."""
        return self._open(name, _size_if_readable) if name in self.layout().pairs else None

    def kinds(self) -> dict[tuple[Split, str], str]:
        """Depth and colour of each image that `check` has read, by split and case."""
        return {case: kind for case, kind in self._kinds.items() if kind}

    def _open(self, name: Split, size: Callable[[Path], tuple[int, int]]) -> FolderCases:
        layout = self.layout()
        pairs = layout.pairs[name]
        with ThreadPoolExecutor(self.workers) as pool:
            sizes = list(pool.map(size, [pair.image for pair in pairs]))
        way = "majority" if self.raters is None else self.raters.fusion if name == "train" else self.raters.reference
        return FolderCases(pairs, sizes, self.image_format, self.mask_format, layout.planes, self.raters, way)

    def layout(self) -> Layout:
        """Which files there are, and which belong together."""
        if self._layout is None:
            self._layout = self._scan()
        return self._layout


def _size_if_readable(path: Path) -> tuple[int, int]:
    try:
        return read_size(path)
    except DataError:
        return 0, 0


def checked_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """The shares of train, val and test.

    Raises:
        ValueError: they do not sum to 1, or leave nothing to train on.
    """
    shares = tuple(float(part) for part in fractions)
    if len(shares) != 3 or min(shares) < 0 or shares[0] == 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(
            f"fractions must be the shares of train, val and test, which sum to 1, got {list(shares)}; "
            "for instance 'data.fractions=[0.7,0.15,0.15]'"
        )
    return shares[0], shares[1], shares[2]


def count_workers(workers: int | None) -> int:
    """Threads to read with: as many as wanted, by default up to 8.

    Raises:
        ValueError: fewer than none.
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    return max(min(8, os.cpu_count() or 1) if workers is None else workers, 1)
