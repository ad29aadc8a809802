"""Sources of 2D images and masks; `FolderSource` finds them in folders or by patterns."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image

from lightning_dice.data.errors import DataError, DataProblem, combined_error
from lightning_dice.data.images.dataset_summary import Survey, survey_layout
from lightning_dice.data.images.datasets import FolderCases, TiledCases
from lightning_dice.data.images.file_layout import Layout, find_pairs
from lightning_dice.data.images.file_patterns import check_pattern, is_file_pattern
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import read_size
from lightning_dice.data.images.mask_format import MaskFormat
from lightning_dice.data.images.prediction_io import ImagePredictionIO
from lightning_dice.data.images.raters import Raters
from lightning_dice.data.images.tiff_library import require_tiff_library
from lightning_dice.data.interfaces import Split
from lightning_dice.data.splits import SplitSettings


class ImageSource(ABC):
    """Base class of sources of 2D images.

    Args:
        root: the folder.
        mask_format: the classes, and how masks are stored.
        image_format: how images are stored, and how they become the network's input; by default three channels.
        split_settings: how cases are divided into splits; by default 70, 15 and 15 percent.
        workers: threads that read; by default up to 8.

    Raises:
        ValueError: for an empty `root` or negative `workers`.
    """

    def __init__(
        self,
        root: str | Path,
        mask_format: MaskFormat,
        image_format: ImageFormat | None,
        split_settings: SplitSettings | None,
        workers: int | None,
    ) -> None:
        if not root:
            raise ValueError(f"root must name a folder, got {root!r}; set data.root=/path/to/folder")
        if workers is not None and workers < 0:
            raise ValueError(f"workers must be 0 or more, got {workers}")
        self.root = Path(root).expanduser()
        self.mask_format = mask_format
        self.image_format = image_format or ImageFormat()
        self.split_settings = split_settings or SplitSettings()
        self.workers = max(min(8, os.cpu_count() or 1) if workers is None else workers, 1)

    @property
    def channels(self) -> int:
        """Channels of the network's input."""
        return self.image_format.channels

    @property
    def reader(self) -> ImagePredictionIO:
        """Reads further images as these are read, and writes masks as these are stored."""
        return ImagePredictionIO(self.mask_format, self.image_format)

    def check(self) -> str:
        """Read everything once.

        Returns:
            A report: cases, sizes and depth of each split, each class's share of pixels and the cases it occurs in,
            warnings.

        Raises:
            DataError: listing every problem with its file, reason and remedy.
        """
        return self.survey().report(self.root)

    @abstractmethod
    def survey(self) -> Survey:
        """Return the findings of `check` as numbers.

        Raises:
            DataError: as by `check`.
        """


