"""The findings as one HTML file, which does not need the network; its only script sorts the table of cases."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_dice.data_check.case_statistics import CaseStatistics
from lightning_dice.data_check.finding import SEVERITIES, Finding, pluralize
from lightning_dice.data_check.mask_checks import class_shares
from lightning_dice.data_check.survey import SurveyResult
from lightning_dice.data_check.tables import (
    Row,
    class_table,
    component_sizes,
    component_table,
    split_table,
    used_columns,
)
from lightning_dice.data_check.task import Task
from lightning_dice.plotting.colors import class_colors
from lightning_dice.report.rendering import render_template

MAX_PICTURES = 12  # cases of a finding that are shown in pictures
MAX_LISTED = 200  # cases of a finding that are named
MAX_ROWS = 2000  # of the table of cases


def render_inspection(result: SurveyResult, findings: Sequence[Finding], title: str, details: Mapping[str, str]) -> str:
    """Render the page of an inspection.

    Args:
        result: the measurements; the cases of `illustrated_cases` should have thumbnails.
        findings: most severe first.
        title: the page's title.
        details: the data and how they were read, in the order in which they are listed.
    """
    colors = _class_colors(result.task)
    by_key = result.by_key()
    return render_template(
        "lightning_dice.data_check",
        "inspection.html.j2",
        title=title,
        subtitle=_summarize(result),
        cards=_cards(result, findings),
        findings=[_describe_finding(finding, by_key) for finding in findings],
        splits=_drop_unused_columns(split_table(result)),
        classes=_drop_unused_columns(class_table(result)),
        colors=[(result.task.classes[i], colors[i]) for i in result.task.foreground],
        shares=_share_chart(result, colors),
        components=_drop_unused_columns(component_table(result)),
        histograms=_size_histograms(result, colors),
        cases=_case_table(result, findings),
        details=details,
    )


def illustrated_cases(findings: Iterable[Finding]) -> list[str]:
    """Return the cases that findings show in pictures, without repetition.

    >>> illustrated_cases([Finding("duplicates", "error", "1 duplicate", cases=["train/a"], partners=["train/b"])])
    ['train/a', 'train/b']
    """
    keys: list[str] = []
    for finding in findings:
        keys += [*finding.cases[:MAX_PICTURES], *finding.partners[:MAX_PICTURES]]
    return list(dict.fromkeys(keys))


def _summarize(result: SurveyResult) -> str:
    images = {split: result.image_count(split) for split in result.sizes}
    measured, classes = sum(result.sizes.values()), len(result.task.classes)
    splits = ", ".join(f"{split} {count}" for split, count in images.items())
    text = f"{pluralize(sum(images.values()))} ({splits}), {classes} class{'es' * (classes != 1)}, "
    text += result.task.activation
    text += f"; large images are measured in tiles, {measured} in all" if result.images else ""
    unread = measured - len(result.cases)
    return text + (f"; {pluralize(unread)} could not be read" if unread else "")


def _cards(result: SurveyResult, findings: Sequence[Finding]) -> list[tuple[int, str, str]]:
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in SEVERITIES}
    return [
        (counts["error"], "errors", "break training or its scores"),
        (counts["warning"], "warnings", "may spoil them"),
        (counts["note"], "notes", "good to know"),
        (sum(map(result.image_count, result.sizes)), "cases", "in all splits"),
    ]


def _describe_finding(finding: Finding, by_key: Mapping[str, CaseStatistics]) -> dict[str, Any]:
    details = finding.details or [""] * len(finding.cases)
    partners = finding.partners or [""] * len(finding.cases)
    entries = list(zip(finding.cases, details, partners, strict=True))
    figures = []
    for name, detail, partner in entries[:MAX_PICTURES]:
        images = _images(by_key[key] for key in (name, partner) if key in by_key)
        if images:
            figures.append({"images": images, "name": name, "detail": detail})
    # A single case that a caption or the title names already is not listed once more.
    named = len(entries) == 1 and (figures or finding.cases[0] in finding.title)
    listed = [] if named else [(name, detail) for name, detail, _ in entries[:MAX_LISTED]]
    is_open = not figures and len(listed) <= MAX_PICTURES
    return {"finding": finding, "figures": figures, "listed": listed, "open": is_open}


def _images(cases: Iterable[CaseStatistics]) -> list[dict[str, str]]:
    return [
        {"name": case.key, "url": f"data:image/jpeg;base64,{base64.b64encode(case.thumbnail).decode()}"}
        for case in cases
        if case.thumbnail is not None
    ]


def _drop_unused_columns(rows: Sequence[Row]) -> list[list[str]]:
    used = used_columns(rows)
    return [[row[i] for i in used] for row in rows]


def _class_colors(task: Task) -> list[str]:
    palette = class_colors(len(task.classes), skip=[i for i in range(len(task.classes)) if i not in task.foreground])
    return ["#" + bytes(color).hex() for color in palette]


def _share_chart(result: SurveyResult, colors: Sequence[str]) -> dict[str, Any]:
    """Lay out bars of the classes' shares of each split, from 0.001 % to 100 %.

    The axis is logarithmic, so that a class of 0.1 % is visible beside one of 50 %.
    """
    left, width, top = 130, 420, 16
    shares = {split: class_shares(result.of(split), len(result.task.classes)) for split in result.sizes}
    rows = []
    for index in result.task.foreground:
        bars: list[dict[str, Any]] = []
        for split, of_class in shares.items():
            length = width * max(0.0, 1 + math.log10(max(of_class[index], 1e-5)) / 5)
            text = f"{split} {100 * of_class[index]:.3g} %"
            bars.append({"top": top + 14 * len(bars), "length": round(length, 1), "text": text})
        rows.append({"name": str(result.task.classes[index])[:20], "color": colors[index], "top": top, "bars": bars})
        top += 14 * len(bars) + 6
    ticks = [(round(left + width * (1 + power / 5), 1), f"{100 * 10.0**power:g} %") for power in range(-5, 1)]
    return {"left": left, "height": top, "rows": rows, "ticks": ticks}


def _size_histograms(result: SurveyResult, colors: Sequence[str]) -> list[dict[str, Any]]:
    """Lay out the number of each class's components by their pixels, in powers of two."""
    step, height = 24, 80
    histograms = []
    for index in result.task.foreground:
        sizes = component_sizes(result.cases, index)
        if not len(sizes):
            continue
        counts = np.bincount(np.log2(sizes).astype(int)).tolist()
        bars = [
            {
                "left": i * step,
                "height": round(height * count / max(counts), 1),
                "title": f"{2**i} to {2 ** (i + 1) - 1} pixels: {count}",
                "count": _abbreviate(count) if count else "",
                "pixels": _abbreviate(2**i) if i % 2 == 0 else "",
            }
            for i, count in enumerate(counts)
        ]
        name = result.task.classes[index]
        histograms.append({"name": name, "color": colors[index], "width": len(counts) * step, "bars": bars})
    return histograms


