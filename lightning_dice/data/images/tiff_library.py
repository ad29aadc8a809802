"""The optional libraries that read and write TIFFs: tifffile, and imagecodecs for compressed ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from lightning_dice.extras import require

EXTENSIONS = (".tif", ".tiff")


def tifffile_for(path: Path) -> ModuleType:
    """Return tifffile, to read or write a file.

    Raises:
        MissingExtra: it is not installed, or imagecodecs is not.
    """
    try:
        import imagecodecs  # noqa: F401  tifffile looks for it
        import tifffile
    except ModuleNotFoundError:
        require("tifffile", "imagecodecs", needed_by=str(path))
        raise
    return tifffile


def require_tiff_library(files: Iterable[Path]) -> None:
    """Check that the libraries are installed, if there is a TIFF among files.

    Raises:
        MissingExtra: they are not; names the first TIFF.
    """
    first = next((path for path in files if path.suffix.lower() in EXTENSIONS), None)
    if first is not None:
        require("tifffile", "imagecodecs", needed_by=str(first))
