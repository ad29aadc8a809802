"""The findings as one HTML file, which needs neither the network nor a script: those it has sort its tables."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np

from lightning_dice.data_check.case_statistics import CaseStatistics, Task
from lightning_dice.data_check.content_checks import cases_in_words
from lightning_dice.data_check.finding import SEVERITIES, Finding
from lightning_dice.data_check.survey import SurveyResult
from lightning_dice.data_check.tables import Row, class_table, component_sizes, object_table, split_table, told
from lightning_dice.plotting.colors import class_colors
from lightning_dice.report.html import STYLE

PICTURED = 12  # cases of a finding that are shown in pictures
LISTED = 200  # cases of a finding that are named
MOST_ROWS = 2000  # of the table of cases

OWN_STYLE = """
.finding { border: 1px solid var(--line); border-left: 5px solid var(--tone); border-radius: 6px; margin: 1rem 0;
  padding: .7rem 1.1rem; }
.finding p { margin: .3rem 0; } .finding h3 { font-size: 1rem; margin: 0; }
.error { --tone: #c0392b; } .warning { --tone: #d98e04; } .note { --tone: #2b7bba; }
.tag { background: var(--tone); border-radius: 4px; color: #fff; font-size: .75rem; font-weight: 600;
  margin-right: .5rem; padding: .1rem .45rem; }
.gallery { display: flex; flex-wrap: wrap; gap: .7rem; margin: .6rem 0; }
.gallery figure { margin: 0; max-width: 236px; } .gallery figcaption { overflow-wrap: anywhere; font-size: .78rem; }
.gallery .pair { border: 1px solid var(--line); border-radius: 6px; max-width: none; padding: .5rem; }
td a { color: var(--tone); }
img { background: #f4f4f4; max-width: 100%; min-height: 72px; }
details > summary { cursor: pointer; color: var(--accent); }
table.sortable th { cursor: pointer; } th[data-order="1"]::after { content: " ▲"; }
th[data-order="-1"]::after { content: " ▼"; }
#cases tr { content-visibility: auto; contain-intrinsic-size: auto 124px; }
#cases td { vertical-align: middle; font-size: .85rem; }
.key span { display: inline-block; margin-right: 1.1rem; white-space: nowrap; }
.key i { border-radius: 3px; display: inline-block; height: .8em; margin-right: .35em; width: .8em; }
svg text { fill: #666; font-size: 10px; }
"""

# Sorts by what a cell says of itself, or by its text; numbers before words.
SCRIPT = """
document.querySelectorAll("table.sortable").forEach(table => {
  const value = (row, i) => { const cell = row.cells[i], text = cell.dataset.v ?? cell.textContent.trim();
    return text === "" || isNaN(text) ? text : +text; };
  table.querySelectorAll("th").forEach((head, i) => { head.tabIndex = 0;
    const sort = () => { const order = head.dataset.order === "1" ? -1 : 1, body = table.tBodies[0];
      table.querySelectorAll("th").forEach(other => delete other.dataset.order); head.dataset.order = order;
      [...body.rows].sort((a, b) => { const x = value(a, i), y = value(b, i);
        return order * (typeof x === typeof y ? (x > y) - (x < y) : typeof x === "number" ? -1 : 1); })
        .forEach(row => body.append(row)); };
    head.onclick = sort; head.onkeydown = event => { if (event.key === "Enter") sort(); }; });
});
"""


def page(found: SurveyResult, findings: Sequence[Finding], title: str, made_of: Mapping[str, str]) -> str:
    """The page.

    Args:
        found: what was measured; the cases that `pictured` names should have thumbnails.
        findings: gravest first.
        title: of the page.
        made_of: what to say of the data and how they were read, in this order.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_summary(found))}</p>',
        _cards(found, findings),
        _section("Findings", "".join(_finding(finding, found) for finding in findings) or "<p>None.</p>"),
        _section("Splits", _table(split_table(found))),
        _section("Classes", _key(found.task) + _table(class_table(found)) + _shares(found)),
        _section("Connected components", _table(object_table(found)) + _histograms(found)),
        _section("Cases", _cases(found, findings)),
        _section("How this was made", _facts(made_of)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{OWN_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<script>{SCRIPT}</script></body></html>\n"
    )


def pictured(findings: Iterable[Finding]) -> list[str]:
    """The cases that findings show in pictures."""
    keys = []
    for finding in findings:
        keys += [*finding.cases[:PICTURED], *finding.partners[:PICTURED]]
    return list(dict.fromkeys(keys))


def _summary(found: SurveyResult) -> str:
    unread = sum(found.sizes.values()) - len(found.cases)
    images = {split: found.whole(split) for split in found.sizes}
    splits = ", ".join(f"{split} {count}" for split, count in images.items())
    count, total = len(found.task.classes), cases_in_words(sum(images.values()))
    text = f"{total} ({splits}), {count} class{'es' * (count != 1)}, {found.task.activation}"
    text += f"; large images are measured in tiles, {sum(found.sizes.values())} in all" if found.images else ""
    return text + (f"; {cases_in_words(unread)} could not be read" if unread else "")


def _cards(found: SurveyResult, findings: Sequence[Finding]) -> str:
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in SEVERITIES}
    cards = [
        (counts["error"], "errors", "break a training or its scores"),
        (counts["warning"], "warnings", "may spoil them"),
        (counts["note"], "notes", "good to know"),
        (sum(map(found.whole, found.sizes)), "cases", "in all splits"),
    ]
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{count}</b>{name}<span>{what}</span></div>' for count, name, what in cards)
        + "</div>"
    )


