"""What a folder of images and masks holds: everything that is wrong with it, or a report."""

from __future__ import annotations

from collections import Counter, defaultdict
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
from lightning_dice.data.images.image_reader import Picture, read_bytes, read_picture
from lightning_dice.data.images.mask_format import MaskFile, MaskFormat, OpenMask, suggest
from lightning_dice.data.images.windowed_tiff import LargePicture, open_windows
from lightning_dice.data.interfaces import Split
from lightning_dice.data.label_map import count_values

NAMED = 5  # files in one warning
LEVELS = 16  # values of an image that may be a mask
PICTURE = 64  # values of a mask that is none


@dataclass
class ImageFacts:
    """What reading a case has shown.

    Attributes:
        pair: the case.
        size: height and width.
        kind: the image's depth and colour.
        levels: how many values the image holds; 0 if more than a mask does.
        digest: of the image file's content.
        counts: pixels of each stored value, for each mask: of ids one, or one for each plane; of several raters, those
            of each in turn.
        problems: what is wrong.
    """

    pair: Pair
    size: tuple[int, int] = (0, 0)
    kind: str = ""
    levels: int = 0
    digest: bytes = b""
    counts: list[dict[int, int]] = field(default_factory=list)
    problems: list[DataProblem] = field(default_factory=list)


@dataclass(frozen=True)
class Share:
    """How much of some cases a class takes.

    Attributes:
        fraction: of all pixels, the ignored ones included.
        cases: how many cases it occurs in.
    """

    fraction: float
    cases: int


@dataclass(frozen=True)
class Survey:
    """Every case, read once.

    Attributes:
        facts: of each split's cases.
        planes: the classes of a mask's planes; empty for masks of ids.
        mask_format: how masks are stored.
        raters: who made masks; empty where there is one of each image.
        notes: what is to be told beside.
    """

    facts: Mapping[Split, Sequence[ImageFacts]]
    planes: Sequence[str]
    mask_format: MaskFormat
    raters: Sequence[str] = ()
    notes: Sequence[str] = ()

    def shares(self, splits: Iterable[Split]) -> dict[str | None, Share]:
        """The share of each class in some splits, and under `None` that of ignored pixels; the mean over raters."""
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
        return {name: Share(pixels[name] / max(total, 1), cases[name]) for name in (*self.mask_format.classes, None)}

    def _class_of(self, facts: ImageFacts, position: int) -> str:
        """The class of a plane: of the first one, the background, there may be none."""
        each = len(facts.counts) // max(len(self.raters), 1)
        return self.mask_format.classes[position % each - each]

    def problems(self) -> list[DataProblem]:
        """All that is wrong, the values of masks judged over all cases."""
        everything = [facts for part in self.facts.values() for facts in part]
        found = [problem for facts in everything for problem in facts.problems]
        for position in range(max((len(facts.counts) for facts in everything), default=0)):
            found += self._value_problems([facts for facts in everything if len(facts.counts) > position], position)
        return found

    def _value_problems(self, everything: Sequence[ImageFacts], position: int) -> list[DataProblem]:
        """Values without an id, or a set of masks in 0 and 255 of which nothing but the ignored label is left."""
        form = self.mask_format
        values = {value for facts in everything for value in facts.counts[position]}
        wrong = [(facts, form.describe(facts.counts[position], bool(self.planes))) for facts in everything]
        wrong = [(facts, what) for facts, what in wrong if what]
        pictures = [facts for facts, _ in wrong if len(facts.counts[position]) > PICTURE]
        if pictures and len(pictures) < len(everything):
            # The values of photographs say nothing about those of the masks.
            strange = [_picture(facts, position) for facts in pictures]
            return strange + self._value_problems([one for one in everything if one not in pictures], position)
        if pictures:
            return [_picture(facts, position) for facts in pictures]
        if wrong:
            remedy = suggest(values, range(2) if self.planes else form.ids, form.ignore_index)
            return [DataProblem(f"holds {what}", _mask_at(facts, position), remedy) for facts, what in wrong]
        unannotated = self.planes and 0 not in values  # of this class, which is no reason to refuse the others
        if unannotated or not self._doubtful(values):
            return []
        label = form.ignore_index
        what = f"all masks hold {' and '.join(map(str, sorted(values)))} alone, and {label} is the ignored label"
        where = Path(_mask_at(everything[0], position)).parent
        remedy = f"If {label} is foreground, set 'data.label_map={{{label}:1}}'."
        return [DataProblem(f"{what}: no foreground would be left to learn", where, remedy)]

    def _doubtful(self, values: Collection[int]) -> bool:
        """Whether the ignored label is there as stored, and no foreground."""
        form = self.mask_format
        labels = {form.label(value, bool(self.planes)) for value in values}
        stored = form.ignore_index in values and form.ignore_index not in (form.label_map or {})
        return stored and labels <= {0, form.ignore_index}

    def warnings(self) -> list[str]:
        """What may be as it should be, but often is not."""
        lines = []
        train = self.shares(["train"])
        for name in self.mask_format.classes:
            if not train[name].cases:
                lines.append(f"class {name!r} never occurs in the train split")
        everything = [(split, facts) for split, part in self.facts.items() for facts in part]
        blank = [] if self.planes else everything  # Planes of a rare class are often empty.
        doubtful = [f"{split}/{facts.pair.case}" for split, facts in blank if self._doubtful(facts.counts[0])]
        if doubtful:
            label = self.mask_format.ignore_index
            lines.append(
                f"no foreground but ignored pixels ({label}) in {len(doubtful)} masks: {_names(doubtful)}; "
                f"if {label} is foreground there, set 'data.label_map={{{label}:1}}'"
            )
        same: dict[bytes, dict[Split, str]] = defaultdict(dict)
        for split, facts in everything:
            same[facts.digest].setdefault(split, f"{split}/{facts.pair.case}")
        twins = [" = ".join(names.values()) for names in same.values() if len(names) > 1]
        if twins:
            lines.append(f"{len(twins)} images stand in more than one split: {_names(twins)}")
        return lines

    def report(self, root: Path) -> str:
        """The survey as a text to show."""
        cases = sum(map(len, self.facts.values()))
        stored = "one mask for each class" if self.planes else "masks of ids"
        stored += f" by {len(self.raters)} raters" if self.raters else ""
        rows = [("split", "cases", "height x width", "images")]
        for split, part in self.facts.items():
            kinds = Counter(facts.kind for facts in part).most_common()
            words = ", ".join(kind if len(kinds) == 1 else f"{kind} ({count})" for kind, count in kinds)
            rows.append((split, str(len(part)), _sizes([facts.size for facts in part]), words))
        shares = {split: self.shares([split]) for split in self.facts}
        table: list[tuple[str, ...]] = [("pixels (cases)", *self.facts)]
        for name in (*self.mask_format.classes, None):
            if name is not None or any(part[None].cases for part in shares.values()):
                cells = (f"{100 * part[name].fraction:.3g}% ({part[name].cases})" for part in shares.values())
                table.append(("(ignored)" if name is None else name, *cells))
        heading = f"{root}: {cases} cases, {stored}, {self.mask_format.activation}"
        warnings = [*(f"Note: {line}" for line in self.notes), *(f"Warning: {line}" for line in self.warnings())]
        return "\n".join([heading, "", *_align(rows), "", *_align(table), *([""] if warnings else []), *warnings])


