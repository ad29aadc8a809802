"""Any map-style data set of images and masks, such as torchvision's own, as a source of cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from lightning_dice.data.images.dataset_summary import ImageFacts, Survey, look_at, look_at_masks
from lightning_dice.data.images.file_layout import Layout, Pair
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import Picture
from lightning_dice.data.images.mask_format import MaskFormat, Sized, check_size
from lightning_dice.data.images.sources import PictureSource
from lightning_dice.data.interfaces import Split
from lightning_dice.data.splits import complete_splits

WHITES = {np.dtype(bool): 1, np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


@dataclass(frozen=True)
class DatasetCases:
    """Some items of a map-style data set.

    Attributes:
        dataset: of pairs of image and mask.
        indices: which items.
        names: of the cases, one for each.
        image_format: what the network gets of an image.
        mask_format: how masks are stored.
        workers: threads that find sizes.
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
        image, mask = self.pictures(index)
        check_size(mask.size, image, str(mask.path))
        try:
            encoded = self.mask_format.encode(self.mask_format.read_planes(mask), self.mask_format.multichannel_masks)
        except ValueError as wrong:
            if isinstance(wrong, DataError):
                raise
            raise DataProblem(str(wrong), mask.path, "Set data.label_map or data.classes.") from wrong
        return Sample(self.image_format.image(image), encoded, self.names[index])

    def pictures(self, index: int) -> tuple[Picture, Picture]:
        """Image and mask of a case.

        Raises:
            DataError: the data set cannot give them, or gives something else.
        """
        name = self.names[index]
        try:
            item = self.dataset[self.indices[index]]
        except Exception as error:  # Whatever a data set of anyone's raises.
            raise DataProblem(f"cannot be read ({type(error).__name__}: {error})", name) from error
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataProblem(f"must be a pair of image and mask, got {type(item).__name__}", name)
        return as_picture(item[0], name), as_picture(item[1], f"the mask of {name}")

    @cached_property
    def sizes(self) -> Sequence[tuple[int, ...]]:
        """`(height, width)` of each image, which takes reading them all."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda index: self.pictures(index)[0].size, range(len(self))))


class DatasetSource(PictureSource):
    """Map-style data sets of pairs of image and mask, one for each split: torchvision's, or anyone's.

    Images and masks are pictures of Pillow, arrays `(height, width)` or `(height, width, channels)`, or tensors
    `(height, width)` or `(channels, height, width)`; they must come as stored, without transforms. Cases are named by
    the files that the data set lists as `images`, if it does, and otherwise by their number.

    Args:
        dataset: makes a data set; called, once a split is needed, with `root`, `download` and that split's arguments.
        root: where its files are.
        mask_format: the classes, and how masks are stored.
        train: arguments of `dataset` for the training split, such as `{"image_set": "train"}`;
        val: for validation; `None`: it is drawn from train;
        test: for testing; `None`: there is no such split.
        download: have the data set fetch its files. `None`: it knows no such argument.
        channels: of the images as the net sees them: 1 for gray, 3 for RGB (gray is repeated).
        fractions: of the cases for train and val, where there is no val; the one for test has no part.
        seed: of this draw.
        workers: threads that `check` reads with; by default up to 8.
        bands: which channels the images are, and
        max_value: the value that becomes 1, as in `ImageFormat`.

    Raises:
        ValueError: for settings that cannot be.

    >>> class Squares:
    ...     def __init__(self, root, train):
    ...         self.count = 4 if train else 2
    ...     def __len__(self):
    ...         return self.count
    ...     def __getitem__(self, index):
    ...         return np.full((8, 8), 40 * index, np.uint8), np.eye(8, dtype=np.uint8)
    >>> classes = MaskFormat(["background", "line"])
    >>> source = DatasetSource(
    ...     Squares, "data", classes, train={"train": True}, test={"train": False}, download=None, channels=1
    ... )
    >>> {split: len(source.split(split)) for split in ("train", "val", "test")}
    {'train': 3, 'val': 1, 'test': 2}
    """

    def __init__(
        self,
        dataset: Callable[..., Any],
        root: str | Path,
        mask_format: MaskFormat,
        *,
        train: Mapping[str, Any],
        val: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        download: bool | None = False,
        channels: int = 3,
        fractions: Sequence[float] = (0.7, 0.15, 0.15),
        seed: int = 0,
        workers: int | None = None,
        bands: Sequence[int] | None = None,
        max_value: float | None = None,
    ) -> None:
        if not callable(dataset):
            raise ValueError(f"dataset must be a class, or what else makes data sets, got {dataset!r}")
        super().__init__(root, ImageFormat(channels, bands, max_value), mask_format, fractions, seed, workers)
        self.dataset = dataset
        self.arguments: dict[Split, dict[str, Any]] = {}
        splits: dict[Split, Mapping[str, Any] | None] = {"train": train, "val": val, "test": test}
        for split, given in splits.items():
            if given is None and split != "train":
                continue
            if not isinstance(given, Mapping):
                raise ValueError(f"{split} must be the arguments of the data set for this split, got {given!r}")
            self.arguments[split] = {str(name): value for name, value in given.items()}
        self.download = download
        self._cases: dict[Split, DatasetCases] | None = None

    def survey(self) -> Survey:
        """What `check` finds, in numbers.

        Raises:
            DataError: as in `check`.
        """
        planes = tuple(self.mask_format.classes) if self.mask_format.multichannel_masks else ()
        facts: dict[Split, list[ImageFacts]] = {}
        for split, cases in self._open().items():
            with ThreadPoolExecutor(self.workers) as pool:
                facts[split] = list(pool.map(lambda index, cases=cases: _look(cases, index, planes), range(len(cases))))
            cases.__dict__["sizes"] = [found.size for found in facts[split]]  # Known now, without reading again.
        found = Survey(facts, planes, self.mask_format)
        if problems := found.problems():
            raise combined_error(self.root, problems)
        return found

    def split(self, name: Split) -> DatasetCases | None:
        """The cases of a split, or `None` where there is no such split.

        Raises:
            DataError: the data set cannot be made.
        """
        return self._open().get(name)

    def _open(self) -> dict[Split, DatasetCases]:
        if self._cases is None:
            made = {split: self._make(arguments) for split, arguments in self.arguments.items()}
            self._cases = self._divided({split: self._all(one, split) for split, one in made.items()})
        return self._cases

    def _make(self, arguments: Mapping[str, Any]) -> Any:
        given = {"root": str(self.root), **({} if self.download is None else {"download": self.download}), **arguments}
        name = getattr(self.dataset, "__name__", type(self.dataset).__name__)
        try:
            made = self.dataset(**given)
            length = len(made)
        except TypeError as wrong:
            remedy = "Set data.download=null if it knows no download." if "download" in str(wrong) else ""
            raise DataProblem(f"{name} does not take {', '.join(given)} ({wrong})", self.root, remedy) from wrong
        except Exception as wrong:  # Whatever a data set of anyone's raises.
            what = f"{name} cannot be read there ({type(wrong).__name__}: {wrong})"
            fetch = "set data.download=true, once, on a machine with access to the internet"
            raise DataProblem(what, self.root, f"Put its files there, or {fetch}.") from wrong
        if not length:
            raise DataProblem(
                f"{name} is empty with {', '.join(map(str, arguments.values())) or 'no argument'}", self.root
            )
        return made

    def _all(self, dataset: Any, split: Split) -> DatasetCases:
        indices = range(len(dataset))
        listed = getattr(dataset, "images", getattr(dataset, "_images", None))
        names = [f"{split}-{index:0{len(str(len(indices)))}d}" for index in indices]
        if isinstance(listed, (list, tuple)) and all(isinstance(one, (str, Path)) for one in listed):
            stems = [Path(one).stem for one in listed]
            names = stems if len(set(stems)) == len(names) == len(stems) else names
        return DatasetCases(dataset, indices, names, self.image_format, self.mask_format, self.workers)

    def _divided(self, cases: dict[Split, DatasetCases]) -> dict[Split, DatasetCases]:
        if "val" in cases:
            return cases
        whole = cases["train"]
        pairs = [Pair(name, Path(name), ()) for name in whole.names]
        places = {name: place for place, name in enumerate(whole.names)}
        parts = complete_splits({"train": pairs}, self.fractions, self.seed, [], self.root)
        divided: dict[Split, DatasetCases] = {}
        for split, part in parts.items():
            chosen = [places[pair.case] for pair in part]
            names = [whole.names[place] for place in chosen]
            divided[split] = DatasetCases(
                whole.dataset, chosen, names, self.image_format, self.mask_format, self.workers
            )
        return divided | {split: one for split, one in cases.items() if split == "test"}


@dataclass(frozen=True)
class _Decoded:
    """A mask that has been read."""

    picture: Picture

    def __str__(self) -> str:
        return str(self.picture.path)

    def values(self, image: Sized, mask_format: MaskFormat, rows: slice, columns: slice) -> list[NDArray[Any]]:
        check_size(self.picture.size, image, str(self))
        return mask_format.read_planes(self.picture.window(rows, columns))


def _look(cases: DatasetCases, index: int, planes: tuple[str, ...]) -> ImageFacts:
    name = cases.names[index]
    facts = ImageFacts(Pair(name, Path(name), (Path(f"the mask of {name}"),)))
    try:
        image, mask = cases.pictures(index)
    except DataProblem as problem:
        facts.problems.append(problem)
        return facts
    facts.digest = blake2b(np.ascontiguousarray(image.pixels).tobytes(), digest_size=16).digest()
    look_at(facts, image, cases.image_format)
    kept, facts.pair = facts.pair, Pair(name, Path(name), (_Decoded(mask),))
    look_at_masks(facts, image, cases.mask_format, Layout(planes=planes))
    facts.pair = kept  # Without the pixels.
    return facts


def as_picture(value: object, name: str) -> Picture:
    """An image or a mask in any of the usual forms, as if it had been read from a file.

    Raises:
        DataError: it is something else.

    >>> as_picture(Image.new("L", (3, 2)), "a").size, as_picture(Tensor([[[1.0, 2.0]]]), "a").size
    ((2, 3), (1, 2))
    """
    path = Path(name)
    if isinstance(value, Image.Image):
        palette = None
        if value.mode in ("P", "PA"):
            stored = np.asarray(value.getpalette("RGB"), np.uint8).reshape(-1, 3)
            palette = np.zeros((256, 3), np.uint8)
            palette[: len(stored)] = stored
        elif value.mode not in ("1", "L", "LA", "RGB", "RGBA", "I", "F") and not value.mode.startswith("I;16"):
            raise DataProblem(f"has the colours {value.mode}; gray, palette and RGB are read", name)
        pixels = np.asarray(value)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        pixels = pixels[..., :1] if palette is not None else pixels
        alpha = value.mode in ("LA", "RGBA")
        return Picture(pixels, path, WHITES.get(pixels.dtype), alpha=alpha, palette=palette)
    if isinstance(value, Tensor):
        array = value.detach().cpu().numpy()
        array = array if array.ndim == 2 else np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    elif isinstance(value, np.ndarray):
        array = value
    else:
        raise DataProblem(f"must be a picture, an array or a tensor, got {type(value).__name__}", name)
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif":
        raise DataProblem(f"must be numbers of two space axes, got {array.dtype} of the shape {array.shape}", name)
    return Picture(array[..., None] if array.ndim == 2 else array, path, WHITES.get(array.dtype))
