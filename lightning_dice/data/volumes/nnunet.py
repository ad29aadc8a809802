"""nnU-Net's raw data sets: `dataset.json`, `imagesTr`, `labelsTr`, `imagesTs`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.interfaces import Split
from lightning_dice.data.label_map import LabelMap
from lightning_dice.data.splits import complete_splits
from lightning_dice.data.volumes.file_layout import VolumeLayout, VolumePair, cases_of, pair
from lightning_dice.data.volumes.nifti import EXTENSIONS
from lightning_dice.data.volumes.sources import VolumeSet, checked_fractions

DATASET = "dataset.json"
SPLITS = "splits_final.json"
Labels = Mapping[str, int | Sequence[int]]


class NnunetSource(VolumeSet):
    """A data set in nnU-Net's raw layout (version 2, and what version 1 and the Medical Segmentation Decathlon have).

    With labels of one value each, the classes exclude each other (softmax). Where a label is a list of values, all are
    regions that may overlap (sigmoid), and masks are written with the values of `regions_class_order`, as nnU-Net does:
    what of several regions a voxel is written as, is the last of them. Read again, such a mask has every region that
    this value belongs to: scores of written masks differ from those of a network that predicts a region outside
    another one that contains it. The label `ignore` counts as nothing.

    **Splits.** Fold `fold` of `splits_final.json`, where that is there, and test on `labelsTs`, if there is such a
    folder. Else train and val are drawn, and test too, unless there is `labelsTs`. Images of `imagesTs` without a mask
    are for prediction.

    Args:
        root: the folder, such as `nnUNet_raw/Dataset004_Hippocampus`.
        labels: name -> value, or values of a region; as in `dataset.json`, which is read if it is `None`.
        regions_class_order: the value that each region is written as; the same.
        channel_names: by which channels are normalized: `["CT"]`; the same.
        ignore_index: what the label `ignore` becomes in memory.
        fold: of `splits_final.json`.
        fractions: of the cases for train, val and test, where these are drawn.
        seed: of this draw.
        normalization: by channel names, or overriding them; see `VolumeSet`, as for all other settings.
        settings: of `VolumeSet`.

    Raises:
        ValueError: for settings that cannot be.
        DataError: where `dataset.json` has to be read and cannot be.
    """

    def __init__(
        self,
        root: str | Path,
        labels: Labels | None = None,
        regions_class_order: Sequence[int] | None = None,
        channel_names: Sequence[str] | None = None,
        ignore_index: int | None = 255,
        fold: int = 0,
        fractions: Sequence[float] = (0.7, 0.15, 0.15),
        seed: int = 0,
        normalization: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        if labels is None or channel_names is None:
            facts = read_dataset(root)
            labels = facts["labels"] if labels is None else labels
            regions_class_order = facts["regions_class_order"] if regions_class_order is None else regions_class_order
            channel_names = facts["channel_names"] if channel_names is None else channel_names
        names = [str(name) for name in channel_names]
        shares = checked_fractions(fractions)
        super().__init__(
            root,
            scan=lambda: scan_nnunet(self.root, len(names), fold, shares, seed),
            labels=label_map(labels, regions_class_order, ignore_index),
            normalization=names if normalization is None else normalization,
            channels=len(names),
            **settings,
        )


def read_dataset(root: str | Path) -> dict[str, Any]:
    """What `dataset.json` says, in the form of version 2.

    Returns:
        `channel_names` in order, `labels` by name in the order of their values, `regions_class_order` or `None`.

    Raises:
        DataError: it is not there, cannot be read, or is of images that are not NIfTI.
    """
    path = Path(root).expanduser() / DATASET
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as missing:
        what = "there is no such file, by which an nnU-Net data set is known"
        raise DataProblem(
            what, path, "Set data.root to its folder; for other folders choose data=volumes."
        ) from missing
    except (OSError, ValueError) as error:
        raise DataProblem(f"cannot be read as JSON ({error})", path, "Mend it.") from error
    if not isinstance(content, Mapping):
        raise DataProblem(f"must hold an object, got a {type(content).__name__}", path, "Mend it.")
    channels: Any = content.get("channel_names", content.get("modality"))
    labels: Any = content.get("labels")
    for key, value in (("channel_names", channels), ("labels", labels)):
        if not isinstance(value, Mapping) or not value:
            raise DataProblem(f"must have an object {key}, got {value!r}", path, "See nnU-Net's dataset_format.md.")
    ending = str(content.get("file_ending", ".nii.gz"))
    if ending.lower() not in EXTENSIONS:
        remedy = "For pictures: data=folder data.images=imagesTr data.masks=labelsTr data.classes=[...]."
        raise DataProblem(f"says file_ending {ending!r}, NIfTI is read ({' '.join(EXTENSIONS)})", path, remedy)
    try:
        names = [str(channels[key]) for key in sorted(channels, key=int)]
        if all(str(key).lstrip("-").isdigit() for key in labels):  # Version 1: value -> name.
            labels = {str(name): int(value) for value, name in labels.items()}
        labels = {
            str(name): [int(v) for v in value] if isinstance(value, list) else int(value)
            for name, value in labels.items()
        }
        order = content.get("regions_class_order")
        order = None if order is None else [int(value) for value in order]
    except (ValueError, TypeError) as error:
        raise DataProblem(f"has channel_names, labels or an order that are no whole numbers ({error})", path) from error
    regions = any(isinstance(value, list) and len(value) > 1 for value in labels.values())
    if not regions:
        labels = dict(sorted(labels.items(), key=lambda entry: entry[1][0] if isinstance(entry[1], list) else entry[1]))
    return {"channel_names": names, "labels": labels, "regions_class_order": order if regions else None}


def label_facts(labels: Labels) -> dict[str, Any]:
    """What follows from labels: `classes`, `activation` and `exclude_classes`.

    >>> label_facts({"background": 0, "liver": 1, "ignore": 2})
    {'classes': ['background', 'liver'], 'activation': 'softmax', 'exclude_classes': [0]}
    >>> label_facts({"background": 0, "whole": [1, 2], "core": 2})
    {'classes': ['whole', 'core'], 'activation': 'sigmoid', 'exclude_classes': []}
    """
    values = _values(labels)
    regions = any(len(part) > 1 for part in values.values())
    names = [name for name, part in values.items() if name != "ignore" and not (regions and set(part) == {0})]
    return {
        "classes": names,
        "activation": "sigmoid" if regions else "softmax",
        "exclude_classes": [] if regions else [0],
    }


def label_map(labels: Labels, order: Sequence[int] | None, ignore_index: int | None) -> LabelMap:
    """The classes of nnU-Net's labels.

    Raises:
        ValueError: there is no background, or a label is not what it can be.
    """
    facts, values = label_facts(labels), _values(labels)
    if values.get("background") != (0,) and (0,) not in values.values():
        raise ValueError(f"labels must have a background of 0, got {dict(labels)}")
    if len(values.get("ignore", (0,))) != 1:
        raise ValueError(f"labels must have one value for ignore, got {labels['ignore']}")
    if facts["activation"] == "softmax" and values[facts["classes"][0]] != (0,):
        raise ValueError(f"labels must begin with the background of 0, got {dict(labels)}")
    regions = facts["activation"] == "sigmoid"
    if regions and order is None:
        raise ValueError(f"regions_class_order must be given for regions, a value for each of {facts['classes']}")
    return LabelMap(
        tuple(facts["classes"]),
        tuple(values[name] for name in facts["classes"]),
        facts["activation"],
        ignored=values.get("ignore", ()),
        ignore_index=ignore_index,
        written=tuple(int(value) for value in order) if regions and order is not None else None,
    )


def scan_nnunet(root: Path, channels: int, fold: int, fractions: Sequence[float], seed: int) -> VolumeLayout:
    """The cases of a raw data set; see `NnunetSource` for its splits."""
    layout = VolumeLayout()
    problems = layout.problems
    for name in ("imagesTr", "labelsTr"):
        if not (root / name).is_dir():
            remedy = "Set data.root to an nnU-Net raw data set."
            problems.append(DataProblem("there is no such folder", root / name, remedy))
    if problems:
        return layout
    train = pair(cases_of(root / "imagesTr", channels, problems), [root / "labelsTr"], problems)
    test: list[VolumePair] | None = None
    if (root / "labelsTs").is_dir() and (root / "imagesTs").is_dir():
        images = cases_of(root / "imagesTs", channels, problems)
        test = pair(images, [root / "labelsTs"], problems, all_images=False)
        if len(test) < len(images):
            layout.notes.append(f"{len(images) - len(test)} of the {len(images)} images of imagesTs have no mask")
    if (root / SPLITS).is_file():
        layout.pairs = _fold(root / SPLITS, fold, train, problems)
        if test:
            layout.pairs["test"] = test
        return layout
    parts: dict[Split | None, list[VolumePair]] = {"train": train, "test": test} if test else {None: train}
    layout.pairs = complete_splits(parts, fractions, seed, problems, root / "imagesTr")
    return layout


def _fold(
    path: Path, fold: int, pairs: Sequence[VolumePair], problems: list[DataProblem]
) -> dict[Split, list[VolumePair]]:
    try:
        folds = json.loads(path.read_text(encoding="utf-8"))
        wanted = {split: [str(case) for case in folds[fold][split]] for split in ("train", "val")}
    except IndexError:
        problems.append(DataProblem(f"has the folds 0 to {len(folds) - 1}, got {fold}", path, "Set data.fold."))
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"must hold a list of folds with train and val ({type(error).__name__}: {error})"
        problems.append(DataProblem(what, path, "Remove it, to draw splits."))
        return {}
    known = {found.case: found for found in pairs}
    missing = [case for cases in wanted.values() for case in cases if case not in known]
    if missing and not problems:
        what = f"names {len(missing)} cases that imagesTr does not have, such as {missing[0]}"
        problems.append(DataProblem(what, path, "Add them, or remove them from the file."))
    both = sorted(set(wanted["train"]) & set(wanted["val"]))
    if both:
        problems.append(DataProblem(f"has {both[0]} in train and val of fold {fold}", path, "Mend it."))
    order: tuple[Split, ...] = ("train", "val")
    return {split: [known[case] for case in sorted(wanted[split]) if case in known] for split in order}


def _values(labels: Labels) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, value in labels.items():
        parts = [value] if isinstance(value, int) else list(value) if isinstance(value, Sequence) else []
        if not parts or isinstance(value, (str, bool)) or not all(isinstance(part, int) for part in parts):
            raise ValueError(f"labels must be a value or a list of values by name, got {name}: {value!r}")
        found[str(name)] = tuple(int(part) for part in parts)
    return found
