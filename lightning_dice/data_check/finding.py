"""One thing found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


# All there are, but for what a training refuses: by these names they can be accepted.
KINDS = (
    *("absent-classes", "channels", "constant-images", "contradicting-masks", "duplicates"),
    *("duplicates-across-splits", "empty-masks", "equal-names", "exchanged-masks", "few-cases", "full-masks"),
    *("ignored-masks", "images-like-masks", "inverted-masks", "kinds-of-images", "loose-masks"),
    *("mask-sizes", "masks-off-their-images", "no-test", "no-validation", "nonfinite-values", "objects-of-many-sizes"),
    *("rare-classes", "sizes", "smaller-than-crops", "spacings", "thin-structures", "tiny-objects", "turned-masks"),
    *("unequal-splits", "unknown-labels", "unknown-spacing", "unusual-intensities"),
)


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        kind: a short name for it, by which it can be accepted.
        severity: `"error"`: breaks a training or its scores; `"warning"`: may spoil them; `"note"`: good to know.
        title: what was found, with its count.
        why: why it matters; a sentence.
        remedy: what to do, or which setting.
        cases: the cases concerned, as `split/name`, or files where no case could be read.
        details: what is to be said of each of `cases`; as many, or none.
        partners: the case that each of `cases` is to be looked at beside; as many, or none.
    """

    kind: str
    severity: Severity
    title: str
    why: str = ""
    remedy: str = ""
    cases: Sequence[str] = field(default_factory=tuple)
    details: Sequence[str] = field(default_factory=tuple)
    partners: Sequence[str] = field(default_factory=tuple)
