"""Connected components of labels that are too small, removed in place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def clean_planes(planes: NDArray[np.bool_], least: float | Sequence[float], keep_largest: Iterable[int] = ()) -> None:
    """Clear the small components of each plane.

    Args:
        planes: `(classes, *space)`, changed in place.
        least: pixels of the smallest component that stays, of all classes or of each.
        keep_largest: classes of which only the largest component stays; of equally large ones the first.

    >>> planes = np.array([[1, 0, 1, 1]]) == 1
    >>> clean_planes(planes, 2)
    >>> planes.astype(int).tolist()
    [[0, 0, 1, 1]]
    """
    wanted = _wanted(len(planes), least, keep_largest)
    for plane, (size, largest) in zip(planes, wanted, strict=True):
        for box, component in _too_small(plane, size, largest=largest):
            plane[box][component] = False


def clean_ids(
    ids: NDArray[Any], least: float | Sequence[float], keep_largest: Iterable[int] = (), background: int | None = 0
) -> None:
    """Give the small components of each class to the background, in the order of the classes.

    Args:
        ids: `(*space)`, changed in place.
        least: as for `clean_planes`.
        keep_largest: as for `clean_planes`.
        background: the class that removed pixels get, and that is not cleaned; `None`: the class that most pixels
            around the component have, the lowest of equally frequent ones. One that fills the image stays.

    >>> ids = np.array([2, 2, 1, 2, 2, 0])
    >>> clean_ids(ids, 2, background=None)
    >>> ids.tolist()
    [2, 2, 2, 2, 2, 2]
    """
    from scipy import ndimage

    classes = int(ids.max(initial=0)) + 1
    given = len(least) if isinstance(least, Sequence) else classes
    if classes > given:
        raise ValueError(f"min_size must be a number, or one for each class, got {given} and a class {classes - 1}")
    for index, (size, largest) in enumerate(_wanted(max(given, classes), least, keep_largest)):
        if index == background or index >= classes:
            continue
        for box, component in _too_small(ids == index, size, largest=largest):
            if background is not None:
                ids[box][component] = background
                continue
            # One pixel more on each side, for what lies around it.
            wider = tuple(slice(max(0, part.start - 1), part.stop + 1) for part in box)
            inner = np.zeros(ids[wider].shape, dtype=bool)
            inner[tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(box, wider, strict=True))] = (
                component
            )
            around = ndimage.binary_dilation(inner, ndimage.generate_binary_structure(ids.ndim, ids.ndim)) & ~inner
            if around.any():
                ids[wider][inner] = np.bincount(ids[wider][around].astype(np.int64)).argmax()


def _wanted(classes: int, least: float | Sequence[float], keep_largest: Iterable[int]) -> list[tuple[float, bool]]:
    """Of each class, the least size and whether only the largest component stays."""
    sizes = list(least) if isinstance(least, Sequence) else [least] * classes
    if len(sizes) != classes:
        raise ValueError(f"min_size must be a number, or one for each of the {classes} classes, got {len(sizes)}")
    only: Collection[int] = set(keep_largest)
    return [(size, index in only) for index, size in enumerate(sizes)]


def _too_small(mask: NDArray[np.bool_], least: float, *, largest: bool) -> Iterable[tuple[Any, NDArray[np.bool_]]]:
    """The box of each component that goes, and the component within it."""
    if least <= 1 and not largest:
        return []
    from scipy import ndimage

    numbers, found = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, mask.ndim))
    if not found:
        return []
    sizes = np.bincount(numbers.ravel(), minlength=found + 1)
    sizes[0] = 0
    goes = sizes < least
    if largest:
        goes |= np.arange(found + 1) != sizes.argmax()
    goes[0] = False
    boxes = ndimage.find_objects(numbers)
    return [(boxes[n - 1], numbers[boxes[n - 1]] == n) for n in np.flatnonzero(goes)]
