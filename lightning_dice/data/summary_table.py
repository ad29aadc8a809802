"""The parts of a data set's report that images and volumes share."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from lightning_dice.data.interfaces import Split
from lightning_dice.text import join_some

MAX_CASES = 5  # cases in one warning


class ClassShare(NamedTuple):
    """How common a class is.

    Attributes:
        fraction: its share of all pixels, ignored ones included.
        cases: how many cases it occurs in.
    """

    fraction: float
    cases: int


Shares = Mapping[str | None, ClassShare]  # by class; of the ignored pixels under None


def format_report(
    heading: str, split_rows: Sequence[Sequence[str]], shares: Mapping[Split, Shares], unit: str, notes: Sequence[str]
) -> str:
    """Lay out a report: a heading, a table of the splits, a table of the classes, then notes and warnings.

    Args:
        heading: the first line.
        split_rows: the table of the splits, its header first.
        shares: the share of each class in each split.
        unit: what the shares count: `"pixels"` or `"voxels"`.
        notes: the last lines.

    >>> shares = {"train": {"lesion": ClassShare(0.25, 3), None: ClassShare(0.0, 0)}}
    >>> print(format_report("data: 4 cases", [("split", "cases"), ("train", "4")], shares, "pixels", []))
    data: 4 cases
    <BLANKLINE>
    split  cases
    train  4
    <BLANKLINE>
    pixels (cases)  train
    lesion          25% (3)
    """
    rows: list[tuple[str, ...]] = [(f"{unit} (cases)", *shares)]
    for name in next(iter(shares.values()), {}):
        if name is not None or any(part[None].cases for part in shares.values()):
            cells = (f"{100 * part[name].fraction:.3g}% ({part[name].cases})" for part in shares.values())
            rows.append(("(ignored)" if name is None else name, *cells))
    lines = [heading, "", *align_columns(split_rows), "", *align_columns(rows)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pad the cells of a table, so that its columns align.

    >>> align_columns([("split", "cases"), ("val", "12")])
    ['split  cases', 'val    12']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def count_kinds(kinds: Iterable[str], limit: int | None = None) -> str:
    """List kinds of images, the most common first, with their numbers if there are several.

    >>> count_kinds(["8-bit gray", "8-bit RGB", "8-bit gray"]), count_kinds(["8-bit gray"] * 3)
    ('8-bit gray (2), 8-bit RGB (1)', '8-bit gray')
    """
    counts = Counter(kinds).most_common()
    shown = ", ".join(kind if len(counts) == 1 else f"{kind} ({count})" for kind, count in counts[:limit])
    return shown + " ..." * (limit is not None and len(counts) > limit)


def warn_of_absent_classes(train: Shares) -> list[str]:
    """Return a warning for each class that no training case contains.

    >>> warn_of_absent_classes({"lesion": ClassShare(0.0, 0), None: ClassShare(0.0, 0)})
    ["class 'lesion' never occurs in the train split"]
    """
    absent = [name for name, share in train.items() if name is not None and not share.cases]
    return [f"class {name!r} never occurs in the train split" for name in absent]


def warn_of_shared_images(images: Iterable[tuple[Split, str, Hashable]]) -> list[str]:
    """Return a warning if an image is in several splits.

    Args:
        images: split, case and digest of each.

    >>> warn_of_shared_images([("train", "a", b"1"), ("val", "b", b"1"), ("val", "c", b"2")])
    ['1 image is in more than one split: train/a = val/b']
    """
    same: dict[Hashable, dict[Split, str]] = defaultdict(dict)
    for split, case, digest in images:
        same[digest].setdefault(split, f"{split}/{case}")
    shared = [" = ".join(names.values()) for names in same.values() if len(names) > 1]
    if not shared:
        return []
    count = "1 image is" if len(shared) == 1 else f"{len(shared)} images are"
    return [f"{count} in more than one split: {join_some(shared, MAX_CASES)}"]
