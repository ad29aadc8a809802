"""Training, validation and test splits."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class SplitSettings:
    """How cases are divided into training, validation and test.

    Args:
        fractions: shares of train, val and test, if the data set has no splits.
        seed: of that draw.
        splits: the names that replace `{split}` in a pattern, `{"train": "train2017", "val": "val2017"}`; a split that
            is missing or `None` does not exist. `None`: the customary names, `FOLDERS`.
        split_files: text files with the names of each split's cases, `ImageSets/Segmentation/{split}.txt`; other
            cases are left out.

    Raises:
        ValueError: the fractions do not sum to 1, `splits` has other names or no train, or `split_files` has no
            `{split}` in it.

    >>> SplitSettings((0.8, 0.2, 0)).fractions, SplitSettings(splits={"train": "train2017"}).names
    ((0.8, 0.2, 0.0), {'train': ('train2017',)})
    """

    fractions: Sequence[float] = (0.7, 0.15, 0.15)
    seed: int = 0
    splits: Mapping[Split, str | None] | None = None
    split_files: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "fractions", check_fractions(self.fractions))
        object.__setattr__(self, "seed", int(self.seed))
        object.__setattr__(self, "splits", check_splits(self.splits))
        if self.split_files is not None:
            pattern = str(self.split_files)
            if "{split}" not in pattern or set(re.findall(r"{(\w*)}", pattern)) - {"split"} or "*" in pattern:
                raise ValueError(
                    f"split_files must have {{split}} in it, and no other placeholder, got {self.split_files!r}"
                )
            object.__setattr__(self, "split_files", pattern)

    @property
    def names(self) -> dict[Split, tuple[str, ...]]:
        """The names that may replace `{split}`, for each split."""
        if self.splits is None:
            return dict(FOLDERS)
        return {split: (name,) for split in SPLITS if (name := self.splits.get(split)) is not None}


class _HasCase(Protocol):
    @property
    def case(self) -> str: ...


CaseT = TypeVar("CaseT", bound=_HasCase)


def complete_splits(
    parts: Mapping[Split | None, list[CaseT]], settings: SplitSettings, problems: list[DataProblem], where: Path
) -> dict[Split, list[CaseT]]:
    """Draw all splits if there are none, or val from train if there is no val.

    Args:
        parts: the cases of each split, or all cases under `None`.
        settings: the fractions and the seed of the draw.
        problems: a list, to which a missing train split is appended unless there are other problems.
        where: the folder of the images, for this message.

    >>> from types import SimpleNamespace
    >>> cases = [SimpleNamespace(case=name) for name in "abcdefgh"]
    >>> splits = complete_splits({"train": cases[:6], "test": cases[6:]}, SplitSettings(), [], Path("images"))
    >>> {split: "".join(one.case for one in part) for split, part in splits.items()}
    {'train': 'acdef', 'val': 'b', 'test': 'gh'}
    """
    fractions, seed = settings.fractions, settings.seed
    if None in parts:
        return draw_splits(parts[None], fractions, seed)
    pairs = {split: parts[split] for split in SPLITS if split in parts}
    if problems:
        return pairs
    if "train" not in pairs:
        found = ", ".join(pairs)
        problems.append(DataProblem(f"has no split to train on, only {found}", where, "Add a folder train."))
    elif "val" not in pairs:
        rest, share = fractions[0] + fractions[1], fractions[1]
        drawn = draw_splits(pairs["train"], (1 - share / rest, share / rest, 0.0), seed)
        pairs = {**drawn, **{split: pairs[split] for split in SPLITS if split == "test" and split in pairs}}
    return pairs


def check_splits(splits: Mapping[Split, str | None] | None) -> dict[Split, str | None] | None:
    """Return the name of each split in the data set, or `None` for splits that it does not have.

    Raises:
        ValueError: a key is not train, val or test, or train is missing.

    >>> check_splits({"train": "train2017", "val": "val2017"})
    {'train': 'train2017', 'val': 'val2017', 'test': None}
    """
    if splits is None:
        return None
    if not isinstance(splits, Mapping) or not set(splits) <= set(SPLITS) or splits.get("train") is None:
        raise ValueError(
            f"splits must map train, and perhaps val and test, to their names in the data set, got {splits!r}; "
            "for instance 'data.splits={train:train2017,val:val2017}'"
        )
    return {split: None if splits.get(split) is None else str(splits[split]) for split in SPLITS}


def split_folders(
    base: Path, setting: str, pattern: str = "{split}", names: Mapping[Split, Sequence[str]] = FOLDERS
) -> dict[Split | None, Path]:
    """Find the folder of each split; splits without one are left out.

    Args:
        base: where to look.
        setting: what the folders hold, `images` or `masks`, for the message.
        pattern: path below `base`.
        names: the names that may replace `{split}`, for each split.

    Raises:
        DataError: a split has several folders.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("training", "val", "other"):
    ...         Path(root, name).mkdir()
    ...     {split: path.name for split, path in split_folders(Path(root), "images").items()}
    {'train': 'training', 'val': 'val'}
    """
    folders: dict[Split | None, Path] = {}
    for split, words in names.items():
        found = [path for path in (base / pattern.replace("{split}", word) for word in words) if path.is_dir()]
        if len(found) > 1:
            several = ", ".join(path.name for path in found)
            raise DataProblem(f"{setting} of the split {split} are in several folders: {several}", base, "Merge them.")
        if found:
            folders[split] = found[0]
    return folders


def draw_splits(pairs: Sequence[CaseT], fractions: Sequence[float], seed: int) -> dict[Split, list[CaseT]]:
    """Divide cases into random splits.

    Cases are ranked by a hash of their name and the seed, so the splits depend on neither the file system nor the
    version of Python, and adding a case moves few others. Of two or more cases, at least one is for validation unless
    its fraction is 0.

    >>> from types import SimpleNamespace
    >>> cases = [SimpleNamespace(case=name) for name in "abcdefghij"]
    >>> {split: [one.case for one in part] for split, part in draw_splits(cases, (0.7, 0.2, 0.1), seed=0).items()}
    {'train': ['a', 'c', 'd', 'e', 'g', 'h', 'j'], 'val': ['b', 'f'], 'test': ['i']}
    """
    ranked = sorted(pairs, key=lambda pair: (blake2b(f"{seed}/{pair.case}".encode()).digest(), pair.case))
    val, test = (int(len(ranked) * fraction + 0.5) for fraction in fractions[1:])
    if fractions[1] > 0 and len(ranked) >= 2:
        val = max(val, 1)
    test = min(test, max(len(ranked) - 1 - val, 0))
    parts: dict[Split, list[CaseT]] = {
        "train": ranked[val + test :],
        "val": ranked[:val],
        "test": ranked[val : val + test],
    }
    return {split: sorted(part, key=lambda pair: pair.case) for split, part in parts.items() if part}


def check_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """Return the shares of train, val and test.

    Raises:
        ValueError: they do not sum to 1, or the share of train is 0.

    >>> check_fractions([0.8, 0.2, 0])
    (0.8, 0.2, 0.0)
    """
    shares = tuple(float(part) for part in fractions)
    if len(shares) != 3 or min(shares) < 0 or shares[0] == 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(
            f"fractions must be the shares of train, val and test, which sum to 1, got {list(shares)}; "
            "for instance 'data.fractions=[0.7,0.15,0.15]'"
        )
    return shares[0], shares[1], shares[2]
