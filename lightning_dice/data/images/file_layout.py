"""Which files of a folder belong together, and to which split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.file_names import EXTENSIONS, IMAGE_SUFFIXES, MASK_SUFFIXES, stem, strip
from lightning_dice.data.images.file_patterns import is_file, names_files, walk
from lightning_dice.data.images.mask_format import MaskFile
from lightning_dice.data.interfaces import Split
from lightning_dice.data.splits import FOLDERS, complete_splits, split_words


@dataclass(frozen=True)
class Pair:
    """An image with its masks: one file of ids, or one for each class; of several raters, those of each in turn.

    Attributes:
        case: the image's name, unique in its split.
        image: the image file.
        masks: the mask files.
    """

    case: str
    image: Path
    masks: tuple[MaskFile, ...]


@dataclass
class Layout:
    """What a folder holds.

    Attributes:
        pairs: of each split that exists.
        planes: the classes that have a mask file each, in the order of a pair's masks; empty for masks of ids.
        raters: who made the masks, in the order of a pair's masks; empty where there is one mask of each.
        problems: what does not fit together.
        notes: what is as it should be, and yet worth telling.
    """

    pairs: dict[Split, list[Pair]] = field(default_factory=dict)
    planes: tuple[str, ...] = ()
    raters: tuple[str, ...] = ()
    problems: list[DataProblem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Named(NamedTuple):
    """A file, and the name by which images and masks find each other."""

    name: str
    path: Path


class _Slot(NamedTuple):
    """The mask files of one rater and one class, of which each image has one.

    `exact`: they bear the image's name alone; otherwise customary suffixes are passed over.
    """

    where: str
    rater: str | None
    plane: str | None
    files: list[Named]
    exact: bool


def scan(
    root: Path,
    images: str,
    masks: str,
    planes: Sequence[str],
    fractions: Sequence[float],
    seed: int,
    *,
    background: str | None = None,
    raters: Sequence[str] = (),
    split_files: str | None = None,
    splits: Mapping[Split, str | None] | None = None,
    extensions: Sequence[str] = EXTENSIONS,
) -> Layout:
    """List a folder's cases.

    Args:
        root: the folder.
        images: where under `root` the images are: a folder, in which `{split}` stands for the split's, or a pattern of
            files with `{case}` in it, see `walk`.
        masks: the same for the masks; `{class}` and `{rater}` stand for one of these.
        planes: names of classes that may have a mask file each, in folders of their names or by `{class}`; empty where
            there can be none.
        fractions: shares of train, val and test, where folders or lists do not make the splits.
        seed: for the draw of these shares.
        background: the one of `planes` that may do without files.
        raters: who made masks, one of each image: in folders of their names or by `{rater}`.
        split_files: text files below `root` that name the cases of each `{split}`.
        splits: what `{split}` stands for, for each split that there is; `None`: the customary words.
        extensions: of images and masks, in lower case.
    """
    layout = Layout(raters=tuple(raters))
    if (absent := no_folder(root)) is not None:
        layout.problems.append(absent)
        return layout
    words = split_words(splits)
    try:
        found = _find_images(root, images, words, extensions)
        if split_files is not None:
            found = _listed(root, split_files, found, words, layout)
        for wanted in words if splits is not None else ():
            if wanted not in found:
                what = f"there is nothing for the split {wanted}, which data.splits calls {words[wanted][0]!r}"
                layout.problems.append(
                    DataProblem(what, root / (split_files or images), "Set data.splits to what there is.")
                )
        places = _Masks(root, masks, tuple(planes), background, tuple(raters), words, extensions)
    except DataProblem as problem:
        layout.problems.append(problem)
        return layout
    used: set[Path] = set()
    offered: dict[Path, None] = {}  # a set that keeps its order
    parts: dict[Split | None, list[Pair]] = {}
    for split, (folder, files) in found.items():
        try:
            slots = places.slots(split, folder)
        except DataProblem as problem:
            layout.problems.append(problem)
            continue
        if slots is None:
            what = f"has no folder of masks beside it; masks found for: {', '.join(places.splits)}"
            place = masks.replace("{split}", str(split)) if "{split}" in masks else f"{masks}/{split}"
            layout.problems.append(DataProblem(what, folder, f"Add {place}, or remove the images."))
            continue
        each = {rater: [slot.plane for slot in slots if slot.rater == rater] for rater in raters}
        if any(planes_of != each[raters[0]] for planes_of in each.values()):
            what = "; ".join(f"{rater}: {', '.join(map(str, names)) or 'none'}" for rater, names in each.items())
            layout.problems.append(
                DataProblem(f"raters have masks of different classes: {what}", folder, "Add the others.")
            )
            continue
        masks_here = {file.path for slot in slots for file in slot.files}  # which may lie, and fit, among the images
        pairs, candidates = _pair([file for file in files if file.path not in masks_here], folder, slots, layout)
        layout.planes = layout.planes or tuple(dict.fromkeys(slot.plane for slot in slots if slot.plane is not None))
        used.update(mask for pair in pairs for mask in pair.masks if isinstance(mask, Path))
        offered.update(dict.fromkeys(candidates))
        parts[split] = pairs
    if split_files is None:
        orphans = [mask for mask in offered if mask not in used]
        layout.problems += [DataProblem("has no image", mask, "Add the image, or remove the mask.") for mask in orphans]
    layout.pairs = complete_splits(parts, fractions, seed, layout.problems, root / images)
    return layout


def no_folder(root: Path) -> DataProblem | None:
    """What is wrong with a root that is no folder."""
    if root.is_dir():
        return None
    what = "is a file" if root.exists() else "does not exist"
    return DataProblem(f"{what}, a folder is required", root, "Set data.root=/path/to/folder.")


def image_files(folder: Path, extensions: Sequence[str] = EXTENSIONS) -> list[Path]:
    """The image files right in a folder, sorted; hidden files and others are passed over."""
    files = (path for path in folder.iterdir() if path.name.lower().endswith(tuple(extensions)))
    return sorted(path for path in files if not path.name.startswith(".") and is_file(path))


def match(
    images: Sequence[Named], masks: Sequence[Named], exact: bool = False
) -> tuple[dict[Path, Path], list[DataProblem], set[Path]]:
    """Find each image's mask by its name, with and without the customary suffixes.

    Args:
        images: the images.
        masks: the masks.
        exact: the masks' names are the images' already.

    Returns:
        The mask of each image that has exactly one; what is ambiguous; the files that are part of an ambiguity.
    """
    problems: list[DataProblem] = []
    blamed: set[Path] = set()

    def refuse(what: str, several: Sequence[Path], where: Path, others: Sequence[Path], remedy: str) -> None:
        problems.append(DataProblem(f"{what}: {', '.join(path.name for path in several)}", where, remedy))
        blamed.update(several, others, [where])

    by_name: dict[str, list[Path]] = defaultdict(list)
    for name, mask in masks:
        for key in dict.fromkeys((name, name if exact else strip(name, MASK_SUFFIXES))):
            by_name[key].append(mask)
    twins: dict[str, list[Path]] = defaultdict(list)
    for name, image in images:
        twins[name].append(image)
    claims: dict[Path, list[Path]] = defaultdict(list)
    for name, same in twins.items():
        candidates = by_name.get(name) or by_name.get(strip(name, IMAGE_SUFFIXES), [])
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


def _pair(
    images: Sequence[Named], folder: Path, slots: Sequence[_Slot], layout: Layout
) -> tuple[list[Pair], list[Path]]:
    """The pairs of one split, and all mask files that could have been part of one; problems go to `layout`."""
    if not images:
        layout.problems.append(_empty(folder, "image"))
    for slot in slots:
        if not slot.files:
            layout.problems.append(_empty(Path(slot.where), "mask"))
    if not images or not all(slot.files for slot in slots):
        return [], []
    matched = [match(images, slot.files, slot.exact) for slot in slots]
    ambiguous = {str(problem): problem for _, problems, _ in matched for problem in problems}  # once for all classes
    layout.problems += ambiguous.values()
    blamed: set[Path] = set().union(*(part for _, _, part in matched))
    pairs = []
    for name, image in images:
        lacking = [slot.where for slot, (found, _, _) in zip(slots, matched, strict=True) if image not in found]
        if not lacking:
            pairs.append(Pair(name, image, tuple(found[image] for found, _, _ in matched)))
        elif image not in blamed:
            what = f"has no mask in {', '.join(lacking)}"
            layout.problems.append(DataProblem(what, image, "Add the mask, or remove the image."))
    # A mask whose image lacks one of another class has its image all the same.
    blamed |= {mask for found, _, _ in matched for mask in found.values()}
    return pairs, [mask.path for slot in slots for mask in slot.files if mask.path not in blamed]


class _Images(NamedTuple):
    """The images of one split, and the place that messages name."""

    folder: Path
    files: list[Named]


def _find_images(
    root: Path, pattern: str, words: Mapping[Split, Sequence[str]], extensions: Sequence[str]
) -> dict[Split | None, _Images]:
    if names_files(pattern):
        parts: dict[Split | None, list[Named]] = defaultdict(list)
        for bound, path in walk(root, pattern, {"split": list(chain(*words.values()))}, extensions):
            parts[_split_of(bound, words)].append(Named(bound["case"], path))
        if not parts:
            remedy = "Set data.images; data.splits, if the splits have other names than train, val and test."
            raise DataProblem(f"no file has such a name; {contents(root)}", root / pattern, remedy)
        return {split: _Images(root / pattern, parts[split]) for split in (None, *words) if split in parts}
    folders = _find(root, pattern, "images", words, extensions)
    return {
        split: _Images(place, _named(image_files(place, extensions), extensions)) for split, place in folders.items()
    }


def _listed(
    root: Path,
    pattern: str,
    found: Mapping[Split | None, _Images],
    words: Mapping[Split, Sequence[str]],
    layout: Layout,
) -> dict[Split | None, _Images]:
    """The images that lists name, each line with a name, perhaps with a path, a suffix, and further columns."""
    files = {file.name: file for images in found.values() for file in images.files}
    folder = next(iter(found.values())).folder
    parts: dict[Split | None, _Images] = {}
    homes: dict[str, Split] = {}
    for split, names in words.items():
        lists = [path for path in (root / pattern.replace("{split}", name) for name in names) if path.is_file()]
        if not lists:
            continue
        if len(lists) > 1:
            several = ", ".join(path.name for path in lists)
            raise DataProblem(f"cases of the split {split} are in several lists: {several}", root, "Keep one of them.")
        chosen: list[Named] = []
        for line in lists[0].read_text(encoding="utf-8-sig", errors="replace").splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            texts = [Path(text) for text in (line.strip(), line.split()[0])]
            options = [name for text in texts for name in (str(text), text.name, stem(text))]
            name = next((option for option in options if option in files), None)
            if name is None:
                what = f"names {line.strip()!r}, of which there is no image"
                layout.problems.append(DataProblem(what, lists[0], f"Add the image to {folder}, or remove the line."))
            elif name in homes:
                twice = "twice" if homes[name] == split else f"which the list of {homes[name]} names too"
                layout.problems.append(DataProblem(f"names {name!r}, {twice}", lists[0], "Remove one of the lines."))
            else:
                homes[name] = split
                chosen.append(files[name])
        parts[split] = _Images(folder, sorted(chosen))
    if not parts:
        wanted = ", ".join(pattern.replace("{split}", names[0]) for names in words.values())
        raise DataProblem(
            f"there is no list of cases; looked for {wanted}", root, "Set data.split_files, or data.splits."
        )
    return parts


class _Masks:
    """Where the masks of each split are, in folders or by a pattern of files.

    Attributes:
        splits: for which there are masks.
    """

    def __init__(
        self,
        root: Path,
        pattern: str,
        planes: tuple[str, ...],
        background: str | None,
        raters: tuple[str, ...],
        words: Mapping[Split, Sequence[str]],
        extensions: Sequence[str],
    ) -> None:
        self.pattern, self.planes, self.background, self.raters = pattern, planes, background, raters
        self.words, self.extensions, self.root = words, extensions, root
        self._files: list[tuple[dict[str, str], Path]] = []
        self._folders: dict[tuple[str | None, str | None], dict[Split | None, Path]] = {}
        # Of which raters and classes the pattern itself speaks.
        self._spoken: list[tuple[str | None, str | None]] = list(
            product(raters if "{rater}" in pattern else (None,), planes if "{class}" in pattern else (None,))
        )
        if names_files(pattern):
            names = {"split": list(chain(*words.values())), "class": planes, "rater": raters}
            self._files = list(walk(root, pattern, names, extensions))
            if not self._files:
                raise DataProblem(f"no file has such a name; {contents(root)}", root / pattern, "Set data.masks.")
            self.splits = sorted({str(_split_of(bound, words)) for bound, _ in self._files})
            return
        for rater, plane in self._spoken:
            place = _filled(pattern, rater=rater, plane=plane)
            try:
                self._folders[rater, plane] = _find(root, place, "masks", words, extensions)
            except DataProblem:
                if plane is None or plane != background:
                    raise
        self.splits = list(dict.fromkeys(str(split) for part in self._folders.values() for split in part))

    def slots(self, split: Split | None, images: Path) -> list[_Slot] | None:
        """The masks of a split, of each rater and class; `None` where there is no place for them.

        Raises:
            DataError: some classes or raters have a folder, and others none.
        """
        found = self._slots_of_files(split) if self._files else self._slots_of_folders(split, images)
        if found is None:
            return None
        spared = self.background
        return [slot for slot in found if slot.files or slot.plane is None or slot.plane != spared]

    def _slots_of_files(self, split: Split | None) -> list[_Slot] | None:
        mine = [(bound, path) for bound, path in self._files if _split_of(bound, self.words) in (split, None)]
        if not mine:
            return None
        slots = []
        for rater, plane in self._spoken:
            here = [(b, path) for b, path in mine if b.get("rater") == rater and b.get("class") == plane]
            word = next((b["split"] for b, _ in mine if "split" in b), "")
            where = str(self.root / _filled(self.pattern, rater=rater, plane=plane, split=word))
            slots.append(_Slot(where, rater, plane, [Named(b["case"], path) for b, path in here], exact=True))
        return slots

    def _slots_of_folders(self, split: Split | None, images: Path) -> list[_Slot] | None:
        slots = []
        for (rater, plane), folders in self._folders.items():
            base = folders.get(split, folders.get(None))
            if base is None:
                return None
            for folder, who in self._inner(base, self.raters if rater is None else (), rater):
                names = self.planes if plane is None else ()
                places: list[tuple[Path, str | None]] = [*self._planes_in(folder, names)]
                for place, what in places or [(folder, plane)]:
                    beside = place.resolve() == images.resolve()
                    files = _named(image_files(images if beside else place, self.extensions), self.extensions)
                    if beside:  # The suffix tells masks from images.
                        files = [file for file in files if strip(file.name, MASK_SUFFIXES) != file.name]
                    slots.append(_Slot(str(place), who, what, files, exact=False))
        return slots

    def _inner(self, base: Path, raters: tuple[str, ...], rater: str | None) -> list[tuple[Path, str | None]]:
        missing = [name for name in raters if not (base / name).is_dir()]
        if missing:
            what = f"has no folder for the rater{'s' * (len(missing) > 1)} {', '.join(missing)}; {contents(base)}"
            raise DataProblem(what, base, "Set data.raters to the folders that there are.")
        return [(base / name, name) for name in raters] or [(base, rater)]

    def _planes_in(self, folder: Path, planes: tuple[str, ...]) -> list[tuple[Path, str]]:
        labelled = [name for name in planes if (folder / name).is_dir()]
        missing = [name for name in planes if name not in labelled and name != self.background]
        if labelled and missing:
            what = f"has folders for the classes {', '.join(labelled)}, but none for {', '.join(missing)}"
            raise DataProblem(what, folder, "Add them, or leave the classes out of data.classes.")
        return [(folder / name, name) for name in labelled]


def _named(paths: Iterable[Path], extensions: Sequence[str]) -> list[Named]:
    return [Named(stem(path, extensions), path) for path in paths]


def _filled(pattern: str, *, rater: str | None, plane: str | None, split: str = "") -> str:
    for token, value in (("{rater}", rater), ("{class}", plane), ("{split}", split)):
        pattern = pattern.replace(token, value) if value else pattern
    return pattern


def _split_of(bound: Mapping[str, str], words: Mapping[Split, Sequence[str]]) -> Split | None:
    return next((split for split, names in words.items() if bound.get("split") in names), None)


def _find(
    root: Path, pattern: str, setting: str, words: Mapping[Split, Sequence[str]], extensions: Sequence[str]
) -> dict[Split | None, Path]:
    """The folder of each split, or of `None` where there are no split folders."""
    base = root / pattern
    if "{split}" in pattern:
        folders = _split_folders(root, pattern, setting, words)
        if not folders:
            raise _missing(root, base, setting)
        return folders
    if not base.is_dir():
        raise _missing(root, base, setting)
    folders = _split_folders(base, "{split}", setting, words)
    loose = image_files(base, extensions)
    if folders and loose:
        names = ", ".join(sorted(path.name for path in folders.values()))
        what = f"holds {len(loose)} images such as {loose[0].name} beside the folders {names}"
        raise DataProblem(what, base, "Move them into the folders, or the folders elsewhere.")
    return folders or {None: base}


def _split_folders(
    base: Path, pattern: str, setting: str, words: Mapping[Split, Sequence[str]]
) -> dict[Split | None, Path]:
    folders: dict[Split | None, Path] = {}
    for split, names in words.items():
        found = [base / pattern.replace("{split}", name) for name in names]
        found = [path for path in found if path.is_dir()]
        if len(found) > 1:
            several = ", ".join(path.name for path in found)
            raise DataProblem(f"{setting} of the split {split} are in several folders: {several}", base, "Merge them.")
        folders.update(dict.fromkeys([split], found[0]) if found else {})
    return folders


def _missing(root: Path, wanted: Path, setting: str) -> DataProblem:
    remedy = f"Set data.{setting}=<sub-folder of data.root>."
    for name in ("images", "masks") if (root / "train").is_dir() else ():
        if (root / "train" / name).is_dir():
            remedy = """Set 'data.images="{split}/images"' 'data.masks="{split}/masks"'."""
    return DataProblem(f"there is no such folder; {contents(root)}", wanted, remedy)


def _empty(place: Path, kind: str) -> DataProblem:
    if not place.is_dir():
        return DataProblem(f"no {kind} has such a name", place, f"Add the {kind}s, or set data.{kind}s.")
    inner = sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    remedy = f"Put the {kind}s there."
    if kind == "mask" and inner:
        above = f"{place.parent.name}/{{split}}" if place.name in sum(FOLDERS.values(), ()) else place.name
        remedy = f"""Choose one of its folders: 'data.masks="{above}/{inner[0]}"'."""
        if len(inner) > 1:
            remedy += f" If each is a rater's: 'data.raters=[{','.join(inner)}]'."
    return DataProblem(f"holds no {kind} ({' '.join(EXTENSIONS)}); {contents(place)}", place, remedy)


def contents(folder: Path) -> str:
    """What a folder holds, in words."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{folder.name} holds {shown}" if names else f"{folder.name} is empty"
