"""Internals of torchmetrics, read in torchmetrics 1.9.0."""

from __future__ import annotations

from typing import Any

from torchmetrics import Metric
from torchmetrics.wrappers import MinMaxMetric, Running

from lightning_dice.library_internals import internal, set_internal

# Attributes in which wrappers keep what they have seen, beside states.
_MEMORIES: dict[type[Metric], tuple[str, ...]] = {MinMaxMetric: ("min_val", "max_val"), Running: ("_num_vals_seen",)}


def state_names(metric: Metric) -> list[str]:
    """Return the names of a metric's states (`Metric._defaults`), in the order in which they were added.

    >>> from torchmetrics import MeanMetric
    >>> state_names(MeanMetric())
    ['mean_value', 'weight']
    """
    return list(internal(metric, "_defaults", "torchmetrics"))


def update_count(metric: Metric) -> int:
    """Return the number of updates since the last reset (`Metric._update_count`)."""
    return int(internal(metric, "_update_count", "torchmetrics"))


def memory(metric: Metric) -> dict[str, Any]:
    """Return what a metric remembers beside its states: numbers or tensors, by the name of the attribute.

    `MinMaxMetric` keeps the extremes of all epochs, `Running` the number of updates, which is its place in the window.

    >>> from torchmetrics import MeanMetric
    >>> memory(MeanMetric()), memory(Running(MeanMetric()))
    ({}, {'_num_vals_seen': 0})
    """
    names = next((names for kind, names in _MEMORIES.items() if isinstance(metric, kind)), ())
    return {name: internal(metric, name, "torchmetrics") for name in names}


def set_memory(metric: Metric, values: dict[str, Any]) -> None:
    """Set what `memory` returned."""
    for name, value in values.items():
        set_internal(metric, name, value, "torchmetrics")


def set_update_count(metric: Metric, count: int) -> None:
    """Set the number of updates, and drop the cached value (`Metric._computed`), after the states were replaced."""
    set_internal(metric, "_update_count", count, "torchmetrics")
    set_internal(metric, "_computed", None, "torchmetrics")


def compute_alone(metric: Metric) -> None:
    """Let a metric and those within it compute without the other processes (`Metric._to_sync`).

    `sync_on_compute` alone counts from the next update on only.
    """
    for part in metric.modules():
        if isinstance(part, Metric):
            part.sync_on_compute = False
            set_internal(part, "_to_sync", False, "torchmetrics")