class ImageFileSource(ImageSource):
    """Base class of sources whose images and masks are files; a subclass finds the files.

    Args:
        root: this and the following five as in `ImageSource`.
        mask_format: see above.
        image_format: see above.
        split_settings: see above.
        workers: see above.
        raters: who made the masks, if each image has several.
        tile: pixels; images for validation and test with more rows or columns are cut into cases of their own, see
            `TiledCases`. `None`: images stay whole.

    Raises:
        ValueError: `tile` is less than 1, or `image_format` has a `nodata` value and `mask_format` no `ignore_index`.
    """

    def __init__(
        self,
        root: str | Path,
        mask_format: MaskFormat,
        image_format: ImageFormat | None,
        split_settings: SplitSettings | None,
        workers: int | None,
        raters: Raters | None = None,
        tile: int | None = None,
    ) -> None:
        super().__init__(root, mask_format, image_format, split_settings, workers)
        if tile is not None and (not isinstance(tile, int) or tile < 1):
            raise ValueError(f"tile must be None or pixels, at least 1, got {tile!r}")
        if self.image_format.nodata is not None and mask_format.ignore_index is None:
            raise ValueError("nodata needs an ignore_index to mark its pixels in masks; set data.ignore_index=255")
        self.tile = tile
        self.raters = raters if raters is not None and raters.names else None
        self._layout: Layout | None = None
        self._cases: dict[Split, FolderCases | TiledCases] = {}
        self._kinds: dict[tuple[Split, str], str] = {}

    @abstractmethod
    def _find_files(self) -> Layout:
        """Find the files; called once."""

    def survey(self) -> Survey:
        """Return the findings of `check` as numbers.

        Raises:
            DataError: as by `check`.
        """
        layout = self.layout()
        found = survey_layout(layout, self.image_format, self.mask_format, self.workers)
        self._kinds = {(split, one.pair.case): one.kind for split, part in found.facts.items() for one in part}
        problems = [*layout.problems, *found.problems()]
        for split, part in found.facts.items():
            images = [(one.pair.image, one.size) for one in part]
            problems += self._too_large_to_score(split, images)
        if problems:
            raise combined_error(self.root, problems)
        return found

    def split(self, name: Split) -> FolderCases | TiledCases | None:
        """Return the cases of a split, or `None` if there is no such split.

        The masks of several raters are combined by `fusion` for train, and by `reference` for the other splits, whose
        large images are cut into tiles.

        Raises:
            DataError: images and masks do not match, a header cannot be read, or an image for validation or test is
                too large to be scored whole.
        """
        layout = self.layout()
        if layout.problems:
            raise combined_error(self.root, layout.problems)
        if name not in layout.pairs:
            return None
        if name not in self._cases:
            cases = self._open(name, partial(read_size, whole=False))
            images = [(pair.image, size) for pair, size in zip(cases.pairs, cases.sizes, strict=True)]
            if problems := self._too_large_to_score(name, images):
                raise combined_error(self.root, problems)
            self._cases[name] = cases if name == "train" or self.tile is None else TiledCases(cases, self.tile)
        return self._cases[name]

    def readable(self, name: Split) -> FolderCases | None:
        """Return the cases of a split whose files match; reading one may fail, and its size is then `(0, 0)`."""
        return self._open(name, _size_if_readable) if name in self.layout().pairs else None

    def kinds(self) -> dict[tuple[Split, str], str]:
        """Return depth and colour of each image that `check` has read, by split and case."""
        return {case: kind for case, kind in self._kinds.items() if kind}

    def layout(self) -> Layout:
        """Return the files, and which belong together.

        Raises:
            MissingExtra: there are TIFFs, and the libraries that read them are not installed.
        """
        if self._layout is None:
            self._layout = self._find_files()
            pairs = [pair for pairs in self._layout.pairs.values() for pair in pairs]
            files = [file for pair in pairs for file in (pair.image, *pair.masks)]
            require_tiff_library(file for file in files if isinstance(file, Path))
        return self._layout

    def _open(self, name: Split, read: Callable[[Path], tuple[int, int]]) -> FolderCases:
        layout = self.layout()
        pairs = layout.pairs[name]
        with ThreadPoolExecutor(self.workers) as pool:
            sizes = list(pool.map(read, [pair.image for pair in pairs]))
        fusion = "majority"
        if self.raters is not None:
            fusion = self.raters.fusion if name == "train" else self.raters.reference
        return FolderCases(pairs, sizes, self.image_format, self.mask_format, layout.planes, self.raters, fusion)

    def _too_large_to_score(self, split: Split, images: Sequence[tuple[Path, Sequence[int]]]) -> list[DataProblem]:
        limit = Image.MAX_IMAGE_PIXELS
        if split == "train" or self.tile is not None or limit is None:
            return []
        what = "is too large to be scored whole: {}x{} pixels, more than {}"
        remedy = "Set data.tile=4096 to score it in tiles."
        return [
            DataProblem(what.format(*size, limit), path, remedy) for path, size in images if math.prod(size) > limit
        ]


def _size_if_readable(path: Path) -> tuple[int, int]:
    try:
        return read_size(path, whole=False)
    except DataError:
        return 0, 0


