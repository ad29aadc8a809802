"""Errors and warnings about data, which name the file and the remedy."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

LISTED = 20  # files in one error


class DataError(ValueError):
    """Something is wrong with the data; the message names the files and the remedy."""


class DataErrors(DataError):
    """Several things wrong, told in one message.

    Attributes:
        problems: each of them.
    """

    def __init__(self, message: str, problems: Sequence[DataError]) -> None:
        super().__init__(message)
        self.problems = list(problems)


class DataProblem(DataError):
    """One thing wrong with one file.

    Args:
        what: what was required and what came.
        where: the file or folder.
        remedy: how to mend it, where known.

    >>> print(DataProblem("is empty (0 bytes)", where="images/a.png", remedy="Copy it again."))
    images/a.png: is empty (0 bytes). Copy it again.
    """

    def __init__(self, what: str, where: str | Path = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(f"{where}: {what}. {remedy}".strip() if where else what)


def combined_error(root: Path, problems: Sequence[DataProblem]) -> DataErrors:
    """One error of many problems: grouped by their remedy, the first files of each by name."""
    groups: dict[str, list[DataProblem]] = defaultdict(list)
    for problem in problems:
        groups[problem.remedy].append(problem)
    lines = []
    left, room = len(groups), LISTED
    # Small groups first: they leave room for the large ones.
    for remedy, group in sorted(groups.items(), key=lambda item: len(item[1])):
        shown = group[: max(room // left, 1)]
        left, room = left - 1, room - len(shown)
        lines += [f"- {problem.where}: {problem.what}" for problem in shown]
        if len(group) > len(shown):
            lines.append(f"- and {len(group) - len(shown)} more of this kind")
        if remedy:
            lines.append(f"  {remedy}")
    text = "\n".join(lines).replace(f"{root}{os.sep}", "")
    return DataErrors(f"{len(problems)} problem{'s' * (len(problems) > 1)} in {root}:\n{text}", problems)


class FileWarning(UserWarning):
    """Something about one file that whoever brought it should know, and that does not keep the rest from being done."""


class SkippedWarning(FileWarning):
    """A file or folder that was found and will not be read."""
