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


def strip(stem: str, suffixes: Iterable[str]) -> str:
    """A stem without a customary suffix, in any case.

    >>> strip("a_Segmentation", MASK_SUFFIXES), strip("frame_0001", IMAGE_SUFFIXES)
    ('a', 'frame_0001')
    """
    for suffix in suffixes:
        if stem.lower().endswith(suffix) and len(stem) > len(suffix):
            return stem[: -len(suffix)]
    return stem


def stem(path: Path, extensions: Sequence[str] = EXTENSIONS) -> str:
    """A file's name without its suffix, which may have two parts.

    >>> stem(Path("a.b.nii.gz"), (".nii.gz",)), stem(Path("a.b.PNG"))
    ('a.b', 'a.b')
    """
    ending = next((one for one in extensions if path.name.lower().endswith(one)), path.suffix)
    return path.name[: len(path.name) - len(ending)]
