"""Tables of a survey: for the terminal, the HTML page and a spreadsheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from lightning_dice.data_check.case_statistics import SMALL, CaseStatistics
from lightning_dice.data_check.finding import Finding
from lightning_dice.data_check.mask_checks import class_shares, mean_width
from lightning_dice.data_check.survey import SurveyResult

if TYPE_CHECKING:
    from rich.console import RenderableType

Row: TypeAlias = Sequence[str]
MAX_LISTED = 5  # cases of a finding on the terminal
COLORS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def split_table(result: SurveyResult) -> list[Row]:
    """Return a header and a row for each split: cases, sizes, spacings, channels, intensities, empty masks."""
    rows: list[Row] = [
        ["split", "cases", "sizes", "spacing (mm)", "channels", "files", "1 to 99 % of values", "empty", "ignored"]
    ]
    for split, count in result.sizes.items():
        cases = result.of(split)
        unread = count - len(cases)
        tiles = f" in {count} tiles" if split in result.images else ""
        number = f"{result.image_count(split)}{tiles}" + (f" ({unread} unreadable)" if unread else "")
        if not cases:
            rows.append([split, number, *[""] * 7])
            continue
        spacings = [case.spacing for case in cases if case.spacing]
        kinds = Counter(case.kind for case in cases if case.kind).most_common(3)
        pixels = sum(case.pixels for case in cases)
        empty = sum(not case.foreground_pixels(result.task) for case in cases)
        rows.append(
            [
                split,
                number,
                _format_range([case.size for case in cases], "x", "{:.0f}"),
                _format_range(spacings, " x ", "{:.3g}") if spacings else "unknown",
                ", ".join(str(channels) for channels in sorted({case.channels for case in cases})),
                ", ".join(kind if len(kinds) == 1 else f"{kind} ({n})" for kind, n in kinds) or "-",
                f"{min(case.range[1] for case in cases):.3g} to {max(case.range[3] for case in cases):.3g}",
                str(empty),
                f"{100 * sum(case.ignored for case in cases) / max(pixels, 1):.3g} %",
            ]
        )
    return rows


def class_table(result: SurveyResult) -> list[Row]:
    """Return a header and a row for each class: its share of the pixels of each split, and the cases that have it.

    >>> from lightning_dice.data_check.case_statistics import ClassComponents
    >>> from lightning_dice.data_check.task import Task
    >>> case = CaseStatistics("train", "a", 0, (8, 8), (8, 8), pixels=64)
    >>> case.components = [ClassComponents(16, np.array([16]), 8)]
    >>> class_table(SurveyResult(Task(["cell"]), [case], sizes={"train": 1}))
    [['class', 'train: pixels (cases)'], ['cell', '25 % (1)']]
    """
    rows: list[Row] = [["class", *(f"{split}: pixels (cases)" for split in result.sizes)]]
    shares = {split: class_shares(result.of(split), len(result.task.classes)) for split in result.sizes}
    for index, name in enumerate(result.task.classes):
        cells = []
        for split, part in shares.items():
            cases = sum(case.components[index].pixels > 0 for case in result.of(split))
            cells.append(f"{100 * part[index]:.3g} % ({cases})")
        rows.append([str(name), *cells])
    return rows


def component_table(result: SurveyResult) -> list[Row]:
    """Return a header and a row for each foreground class, on its connected components in all splits.

    Their number in all cases and in the median case that has any; their pixels; how many have fewer than 10 pixels; and
    roughly how many pixels wide they are.
    """
    rows: list[Row] = [
        [
            *("class", "components", "in a case", "pixels: least", "5 %", "median", "95 %", "most"),
            *(f"< {SMALL}", "width"),
        ]
    ]
    for index in result.task.foreground:
        components = [case.components[index] for case in result.cases if case.components[index].pixels]
        name = str(result.task.classes[index])
        if not components:
            rows.append([name, "0", *[""] * 8])
            continue
        sizes = component_sizes(result.cases, index)
        low, middle, high = np.percentile(sizes, [5, 50, 95])
        small = int((sizes < SMALL).sum())
        rows.append(
            [
                name,
                str(len(sizes)),
                f"{np.median([len(each.sizes) for each in components]):.0f}",
                str(int(sizes.min())),
                f"{low:.0f}",
                f"{middle:.0f}",
                f"{high:.0f}",
                str(int(sizes.max())),
                f"{small} ({100 * small / len(sizes):.3g} %)",
                f"{mean_width(components):.1f}",
            ]
        )
    return rows


def component_sizes(cases: Sequence[CaseStatistics], index: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the pixels of all connected components of a class.

    >>> from lightning_dice.data_check.case_statistics import ClassComponents
    >>> components = [ClassComponents(5, np.array([1, 4]), 5)]
    >>> component_sizes([CaseStatistics("train", name, 0, (8, 8), (8, 8), components=components) for name in "ab"], 0)
    array([1, 4, 1, 4])
    """
    return np.concatenate([np.zeros(0, np.int64), *(case.components[index].sizes for case in cases)])


