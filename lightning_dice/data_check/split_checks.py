"""Checks of the splits: their sizes and the names of their cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lightning_dice.data_check.finding import Finding, pluralize
from lightning_dice.data_check.survey import SurveyResult

FEW = 5  # cases of a split


def check_split_sizes(result: SurveyResult) -> Iterator[Finding]:
    """Check that there are enough cases for a batch, and for a score.

    >>> from lightning_dice.data_check.task import Task
    >>> result = SurveyResult(Task(["cell"]), sizes={"train": 4, "val": 9}, facts={"batch_size": 8})
    >>> [finding.title for finding in check_split_sizes(result)]
    ['the train split has 4 cases, fewer than a batch of 8']
    """
    sizes = {split: result.image_count(split) for split in result.sizes}
    least = int(result.facts.get("batch_size") or 1)
    if 0 < sizes.get("train", 0) < least:
        yield Finding(
            "few-cases",
            "error",
            f"the train split has {pluralize(sizes['train'])}, fewer than a batch of {least}",
            "Training does not start.",
            f"Add cases, or set data.batch_size={sizes['train']}.",
        )
    for split in ("val", "test"):
        if 0 < sizes.get(split, 0) < FEW:
            yield Finding(
                "few-cases",
                "warning",
                f"the {split} split has only {pluralize(sizes[split])}",
                "Its score depends on single cases, and so does every choice based on it.",
                "Add cases, or change the shares (data.fractions).",
            )


def check_missing_splits(result: SurveyResult) -> Iterator[Finding]:
    """Check that there is a validation and a test split."""
    if result.sizes and "val" not in result.sizes:
        yield Finding(
            "no-validation",
            "warning",
            "there is no validation split",
            "The best checkpoint cannot be chosen, and overfitting goes unnoticed.",
            "Add one, or give it a share of the cases (data.fractions).",
        )
    elif result.sizes and "test" not in result.sizes:
        yield Finding(
            "no-test",
            "note",
            "there is no test split",
            "Scores come from the validation cases, which also choose the checkpoint: they are slightly too good.",
            "Add one, or give it a share of the cases (data.fractions).",
        )


def check_names(result: SurveyResult) -> Iterator[Finding]:
    """Check that no two cases of a split share a name."""
    counts = Counter(case.key for case in result.cases)
    if repeated := [name for name, count in counts.items() if count > 1]:
        yield Finding(
            "duplicate-names",
            "error",
            f"{pluralize(len(repeated), 'name')} used for several cases of a split",
            "Scores are stored by name: only one of these cases would have any.",
            "Rename them.",
            repeated,
        )
