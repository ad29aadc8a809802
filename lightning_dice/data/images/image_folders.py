"""Look into folders: their image files, their sub-folders for splits, and descriptions of them for messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.file_names import EXTENSIONS, file_stem
from lightning_dice.data.images.file_patterns import is_file_or_broken_link
from lightning_dice.data.interfaces import Split
from lightning_dice.data.splits import FOLDERS, split_folders
from lightning_dice.text import join_some

SplitNames = Mapping[Split, Sequence[str]]


class NamedFile(NamedTuple):
    """A file, and the name by which images and masks are matched."""

    name: str
    path: Path


def root_problem(root: Path) -> DataProblem | None:
    """Return what is wrong with a root that is not a folder."""
    if root.is_dir():
        return None
    what = "is a file" if root.exists() else "does not exist"
    return DataProblem(f"{what}, but a folder is required", root, "Set data.root=/path/to/folder.")


def image_files(folder: Path) -> list[NamedFile]:
    """Return the image files of a folder, sorted, without hidden files and those of sub-folders.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("b.PNG", "a.tif", ".hidden.png", "notes.txt"):
    ...         (Path(folder) / name).touch()
    ...     [file.name for file in image_files(Path(folder))]
    ['a', 'b']
    """
    files = (path for path in folder.iterdir() if path.name.lower().endswith(EXTENSIONS))
    paths = sorted(path for path in files if not path.name.startswith(".") and is_file_or_broken_link(path))
    return [NamedFile(file_stem(path), path) for path in paths]


def describe_contents(folder: Path) -> str:
    """Describe the contents of a folder for a message.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     (Path(root) / "data" / "images").mkdir(parents=True)
    ...     describe_contents(Path(root) / "data"), describe_contents(Path(root) / "data" / "images")
    ('data holds images/', 'images is empty')
    """
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    return f"{folder.name} holds {join_some(names)}" if names else f"{folder.name} is empty"


def split_of(matched: Mapping[str, str], names: SplitNames) -> Split | None:
    """Return the split of a file whose pattern matched, `None` if the pattern has no `{split}`.

    >>> split_of({"case": "a", "split": "train2017"}, {"train": ("train2017",), "val": ("val2017",)})
    'train'
    """
    return next((split for split, words in names.items() if matched.get("split") in words), None)


def find_folders(root: Path, pattern: str, setting: str, names: SplitNames) -> dict[Split | None, Path]:
    """Return the folder of each split, or one under `None` if there are no split folders.

    Args:
        root: the folder that `pattern` is relative to.
        pattern: path, perhaps with `{split}` in it.
        setting: what the folders hold, `images` or `masks`, for messages.
        names: what `{split}` may stand for, of each split.

    Raises:
        DataError: there is no such folder, or a split has several.
    """
    base = root / pattern
    if "{split}" in pattern:
        folders = split_folders(root, setting, pattern, names)
        if not folders:
            raise _no_such_folder(root, base, setting)
        return folders
    if not base.is_dir():
        raise _no_such_folder(root, base, setting)
    folders = split_folders(base, setting, names=names)
    loose = image_files(base)
    if folders and loose:
        present = ", ".join(sorted(path.name for path in folders.values()))
        what = f"holds {len(loose)} images such as {loose[0].path.name} beside the folders {present}"
        raise DataProblem(what, base, "Move them into the folders, or the folders elsewhere.")
    return folders or {None: base}


def _no_such_folder(root: Path, wanted: Path, setting: str) -> DataProblem:
    remedy = f"Set data.{setting}=<sub-folder of data.root>."
    if any((root / "train" / name).is_dir() for name in ("images", "masks")):
        remedy = """Set 'data.images="{split}/images"' 'data.masks="{split}/masks"'."""
    return DataProblem(f"there is no such folder; {describe_contents(root)}", wanted, remedy)


def no_files_problem(place: Path, kind: str) -> DataProblem:
    """Return the problem of a folder or pattern without files; `kind` is `image` or `mask`."""
    if not place.is_dir():
        return DataProblem(f"no {kind} matches", place, f"Add the {kind}s, or set data.{kind}s.")
    inner = sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    remedy = f"Put the {kind}s there."
    if kind == "mask" and inner:
        above = f"{place.parent.name}/{{split}}" if place.name in sum(FOLDERS.values(), ()) else place.name
        remedy = f"""Choose one of its folders: 'data.masks="{above}/{inner[0]}"'."""
        if len(inner) > 1:
            remedy += f" If each is a rater's: 'data.raters=[{','.join(inner)}]'."
    return DataProblem(f"holds no {kind} ({' '.join(EXTENSIONS)}); {describe_contents(place)}", place, remedy)
