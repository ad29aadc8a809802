"""Read every case once, and list all problems or make a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.images.file_layout import Layout, Pair
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import DecodedImage, read_bytes, read_image
from lightning_dice.data.images.mask_format import MaskFile, MaskFormat, OpenMask
from lightning_dice.data.images.windowed_tiff import WindowedTiff, open_windowed_tiff
from lightning_dice.data.interfaces import Split
from lightning_dice.data.label_map import count_values, suggest_label_map
from lightning_dice.data.summary_table import (
    MAX_CASES,
    ClassShare,
    count_kinds,
    format_report,
    warn_of_absent_classes,
    warn_of_shared_images,
)
from lightning_dice.text import join_some

MASK_LEVELS = 16  # an image with no more values than this may be a mask
PHOTO_LEVELS = 64  # a mask with more values than this is a photograph, or numbers instances


@dataclass
class ImageFacts:
    """The findings from reading one case.

    Attributes:
        pair: the case.
        size: height and width.
        kind: the image's depth and colour.
        levels: number of values in the image; 0 if there are more than a mask may have.
        digest: hash of the image file's content.
        counts: how often each value is stored, for each mask: one of ids, or one for each plane; with several raters,
            each rater's in turn.
        problems: everything that is wrong.
    """

    pair: Pair
    size: tuple[int, int] = (0, 0)
    kind: str = ""
    levels: int = 0
    digest: bytes = b""
    counts: list[dict[int, int]] = field(default_factory=list)
    problems: list[DataProblem] = field(default_factory=list)


@dataclass(frozen=True)
class Survey:
    """The findings of reading every case once.

    Attributes:
        facts: the findings on each split's cases.
        planes: the classes of a mask's planes; empty for masks of ids.
        mask_format: how masks are stored.
        raters: who made the masks; empty if each image has one.
        notes: remarks for the report.
    """

    facts: Mapping[Split, Sequence[ImageFacts]]
    planes: Sequence[str]
    mask_format: MaskFormat
    raters: Sequence[str] = ()
    notes: Sequence[str] = ()

    def shares(self, splits: Iterable[Split]) -> dict[str | None, ClassShare]:
        """Return the share of each class in some splits, averaged over raters; ignored pixels are under `None`."""
        pixels: Counter[str | None] = Counter()
        cases: Counter[str | None] = Counter()
        total = 0
        background = self.mask_format.background
        names: dict[int | None, str | None] = {self.mask_format.ignore_index: None}
        names.update(zip(self.mask_format.class_ids, self.mask_format.classes, strict=True))
        for facts in (facts for split in splits for facts in self.facts[split]):
            size = facts.size[0] * facts.size[1] * max(len(self.raters), 1)
            total += size
            here: Counter[str | None] = Counter()
            for position, counts in enumerate(facts.counts):
                if self.planes:
                    names = {self.mask_format.ignore_index: None, 1: self._class_of(facts, position)}
                for value, count in counts.items():
                    label = self.mask_format.label(value, bool(self.planes))
                    if label in names:
                        here[names[label]] += count
            if self.planes and background is not None and background not in here and facts.counts:
                ignored = here.get(None, 0)
                rest = size - sum(here.values()) + ignored - ignored // len(self.planes)
                here.update({background: rest} if rest > 0 else {})
            pixels.update(here)
            cases.update(here.keys())
        if self.planes:
            pixels[None] //= len(self.planes)
        return {
            name: ClassShare(pixels[name] / max(total, 1), cases[name]) for name in (*self.mask_format.classes, None)
        }

    def _class_of(self, facts: ImageFacts, position: int) -> str:
        """Return the class of a plane; the first class, the background, may have none."""
        each = len(facts.counts) // max(len(self.raters), 1)
        return self.mask_format.classes[position % each - each]

    def problems(self) -> list[DataProblem]:
        """Return all problems; the values of masks are judged over all cases."""
        everything = [facts for part in self.facts.values() for facts in part]
        found = [problem for facts in everything for problem in facts.problems]
        for position in range(max((len(facts.counts) for facts in everything), default=0)):
            cases = [facts for facts in everything if len(facts.counts) > position]
            found += self._value_problems(cases, position)
        return found

    def _value_problems(self, cases: Sequence[ImageFacts], position: int) -> list[DataProblem]:
        """Return values without an id, or that all masks of 0 and 255 have no foreground but the ignored label."""
        mask_format, planes = self.mask_format, bool(self.planes)
        values = {value for facts in cases for value in facts.counts[position]}
        described = [(facts, mask_format.describe_unknown(facts.counts[position], planes)) for facts in cases]
        wrong = [(facts, what) for facts, what in described if what]
        photos = [facts for facts, _ in wrong if len(facts.counts[position]) > PHOTO_LEVELS]
        if photos:
            # The values of photographs say nothing about those of the masks.
            others = [facts for facts in cases if facts not in photos]
            problems = [_too_many_values(facts, position) for facts in photos]
            return problems + (self._value_problems(others, position) if others else [])
        if wrong:
            remedy = suggest_label_map(values, range(2) if planes else mask_format.ids, mask_format.ignore_index)
            return [DataProblem(f"holds {what}", _mask_file(facts, position), remedy) for facts, what in wrong]
        unannotated = self.planes and 0 not in values  # of this class, which is no reason to refuse the others
        if unannotated or not self._only_ignored_labels(values):
            return []
        label = mask_format.ignore_index
        what = f"all masks hold {' and '.join(map(str, sorted(values)))} alone, and {label} is the ignored label"
        where = Path(_mask_file(cases[0], position)).parent
        remedy = f"If {label} is foreground, set 'data.label_map={{{label}:1}}'."
        return [DataProblem(f"{what}: no foreground would be left to learn", where, remedy)]

    def _only_ignored_labels(self, values: Collection[int]) -> bool:
        """Return whether the stored values include the ignored label and no foreground."""
        mask_format = self.mask_format
        labels = {mask_format.label(value, bool(self.planes)) for value in values}
        ignored = mask_format.ignore_index
        return ignored in values and ignored not in (mask_format.label_map or {}) and labels <= {0, ignored}

    def warnings(self) -> list[str]:
        """Describe anything valid but suspicious."""
        everything = [(split, facts) for split, part in self.facts.items() for facts in part]
        ids = [] if self.planes else everything  # Planes of a rare class are often empty.
        doubtful = [f"{split}/{facts.pair.case}" for split, facts in ids if self._only_ignored_labels(facts.counts[0])]
        lines = warn_of_absent_classes(self.shares(["train"]))
        if doubtful:
            label = self.mask_format.ignore_index
            lines.append(
                f"no foreground but ignored pixels ({label}) in {len(doubtful)} masks: "
                f"{join_some(doubtful, MAX_CASES)}; if {label} is foreground there, set 'data.label_map={{{label}:1}}'"
            )
        return lines + warn_of_shared_images((split, facts.pair.case, facts.digest) for split, facts in everything)

    def report(self, root: Path) -> str:
        """Return the findings as text: cases, sizes and kinds, the share of each class, notes and warnings."""
        stored = "one mask for each class" if self.planes else "masks of ids"
        stored += f" by {len(self.raters)} raters" if self.raters else ""
        rows = [("split", "cases", "height x width", "images")]
        for split, part in self.facts.items():
            sizes, kinds = _size_range([facts.size for facts in part]), count_kinds(facts.kind for facts in part)
            rows.append((split, str(len(part)), sizes, kinds))
        heading = f"{root}: {sum(map(len, self.facts.values()))} cases, {stored}, {self.mask_format.activation}"
        shares = {split: self.shares([split]) for split in self.facts}
        notes = [*(f"Note: {line}" for line in self.notes), *(f"Warning: {line}" for line in self.warnings())]
        return format_report(heading, rows, shares, "pixels", notes)


def survey_layout(layout: Layout, image_format: ImageFormat, mask_format: MaskFormat, workers: int) -> Survey:
    """Read every file of a layout once."""
    with ThreadPoolExecutor(workers) as pool:
        facts = {
            split: list(pool.map(lambda pair: _inspect(pair, image_format, mask_format, layout), pairs))
            for split, pairs in layout.pairs.items()
        }
    return Survey(facts, layout.planes, mask_format, layout.raters, tuple(layout.notes))


def _inspect(pair: Pair, image_format: ImageFormat, mask_format: MaskFormat, layout: Layout) -> ImageFacts:
    facts = ImageFacts(pair)
    try:
        image: DecodedImage | WindowedTiff | None = open_windowed_tiff(pair.image)
        if image is None:
            data = read_bytes(pair.image)
            facts.digest = blake2b(data, digest_size=16).digest()
            image = read_image(pair.image, data)
        else:
            facts.digest = _digest(pair.image)
    except DataProblem as problem:
        facts.problems.append(problem)
        return facts
    record_image(facts, image, image_format)
    record_masks(facts, image, mask_format, layout)
    return facts


def _digest(path: Path) -> bytes:
    """Return the `blake2b` digest of a file that may not fit into memory."""
    state = blake2b(digest_size=16)
    with path.open("rb") as file:
        while data := file.read(2**22):
            state.update(data)
    return state.digest()


def record_image(facts: ImageFacts, image: DecodedImage | WindowedTiff, image_format: ImageFormat) -> None:
    """Add the findings about an image to `facts`; a windowed TIFF is read block by block."""
    facts.size, facts.kind = image.size, image.kind
    step = max(1, image.size[0] // 64), max(1, image.size[1] // 64)
    levels: NDArray[Any] | None = None
    try:
        for rows in image.blocks():
            block = image.window(rows, slice(None))
            first = block.pixels[..., 0]
            if levels is None or len(levels) <= MASK_LEVELS:
                few = np.unique(first[:: step[0], :: step[1]])
                found = np.unique(first) if len(few) <= MASK_LEVELS else few
                levels = found if levels is None else np.union1d(levels, found)
            # Integers are refused only for what all pixels share (type, channels), so one pixel is enough.
            one_pixel = block.pixels.dtype.kind != "f" and block.palette is None
            with _naming_rows(rows, image):
                image_format.to_tensor(block.window(slice(0, 1), slice(0, 1)) if one_pixel else block, 0.0)
    except DataProblem as problem:
        facts.problems.append(problem)
    facts.levels = 0 if levels is None or len(levels) > MASK_LEVELS else len(levels)


@contextmanager
def _naming_rows(rows: slice, image: DecodedImage | WindowedTiff) -> Iterator[None]:
    """Add the rows of a block to a problem, since its numbers count these rows only."""
    try:
        yield
    except DataProblem as problem:
        if rows.stop - rows.start == image.size[0]:
            raise
        what = f"{problem.what} (in the rows {rows.start} to {rows.stop - 1})"
        raise DataProblem(what, problem.where, problem.remedy) from problem


def record_masks(
    facts: ImageFacts, image: DecodedImage | WindowedTiff, mask_format: MaskFormat, layout: Layout
) -> None:
    """Add the findings about the masks of an image to `facts`."""
    files = facts.pair.masks
    masks: dict[int, OpenMask] = {}
    for number, file in enumerate(files):
        try:
            masks[number] = OpenMask(image, file, mask_format)
        except DataProblem as problem:
            facts.problems.append(_explain_refusal(facts, file, problem))
    counts: dict[int, list[Counter[int]]] = {}
    # Planes that exclude each other are judged together, if each of them is valid.
    exclusive = mask_format.background is not None and bool(layout.planes)
    each = len(files) // max(len(layout.raters), 1)
    raters = {start: range(start, start + each) for start in range(0, len(files), each or 1)} if exclusive else {}
    for rows in image.blocks():
        stored: dict[int, list[NDArray[Any]]] = {}
        for number, mask in list(masks.items()):
            try:
                with _naming_rows(rows, image):
                    stored[number] = mask.planes(rows, slice(0, image.size[1]))
            except DataProblem as problem:
                facts.problems.append(_explain_refusal(facts, files[number], problem))
                del masks[number]
                continue
            here = [count_values(plane) for plane in stored[number]]
            for total, found in zip(counts.setdefault(number, [Counter() for _ in here]), here, strict=True):
                total.update(found)
        for start, numbers in list(raters.items()):
            if not set(numbers) <= set(masks) or any(
                mask_format.describe_unknown(total, True) for number in numbers for total in counts[number]
            ):
                continue
            try:
                with _naming_rows(rows, image):
                    _check_exclusive(
                        [plane for number in numbers for plane in stored[number]], files[start], mask_format
                    )
            except DataProblem as problem:
                facts.problems.append(problem)
                del raters[start]
    if len(masks) == len(files):
        facts.counts = [dict(sorted(total.items())) for number in range(len(files)) for total in counts[number]]


def _check_exclusive(planes: Sequence[NDArray[Any]], file: MaskFile, mask_format: MaskFormat) -> None:
    try:
        mask_format.encode(planes, planes=True)
    except ValueError as error:
        raise DataProblem(str(error), str(file)) from error


def _explain_refusal(facts: ImageFacts, file: MaskFile, problem: DataProblem) -> DataProblem:
    return _swapped_files(facts, str(file)) if facts.levels > 1 and _is_color_photo(file) else problem


def _too_many_values(facts: ImageFacts, position: int) -> DataProblem:
    """Return the problem of a mask that has more values than a mask of classes."""
    where = _mask_file(facts, position)
    if facts.levels > 1:
        return _swapped_files(facts, where)
    values = len(facts.counts[position])
    what = f"looks like a photograph or a map of instances: it holds {values} values, but ids are required"
    return DataProblem(what, where, "Put a mask there; convert instances to classes.")


def _is_color_photo(file: object) -> bool:
    if not isinstance(file, Path):
        return False
    try:
        pixels = read_image(file).pixels
    except DataProblem:
        return False
    return pixels.shape[2] > 1 and len(np.unique(pixels)) > PHOTO_LEVELS


def _swapped_files(facts: ImageFacts, mask: str) -> DataProblem:
    what = f"looks like a photograph, and its image {facts.pair.image.name} like a mask: it holds {facts.levels} values"
    return DataProblem(what, mask, "Exchange the two files, or data.images and data.masks.")


def _mask_file(facts: ImageFacts, position: int) -> str:
    """Return the file of a plane: one file may hold several."""
    masks = facts.pair.masks
    return str(masks[position * len(masks) // max(len(facts.counts), 1)])


def _size_range(sizes: Sequence[tuple[int, int]]) -> str:
    heights, widths = zip(*sizes, strict=True)
    smallest, largest = f"{min(heights)}x{min(widths)}", f"{max(heights)}x{max(widths)}"
    return smallest if smallest == largest else f"{smallest} to {largest}"