def case_columns(result: SurveyResult) -> list[str]:
    """Return the columns of `case_row`."""
    columns = ["split", "case", "size", "mask_size", "spacing", "channels", "kind"]
    columns += ["min", "p1", "median", "p99", "max", "mean", "std", "ignored"]
    for name in result.task.classes:
        columns += [
            f"pixels/{name}",
            f"share/{name}",
            f"components/{name}",
            f"smallest/{name}",
            f"below_{SMALL}/{name}",
        ]
    return [*columns, "own_place"]


def case_row(case: CaseStatistics, result: SurveyResult) -> dict[str, str]:
    """Return the measurements of a case as text, by column.

    `own_place` is the mean rank of the image's gradient along the mask's outline.
    """
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
    for name, each in zip(result.task.classes, case.components, strict=True):
        row[f"pixels/{name}"] = str(each.pixels)
        row[f"share/{name}"] = f"{each.pixels / max(case.pixels, 1):.6g}"
        row[f"components/{name}"] = str(len(each.sizes))
        row[f"smallest/{name}"] = str(each.sizes[0]) if len(each.sizes) else ""
        row[f"below_{SMALL}/{name}"] = str(int((each.sizes < SMALL).sum()))
    if case.has_alignment:
        row["own_place"] = f"{case.alignment[0]:.4f}"
    return row


def render_for_terminal(result: SurveyResult, findings: Sequence[Finding]) -> list[RenderableType]:
    """Return the tables and findings for a terminal."""
    from rich.text import Text

    parts: list[RenderableType] = []
    for rows in (split_table(result), class_table(result), component_table(result)):
        if len(rows) > 1:
            parts.append(_rich_table(rows))
    if not findings:
        parts.append(Text("No problems result.", style="green"))
    for finding in findings:
        text = Text(f"{finding.severity}: ", style=COLORS[finding.severity])
        text.append(f"{finding.title}", style="default")
        text.append(f"  [{finding.kind}]", style="dim")
        for line in (finding.why, finding.remedy):
            if line:
                text.append(f"\n  {line}", style="default" if line == finding.remedy else "dim")
        details = finding.details or [""] * len(finding.cases)
        for case, detail in list(zip(finding.cases, details, strict=True))[:MAX_LISTED]:
            text.append(f"\n  - {case}" + (f": {detail}" if detail else ""), style="default")
        if len(finding.cases) > MAX_LISTED:
            text.append(f"\n  - and {len(finding.cases) - MAX_LISTED} more", style="default")
        parts.append(text)
    return parts


def used_columns(rows: Sequence[Row]) -> list[int]:
    """Return the indices of the columns that are not empty in all rows.

    >>> used_columns([["class", "width"], ["cell", ""]])
    [0]
    """
    return [i for i in range(len(rows[0])) if any(row[i] not in ("", "-", "unknown") for row in rows[1:])]


def _rich_table(rows: Sequence[Row]) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    used = used_columns(rows)
    for column in used:
        table.add_column(rows[0][column])
    for row in rows[1:]:
        table.add_row(*(Text(row[column]) for column in used))
    return table


def _format_range(values: Sequence[Sequence[float]], joint: str, style: str) -> str:
    """Format the minimum and the maximum along each axis."""
    if len({len(value) for value in values}) > 1:
        return "various"
    table = np.array(values)
    ends = [joint.join(style.format(value) for value in end) for end in (table.min(0), table.max(0))]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
