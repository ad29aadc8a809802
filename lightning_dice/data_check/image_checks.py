"""Checks of the images: file formats, sizes, spacings and intensities."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from lightning_dice.data_check.case_statistics import CaseStatistics
from lightning_dice.data_check.finding import Finding, pluralize
from lightning_dice.data_check.survey import SurveyResult

CONSTANT = 0.01  # of the usual spread: below, an image is nearly constant
MASK_LEVELS = 8  # distinct values: a mask has few, a photograph many
SIZE_RATIO = 16.0  # pixels of the largest image to those of the smallest
SPACING_RATIO = 1.5  # coarsest to finest spacing along an axis
OUTLIER = 6.0  # interquartile ranges from the median
SIMILAR = 2.0  # interquartile ranges between cases of one kind
FEW_OF_A_KIND = 3  # cases of one kind, up to which they are outliers


def check_nonfinite_values(result: SurveyResult) -> Iterator[Finding]:
    """Check for NaN and infinite values.

    >>> from lightning_dice.data_check.task import Task
    >>> case = CaseStatistics("train", "a", 0, (8, 8), (8, 8), nonfinite=3)
    >>> [finding.title for finding in check_nonfinite_values(SurveyResult(Task(["cell"]), [case]))]
    ['1 image with NaN or infinite values']
    """
    if cases := [case for case in result.cases if case.nonfinite]:
        yield Finding(
            "nonfinite-values",
            "error",
            f"{pluralize(len(cases), 'image')} with NaN or infinite values",
            "A single NaN makes the loss NaN, and with it all weights.",
            "Replace these values before training.",
            [case.key for case in cases],
            [f"{case.nonfinite} values" for case in cases],
        )


def check_channels(result: SurveyResult) -> Iterator[Finding]:
    """Check that all images have the same number of channels, and the config's number if it gives one."""
    configured = result.facts.get("channels")
    counts = Counter(case.channels for case in result.cases)
    usual = configured or (counts.most_common(1)[0][0] if counts else None)
    if cases := [case for case in result.cases if case.channels != usual]:
        yield Finding(
            "channels",
            "error",
            f"{pluralize(len(cases), 'image')} without the {usual} channels of "
            f"{'data.channels' if configured else 'the other images'}",
            "The first layer of the network takes a fixed number of channels.",
            f"Set data.channels={cases[0].channels}, or convert the images.",
            [case.key for case in cases],
            [f"{case.channels} channels" for case in cases],
        )


def check_formats(result: SurveyResult) -> Iterator[Finding]:
    """Check that all files have the same bit depth and colour."""
    kinds = Counter(case.kind for case in result.cases if case.kind)
    if len(kinds) < 2:
        return
    depths = Counter(case.kind.split()[0] for case in result.cases if case.kind)
    usual = (depths if len(depths) > 1 else kinds).most_common(1)[0][0]
    cases = [case for case in result.cases if case.kind and not case.kind.startswith(usual)]
    # 2D images are divided by the maximum of their bit depth; volumes are normalized by their intensities.
    divided = len(depths) > 1 and all(depth.endswith("-bit") for depth in depths)
    if divided:
        why = "Values are divided by the maximum of their bit depth: 12-bit data in 16-bit files are 16 times too dark."
    else:
        why = "They may come from different devices or programs, and a network learns to tell these apart."
    yield Finding(
        "image-formats",
        "warning" if divided else "note",
        f"images of different {'bit depths' if divided else 'formats'}: "
        + ", ".join(f"{name} ({count})" for name, count in kinds.most_common()),
        why,
        "Save all images in one format; normalize=image evens out brightness and contrast." if divided else "",
        [case.key for case in cases],
        [case.kind for case in cases],
    )


def check_spacings(result: SurveyResult) -> Iterator[Finding]:
    """Check that spacings are known for all cases or none, and similar."""
    cases = [case for case in result.cases if case.spacing]
    if cases and len({len(case.spacing or ()) for case in cases}) == 1:
        table = np.array([case.spacing for case in cases])
        ratio = table.max(0) / np.maximum(table.min(0), 1e-12)
        if ratio.max() > SPACING_RATIO:
            median = np.median(table, 0)
            unusual = (np.maximum(table / median, median / table) > math.sqrt(SPACING_RATIO)).any(1)
            others = [case for case, flag in zip(cases, unusual, strict=True) if flag]
            yield Finding(
                "spacings",
                "warning",
                f"the spacing differs between cases by a factor of up to {ratio.max():.2g}",
                "Objects of one size in mm have different sizes in pixels.",
                "Resample all cases to one spacing (data=volumes and data=nnunet do: data.spacing).",
                [case.key for case in others],
                [f"{' x '.join(f'{step:.3g}' for step in case.spacing or ())} mm" for case in others],
            )
    if 0 < len(cases) < len(result.cases):
        others = [case for case in result.cases if not case.spacing]
        yield Finding(
            "unknown-spacing",
            "note",
            f"{pluralize(len(others))} without a spacing, while others have one",
            "Distances are in pixels for these cases, and in mm for the others.",
            "",
            [case.key for case in others],
        )


