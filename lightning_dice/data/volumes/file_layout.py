"""Which NIfTI files of a folder belong together: channels, masks, splits."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.file_names import MASK_SUFFIXES, strip
from lightning_dice.data.interfaces import Split
from lightning_dice.data.splits import FOLDERS, complete_splits
from lightning_dice.data.volumes.nifti import EXTENSIONS, stem, volume_files

_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class VolumePair:
    """A case's files.

    Attributes:
        case: its name, unique in its split.
        images: one for each channel.
        masks: one of label values, or one for each class.
    """

    case: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...]


@dataclass
class VolumeLayout:
    """What a folder holds.

    Attributes:
        pairs: of each split that exists.
        planes: masks are one file for each class.
        problems: what does not fit together.
        notes: what is as it should be, and yet worth telling.
    """

    pairs: dict[Split, list[VolumePair]] = field(default_factory=dict)
    planes: bool = False
    problems: list[DataProblem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def group_channels(files: Sequence[Path], channels: int) -> tuple[dict[str, tuple[Path, ...]], list[DataProblem]]:
    """The files of each case, in the order of their channels: `<case>_0000`, `<case>_0001` ...

    One channel may do without the number: it is left out of a case's name if all files have `_0000`.

    >>> files = [Path("a_0000.nii.gz"), Path("a_0001.nii.gz")]
    >>> group_channels(files, channels=2)[0] == {"a": tuple(files)}
    True
    """
    numbered = [_CHANNEL.fullmatch(stem(path)) for path in files]
    if channels == 1 and not all(found and found[2] == "0000" for found in numbered):
        numbered = [None] * len(files)
    found: dict[str, dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path, parts in zip(files, numbered, strict=True):
        found[parts[1] if parts else stem(path)][int(parts[2]) if parts else 0].append(path)
    cases: dict[str, tuple[Path, ...]] = {}
    problems = []
    for case, by_channel in sorted(found.items()):
        first = next(iter(by_channel.values()))[0]
        double = [paths for paths in by_channel.values() if len(paths) > 1]
        if double:
            names = ", ".join(path.name for path in double[0])
            problems.append(DataProblem(f"several files are of one case: {names}", first, "Keep one of them."))
        elif sorted(by_channel) != list(range(channels)):
            there = ", ".join(f"{number:04d}" for number in sorted(by_channel))
            asked = f"{channels} channel{'s' * (channels > 1)} {'are' if channels > 1 else 'is'} required"
            what = f"its case has the channel{'s' * (len(by_channel) > 1)} {there}, {asked}"
            remedy = "Name the files <case>_0000, <case>_0001 ..., one for each of the channels of the data set."
            problems.append(DataProblem(what, first, remedy))
        else:
            cases[case] = tuple(by_channel[number][0] for number in range(channels))
    return cases, problems


def scan_folders(
    root: Path,
    images: str,
    masks: str,
    planes: Sequence[str],
    channels: int,
    fractions: Sequence[float],
    seed: int,
) -> VolumeLayout:
    """The cases of `images/` and `masks/`, with or without `train/`, `val/` and `test/` in them.

    Args:
        root: the folder.
        images: where under `root` the images are.
        masks: where the masks are: a mask has its image's name, up to customary endings such as `_seg`.
        planes: names of classes that may have a folder of masks each.
        channels: of an image.
        fractions: shares of train, val and test, where folders do not make the splits.
        seed: of this draw.
    """
    layout = VolumeLayout()
    try:
        image_folders, mask_folders = _split_folders(root, images, "images"), _split_folders(root, masks, "masks")
    except DataProblem as problem:
        layout.problems.append(problem)
        return layout
    parts: dict[Split | None, list[VolumePair]] = {}
    for split, folder in image_folders.items():
        beside = mask_folders.get(split, mask_folders.get(None))
        if beside is None:
            remedy = f"Add {masks}/{split}, or remove the images."
            layout.problems.append(DataProblem("has no folder of masks beside it", folder, remedy))
            continue
        own = [name for name in planes if (beside / name).is_dir()]
        if own and len(own) < len(planes):
            what = f"has folders for {', '.join(own)}, but not for {', '.join(set(planes) - set(own))}"
            layout.problems.append(DataProblem(what, beside, "Add them, or leave the classes out of data.classes."))
            continue
        layout.planes = layout.planes or bool(own)
        cases = cases_of(folder, channels, layout.problems)
        parts[split] = pair(cases, [beside / name for name in own] or [beside], layout.problems)
    layout.pairs = complete_splits(parts, fractions, seed, layout.problems, root / images)
    return layout


def cases_of(folder: Path, channels: int, problems: list[DataProblem]) -> dict[str, tuple[Path, ...]]:
    """The image files of each case in a folder; what is wrong goes to `problems`."""
    files = volume_files(folder)
    if not files:
        problems.append(_empty(folder))
    cases, found = group_channels(files, channels)
    problems += found
    return cases


def pair(
    cases: Mapping[str, tuple[Path, ...]],
    folders: Sequence[Path],
    problems: list[DataProblem],
    *,
    all_images: bool = True,
) -> list[VolumePair]:
    """Find the masks of cases.

    Args:
        cases: the image files of each.
        folders: of the masks: one, or one for each class.
        problems: where it goes that a mask or an image is missing.
        all_images: whether each case must have a mask.
    """
    masks: list[dict[str, Path]] = []
    for folder in folders:
        here: dict[str, Path] = {}
        files = volume_files(folder)
        if not files:
            problems.append(_empty(folder))
            return []
        for path in files:
            name = stem(path)
            name = name if name in cases else strip(name, MASK_SUFFIXES)
            if name in here:
                what = f"several masks are of one case: {here[name].name}, {path.name}"
                problems.append(DataProblem(what, path, "Keep one of them."))
            elif name not in cases:
                problems.append(DataProblem("has no image", path, "Add the image, or remove the mask."))
            here.setdefault(name, path)
        masks.append(here)
    pairs = []
    for case, images in cases.items():
        lacking = [str(folder) for folder, here in zip(folders, masks, strict=True) if case not in here]
        if not lacking:
            pairs.append(VolumePair(case, images, tuple(here[case] for here in masks)))
        elif all_images:
            what = f"has no mask in {', '.join(lacking)}"
            problems.append(DataProblem(what, images[0], "Add the mask, or remove the image."))
    return pairs


def _split_folders(root: Path, inside: str, setting: str) -> dict[Split | None, Path]:
    base = root / inside
    if not root.is_dir():
        raise DataProblem("is no folder", root, "Set data.root=/path/to/folder.")
    if not base.is_dir():
        there = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise DataProblem(
            f"there is no such folder; {root.name} holds {there}", base, f"Set data.{setting}=<sub-folder>."
        )
    folders: dict[Split | None, Path] = {}
    for split, names in FOLDERS.items():
        found = [base / name for name in names if (base / name).is_dir()]
        if len(found) > 1:
            what = f"{setting} of the split {split} are in several folders: {', '.join(path.name for path in found)}"
            raise DataProblem(what, base, "Merge them.")
        folders.update(dict.fromkeys([split], found[0]) if found else {})
    loose = volume_files(base)
    if folders and loose:
        what = f"holds {len(loose)} volumes such as {loose[0].name} beside the folders of splits"
        raise DataProblem(what, base, "Move them into the folders.")
    return folders or {None: base}


def _empty(folder: Path) -> DataProblem:
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    return DataProblem(f"holds no volume ({' '.join(EXTENSIONS)}); there is {there}", folder, "Put the volumes there.")
