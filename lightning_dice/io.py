"""Files that are either the old one or the new one, never half of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make the file under a temporary name beside `path`, then put it in its place.

    The temporary file lies in the same folder, because a rename is atomic only within one file system. It keeps the
    suffix, from which writers tell the format, and is removed if `write` fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    part = path.with_name(f".{path.name.removesuffix(suffix)}.{os.getpid()}.part{suffix}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def number(value: float) -> str:
    """Six digits, as tables need them; NaN is an empty field."""
    return "" if value != value else f"{value:.6g}"
