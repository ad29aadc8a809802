"""What was found, as tables: for a terminal, a page and a spreadsheet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_dice.data_check.case_statistics import SMALL, CaseStatistics
from lightning_dice.data_check.content_checks import class_shares, thickness
from lightning_dice.data_check.finding import Finding
from lightning_dice.data_check.survey import SurveyResult

if TYPE_CHECKING:
    from rich.console import RenderableType

Row = Sequence[str]
SHOWN = 5  # cases of a finding on the terminal
COLORS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def split_table(found: SurveyResult) -> list[Row]:
    """A row for each split, below a header: cases, sizes, spacings, channels, intensities, empty masks."""
    rows: list[Row] = [
        ["split", "cases", "sizes", "spacing (mm)", "channels", "files", "1 to 99 % of values", "empty", "ignored"]
    ]
    for split, count in found.sizes.items():
        cases = found.of(split)
        unread = count - len(cases)
        tiles = f" in {count} tiles" if split in found.images else ""
        number = f"{found.whole(split)}{tiles}" + (f" ({unread} unreadable)" if unread else "")
        if not cases:
            rows.append([split, number, *[""] * 7])
            continue
        spacings = [case.spacing for case in cases if case.spacing]
        kinds = Counter(case.kind for case in cases if case.kind).most_common(3)
        pixels = sum(case.pixels for case in cases)
        empty = sum(not case.foreground(found.task) for case in cases)
        rows.append(
            [
                split,
                number,
                _between([case.size for case in cases], "x", "{:.0f}"),
                _between(spacings, " x ", "{:.3g}") if spacings else "unknown",
                ", ".join(str(channels) for channels in sorted({case.channels for case in cases})),
                ", ".join(kind if len(kinds) == 1 else f"{kind} ({n})" for kind, n in kinds) or "-",
                f"{min(case.range[1] for case in cases):.3g} to {max(case.range[3] for case in cases):.3g}",
                str(empty),
                f"{100 * sum(case.ignored for case in cases) / max(pixels, 1):.3g} %",
            ]
        )
    return rows


def class_table(found: SurveyResult) -> list[Row]:
    """A row for each class, below a header: its share of the pixels, and the cases it occurs in, of each split."""
    rows: list[Row] = [["class", *(f"{split}: pixels (cases)" for split in found.sizes)]]
    shares = {split: class_shares(found.of(split), len(found.task.classes)) for split in found.sizes}
    for index, name in enumerate(found.task.classes):
        cells = []
        for split, part in shares.items():
            cases = sum(case.objects[index].pixels > 0 for case in found.of(split))
            cells.append(f"{100 * part[index]:.3g} % ({cases})")
        rows.append([str(name), *cells])
    return rows


def object_table(found: SurveyResult) -> list[Row]:
    """A row for each class that is something: its connected components in all splits.

    How many there are, and in the median case that has any; their pixels; how many have fewer than 10; and how many
    pixels they are across, about.
    """
    heads = [
        "class",
        "components",
        "in a case",
        "pixels: least",
        "5 %",
        "median",
        "95 %",
        "most",
        f"< {SMALL}",
        "width",
    ]
    rows: list[Row] = [heads]
    for index in found.task.objects:
        objects = [case.objects[index] for case in found.cases if case.objects[index].pixels]
        name = str(found.task.classes[index])
        if not objects:
            rows.append([name, "0", *[""] * 8])
            continue
        sizes = component_sizes(found.cases, index)
        low, middle, high = np.percentile(sizes, [5, 50, 95])
        trifles = int((sizes < SMALL).sum())
        rows.append(
            [
                name,
                str(len(sizes)),
                f"{np.median([len(one.sizes) for one in objects]):.0f}",
                str(int(sizes.min())),
                f"{low:.0f}",
                f"{middle:.0f}",
                f"{high:.0f}",
                str(int(sizes.max())),
                f"{trifles} ({100 * trifles / len(sizes):.3g} %)",
                f"{thickness(objects):.1f}",
            ]
        )
    return rows


def component_sizes(cases: Sequence[CaseStatistics], index: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Pixels of all connected components of a class."""
    return np.concatenate([np.zeros(0, np.int64), *(case.objects[index].sizes for case in cases)])


