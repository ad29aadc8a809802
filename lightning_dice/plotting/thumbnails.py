"""Thumbnails of cases: small enough to be kept in memory, large enough for every error to be visible."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.scoring.settings import Activation

Codes = NDArray[np.uint16]
_Maps = tuple[Codes, Codes, Codes]  # truth, prediction, errors

IGNORED_CODE = 65535  # of ignored pixels in the maps of classes


class ErrorCode(IntEnum):
    """The values of a thumbnail's error map; `CORRECT` is everything that is not coloured."""

    CORRECT = 0
    TRUE_POSITIVE = 1
    FALSE_POSITIVE = 2
    FALSE_NEGATIVE = 3
    WRONG_CLASS = 4
    IGNORED = 5


_ERRORS = (ErrorCode.FALSE_POSITIVE, ErrorCode.FALSE_NEGATIVE, ErrorCode.WRONG_CLASS)


class CaseThumbnail(NamedTuple):
    """One case, reduced for drawing.

    Attributes:
        case: its name.
        score: mean Dice.
        image: uint8, `(height, width, 3)`.
        truth: 1 + the class of each pixel, 0 where nothing is painted, `IGNORED_CODE` where pixels are ignored.
        prediction: as `truth`.
        errors: an `ErrorCode` for each pixel.
        note: which part of the case is shown, and by how much it is reduced; empty if neither applies.
    """

    case: str
    score: float
    image: NDArray[np.uint8]
    truth: Codes
    prediction: Codes
    errors: Codes
    note: str


@dataclass(frozen=True)
class ThumbnailSettings:
    """How `make_thumbnail` reads and reduces cases.

    Attributes:
        activation: `"softmax"`: masks are class ids; `"sigmoid"`: planes.
        ignore_index: the label of ignored pixels.
        exclude_classes: indices of classes that are not painted, such as the background.
        mean: the mean of each channel that was subtracted from the image, if any.
        std: the standard deviation of each channel by which the image was divided, if any.
        size: pixels on the longer side, at most.
    """

    activation: Activation
    ignore_index: int | None = None
    exclude_classes: Collection[int] = ()
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    size: int = 512


def make_thumbnail(
    case: str, score: float, image: Tensor, mask: Tensor, predicted: Tensor, settings: ThumbnailSettings
) -> CaseThumbnail | None:
    """Reduce a case to a thumbnail; None if it has fewer than two space axes.

    - Of a volume, the slice with the most errors is shown; among equals, the one with the most foreground in mask and
      prediction.
    - An image whose size differs from the mask's is resized to it.
    - Margins of ignored pixels, which pad an image to a size that the network accepts, are cut off.
    - An image of more than `size` pixels on a side is reduced by a whole number, without losing a single error; one
      that would be reduced more than fourfold is cropped to the window with the most errors.

    Args:
        case: its name.
        score: its mean Dice.
        image: `(channels, *space)`.
        mask: `(*space)` ids or `(classes, *space)` planes.
        predicted: as mask.
        settings: see `ThumbnailSettings`.

    >>> mask = torch.tensor([[[0, 1, 1]]])
    >>> predicted = torch.tensor([[[1, 1, 0]]])
    >>> thumbnail = make_thumbnail("a", 0.5, torch.rand(1, 1, 3), mask, predicted, ThumbnailSettings("sigmoid"))
    >>> [ErrorCode(code).name for code in thumbnail.errors[0]]
    ['FALSE_POSITIVE', 'TRUE_POSITIVE', 'FALSE_NEGATIVE']
    """
    if image.ndim < 3:
        return None
    predicted = predicted.to(mask.device)
    activation, ignore_index = settings.activation, settings.ignore_index
    excluded = torch.tensor(sorted(settings.exclude_classes), device=mask.device, dtype=torch.int64)
    notes = []
    for _ in range(image.ndim - 3):
        axis = 0 if activation == "softmax" else 1
        slices = mask.shape[axis]
        index = _worst_slice(mask, predicted, activation, ignore_index, excluded)
        notes.append(f"slice {index + 1} of {slices}")
        # The image may have another number of slices: take the one whose middle is at the same relative depth.
        image = image[:, int((index + 0.5) * image.shape[1] / slices)]
        mask, predicted = mask.select(axis, index), predicted.select(axis, index)
    if image.shape[1:] != mask.shape[-2:]:
        image = F.interpolate(image[None].float(), size=mask.shape[-2:], mode="bilinear", align_corners=False)[0]
    rgb = _three_channels(_denormalize(image.float().cpu(), settings.mean, settings.std)).numpy()
    paint = _paint_ids if activation == "softmax" else _paint_planes
    codes = paint(mask.cpu().long().numpy(), predicted.cpu().long().numpy(), ignore_index, excluded.cpu().numpy())
    return _crop_and_reduce(case, score, rgb, codes, notes, settings.size)


