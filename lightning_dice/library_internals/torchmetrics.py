"""Internals of torchmetrics, read in torchmetrics 1.9.0."""

from __future__ import annotations

from torchmetrics import Metric

from lightning_dice.library_internals import internal, set_internal


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


def set_update_count(metric: Metric, count: int) -> None:
    """Set the number of updates, and drop the cached value (`Metric._computed`), after the states were replaced."""
    set_internal(metric, "_update_count", count, "torchmetrics")
    set_internal(metric, "_computed", None, "torchmetrics")
