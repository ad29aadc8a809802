"""Images and their masks, two by two: what all sources of pictures share."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image

from lightning_dice.data.errors import DataError, DataProblem, combined_error
from lightning_dice.data.images.annotators import Raters
from lightning_dice.data.images.dataset_summary import Survey, survey
from lightning_dice.data.images.datasets import FolderCases, TiledCases
from lightning_dice.data.images.file_layout import Layout, scan
from lightning_dice.data.images.file_patterns import check_pattern, names_files
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import read_size
from lightning_dice.data.images.mask_format import MaskFormat
from lightning_dice.data.images.prediction_io import ImagePredictionIO
from lightning_dice.data.interfaces import Split
from lightning_dice.data.splits import check_fractions, check_splits

__all__ = ["FolderCases", "FolderSource"]


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
        self.fractions, self.seed = check_fractions(fractions), int(seed)
        self.workers = count_workers(workers)

    @property
    def channels(self) -> int:
        """Of the images as the network sees them."""
        return self.image_format.channels

    @property
    def reader(self) -> ImagePredictionIO:
        """Reads further images as these are read, and writes masks as these are stored."""
        return ImagePredictionIO(self.mask_format, self.image_format)

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
            raise combined_error(self.root, problems)
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
            raise combined_error(self.root, layout.problems)
        if name not in layout.pairs:
            return None
        if name not in self._cases:
            cases = self._open(name, partial(read_size, whole=False))
            sized = zip(cases.pairs, cases.sizes, strict=True)
            beyond = [self._beyond(pair.image, size) for pair, size in sized if self._is_beyond(name, size)]
            if beyond:
                raise combined_error(self.root, beyond)
            self._cases[name] = cases if name == "train" or self.tile is None else TiledCases(cases, self.tile)
        return self._cases[name]

    def _is_beyond(self, split: Split, size: Sequence[int]) -> bool:
        limit = Image.MAX_IMAGE_PIXELS
        return split != "train" and self.tile is None and limit is not None and math.prod(size) > limit

    def _beyond(self, path: Path, size: Sequence[int]) -> DataProblem:
        what = f"is too large to be scored whole: {size[0]}x{size[1]} pixels, more than {Image.MAX_IMAGE_PIXELS}"
        return DataProblem(what, path, "Set data.tile=4096 to score it in tiles.")

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


def count_workers(workers: int | None) -> int:
    """Threads to read with: as many as wanted, by default up to 8.

    Raises:
        ValueError: fewer than none.
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    return max(min(8, os.cpu_count() or 1) if workers is None else workers, 1)


