"""The check of a data set of volumes: a list of all problems, or a report."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.interfaces import Split
from lightning_dice.data.label_map import LabelMap, count_values
from lightning_dice.data.summary_table import (
    ClassShare,
    count_kinds,
    format_report,
    warn_of_absent_classes,
    warn_of_shared_images,
)
from lightning_dice.data.volumes.file_layout import VolumePair
from lightning_dice.data.volumes.fingerprint import MAX_SAMPLED, CaseFacts, Stamp
from lightning_dice.data.volumes.nifti import read_channels, read_mask


@dataclass
class InspectedCase:
    """The result of checking one case.

    Attributes:
        facts: its properties; `None` if it could not be read.
        voxels: intensities of some foreground voxels, `(channels, voxels)`; of training cases only.
        problems: what is wrong with its files.
    """

    facts: CaseFacts | None = None
    voxels: NDArray[np.float32] | None = None
    problems: list[DataProblem] = field(default_factory=list)


def inspect_case(
    pair: VolumePair, split: Split, root: Path, labels: LabelMap, planes: bool, check_affine: bool
) -> InspectedCase:
    """Read the files of a case and check them.

    Args:
        pair: the files.
        split: the split of the case.
        root: the folder of the data, which paths in `CaseFacts.files` are relative to.
        labels: the classes.
        planes: masks are one file for each class.
        check_affine: as for `read_mask`.
    """
    found = InspectedCase()
    try:
        channels, geometry = read_channels(pair.images)
    except DataProblem as problem:
        found.problems.append(problem)
        return found
    stored = []
    for path in pair.masks:
        try:
            stored.append(read_mask(path, geometry, check_affine=check_affine))
        except DataProblem as problem:
            found.problems.append(problem)
    if found.problems:
        return found
    counts = tuple(count_values(values) for values in stored)
    for path, counted in zip(pair.masks, counts, strict=True):
        if what := labels.describe_unknown(counted, planes):
            remedy = (
                "Name all classes (data.classes, or labels in dataset.json), or map values: 'data.label_map={7:1}'."
            )
            found.problems.append(DataProblem(f"holds {what}", path, remedy))
    kind = f"{geometry.kind} {geometry.axes}"
    found.facts = CaseFacts(split, pair.case, _stamps(pair, root), geometry.size, geometry.spacing, kind, counts)
    if split == "train":
        values = labels.values[0] if planes else tuple(labels.foreground)
        inside = np.logical_or.reduce([np.isin(part, values) for part in stored])
        found.voxels = _sample_voxels(channels, inside, pair.case)
    return found


def is_unchanged(facts: CaseFacts, pair: VolumePair, root: Path) -> bool:
    """Return whether a case's files are still those that `facts` describes."""
    paths = {_relative(path, root): path for path in (*pair.images, *pair.masks)}
    return paths.keys() == facts.files.keys() and all(facts.files[name].matches(path) for name, path in paths.items())


def _stamps(pair: VolumePair, root: Path) -> dict[str, Stamp]:
    return {_relative(path, root): Stamp.from_file(path) for path in (*pair.images, *pair.masks)}


def _relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _sample_voxels(
    channels: Sequence[NDArray[np.float32]], inside: NDArray[np.bool_], case: str
) -> NDArray[np.float32]:
    indices = np.flatnonzero(inside)
    if len(indices) > MAX_SAMPLED:
        seed = int.from_bytes(blake2b(case.encode(), digest_size=8).digest(), "little")
        indices = np.random.default_rng(seed).choice(indices, MAX_SAMPLED, replace=False)
    return np.stack([channel.reshape(-1)[indices] for channel in channels])


@dataclass(frozen=True)
class VolumeSurvey:
    """The properties of all cases of a data set.

    Attributes:
        cases: the properties of each split's cases.
        labels: the classes.
        planes: masks are one file for each class.
        spacing: mm along each axis that volumes are resampled to; `None`: not resampled.
        notes: further lines of the report.
    """

    cases: Mapping[Split, Sequence[CaseFacts]]
    labels: LabelMap
    planes: bool
    spacing: tuple[float, ...] | None
    notes: tuple[str, ...] = ()

    def shares(self, split: Split) -> dict[str | None, ClassShare]:
        """Return how common each class is in a split; under `None`, how common ignored voxels are."""
        voxels: Counter[str | None] = Counter()
        cases: Counter[str | None] = Counter()
        total = 0
        for facts in self.cases[split]:
            total += int(np.prod(facts.size))
            here: Counter[str | None] = Counter()
            for index, counts in enumerate(facts.counts):
                here.update(self.labels.counts(counts, index if self.planes else None))
            voxels.update(here)
            cases.update(name for name, count in here.items() if count)
        return {name: ClassShare(voxels[name] / max(total, 1), cases[name]) for name in (*self.labels.classes, None)}

    def warnings(self) -> list[str]:
        """Return suspicious but valid findings."""
        train = self.shares("train") if "train" in self.cases else {}
        images = [
            (split, facts.case, next(iter(facts.files.values())).digest)
            for split, part in self.cases.items()
            for facts in part
        ]
        return [*warn_of_absent_classes(train), *warn_of_shared_images(images), *self.notes]

    def report(self, root: Path) -> str:
        """Return the survey as text."""
        rows = [("split", "cases", "size", "spacing (mm)", "images")]
        for split, part in self.cases.items():
            kinds = count_kinds((facts.kind for facts in part), limit=4)
            sizes = _range([facts.size for facts in part], "d")
            spacings = _range([facts.spacing for facts in part], ".3g")
            rows.append((split, str(len(part)), sizes, spacings, kinds))
        stored = "one mask file for each class" if self.planes else "masks of labels"
        heading = f"{root}: {sum(map(len, self.cases.values()))} cases, {stored}, {self.labels.activation}"
        grid = "x".join(f"{length:.4g}" for length in self.spacing or ())
        resampled = f"resampled to {grid} mm" if self.spacing else "not resampled"
        shares = {split: self.shares(split) for split in self.cases}
        warnings = [f"Warning: {line}" for line in self.warnings()]
        return format_report(f"{heading}, {resampled}", rows, shares, "voxels", warnings)


def _range(triples: Sequence[Sequence[float]], style: str) -> str:
    least, most = ("x".join(format(end(axis), style) for axis in zip(*triples, strict=True)) for end in (min, max))
    return least if least == most else f"{least} to {most}"
