"""A folder of images and masks as a source of cases."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lightning_dice.data.batch import Sample
from lightning_dice.data.layout import Layout, Pair, scan
from lightning_dice.data.masks import MaskFormat, read_masks
from lightning_dice.data.readers import Problem, read_picture, read_size, to_image
from lightning_dice.data.source import Split
from lightning_dice.data.survey import Survey, error, survey


@dataclass(frozen=True)
class FolderCases:
    """The cases of one split of a folder; each is read when it is asked for.

    Attributes:
        pairs: images and masks.
        sizes: `(height, width)` of each image, upright.
        channels: of an image.
        mask_format: how masks are stored.
        planes: masks are one file for each class.
    """

    pairs: Sequence[Pair]
    sizes: Sequence[tuple[int, ...]]
    channels: int
    mask_format: MaskFormat
    planes: bool

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        picture = read_picture(pair.image)
        stored = read_masks(picture, pair.masks, self.mask_format)
        try:
            mask = self.mask_format.encode(stored, self.planes)
        except ValueError as wrong:
            names = ", ".join(map(str, pair.masks))
            raise Problem(str(wrong), names, "Set data.values or data.classes.") from wrong
        return Sample(to_image(picture, self.channels), mask, pair.case)


class FolderSource:
    """Images and masks as people have them: two folders, with or without `train`, `val` and `test` in them.

    An image and its mask have the same stem, up to customary endings such as `_mask`, `_gt` or `_image`. PNG, JPEG,
    BMP and TIFF are read, 8 and 16 bit and floats, gray, RGB, with alpha or a palette. With split folders for train
    and test alone, val is drawn from train; with none, all splits are drawn. A split without cases is `None`.

    With `activation="sigmoid"`, a folder of masks may hold one folder for each class, named as in `classes`, with a
    mask for every image: for labels that overlap.

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
    ) -> None:
        if not root:
            raise ValueError(f"root must name a folder, got {root!r}; set data.root=/path/to/folder")
        if channels < 1:
            raise ValueError(f"channels must be 1 or more, got {channels}; set data.channels=3 for RGB")
        shares = tuple(float(part) for part in fractions)
        if len(shares) != 3 or min(shares) < 0 or shares[0] == 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise ValueError(
                f"fractions must be the shares of train, val and test, which sum to 1, got {list(shares)}; "
                "for instance 'data.fractions=[0.7,0.15,0.15]'"
            )
        if workers is not None and workers < 0:
            raise ValueError(f"workers must be 0 or more, got {workers}")
        self.root = Path(root).expanduser()
        self.mask_format = mask_format
        self.channels = int(channels)
        self.images, self.masks = str(images), str(masks)
        self.fractions, self.seed = shares, int(seed)
        self.workers = max(min(8, os.cpu_count() or 1) if workers is None else workers, 1)
        self._layout: Layout | None = None
        self._cases: dict[Split, FolderCases] = {}

    def check(self) -> str:
        """Read everything once.

        Returns:
            Cases, sizes and depth of each split, each class's share of pixels and the cases it occurs in, warnings.

        Raises:
            DataError: with everything that is wrong: file, reason, remedy.
        """
        return self.survey().report(self.root)

    def survey(self) -> Survey:
        """What `check` finds, in numbers.

        Raises:
            DataError: as in `check`.
        """
        layout = self._scan()
        found = survey(layout, self.channels, self.mask_format, self.workers)
        problems = [*layout.problems, *found.problems()]
        if problems:
            raise error(self.root, problems)
        return found

    def split(self, name: Split) -> FolderCases | None:
        """The cases of a split, or `None` where the folder has no such split.

        Raises:
            DataError: where images and masks do not pair, or a header cannot be read.
        """
        layout = self._scan()
        if layout.problems:
            raise error(self.root, layout.problems)
        if name not in layout.pairs:
            return None
        if name not in self._cases:
            pairs = layout.pairs[name]
            with ThreadPoolExecutor(self.workers) as pool:
                sizes = list(pool.map(read_size, [pair.image for pair in pairs]))
            self._cases[name] = FolderCases(pairs, sizes, self.channels, self.mask_format, layout.planes)
        return self._cases[name]

    def _scan(self) -> Layout:
        if self._layout is None:
            planes = self.mask_format.classes if self.mask_format.activation == "sigmoid" else ()
            self._layout = scan(self.root, self.images, self.masks, planes, self.fractions, self.seed)
        return self._layout