class FolderSource(ImageFileSource):
    """Images and masks in two folders, with or without `train`, `val` and `test` in them.

    An image and its mask have the same stem, up to customary endings such as `_mask`, `_gt` or `_image`. PNG, JPEG,
    BMP, TIFF and NumPy files are read: 8 and 16 bit and floats; gray, RGB, with alpha or a palette; any number of
    channels. If there are split folders for train and test only, val is drawn from train; if there are none, all splits
    are drawn. A split without cases is `None`. Links are followed.

    **Patterns.** `images` and `masks` with `{case}` in them are patterns of files, in which `*` matches any part of a
    name: `leftImg8bit/{split}/*/{case}_leftImg8bit.png`. Masks then have the names of the images, without customary
    endings; the extension may be left out.

    **A mask for each class.** A folder of masks may hold one folder for each class, named as in `classes`, with a mask
    for every image; or `masks` has `{class}` in it, `masks/{split}/{case}_{class}`. With `activation="sigmoid"` classes
    may overlap. With `"softmax"` no two classes may share a pixel, and the background, the first class, needs no masks.
    For masks whose channels are the classes, set `MaskFormat(multichannel_masks=True)`.

    **Several raters.** Each has a folder of their name in the folder of masks, or `masks` has `{rater}` in it. `Raters`
    describes how their masks are combined.

    Args:
        root: the folder.
        mask_format: the classes, and how masks are stored.
        image_format: how images are stored, and how they become the network's input; by default three channels.
        images: where the images are below `root`. `{split}` stands for the split; without it, folders `train`, `val`
            and `test` are looked for inside.
        masks: the same for the masks, such as `masks/{split}/rater1`.
        split_settings: the names of the splits, or how they are drawn.
        raters: who made the masks, if each image has several.
        tile: pixels; images for validation and test with more rows or columns are cut into cases of their own, named
            after the row and the column of their first pixel: `scene@4096-0`.
        workers: threads that `check` reads with; by default up to 8.

    Raises:
        ValueError: settings are invalid, or contradict each other.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name, value in {"images/a": 9, "images/b": 7, "masks/a_mask": 1, "masks/b_mask": 0}.items():
    ...         path = Path(folder) / f"{name}.png"
    ...         path.parent.mkdir(exist_ok=True)
    ...         Image.new("L", (5, 4), value).save(path)
    ...     source = FolderSource(folder, MaskFormat(["background", "lesion"]), ImageFormat(channels=1))
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
        image_format: ImageFormat | None = None,
        *,
        images: str = "images",
        masks: str = "masks",
        split_settings: SplitSettings | None = None,
        raters: Raters | None = None,
        tile: int | None = None,
        workers: int | None = None,
    ) -> None:
        super().__init__(root, mask_format, image_format, split_settings, workers, raters, tile)
        self.images = check_pattern(str(images), "images", ["split", "case"])
        self.masks = check_pattern(str(masks), "masks", ["split", "case", "class", "rater"])
        if self.raters is None and "{rater}" in self.masks:
            raise ValueError(f"raters must list the names for {{rater}} in masks={self.masks!r}, got none")
        if self.raters is not None and is_file_pattern(self.masks) and "{rater}" not in self.masks:
            raise ValueError(f"masks must have {{rater}} in it to name files of several raters, got {self.masks!r}")
        if mask_format.multichannel_masks and "{class}" in self.masks:
            raise ValueError(
                f"masks must not have {{class}} in it with multichannel_masks=true, since one file holds all classes; "
                f"got {self.masks!r}"
            )
        if self.raters is not None and self.raters.fusion == "mean" and mask_format.ignore_index is None:
            raise ValueError("fusion=mean needs an ignore_index, for pixels that augmentation leaves without a label")

    def _find_files(self) -> Layout:
        mask_format, raters = self.mask_format, self.raters
        layout = find_pairs(
            self.root,
            self.images,
            self.masks,
            self.split_settings,
            planes=() if mask_format.multichannel_masks else mask_format.classes,
            background=mask_format.background,
            raters=() if raters is None else raters.files,
        )
        if mask_format.multichannel_masks:
            layout.planes = tuple(mask_format.classes)
        return layout
