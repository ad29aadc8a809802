"""Annotations in COCO's format as a source of cases: outlines and run lengths of instances become masks."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.images.file_layout import Layout, Pair
from lightning_dice.data.images.file_patterns import check_pattern
from lightning_dice.data.images.image_folders import describe_contents, root_problem
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.mask_format import MaskFormat, SizedImage, check_size
from lightning_dice.data.images.sources import ImageFileSource
from lightning_dice.data.interfaces import Split
from lightning_dice.data.label_map import label_dtype
from lightning_dice.data.splits import SplitSettings, complete_splits
from lightning_dice.text import join_some

Shape = tuple[NDArray[np.float32], ...] | NDArray[np.int64]


class Instance(NamedTuple):
    """One object of an image.

    Attributes:
        label: its class's position in `classes`.
        shape: outlines, each `(points, 2)` of x and y in pixels, or run lengths.
        area: in pixels, as annotated.
        crowd: a group of objects that were annotated together.
    """

    label: int
    shape: Shape
    area: float
    crowd: bool


@dataclass(frozen=True)
class InstanceMask:
    """The objects of an image, as a mask.

    With a softmax, a pixel that several objects claim belongs to the one of the smallest area. Crowds are ignored where
    there is no other object; without an ignored label they count as objects.

    Attributes:
        file: the annotations.
        image: the image's name there.
        size: height and width, as annotated.
        objects: the objects of the image.

    >>> vessel = Instance(1, (np.array([[0, 0], [2, 0], [2, 1], [0, 1]], np.float32),), area=2, crowd=False)
    >>> mask = InstanceMask(Path("train.json"), "a.png", (2, 3), (vessel,))
    >>> from lightning_dice.data.images.image_reader import DecodedImage
    >>> image = DecodedImage(np.zeros((2, 3, 1), np.uint8), Path("a.png"), max_value=255)
    >>> mask.values(image, MaskFormat(["background", "vessel"]), slice(0, 2), slice(0, 3))
    [array([[1, 1, 0],
           [0, 0, 0]], dtype=uint8)]
    """

    file: Path
    image: str
    size: tuple[int, int]
    objects: tuple[Instance, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.image}"

    def values(self, image: SizedImage, mask_format: MaskFormat, rows: slice, columns: slice) -> list[NDArray[Any]]:
        """Return the ids of a window, or with a sigmoid 0, 1 and the ignored label for each class.

        Raises:
            DataError: the image's size is not the annotated one.
        """
        check_size(self.size, image, str(self))
        ignored = mask_format.ignore_index
        crowds = [one for one in self.objects if one.crowd and ignored is not None]
        objects = [one for one in self.objects if not one.crowd or ignored is None]
        softmax = mask_format.activation == "softmax"
        shape = (1 if softmax else len(mask_format.classes), rows.stop - rows.start, columns.stop - columns.start)
        planes = np.zeros(shape, label_dtype(len(mask_format.classes), ignored))
        drawn = [(one, ignored) for one in crowds]
        # Smaller objects cover larger ones, and any object covers a crowd.
        drawn += [(one, one.label if softmax else 1) for one in sorted(objects, key=lambda one: -one.area)]
        for one, value in drawn:
            planes[0 if softmax else one.label][rasterize(one.shape, self.size, rows, columns)] = value
        return list(planes)


def rasterize(
    shape: Shape, size: tuple[int, int], rows: slice | None = None, columns: slice | None = None
) -> NDArray[np.bool_]:
    """Return the pixels of an object as a mask `(height, width)`, or a window of it.

    Outlines are in COCO's continuous coordinates, in which the pixel in row 0 and column 0 extends from 0 to 1: a pixel
    belongs to the object if its centre is inside. Where an outline crosses itself, inside and outside alternate;
    several outlines make one object. COCO's own tool rounds an outline to fifths of a pixel first: on blobs of 12
    pixels' radius 1.4 % of an object's pixels differ from it, all on its boundary, and areas agree on average. Run
    lengths are exact.

    >>> outline = np.array([[1, 0], [3, 0], [3, 1], [1, 1]], np.float32)
    >>> rasterize((outline,), (2, 4)).astype(int)
    array([[0, 1, 1, 0],
           [0, 0, 0, 0]])
    >>> rasterize(np.array([2, 2, 4]), (2, 4)).astype(int)
    array([[0, 1, 0, 0],
           [0, 1, 0, 0]])
    """
    from matplotlib.path import Path as Polygon

    top, bottom, _ = slice(None).indices(size[0]) if rows is None else rows.indices(size[0])
    left, right, _ = slice(None).indices(size[1]) if columns is None else columns.indices(size[1])
    if isinstance(shape, tuple):
        mask = np.zeros((bottom - top, right - left), bool)
        for outline in shape:
            vertices = outline.astype(np.float64) - 0.5
            # matplotlib counts a centre on the outline as inside or not by the direction of the outline.
            after = np.roll(vertices, -1, axis=0)
            if (vertices[:, 0] * after[:, 1] - after[:, 0] * vertices[:, 1]).sum() < 0:
                vertices = vertices[::-1]
            (x0, y0), (x1, y1) = np.ceil(vertices.min(0)), np.floor(vertices.max(0)) + 1
            x = np.arange(max(left, x0), min(right, x1))
            y = np.arange(max(top, y0), min(bottom, y1))
            if x.size and y.size:
                centres = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
                inside = Polygon(vertices).contains_points(centres).reshape(y.size, x.size)
                mask[int(y[0]) - top :, int(x[0]) - left :][: y.size, : x.size] |= inside
        return mask
    runs = np.zeros(len(shape), bool)
    runs[1::2] = True
    # Runs go down the columns, so the columns of a window are one stretch of them.
    first, last = left * size[0], right * size[0]
    lengths = np.diff(np.cumsum(shape).clip(first, last), prepend=first)
    return np.asarray(np.repeat(runs, lengths).reshape(right - left, size[0]).T[top:bottom])


def decode_run_lengths(text: str) -> list[int]:
    """Decode COCO's compressed run lengths.

    Each number is the difference from the one before the previous one, in digits of 5 bits, the lowest digit first. A
    digit's sixth bit is set if more digits follow; the fifth bit of the last digit is the sign.

    Raises:
        ValueError: the text is not in this form.

    >>> decode_run_lengths("52203")
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


