"""What volumes hold: everything that is wrong with them, or a report."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.interfaces import Split
from lightning_dice.data.label_map import LabelMap, count_values
from lightning_dice.data.volumes.file_layout import VolumePair
from lightning_dice.data.volumes.fingerprint import SAMPLED, CaseFacts, Stamp
from lightning_dice.data.volumes.nifti import Geometry, read_labels, read_volume, turned

NAMED = 5  # cases in one warning


@dataclass
class Inspected:
    """A case that was read once.

    Attributes:
        facts: what it is like; `None` if it could not be read.
        voxels: intensities of some foreground voxels, `(channels, voxels)`.
        problems: what is wrong.
    """

    facts: CaseFacts | None = None
    voxels: NDArray[np.float32] | None = None
    problems: list[DataProblem] = field(default_factory=list)


def read_channels(files: Sequence[Path]) -> tuple[list[NDArray[np.float32]], Geometry]:
    """The channels of a case, in canonical orientation, and the geometry that they share.

    Raises:
        DataError: a file cannot be read, holds NaN or infinite values, or lies elsewhere than the first.
    """
    channels: list[NDArray[np.float32]] = []
    first: Geometry | None = None
    for path in files:
        values, geometry = read_volume(path)
        if first is not None and (what := geometry.differs(first)):
            raise DataProblem(what, path, "Resample the channels of a case to one grid.")
        first = first or geometry
        with np.errstate(over="ignore"):  # A float64 beyond float32 becomes inf, which is refused.
            channel = np.ascontiguousarray(values, dtype=np.float32)
        strange = channel.size - int(np.isfinite(channel).sum())
        if strange:
            raise DataProblem(f"holds {strange} voxels that are not finite (NaN or infinite)", path, "Fill them first.")
        channels.append(channel)
    if first is None:
        raise ValueError("files must name at least one")
    return channels, first


def read_mask(path: Path, geometry: Geometry, *, check_affine: bool = True) -> NDArray[Any]:
    """The stored label values of a mask that lies on an image.

    Args:
        path: of the mask.
        geometry: of the image.
        check_affine: whether the affines must agree; if not, equal shapes do, and voxels belong together as stored.

    Raises:
        DataError: it cannot be read, holds fractions, or lies elsewhere than the image.
    """
    values, own = read_labels(path)
    what = own.differs(geometry)
    if what and not check_affine and own.shape == geometry.shape:
        return turned(values, own, geometry)
    if what:
        remedy = "Resample the mask to its image by nearest neighbour."
        if own.shape == geometry.shape:
            remedy = "Give the mask its image's affine; if they fit voxel by voxel, set data.check_affine=false."
        raise DataProblem(what, path, remedy)
    return values


def inspect(
    pair: VolumePair, split: Split, root: Path, labels: LabelMap, planes: bool, check_affine: bool
) -> Inspected:
    """Read a case's files."""
    found = Inspected()
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
        if what := labels.describe(counted, planes):
            remedy = (
                "Name all classes (data.classes, or labels in dataset.json), or map values: 'data.label_map={7:1}'."
            )
            found.problems.append(DataProblem(f"holds {what}", path, remedy))
    kind = f"{geometry.kind} {geometry.axes}"
    found.facts = CaseFacts(split, pair.case, stamps(pair, root), geometry.size, geometry.spacing, kind, counts)
    if split == "train":
        values = labels.values[0] if planes else tuple(labels.foreground)
        inside = np.logical_or.reduce([np.isin(part, values) for part in stored])
        found.voxels = _sample(channels, inside, pair.case)
    return found


def stamps(pair: VolumePair, root: Path) -> dict[str, Stamp]:
    """The stamp of each file, by its path below the root."""
    return {relative(path, root): Stamp.of(path) for path in (*pair.images, *pair.masks)}


def relative(path: Path, root: Path) -> str:
    """A path below the root, with slashes on any system."""
    return Path(os.path.relpath(path, root)).as_posix()


