"""Annotations in COCO's format as a source of cases: outlines and run lengths of instances become masks."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.images.file_layout import Layout, Pair, contents, no_folder
from lightning_dice.data.images.file_patterns import check_pattern
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.mask_format import MaskFormat, Sized, check_size
from lightning_dice.data.images.sources import PairSource
from lightning_dice.data.interfaces import Split
from lightning_dice.data.splits import check_splits, complete_splits, split_words

NAMED = 8  # categories or images in one message


class Instance(NamedTuple):
    """One object of an image.

    Attributes:
        label: its class's position in `classes`.
        shape: outlines, each `(points, 2)` of x and y in pixels, or run lengths.
        area: in pixels, as annotated.
        crowd: a group of objects, not told apart.
    """

    label: int
    shape: tuple[NDArray[np.float32], ...] | NDArray[np.int64]
    area: float
    crowd: bool


@dataclass(frozen=True)
class Instances:
    """The objects of an image as its mask.

    A pixel that several objects claim belongs, with a softmax, to the one of the smallest area. Crowds are ignored
    where no other object is; without an ignored label they count as objects.

    Attributes:
        file: the annotations.
        image: the image's name there.
        size: height and width, as annotated.
        objects: what is on it.
    """

    file: Path
    image: str
    size: tuple[int, int]
    objects: tuple[Instance, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.image}"

    def values(self, image: Sized, mask_format: MaskFormat, rows: slice, columns: slice) -> list[NDArray[Any]]:
        """Ids of a window, or with a sigmoid 0, 1 and the ignored label for each class.

        Raises:
            DataError: the image is of another size than annotated.
        """
        check_size(self.size, image, str(self))
        ignored = mask_format.ignore_index
        aside = [one.crowd and ignored is not None for one in self.objects]
        crowds = [one for one, crowd in zip(self.objects, aside, strict=True) if crowd]
        objects = [one for one, crowd in zip(self.objects, aside, strict=True) if not crowd]
        softmax = mask_format.activation == "softmax"
        small = 0 <= (ignored or 0) <= 255 and len(mask_format.classes) <= 255
        shape = (1 if softmax else len(mask_format.classes), rows.stop - rows.start, columns.stop - columns.start)
        planes = np.zeros(shape, np.uint8 if small else np.int32)
        for one in crowds:
            planes[0 if softmax else one.label][draw(one.shape, self.size, rows, columns)] = ignored
        for one in sorted(objects, key=lambda one: -one.area):  # What is drawn later lies on top.
            planes[0 if softmax else one.label][draw(one.shape, self.size, rows, columns)] = one.label if softmax else 1
        return list(planes)


def draw(
    shape: tuple[NDArray[np.float32], ...] | NDArray[np.int64],
    size: tuple[int, int],
    rows: slice | None = None,
    columns: slice | None = None,
) -> NDArray[np.bool_]:
    """The pixels of an object, `(height, width)`; of a window, those within.

    Outlines are in COCO's continuous coordinates, in which the pixel in row 0 and column 0 reaches from 0 to 1: it
    belongs to the object if its centre lies within. Where an outline crosses itself, inside and outside alternate;
    several outlines make one object. COCO's own tool rounds an outline to fifths of a pixel first: on blobs of 12
    pixels' radius 1.4 % of an object's pixels differ from it, all on its boundary, and areas agree on average. Run
    lengths are exact.

    >>> outline = np.array([[1, 0], [3, 0], [3, 1], [1, 1]], np.float32)
    >>> draw((outline,), (2, 4)).astype(int)
    array([[0, 1, 1, 0],
           [0, 0, 0, 0]])
    >>> draw(np.array([2, 2, 4]), (2, 4)).astype(int)
    array([[0, 1, 0, 0],
           [0, 1, 0, 0]])
    """
    from skimage.draw import polygon

    top, bottom, _ = slice(None).indices(size[0]) if rows is None else rows.indices(size[0])
    left, right, _ = slice(None).indices(size[1]) if columns is None else columns.indices(size[1])
    if isinstance(shape, tuple):
        mask = np.zeros((bottom - top, right - left), bool)
        for outline in shape:
            x, y = outline.astype(np.float64).T - 0.5
            mask[polygon(y - top, x - left, mask.shape)] = True  # type: ignore[no-untyped-call]
        return mask
    runs = np.zeros(len(shape), bool)
    runs[1::2] = True
    # Runs go down the columns: those of a window are a stretch.
    first, last = left * size[0], right * size[0]
    lengths = np.diff(np.cumsum(shape).clip(first, last), prepend=first)
    return np.asarray(np.repeat(runs, lengths).reshape(right - left, size[0]).T[top:bottom])


def decode_counts(text: str) -> list[int]:
    """Run lengths of COCO's compressed form: of each the difference from the last but one, in digits of 5 bits.

    The lowest digits come first; a digit's sixth bit says that more follow, its fifth in the last one the sign.

    >>> decode_counts("52203")
    [5, 2, 2, 2, 5]
    """
    counts: list[int] = []
    number = shift = 0
    for digit in text.encode("ascii"):
        bits = digit - 48
        if not 0 <= bits < 64:
            raise ValueError(f"the character {chr(digit)!r}")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = shift = 0
    if shift:
        raise ValueError("its end is missing")
    return counts


class CocoSource(PairSource):
    """Images with annotations in COCO's format: instances become a semantic mask, or one for each class.

    Every image that a file of annotations names is a case, also one without annotations: its mask is empty. Categories
    find their classes by name; those that no class has are left out, and told. With `activation="softmax"` the first
    class is the background, of which there need be no category. See `Instances` for objects that overlap, and for
    crowds, and `draw` for what belongs to an outline.

    Args:
        root: the folder.
        mask_format: the classes; annotations say ids themselves, so that `values` and `colors` have no part.
        channels: of the images as the net sees them: 1 for gray, 3 for RGB (gray is repeated).
        images: the folder under `root` that the annotations' `file_name` start from; `{split}` stands for the split.
        annotations: the file under `root`; without `{split}` it is one for all, and the splits are drawn.
        categories: category -> class, for those of another name: `{"car": "vehicle", "bus": "vehicle"}`.
        fractions: of the cases for train, val and test, where there is no file for them.
        seed: of this draw.
        workers: threads that `check` reads with; by default up to 8.
        splits: what stands for `{split}`, such as `{"train": "train2017", "val": "val2017"}`; by default the customary
            words.
        bands: which channels the images are, and
        max_value: the value that becomes 1, and
        nodata: that of pixels without an image, as in `ImageFormat`.
        tile: as in `FolderSource`.

    Raises:
        ValueError: for settings that cannot be.
    """

    def __init__(
        self,
        root: str | Path,
        mask_format: MaskFormat,
        channels: int = 3,
        images: str = "{split}",
        annotations: str = "annotations/instances_{split}.json",
        categories: Mapping[str, str] | None = None,
        fractions: Sequence[float] = (0.7, 0.15, 0.15),
        seed: int = 0,
        workers: int | None = None,
        *,
        splits: Mapping[Split, str | None] | None = None,
        bands: Sequence[int] | None = None,
        max_value: float | None = None,
        nodata: float | None = None,
        tile: int | None = None,
    ) -> None:
        image_format = ImageFormat(channels, bands, max_value, nodata)
        super().__init__(root, image_format, mask_format, fractions, seed, workers, tile=tile)
        if mask_format.label_map or mask_format.colors is not None or mask_format.multichannel_masks:
            raise ValueError(
                "values, colors and stacked are of mask files, which COCO's annotations are not; leave them"
            )
        self.images = check_pattern(str(images), "images", ["split"])
        self.annotations = check_pattern(str(annotations), "annotations", ["split"])
        if "{split}" in self.images and "{split}" not in self.annotations:
            raise ValueError(
                f"images={self.images!r} has {{split}} in it, and annotations={self.annotations!r} has not"
            )
        self.splits = check_splits(splits)
        self.categories = {str(name): str(to) for name, to in (categories or {}).items()}
        strange = [name for name in self.categories.values() if name not in mask_format.classes]
        if strange:
            raise ValueError(f"categories must map to classes, {list(mask_format.classes)}, got {strange}")

    def _scan(self) -> Layout:
        layout = Layout(planes=() if self.mask_format.activation == "softmax" else tuple(self.mask_format.classes))
        if (absent := no_folder(self.root)) is not None:
            layout.problems.append(absent)
            return layout
        parts: dict[Split | None, list[Pair]] = {}
        words = split_words(self.splits) if "{split}" in self.annotations else {None: ("",)}
        for split, names in words.items():
            options = [(name, self.root / self.annotations.replace("{split}", name)) for name in names]
            name, file = next(((name, path) for name, path in options if path.is_file()), ("", None))
            if file is not None:
                folder = self.root / self.images.replace("{split}", name)
                parts[split] = _Reading(file, folder, self.mask_format, self.categories, layout).pairs()
            elif self.splits is not None:
                what = f"is not there, and data.splits names the split {split}"
                layout.problems.append(DataProblem(what, options[-1][1], "Set data.splits to what there is."))
        if not parts and not layout.problems:
            what = f"there is no {self.annotations.replace('{split}', 'train')}; {contents(self.root)}"
            layout.problems.append(DataProblem(what, self.root, "Set data.annotations, or data.splits."))
        layout.pairs = complete_splits(parts, self.fractions, self.seed, layout.problems, self.root / self.annotations)
        return layout


class _Reading:
    """One file of annotations, read; problems and notes go to `layout`."""

    def __init__(
        self, file: Path, folder: Path, mask_format: MaskFormat, categories: Mapping[str, str], layout: Layout
    ) -> None:
        self.file, self.folder, self.mask_format, self.layout = file, folder, mask_format, layout
        self.names = categories

    def pairs(self) -> list[Pair]:
        try:
            content = _load(self.file)
            labels = self._labels(content)
        except DataProblem as problem:
            self.layout.problems.append(problem)
            return []
        images = self._images(content)
        objects: dict[Any, list[Instance]] = defaultdict(list)
        strange: Counter[str] = Counter()
        seen: set[Any] = set()
        for entry in content["annotations"]:
            name = f"annotation {entry.get('id', '?')}"
            if "id" in entry and entry["id"] in seen:
                self._refuse(f"{name} is there twice", "Keep one of them.")
                continue
            seen.add(entry.get("id"))
            if entry.get("image_id") not in images:
                strange[f"of an image that is not listed, such as {name} of the image {entry.get('image_id')!r}"] += 1
            elif entry.get("category_id") not in labels:
                strange[f"of a category that is not listed, such as {name} of {entry.get('category_id')!r}"] += 1
            elif (label := labels[entry["category_id"]]) is not None:
                _, size = images[entry["image_id"]]
                try:
                    objects[entry["image_id"]].append(_instance(entry, label, size))
                except ValueError as wrong:
                    self._refuse(f"{name} has {wrong}", "Correct it, or remove it.")
        kinds = Counter(what.split(", ")[0] for what in strange.elements())
        for kind, count in kinds.items():
            first = next(what for what in strange if what.startswith(kind))
            self._refuse(f"{count} annotations are {first}", "Remove them, or add what they refer to.")
        return self._paired(images, objects)

    def _paired(
        self, images: Mapping[Any, tuple[str, tuple[int, int]]], objects: Mapping[Any, list[Instance]]
    ) -> list[Pair]:
        pairs = []
        for key, (name, size) in images.items():
            path = self.folder / name
            case = PurePosixPath(name).with_suffix("").as_posix()
            if not path.is_file():
                self._refuse_image(path, f"is not there, and {self.file.name} names it")
            else:
                pairs.append(Pair(case, path, (Instances(self.file, name, size, tuple(objects.get(key, ()))),)))
        cases = Counter(pair.case for pair in pairs)
        for pair in pairs:
            if cases[pair.case] > 1:
                self._refuse_image(pair.image, "has the name of another image, but for the suffix")
                cases[pair.case] = 1
        blank = sum(not objects.get(key) for key in images)
        if blank:
            self.layout.notes.append(
                f"{blank} of {len(images)} images in {self.file.name} have no annotation of a class"
            )
        return sorted(pairs, key=lambda pair: pair.case)

    def _labels(self, content: Mapping[str, Any]) -> dict[Any, int | None]:
        """The class of each category's id; `None` for categories that no class has."""
        classes = list(self.mask_format.classes)
        names = {entry.get("id"): str(entry.get("name")) for entry in content["categories"]}
        meant = {key: self.names.get(name, name) for key, name in names.items()}
        unknown = [name for name in self.names if name not in names.values()]
        if unknown:
            what = f"has no category {', '.join(unknown)}, only {_some(names.values())}"
            raise DataProblem(what, self.file, "Set data.categories to categories that there are.")
        lacking = [name for name in classes if name not in meant.values() and name != self.mask_format.background]
        if lacking:
            what = f"has no category for the classes {', '.join(lacking)}, only {_some(names.values())}"
            raise DataProblem(what, self.file, "Set data.classes, or data.categories={category:class}.")
        unused = [name for key, name in names.items() if meant[key] not in classes]
        if unused:
            note = f"categories in {self.file.name} that no class has, and that count as background: {_some(unused)}"
            self.layout.notes.append(note)
        return {key: classes.index(name) if name in classes else None for key, name in meant.items()}

    def _images(self, content: Mapping[str, Any]) -> dict[Any, tuple[str, tuple[int, int]]]:
        """Name and size of each image by its id."""
        images: dict[Any, tuple[str, tuple[int, int]]] = {}
        files: set[str] = set()
        for entry in content["images"]:
            name, size = str(entry.get("file_name", "")), (entry.get("height"), entry.get("width"))
            if entry.get("id") in images or name in files:
                self._refuse(f"the image {name!r} (id {entry.get('id')!r}) is there twice", "Keep one of them.")
            elif not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                self._refuse(f"the file_name {name!r} does not lie below {self.folder.name}", "Set data.images, or it.")
            elif not all(isinstance(length, int) and length > 0 for length in size):
                self._refuse(f"the image {name!r} has the height and width {size}", "Correct them.")
            else:
                images[entry.get("id")] = name, (int(size[0]), int(size[1]))
            files.add(name)
        return images

    def _refuse(self, what: str, remedy: str) -> None:
        self.layout.problems.append(DataProblem(what, self.file, remedy))

    def _refuse_image(self, path: Path, what: str) -> None:
        self.layout.problems.append(DataProblem(what, path, "Add it, or remove it from the annotations."))


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DataProblem(f"cannot be opened ({error.strerror})", file) from error
    except (ValueError, RecursionError) as error:
        raise DataProblem(f"is no JSON ({error})", file, "Copy it again.") from error
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(
        isinstance(content.get(part), list) and all(isinstance(entry, dict) for entry in content[part])
        for part in parts
    ):
        found = f"an object of {_some(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise DataProblem(f"must be an object with lists of images, annotations and categories, got {found}", file)
    return content


