"""A folder of images and masks as a source of cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_dice.data.images.annotators import Raters
from lightning_dice.data.images.datasets import FolderCases
from lightning_dice.data.images.file_layout import Layout, check_splits, scan
from lightning_dice.data.images.file_patterns import check_pattern, names_files
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.mask_format import MaskFormat
from lightning_dice.data.images.sources import PairSource
from lightning_dice.data.interfaces import Split

__all__ = ["FolderCases", "FolderSource"]


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
    first class, may do without. Masks whose channels are the classes: `MaskFormat(stacked=True)`.

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
        lists: text files that name the cases of each split, under `root`: `ImageSets/Segmentation/{split}.txt`. Images
            that none of them names are left out.
        splits: what stands for `{split}`, such as `{"train": "train2017", "val": "val2017"}`; a split that is not
            named, or `None`, is left out.
        raters: names, where several people have made masks of every image.
        fusion: what training sees of them, and
        reference: what evaluation sees, as in `Raters`.
        bands: which channels the images are, and
        white: the value that becomes 1, and
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
        lists: str | None = None,
        splits: Mapping[Split, str | None] | None = None,
        raters: Sequence[str] | None = None,
        fusion: str = "mean",
        reference: str = "majority",
        bands: Sequence[int] | None = None,
        white: float | None = None,
        nodata: float | None = None,
        tile: int | None = None,
    ) -> None:
        people = None if raters is None else Raters(raters, fusion, reference)
        image_format = ImageFormat(channels, bands, white, nodata)
        super().__init__(root, image_format, mask_format, fractions, seed, workers, people, tile)
        self.images = check_pattern(str(images), "images", ["split", "case"])
        self.masks = check_pattern(str(masks), "masks", ["split", "case", "class", "rater"])
        self.lists = None if lists is None else check_pattern(str(lists), "lists", ["split"])
        self.splits = check_splits(splits)
        if people is None and "{rater}" in self.masks:
            raise ValueError(f"raters must name who {{rater}} in masks={self.masks!r} stands for, got none")
        if people is not None and names_files(self.masks) and "{rater}" not in self.masks:
            raise ValueError(f"masks must have {{rater}} in it, where it names files of several raters: {self.masks!r}")
        if mask_format.stacked and "{class}" in self.masks:
            raise ValueError("stacked masks hold all classes in one file: leave {class} out of masks")
        if self.lists is not None and "{split}" not in self.lists:
            raise ValueError(f"lists must have {{split}} in it, got {self.lists!r}")
        if people is not None and people.fusion == "mean" and mask_format.ignore_index is None:
            raise ValueError("fusion=mean needs an ignore_index, for what augmentation leaves without a label")

    def _scan(self) -> Layout:
        form, people = self.mask_format, self.raters
        layout = scan(
            self.root,
            self.images,
            self.masks,
            () if form.stacked else form.classes,
            self.fractions,
            self.seed,
            background=form.background,
            raters=() if people is None else people.files,
            lists=self.lists,
            splits=self.splits,
        )
        if form.stacked:
            layout.planes = tuple(form.classes)
        return layout
