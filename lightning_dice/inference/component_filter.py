"""Remove small connected components from labels, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def filter_planes(
    planes: NDArray[np.bool_], min_size: float | Sequence[float], keep_largest: Iterable[int] = ()
) -> None:
    """Clear the small components of each plane.

    Args:
        planes: `(classes, *space)`, changed in place.
        min_size: pixels of the smallest component that is kept, one number or one for each class.
        keep_largest: classes of which only the largest component is kept; of equally large ones the first.

    >>> planes = np.array([[1, 0, 1, 1]]) == 1
    >>> filter_planes(planes, 2)
    >>> planes.astype(int).tolist()
    [[0, 0, 1, 1]]
    """
    settings = _class_settings(len(planes), min_size, keep_largest)
    for plane, (size, largest) in zip(planes, settings, strict=True):
        for box, component in _removable(plane, size, largest=largest):
            plane[box][component] = False


def filter_ids(
    ids: NDArray[Any], min_size: float | Sequence[float], keep_largest: Iterable[int] = (), background: int | None = 0
) -> None:
    """Replace the small components of each class by the background, in the order of the classes.

    Args:
        ids: class ids `(*space)`, changed in place.
        min_size: as for `filter_planes`.
        keep_largest: as for `filter_planes`.
        background: the class of removed pixels, whose own components are kept; `None`: the class of most pixels around
            the component, the lowest of equally frequent ones. A component that fills the image is kept.

    >>> ids = np.array([2, 2, 1, 2, 2, 0])
    >>> filter_ids(ids, 2, background=None)
    >>> ids.tolist()
    [2, 2, 2, 2, 2, 2]
    """
    from scipy import ndimage

    found = int(ids.max(initial=0)) + 1
    classes = len(min_size) if isinstance(min_size, Sequence) else found
    if found > classes:
        raise ValueError(f"min_size must be a number, or one for each class, got {classes} and a class {found - 1}")
    for index, (size, largest) in enumerate(_class_settings(classes, min_size, keep_largest)):
        if index == background or index >= found:
            continue
        for box, component in _removable(ids == index, size, largest=largest):
            if background is not None:
                ids[box][component] = background
                continue
            # One pixel more on each side, to see the pixels around it.
            wider = tuple(slice(max(0, part.start - 1), part.stop + 1) for part in box)
            inner = np.zeros(ids[wider].shape, dtype=bool)
            inner[tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(box, wider, strict=True))] = (
                component
            )
            around = ndimage.binary_dilation(inner, ndimage.generate_binary_structure(ids.ndim, ids.ndim)) & ~inner
            if around.any():
                ids[wider][inner] = np.bincount(ids[wider][around].astype(np.int64)).argmax()


def _class_settings(
    classes: int, min_size: float | Sequence[float], keep_largest: Iterable[int]
) -> list[tuple[float, bool]]:
    """Return for each class its smallest size, and whether only its largest component is kept."""
    sizes = list(min_size) if isinstance(min_size, Sequence) else [min_size] * classes
    if len(sizes) != classes:
        raise ValueError(f"min_size must be a number, or one for each of the {classes} classes, got {len(sizes)}")
    largest = set(keep_largest)
    return [(size, index in largest) for index, size in enumerate(sizes)]


def _removable(mask: NDArray[np.bool_], min_size: float, *, largest: bool) -> Iterable[tuple[Any, NDArray[np.bool_]]]:
    """Return the bounding box of each component to remove, and the component within it."""
    if min_size <= 1 and not largest:
        return []
    from scipy import ndimage

    numbers, count = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, mask.ndim))
    if not count:
        return []
    sizes = np.bincount(numbers.ravel(), minlength=count + 1)
    sizes[0] = 0
    removable = sizes < min_size
    if largest:
        removable |= np.arange(count + 1) != sizes.argmax()
    removable[0] = False
    boxes = ndimage.find_objects(numbers)
    return [(boxes[n - 1], numbers[boxes[n - 1]] == n) for n in np.flatnonzero(removable)]