def _sample(channels: Sequence[NDArray[np.float32]], inside: NDArray[np.bool_], case: str) -> NDArray[np.float32]:
    places = np.flatnonzero(inside)
    if len(places) > SAMPLED:
        seed = int.from_bytes(blake2b(case.encode(), digest_size=8).digest(), "little")
        places = np.random.default_rng(seed).choice(places, SAMPLED, replace=False)
    return np.stack([channel.reshape(-1)[places] for channel in channels])


@dataclass(frozen=True)
class VolumeSurvey:
    """Every case, read once.

    Attributes:
        cases: the facts of each split's cases.
        labels: the classes.
        planes: masks are one file for each class.
        spacing: that volumes are resampled to; `None`: not at all.
        notes: what else is worth telling.
    """

    cases: Mapping[Split, Sequence[CaseFacts]]
    labels: LabelMap
    planes: bool
    spacing: tuple[float, ...] | None
    notes: tuple[str, ...] = ()

    def shares(self, split: Split) -> dict[str | None, tuple[float, int]]:
        """The share of voxels of each class in a split, and in how many cases it occurs; under `None` the ignored."""
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
        return {name: (voxels[name] / max(total, 1), cases[name]) for name in (*self.labels.classes, None)}

    def warnings(self) -> list[str]:
        """What may be as it should be, but often is not."""
        lines = [
            f"class {name!r} never occurs in the train split"
            for name, (_, cases) in (self.shares("train") if "train" in self.cases else {}).items()
            if name is not None and not cases
        ]
        same: dict[str, dict[Split, str]] = defaultdict(dict)
        for split, part in self.cases.items():
            for facts in part:
                same[next(iter(facts.files.values())).digest].setdefault(split, f"{split}/{facts.case}")
        twins = [" = ".join(names.values()) for names in same.values() if len(names) > 1]
        if twins:
            more = f" and {len(twins) - NAMED} more" if len(twins) > NAMED else ""
            lines.append(f"{len(twins)} images stand in more than one split: {', '.join(twins[:NAMED])}{more}")
        return [*lines, *self.notes]

    def report(self, root: Path) -> str:
        """The survey as a text to show."""
        rows = [("split", "cases", "size", "spacing (mm)", "images")]
        for split, part in self.cases.items():
            kinds = Counter(facts.kind for facts in part).most_common()
            words = ", ".join(kind if len(kinds) == 1 else f"{kind} ({count})" for kind, count in kinds[:4])
            sizes = _range([facts.size for facts in part], "d")
            spacings = _range([facts.spacing for facts in part], ".3g")
            rows.append((split, str(len(part)), sizes, spacings, words + " ..." * (len(kinds) > 4)))
        table: list[tuple[str, ...]] = [("voxels (cases)", *self.cases)]
        shares = {split: self.shares(split) for split in self.cases}
        for name in (*self.labels.classes, None):
            if name is not None or any(part[None][1] for part in shares.values()):
                cells = (f"{100 * part[name][0]:.3g}% ({part[name][1]})" for part in shares.values())
                table.append(("(ignored)" if name is None else name, *cells))
        stored = "one mask file for each class" if self.planes else "masks of labels"
        heading = f"{root}: {sum(map(len, self.cases.values()))} cases, {stored}, {self.labels.activation}"
        grid = "x".join(f"{length:.4g}" for length in self.spacing or ())
        resampled = f"resampled to {grid} mm" if self.spacing else "not resampled"
        warnings = [f"Warning: {line}" for line in self.warnings()]
        return "\n".join(
            [f"{heading}, {resampled}", "", *_align(rows), "", *_align(table), *([""] if warnings else []), *warnings]
        )


def _range(triples: Sequence[Sequence[float]], style: str) -> str:
    least, most = ("x".join(format(end(axis), style) for axis in zip(*triples, strict=True)) for end in (min, max))
    return least if least == most else f"{least} to {most}"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