def survey(layout: Layout, image_format: ImageFormat, mask_format: MaskFormat, workers: int) -> Survey:
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
        picture: Picture | LargePicture | None = open_windows(pair.image)
        if picture is None:
            data = read_bytes(pair.image)
            facts.digest = blake2b(data, digest_size=16).digest()
            picture = read_picture(pair.image, data)
        else:
            facts.digest = _digest(pair.image)
    except DataProblem as problem:
        facts.problems.append(problem)
        return facts
    look_at(facts, picture, image_format)
    look_at_masks(facts, picture, mask_format, layout)
    return facts


def _digest(path: Path) -> bytes:
    """What `blake2b` makes of a file that memory need not hold."""
    state = blake2b(digest_size=16)
    with path.open("rb") as file:
        while data := file.read(2**22):
            state.update(data)
    return state.digest()


def look_at(facts: ImageFacts, picture: Picture | LargePicture, image_format: ImageFormat) -> None:
    """Note what an image shows, block by block where it is not decoded."""
    facts.size, facts.kind = picture.size, picture.kind
    step = max(1, picture.size[0] // 64), max(1, picture.size[1] // 64)
    levels: NDArray[Any] | None = None
    try:
        for rows in picture.blocks():
            block = picture.window(rows, slice(None))
            first = block.pixels[..., 0]
            if levels is None or len(levels) <= LEVELS:
                few = np.unique(first[:: step[0], :: step[1]])
                found = np.unique(first) if len(few) <= LEVELS else few
                levels = found if levels is None else np.union1d(levels, found)
            # Whole numbers are refused, if at all, by what all of them have in common.
            some = block.pixels.dtype.kind != "f" and block.palette is None
            with _in_rows(rows, picture):
                image_format.image(block.window(slice(0, 1), slice(0, 1)) if some else block, 0.0)
    except DataProblem as problem:
        facts.problems.append(problem)
    facts.levels = 0 if levels is None or len(levels) > LEVELS else len(levels)


@contextmanager
def _in_rows(rows: slice, picture: Picture | LargePicture) -> Iterator[None]:
    """Let a problem of a block say where it lies: the numbers in it are of these rows alone."""
    try:
        yield
    except DataProblem as problem:
        if rows.stop - rows.start == picture.size[0]:
            raise
        what = f"{problem.what} (in the rows {rows.start} to {rows.stop - 1})"
        raise DataProblem(what, problem.where, problem.remedy) from problem


def look_at_masks(facts: ImageFacts, picture: Picture | LargePicture, mask_format: MaskFormat, layout: Layout) -> None:
    """Note what the masks of an image hold."""
    files = facts.pair.masks
    masks: dict[int, OpenMask] = {}
    for number, file in enumerate(files):
        try:
            masks[number] = OpenMask(picture, file, mask_format)
        except DataProblem as problem:
            facts.problems.append(_refused(facts, file, problem))
    counts: dict[int, list[Counter[int]]] = {}
    # Planes that exclude each other can be judged together alone, once each is sound.
    exclusive = mask_format.background is not None and bool(layout.planes)
    each = len(files) // max(len(layout.raters), 1)
    raters = {start: range(start, start + each) for start in range(0, len(files), each or 1)} if exclusive else {}
    for rows in picture.blocks():
        stored: dict[int, list[NDArray[Any]]] = {}
        for number, mask in list(masks.items()):
            try:
                with _in_rows(rows, picture):
                    stored[number] = mask.planes(rows, slice(0, picture.size[1]))
            except DataProblem as problem:
                facts.problems.append(_refused(facts, files[number], problem))
                del masks[number]
                continue
            here = [count_values(plane) for plane in stored[number]]
            for total, found in zip(counts.setdefault(number, [Counter() for _ in here]), here, strict=True):
                total.update(found)
        for start, numbers in list(raters.items()):
            if not set(numbers) <= set(masks) or any(
                mask_format.describe(total, True) for number in numbers for total in counts[number]
            ):
                continue
            try:
                with _in_rows(rows, picture):
                    planes = [plane for number in numbers for plane in stored[number]]
                    try:
                        mask_format.encode(planes, planes=True)
                    except ValueError as wrong:
                        raise DataProblem(str(wrong), str(files[start])) from wrong
            except DataProblem as problem:
                facts.problems.append(problem)
                del raters[start]
    if len(masks) == len(files):
        facts.counts = [dict(sorted(total.items())) for number in range(len(files)) for total in counts[number]]


def _refused(facts: ImageFacts, file: MaskFile, problem: DataProblem) -> DataProblem:
    return _exchanged(facts, str(file)) if facts.levels > 1 and _has_colors(file) else problem


def _picture(facts: ImageFacts, position: int) -> DataProblem:
    """What is wrong with a mask of more values than a mask has."""
    where = _mask_at(facts, position)
    if facts.levels > 1:
        return _exchanged(facts, where)
    what = f"looks like a picture, or numbers objects: it holds {len(facts.counts[position])} values, ids are required"
    return DataProblem(what, where, "Put a mask there; of a map of instances make one of classes.")


def _has_colors(file: object) -> bool:
    """Whether a mask that was refused is a picture in colours."""
    if not isinstance(file, Path):
        return False
    try:
        pixels = read_picture(file).pixels
    except DataProblem:
        return False
    return pixels.shape[2] > 1 and len(np.unique(pixels)) > PICTURE


def _exchanged(facts: ImageFacts, mask: str) -> DataProblem:
    what = f"looks like a picture, and its image {facts.pair.image.name} like a mask: it holds {facts.levels} values"
    return DataProblem(what, mask, "Exchange the two files, or data.images and data.masks.")


def _mask_at(facts: ImageFacts, position: int) -> str:
    """The file of a mask: several planes may stand in one."""
    masks = facts.pair.masks
    return str(masks[position * len(masks) // max(len(facts.counts), 1)])


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    heights, widths = zip(*sizes, strict=True)
    smallest, largest = f"{min(heights)}x{min(widths)}", f"{max(heights)}x{max(widths)}"
    return smallest if smallest == largest else f"{smallest} to {largest}"


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
