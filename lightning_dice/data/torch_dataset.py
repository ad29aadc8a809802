"""Any map-style data set of images and masks, such as torchvision's own, as a source of cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_dice.data.batch import Sample
from lightning_dice.data.errors import DataError, DataProblem, combined_error
from lightning_dice.data.images.dataset_summary import ImageFacts, Survey, record_image, record_masks
from lightning_dice.data.images.file_layout import Layout, Pair
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import DecodedImage, default_max_value, read_palette, with_channels
from lightning_dice.data.images.mask_format import MaskFormat, SizedImage, check_size
from lightning_dice.data.images.sources import ImageSource
from lightning_dice.data.interfaces import Split
from lightning_dice.data.splits import SplitSettings, complete_splits


@dataclass(frozen=True)
class DatasetCases:
    """Some items of a map-style data set as cases.

    Attributes:
        dataset: its items are pairs of image and mask.
        indices: the items.
        names: the cases' names, one for each item.
        image_format: how an image becomes the network's input.
        mask_format: how masks are stored.
        workers: threads that read sizes.

    >>> items = [(np.zeros((4, 4), np.uint8), np.eye(4, dtype=np.uint8))]
    >>> cases = DatasetCases(items, [0], ["a"], ImageFormat(channels=1), MaskFormat(["background", "line"]))
    >>> cases.sizes, cases[0].mask.sum()
    ([(4, 4)], tensor(4))
    """

    dataset: Any
    indices: Sequence[int]
    names: Sequence[str]
    image_format: ImageFormat
    mask_format: MaskFormat
    workers: int = 1

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        image, mask = self.read_pair(index)
        check_size(mask.size, image, str(mask.path))
        try:
            encoded = self.mask_format.encode(self.mask_format.read_planes(mask), self.mask_format.multichannel_masks)
        except DataError:
            raise
        except ValueError as error:
            raise DataProblem(str(error), mask.path, "Set data.label_map or data.classes.") from error
        return Sample(self.image_format.to_tensor(image), encoded, self.names[index])

    def read_pair(self, index: int) -> tuple[DecodedImage, DecodedImage]:
        """Return image and mask of a case.

        Raises:
            DataError: the item cannot be read, or is not a pair of images.
        """
        name = self.names[index]
        try:
            item = self.dataset[self.indices[index]]
        except Exception as error:  # Another author's data set may raise anything.
            raise DataProblem(f"cannot be read ({type(error).__name__}: {error})", name) from error
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataProblem(f"must be a pair of image and mask, got {type(item).__name__}", name)
        return to_decoded_image(item[0], name), to_decoded_image(item[1], f"the mask of {name}")

    @cached_property
    def sizes(self) -> Sequence[tuple[int, ...]]:
        """`(height, width)` of each image; this reads all of them."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda index: self.read_pair(index)[0].size, range(len(self))))