def case_columns(found: SurveyResult) -> list[str]:
    """Names of what `case_row` gives."""
    columns = ["split", "case", "size", "mask_size", "spacing", "channels", "kind"]
    columns += ["min", "p1", "median", "p99", "max", "mean", "std", "ignored"]
    for name in found.task.classes:
        columns += [
            f"pixels/{name}",
            f"share/{name}",
            f"components/{name}",
            f"smallest/{name}",
            f"below_{SMALL}/{name}",
        ]
    return [*columns, "own_place"]


def case_row(case: CaseStatistics, found: SurveyResult) -> dict[str, str]:
    """The numbers of a case, by column. `own_place`: the mean rank of the gradient below its mask's outline."""
    row = {
        "split": case.split,
        "case": case.name,
        "size": "x".join(map(str, case.size)),
        "mask_size": "x".join(map(str, case.mask_size)),
        "spacing": "x".join(f"{value:.6g}" for value in case.spacing or ()),
        "channels": str(case.channels),
        "kind": case.kind,
        "mean": " ".join(f"{value:.6g}" for value in case.mean),
        "std": " ".join(f"{value:.6g}" for value in case.std),
        "ignored": f"{case.ignored:.6g}",
    }
    row.update(zip(("min", "p1", "median", "p99", "max"), (f"{value:.6g}" for value in case.range), strict=True))
    for name, one in zip(found.task.classes, case.objects, strict=True):
        row[f"pixels/{name}"] = str(one.pixels)
        row[f"share/{name}"] = f"{one.pixels / max(case.pixels, 1):.6g}"
        row[f"components/{name}"] = str(len(one.sizes))
        row[f"smallest/{name}"] = str(one.sizes[0]) if len(one.sizes) else ""
        row[f"below_{SMALL}/{name}"] = str(int((one.sizes < SMALL).sum()))
    if case.placement.size and not math.isnan(case.placement[0]):
        row["own_place"] = f"{case.placement[0]:.4f}"
    return row


def shown(found: SurveyResult, findings: Sequence[Finding]) -> list[RenderableType]:
    """Tables and findings for a terminal."""
    from rich.text import Text

    parts: list[RenderableType] = []
    for rows in (split_table(found), class_table(found), object_table(found)):
        if len(rows) > 1:
            parts.append(_rich(rows))
    if not findings:
        parts.append(Text("Nothing is wrong with these data.", style="green"))
    for finding in findings:
        text = Text(f"{finding.severity}: ", style=COLORS[finding.severity])
        text.append(f"{finding.title}", style="default")
        text.append(f"  [{finding.kind}]", style="dim")
        for line in (finding.why, finding.remedy):
            if line:
                text.append(f"\n  {line}", style="default" if line == finding.remedy else "dim")
        details = finding.details or [""] * len(finding.cases)
        for case, detail in list(zip(finding.cases, details, strict=True))[:SHOWN]:
            text.append(f"\n  - {case}" + (f": {detail}" if detail else ""), style="default")
        if len(finding.cases) > SHOWN:
            text.append(f"\n  - and {len(finding.cases) - SHOWN} more", style="default")
        parts.append(text)
    return parts


def told(rows: Sequence[Row]) -> list[int]:
    """The columns that say something of some row."""
    return [i for i in range(len(rows[0])) if any(row[i] not in ("", "-", "unknown") for row in rows[1:])]


def _rich(rows: Sequence[Row]) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    used = [
        column for column in range(len(rows[0])) if any(row[column] not in ("", "-", "unknown") for row in rows[1:])
    ]
    for column in used:
        table.add_column(rows[0][column])
    for row in rows[1:]:
        table.add_row(*(Text(row[column]) for column in used))
    return table


def _between(values: Sequence[Sequence[float]], joint: str, style: str) -> str:
    """The least and the largest along each axis."""
    if len({len(value) for value in values}) > 1:
        return "various"
    table = np.array(values)
    ends = [joint.join(style.format(value) for value in end) for end in (table.min(0), table.max(0))]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
