"""All checks of a surveyed data set, in the order of their findings."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from lightning_dice.data_check import alignment_checks, duplicate_checks, image_checks, mask_checks, split_checks
from lightning_dice.data_check.finding import SEVERITIES, Finding
from lightning_dice.data_check.survey import SurveyResult

MAX_TITLE = 160  # characters


def run_checks(result: SurveyResult, accept: Sequence[str] = ()) -> list[Finding]:
    """Run all checks and return their findings, the most severe first.

    Args:
        result: the survey's result.
        accept: kinds of findings that are known; they become notes.

    >>> from lightning_dice.data_check.task import Task
    >>> [finding.title for finding in run_checks(SurveyResult(Task(["cell"]), sizes={"train": 9, "val": 9}))]
    ['there is no test split']
    """
    findings = [finding for check in CHECKS for finding in check(result)]
    findings = [
        replace(finding, severity="note", title=f"accepted: {finding.title}") if finding.kind in accept else finding
        for finding in findings
    ]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def check_problems(result: SurveyResult) -> Iterator[Finding]:
    """Report what training rejects, one finding for each remedy.

    >>> from lightning_dice.data import DataError
    >>> from lightning_dice.data_check.task import Task
    >>> result = SurveyResult(Task(["cell"]))
    >>> result.add_problems(DataError("has no mask"), "train/a")
    >>> [finding.title for finding in check_problems(result)]
    ['train/a: has no mask']
    """
    root = str(result.facts.get("root") or "")
    prefix = f"{root}{os.sep}" if root else ""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for problem in result.problems:
        where, what = (text.replace(prefix, "") if prefix else text for text in (str(problem.where), problem.what))
        groups[problem.remedy].append((where or root or "the data", what))
    for remedy, group in groups.items():
        where, what = group[0]
        files = where if len(group) == 1 else f"{len(group)} files"
        several = len({what for _, what in group}) > 1
        title = f"{files} are rejected; the first {what}" if several else f"{files}: {what}"
        yield Finding(
            "refused",
            "error",
            title if len(title) <= MAX_TITLE else f"{title[:MAX_TITLE]} ...",
            "Training does not start.",
            remedy,
            [where for where, _ in group],
            [what for _, what in group],
        )


CHECKS: tuple[Callable[[SurveyResult], Iterable[Finding]], ...] = (
    check_problems,
    split_checks.check_split_sizes,
    split_checks.check_missing_splits,
    split_checks.check_names,
    mask_checks.check_labels,
    image_checks.check_nonfinite_values,
    image_checks.check_channels,
    mask_checks.check_mask_sizes,
    image_checks.check_formats,
    image_checks.check_spacings,
    image_checks.check_image_sizes,
    image_checks.check_constant_images,
    image_checks.check_mask_like_images,
    image_checks.check_intensities,
    mask_checks.check_absent_classes,
    mask_checks.check_empty_masks,
    mask_checks.check_full_masks,
    mask_checks.check_class_shares,
    mask_checks.check_components,
    duplicate_checks.check_duplicates,
    alignment_checks.check_alignment,
)