def _finding(finding: Finding, found: SurveyResult) -> str:
    by_key = found.by_key()
    details = finding.details or [""] * len(finding.cases)
    partners = finding.partners or [""] * len(finding.cases)
    figures = []
    for key, detail, partner in list(zip(finding.cases, details, partners, strict=True))[:PICTURED]:
        pair = [by_key[name] for name in (key, partner) if name in by_key]
        pictures = "".join(_picture(case) for case in pair if case.thumbnail is not None)
        if pictures:
            caption = f"{escape(key)}" + (f"<br>{escape(detail)}" if detail else "")
            style = ' class="pair"' if len(pair) > 1 else ""
            figures.append(f"<figure{style}>{pictures}<figcaption>{caption}</figcaption></figure>")
    lines = [
        escape(key) + (f": {escape(detail)}" if detail else "")
        for key, detail in list(zip(finding.cases, details, strict=True))[:LISTED]
    ]
    listed = ""
    alone = len(finding.cases) == 1 and (figures or finding.cases[0] in finding.title)  # All is said already.
    if lines and not alone:
        more = f"<li>and {len(finding.cases) - LISTED} more</li>" if len(finding.cases) > LISTED else ""
        items = "".join(f"<li>{line}</li>" for line in lines) + more
        opened = " open" if not figures and len(lines) <= PICTURED else ""
        listed = f"<details{opened}><summary>{len(finding.cases)} concerned</summary><ul>{items}</ul></details>"
    gallery = f'<div class="gallery">{"".join(figures)}</div>' if figures else ""
    said = f"<p>{escape(finding.why)}</p>" if finding.why else ""
    said += f"<p><b>{escape(finding.remedy)}</b></p>" if finding.remedy else ""
    return (
        f'<div class="finding {finding.severity}" id="{escape(finding.kind)}">'
        f'<h3><span class="tag">{finding.severity}</span>{escape(finding.title)} <small>{escape(finding.kind)}</small>'
        f"</h3>{said}{gallery}{listed}</div>"
    )


def _picture(case: CaseStatistics) -> str:
    if case.thumbnail is None:
        return ""
    data = base64.b64encode(case.thumbnail).decode()
    return f'<img loading="lazy" alt="{escape(case.key)}" src="data:image/jpeg;base64,{data}">'


