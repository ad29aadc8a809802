"""What a folder of images and masks holds: everything that is wrong with it, or a report."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from lightning_dice.data.layout import Layout, Pair
from lightning_dice.data.masks import MaskFormat, count_values, read_masks, suggest
from lightning_dice.data.readers import Problem, read_bytes, read_picture, to_image
from lightning_dice.data.source import DataError, Split

LISTED = 20  # files in one error
NAMED = 5  # files in one warning


@dataclass
class Facts:
    """What reading a case has shown.

    Attributes:
        pair: the case.
        size: height and width.
        kind: the image's depth and colour.
        digest: of the image file's content.
        counts: pixels of each stored value, for each mask file.
        problems: what is wrong.
    """

    pair: Pair
    size: tuple[int, int] = (0, 0)
    kind: str = ""
    digest: bytes = b""
    counts: list[dict[int, int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


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
        planes: masks are one file for each class.
        mask_format: how masks are stored.
    """

    facts: Mapping[Split, Sequence[Facts]]
    planes: bool
    mask_format: MaskFormat

    def shares(self, splits: Iterable[Split]) -> dict[str | None, Share]:
        """The share of each class in some splits, and under `None` that of ignored pixels."""
        pixels: Counter[str | None] = Counter()
        cases: Counter[str | None] = Counter()
        total = 0
        names: dict[int | None, str | None] = {self.mask_format.ignore_index: None}
        names.update(zip(self.mask_format.class_ids, self.mask_format.classes, strict=True))
        for facts in (facts for split in splits for facts in self.facts[split]):
            total += facts.size[0] * facts.size[1]
            here: Counter[str | None] = Counter()
            for position, counts in enumerate(facts.counts):
                if self.planes:
                    names = {self.mask_format.ignore_index: None, 1: self.mask_format.classes[position]}
                for value, count in counts.items():
                    label = self.mask_format.label(value, self.planes)
                    if label in names:
                        here[names[label]] += count
            pixels.update(here)
            cases.update(here.keys())
        if self.planes:
            pixels[None] //= len(self.mask_format.classes)
        return {name: Share(pixels[name] / max(total, 1), cases[name]) for name in (*self.mask_format.classes, None)}

    def problems(self) -> list[Problem]:
        """All that is wrong, the values of masks judged over all cases."""
        everything = [facts for part in self.facts.values() for facts in part]
        found = [problem for facts in everything for problem in facts.problems]
        for position in range(len(self.mask_format.classes) if self.planes else 1):
            found += self._value_problems([facts for facts in everything if facts.counts], position)
        return found

    def _value_problems(self, everything: Sequence[Facts], position: int) -> list[Problem]:
        """Values without an id, or a set of masks in 0 and 255 of which nothing but the ignored label is left."""
        form = self.mask_format
        values = {value for facts in everything for value in facts.counts[position]}
        wrong = [(facts, form.describe(facts.counts[position], self.planes)) for facts in everything]
        wrong = [(facts, what) for facts, what in wrong if what]
        if wrong:
            remedy = suggest(values, range(2) if self.planes else form.ids, form.ignore_index)
            return [Problem(f"holds {what}", facts.pair.masks[position], remedy) for facts, what in wrong]
        unannotated = self.planes and 0 not in values  # of this class, which is no reason to refuse the others
        if unannotated or not self._doubtful(values):
            return []
        label = form.ignore_index
        what = f"all masks hold {' and '.join(map(str, sorted(values)))} alone, and {label} is the ignored label"
        where = everything[0].pair.masks[position].parent
        remedy = f"If {label} is foreground, set 'data.values={{{label}:1}}'."
        return [Problem(f"{what}: no foreground would be left to learn", where, remedy)]

    def _doubtful(self, values: Collection[int]) -> bool:
        """Whether the ignored label is there as stored, and no foreground."""
        form = self.mask_format
        labels = {form.label(value, self.planes) for value in values}
        stored = form.ignore_index in values and form.ignore_index not in (form.values or {})
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
            lines.append(f"no foreground but ignored pixels ({label}) in {len(doubtful)} masks: {_names(doubtful)}")
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
        stored = "one mask file for each class" if self.planes else "masks of ids"
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
        warnings = [f"Warning: {line}" for line in self.warnings()]
        return "\n".join([heading, "", *_align(rows), "", *_align(table), *([""] if warnings else []), *warnings])


def survey(layout: Layout, channels: int, mask_format: MaskFormat, workers: int) -> Survey:
    """Read every file of a layout once."""
    with ThreadPoolExecutor(workers) as pool:
        facts = {
            split: list(pool.map(lambda pair: _inspect(pair, channels, mask_format), pairs))
            for split, pairs in layout.pairs.items()
        }
    return Survey(facts, layout.planes, mask_format)


def error(root: Path, problems: Sequence[Problem]) -> DataError:
    """One error of many problems: grouped by their remedy, the first files of each by name."""
    groups: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        groups[problem.remedy].append(problem)
    lines = []
    left, room = len(groups), LISTED
    # Small groups first: they leave room for the large ones.
    for remedy, group in sorted(groups.items(), key=lambda item: len(item[1])):
        shown = group[: max(room // left, 1)]
        left, room = left - 1, room - len(shown)
        lines += [f"- {problem.where}: {problem.what}" for problem in shown]
        if len(group) > len(shown):
            lines.append(f"- and {len(group) - len(shown)} more of this kind")
        if remedy:
            lines.append(f"  {remedy}")
    text = "\n".join(lines).replace(f"{root}{os.sep}", "")
    return DataError(f"{len(problems)} problem{'s' * (len(problems) > 1)} in {root}:\n{text}")


def _inspect(pair: Pair, channels: int, mask_format: MaskFormat) -> Facts:
    facts = Facts(pair)
    try:
        data = read_bytes(pair.image)
        facts.digest = blake2b(data, digest_size=16).digest()
        picture = read_picture(pair.image, data)
    except Problem as problem:
        facts.problems.append(problem)
        return facts
    facts.size, facts.kind = picture.size, picture.kind
    try:
        to_image(picture, channels)
    except Problem as problem:
        facts.problems.append(problem)
    counts = []
    for path in pair.masks:
        try:
            counts += [count_values(stored) for stored in read_masks(picture, [path], mask_format)]
        except Problem as problem:
            facts.problems.append(problem)
    if len(counts) == len(pair.masks):
        facts.counts = counts
    return facts


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    heights, widths = zip(*sizes, strict=True)
    smallest, largest = f"{min(heights)}x{min(widths)}", f"{max(heights)}x{max(widths)}"
    return smallest if smallest == largest else f"{smallest} to {largest}"


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
