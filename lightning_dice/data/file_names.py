"""Names of image and mask files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

MASK_SUFFIXES = (
    *("_mask", "-mask", "_masks", "_seg", "_segmentation", "_label", "_labels"),
    *("_gt", "_groundtruth", "_manual1", "_annotation"),
)
IMAGE_SUFFIXES = ("_image", "_img", "_0000")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".npy")


def strip_suffix(stem: str, suffixes: Iterable[str]) -> str:
    """Remove a suffix from a stem, ignoring case.

    >>> strip_suffix("a_Segmentation", MASK_SUFFIXES), strip_suffix("frame_0001", IMAGE_SUFFIXES)
    ('a', 'frame_0001')
    """
    for suffix in suffixes:
        if stem.lower().endswith(suffix) and len(stem) > len(suffix):
            return stem[: -len(suffix)]
    return stem


def file_stem(path: Path, extensions: Sequence[str] = EXTENSIONS) -> str:
    """Return a file's name without its extension, which may have two parts.

    >>> file_stem(Path("a.b.nii.gz"), (".nii.gz",)), file_stem(Path("a.b.PNG"))
    ('a.b', 'a.b')
    """
    ending = next((one for one in extensions if path.name.lower().endswith(one)), path.suffix)
    return path.name[: len(path.name) - len(ending)]
