"""The README's picture of what `tests.benchmarks.sums` found.

`python -m tests.benchmarks.figure results.json picture.png`
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANELS = (
    ("19", "Dice + cross-entropy", "19 classes, 2d"),
    ("118", "Dice + cross-entropy", "118 classes, 3d"),
    ("binary", "Dice", "1 class, 2d"),
)
# Names as the tables have them, and as the picture does.
SHOWN = {
    "ours": "lightning_dice",
    "naive, compiled": "naive, torch.compile",
    "naive": "naive",
    "F.cross_entropy alone": "F.cross_entropy alone",
    "smp": "smp",
    "MONAI": "MONAI",
    "nnU-Net": "nnU-Net",
}
OURS, OTHERS, ALONE = "#1b6ca8", "#b8bfc6", "#dfe3e6"
INK = "#333333"


def draw(found: Mapping[str, Any], dtype: str, allocator: str) -> Figure:
    """Bars of time relative to ours, and of peak memory, for each panel whose table was measured.

    Raises:
        ValueError: none was.
    """
    tables = {(t["case"], t["group"]): t for t in found["tables"] if t["dtype"] == dtype and not t["busy"]}
    panels = [(title, tables[case, group]) for case, group, title in PANELS if (case, group) in tables]
    if not panels:
        raise ValueError(f"results must hold a case of the figure in {dtype}, one of {[case for case, *_ in PANELS]}")
    counts = [sum(name in table["rows"] for name in SHOWN) for _, table in panels]
    # 9 inches are the README's width, at twice the pixels of its page.
    figure = Figure(figsize=(9, 0.6 + 0.27 * sum(counts) + 0.75 * len(panels)), dpi=200, layout="constrained")
    axes = figure.subplots(len(panels), 2, squeeze=False, gridspec_kw={"height_ratios": [n + 1 for n in counts]})
    for (title, table), (left, right) in zip(panels, axes, strict=True):
        names = [name for name in SHOWN if name in table["rows"]]
        rows = [table["rows"][name] for name in names]
        times = [row["times"][allocator] for row in rows]
        ratios = [statistics.median(row["ratios"]) if "ratios" in row else None for row in times]
        bars(left, names, ratios, "{:.1f}×")
        bars(right, names, [row.get("peak") for row in rows], "{:.1f}")
        shape = " x ".join(map(str, table["shape"]))
        left.set_title(f"{title}: {table['group']}, {shape}", loc="left", fontsize=10, fontweight="bold", color=INK)
        left.set_yticks(range(len(names)), [SHOWN[name] for name in names])
        left.get_yticklabels()[0].set_fontweight("bold")
        right.set_yticks([])
    where = found["machine"].get("GPU", found["machine"]["CPU"])
    axes[-1][0].set_xlabel("time, forward and backward, relative to lightning_dice", fontsize=9, color=INK)
    axes[-1][1].set_xlabel("peak extra memory, in sizes of the logits", fontsize=9, color=INK)
    figure.supxlabel(
        f"{where}, torch {found['machine']['torch']}, {dtype}; less is better", fontsize=8, color="#777777"
    )
    return figure


def bars(axes: Axes, names: Sequence[str], values: Sequence[float | None], label: str) -> None:
    """One bar for each name, from the top, with its number at its end."""
    widths = [value or 0.0 for value in values]
    colors = [OURS if name == "ours" else ALONE if name.endswith("alone") else OTHERS for name in names]
    axes.barh(range(len(names)), widths, color=colors, height=0.72)
    longest = max(widths) or 1.0
    for index, value in enumerate(values):
        text = "failed" if value is None else label.format(value)
        weight = "bold" if names[index] == "ours" else "normal"
        axes.text((value or 0.0) + 0.015 * longest, index, text, va="center", fontsize=9, color=INK, fontweight=weight)
    axes.set_xlim(0, 1.15 * longest)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color("#999999")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.figure", description=__doc__)
    parser.add_argument("results", type=Path, help="what `python -m tests.benchmarks.sums --json` wrote")
    parser.add_argument("picture", type=Path, help="a .png or .svg")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--allocator", help="whose times; by default the first measured")
    given = parser.parse_args(arguments)
    found = json.loads(given.results.read_text())
    draw(found, given.dtype, given.allocator or found["allocators"][0]).savefig(given.picture)


if __name__ == "__main__":
    main()
