"""Find a folder's images, the masks of each image, and the splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.file_names import IMAGE_SUFFIXES, MASK_SUFFIXES, file_stem, strip_suffix
from lightning_dice.data.images.file_patterns import find_files, is_file_pattern
from lightning_dice.data.images.image_folders import (
    NamedFile,
    SplitNames,
    describe_contents,
    find_folders,
    image_files,
    no_files_problem,
    root_problem,
    split_of,
)
from lightning_dice.data.images.mask_finder import MaskFinder, MaskSet
from lightning_dice.data.images.mask_format import MaskFile
from lightning_dice.data.interfaces import Split
from lightning_dice.data.splits import SplitSettings, complete_splits


@dataclass(frozen=True)
class Pair:
    """An image with its masks.

    Attributes:
        case: the image's name, unique in its split.
        image: the image file.
        masks: one file of ids, or one for each class; with several raters, the files of each in turn.
    """

    case: str
    image: Path
    masks: tuple[MaskFile, ...]


@dataclass
class Layout:
    """The contents of a folder.

    Attributes:
        pairs: the cases of each split that exists.
        planes: the classes that have a mask file each, in the order of a pair's masks; empty for masks of ids.
        raters: who made the masks, in the order of a pair's masks; empty if each image has one mask.
        problems: files that do not match, and the like.
        notes: remarks for the report.
    """

    pairs: dict[Split, list[Pair]] = field(default_factory=dict)
    planes: tuple[str, ...] = ()
    raters: tuple[str, ...] = ()
    problems: list[DataProblem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_pairs(
    root: Path,
    images: str,
    masks: str,
    split_settings: SplitSettings,
    *,
    planes: Sequence[str] = (),
    background: str | None = None,
    raters: Sequence[str] = (),
) -> Layout:
    """Find a folder's images and their masks.

    Args:
        root: the folder.
        images: where the images are below `root`: a folder, in which `{split}` stands for the split's, or a pattern
            with `{case}` in it, see `find_files`.
        masks: the same for the masks; `{class}` and `{rater}` stand for a class and a rater.
        split_settings: the names of the splits, or how they are drawn.
        planes: classes that may have a mask file each, in folders of their names or by `{class}`.
        background: the one of `planes` that needs no files.
        raters: who made masks: in folders of their names, or by `{rater}`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("images/train/a.png", "masks/train/a_gt.png", "images/val/b.png", "masks/val/b_gt.png"):
    ...         (Path(root) / name).parent.mkdir(parents=True, exist_ok=True)
    ...         (Path(root) / name).touch()
    ...     layout = find_pairs(Path(root), "images", "masks", SplitSettings())
    >>> {split: [pair.case for pair in pairs] for split, pairs in layout.pairs.items()}, layout.problems
    ({'train': ['a'], 'val': ['b']}, [])
    """
    layout = Layout(raters=tuple(raters))
    if (absent := root_problem(root)) is not None:
        layout.problems.append(absent)
        return layout
    names, split_files = split_settings.names, split_settings.split_files
    try:
        found = _find_images(root, images, names)
        if split_files is not None:
            found = _select_listed(root, split_files, found, names, layout)
        for wanted in names if split_settings.splits is not None else ():
            if wanted not in found:
                what = f"there is nothing for the split {wanted}, which data.splits calls {names[wanted][0]!r}"
                where = root / (split_files or images)
                layout.problems.append(DataProblem(what, where, "Correct data.splits."))
        finder = MaskFinder(root, masks, tuple(planes), background, tuple(raters), names)
    except DataProblem as problem:
        layout.problems.append(problem)
        return layout
    parts: dict[Split | None, list[Pair]] = {}
    used: set[Path] = set()
    candidates: dict[Path, None] = {}  # a set that keeps its order
    for split, (folder, files) in found.items():
        try:
            mask_sets = finder.mask_sets(split, folder)
            _check_raters_agree(mask_sets, raters, folder)
        except DataProblem as problem:
            layout.problems.append(problem)
            continue
        masks_here = {file.path for mask_set in mask_sets for file in mask_set.files}  # may be among the images
        own = [file for file in files if file.path not in masks_here]
        parts[split], unambiguous = _pair(own, folder, mask_sets, layout)
        present = dict.fromkeys(mask_set.plane for mask_set in mask_sets if mask_set.plane is not None)
        layout.planes = layout.planes or tuple(present)
        used.update(mask for pair in parts[split] for mask in pair.masks if isinstance(mask, Path))
        candidates.update(dict.fromkeys(unambiguous))
    if split_files is None:
        orphans = [mask for mask in candidates if mask not in used]
        layout.problems += [DataProblem("has no image", mask, "Add the image, or remove the mask.") for mask in orphans]
    layout.pairs = complete_splits(parts, split_settings, layout.problems, root / images)
    return layout


def match_masks(
    images: Sequence[NamedFile], masks: Sequence[NamedFile], exact: bool = False
) -> tuple[dict[Path, Path], list[DataProblem], set[Path]]:
    """Match images and masks by name, with and without the customary suffixes.

    Args:
        images: the images.
        masks: the masks.
        exact: masks have no suffixes.

    Returns:
        The mask of each image that has exactly one; ambiguities; the files that are part of one.

    >>> image, mask = NamedFile("a", Path("images/a.png")), NamedFile("a_mask", Path("masks/a_mask.png"))
    >>> match_masks([image], [mask])[0] == {image.path: mask.path}
    True
    """
    problems: list[DataProblem] = []
    ambiguous: set[Path] = set()

    def refuse(what: str, several: Sequence[Path], where: Path, others: Sequence[Path], remedy: str) -> None:
        problems.append(DataProblem(f"{what}: {', '.join(path.name for path in several)}", where, remedy))
        ambiguous.update(several, others, [where])

    masks_by_name: dict[str, list[Path]] = defaultdict(list)
    for name, mask in masks:
        for key in dict.fromkeys((name, name if exact else strip_suffix(name, MASK_SUFFIXES))):
            masks_by_name[key].append(mask)
    images_by_name: dict[str, list[Path]] = defaultdict(list)
    for name, image in images:
        images_by_name[name].append(image)
    claims: dict[Path, list[Path]] = defaultdict(list)
    for name, same in images_by_name.items():
        candidates = masks_by_name.get(name) or masks_by_name.get(strip_suffix(name, IMAGE_SUFFIXES), [])
        if len(same) > 1:
            refuse("several images have one stem", same, same[0], candidates, "Keep one of them.")
        elif len(candidates) > 1:
            refuse("several masks fit it", candidates, same[0], [], "Keep one of them.")
        elif candidates:
            claims[candidates[0]].append(same[0])
    found: dict[Path, Path] = {}
    for mask, claimants in claims.items():
        if len(claimants) > 1:
            refuse("fits several images", claimants, mask, [], "Give each image a mask of its own.")
        else:
            found[claimants[0]] = mask
    return found, problems, ambiguous


def _pair(
    images: Sequence[NamedFile], folder: Path, mask_sets: Sequence[MaskSet], layout: Layout
) -> tuple[list[Pair], list[Path]]:
    """Return the pairs of one split, and its mask files except ambiguous ones; add problems to `layout`."""
    if not images:
        layout.problems.append(no_files_problem(folder, "image"))
    layout.problems += [no_files_problem(Path(masks.where), "mask") for masks in mask_sets if not masks.files]
    if not images or not all(masks.files for masks in mask_sets):
        return [], []
    matched = [match_masks(images, masks.files, masks.exact) for masks in mask_sets]
    problems = {str(problem): problem for _, found, _ in matched for problem in found}  # once for all classes
    layout.problems += problems.values()
    settled: set[Path] = set().union(*(ambiguous for _, _, ambiguous in matched))
    pairs = []
    for name, image in images:
        lacking = [masks.where for masks, (found, _, _) in zip(mask_sets, matched, strict=True) if image not in found]
        if not lacking:
            pairs.append(Pair(name, image, tuple(found[image] for found, _, _ in matched)))
        elif image not in settled:
            what = f"has no mask in {', '.join(lacking)}"
            layout.problems.append(DataProblem(what, image, "Add the mask, or remove the image."))
    # A mask is no orphan if its image lacks only the mask of another class.
    settled |= {mask for found, _, _ in matched for mask in found.values()}
    return pairs, [mask.path for masks in mask_sets for mask in masks.files if mask.path not in settled]


def _check_raters_agree(mask_sets: Sequence[MaskSet], raters: Sequence[str], folder: Path) -> None:
    classes = {rater: [masks.plane for masks in mask_sets if masks.rater == rater] for rater in raters}
    if any(names != classes[raters[0]] for names in classes.values()):
        what = "; ".join(f"{rater}: {', '.join(map(str, names)) or 'none'}" for rater, names in classes.items())
        raise DataProblem(f"raters have masks of different classes: {what}", folder, "Add the others.")


class _ImageSet(NamedTuple):
    """The images of one split, and where they are, for messages."""

    folder: Path
    files: list[NamedFile]


def _find_images(root: Path, pattern: str, names: SplitNames) -> dict[Split | None, _ImageSet]:
    if not is_file_pattern(pattern):
        folders = find_folders(root, pattern, "images", names)
        return {split: _ImageSet(folder, image_files(folder)) for split, folder in folders.items()}
    parts: dict[Split | None, list[NamedFile]] = defaultdict(list)
    for matched, path in find_files(root, pattern, {"split": list(chain(*names.values()))}):
        parts[split_of(matched, names)].append(NamedFile(matched["case"], path))
    if not parts:
        remedy = "Set data.images; data.splits, if the splits have other names than train, val and test."
        raise DataProblem(f"no file matches; {describe_contents(root)}", root / pattern, remedy)
    return {split: _ImageSet(root / pattern, parts[split]) for split in (None, *names) if split in parts}


def _select_listed(
    root: Path, pattern: str, found: Mapping[Split | None, _ImageSet], names: SplitNames, layout: Layout
) -> dict[Split | None, _ImageSet]:
    """Select the images that split files list: a name on each line, perhaps with path, suffix and more columns."""
    files = {file.name: file for images in found.values() for file in images.files}
    folder = next(iter(found.values())).folder
    parts: dict[Split | None, _ImageSet] = {}
    split_of_case: dict[str, Split] = {}
    for split, words in names.items():
        lists = [path for path in (root / pattern.replace("{split}", word) for word in words) if path.is_file()]
        if not lists:
            continue
        if len(lists) > 1:
            several = ", ".join(path.name for path in lists)
            raise DataProblem(f"cases of the split {split} are in several lists: {several}", root, "Keep one of them.")
        selected: list[NamedFile] = []
        for line in lists[0].read_text(encoding="utf-8-sig", errors="replace").splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            entries = [Path(text) for text in (line.strip(), line.split()[0])]
            options = [name for entry in entries for name in (str(entry), entry.name, file_stem(entry))]
            name = next((option for option in options if option in files), None)
            if name is None:
                what = f"names {line.strip()!r}, of which there is no image"
                layout.problems.append(DataProblem(what, lists[0], f"Add the image to {folder}, or remove the line."))
            elif name in split_of_case:
                other = split_of_case[name]
                twice = "twice" if other == split else f"which the list of {other} names too"
                layout.problems.append(DataProblem(f"names {name!r}, {twice}", lists[0], "Remove one of the lines."))
            else:
                split_of_case[name] = split
                selected.append(files[name])
        parts[split] = _ImageSet(folder, sorted(selected))
    if not parts:
        wanted = ", ".join(pattern.replace("{split}", words[0]) for words in names.values())
        raise DataProblem(
            f"there is no list of cases; looked for {wanted}", root, "Set data.split_files, or data.splits."
        )
    return parts
