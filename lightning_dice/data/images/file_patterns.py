"""Patterns of file names, such as `gtFine/{split}/*/{case}_gtFine_labelIds.png`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lightning_dice.data.file_names import EXTENSIONS

_TOKEN = re.compile(r"\{(\w*)\}|(\*)")


def names_files(pattern: str) -> bool:
    """Whether a pattern is one of files, and not of folders that hold them."""
    return "{case}" in pattern


def check_pattern(pattern: str, setting: str, known: Sequence[str]) -> str:
    """A pattern whose placeholders are all known.

    Raises:
        ValueError: naming the setting.

    >>> check_pattern("masks/{spilt}", "masks", ["split", "case"])
    Traceback (most recent call last):
    ValueError: masks must be a place below the data's root with no placeholders but {split}, {case}, got ...
    """
    found = [match[1] for match in _TOKEN.finditer(pattern) if match[2] is None]
    if not pattern or any(name not in known for name in found) or ("*" in pattern and not names_files(pattern)):
        allowed = ", ".join(f"{{{name}}}" for name in known)
        hint = "; with * in it, it must name files by {case}" if "*" in pattern else ""
        raise ValueError(
            f"{setting} must be a place below the data's root with no placeholders but {allowed}, got {pattern!r}{hint}"
        )
    return pattern


def walk(
    root: Path, pattern: str, names: Mapping[str, Sequence[str]], extensions: Sequence[str] = EXTENSIONS
) -> Iterator[tuple[dict[str, str], Path]]:
    """The files of a pattern, in order.

    `{case}` stands for any name, which is the same wherever it occurs, the other placeholders for one of given names,
    `*` for any part of a name. The suffix may be left out.

    Args:
        root: the folder below which the pattern goes.
        pattern: with `/` between folders.
        names: what each placeholder may stand for, but `{case}`.
        extensions: of the files, in lower case, where the pattern has none.

    Yields:
        What the placeholders stand for, and the file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("a_vein.png", "a_artery.PNG", "b_c_vein.tif", "vein.png", "a_vein.txt"):
    ...         (Path(folder) / name).touch()
    ...     for found, path in walk(Path(folder), "{case}_{class}", {"class": ["artery", "vein"]}):
    ...         print(found, path.name)
    {'case': 'a', 'class': 'artery'} a_artery.PNG
    {'case': 'a', 'class': 'vein'} a_vein.png
    {'case': 'b_c', 'class': 'vein'} b_c_vein.tif
    """
    *folders, last = [part for part in pattern.split("/") if part not in ("", ".")]
    start = Path("/") if pattern.startswith("/") else root
    ending = "" if last.lower().endswith(tuple(extensions)) else "|".join(map(re.escape, extensions))
    yield from _walk(start, folders, last, names, ending, {})


def _walk(
    base: Path, folders: list[str], last: str, names: Mapping[str, Sequence[str]], ending: str, found: dict[str, str]
) -> Iterator[tuple[dict[str, str], Path]]:
    part = folders[0] if folders else last
    if folders and not _TOKEN.search(part):
        if (base / part).is_dir():
            yield from _walk(base / part, folders[1:], last, names, ending, found)
        return
    wanted = re.compile(_expression(part, names, found) + (f"(?i:{ending})" if ending and not folders else ""))
    for path in sorted(base.iterdir()):
        match = wanted.fullmatch(path.name)
        if match is None or (path.name.startswith(".") and not part.startswith(".")):
            continue
        bound = {**found, **{name.removeprefix("name_"): value for name, value in match.groupdict().items()}}
        if not folders:
            if is_file(path):
                yield bound, path
        elif path.is_dir():
            yield from _walk(path, folders[1:], last, names, ending, bound)


def _expression(part: str, names: Mapping[str, Sequence[str]], found: Mapping[str, str]) -> str:
    """A regular expression of one name, with what is known already in its place."""
    pieces, position, here = [], 0, set()
    # Of the classes `upper` and `left_upper`, `a_left_upper` names the longer one.
    any_name = ".+?" if len({match[1] for match in _TOKEN.finditer(part)} - {"case", None}) else ".+"
    for match in _TOKEN.finditer(part):
        pieces.append(re.escape(part[position : match.start()]))
        position, name = match.end(), match[1]
        if name is None:
            pieces.append(".*")
        elif name in found:
            pieces.append(re.escape(found[name]))
        elif name in here:
            pieces.append(f"(?P=name_{name})")
        else:
            here.add(name)
            options = "|".join(re.escape(one) for one in names.get(name, ()))
            pieces.append(f"(?P<name_{name}>{any_name if name == 'case' else options})")
    return "".join([*pieces, re.escape(part[position:])])


def is_file(path: Path) -> bool:
    """Whether a path is a file, or a link to nothing: that is told when it is read, and not passed over."""
    return path.is_file() or (path.is_symlink() and not path.exists())