def _table(rows: Sequence[Row]) -> str:
    used = told(rows)
    head = "".join(f"<th>{escape(rows[0][i])}</th>" for i in used)
    body = "".join("<tr>" + "".join(f"<td>{escape(row[i])}</td>" for i in used) + "</tr>" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _colors(task: Task) -> list[str]:
    palette = class_colors(len(task.classes), skip=[i for i in range(len(task.classes)) if i not in task.objects])
    return ["#" + bytes(color).hex() for color in palette]


def _key(task: Task) -> str:
    colors = _colors(task)
    names = (f'<span><i style="background:{colors[i]}"></i>{escape(str(task.classes[i]))}</span>' for i in task.objects)
    return f'<p class="key">{"".join(names)}</p>'


def _shares(found: SurveyResult) -> str:
    """Bars of the classes' shares of each split, on a logarithmic axis: a class of 0.1 % is to be seen beside 50 %."""
    from lightning_dice.data_check.content_checks import class_shares

    colors, rows = _colors(found.task), []
    shares = {split: class_shares(found.of(split), len(found.task.classes)) for split in found.sizes}
    height, left, width = 14, 130, 420
    top = 16
    for index in found.task.objects:
        rows.append(f'<text x="0" y="{top + 10}">{escape(str(found.task.classes[index])[:20])}</text>')
        for split, part in shares.items():
            length = width * max(0.0, 1 + math.log10(max(part[index], 1e-5)) / 5)
            rows.append(
                f'<rect x="{left}" y="{top}" width="{length:.1f}" height="{height - 4}" fill="{colors[index]}"/>'
                f'<text x="{left + length + 4:.1f}" y="{top + 9}">{split} {100 * part[index]:.3g} %</text>'
            )
            top += height
        top += 6
    ticks = "".join(
        f'<line x1="{left + width * (1 + power / 5):.1f}" x2="{left + width * (1 + power / 5):.1f}" y1="12" y2="{top}" '
        f'stroke="#ddd"/><text x="{left + width * (1 + power / 5):.1f}" y="9" text-anchor="middle">'
        f"{100 * 10.0**power:g} %</text>"
        for power in range(-5, 1)
    )
    if not rows:
        return ""
    caption = "<figcaption>Share of the pixels of each split, on a logarithmic axis.</figcaption>"
    return (
        f'<figure>{caption}<svg role="img" viewBox="0 0 700 {top}" style="max-width:700px;width:100%">'
        f"{ticks}{''.join(rows)}</svg></figure>"
    )


def _histograms(found: SurveyResult) -> str:
    """How many components of each class have how many pixels, in powers of two."""
    colors, figures = _colors(found.task), []
    for index in found.task.objects:
        sizes = component_sizes(found.cases, index)
        if not len(sizes):
            continue
        powers = np.bincount(np.log2(sizes).astype(int)).tolist()
        step, high, bars = 24, 80, []
        for i, count in enumerate(powers):
            top, middle = 14 + high * (1 - count / max(powers)), i * step + step // 2 - 2
            bars.append(
                f'<rect x="{i * step}" y="{top:.1f}" width="{step - 3}" height="{14 + high - top:.1f}" '
                f'fill="{colors[index]}"><title>{2**i} to {2 ** (i + 1) - 1} pixels: {count}</title></rect>'
            )
            words = [(top - 3, _short(count) if count else ""), (high + 26, _short(2**i) if i % 2 == 0 else "")]
            bars += [f'<text x="{middle}" y="{y:.1f}" text-anchor="middle">{word}</text>' for y, word in words if word]
        width = len(powers) * step
        name = escape(str(found.task.classes[index]))
        figures.append(
            f'<figure><figcaption>{name}: components by pixels, from a power of two on</figcaption><svg role="img" '
            f'viewBox="0 0 {width} {high + 30}" style="width:{width}px;max-width:100%">{"".join(bars)}</svg></figure>'
        )
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _short(number: int) -> str:
    for unit, name in ((10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.0f}{name}"
    return str(number)


def _cases(found: SurveyResult, findings: Sequence[Finding]) -> str:
    named: dict[str, list[Finding]] = {}
    for finding in findings:
        for key in {*finding.cases, *finding.partners}:
            named.setdefault(key, []).append(finding)
    # With more cases than are shown, those that something was found about stand first.
    cases = found.cases
    note = ""
    if len(cases) > MOST_ROWS:
        cases = sorted(cases, key=lambda case: case.key not in named)[:MOST_ROWS]
        note = f"{MOST_ROWS} of {len(found.cases)} cases; all are in cases.csv. "
    drawn = sum(case.thumbnail is not None for case in cases)
    if drawn < len(cases):
        note += f"Pictures of {drawn} of them. "
    objects = found.task.objects
    heads = [
        "picture",
        "case",
        "size",
        "values (1 to 99 %)",
        *(f"{found.task.classes[i]} %" for i in objects),
        "components",
    ]
    head = "".join(f"<th>{escape(str(name))}</th>" for name in [*heads, "findings"])
    rows = []
    for case in cases:
        about = " ".join(
            f'<a class="{finding.severity}" href="#{escape(finding.kind)}">{escape(finding.kind)}</a>'
            for finding in named.get(case.key, ())
        )
        cells = [f"<td>{_picture(case)}</td>", f"<td>{escape(case.key)}</td>"]
        cells.append(f'<td data-v="{math.prod(case.size)}">{"x".join(map(str, case.size))}</td>')
        cells.append(f'<td data-v="{case.range[3]:.6g}">{case.range[1]:.3g} to {case.range[3]:.3g}</td>')
        for index in objects:
            share = 100 * case.objects[index].pixels / max(case.pixels, 1)
            cells.append(f'<td class="n" data-v="{share:.6g}">{share:.3g}</td>')
        cells.append(f'<td class="n">{sum(len(case.objects[index].sizes) for index in objects)}</td>')
        rows.append(f"<tr>{''.join(cells)}<td>{about}</td></tr>")
    return (
        f'<p class="soft">{note}A click on a column\'s head sorts by it.</p><div class="wide"><table class="sortable" '
        f'id="cases"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _facts(made_of: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in made_of.items())
    return f'<table class="facts">{rows}</table>'


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""