class CocoSource(ImageFileSource):
    """Images with annotations in COCO's format: instances become a semantic mask, or one for each class.

    Every image that an annotation file lists is a case; the mask of an image without annotations is empty. Categories
    and classes are matched by name; categories without a class count as background, which the report notes. With
    `activation="softmax"` the first class is the background, which needs no category. `InstanceMask` describes what
    becomes of overlapping objects and crowds, `rasterize` which pixels belong to an outline.

    Args:
        root: the folder.
        mask_format: the classes; without `label_map` and `colors`, since annotations hold no values.
        image_format: how images are stored, and how they become the network's input; by default three channels.
        images: the folder below `root` that the annotations' `file_name` is relative to; `{split}` stands for the
            split.
        annotations: the file below `root`; without `{split}` it is one for all cases, and the splits are drawn.
        categories: category -> class, where their names differ: `{"car": "vehicle", "bus": "vehicle"}`.
        split_settings: the names of the splits, or how they are drawn.
        tile: as in `FolderSource`.
        workers: threads that `check` reads with; by default up to 8.

    Raises:
        ValueError: settings are invalid, or contradict each other.

    >>> source = CocoSource("data/coco", MaskFormat(["person", "vehicle"], "sigmoid"), categories={"car": "vehicle"})
    >>> source.annotations
    'annotations/instances_{split}.json'
    """

    def __init__(
        self,
        root: str | Path,
        mask_format: MaskFormat,
        image_format: ImageFormat | None = None,
        *,
        images: str = "{split}",
        annotations: str = "annotations/instances_{split}.json",
        categories: Mapping[str, str] | None = None,
        split_settings: SplitSettings | None = None,
        tile: int | None = None,
        workers: int | None = None,
    ) -> None:
        super().__init__(root, mask_format, image_format, split_settings, workers, tile=tile)
        if mask_format.label_map or mask_format.colors is not None or mask_format.multichannel_masks:
            raise ValueError(
                "label_map, colors and multichannel_masks must not be set for COCO's annotations: they describe mask "
                "files"
            )
        if self.split_settings.split_files is not None:
            raise ValueError("split_files must not be set for COCO's annotations: their files list the cases")
        self.images = check_pattern(str(images), "images", ["split"])
        self.annotations = check_pattern(str(annotations), "annotations", ["split"])
        if "{split}" in self.images and "{split}" not in self.annotations:
            raise ValueError(
                f"annotations must have {{split}} in it if images does, got {self.annotations!r} and {self.images!r}"
            )
        self.categories = {str(name): str(to) for name, to in (categories or {}).items()}
        unknown = [name for name in self.categories.values() if name not in mask_format.classes]
        if unknown:
            raise ValueError(f"categories must map to classes, {list(mask_format.classes)}, got {unknown}")

    def _find_files(self) -> Layout:
        layout = Layout(planes=() if self.mask_format.activation == "softmax" else tuple(self.mask_format.classes))
        if (problem := root_problem(self.root)) is not None:
            layout.problems.append(problem)
            return layout
        settings = self.split_settings
        parts: dict[Split | None, list[Pair]] = {}
        names = settings.names if "{split}" in self.annotations else {None: ("",)}
        for split, words in names.items():
            options = [(word, self.root / self.annotations.replace("{split}", word)) for word in words]
            word, file = next(((word, path) for word, path in options if path.is_file()), ("", None))
            if file is not None:
                folder = self.root / self.images.replace("{split}", word)
                parts[split] = _AnnotationReader(file, folder, self.mask_format, self.categories, layout).pairs()
            elif settings.splits is not None:
                what = f"does not exist, and data.splits names the split {split}"
                layout.problems.append(DataProblem(what, options[-1][1], "Correct data.splits."))
        if not parts and not layout.problems:
            what = f"there is no {self.annotations.replace('{split}', 'train')}; {describe_contents(self.root)}"
            layout.problems.append(DataProblem(what, self.root, "Set data.annotations, or data.splits."))
        where = self.root / self.annotations
        layout.pairs = complete_splits(parts, settings, layout.problems, where)
        return layout


