"""Text for messages."""

from __future__ import annotations

from collections.abc import Sequence


def join_some(items: Sequence[object], limit: int = 8) -> str:
    """Join items with commas, and replace those beyond `limit` by their number.

    >>> join_some(["a", "b", "c", "d"], limit=2)
    'a, b and 2 more'
    """
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more


def join_all(items: Sequence[str]) -> str:
    """Join items with commas, and the last one with "and".

    >>> join_all(["a"]), join_all(["a", "b"]), join_all(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    return " and ".join([*filter(None, [", ".join(items[:-1])]), *items[-1:]])
