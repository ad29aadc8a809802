"""Interleaved timings, as medians with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping


def interleaved(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each variant returns, round by round, so that a slow minute of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        variant()  # Warm caches, allocators and threads.
    for _ in range(rounds):
        for name, variant in variants.items():
            times[name].append(variant())
    return times


def table(title: str, times: Mapping[str, list[float]], base: str) -> None:
    """Print a Markdown table of medians, and of ratios to `base` within each round, with their quartiles."""
    print(f"**{title}**\n\n| | ms | added ms | ratio | quartiles of the ratio |\n|---|---|---|---|---|")
    for name, seconds in times.items():
        ratios = [mine / other for mine, other in zip(seconds, times[base], strict=True)]
        added = statistics.median(mine - other for mine, other in zip(seconds, times[base], strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        milliseconds = statistics.median(seconds) * 1e3
        print(
            f"| {name} | {milliseconds:.2f} | {added * 1e3:+.2f} "
            f"| {statistics.median(ratios):.3f} | {low:.3f} to {high:.3f} |"
        )
    print()
