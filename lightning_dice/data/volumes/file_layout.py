"""Finding the NIfTI files of each case in a folder: channels, masks, splits."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.file_names import MASK_SUFFIXES, file_stem, strip_suffix
from lightning_dice.data.interfaces import Split
from lightning_dice.data.splits import SplitSettings, complete_splits, split_folders
from lightning_dice.data.volumes.nifti import EXTENSIONS, volume_files

_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class VolumePair:
    """The files of a case.

    Attributes:
        case: its name, unique in its split.
        images: one for each channel.
        masks: one with label values, or one for each class.
    """

    case: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...]


@dataclass
class VolumeLayout:
    """The cases in a folder.

    Attributes:
        pairs: the cases of each split that exists.
        planes: masks are one file for each class.
        problems: files that do not match.
        notes: valid findings to mention in the report.
    """

    pairs: dict[Split, list[VolumePair]] = field(default_factory=dict)
    planes: bool = False
    problems: list[DataProblem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def group_channels(files: Sequence[Path], channels: int) -> tuple[dict[str, tuple[Path, ...]], list[DataProblem]]:
    """Group files by case, in the order of their channels: `<case>_0000`, `<case>_0001` ...

    With a single channel, the number is optional: it is removed from the names of cases if all files have `_0000`.

    Args:
        files: in any order.
        channels: number of channels of each case.

    Returns:
        The files of each complete case, and the problems of the others.

    >>> files = [Path("a_0000.nii.gz"), Path("a_0001.nii.gz")]
    >>> group_channels(files, channels=2)[0] == {"a": tuple(files)}
    True
    """
    numbered = [_CHANNEL.fullmatch(file_stem(path, EXTENSIONS)) for path in files]
    if channels == 1 and not all(found and found[2] == "0000" for found in numbered):
        numbered = [None] * len(files)
    found: dict[str, dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path, parts in zip(files, numbered, strict=True):
        found[parts[1] if parts else file_stem(path, EXTENSIONS)][int(parts[2]) if parts else 0].append(path)
    cases: dict[str, tuple[Path, ...]] = {}
    problems = []
    for case, by_channel in sorted(found.items()):
        first = next(iter(by_channel.values()))[0]
        double = [paths for paths in by_channel.values() if len(paths) > 1]
        if double:
            names = ", ".join(path.name for path in double[0])
            problems.append(DataProblem(f"several files belong to one case: {names}", first, "Keep one of them."))
        elif sorted(by_channel) != list(range(channels)):
            there = ", ".join(f"{number:04d}" for number in sorted(by_channel))
            required = f"{channels} channel{'s' * (channels > 1)} {'are' if channels > 1 else 'is'} required"
            what = f"its case has the channel{'s' * (len(by_channel) > 1)} {there}, but {required}"
            remedy = "Name the files <case>_0000, <case>_0001 ..., one for each channel of the data set."
            problems.append(DataProblem(what, first, remedy))
        else:
            cases[case] = tuple(by_channel[number][0] for number in range(channels))
    return cases, problems


def find_pairs(
    root: Path,
    images: str,
    masks: str,
    planes: Sequence[str],
    channels: int,
    split_settings: SplitSettings,
) -> VolumeLayout:
    """Find the cases of `images/` and `masks/`, with or without `train/`, `val/` and `test/` in them.

    Args:
        root: the folder.
        images: the folder of images below `root`.
        masks: the folder of masks; a mask has the name of its image, apart from endings such as `_seg`.
        planes: names of classes that may have a folder of masks each.
        channels: number of channels of an image.
        split_settings: the names of the split folders, and how splits without a folder are drawn.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("images/a.nii.gz", "images/b.nii.gz", "masks/a_seg.nii.gz", "masks/b_seg.nii.gz"):
    ...         Path(root, name).parent.mkdir(exist_ok=True)
    ...         Path(root, name).touch()
    ...     layout = find_pairs(Path(root), "images", "masks", (), 1, SplitSettings())
    >>> {split: [pair.case for pair in pairs] for split, pairs in layout.pairs.items()}
    {'train': ['a'], 'val': ['b']}
    """
    layout = VolumeLayout()
    try:
        image_folders = _find_folders(root, images, "images", split_settings)
        mask_folders = _find_folders(root, masks, "masks", split_settings)
    except DataProblem as problem:
        layout.problems.append(problem)
        return layout
    parts: dict[Split | None, list[VolumePair]] = {}
    for split, folder in image_folders.items():
        mask_folder = mask_folders.get(split, mask_folders.get(None))
        if mask_folder is None:
            remedy = f"Add {masks}/{split}, or remove the images."
            layout.problems.append(DataProblem("has no folder of masks beside it", folder, remedy))
            continue
        own = [name for name in planes if (mask_folder / name).is_dir()]
        if own and len(own) < len(planes):
            what = f"has folders for {', '.join(own)}, but not for {', '.join(set(planes) - set(own))}"
            remedy = "Add them, or leave the classes out of data.classes."
            layout.problems.append(DataProblem(what, mask_folder, remedy))
            continue
        layout.planes = layout.planes or bool(own)
        cases = find_images(folder, channels, layout.problems)
        parts[split] = match_masks(cases, [mask_folder / name for name in own] or [mask_folder], layout.problems)
    layout.pairs = complete_splits(parts, split_settings, layout.problems, root / images)
    return layout


def find_images(folder: Path, channels: int, problems: list[DataProblem]) -> dict[str, tuple[Path, ...]]:
    """Return the image files of each case in a folder; problems are appended to `problems`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz"):
    ...         Path(folder, name).touch()
    ...     problems = []
    ...     list(find_images(Path(folder), 2, problems)), [problem.what for problem in problems]
    (['a'], ['its case has the channel 0000, but 2 channels are required'])
    """
    files = volume_files(folder)
    if not files:
        problems.append(_no_volumes(folder))
    cases, found = group_channels(files, channels)
    problems += found
    return cases


def match_masks(
    cases: Mapping[str, tuple[Path, ...]],
    folders: Sequence[Path],
    problems: list[DataProblem],
    *,
    all_images: bool = True,
) -> list[VolumePair]:
    """Find the masks of cases by their names.

    Args:
        cases: the image files of each case.
        folders: the folder of masks, or one for each class.
        problems: a list, to which missing masks and images are appended.
        all_images: require a mask of each case.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Path(folder, "a_seg.nii.gz").touch()
    ...     pairs = match_masks({"a": (Path("a.nii.gz"),)}, [Path(folder)], problems=[])
    >>> [path.name for path in pairs[0].masks]
    ['a_seg.nii.gz']
    """
    masks: list[dict[str, Path]] = []
    for folder in folders:
        here: dict[str, Path] = {}
        files = volume_files(folder)
        if not files:
            problems.append(_no_volumes(folder))
            return []
        for path in files:
            name = file_stem(path, EXTENSIONS)
            name = name if name in cases else strip_suffix(name, MASK_SUFFIXES)
            if name in here:
                what = f"several masks belong to one case: {here[name].name}, {path.name}"
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


def _find_folders(root: Path, inside: str, setting: str, split_settings: SplitSettings) -> dict[Split | None, Path]:
    base = root / inside
    if not root.is_dir():
        raise DataProblem("is not a folder", root, "Set data.root=/path/to/folder.")
    if not base.is_dir():
        there = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise DataProblem(f"does not exist; {root.name} holds {there}", base, f"Set data.{setting}=<sub-folder>.")
    folders = split_folders(base, setting, names=split_settings.names)
    loose = volume_files(base)
    if folders and loose:
        what = f"holds {len(loose)} volumes such as {loose[0].name} beside the folders of splits"
        raise DataProblem(what, base, "Move them into the folders.")
    return folders or {None: base}


def _no_volumes(folder: Path) -> DataProblem:
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    return DataProblem(f"holds no volume ({' '.join(EXTENSIONS)}); it holds {there}", folder, "Put the volumes there.")