class _AnnotationReader:
    """Reads one file of annotations; adds problems and notes to `layout`."""

    def __init__(
        self, file: Path, folder: Path, mask_format: MaskFormat, categories: Mapping[str, str], layout: Layout
    ) -> None:
        self.file, self.folder, self.mask_format, self.layout = file, folder, mask_format, layout
        self.categories = categories

    def pairs(self) -> list[Pair]:
        try:
            content = _load_json(self.file)
            labels = self._labels(content)
        except DataProblem as problem:
            self.layout.problems.append(problem)
            return []
        images = self._images(content)
        objects: dict[Any, list[Instance]] = defaultdict(list)
        dangling: Counter[str] = Counter()
        seen: set[Any] = set()
        for entry in content["annotations"]:
            name = f"annotation {entry.get('id', '?')}"
            if "id" in entry and entry["id"] in seen:
                self._refuse(f"{name} is listed twice", "Keep one of them.")
                continue
            seen.add(entry.get("id"))
            if entry.get("image_id") not in images:
                dangling[f"of an image that is not listed, such as {name} of the image {entry.get('image_id')!r}"] += 1
            elif entry.get("category_id") not in labels:
                dangling[f"of a category that is not listed, such as {name} of {entry.get('category_id')!r}"] += 1
            elif (label := labels[entry["category_id"]]) is not None:
                _, size = images[entry["image_id"]]
                try:
                    objects[entry["image_id"]].append(_parse_instance(entry, label, size))
                except ValueError as wrong:
                    self._refuse(f"{name} has {wrong}", "Correct it, or remove it.")
        kinds = Counter(what.split(", ")[0] for what in dangling.elements())
        for kind, count in kinds.items():
            first = next(what for what in dangling if what.startswith(kind))
            self._refuse(f"{count} annotations are {first}", "Remove them, or add what they refer to.")
        return self._pair(images, objects)

    def _pair(
        self, images: Mapping[Any, tuple[str, tuple[int, int]]], objects: Mapping[Any, list[Instance]]
    ) -> list[Pair]:
        pairs = []
        for key, (name, size) in images.items():
            path = self.folder / name
            case = PurePosixPath(name).with_suffix("").as_posix()
            if not path.is_file():
                self._refuse_image(path, f"does not exist, and {self.file.name} lists it")
            else:
                pairs.append(Pair(case, path, (InstanceMask(self.file, name, size, tuple(objects.get(key, ()))),)))
        cases = Counter(pair.case for pair in pairs)
        for pair in pairs:
            if cases[pair.case] > 1:
                self._refuse_image(pair.image, "has the name of another image, except for the suffix")
                cases[pair.case] = 1
        blank = sum(not objects.get(key) for key in images)
        if blank:
            self.layout.notes.append(
                f"{blank} of {len(images)} images in {self.file.name} have no annotation of a class"
            )
        return sorted(pairs, key=lambda pair: pair.case)

    def _labels(self, content: Mapping[str, Any]) -> dict[Any, int | None]:
        """Return the class of each category's id; `None` for categories without a class."""
        classes = list(self.mask_format.classes)
        names = {entry.get("id"): str(entry.get("name")) for entry in content["categories"]}
        class_names = {key: self.categories.get(name, name) for key, name in names.items()}
        unknown = [name for name in self.categories if name not in names.values()]
        if unknown:
            what = f"has no category {', '.join(unknown)}, only {join_some(list(names.values()))}"
            raise DataProblem(what, self.file, "Set data.categories to categories that exist.")
        lacking = [name for name in classes if name not in class_names.values() and name != self.mask_format.background]
        if lacking:
            what = f"has no category for the classes {', '.join(lacking)}, only {join_some(list(names.values()))}"
            raise DataProblem(what, self.file, "Set data.classes, or data.categories={category:class}.")
        unused = [name for key, name in names.items() if class_names[key] not in classes]
        if unused:
            note = f"categories in {self.file.name} without a class, which count as background: {join_some(unused)}"
            self.layout.notes.append(note)
        return {key: classes.index(name) if name in classes else None for key, name in class_names.items()}

    def _images(self, content: Mapping[str, Any]) -> dict[Any, tuple[str, tuple[int, int]]]:
        """Return name and size of each image by its id."""
        images: dict[Any, tuple[str, tuple[int, int]]] = {}
        files: set[str] = set()
        for entry in content["images"]:
            name, size = str(entry.get("file_name", "")), (entry.get("height"), entry.get("width"))
            if entry.get("id") in images or name in files:
                self._refuse(f"the image {name!r} (id {entry.get('id')!r}) is listed twice", "Keep one of them.")
            elif not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                self._refuse(f"the file_name {name!r} is not below {self.folder.name}", "Correct it, or data.images.")
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


