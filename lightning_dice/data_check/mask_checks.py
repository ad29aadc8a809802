"""Checks of the masks: labels, sizes, classes and their connected components."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from lightning_dice.data.interfaces import Split
from lightning_dice.data_check.case_statistics import SMALL, CaseStatistics, ClassComponents
from lightning_dice.data_check.finding import Finding, pluralize
from lightning_dice.data_check.image_checks import format_size
from lightning_dice.data_check.split_checks import FEW
from lightning_dice.data_check.survey import SurveyResult

SHARE_RATIO = 3.0  # of a class's share between splits
RARE = 0.01  # share of the pixels
MANY_SMALL = 0.1  # share of components below `SMALL` pixels
THIN = 4.0  # pixels across
MANY_COMPONENTS = 5  # in the median case
COMPONENT_SIZE_RATIO = 20.0  # 95th to 5th percentile of the components' sizes
LISTED = 8  # labels


def check_labels(result: SurveyResult) -> Iterator[Finding]:
    """Check that each label belongs to a class.

    >>> from lightning_dice.data_check.task import Task
    >>> case = CaseStatistics("train", "a", 0, (8, 8), (8, 8), unknown_labels={7: 12})
    >>> [finding.title for finding in check_labels(SurveyResult(Task(["cell"]), [case]))]
    ['labels without a class in the masks of 1 case: 7']
    """
    if cases := [case for case in result.cases if case.unknown_labels]:
        labels = sorted({label for case in cases for label in case.unknown_labels})
        more = f" and {len(labels) - LISTED} more" if len(labels) > LISTED else ""
        yield Finding(
            "unknown-labels",
            "error",
            f"labels without a class in the masks of {pluralize(len(cases))}: "
            f"{', '.join(map(str, labels[:LISTED]))}{more}",
            "Losses and scores reject such pixels.",
            "List all classes in data.classes, or map the labels (data.label_map).",
            [case.key for case in cases],
            [", ".join(f"{label}: {count} pixels" for label, count in case.unknown_labels.items()) for case in cases],
        )


def check_mask_sizes(result: SurveyResult) -> Iterator[Finding]:
    """Check that masks have the size of their images, except where images are resampled for evaluation."""
    cases = [case for case in result.cases if case.size != case.mask_size]
    if cases := [case for case in cases if case.split == "train" or case.size == case.mask_size[::-1]]:
        transposed = all(case.size == case.mask_size[::-1] for case in cases)
        yield Finding(
            "mask-sizes",
            "error",
            f"{pluralize(len(cases), 'mask')} of another size than the image"
            + (": rows and columns are swapped" if transposed else ""),
            "Each pixel of the image needs a label.",
            "Transpose them." if transposed else "Resize the mask to the image's size, with nearest neighbour.",
            [case.key for case in cases],
            [f"image {format_size(case.size)}, mask {format_size(case.mask_size)}" for case in cases],
        )


def check_absent_classes(result: SurveyResult) -> Iterator[Finding]:
    """Check that each class occurs in each split."""
    task = result.task
    for split in result.sizes:
        cases = result.of(split)
        if not cases:
            continue
        present = [any(case.components[index].pixels for case in cases) for index in range(len(task.classes))]
        absent = [str(task.classes[index]) for index in task.counted if not present[index]]
        if not absent:
            continue
        nothing = split == "train" and not any(present[index] for index in task.foreground)
        yield Finding(
            "absent-classes",
            "error" if nothing else "warning",
            f"no pixel of the {split} split is {', '.join(absent)}"
            + (": there is nothing to learn" if nothing else ""),
            "A class that never occurs cannot be learned." if split == "train" else "It has no score in this split.",
            "Check the order of the names in data.classes, the meaning of the mask's values (data.label_map), and how "
            "the cases were split.",
        )


def check_empty_masks(result: SurveyResult) -> Iterator[Finding]:
    """Check for masks without foreground."""
    if ignored := [case for case in result.cases if _is_ignored(case)]:
        yield Finding(
            "ignored-masks",
            "warning",
            f"{pluralize(len(ignored), 'mask')} with only the ignored label",
            "They teach nothing and have no score.",
            "Remove them, or check whether the ignored label is a class (data.label_map).",
            [case.key for case in ignored],
        )
    for split in result.sizes:
        cases = [case for case in result.of(split) if not _is_ignored(case)]
        empty = [case for case in cases if not case.foreground_pixels(result.task)]
        partly_ignored = [case for case in empty if case.ignored]
        if 2 * len(partly_ignored) > len(empty):
            yield Finding(
                "ignored-masks",
                "warning",
                f"{pluralize(len(partly_ignored), 'mask')} of the {split} split with ignored pixels but no foreground",
                "If the ignored label is foreground in them, it is never learned.",
                f"If so, set 'data.label_map={{{result.task.ignore_index}:1}}'.",
                [case.key for case in partly_ignored],
            )
            empty = [case for case in empty if not case.ignored]
        if empty and len(empty) < len(cases):  # If all are empty, the class is absent.
            yield _empty_masks(empty, len(cases), split)


def _empty_masks(empty: Sequence[CaseStatistics], total: int, split: Split) -> Finding:
    if split == "train":
        why = (
            "An empty mask has no overlap: with pool=image, only the loss's policy for absent classes reduces false "
            "positives, and scores leave such cases out."
        )
    else:
        why = "Their Dice is undefined, or 0 if anything is predicted."
    return Finding(
        "empty-masks",
        "warning" if 2 * len(empty) > total else "note",
        f"{len(empty)} of {pluralize(total, 'mask')} of the {split} split {'is' if len(empty) == 1 else 'are'} empty",
        why,
        "If they are meant to be empty, set loss.absent=penalize." if split == "train" else "",
        [case.key for case in empty],
    )


def check_full_masks(result: SurveyResult) -> Iterator[Finding]:
    """Check for masks with one class everywhere, and for inverted masks."""
    task = result.task
    cases = [case for case in result.cases if not _is_ignored(case)]
    full = [
        case
        for case in cases
        if any(case.components[index].pixels >= case.pixels - case.ignored for index in task.foreground)
    ]
    if full:
        yield Finding(
            "full-masks",
            "warning",
            f"{pluralize(len(full), 'mask')} with one class everywhere",
            "Often such a mask was never drawn, or is inverted.",
            "Look at them.",
            [case.key for case in full],
            [", ".join(str(task.classes[i]) for i in task.foreground if case.components[i].pixels) for case in full],
        )
    total = sum(case.pixels for case in cases)
    if len(task.foreground) == 1 and total:
        index = task.foreground[0]
        share = sum(case.components[index].pixels for case in cases) / total
        if share > 0.5:
            yield Finding(
                "inverted-masks",
                "note",
                f"{task.classes[index]} covers {100 * share:.0f} % of all pixels",
                "Foreground rarely covers more than half: the masks may be inverted.",
                "If they are, set 'data.label_map={0:1,1:0}'.",
            )


def _is_ignored(case: CaseStatistics) -> bool:
    return bool(case.pixels) and case.ignored >= case.pixels


def check_class_shares(result: SurveyResult) -> Iterator[Finding]:
    """Check for rare classes, and for classes whose share differs between the splits."""
    task = result.task
    shares = {split: class_shares(result.of(split), len(task.classes)) for split in result.sizes}
    train = shares.get("train", [])
    if rare := [index for index in task.foreground if train and 0 < train[index] < RARE]:
        yield Finding(
            "rare-classes",
            "note",
            f"classes with less than {100 * RARE:g} % of the training pixels: "
            + ", ".join(f"{task.classes[index]} {100 * train[index]:.2g} %" for index in rare),
            "Many crops do not contain them, and cross-entropy alone neglects them.",
            "Start with loss=dice_ce, or try loss=focal_tversky; larger crops (data.patch_size) contain more of them.",
        )
    for split, part in shares.items():
        if split == "train" or min(len(result.of("train")), len(result.of(split))) < 2 * FEW:
            continue
        differing = [
            f"{task.classes[i]} {100 * train[i]:.2g} % -> {100 * part[i]:.2g} %"
            for i in task.foreground
            if train[i] > 0 < part[i] and max(train[i] / part[i], part[i] / train[i]) > SHARE_RATIO
        ]
        if differing:
            yield Finding(
                "unequal-splits",
                "note",
                f"classes with very different shares of train and {split}: {', '.join(differing)}",
                "Scores on one split are a poor guide to the other.",
                "Split the cases again, at random or such that each split has its share of each class.",
            )


def class_shares(cases: Sequence[CaseStatistics], classes: int) -> list[float]:
    """Return the fraction of pixels of each class, where ignored pixels count as pixels.

    Args:
        cases: over which the pixels are summed.
        classes: number of classes.

    >>> components = [ClassComponents(16, np.array([16]), 8)]
    >>> class_shares([CaseStatistics("train", "a", 0, (8, 8), (8, 8), pixels=64, components=components)], 1)
    [0.25]
    """
    total = sum(case.pixels for case in cases)
    return [sum(case.components[index].pixels for case in cases) / max(total, 1) for index in range(classes)]


def check_components(result: SurveyResult) -> Iterator[Finding]:
    """Check for tiny, thin and differently sized connected components."""
    small, thin, varied = [], [], []
    for index in result.task.foreground:
        name = result.task.classes[index]
        components = [case.components[index] for case in result.cases if case.components[index].pixels]
        if not components:
            continue
        sizes = np.concatenate([each.sizes for each in components])
        tiny = int((sizes < SMALL).sum())
        if tiny > MANY_SMALL * len(sizes):
            small.append(f"{name} {tiny} of {len(sizes)}")
        width = mean_width(components)
        if width < THIN:
            thin.append(f"{name} about {width:.1f}")
        low, high = np.percentile(sizes, [5, 95])
        several = np.median([len(each.sizes) for each in components]) >= MANY_COMPONENTS
        if several and high > COMPONENT_SIZE_RATIO * low and tiny < len(sizes) / 2:
            varied.append(f"{name} {low:.0f} to {high:.0f}")
    if small:
        yield Finding(
            "tiny-objects",
            "note",
            f"many connected components have fewer than {SMALL} pixels: {', '.join(small)}",
            "They are specks of an annotation tool, or objects at the limit of resolution. Dice hardly counts them; "
            "lesion-wise scores and losses count each as much as the largest.",
            "Remove specks from the masks; if the objects are real, use larger images and loss=lesion_wise.",
        )
    if thin:
        yield Finding(
            "thin-structures",
            "note",
            f"thin structures, in pixels across: {', '.join(thin)}",
            "An error of one pixel is a large part of their area and a gap hardly any: Dice is low and misses breaks.",
            "Try loss=cldice or loss=skeleton_recall, and do not shrink the images.",
        )
    if varied:
        yield Finding(
            "objects-of-many-sizes",
            "note",
            f"many objects of very different sizes, in pixels (5 to 95 %): {', '.join(varied)}",
            "The large ones dominate Dice; it may go unnoticed that all small ones are missed.",
            "Try loss=lesion_wise, and look at lesion-wise scores too.",
        )


def mean_width(components: Sequence[ClassComponents]) -> float:
    """Estimate how many pixels wide the objects of a class are: of the w pixels across a bar, 2 are at its edge.

    >>> from lightning_dice.data_check.case_statistics import measure_components
    >>> bar = np.zeros((20, 200), bool)
    >>> bar[7:13] = True
    >>> mean_width([measure_components(bar)])
    6.0
    """
    edge = sum(each.edge for each in components)
    return 2 * sum(each.pixels for each in components) / edge if edge else math.inf
