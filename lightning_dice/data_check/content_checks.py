"""Findings about what images and masks hold: sizes, intensities, classes and their objects."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from lightning_dice.data.interfaces import Split
from lightning_dice.data_check.case_statistics import SMALL, CaseStatistics, Objects
from lightning_dice.data_check.finding import Finding
from lightning_dice.data_check.survey import SurveyResult

FLAT = 0.01  # of the usual spread: an image of less is nearly constant
FEW_LEVELS = 8  # distinct values: a mask has few, a photograph many
UNLIKE = 16.0  # times the pixels of the smallest image
SPACED = 1.5  # times the finest spacing along an axis
FEW = 5  # cases of a split
UNEQUAL = 3.0  # times a class's share of the training split
RARE = 0.01  # share of pixels
TRIFLES = 0.1  # share of components below `SMALL` pixels
THIN = 4.0  # pixels across
MANY = 5  # components in the median case
VARIED = 20.0  # times the size of the 5th percentile has the 95th
STRANGE = 6.0  # interquartile ranges from the median
NEAR = 2.0  # interquartile ranges: cases closer than this are of one kind
ALONE = 3  # cases of one kind that are too many to be outliers


def judge_contents(found: SurveyResult) -> list[Finding]:
    """Everything that single cases and their numbers show."""
    checks: tuple[Callable[[SurveyResult], Iterable[Finding]], ...] = (
        _splits,
        _values,
        _geometry,
        _intensities,
        _absent_classes,
        _blank_masks,
        _balance,
        _objects,
    )
    return [finding for check in checks for finding in check(found)]


def cases_in_words(count: int, noun: str = "case") -> str:
    """A number with its noun.

    >>> cases_in_words(1), cases_in_words(2, "image")
    ('1 case', '2 images')
    """
    return f"{count} {noun}{'s' * (count != 1)}"


def _splits(found: SurveyResult) -> Iterator[Finding]:
    sizes = {split: found.whole(split) for split in found.sizes}
    least = int(found.facts.get("batch_size") or 1)
    if 0 < sizes.get("train", 0) < least:
        yield Finding(
            "few-cases",
            "error",
            f"the train split holds {cases_in_words(sizes['train'])}, fewer than a batch of {least}",
            "A training does not start with this.",
            f"Add cases, or set data.batch_size={sizes['train']}.",
        )
    for split in ("val", "test"):
        if 0 < sizes.get(split, 0) < FEW:
            yield Finding(
                "few-cases",
                "warning",
                f"the {split} split holds {cases_in_words(sizes[split])} only",
                "Its score hangs on single cases, and so does what is chosen by it.",
                "Add cases, or choose other shares (data.fractions).",
            )
    if sizes and "val" not in sizes:
        yield Finding(
            "no-validation",
            "warning",
            "there is no validation split",
            "No best checkpoint can be chosen, and overfitting goes unseen.",
            "Add one, or give it a share of the cases (data.fractions).",
        )
    elif sizes and "test" not in sizes:
        yield Finding(
            "no-test",
            "note",
            "there is no test split",
            "The score is that of the validation cases, by which the checkpoint was chosen: a little too good.",
            "Add one, or give it a share of the cases (data.fractions).",
        )
    names = Counter(case.key for case in found.cases)
    if twice := [name for name, count in names.items() if count > 1]:
        yield Finding(
            "equal-names",
            "error",
            f"several cases of one split have one name: {cases_in_words(len(twice), 'name')}",
            "Scores are kept by name: of such cases only one would have any.",
            "Rename them.",
            twice,
        )


def _values(found: SurveyResult) -> Iterator[Finding]:
    if strange := [case for case in found.cases if case.strange]:
        values = sorted({value for case in strange for value in case.strange})
        yield Finding(
            "unknown-labels",
            "error",
            f"labels that no class has in the masks of {cases_in_words(len(strange))}: {_listed(values)}",
            "Such a pixel has no class: losses and scores refuse it.",
            "Name all classes in data.classes, or map the values (data.label_map).",
            [case.key for case in strange],
            [", ".join(f"{value}: {count} pixels" for value, count in case.strange.items()) for case in strange],
        )
    if nonfinite := [case for case in found.cases if case.nonfinite]:
        yield Finding(
            "nonfinite-values",
            "error",
            f"values that are not finite in {cases_in_words(len(nonfinite), 'image')}",
            "One NaN makes the loss, and with it all weights, NaN.",
            "Fill them before training.",
            [case.key for case in nonfinite],
            [f"{case.nonfinite} values" for case in nonfinite],
        )
    wanted = found.facts.get("channels")
    counts = Counter(case.channels for case in found.cases)
    usual = wanted or (counts.most_common(1)[0][0] if counts else None)
    if other := [case for case in found.cases if case.channels != usual]:
        yield Finding(
            "channels",
            "error",
            f"another number of channels than the {usual} of {'data.channels' if wanted else 'the others'} in "
            f"{cases_in_words(len(other), 'image')}",
            "The network's first layer takes one number of channels.",
            f"Set data.channels={other[0].channels}, or convert the images.",
            [case.key for case in other],
            [f"{case.channels} channels" for case in other],
        )
    odd = [case for case in found.cases if case.size != case.mask_size]
    if odd := [case for case in odd if case.split == "train" or case.size == case.mask_size[::-1]]:
        turned = all(case.size == case.mask_size[::-1] for case in odd)
        yield Finding(
            "mask-sizes",
            "error",
            f"masks of another size than their images in {cases_in_words(len(odd))}"
            + (": rows and columns are exchanged" if turned else ""),
            "A mask says what each pixel is.",
            "Transpose them." if turned else "Give the mask the image's size; resize it with nearest neighbour.",
            [case.key for case in odd],
            [f"image {_size(case.size)}, mask {_size(case.mask_size)}" for case in odd],
        )


def _geometry(found: SurveyResult) -> Iterator[Finding]:
    cases = found.cases
    yield from _kinds(cases)
    spacings = [case for case in cases if case.spacing]
    if spacings and len({len(case.spacing or ()) for case in spacings}) == 1:
        table = np.array([case.spacing for case in spacings])
        ratio = table.max(0) / np.maximum(table.min(0), 1e-12)
        if ratio.max() > SPACED:
            usual_spacing = np.median(table, 0)
            far = (np.maximum(table / usual_spacing, usual_spacing / table) > math.sqrt(SPACED)).any(1)
            other = [case for case, one in zip(spacings, far, strict=True) if one]
            yield Finding(
                "spacings",
                "warning",
                f"the spacing differs up to {ratio.max():.2g} times between cases",
                "Things of one size in mm have many sizes in pixels.",
                "Resample all cases to one spacing (data=volumes and data=nnunet do: data.spacing).",
                [case.key for case in other],
                [f"{_spacing(case.spacing)} mm" for case in other],
            )
    if 0 < len(spacings) < len(cases):
        other = [case for case in cases if not case.spacing]
        yield Finding(
            "unknown-spacing",
            "note",
            f"unknown spacing of {cases_in_words(len(other))}, where others have one",
            "Their distances are told in pixels, and those of the others in mm.",
            "",
            [case.key for case in other],
        )
    pixels = [math.prod(case.size) for case in cases]
    if pixels and max(pixels) > UNLIKE * min(pixels):
        small, large = cases[int(np.argmin(pixels))], cases[int(np.argmax(pixels))]
        yield Finding(
            "sizes",
            "note",
            f"the sizes of the images are very different: {_size(small.size)} to {_size(large.size)}",
            "A crop of the training shows all of a small image and hardly anything of a large one.",
            "See that things have one size in pixels in both; else resize the images.",
            [small.key, large.key],
            [_size(small.size), _size(large.size)],
        )
    crop = tuple(found.facts.get("size") or ())
    less = [
        case
        for case in found.of("train")
        if len(crop) == len(case.size) and any(a < b for a, b in zip(case.size, crop, strict=True))
    ]
    if less:
        yield Finding(
            "smaller-than-crops",
            "note",
            f"{cases_in_words(len(less), 'training image')} smaller than the crops of {_size(crop)}",
            "They are padded; the pixels added are ignored, and cost time.",
            f"Choose a smaller data.patch_size, such as {_median_size(less)}.",
            [case.key for case in less],
            [_size(case.size) for case in less],
        )


def _kinds(cases: Sequence[CaseStatistics]) -> Iterator[Finding]:
    """Depth and colour of the files."""
    kinds = Counter(case.kind for case in cases if case.kind)
    if len(kinds) < 2:
        return
    depths = Counter(case.kind.split()[0] for case in cases if case.kind)
    usual = (depths if len(depths) > 1 else kinds).most_common(1)[0][0]
    other = [case for case in cases if case.kind and not case.kind.startswith(usual)]
    # Pictures are divided by their white; volumes are normalized by their intensities.
    divided = len(depths) > 1 and all(depth.endswith("-bit") for depth in depths)
    why = "Values are divided by the white of their depth: 12 bits in 16 come out 16 times too dark."
    if not divided:
        why = "They may come from different devices or programs, which a network can tell, and learns to."
    yield Finding(
        "kinds-of-images",
        "warning" if divided else "note",
        f"the images differ in {'depth' if divided else 'kind'}: {_listed_counts(kinds)}",
        why,
        "Save all images alike; normalize=image evens out brightness and contrast." if divided else "",
        [case.key for case in other],
        [case.kind for case in other],
    )


def _intensities(found: SurveyResult) -> Iterator[Finding]:
    cases = found.cases
    spreads = np.array([max(case.std, default=0.0) for case in cases])
    usual = float(np.median(spreads)) if len(spreads) else 0.0
    flat = [case for case, spread in zip(cases, spreads, strict=True) if spread <= FLAT * usual]
    if flat:
        yield Finding(
            "constant-images",
            "warning",
            f"{cases_in_words(len(flat), 'image')} with one value everywhere, or nearly so",
            "Nothing can be seen in them; normalized by themselves, they are enlarged noise.",
            "Look at them; remove what was not exposed, or not written completely.",
            [case.key for case in flat],
            [f"from {case.range[0]:.4g} to {case.range[4]:.4g}" for case in flat],
        )
    flat_keys = {case.key for case in flat}
    masks = [c for c in cases if c.levels is not None and c.levels <= FEW_LEVELS and c.key not in flat_keys]
    if masks:
        yield Finding(
            "images-like-masks",
            "warning",
            f"{cases_in_words(len(masks), 'image')} with {FEW_LEVELS} values or fewer, as masks have",
            "An image and its mask may have been exchanged, or an image thresholded.",
            "Look at them.",
            [case.key for case in masks],
            [f"{case.levels} values" for case in masks],
        )
    rest = [case for case in cases if case.key not in flat_keys]
    if outliers := _outliers(rest):
        yield Finding(
            "unusual-intensities",
            "note",
            f"{cases_in_words(len(outliers), 'image')} much brighter, darker or of another contrast than the rest",
            "A network sees few of their kind.",
            "normalize=image evens out brightness and contrast; augment=full varies both.",
            [case.key for case in outliers],
            [f"1 to 99 %: {case.range[1]:.3g} to {case.range[3]:.3g}" for case in outliers],
        )


def _outliers(cases: Sequence[CaseStatistics]) -> list[CaseStatistics]:
    """Images far from the middle of the data that no other ones are near to: a second kind of images is no outlier."""
    if len(cases) < 4 * ALONE:
        return []
    table = np.array([(np.mean(case.mean), case.range[1], case.range[2], case.range[3]) for case in cases])
    low, middle, high = np.percentile(table, [25, 50, 75], axis=0)
    # Where most images have a black of 0, hardly any spread is the rule, and every difference would be enormous.
    unit = np.maximum(high - low, 0.05 * float(table.max() - table.min()) + 1e-12)
    scaled = (table - middle) / unit
    far = np.flatnonzero(np.abs(scaled).max(1) > STRANGE)
    company = [int((np.abs(scaled - scaled[index]).max(1) < NEAR).sum()) for index in far]
    return [cases[index] for index, count in zip(far.tolist(), company, strict=True) if count <= ALONE]


def _absent_classes(found: SurveyResult) -> Iterator[Finding]:
    task = found.task
    for split in found.sizes:
        cases = found.of(split)
        if not cases:
            continue
        present = [any(case.objects[index].pixels for case in cases) for index in range(len(task.classes))]
        missing = [str(task.classes[index]) for index in task.counted if not present[index]]
        if not missing:
            continue
        nothing = split == "train" and not any(present[index] for index in task.objects)
        names = ", ".join(missing)
        yield Finding(
            "absent-classes",
            "error" if nothing else "warning",
            f"no pixel of the {split} split is {names}" + (": there is nothing to learn" if nothing else ""),
            "A class that never occurs cannot be learned." if split == "train" else "It has no score there.",
            "Look at the order of the names in data.classes, at data.label_map, which says what the masks' numbers mean, "
            "and at how the cases were divided.",
        )


def _blank_masks(found: SurveyResult) -> Iterator[Finding]:
    task = found.task
    ignored = [case for case in found.cases if case.pixels and case.ignored >= case.pixels]
    if ignored:
        yield Finding(
            "ignored-masks",
            "warning",
            f"{cases_in_words(len(ignored), 'mask')} with nothing but the ignored label",
            "They teach nothing, and have no score.",
            "Leave them out, or see whether the ignored label is a class: data.label_map.",
            [case.key for case in ignored],
        )
    out = {case.key for case in ignored}
    cases = [case for case in found.cases if case.key not in out]
    for split in found.sizes:
        part = [case for case in cases if case.split == split]
        empty = [case for case in part if not case.foreground(task)]
        veiled = [case for case in empty if case.ignored]
        if 2 * len(veiled) > len(empty):
            yield Finding(
                "ignored-masks",
                "warning",
                f"no foreground but ignored pixels in {cases_in_words(len(veiled), 'mask')} of the {split} split",
                "If the ignored label is foreground there, it is never learnt.",
                f"Set 'data.label_map={{{task.ignore_index}:1}}', if it is.",
                [case.key for case in veiled],
            )
            empty = [case for case in empty if not case.ignored]
        if empty and len(empty) < len(part):  # All of them is an absent class.
            yield Finding(
                "empty-masks",
                "warning" if 2 * len(empty) > len(part) else "note",
                f"empty masks in the {split} split: {len(empty)} of {len(part)}",
                "An overlap has no value there: a loss with pool=image pushes false positives down only by its policy, "
                "and scores leave such cases out."
                if split == "train"
                else "They have no Dice unless something is predicted, and then 0.",
                "Set loss.absent=penalize, if they are empty rightly." if split == "train" else "",
                [case.key for case in empty],
            )
    full = [
        case
        for case in cases
        if any(case.objects[index].pixels >= case.pixels - case.ignored for index in task.objects)
    ]
    if full:
        yield Finding(
            "full-masks",
            "warning",
            f"{cases_in_words(len(full), 'mask')} with one class everywhere",
            "Often such a mask was never drawn, or is inverted.",
            "Look at them.",
            [case.key for case in full],
            [", ".join(str(task.classes[i]) for i in task.objects if case.objects[i].pixels) for case in full],
        )
    alone = task.objects[0] if len(task.objects) == 1 else None
    total = sum(case.pixels for case in cases)
    if alone is not None and total:
        share = sum(case.objects[alone].pixels for case in cases) / total
        if share > 0.5:
            yield Finding(
                "inverted-masks",
                "note",
                f"{task.classes[alone]} is {100 * share:.0f} % of all pixels",
                "Foreground is rarely the larger part: the masks may be inverted.",
                "If they are, set 'data.label_map={0:1,1:0}'.",
            )


def _balance(found: SurveyResult) -> Iterator[Finding]:
    task = found.task
    shares: dict[Split, list[float]] = {
        split: class_shares(found.of(split), len(task.classes)) for split in found.sizes
    }
    train = shares.get("train", [])
    rare = [index for index in task.objects if train and 0 < train[index] < RARE]
    if rare:
        yield Finding(
            "rare-classes",
            "note",
            f"classes of less than {100 * RARE:g} % of the training's pixels: "
            + ", ".join(f"{task.classes[index]} {100 * train[index]:.2g} %" for index in rare),
            "Many crops hold nothing of them; cross-entropy alone forgets them.",
            "Start with loss=dice_ce, try loss=focal_tversky; larger crops (data.patch_size) show more of them.",
        )
    for split, part in shares.items():
        if split == "train" or min(len(found.of("train")), len(found.of(split))) < 2 * FEW:
            continue
        other = [
            f"{task.classes[index]} {100 * train[index]:.2g} % -> {100 * part[index]:.2g} %"
            for index in task.objects
            if train[index] > 0 < part[index] and max(train[index] / part[index], part[index] / train[index]) > UNEQUAL
        ]
        if other:
            yield Finding(
                "unequal-splits",
                "note",
                f"some classes have very different shares of train and {split}: {', '.join(other)}",
                "A score on one then says little about the other.",
                "Divide the cases anew, by chance or so that each part has its share.",
            )


def _objects(found: SurveyResult) -> Iterator[Finding]:
    task = found.task
    small, thin, many = [], [], []
    for index in task.objects:
        objects = [case.objects[index] for case in found.cases if case.objects[index].pixels]
        if not objects:
            continue
        sizes = np.concatenate([one.sizes for one in objects])
        trifles = int((sizes < SMALL).sum())
        name = task.classes[index]
        if trifles > TRIFLES * len(sizes):
            small.append(f"{name} {trifles} of {len(sizes)}")
        width = thickness(objects)
        if width < THIN:
            thin.append(f"{name} about {width:.1f}")
        low, high = np.percentile(sizes, [5, 95])
        if np.median([len(one.sizes) for one in objects]) >= MANY and high > VARIED * low and trifles < len(sizes) / 2:
            many.append(f"{name} {low:.0f} to {high:.0f}")
    if small:
        yield Finding(
            "tiny-objects",
            "note",
            f"many connected components have fewer than {SMALL} pixels: {', '.join(small)}",
            "Specks of an annotation tool, or objects at the limit of resolution: a Dice hardly sees them, while "
            "lesion-wise scores and losses count each as much as the largest.",
            "Remove specks from the masks; if they are real, use larger images and loss=lesion_wise.",
        )
    if thin:
        yield Finding(
            "thin-structures",
            "note",
            f"thin structures, in pixels across: {', '.join(thin)}",
            "An error of one pixel is much of their area, and a gap is hardly any: Dice is low and blind to breaks.",
            "Try loss=cldice or loss=skeleton_recall, and do not shrink the images.",
        )
    if many:
        yield Finding(
            "objects-of-many-sizes",
            "note",
            f"many objects of very different sizes, in pixels (5 to 95 %): {', '.join(many)}",
            "The large ones make the Dice; small ones can all be missed unnoticed.",
            "Try loss=lesion_wise, and look at lesion-wise scores too.",
        )


def class_shares(cases: Sequence[CaseStatistics], classes: int) -> list[float]:
    """The share that each class has of the pixels of some cases, the ignored ones included."""
    total = sum(case.pixels for case in cases)
    return [sum(case.objects[index].pixels for case in cases) / max(total, 1) for index in range(classes)]


def thickness(objects: Sequence[Objects]) -> float:
    """How many pixels across the things of a class are, about: of the w pixels across a bar, 2 are at its edge.

    >>> from lightning_dice.data_check.case_statistics import count_objects
    >>> bar = np.zeros((20, 200), bool)
    >>> bar[7:13] = True
    >>> thickness([count_objects(bar)])
    6.0
    """
    edge = sum(one.edge for one in objects)
    return 2 * sum(one.pixels for one in objects) / edge if edge else math.inf


def _listed(values: Sequence[object], limit: int = 8) -> str:
    return ", ".join(map(str, values[:limit])) + (f" and {len(values) - limit} more" if len(values) > limit else "")


def _listed_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common())


def _size(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _median_size(cases: Sequence[CaseStatistics]) -> str:
    return f"[{','.join(str(int(v)) for v in np.median([case.size for case in cases], axis=0))}]"


def _spacing(spacing: Sequence[float] | None) -> str:
    return " x ".join(f"{value:.3g}" for value in spacing or ())
