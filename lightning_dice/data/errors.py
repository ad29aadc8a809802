"""Errors and warnings about data; each names the file and the remedy."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

MAX_LISTED = 20  # files in one error


class DataError(ValueError):
    """Something is wrong with the data; the message names the files and the remedy."""


class DataErrors(DataError):
    """Several problems in one message.

    Attributes:
        problems: each of them.
    """

    def __init__(self, message: str, problems: Sequence[DataError]) -> None:
        super().__init__(message)
        self.problems = list(problems)


class DataProblem(DataError):
    """One problem with one file.

    Args:
        what: the problem: what was required, and what was found.
        where: the file or folder.
        remedy: how to fix it, if known.

    >>> print(DataProblem("is empty (0 bytes)", where="images/a.png", remedy="Copy it again."))
    images/a.png: is empty (0 bytes). Copy it again.
    """

    def __init__(self, what: str, where: str | Path = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(f"{where}: {what}. {remedy}".strip() if where else what)


def combined_error(root: Path, problems: Sequence[DataProblem]) -> DataErrors:
    """Combine problems into one error, grouped by remedy; of large groups only the first files are listed.

    >>> problems = [DataProblem("has no mask", f"data/{name}.png", "Add the mask.") for name in "ab"]
    >>> print(combined_error(Path("data"), problems))
    2 problems in data:
    - a.png: has no mask
    - b.png: has no mask
      Add the mask.
    """
    groups: dict[str, list[DataProblem]] = defaultdict(list)
    for problem in problems:
        groups[problem.remedy].append(problem)
    lines = []
    left, room = len(groups), MAX_LISTED
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
    """A file is unusual, but was processed."""


class SkippedWarning(FileWarning):
    """A file or folder was found but not read."""