class DatasetSource(ImageSource):
    """Map-style data sets of pairs of image and mask, one for each split: torchvision's, or your own.

    Images and masks are Pillow images, arrays `(height, width)` or `(height, width, channels)`, or tensors
    `(height, width)` or `(channels, height, width)`, as stored: without transforms. Cases are named after the files
    that the data set lists in an attribute `images`, if it has one, and otherwise by their number.

    Args:
        dataset: makes a data set; called with `root`, `download` and the arguments of a split when the split is needed.
        root: the folder of its files.
        mask_format: the classes, and how masks are stored.
        image_format: how images are stored, and how they become the network's input; by default three channels.
        train: arguments of `dataset` for the training split, such as `{"image_set": "train"}`.
        val: for validation; `None`: validation is drawn from train.
        test: for testing; `None`: there is no such split.
        download: whether the data set should fetch its files. `None`: it has no such argument.
        split_settings: `fractions` of train and val, and `seed`, with which val is drawn; the share of test is unused.
        workers: threads that `check` reads with; by default up to 8.

    Raises:
        ValueError: settings are invalid, or have no meaning here.

    >>> class Squares:
    ...     def __init__(self, root, train):
    ...         self.count = 4 if train else 2
    ...     def __len__(self):
    ...         return self.count
    ...     def __getitem__(self, index):
    ...         return np.full((8, 8), 40 * index, np.uint8), np.eye(8, dtype=np.uint8)
    >>> classes, gray = MaskFormat(["background", "line"]), ImageFormat(channels=1)
    >>> splits = {"train": {"train": True}, "test": {"train": False}}
    >>> source = DatasetSource(Squares, "data", classes, gray, **splits, download=None)
    >>> {split: len(source.split(split)) for split in ("train", "val", "test")}
    {'train': 3, 'val': 1, 'test': 2}
    """

    def __init__(
        self,
        dataset: Callable[..., Any],
        root: str | Path,
        mask_format: MaskFormat,
        image_format: ImageFormat | None = None,
        *,
        train: Mapping[str, Any],
        val: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        download: bool | None = False,
        split_settings: SplitSettings | None = None,
        workers: int | None = None,
    ) -> None:
        if not callable(dataset):
            raise ValueError(f"dataset must be a class or function that makes data sets, got {dataset!r}")
        super().__init__(root, mask_format, image_format, split_settings, workers)
        if self.image_format.nodata is not None:
            raise ValueError("nodata must not be set here: it is for data sets of image files (data=folder, data=coco)")
        if self.split_settings.splits is not None or self.split_settings.split_files is not None:
            raise ValueError("splits and split_files must not be set here: use train, val and test")
        self.dataset = dataset
        self.arguments: dict[Split, dict[str, Any]] = {}
        splits: dict[Split, Mapping[str, Any] | None] = {"train": train, "val": val, "test": test}
        for split, arguments in splits.items():
            if arguments is None and split != "train":
                continue
            if not isinstance(arguments, Mapping):
                raise ValueError(f"{split} must be the arguments of the data set for this split, got {arguments!r}")
            self.arguments[split] = {str(name): value for name, value in arguments.items()}
        self.download = download
        self._cases: dict[Split, DatasetCases] | None = None

    def survey(self) -> Survey:
        """Return the findings of `check` as numbers.

        Raises:
            DataError: as by `check`.
        """
        planes = tuple(self.mask_format.classes) if self.mask_format.multichannel_masks else ()
        facts: dict[Split, list[ImageFacts]] = {}
        for split, cases in self._open().items():
            with ThreadPoolExecutor(self.workers) as pool:
                facts[split] = list(pool.map(lambda index, of=cases: _inspect(of, index, planes), range(len(cases))))
            cases.__dict__["sizes"] = [found.size for found in facts[split]]  # Fill the cache: no second reading.
        found = Survey(facts, planes, self.mask_format)
        if problems := found.problems():
            raise combined_error(self.root, problems)
        return found

    def split(self, name: Split) -> DatasetCases | None:
        """Return the cases of a split, or `None` if there is no such split.

        Raises:
            DataError: the data set cannot be made.
        """
        return self._open().get(name)

    def _open(self) -> dict[Split, DatasetCases]:
        if self._cases is None:
            cases = {split: self._cases_of(self._make(arguments), split) for split, arguments in self.arguments.items()}
            self._cases = cases if "val" in cases else self._draw_val(cases)
        return self._cases

    def _make(self, arguments: Mapping[str, Any]) -> Any:
        passed = {"root": str(self.root), **({} if self.download is None else {"download": self.download}), **arguments}
        name = getattr(self.dataset, "__name__", type(self.dataset).__name__)
        try:
            dataset = self.dataset(**passed)
            length = len(dataset)
        except TypeError as error:
            remedy = "Set data.download=null if it has no argument download." if "download" in str(error) else ""
            raise DataProblem(f"{name} does not take {', '.join(passed)} ({error})", self.root, remedy) from error
        except Exception as error:  # Another author's data set may raise anything.
            what = f"{name} cannot be read there ({type(error).__name__}: {error})"
            fetch = "set data.download=true, once, on a machine with access to the internet"
            raise DataProblem(what, self.root, f"Put its files there, or {fetch}.") from error
        if not length:
            shown = ", ".join(map(str, arguments.values())) or "no argument"
            raise DataProblem(f"{name} is empty with {shown}", self.root)
        return dataset

    def _cases_of(self, dataset: Any, split: Split) -> DatasetCases:
        indices = range(len(dataset))
        listed = getattr(dataset, "images", getattr(dataset, "_images", None))
        names = [f"{split}-{index:0{len(str(len(indices)))}d}" for index in indices]
        if isinstance(listed, (list, tuple)) and all(isinstance(one, (str, Path)) for one in listed):
            stems = [Path(one).stem for one in listed]
            names = stems if len(set(stems)) == len(names) == len(stems) else names
        return DatasetCases(dataset, indices, names, self.image_format, self.mask_format, self.workers)

    def _draw_val(self, cases: dict[Split, DatasetCases]) -> dict[Split, DatasetCases]:
        """Draw validation cases from the training cases."""
        train, settings = cases["train"], self.split_settings
        pairs = [Pair(name, Path(name), ()) for name in train.names]
        index_of = {name: index for index, name in enumerate(train.names)}
        drawn: dict[Split, DatasetCases] = {}
        parts = complete_splits({"train": pairs}, settings, [], self.root)
        for split, part in parts.items():
            indices = [index_of[pair.case] for pair in part]
            drawn[split] = replace(train, indices=indices, names=[train.names[index] for index in indices])
        return drawn | {split: one for split, one in cases.items() if split == "test"}


