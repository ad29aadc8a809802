"""A case made small enough to be kept and large enough to be judged by eye."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.scoring.settings import Activation

Codes = NDArray[np.uint16]

# Codes of the error map.
NOTHING, HIT, SPURIOUS, MISSED, CONFUSED, VOID = range(6)
IGNORED = 65535  # in the maps of classes
_IGNORED_LAST = {IGNORED: 0.0}


class Record(NamedTuple):
    """One case, as it is drawn.

    Attributes:
        case: its name.
        score: mean Dice.
        image: uint8, `(height, width, 3)`.
        truth: 0 where nothing is painted, else 1 + the class; `IGNORED` where pixels do not count.
        prediction: as `truth`.
        errors: the codes above.
        note: what part of the case is shown, and how much reduced; empty if it is shown as it is.
    """

    case: str
    score: float
    image: NDArray[np.uint8]
    truth: Codes
    prediction: Codes
    errors: Codes
    note: str


def make_record(
    case: str,
    score: float,
    image: Tensor,
    mask: Tensor,
    predicted: Tensor,
    *,
    activation: Activation,
    ignore_index: int | None = None,
    exclude_classes: Collection[int] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int = 512,
) -> Record | None:
    """What is drawn of a case; None if it has fewer than two space axes.

    Of a volume, the slice with the most errors; of slices with equally many, the one with the most foreground in mask
    and prediction. An image of another size than the mask is resized to it. Margins of ignored pixels, which pad an
    image to a size that the net can take, are cut off. An image of more than `size` pixels on a side is reduced by a
    whole number, such that no lone error is lost; one that would be reduced more than fourfold is cropped to where the
    most errors are.

    Args:
        case: its name.
        score: its mean Dice.
        image: `(channels, *space)`.
        mask: `(*space)` ids or `(classes, *space)` planes.
        predicted: as mask.
        activation: `"softmax"`: masks are ids; `"sigmoid"`: planes.
        ignore_index: the label of pixels that do not count.
        exclude_classes: indices of classes that are not painted, such as the background.
        mean: of each channel, that was taken off the image; None if none was.
        std: of each channel, by which the image was divided; None if by none.
        size: pixels on the longer side.
    """
    if image.ndim < 3:
        return None
    predicted = predicted.to(mask.device)
    paint = _paint_ids if activation == "softmax" else _paint_planes
    skipped = torch.tensor(sorted(exclude_classes), device=mask.device, dtype=torch.int64)
    note = []
    for _ in range(image.ndim - 3):
        axis = 0 if activation == "softmax" else 1
        slices = mask.shape[axis]
        index = _worst_slice(mask, predicted, activation, ignore_index, skipped)
        note.append(f"slice {index + 1} of {slices}")
        # The middles of both slices lie at the same place.
        image = image[:, int((index + 0.5) * image.shape[1] / slices)]
        mask, predicted = mask.select(axis, index), predicted.select(axis, index)
    if image.shape[1:] != mask.shape[-2:]:
        image = F.interpolate(image[None].float(), size=mask.shape[-2:], mode="bilinear", align_corners=False)[0]
    picture = _three_channels(_denormalize(image.float().cpu(), mean, std)).numpy()
    codes = paint(mask.cpu().long().numpy(), predicted.cpu().long().numpy(), ignore_index, skipped.cpu().numpy())
    return _fit(case, score, picture, codes, note, size)


def _worst_slice(
    mask: Tensor, predicted: Tensor, activation: Activation, ignore_index: int | None, skipped: Tensor
) -> int:
    if activation == "softmax":
        painted = [~torch.isin(labels, skipped) if len(skipped) else labels != 0 for labels in (mask, predicted)]
        known = torch.ones_like(painted[0]) if ignore_index is None else mask != ignore_index
        wrong, axis = (mask != predicted) & known, 0
    else:
        painted = [labels == 1 for labels in (mask, predicted)]
        known = torch.ones_like(painted[0]) if ignore_index is None else mask != ignore_index
        if len(skipped):
            known.index_fill_(0, skipped, False)
        wrong, axis = (painted[0] != painted[1]) & known, 1

    def in_slices(where: Tensor) -> Tensor:
        return where.movedim(axis, 0).flatten(1).sum(1)

    errors = in_slices(wrong)
    foreground = in_slices(painted[0] & known) + in_slices(painted[1] & known)
    foreground = foreground.where(errors == errors.max(), -1)
    best = (foreground == foreground.max()).nonzero().flatten()
    # Of equals the middle one: an empty volume shows its centre.
    return int(best[len(best) // 2])


def _denormalize(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    for values, apply in ((std, torch.mul), (mean, torch.add)):
        if values is not None and len(values) in (1, image.shape[0]):
            image = apply(image, torch.tensor(list(values)).view(-1, 1, 1))
    return image


def _three_channels(image: Tensor) -> Tensor:
    return image[:3] if image.shape[0] >= 3 else image[:1].expand(3, *image.shape[1:])


def _paint_ids(truth: Any, predicted: Any, ignore_index: int | None, skipped: Any) -> tuple[Codes, Codes, Codes]:
    valid = np.full(truth.shape, True) if ignore_index is None else truth != ignore_index
    there = np.where(valid & ~np.isin(truth, skipped), truth + 1, 0)
    said = np.where(np.isin(predicted, skipped), 0, predicted + 1)
    cases = [~valid, (there > 0) & (there == said), there == said, there == 0, said == 0]
    errors = np.select(cases, [VOID, HIT, NOTHING, SPURIOUS, MISSED], CONFUSED)
    return np.where(valid, there, IGNORED).astype(np.uint16), said.astype(np.uint16), errors.astype(np.uint16)


def _paint_planes(truth: Any, predicted: Any, ignore_index: int | None, skipped: Any) -> tuple[Codes, Codes, Codes]:
    keep = np.isin(np.arange(len(truth)), skipped, invert=True)
    valid = np.full(truth.shape, True) if ignore_index is None else truth != ignore_index
    valid &= keep[:, None, None]
    there, said = (truth == 1) & valid, (predicted == 1) & keep[:, None, None]
    maps = [np.zeros(truth.shape[1:], np.uint16) for _ in range(2)]
    # The smallest on top: where labels overlap, the larger one is seen around it.
    for index in np.argsort(-there.sum((1, 2), dtype=np.int64), kind="stable"):
        for painted, planes in zip(maps, (there, said), strict=True):
            painted[planes[index]] = index + 1
    hit = (there & said).any(0)
    spurious, missed = (said & ~there & valid).any(0), (there & ~said).any(0)
    cases = [~valid.any(0), spurious & missed, spurious, missed, hit]
    errors = np.select(cases, [VOID, CONFUSED, SPURIOUS, MISSED, HIT], NOTHING)
    maps[0][~valid.any(0)] = IGNORED
    return maps[0], maps[1], errors.astype(np.uint16)


def _fit(
    case: str, score: float, picture: Any, codes: tuple[Codes, Codes, Codes], note: list[str], size: int
) -> Record:
    window = _bounds(codes[2] != VOID)
    picture, codes = picture[(slice(None), *window)], tuple(code[window] for code in codes)  # type: ignore[assignment]
    height, width = codes[0].shape
    factor = -(-max(height, width) // size)
    if factor > 4:
        factor = 4
        window = _densest(np.isin(codes[2], (SPURIOUS, MISSED, CONFUSED)), size * factor)
        picture, codes = picture[(slice(None), *window)], tuple(code[window] for code in codes)  # type: ignore[assignment]
        shown = codes[0].shape
        note = [*note, f"{shown[1]} x {shown[0]} of {width} x {height} pixels, where the most errors are"]
    if factor > 1:
        note = [*note, f"at 1/{factor}"]
    image = _stretch(picture)
    return Record(
        case,
        score,
        _reduce_image(image, factor),
        reduce_codes(codes[0], factor),
        reduce_codes(codes[1], factor),
        reduce_codes(codes[2], factor, weights={HIT: 0.5, VOID: 0.0}),
        ", ".join(note),
    )


def _bounds(valid: NDArray[np.bool_]) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(valid.any(1)), np.flatnonzero(valid.any(0))
    if not len(rows):
        return slice(None), slice(None)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _densest(errors: NDArray[np.bool_], side: int) -> tuple[slice, slice]:
    """The window of at most `side` pixels a side that holds the most errors."""
    sums = np.pad(errors.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    high, wide = min(side, errors.shape[0]), min(side, errors.shape[1])
    held = sums[high:, wide:] - sums[:-high, wide:] - sums[high:, :-wide] + sums[:-high, :-wide]
    top, left = np.unravel_index(int(held.argmax()), held.shape)
    return slice(int(top), int(top) + high), slice(int(left), int(left) + wide)


def _stretch(picture: Any) -> Any:
    """Between the first and the last percent of its finite values, to 0 to 255."""
    known = picture[np.isfinite(picture)]
    low, high = np.percentile(known, [1, 99]) if known.size else (0.0, 0.0)
    scaled = (np.nan_to_num(picture, nan=low) - low) / (high - low if high > low else 1.0)
    return (scaled.clip(0, 1) * 255).round()


def _blocks(plane: Any, factor: int, **pad: Any) -> Any:
    """`(height/factor, width/factor, factor²)`, padded to whole blocks."""
    plane = np.pad(plane, [(0, -side % factor) for side in plane.shape], **pad)
    high, wide = plane.shape[0] // factor, plane.shape[1] // factor
    return plane.reshape(high, factor, wide, factor).transpose(0, 2, 1, 3).reshape(high, wide, -1)


def _reduce_image(image: Any, factor: int) -> NDArray[np.uint8]:
    planes = [_blocks(plane, factor, mode="edge").mean(-1) for plane in image]
    return np.stack(planes, -1).round().astype(np.uint8)


def reduce_codes(codes: Codes, factor: int, weights: Mapping[int, float] = _IGNORED_LAST) -> Codes:
    """Reduce a map of codes such that the smallest thing on it stays: a pooling by the greatest, for labels.

    A block takes its most frequent code other than 0. The counts are multiplied by `weights`, 1 if not named; a code of
    weight 0 gives way to any but 0. Errors have twice the weight of hits: a small one is seen within a large hit, and a
    small object that is mostly hit is not painted over by its border.
    """
    if factor == 1:
        return codes
    blocks = _blocks(codes, factor, mode="edge")
    best = np.zeros(blocks.shape[:2], codes.dtype)
    most = np.zeros(blocks.shape[:2])
    for code in np.unique(codes):
        if code:
            count = (blocks == code).sum(-1) * (weights.get(int(code), 1.0) or 1e-6)
            best = np.where(count > most, code, best)
            most = np.maximum(count, most)
    return best
