"""Training, validation and test splits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Protocol, TypeVar, get_args

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.interfaces import Split

SPLITS: tuple[Split, ...] = get_args(Split)
FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


class _HasCase(Protocol):
    @property
    def case(self) -> str: ...


Named = TypeVar("Named", bound=_HasCase)


def complete_splits(
    parts: Mapping[Split | None, list[Named]],
    fractions: Sequence[float],
    seed: int,
    problems: list[DataProblem],
    where: Path,
) -> dict[Split, list[Named]]:
    """Splits, drawn where there are none, or none to validate on.

    Args:
        parts: the cases of each split; under `None` those of no split, which are then all.
        fractions: shares of train, val and test.
        seed: of the draw.
        problems: to which it is added that there is nothing to train on, unless there is another problem.
        where: the images are, for this message.
    """
    if None in parts:
        return divide(parts[None], fractions, seed)
    pairs = {split: parts[split] for split in SPLITS if split in parts}
    if problems:
        return pairs
    if "train" not in pairs:
        found = ", ".join(pairs)
        problems.append(DataProblem(f"has no split to train on, only {found}", where, "Add a folder train."))
    elif "val" not in pairs:
        rest, share = fractions[0] + fractions[1], fractions[1]
        drawn = divide(pairs["train"], (1 - share / rest, share / rest, 0.0), seed)
        pairs = {**drawn, **{split: pairs[split] for split in SPLITS if split == "test" and split in pairs}}
    return pairs


def check_splits(splits: Mapping[Split, str | None] | None) -> dict[Split, str | None] | None:
    """What stands for each split, by the names `train`, `val` and `test`.

    Raises:
        ValueError: for another name, or nothing to train on.
    """
    if splits is None:
        return None
    if not isinstance(splits, Mapping) or not set(splits) <= set(SPLITS) or splits.get("train") is None:
        raise ValueError(
            f"splits must say what stands for train, val and test, at least for train, got {splits!r}; "
            "for instance 'data.splits={train:train2017,val:val2017}'"
        )
    return {split: None if splits.get(split) is None else str(splits[split]) for split in SPLITS}


def split_words(splits: Mapping[Split, str | None] | None) -> dict[Split, tuple[str, ...]]:
    """What may stand for `{split}`: what the user says, or the customary words.

    >>> split_words({"train": "train2017", "val": None})
    {'train': ('train2017',)}
    """
    if splits is None:
        return dict(FOLDERS)
    return {split: (str(splits[split]),) for split in SPLITS if splits.get(split) is not None}


def divide(pairs: Sequence[Named], fractions: Sequence[float], seed: int) -> dict[Split, list[Named]]:
    """Draw splits.

    A case's rank hangs on its name and the seed alone, so that neither the file system nor Python's version has a say,
    and a case that is added later moves few others. Two cases or more give at least one for validation, unless its
    fraction is 0.

    >>> from types import SimpleNamespace
    >>> cases = [SimpleNamespace(case=name) for name in "abcdefghij"]
    >>> {split: [one.case for one in part] for split, part in divide(cases, (0.7, 0.2, 0.1), seed=0).items()}
    {'train': ['a', 'c', 'd', 'e', 'g', 'h', 'j'], 'val': ['b', 'f'], 'test': ['i']}
    """
    ranked = sorted(pairs, key=lambda pair: (blake2b(f"{seed}/{pair.case}".encode()).digest(), pair.case))
    val, test = (int(len(ranked) * fraction + 0.5) for fraction in fractions[1:])
    if fractions[1] > 0 and len(ranked) >= 2:
        val = max(val, 1)
    test = min(test, max(len(ranked) - 1 - val, 0))
    parts: dict[Split, list[Named]] = {
        "train": ranked[val + test :],
        "val": ranked[:val],
        "test": ranked[val : val + test],
    }
    return {split: sorted(part, key=lambda pair: pair.case) for split, part in parts.items() if part}


def check_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """The shares of train, val and test.

    Raises:
        ValueError: they do not sum to 1, or leave nothing to train on.
    """
    shares = tuple(float(part) for part in fractions)
    if len(shares) != 3 or min(shares) < 0 or shares[0] == 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(
            f"fractions must be the shares of train, val and test, which sum to 1, got {list(shares)}; "
            "for instance 'data.fractions=[0.7,0.15,0.15]'"
        )
    return shares[0], shares[1], shares[2]