@dataclass(frozen=True)
class _DecodedMask:
    """A mask that has been read, as a `StoredMask`."""

    image: DecodedImage

    def __str__(self) -> str:
        return str(self.image.path)

    def values(self, image: SizedImage, mask_format: MaskFormat, rows: slice, columns: slice) -> list[NDArray[Any]]:
        check_size(self.image.size, image, str(self))
        return mask_format.read_planes(self.image.window(rows, columns))


def _inspect(cases: DatasetCases, index: int, planes: tuple[str, ...]) -> ImageFacts:
    name = cases.names[index]
    facts = ImageFacts(Pair(name, Path(name), (Path(f"the mask of {name}"),)))
    try:
        image, mask = cases.read_pair(index)
    except DataProblem as problem:
        facts.problems.append(problem)
        return facts
    facts.digest = blake2b(np.ascontiguousarray(image.pixels).tobytes(), digest_size=16).digest()
    record_image(facts, image, cases.image_format)
    pair, facts.pair = facts.pair, Pair(name, Path(name), (_DecodedMask(mask),))
    record_masks(facts, image, cases.mask_format, Layout(planes=planes))
    facts.pair = pair  # Do not keep the pixels.
    return facts


def to_decoded_image(value: object, name: str) -> DecodedImage:
    """Convert a Pillow image, an array or a tensor to the form of an image that was read from a file.

    Args:
        value: an image or a mask.
        name: for messages.

    Raises:
        DataError: it is something else.

    >>> to_decoded_image(Image.new("L", (3, 2)), "a").size, to_decoded_image(Tensor([[[1.0, 2.0]]]), "a").size
    ((2, 3), (1, 2))
    """
    if isinstance(value, Image.Image):
        return _from_pillow(value, name)
    if isinstance(value, Tensor):
        array = value.detach().cpu().numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    elif isinstance(value, np.ndarray):
        array = value
    else:
        raise DataProblem(f"must be a Pillow image, an array or a tensor, got {type(value).__name__}", name)
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif":
        raise DataProblem(f"must be numbers of two space axes, got {array.dtype} of the shape {array.shape}", name)
    return DecodedImage(with_channels(array), Path(name), default_max_value(array.dtype))


def _from_pillow(image: Image.Image, name: str) -> DecodedImage:
    pixels, palette = with_channels(np.asarray(image)), None
    if image.mode in ("P", "PA"):
        pixels, palette = pixels[..., :1], read_palette(image)
    elif image.mode not in ("1", "L", "LA", "RGB", "RGBA", "I", "F") and not image.mode.startswith("I;16"):
        raise DataProblem(f"has the colours {image.mode}; gray, palette and RGB are read", name)
    alpha = image.mode in ("LA", "RGBA")
    return DecodedImage(pixels, Path(name), default_max_value(pixels.dtype), alpha=alpha, palette=palette)
