"""Checks for duplicate images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_dice.data_check.duplicates import Duplicate, find_duplicates, group_duplicates
from lightning_dice.data_check.finding import Finding, pluralize
from lightning_dice.data_check.survey import SurveyResult


def check_duplicates(result: SurveyResult) -> Iterator[Finding]:
    """Check for images that occur more than once, in one split or in several, or with different masks."""
    pairs = find_duplicates(result.cases)
    for exact in (True, False):
        across = [pair for pair in pairs if pair.across_splits and pair.exact == exact]
        if across:
            yield Finding(
                "duplicates-across-splits",
                "error",
                f"{pluralize(len(across), 'image')} in two splits" + ("" if exact else ", slightly changed"),
                "The network is trained on images that it is scored on: that score is too good (leakage).",
                "Keep an image with all its variants, and all images of one patient, place or video, in one split.",
                *_describe_pairs(across),
            )
    within = [pair for pair in pairs if not pair.across_splits]
    if within:
        groups = group_duplicates(within)
        yield Finding(
            "duplicates",
            "note",
            f"{sum(map(len, groups))} images of {pluralize(len(groups), 'scene')} are (nearly) the same as another one "
            "of their split",
            "They count as several cases but hardly teach, or test, more than one: score intervals are too narrow, and "
            "a random split would separate them.",
            "Remove the copies, or weight them deliberately; split by scene, patient or video.",
            *_describe_pairs(within),
        )
    contradicting = [pair for pair in pairs if pair.exact and pair.first.mask_digest != pair.second.mask_digest]
    if contradicting:
        yield Finding(
            "contradicting-masks",
            "warning",
            f"{pluralize(len(contradicting), 'pair')} of identical images with different masks",
            "The network is asked for two answers to one image, and can at best learn their mean.",
            "Keep the correct mask, or load the masks of several annotators as such (data.raters).",
            *_describe_pairs(contradicting),
        )


def _describe_pairs(pairs: Sequence[Duplicate]) -> tuple[list[str], list[str], list[str]]:
    """Return for each pair the first case, a description, and the second case."""
    first, details, second = [], [], []
    for pair in pairs:
        degree = "equal to" if pair.exact else f"like {pair.similarity:.2f}"
        change = f", {pair.change}" if pair.change else ""
        first.append(pair.first.key)
        details.append(f"{degree} {pair.second.key}{change}")
        second.append(pair.second.key)
    return first, details, second