def _worst_slice(
    mask: Tensor, predicted: Tensor, activation: Activation, ignore_index: int | None, excluded: Tensor
) -> int:
    if activation == "softmax":
        painted = [~torch.isin(labels, excluded) if len(excluded) else labels != 0 for labels in (mask, predicted)]
        known = torch.ones_like(painted[0]) if ignore_index is None else mask != ignore_index
        wrong, axis = (mask != predicted) & known, 0
    else:
        painted = [labels == 1 for labels in (mask, predicted)]
        known = torch.ones_like(painted[0]) if ignore_index is None else mask != ignore_index
        if len(excluded):
            known.index_fill_(0, excluded, False)
        wrong, axis = (painted[0] != painted[1]) & known, 1

    def count_per_slice(where: Tensor) -> Tensor:
        return where.movedim(axis, 0).flatten(1).sum(1)

    errors = count_per_slice(wrong)
    foreground = count_per_slice(painted[0] & known) + count_per_slice(painted[1] & known)
    foreground = foreground.where(errors == errors.max(), -1)
    best = (foreground == foreground.max()).nonzero().flatten()
    # The middle one of equals: an empty volume shows its centre.
    return int(best[len(best) // 2])


def _denormalize(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    for values, apply in ((std, torch.mul), (mean, torch.add)):
        if values is not None and len(values) in (1, image.shape[0]):
            image = apply(image, torch.tensor(list(values)).view(-1, 1, 1))
    return image


def _three_channels(image: Tensor) -> Tensor:
    return image[:3] if image.shape[0] >= 3 else image[:1].expand(3, *image.shape[1:])


def _paint_ids(truth: Any, predicted: Any, ignore_index: int | None, excluded: Any) -> _Maps:
    valid = np.full(truth.shape, True) if ignore_index is None else truth != ignore_index
    actual = np.where(valid & ~np.isin(truth, excluded), truth + 1, 0)
    found = np.where(np.isin(predicted, excluded), 0, predicted + 1)
    errors = _error_map(
        {
            ErrorCode.IGNORED: ~valid,
            ErrorCode.TRUE_POSITIVE: (actual > 0) & (actual == found),
            ErrorCode.CORRECT: actual == found,
            ErrorCode.FALSE_POSITIVE: actual == 0,
            ErrorCode.FALSE_NEGATIVE: found == 0,
        },
        otherwise=ErrorCode.WRONG_CLASS,
    )
    return np.where(valid, actual, IGNORED_CODE).astype(np.uint16), found.astype(np.uint16), errors


def _paint_planes(truth: Any, predicted: Any, ignore_index: int | None, excluded: Any) -> _Maps:
    keep = np.isin(np.arange(len(truth)), excluded, invert=True)
    valid = np.full(truth.shape, True) if ignore_index is None else truth != ignore_index
    valid &= keep[:, None, None]
    actual, found = (truth == 1) & valid, (predicted == 1) & keep[:, None, None]
    maps = [np.zeros(truth.shape[1:], np.uint16) for _ in range(2)]
    # The smallest on top: where classes overlap, the larger one shows around it.
    for index in np.argsort(-actual.sum((1, 2), dtype=np.int64), kind="stable"):
        for painted, planes in zip(maps, (actual, found), strict=True):
            painted[planes[index]] = index + 1
    spurious, missed = (found & ~actual & valid).any(0), (actual & ~found).any(0)
    errors = _error_map(
        {
            ErrorCode.IGNORED: ~valid.any(0),
            ErrorCode.WRONG_CLASS: spurious & missed,
            ErrorCode.FALSE_POSITIVE: spurious,
            ErrorCode.FALSE_NEGATIVE: missed,
            ErrorCode.TRUE_POSITIVE: (actual & found).any(0),
        },
        otherwise=ErrorCode.CORRECT,
    )
    maps[0][~valid.any(0)] = IGNORED_CODE
    return maps[0], maps[1], errors


def _error_map(where: Mapping[ErrorCode, Any], otherwise: ErrorCode) -> Codes:
    """Return the first code of `where` that applies to each pixel."""
    return np.select(list(where.values()), [int(code) for code in where], int(otherwise)).astype(np.uint16)


def _crop_and_reduce(case: str, score: float, rgb: Any, codes: _Maps, notes: list[str], size: int) -> CaseThumbnail:
    rgb, codes = _crop(rgb, codes, _bounds(codes[2] != ErrorCode.IGNORED))
    height, width = codes[2].shape
    factor = -(-max(height, width) // size)
    if factor > 4:
        factor = 4
        rgb, codes = _crop(rgb, codes, _densest_window(np.isin(codes[2], _ERRORS), size * factor))
        high, wide = codes[2].shape
        notes = [*notes, f"{wide} x {high} of {width} x {height} pixels, where the most errors are"]
    if factor > 1:
        notes = [*notes, f"at 1/{factor}"]
    return CaseThumbnail(
        case,
        score,
        _reduce_image(_stretch_contrast(rgb), factor),
        reduce_codes(codes[0], factor),
        reduce_codes(codes[1], factor),
        reduce_codes(codes[2], factor, weights={ErrorCode.TRUE_POSITIVE: 0.5, ErrorCode.IGNORED: 0.0}),
        ", ".join(notes),
    )


def _crop(rgb: Any, codes: _Maps, window: tuple[slice, slice]) -> tuple[Any, _Maps]:
    truth, prediction, errors = codes
    return rgb[(slice(None), *window)], (truth[window], prediction[window], errors[window])


def _bounds(valid: NDArray[np.bool_]) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(valid.any(1)), np.flatnonzero(valid.any(0))
    if not len(rows):
        return slice(None), slice(None)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _densest_window(errors: NDArray[np.bool_], side: int) -> tuple[slice, slice]:
    """Return the window of at most `side` x `side` pixels with the most errors."""
    sums = np.pad(errors.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    high, wide = min(side, errors.shape[0]), min(side, errors.shape[1])
    held = sums[high:, wide:] - sums[:-high, wide:] - sums[high:, :-wide] + sums[:-high, :-wide]
    top, left = np.unravel_index(int(held.argmax()), held.shape)
    return slice(int(top), int(top) + high), slice(int(left), int(left) + wide)


def _stretch_contrast(rgb: Any) -> Any:
    """Map the 1st to 99th percentile of the finite values to 0 to 255."""
    known = rgb[np.isfinite(rgb)]
    low, high = np.percentile(known, [1, 99]) if known.size else (0.0, 0.0)
    scaled = (np.nan_to_num(rgb, nan=low) - low) / (high - low if high > low else 1.0)
    return (scaled.clip(0, 1) * 255).round()


def _blocks(plane: Any, factor: int, **pad: Any) -> Any:
    """Split a plane, padded to whole blocks, into `(height/factor, width/factor, factor²)`."""
    plane = np.pad(plane, [(0, -side % factor) for side in plane.shape], **pad)
    high, wide = plane.shape[0] // factor, plane.shape[1] // factor
    return plane.reshape(high, factor, wide, factor).transpose(0, 2, 1, 3).reshape(high, wide, -1)


def _reduce_image(image: Any, factor: int) -> NDArray[np.uint8]:
    planes = [_blocks(plane, factor, mode="edge").mean(-1) for plane in image]
    return np.stack(planes, -1).round().astype(np.uint8)


def reduce_codes(codes: Codes, factor: int, weights: Mapping[int, float] | None = None) -> Codes:
    """Reduce a map of codes without losing its smallest object: max pooling, for labels.

    Each block takes its most frequent code other than 0. Frequencies are multiplied by the code's weight; a code of
    weight 0 only wins over 0. Weighting true positives by one half keeps a small error visible within a large hit,
    while the border of a small object that is mostly hit does not paint over it.

    Args:
        codes: `(height, width)`.
        factor: pixels of a block's side.
        weights: weights by code, 1 if not listed; None for 0 of `IGNORED_CODE`.

    >>> reduce_codes(np.array([[0, 0, 0, 2], [0, 1, 2, 1]], np.uint16), 2).tolist()
    [[1, 2]]
    """
    if factor == 1:
        return codes
    weights = {IGNORED_CODE: 0.0} if weights is None else weights
    blocks = _blocks(codes, factor, mode="edge")
    best = np.zeros(blocks.shape[:2], codes.dtype)
    most = np.zeros(blocks.shape[:2])
    for code in np.unique(codes):
        if code:
            count = (blocks == code).sum(-1) * (weights.get(int(code), 1.0) or 1e-6)
            best = np.where(count > most, code, best)
            most = np.maximum(count, most)
    return best
