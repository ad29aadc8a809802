"""Findings: what the checks report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


# The kinds that can be accepted by name: all except "refused", which training does not accept either.
KINDS = (
    *("absent-classes", "channels", "constant-images", "contradicting-masks", "duplicate-names", "duplicates"),
    *("duplicates-across-splits", "empty-masks", "few-cases", "full-masks", "ignored-masks", "image-formats"),
    *("inverted-masks", "mask-like-images", "mask-sizes", "misaligned-masks", "no-test", "no-validation"),
    *("nonfinite-values", "objects-of-many-sizes", "poorly-fitting-masks", "rare-classes", "sizes"),
    *("smaller-than-crops", "spacings", "swapped-masks", "thin-structures", "tiny-objects", "turned-masks"),
    *("unequal-splits", "unknown-labels", "unknown-spacing", "unusual-intensities"),
)


@dataclass(frozen=True)
class Finding:
    """One problem or notable property of a data set.

    Attributes:
        kind: short name, which users give to accept it.
        severity: `"error"`: training or its scores fail; `"warning"`: they may suffer; `"note"`: worth knowing.
        title: the finding in one line, with its count.
        why: why it matters, in a sentence or two.
        remedy: what to do, or which setting to change.
        cases: cases concerned, as `split/name`, or files if no case could be read.
        details: a text for each of `cases`; as many, or none.
        partners: for each of `cases`, the case to compare it with; as many, or none.

    >>> Finding("no-test", "note", "there is no test split").cases
    ()
    """

    kind: str
    severity: Severity
    title: str
    why: str = ""
    remedy: str = ""
    cases: Sequence[str] = field(default_factory=tuple)
    details: Sequence[str] = field(default_factory=tuple)
    partners: Sequence[str] = field(default_factory=tuple)


def pluralize(count: int, noun: str = "case") -> str:
    """Return a number with its noun.

    >>> pluralize(1), pluralize(2, "image")
    ('1 case', '2 images')
    """
    return f"{count} {noun}{'s' * (count != 1)}"
