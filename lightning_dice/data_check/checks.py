"""What is wrong with an examined data set, why it matters, and what to do about it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lightning_dice.data_check import alignment_checks, duplicate_checks
from lightning_dice.data_check.case_statistics import describe
from lightning_dice.data_check.content_checks import cases_in_words, judge_contents
from lightning_dice.data_check.finding import SEVERITIES, Finding
from lightning_dice.data_check.survey import SurveyResult

LONGEST = 160  # letters of a title


def judge(found: SurveyResult, accept: Sequence[str] = ()) -> list[Finding]:
    """All findings, the gravest first.

    Args:
        found: what was measured.
        accept: kinds of findings that are known: they become notes.
    """
    findings = [*judge_problems(found), *judge_contents(found), *judge_duplicates(found), *judge_placement(found)]
    findings = [
        replace(finding, severity="note", title=f"accepted: {finding.title}") if finding.kind in accept else finding
        for finding in findings
    ]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def judge_problems(found: SurveyResult) -> list[Finding]:
    """What a training refuses: one finding for each remedy."""
    root = str(found.facts.get("root") or "")
    below = f"{root}{os.sep}" if root else ""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for problem in found.problems:
        where, what = (text.replace(below, "") if below else text for text in (str(problem.where), problem.what))
        groups[problem.remedy].append((where or root or "the data", what))
    findings = []
    for remedy, group in groups.items():
        first = group[0][1]
        several = len({what for _, what in group}) > 1
        title = group[0][0] if len(group) == 1 else f"{len(group)} files"
        title += f": {first}" if not several else f" are refused; the first {first}"
        findings.append(
            Finding(
                "refused",
                "error",
                title if len(title) <= LONGEST else f"{title[:LONGEST]} ...",
                "A training does not start with this.",
                remedy,
                [where for where, _ in group],
                [what for _, what in group],
            )
        )
    return findings


def judge_duplicates(found: SurveyResult) -> list[Finding]:
    """Images that occur more than once, in one split or in several, and with different masks."""
    pairs = duplicate_checks.find_duplicates(found.cases)
    across = [twin for twin in pairs if twin.across]
    within = [twin for twin in pairs if not twin.across]
    findings = []
    for exact in (True, False):
        some = [twin for twin in across if twin.exact == exact]
        if some:
            what = "stand in two splits" if exact else "stand in two splits, changed a little"
            count = cases_in_words(len(some), "image")
            findings.append(
                Finding(
                    "duplicates-across-splits",
                    "error",
                    f"{count} {what if len(some) > 1 else what.replace('stand', 'stands')}",
                    "What was trained on is scored: the score of the other split is too good (leakage).",
                    "Keep each picture, with all its variants and all pictures of one patient, place or video, in one "
                    "split.",
                    *_told(some),
                )
            )
    if within:
        clusters = duplicate_checks.groups(within)
        total = sum(map(len, clusters))
        findings.append(
            Finding(
                "duplicates",
                "note",
                f"{total} images of {len(clusters)} scenes are (nearly) the same as another one of their split",
                "They count as several cases, but hardly teach, or test, more than one: intervals of a score are too "
                "narrow, and a random division would put them into different splits.",
                "Leave copies out, or weigh them knowingly; divide by scene, patient or video.",
                *_told(within),
            )
        )
    contradicting = [twin for twin in pairs if twin.exact and twin.first.mask_digest != twin.second.mask_digest]
    if contradicting:
        findings.append(
            Finding(
                "contradicting-masks",
                "warning",
                f"{cases_in_words(len(contradicting), 'pair')} of equal images with different masks",
                "The network is asked for two answers to one picture, and can at best give their mean.",
                "Keep the right mask, or give several annotators' masks as such (data.raters).",
                *_told(contradicting),
            )
        )
    return findings


def judge_placement(found: SurveyResult) -> list[Finding]:
    """Masks that are turned, flipped or transposed, or belong to another image."""
    findings = []
    turned = alignment_checks.find_turned(found.cases)
    for group in turned:
        what, code = describe(group.move)
        count = len(group.cases)
        sure = "look" if count > 1 else "looks"
        findings.append(
            Finding(
                "turned-masks",
                "error",
                f"the mask{'s' * (count > 1)} of {count} case{'s' * (count > 1)} {sure} {what}",
                "Their outlines lie on the edges of the images only once that is undone: as they are, the network is "
                "taught noise.",
                f"Write the masks anew from {code}, or see how images and masks were loaded (rows and columns, origin "
                "above or below).",
                [case.key for case in group.cases],
                [f"{case.placement[0]:.2f} as it is, {np.nanmax(case.placement):.2f} at best" for case in group.cases],
            )
        )
    together = any(group.together for group in turned)
    if found.mismatches:
        mismatches = found.mismatches
        many = len(mismatches) > 1
        findings.append(
            Finding(
                "exchanged-masks",
                "error",
                f"the mask{'s' * many} of {len(mismatches)} case{'s' * many} fit{'s' * (not many)} the image of another"
                " case",
                "A mask at the wrong image teaches noise, and scores it.",
                "See how images and masks were paired: by number, or by an order that differs.",
                [mismatch.mask.key for mismatch in mismatches],
                [
                    f"fits {mismatch.image.key}: {mismatch.other:.2f} there, {mismatch.own:.2f} here"
                    for mismatch in mismatches
                ],
                [mismatch.image.key for mismatch in mismatches],
            )
        )
    named = {key for finding in findings for key in finding.cases}
    loose = [case for case in alignment_checks.find_loose(found.cases) if case.key not in named]
    if loose and not together:
        findings.append(
            Finding(
                "loose-masks",
                "note",
                f"{cases_in_words(len(loose), 'mask')} much farther from the edges of the image than usual",
                "Often the image is blurred or its objects faint; now and then the mask is shifted, or that "
                "of another image.",
                "Look at them.",
                [case.key for case in loose],
                [f"{case.placement[0]:.2f}, by chance 0.50" for case in loose],
            )
        )
    share = alignment_checks.astray(found.cases)
    if share >= alignment_checks.ASTRAY and not together:
        findings.append(
            Finding(
                "masks-off-their-images",
                "error",
                f"{100 * share:.0f} % of the masks do not lie on the edges of their images",
                "They fit no better than on the same image flipped or turned, where right pairs do in all but one of a "
                "hundred cases.",
                "Look at the thumbnails: are images and masks paired rightly, of one geometry, and not shifted?",
                [case.key for case in found.cases if alignment_checks.preference(case) < 0],
            )
        )
    return findings


def _told(pairs: Sequence[duplicate_checks.Duplicate]) -> tuple[list[str], list[str], list[str]]:
    """For each pair the first case, what is to be said of both, and the second."""
    keys, details = [], []
    for twin in pairs:
        degree = "equal to" if twin.exact else f"like {twin.likeness:.2f}"
        moved = f", {twin.move}" if twin.move else ""
        keys.append(twin.first.key)
        details.append(f"{degree} {twin.second.key}{moved}")
    return keys, details, [twin.second.key for twin in pairs]
