"""Checks that masks fit their images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lightning_dice.data_check.alignment import (
    MISALIGNED_SHARE,
    TurnedMasks,
    find_poor_fits,
    find_turned_masks,
    misaligned_share,
    orientation_margin,
)
from lightning_dice.data_check.finding import Finding, pluralize
from lightning_dice.data_check.orientations import describe_orientation
from lightning_dice.data_check.survey import SurveyResult


def check_alignment(result: SurveyResult) -> Iterator[Finding]:
    """Check for masks that are turned, flipped or transposed, or belong to another image."""
    turned = find_turned_masks(result.cases)
    findings = [_turned_masks(group) for group in turned]
    if result.mismatches:
        findings.append(_swapped_masks(result))
    yield from findings
    if any(group.as_group for group in turned):
        return
    named = {key for finding in findings for key in finding.cases}
    if poor := [case for case in find_poor_fits(result.cases) if case.key not in named]:
        yield Finding(
            "poorly-fitting-masks",
            "note",
            f"{pluralize(len(poor), 'mask')} much farther from the edges of the image than usual",
            "Often the image is blurred or its objects are faint; sometimes the mask is shifted, or belongs to another "
            "image.",
            "Look at them.",
            [case.key for case in poor],
            [f"{case.alignment[0]:.2f}, by chance 0.50" for case in poor],
        )
    share = misaligned_share(result.cases)
    if share >= MISALIGNED_SHARE:
        yield Finding(
            "misaligned-masks",
            "error",
            f"{100 * share:.0f} % of the masks do not fit the edges of their images",
            "They fit no better than the same image flipped or turned, where correct pairs do in 99 % of cases.",
            "Look at the thumbnails: are images and masks paired correctly, in one geometry, and not shifted?",
            [case.key for case in result.cases if orientation_margin(case) < 0],
        )


def _turned_masks(group: TurnedMasks) -> Finding:
    description, code = describe_orientation(group.orientation)
    count = len(group.cases)
    masks = f"the masks of {count} cases look" if count > 1 else "the mask of 1 case looks"
    return Finding(
        "turned-masks",
        "error",
        f"{masks} {description}",
        "Their outlines fit the edges of the images only once this is undone; as they are, the network learns noise.",
        f"Rewrite the masks from {code}, or check how images and masks were loaded (row and column order, origin at "
        "top or bottom).",
        [case.key for case in group.cases],
        [f"{case.alignment[0]:.2f} as it is, {np.nanmax(case.alignment):.2f} at best" for case in group.cases],
    )


def _swapped_masks(result: SurveyResult) -> Finding:
    mismatches = result.mismatches
    masks = f"the masks of {len(mismatches)} cases fit" if len(mismatches) > 1 else "the mask of 1 case fits"
    return Finding(
        "swapped-masks",
        "error",
        f"{masks} the image of another case",
        "A mask paired with the wrong image adds noise to training and scores.",
        "Check how images and masks were paired: by number, or in different orders.",
        [mismatch.mask.key for mismatch in mismatches],
        [f"fits {mismatch.image.key}: {mismatch.other:.2f} there, {mismatch.own:.2f} here" for mismatch in mismatches],
        [mismatch.image.key for mismatch in mismatches],
    )
