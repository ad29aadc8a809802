"""The fingerprint of a data set of volumes: sizes, spacings, intensities, in a file beside the run.

A network depends on it as much as on its weights: wherever the network is used, target spacing and CT normalization
come from the cases that it was trained on.
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
MAX_SAMPLED = 10_000  # foreground voxels of a case, for the intensities
ANISOTROPY = 3  # an axis this many times coarser and shorter than the others gets less than its median spacing


class Stamp(NamedTuple):
    """Identifies the content of a file.

    Attributes:
        size: in bytes.
        modified: modification time in nanoseconds.
        digest: hash of the content.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a"
    ...     path.write_bytes(b"ab")
    ...     stamp = Stamp.from_file(path)
    ...     path.write_bytes(b"cd")
    ...     stamp.size, stamp.matches(path)
    2
    2
    (2, False)
    """

    size: int
    modified: int
    digest: str

    @classmethod
    def from_file(cls, path: Path) -> Stamp:
        """Read a file and return its stamp."""
        found = path.stat()
        digest = blake2b(digest_size=16)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return cls(found.st_size, found.st_mtime_ns, digest.hexdigest())

    def matches(self, path: Path) -> bool:
        """Return whether the file is unchanged: by size and time, or if only the time differs, by content."""
        try:
            found = path.stat()
            if found.st_size != self.size:
                return False
            return found.st_mtime_ns == self.modified or Stamp.from_file(path).digest == self.digest
        except OSError:
            return False


@dataclass(frozen=True)
class CaseFacts:
    """Properties of one case.

    Attributes:
        split: the split it belongs to.
        case: its name.
        files: the stamp of each file, images first, by the path below the root of the data.
        size: voxels along each axis, in canonical orientation.
        spacing: mm along each axis.
        kind: type and orientation of the stored image.
        counts: for each mask file, the number of voxels of each stored value.
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
    """Properties of all cases, and foreground intensities of the training cases.

    Attributes:
        channels: the normalization scheme of each channel.
        intensities: the statistics of each channel; empty if no training case has foreground.
        cases: the cases of all splits.

    >>> facts = [CaseFacts("train", str(n), {}, (9, 9, n), (1.0, 1.0, n), "", ({},)) for n in (2, 3, 5)]
    >>> Fingerprint(("CT",), (), tuple(facts)).median_spacing()
    (1.0, 1.0, 3.0)
    """

    channels: tuple[str, ...]
    intensities: tuple[Intensities, ...]
    cases: tuple[CaseFacts, ...]

    @property
    def train_cases(self) -> list[CaseFacts]:
        """The training cases."""
        return [facts for facts in self.cases if facts.split == "train"]

    def median_spacing(self) -> tuple[float, ...]:
        """Return the spacing to resample to, by nnU-Net's rule (Isensee et al., Nature Methods 2021).

        It is the median of each axis over the training cases. An axis more than three times as coarse as the others,
        with fewer than a third of their voxels as stored, gets the 10th percentile instead, because the median would
        lose slices of the finer cases; but it does not become finer than the other axes.
        """
        train = self.train_cases
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
        """Return the median size over the training cases, at a spacing or (`None`) as stored."""
        train = self.train_cases
        sizes = np.array([facts.size for facts in train], float)
        if spacing is not None:
            sizes = np.round(sizes * np.array([facts.spacing for facts in train]) / np.array(spacing))
        return tuple(max(1, int(length)) for length in np.percentile(sizes, 50, axis=0))

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        content = {
            "version": VERSION,
            "channels": list(self.channels),
            "intensities": [asdict(found) for found in self.intensities],
            "median_spacing": list(self.median_spacing()),  # for human readers: `load` computes it
            "cases": [_to_json(facts) for facts in self.cases],
        }
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: Path) -> Fingerprint:
        """Read what `save` wrote.

        Raises:
            DataError: it cannot be read, or has another version.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["version"]
            if version == VERSION:
                return cls(
                    tuple(content["channels"]),
                    tuple(Intensities(**found) for found in content["intensities"]),
                    tuple(_from_json(found) for found in content["cases"]),
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{path} cannot be read as a fingerprint ({reason}): restore it, or delete it") from error
        raise DataError(f"{path} is a fingerprint of version {version}, but {VERSION} is required: delete it")


def describe_changes(before: Iterable[CaseFacts], now: Iterable[CaseFacts]) -> list[str]:
    """Describe how the training cases differ from those of a fingerprint.

    >>> facts = [CaseFacts("train", name, {}, (9, 9, 9), (1.0, 1.0, 1.0), "", ({},)) for name in "abc"]
    >>> describe_changes(facts[:2], facts[1:])
    ['1 added (c)', '1 missing (a)']
    """
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


def _to_json(facts: CaseFacts) -> dict[str, Any]:
    return {**asdict(facts), "files": {name: list(stamp) for name, stamp in facts.files.items()}}


def _from_json(content: Mapping[str, Any]) -> CaseFacts:
    return CaseFacts(
        content["split"],
        content["case"],
        {name: Stamp(*stamp) for name, stamp in content["files"].items()},
        tuple(content["size"]),
        tuple(content["spacing"]),
        content["kind"],
        tuple({int(value): count for value, count in counts.items()} for counts in content["counts"]),
    )
