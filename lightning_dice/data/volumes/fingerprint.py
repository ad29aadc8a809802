"""What a data set of volumes is like: sizes, spacings, intensities. Read once, and kept in a file beside the run.

A network depends on it as on its weights: target spacing and CT normalization come from the training cases that it was
trained on, wherever it is used later.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_dice.data.errors import DataError
from lightning_dice.data.interfaces import Split
from lightning_dice.data.volumes.normalization import Intensities
from lightning_dice.io import write_atomically

VERSION = 1
SAMPLED = 10_000  # foreground voxels of a case, for the intensities
ANISOTROPY = 3  # how much coarser, and shorter, an axis must be to get a finer spacing than its median


class Stamp(NamedTuple):
    """By which a file is known again.

    Attributes:
        size: in bytes.
        modified: in nanoseconds.
        digest: of its content.
    """

    size: int
    modified: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """That of a file, which is read."""
        found = path.stat()
        digest = blake2b(digest_size=16)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return cls(found.st_size, found.st_mtime_ns, digest.hexdigest())

    def is_of(self, path: Path) -> bool:
        """Whether this is still the file: by size and time, or if only the time differs, by its content."""
        try:
            found = path.stat()
            if found.st_size != self.size:
                return False
            return found.st_mtime_ns == self.modified or Stamp.of(path).digest == self.digest
        except OSError:
            return False


@dataclass(frozen=True)
class CaseFacts:
    """A case, as it was read.

    Attributes:
        split: where it is.
        case: its name.
        files: stamp of each, images first, by the path below the data's root.
        size: voxels along each axis, in canonical orientation.
        spacing: mm along each axis.
        kind: type and orientation of the stored image.
        counts: voxels of each stored label value, for each mask file.
    """

    split: Split
    case: str
    files: Mapping[str, Stamp]
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    kind: str
    counts: tuple[Mapping[int, int], ...]


@dataclass(frozen=True)
class Fingerprint:
    """All cases, and the intensities of the training cases' foreground.

    Attributes:
        channels: the name of each.
        intensities: of each channel; none if no training case has foreground.
        cases: of all splits.

    >>> facts = [CaseFacts("train", str(n), {}, (9, 9, n), (1.0, 1.0, n), "", ({},)) for n in (2, 3, 5)]
    >>> Fingerprint(("CT",), (), tuple(facts)).median_spacing()
    (1.0, 1.0, 3.0)
    """

    channels: tuple[str, ...]
    intensities: tuple[Intensities, ...]
    cases: tuple[CaseFacts, ...]

    def train(self) -> list[CaseFacts]:
        """The training cases."""
        return [facts for facts in self.cases if facts.split == "train"]

    def median_spacing(self) -> tuple[float, ...]:
        """The spacing that volumes are resampled to, by nnU-Net's rule (Isensee et al., Nature Methods 2021).

        The median of each axis over the training cases. An axis more than three times as coarse as the others, of
        fewer than a third of their voxels as stored, gets the 10th percentile instead, as interpolating thick slices to
        the median would lose those of the finer cases; but it does not become finer than the others.
        """
        train = self.train()
        spacings = np.array([facts.spacing for facts in train])
        target = np.percentile(spacings, 50, axis=0)
        worst = int(np.argmax(target))
        others = [axis for axis in range(len(target)) if axis != worst]
        coarse = target[worst] > ANISOTROPY * target[others].max()
        short = np.percentile([facts.size for facts in train], 50, axis=0)
        if coarse and short[worst] * ANISOTROPY < short[others].min():
            target[worst] = max(np.percentile(spacings[:, worst], 10), target[others].max())
        return tuple(round(float(length), 6) for length in target)

    def median_size(self, spacing: Sequence[float] | None) -> tuple[int, ...]:
        """The median voxels along each axis over the training cases, at a spacing or (`None`) as they are."""
        train = self.train()
        sizes = np.array([facts.size for facts in train], float)
        if spacing is not None:
            sizes = np.round(sizes * np.array([facts.spacing for facts in train]) / np.array(spacing))
        return tuple(max(1, int(length)) for length in np.percentile(sizes, 50, axis=0))

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        content = {
            "version": VERSION,
            "channels": list(self.channels),
            "intensities": [asdict(found) for found in self.intensities],
            "median_spacing": list(self.median_spacing()),  # for the reader's eyes: it follows from the cases
            "cases": [_plain(facts) for facts in self.cases],
        }
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: Path) -> Fingerprint:
        """Read it again.

        Raises:
            DataError: it cannot be read, or is of another version.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["version"]
            if version == VERSION:
                return cls(
                    tuple(content["channels"]),
                    tuple(Intensities(**found) for found in content["intensities"]),
                    tuple(_facts(found) for found in content["cases"]),
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{path} cannot be read as a fingerprint ({reason}): restore it, or delete it") from error
        raise DataError(f"{path} is a fingerprint of version {version}, {VERSION} is required: delete it")


def changed(before: Iterable[CaseFacts], now: Iterable[CaseFacts]) -> list[str]:
    """In words, how the training cases are others than those that a fingerprint was made of."""
    old = {facts.case: _digests(facts) for facts in before if facts.split == "train"}
    new = {facts.case: _digests(facts) for facts in now if facts.split == "train"}
    groups = {
        "added": [case for case in new if case not in old],
        "missing": [case for case in old if case not in new],
        "changed": [case for case in new if case in old and old[case] != new[case]],
    }
    return [
        f"{len(cases)} {what} ({', '.join(cases[:3])}{' ...' * (len(cases) > 3)})"
        for what, cases in groups.items()
        if cases
    ]


def _digests(facts: CaseFacts) -> list[str]:
    return [stamp.digest for stamp in facts.files.values()]


def _plain(facts: CaseFacts) -> dict[str, Any]:
    return {**asdict(facts), "files": {name: list(stamp) for name, stamp in facts.files.items()}}


def _facts(content: Mapping[str, Any]) -> CaseFacts:
    return CaseFacts(
        content["split"],
        content["case"],
        {name: Stamp(*stamp) for name, stamp in content["files"].items()},
        tuple(content["size"]),
        tuple(content["spacing"]),
        content["kind"],
        tuple({int(value): count for value, count in counts.items()} for counts in content["counts"]),
    )
