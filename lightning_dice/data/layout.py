"""Which files of a folder belong together, and to which split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import get_args

from lightning_dice.data.readers import EXTENSIONS, Problem
from lightning_dice.data.source import Split

SPLITS: tuple[Split, ...] = get_args(Split)
FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
MASK_SUFFIXES = (
    *("_mask", "-mask", "_masks", "_seg", "_segmentation", "_label", "_labels"),
    *("_gt", "_groundtruth", "_manual1", "_annotation"),
)
IMAGE_SUFFIXES = ("_image", "_img", "_0000")


@dataclass(frozen=True)
class Pair:
    """An image with its masks: one file of ids, or one file for each class.

    Attributes:
        case: the image's stem.
        image: the image file.
        masks: the mask files.
    """

    case: str
    image: Path
    masks: tuple[Path, ...]


@dataclass
class Layout:
    """What a folder holds.

    Attributes:
        pairs: of each split that exists.
        planes: masks are one file for each class.
        problems: what does not fit together.
    """

    pairs: dict[Split, list[Pair]] = field(default_factory=dict)
    planes: bool = False
    problems: list[Problem] = field(default_factory=list)


def scan(root: Path, images: str, masks: str, planes: Sequence[str], fractions: Sequence[float], seed: int) -> Layout:
    """List a folder's cases.

    Args:
        root: the folder.
        images: where under `root` the images are; `{split}` stands for the split's folder.
        masks: the same for the masks.
        planes: names of sub-folders that hold one mask file for each class; empty where there can be none.
        fractions: shares of train, val and test, where folders do not make the splits.
        seed: for the draw of these shares.
    """
    layout = Layout()
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        layout.problems.append(Problem(f"{what}, a folder is required", root, "Set data.root=/path/to/folder."))
        return layout
    try:
        image_folders = _find(root, images, "images")
        mask_folders = _find(root, masks, "masks")
    except Problem as problem:
        layout.problems.append(problem)
        return layout
    used: set[Path] = set()
    offered: dict[Path, None] = {}  # a set that keeps its order
    undivided: list[Pair] = []
    for split, folder in image_folders.items():
        mask_folder = mask_folders.get(split, mask_folders.get(None))
        if mask_folder is None:
            what = f"has no folder of masks beside it; masks found for: {', '.join(map(str, mask_folders))}"
            layout.problems.append(Problem(what, folder, f"Add {masks}/{split}, or remove the images."))
            continue
        pairs, candidates = _pair_folders(folder, mask_folder, planes, layout)
        used.update(mask for pair in pairs for mask in pair.masks)
        offered.update(dict.fromkeys(candidates))
        if split is None:
            undivided = pairs
        else:
            layout.pairs[split] = pairs
    orphans = [mask for mask in offered if mask not in used]
    layout.problems += [Problem("has no image", mask, "Add the image, or remove the mask.") for mask in orphans]
    if None in image_folders:
        layout.pairs = divide(undivided, fractions, seed)
    elif "train" not in layout.pairs and not layout.problems:
        found = ", ".join(str(split) for split in image_folders)
        layout.problems.append(Problem(f"has no split to train on, only {found}", root / images, "Add a folder train."))
    elif "val" not in layout.pairs and not layout.problems:
        rest, share = fractions[0] + fractions[1], fractions[1]
        parts = divide(layout.pairs["train"], (1 - share / rest, share / rest, 0.0), seed)
        layout.pairs = {**parts, **{split: layout.pairs[split] for split in ("test",) if split in layout.pairs}}
    return layout


def divide(pairs: Sequence[Pair], fractions: Sequence[float], seed: int) -> dict[Split, list[Pair]]:
    """Draw splits.

    A case's rank hangs on its name and the seed alone, so that neither the file system nor Python's version has a say,
    and a case that is added later moves few others. Two cases or more give at least one for validation, unless its
    fraction is 0.

    >>> pairs = [Pair(name, Path(name), ()) for name in "abcdefghij"]
    >>> {split: [pair.case for pair in part] for split, part in divide(pairs, (0.7, 0.2, 0.1), seed=0).items()}
    {'train': ['a', 'c', 'd', 'e', 'g', 'h', 'j'], 'val': ['b', 'f'], 'test': ['i']}
    """
    ranked = sorted(pairs, key=lambda pair: (blake2b(f"{seed}/{pair.case}".encode()).digest(), pair.case))
    val, test = (int(len(ranked) * fraction + 0.5) for fraction in fractions[1:])
    if fractions[1] > 0 and len(ranked) >= 2:
        val = max(val, 1)
    test = min(test, max(len(ranked) - 1 - val, 0))
    parts: dict[Split, list[Pair]] = {
        "train": ranked[val + test :],
        "val": ranked[:val],
        "test": ranked[val : val + test],
    }
    return {split: sorted(part, key=lambda pair: pair.case) for split, part in parts.items() if part}


def strip(stem: str, suffixes: Iterable[str]) -> str:
    """A stem without a customary suffix, in any case.

    >>> strip("a_Segmentation", MASK_SUFFIXES), strip("frame_0001", IMAGE_SUFFIXES)
    ('a', 'frame_0001')
    """
    for suffix in suffixes:
        if stem.lower().endswith(suffix) and len(stem) > len(suffix):
            return stem[: -len(suffix)]
    return stem


def image_files(folder: Path) -> list[Path]:
    """The image files right in a folder, sorted; hidden files and others are passed over."""
    files = (path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."))
    return sorted(path for path in files if path.is_file())


def match(images: Sequence[Path], masks: Sequence[Path]) -> tuple[dict[Path, Path], list[Problem], set[Path]]:
    """Find each image's mask by its stem, with and without the customary suffixes.

    Returns:
        The mask of each image that has exactly one; what is ambiguous; the files that are part of an ambiguity.
    """
    problems: list[Problem] = []
    blamed: set[Path] = set()

    def refuse(what: str, several: Sequence[Path], where: Path, others: Sequence[Path], remedy: str) -> None:
        problems.append(Problem(f"{what}: {', '.join(path.name for path in several)}", where, remedy))
        blamed.update(several, others, [where])

    by_stem: dict[str, list[Path]] = defaultdict(list)
    for mask in masks:
        for key in dict.fromkeys((mask.stem, strip(mask.stem, MASK_SUFFIXES))):
            by_stem[key].append(mask)
    twins: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        twins[image.stem].append(image)
    claims: dict[Path, list[Path]] = defaultdict(list)
    for stem, same in twins.items():
        candidates = by_stem.get(stem) or by_stem.get(strip(stem, IMAGE_SUFFIXES), [])
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
    return found, problems, blamed


def _pair_folders(folder: Path, masks: Path, planes: Sequence[str], layout: Layout) -> tuple[list[Pair], list[Path]]:
    """The pairs of one split, and all mask files that could have been part of one; problems go to `layout`."""
    images = image_files(folder)
    labelled = [name for name in planes if (masks / name).is_dir()]
    if labelled and len(labelled) < len(planes):
        missing = ", ".join(name for name in planes if name not in labelled)
        what = f"has folders for the classes {', '.join(labelled)}, but none for {missing}"
        layout.problems.append(Problem(what, masks, "Add them, or leave the classes out of data.classes."))
        return [], []
    layout.planes = layout.planes or bool(labelled)
    parts = [masks / name for name in labelled] or [masks]
    files = [image_files(part) for part in parts]
    if folder.resolve() == masks.resolve():  # Images and masks side by side: the suffix tells them apart.
        files = [[path for path in images if strip(path.stem, MASK_SUFFIXES) != path.stem]]
        images = [path for path in images if path not in files[0]]
    for place, listed in [(folder, images), *zip(parts, files, strict=True)]:
        if not listed:
            layout.problems.append(_empty(place, "image" if place == folder else "mask"))
    if not images or not all(files):
        return [], []
    matched = [match(images, listed) for listed in files]
    ambiguous = {str(problem): problem for _, problems, _ in matched for problem in problems}  # once for all classes
    layout.problems += ambiguous.values()
    blamed: set[Path] = set().union(*(part for _, _, part in matched))
    pairs = []
    for image in images:
        lacking = [str(part) for part, (found, _, _) in zip(parts, matched, strict=True) if image not in found]
        if not lacking:
            pairs.append(Pair(image.stem, image, tuple(found[image] for found, _, _ in matched)))
        elif image not in blamed:
            what = f"has no mask in {', '.join(lacking)}"
            layout.problems.append(Problem(what, image, "Add the mask, or remove the image."))
    # A mask whose image lacks one of another class has its image all the same.
    blamed |= {mask for found, _, _ in matched for mask in found.values()}
    return pairs, [mask for listed in files for mask in listed if mask not in blamed]


def _find(root: Path, pattern: str, setting: str) -> dict[Split | None, Path]:
    """The folder of each split, or of `None` where there are no split folders."""
    base = root / pattern
    if "{split}" in pattern:
        folders = _split_folders(root, pattern, setting)
        if not folders:
            raise _missing(root, base, setting)
        return folders
    if not base.is_dir():
        raise _missing(root, base, setting)
    folders = _split_folders(base, "{split}", setting)
    loose = image_files(base)
    if folders and loose:
        names = ", ".join(sorted(path.name for path in folders.values()))
        what = f"holds {len(loose)} images such as {loose[0].name} beside the folders {names}"
        raise Problem(what, base, "Move them into the folders, or the folders elsewhere.")
    return folders or {None: base}


def _split_folders(base: Path, pattern: str, setting: str) -> dict[Split | None, Path]:
    folders: dict[Split | None, Path] = {}
    for split in SPLITS:
        found = [base / pattern.replace("{split}", name) for name in FOLDERS[split]]
        found = [path for path in found if path.is_dir()]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise Problem(f"{setting} of the split {split} are in several folders: {names}", base, "Merge them.")
        folders.update(dict.fromkeys([split], found[0]) if found else {})
    return folders


def _missing(root: Path, wanted: Path, setting: str) -> Problem:
    remedy = f"Set data.{setting}=<sub-folder of data.root>."
    for name in ("images", "masks") if (root / "train").is_dir() else ():
        if (root / "train" / name).is_dir():
            remedy = """Set 'data.images="{split}/images"' 'data.masks="{split}/masks"'."""
    return Problem(f"there is no such folder; {_contents(root)}", wanted, remedy)


def _empty(folder: Path, kind: str) -> Problem:
    inner = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    remedy = f"Put the {kind}s there."
    if kind == "mask" and inner:
        place = f"{folder.parent.name}/{{split}}" if folder.name in sum(FOLDERS.values(), ()) else folder.name
        remedy = f"""Choose one of its folders: 'data.masks="{place}/{inner[0]}"'."""
    return Problem(f"holds no {kind} ({' '.join(EXTENSIONS)}); {_contents(folder)}", folder, remedy)


def _contents(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{folder.name} holds {shown}" if names else f"{folder.name} is empty"