def check_image_sizes(result: SurveyResult) -> Iterator[Finding]:
    """Check that images are of similar size, and as large as the crops of training."""
    cases = result.cases
    pixels = [math.prod(case.size) for case in cases]
    if pixels and max(pixels) > SIZE_RATIO * min(pixels):
        small, large = cases[int(np.argmin(pixels))], cases[int(np.argmax(pixels))]
        yield Finding(
            "sizes",
            "note",
            f"image sizes vary widely: {format_size(small.size)} to {format_size(large.size)}",
            "A training crop covers all of a small image and little of a large one.",
            "Check that objects have the same size in pixels in both; if not, resize the images.",
            [small.key, large.key],
            [format_size(small.size), format_size(large.size)],
        )
    crop = tuple(result.facts.get("size") or ())
    smaller = [
        case
        for case in result.of("train")
        if len(crop) == len(case.size) and any(a < b for a, b in zip(case.size, crop, strict=True))
    ]
    if smaller:
        median = ",".join(str(int(length)) for length in np.median([case.size for case in smaller], axis=0))
        yield Finding(
            "smaller-than-crops",
            "note",
            f"{pluralize(len(smaller), 'training image')} smaller than the crops of {format_size(crop)}",
            "They are padded; the padding is ignored, but costs time.",
            f"Choose a smaller data.patch_size, such as [{median}].",
            [case.key for case in smaller],
            [format_size(case.size) for case in smaller],
        )


def format_size(size: Sequence[int]) -> str:
    """Return a size as text.

    >>> format_size((64, 48))
    '64x48'
    """
    return "x".join(map(str, size))


def check_constant_images(result: SurveyResult) -> Iterator[Finding]:
    """Check for images with hardly any contrast."""
    if cases := _constant_images(result.cases):
        yield Finding(
            "constant-images",
            "warning",
            f"{pluralize(len(cases), 'image')} with (nearly) the same value everywhere",
            "They show nothing; normalized per image, they become amplified noise.",
            "Look at them, and remove images that were not exposed or not written completely.",
            [case.key for case in cases],
            [f"from {case.range[0]:.4g} to {case.range[4]:.4g}" for case in cases],
        )


def check_mask_like_images(result: SurveyResult) -> Iterator[Finding]:
    """Check for images with as few distinct values as a mask."""
    constant = {case.key for case in _constant_images(result.cases)}
    cases = [c for c in result.cases if c.levels is not None and c.levels <= MASK_LEVELS and c.key not in constant]
    if cases:
        yield Finding(
            "mask-like-images",
            "warning",
            f"{pluralize(len(cases), 'image')} with at most {MASK_LEVELS} distinct values, like a mask",
            "Image and mask may be swapped, or the image was thresholded.",
            "Look at them.",
            [case.key for case in cases],
            [f"{case.levels} values" for case in cases],
        )


def check_intensities(result: SurveyResult) -> Iterator[Finding]:
    """Check for images with unusual brightness or contrast."""
    constant = {case.key for case in _constant_images(result.cases)}
    if cases := _intensity_outliers([case for case in result.cases if case.key not in constant]):
        yield Finding(
            "unusual-intensities",
            "note",
            f"{pluralize(len(cases), 'image')} much brighter or darker than the rest, or of another contrast",
            "The network sees few images like them.",
            "normalize=image evens out brightness and contrast; augment=full varies both.",
            [case.key for case in cases],
            [f"1 to 99 %: {case.range[1]:.3g} to {case.range[3]:.3g}" for case in cases],
        )


def _constant_images(cases: Sequence[CaseStatistics]) -> list[CaseStatistics]:
    spreads = np.array([max(case.std, default=0.0) for case in cases])
    usual = float(np.median(spreads)) if len(spreads) else 0.0
    return [case for case, spread in zip(cases, spreads, strict=True) if spread <= CONSTANT * usual]


def _intensity_outliers(cases: Sequence[CaseStatistics]) -> list[CaseStatistics]:
    """Return images far from the median of the data set and from all but a few others.

    Several similar images are a second kind of images, and no outliers.
    """
    if len(cases) < 4 * FEW_OF_A_KIND:
        return []
    table = np.array([(np.mean(case.mean), case.range[1], case.range[2], case.range[3]) for case in cases])
    low, median, high = np.percentile(table, [25, 50, 75], axis=0)
    # If most images have a black of 0, the quartiles are equal, and every difference would be enormous.
    unit = np.maximum(high - low, 0.05 * float(table.max() - table.min()) + 1e-12)
    scaled = (table - median) / unit
    far = np.flatnonzero(np.abs(scaled).max(1) > OUTLIER)
    similar = [int((np.abs(scaled - scaled[index]).max(1) < SIMILAR).sum()) for index in far]
    return [cases[index] for index, count in zip(far.tolist(), similar, strict=True) if count <= FEW_OF_A_KIND]