def _abbreviate(number: int) -> str:
    for unit, name in ((10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.0f}{name}"
    return str(number)


def _case_table(result: SurveyResult, findings: Sequence[Finding]) -> dict[str, Any]:
    by_case: dict[str, list[Finding]] = {}
    for finding in findings:
        for key in {*finding.cases, *finding.partners}:
            by_case.setdefault(key, []).append(finding)
    cases = result.cases
    if len(cases) > MAX_ROWS:  # Those with findings first.
        cases = sorted(cases, key=lambda case: case.key not in by_case)[:MAX_ROWS]
    foreground = result.task.foreground
    shares = [f"{result.task.classes[i]} %" for i in foreground]
    rows = [
        {
            "images": _images([case]),
            "name": case.key,
            "pixels": math.prod(case.size),
            "size": "x".join(map(str, case.size)),
            "maximum": f"{case.range[3]:.6g}",
            "range": f"{case.range[1]:.3g} to {case.range[3]:.3g}",
            "shares": [100 * case.components[index].pixels / max(case.pixels, 1) for index in foreground],
            "components": sum(len(case.components[index].sizes) for index in foreground),
            "findings": by_case.get(case.key, ()),
        }
        for case in cases
    ]
    return {
        "columns": ["picture", "case", "size", "values (1 to 99 %)", *shares, "components", "findings"],
        "rows": rows,
        "total": len(result.cases),
        "pictures": sum(case.thumbnail is not None for case in cases),
    }
