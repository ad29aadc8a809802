"""Images and their masks, two by two: what all sources of pictures share."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image

from lightning_dice.data.images.annotators import Raters
from lightning_dice.data.images.dataset_summary import Survey, error, survey
from lightning_dice.data.images.datasets import FolderCases, TiledCases
from lightning_dice.data.images.file_layout import Layout
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import Problem, read_size
from lightning_dice.data.images.mask_format import MaskFormat
from lightning_dice.data.images.prediction_io import PictureReader
from lightning_dice.data.interfaces import DataError, Split


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
        tile: pixels; images for validation and test of more rows or columns are cut into cases of their own, as
            `TiledCases` does. `None`: none are.

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
        tile: int | None = None,
    ) -> None:
        super().__init__(root, image_format, mask_format, fractions, seed, workers)
        if tile is not None and (not isinstance(tile, int) or tile < 1):
            raise ValueError(f"tile must be None or pixels, at least 1, got {tile!r}")
        self.tile = tile
        if image_format.nodata is not None and mask_format.ignore_index is None:
            raise ValueError("nodata needs an ignore_index, by which masks say so; set data.ignore_index=255")
        self.raters = raters
        self._layout: Layout | None = None
        self._cases: dict[Split, FolderCases | TiledCases] = {}
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
        for split, part in found.facts.items():
            problems += [self._beyond(one.pair.image, one.size) for one in part if self._is_beyond(split, one.size)]
        if problems:
            raise error(self.root, problems)
        return found

    def split(self, name: Split) -> FolderCases | TiledCases | None:
        """The cases of a split, or `None` where there is no such split.

        Of several raters, train has their masks as `fusion` says, the other splits as `reference` does. Of the other
        splits large images are cut as `tile` says.

        Raises:
            DataError: where images and masks do not pair, a header cannot be read, or an image for validation or test
                is too large to be scored whole.
        """
        layout = self.layout()
        if layout.problems:
            raise error(self.root, layout.problems)
        if name not in layout.pairs:
            return None
        if name not in self._cases:
            cases = self._open(name, partial(read_size, whole=False))
            sized = zip(cases.pairs, cases.sizes, strict=True)
            beyond = [self._beyond(pair.image, size) for pair, size in sized if self._is_beyond(name, size)]
            if beyond:
                raise error(self.root, beyond)
            self._cases[name] = cases if name == "train" or self.tile is None else TiledCases(cases, self.tile)
        return self._cases[name]

    def _is_beyond(self, split: Split, size: Sequence[int]) -> bool:
        limit = Image.MAX_IMAGE_PIXELS
        return split != "train" and self.tile is None and limit is not None and math.prod(size) > limit

    def _beyond(self, path: Path, size: Sequence[int]) -> Problem:
        what = f"is too large to be scored whole: {size[0]}x{size[1]} pixels, more than {Image.MAX_IMAGE_PIXELS}"
        return Problem(what, path, "Set data.tile=4096 to score it in tiles.")

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
        return read_size(path, whole=False)
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