def _instance(entry: Mapping[str, Any], label: int, size: tuple[int, int]) -> Instance:
    """An annotation as an object.

    Raises:
        ValueError: what is wrong with its segmentation.
    """
    stored, crowd = entry.get("segmentation"), bool(entry.get("iscrowd", 0))
    shape: tuple[NDArray[np.float32], ...] | NDArray[np.int64]
    if isinstance(stored, list) and stored:
        try:
            flat = [np.asarray(outline, np.float32) for outline in stored]
        except (TypeError, ValueError):
            raise ValueError("a segmentation that is no list of outlines [x, y, x, y ...]") from None
        if any(one.ndim != 1 or len(one) % 2 or len(one) < 6 or not np.isfinite(one).all() for one in flat):
            raise ValueError("an outline that is not [x, y, x, y ...] of at least three points")
        shape = tuple(one.reshape(-1, 2) for one in flat)
        around = sum(_polygon_area(one) for one in shape)
    elif isinstance(stored, dict) and {"counts", "size"} <= set(stored):
        if list(stored["size"]) != list(size):
            raise ValueError(f"run lengths of the size {stored['size']}, its image is listed with {list(size)}")
        counts = stored["counts"]
        try:
            shape = np.asarray(decode_counts(counts) if isinstance(counts, str) else counts, np.int64).reshape(-1)
        except (TypeError, ValueError, OverflowError) as wrong:
            raise ValueError(f"run lengths that cannot be read ({wrong})") from None
        if (shape < 0).any() or int(shape.sum()) != size[0] * size[1]:
            raise ValueError(f"run lengths of {int(shape.sum())} pixels, {size[0] * size[1]} are required")
        around = float(shape[1::2].sum())
    else:
        raise ValueError("no segmentation: neither outlines nor run lengths (a box alone is none)")
    area = entry.get("area")
    return Instance(label, shape, float(area) if isinstance(area, (int, float)) and area > 0 else around, crowd)


def _polygon_area(outline: NDArray[np.float32]) -> float:
    x, y = outline.astype(np.float64).T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def _some(names: Iterable[str]) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:NAMED]) + (f" and {len(listed) - NAMED} more" if len(listed) > NAMED else "")