class FolderSource(PairSource):
    """Images and masks as people have them: two folders, with or without `train`, `val` and `test` in them.

    An image and its mask have the same stem, up to customary endings such as `_mask`, `_gt` or `_image`. PNG, JPEG,
    BMP, TIFF and NumPy files are read, 8 and 16 bit and floats, gray, RGB, with alpha or a palette, and of any number
    of channels. With split folders for train and test alone, val is drawn from train; with none, all splits are drawn.
    A split without cases is `None`. Links are followed.

    **Patterns.** With `{case}` in them, `images` and `masks` are patterns of files, in which `*` stands for any part of
    a name: `leftImg8bit/{split}/*/{case}_leftImg8bit.png`. Masks then bear the images' names, without customary
    endings; the suffix may be left out.

    **A mask for each class.** A folder of masks may hold one folder for each class, named as in `classes`, with a mask
    for every image; or `{class}` stands for the name in `masks`, as in `masks/{split}/{case}_{class}`. With
    `activation="sigmoid"` classes may overlap. With `"softmax"` no two may share a pixel, and the background, the
    first class, may do without. Masks whose channels are the classes: `MaskFormat(multichannel_masks=True)`.

    **Several raters.** Each has a folder of his name in that of the masks, or `{rater}` stands for it in `masks`. See
    `Raters` for what is made of their masks.

    Args:
        root: the folder.
        mask_format: the classes, and how masks are stored.
        channels: of the images as the net sees them: 1 for gray, 3 for RGB (gray is repeated).
        images: where the images are, under `root`. `{split}` stands for the split; without it, folders `train`, `val`
            and `test` are looked for inside.
        masks: the same for the masks, such as `masks/{split}/rater1`.
        fractions: of the cases for train, val and test, where there are no folders for them.
        seed: of this draw.
        workers: threads that `check` reads with; by default up to 8.
        split_files: text files that name the cases of each split, under `root`: `ImageSets/Segmentation/{split}.txt`. Images
            that none of them names are left out.
        splits: what stands for `{split}`, such as `{"train": "train2017", "val": "val2017"}`; a split that is not
            named, or `None`, is left out.
        raters: names, where several people have made masks of every image.
        fusion: what training sees of them, and
        reference: what evaluation sees, as in `Raters`.
        bands: which channels the images are, and
        max_value: the value that becomes 1, and
        nodata: that of pixels without an image, as in `ImageFormat`.
        tile: pixels; images for validation and test of more rows or columns are cut into cases of their own, whose
            names end with the row and the column of their first pixel: `scene@4096-0`.

    Raises:
        ValueError: for settings that cannot be.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name, value in {"images/a": 9, "images/b": 7, "masks/a_mask": 1, "masks/b_mask": 0}.items():
    ...         path = Path(folder) / f"{name}.png"
    ...         path.parent.mkdir(exist_ok=True)
    ...         Image.new("L", (5, 4), value).save(path)
    ...     source = FolderSource(folder, MaskFormat(["background", "lesion"]), channels=1)
    ...     print(source.check().replace(folder, "folder"))
    folder: 2 cases, masks of ids, softmax
    <BLANKLINE>
    split  cases  height x width  images
    train  1      4x5             8-bit gray
    val    1      4x5             8-bit gray
    <BLANKLINE>
    pixels (cases)  train     val
    background      0% (0)    100% (1)
    lesion          100% (1)  0% (0)
    <BLANKLINE>
    Warning: class 'background' never occurs in the train split
    """

    def __init__(
        self,
        root: str | Path,
        mask_format: MaskFormat,
        channels: int = 3,
        images: str = "images",
        masks: str = "masks",
        fractions: Sequence[float] = (0.7, 0.15, 0.15),
        seed: int = 0,
        workers: int | None = None,
        *,
        split_files: str | None = None,
        splits: Mapping[Split, str | None] | None = None,
        raters: Sequence[str] | None = None,
        fusion: str = "mean",
        reference: str = "majority",
        bands: Sequence[int] | None = None,
        max_value: float | None = None,
        nodata: float | None = None,
        tile: int | None = None,
    ) -> None:
        people = None if raters is None else Raters(raters, fusion, reference)
        image_format = ImageFormat(channels, bands, max_value, nodata)
        super().__init__(root, image_format, mask_format, fractions, seed, workers, people, tile)
        self.images = check_pattern(str(images), "images", ["split", "case"])
        self.masks = check_pattern(str(masks), "masks", ["split", "case", "class", "rater"])
        self.split_files = None if split_files is None else check_pattern(str(split_files), "split_files", ["split"])
        self.splits = check_splits(splits)
        if people is None and "{rater}" in self.masks:
            raise ValueError(f"raters must name who {{rater}} in masks={self.masks!r} stands for, got none")
        if people is not None and names_files(self.masks) and "{rater}" not in self.masks:
            raise ValueError(f"masks must have {{rater}} in it, where it names files of several raters: {self.masks!r}")
        if mask_format.multichannel_masks and "{class}" in self.masks:
            raise ValueError("stacked masks hold all classes in one file: leave {class} out of masks")
        if self.split_files is not None and "{split}" not in self.split_files:
            raise ValueError(f"split_files must have {{split}} in it, got {self.split_files!r}")
        if people is not None and people.fusion == "mean" and mask_format.ignore_index is None:
            raise ValueError("fusion=mean needs an ignore_index, for what augmentation leaves without a label")

    def _scan(self) -> Layout:
        form, people = self.mask_format, self.raters
        layout = scan(
            self.root,
            self.images,
            self.masks,
            () if form.multichannel_masks else form.classes,
            self.fractions,
            self.seed,
            background=form.background,
            raters=() if people is None else people.files,
            split_files=self.split_files,
            splits=self.splits,
        )
        if form.multichannel_masks:
            layout.planes = tuple(form.classes)
        return layout