def _load_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DataProblem(f"cannot be opened ({error.strerror})", file) from error
    except (ValueError, RecursionError) as error:
        raise DataProblem(f"is not JSON ({error})", file, "Copy it again.") from error
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(
        isinstance(content.get(part), list) and all(isinstance(entry, dict) for entry in content[part])
        for part in parts
    ):
        found = (
            f"an object of {join_some(list(content))}" if isinstance(content, dict) else f"a {type(content).__name__}"
        )
        raise DataProblem(f"must be an object with lists of images, annotations and categories, got {found}", file)
    return content


def _parse_instance(entry: Mapping[str, Any], label: int, size: tuple[int, int]) -> Instance:
    """Convert an annotation.

    Raises:
        ValueError: its segmentation is invalid.
    """
    stored, crowd = entry.get("segmentation"), bool(entry.get("iscrowd", 0))
    shape: Shape
    if isinstance(stored, list) and stored:
        try:
            flat = [np.asarray(outline, np.float32) for outline in stored]
        except (TypeError, ValueError):
            raise ValueError("a segmentation that is not a list of outlines [x, y, x, y ...]") from None
        if any(one.ndim != 1 or len(one) % 2 or len(one) < 6 or not np.isfinite(one).all() for one in flat):
            raise ValueError("an outline that is not [x, y, x, y ...] of at least three points")
        shape = tuple(one.reshape(-1, 2) for one in flat)
        own_area = sum(_polygon_area(one) for one in shape)
    elif isinstance(stored, dict) and {"counts", "size"} <= set(stored):
        if list(stored["size"]) != list(size):
            raise ValueError(f"run lengths of the size {stored['size']}, its image is listed with {list(size)}")
        counts = stored["counts"]
        try:
            shape = np.asarray(decode_run_lengths(counts) if isinstance(counts, str) else counts, np.int64).reshape(-1)
        except (TypeError, ValueError, OverflowError) as wrong:
            raise ValueError(f"run lengths that cannot be read ({wrong})") from None
        if (shape < 0).any() or int(shape.sum()) != size[0] * size[1]:
            raise ValueError(f"run lengths of {int(shape.sum())} pixels, but {size[0] * size[1]} are required")
        own_area = float(shape[1::2].sum())
    else:
        raise ValueError("no segmentation: neither outlines nor run lengths (a box alone is none)")
    area = entry.get("area")
    return Instance(label, shape, float(area) if isinstance(area, (int, float)) and area > 0 else own_area, crowd)


def _polygon_area(outline: NDArray[np.float32]) -> float:
    x, y = outline.astype(np.float64).T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
