"""Patterns of file names, such as `gtFine/{split}/*/{case}_gtFine_labelIds.png`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lightning_dice.data.file_names import EXTENSIONS

_TOKEN = re.compile(r"\{(\w*)\}|(\*)")


def is_file_pattern(pattern: str) -> bool:
    """Return whether a pattern names files, and not folders.

    >>> is_file_pattern("{split}/{case}_rgb.png"), is_file_pattern("images/{split}")
    (True, False)
    """
    return "{case}" in pattern


def check_pattern(pattern: str, setting: str, known: Sequence[str]) -> str:
    """Return a pattern if it has no placeholders but the known ones.

    Raises:
        ValueError: naming the setting.

    >>> check_pattern("masks/{spilt}", "masks", ["split", "case"])
    Traceback (most recent call last):
    ValueError: masks must be a place below the data's root with no placeholders but {split}, {case}, got ...
    """
    found = [match[1] for match in _TOKEN.finditer(pattern) if match[2] is None]
    if not pattern or any(name not in known for name in found) or ("*" in pattern and not is_file_pattern(pattern)):
        allowed = ", ".join(f"{{{name}}}" for name in known)
        hint = "; with * in it, it must name files by {case}" if "*" in pattern else ""
        raise ValueError(
            f"{setting} must be a place below the data's root with no placeholders but {allowed}, got {pattern!r}{hint}"
        )
    return pattern


def find_files(
    root: Path, pattern: str, names: Mapping[str, Sequence[str]], extensions: Sequence[str] = EXTENSIONS
) -> Iterator[tuple[dict[str, str], Path]]:
    """Find the files that match a pattern, in order.

    `{case}` matches any name, the same one wherever it occurs; every other placeholder matches one of its names; `*`
    matches any part of a name. The extension may be left out.

    Args:
        root: the folder that the pattern is relative to.
        pattern: with `/` between folders.
        names: what each placeholder but `{case}` may match.
        extensions: the files' extensions, in lower case, if the pattern has none.

    Yields:
        What the placeholders matched, and the file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("a_vein.png", "a_artery.PNG", "b_c_vein.tif", "vein.png", "a_vein.txt"):
    ...         (Path(folder) / name).touch()
    ...     for matched, path in find_files(Path(folder), "{case}_{class}", {"class": ["artery", "vein"]}):
    ...         print(matched, path.name)
    {'case': 'a', 'class': 'artery'} a_artery.PNG
    {'case': 'a', 'class': 'vein'} a_vein.png
    {'case': 'b_c', 'class': 'vein'} b_c_vein.tif
    """
    *folders, last = [part for part in pattern.split("/") if part not in ("", ".")]
    start = Path("/") if pattern.startswith("/") else root
    ending = "" if last.lower().endswith(tuple(extensions)) else "|".join(map(re.escape, extensions))
    yield from _find_below(start, folders, last, names, ending, {})


def _find_below(
    base: Path, folders: list[str], last: str, names: Mapping[str, Sequence[str]], ending: str, matched: dict[str, str]
) -> Iterator[tuple[dict[str, str], Path]]:
    part = folders[0] if folders else last
    if folders and not _TOKEN.search(part):
        if (base / part).is_dir():
            yield from _find_below(base / part, folders[1:], last, names, ending, matched)
        return
    expression = re.compile(_to_regex(part, names, matched) + (f"(?i:{ending})" if ending and not folders else ""))
    for path in sorted(base.iterdir()):
        match = expression.fullmatch(path.name)
        if match is None or (path.name.startswith(".") and not part.startswith(".")):
            continue
        here = {**matched, **{name.removeprefix("name_"): value for name, value in match.groupdict().items()}}
        if not folders:
            if is_file_or_broken_link(path):
                yield here, path
        elif path.is_dir():
            yield from _find_below(path, folders[1:], last, names, ending, here)


def _to_regex(part: str, names: Mapping[str, Sequence[str]], matched: Mapping[str, str]) -> str:
    """Translate one part of a pattern, with what the parts before it matched filled in."""
    pieces, position, here = [], 0, set()
    # Of the classes `upper` and `left_upper`, `a_left_upper` names the longer one.
    any_name = ".+?" if len({match[1] for match in _TOKEN.finditer(part)} - {"case", None}) else ".+"
    for match in _TOKEN.finditer(part):
        pieces.append(re.escape(part[position : match.start()]))
        position, name = match.end(), match[1]
        if name is None:
            pieces.append(".*")
        elif name in matched:
            pieces.append(re.escape(matched[name]))
        elif name in here:
            pieces.append(f"(?P=name_{name})")
        else:
            here.add(name)
            options = "|".join(re.escape(one) for one in names.get(name, ()))
            pieces.append(f"(?P<name_{name}>{any_name if name == 'case' else options})")
    return "".join([*pieces, re.escape(part[position:])])


def is_file_or_broken_link(path: Path) -> bool:
    """Return whether a path is a file or a broken link. The latter is not ignored, but reported when it is read."""
    return path.is_file() or (path.is_symlink() and not path.exists())
