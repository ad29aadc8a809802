"""Interleaved timings, as medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch


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


def marks(device: str) -> tuple[Callable[[], None], Callable[[], list[float]]]:
    """What notes the time on the device, and what returns the seconds between each two notes."""
    if device == "cuda":
        events: list[torch.cuda.Event] = []

        def record() -> None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            events.append(event)

        def between() -> list[float]:
            torch.cuda.synchronize()
            return [start.elapsed_time(end) / 1000 for start, end in pairwise(events)]

        return record, between
    noted: list[float] = []
    return lambda: noted.append(time.perf_counter()), lambda: [end - start for start, end in pairwise(noted)]


def shared_rounds(
    variants: Mapping[str, Callable[[], tuple[float, float]]], budget: float, most: int = 25, least: int = 3
) -> list[dict[str, tuple[float, float]]]:
    """What the variants return in each round, within about `budget` seconds.

    The first variant is in every round; a slow one is left out of so many that each gets an equal share of the time.
    """
    share = budget / max(1, len(variants))
    cost: dict[str, float] = {}
    for name, variant in variants.items():
        cost[name] = sum(variant())
        for _ in range(2 if 5 * cost[name] < share else 0):  # The allocator has its memory only after some calls.
            cost[name] = sum(variant())
    wanted = {name: min(most, max(least, int(share / max(seconds, 1e-9)))) for name, seconds in cost.items()}
    total = max(wanted.values(), default=0)
    wanted |= {name: total for name in list(wanted)[:1]}
    rounds = []
    for index in range(total):
        found = {}
        for name, variant in variants.items():
            if (index + 1) * wanted[name] // total == index * wanted[name] // total:
                continue
            if cost[name] < share / most:
                variant()  # The one before may have left the caches in any state.
            found[name] = variant()
        rounds.append(found)
    return rounds
