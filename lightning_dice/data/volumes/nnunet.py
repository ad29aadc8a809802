"""Raw data sets of nnU-Net: `dataset.json`, `imagesTr`, `labelsTr`, `imagesTs`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.interfaces import Split
from lightning_dice.data.label_map import LabelMap
from lightning_dice.data.splits import SplitSettings, complete_splits
from lightning_dice.data.volumes.file_layout import VolumeLayout, VolumePair, find_images, match_masks
from lightning_dice.data.volumes.nifti import EXTENSIONS
from lightning_dice.data.volumes.preprocessing import VolumePreprocessing
from lightning_dice.data.volumes.sources import BaseVolumeSource

DATASET_FILE = "dataset.json"
SPLITS_FILE = "splits_final.json"
Labels = Mapping[str, int | Sequence[int]]


class NnunetSource(BaseVolumeSource):
    """A data set in nnU-Net's raw layout: version 2, version 1, or the Medical Segmentation Decathlon.

    If each label has one value, the classes exclude each other (softmax). If a label has a list of values, all labels
    are regions, which may overlap (sigmoid). Masks of regions are written as nnU-Net does: a voxel gets the value in
    `regions_class_order` of the last of its regions. When such a mask is read again, a voxel is in every region that
    has its value; scores of written masks therefore differ from those of the network if it predicts a region outside
    of one that contains it. Voxels with the label `ignore` are ignored.

    **Splits.** Train and val are fold `fold` of `splits_final.json`, and test is `labelsTs`, if these exist. Without
    `splits_final.json`, train and val are drawn, and without `labelsTs` test is too. Images of `imagesTs` without a
    mask can only be predicted.

    Args:
        root: the folder, such as `nnUNet_raw/Dataset004_Hippocampus`.
        dataset_json: `labels`, `channel_names` and for regions `regions_class_order`, as in `dataset.json`, with
            `channel_names` as a list. Keys that are missing or `None` are read from the file.
        ignore_index: the label that `ignore` becomes in memory.
        fold: the fold of `splits_final.json` to use.
        split_settings: how splits are drawn where the data set has none.
        preprocessing: as for `BaseVolumeSource`; `normalization=None` follows the channel names.
        fingerprint: the same.
        check_affine: the same.
        workers: the same.

    Raises:
        ValueError: for a setting out of its range.
        DataError: `dataset.json` is needed and cannot be read.

    >>> dataset = {"labels": {"background": 0, "liver": 1}, "channel_names": ["CT"]}
    >>> NnunetSource("nnUNet_raw/Dataset003_Liver", dataset).schemes
    ('ct',)
    """

    def __init__(
        self,
        root: str | Path,
        dataset_json: Mapping[str, Any] | None = None,
        ignore_index: int | None = 255,
        fold: int = 0,
        split_settings: SplitSettings | None = None,
        preprocessing: VolumePreprocessing | None = None,
        fingerprint: str | Path | None = None,
        check_affine: bool = True,
        workers: int | None = None,
    ) -> None:
        facts = {key: value for key, value in (dataset_json or {}).items() if value is not None}
        if "labels" not in facts or "channel_names" not in facts:
            facts = {**read_dataset_json(root), **facts}
        names = [str(name) for name in facts["channel_names"]]
        labels = make_label_map(facts["labels"], facts.get("regions_class_order"), ignore_index)
        preprocessing = preprocessing or VolumePreprocessing()
        if preprocessing.normalization is None:
            preprocessing = replace(preprocessing, normalization=names)
        super().__init__(root, labels, len(names), preprocessing, fingerprint, check_affine, workers)
        self.fold, self.split_settings = fold, split_settings or SplitSettings()
        if self.split_settings.splits is not None or self.split_settings.split_files is not None:
            raise ValueError(f"split_settings must have only fractions and seed here, got {self.split_settings}")

    def _find_files(self) -> VolumeLayout:
        return find_nnunet_pairs(self.root, self.channels, self.fold, self.split_settings)


def read_dataset_json(root: str | Path) -> dict[str, Any]:
    """Read `dataset.json` in the form of version 2.

    Returns:
        `channel_names` in order, `labels` by name in the order of their values, `regions_class_order` or `None`.

    Raises:
        DataError: it does not exist, cannot be read, or the images are not NIfTI.

    >>> import tempfile
    >>> content = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "liver"}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "dataset.json").write_text(json.dumps(content))
    ...     read_dataset_json(folder)
    {'channel_names': ['MRI'], 'labels': {'background': 0, 'liver': 1}, 'regions_class_order': None}
    """
    path = Path(root).expanduser() / DATASET_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as missing:
        remedy = "Set data.root to an nnU-Net data set; for other folders choose data=volumes."
        raise DataProblem("does not exist, but every nnU-Net data set has it", path, remedy) from missing
    except (OSError, ValueError) as error:
        raise DataProblem(f"cannot be read as JSON ({error})", path, "Correct it.") from error
    if not isinstance(content, Mapping):
        raise DataProblem(f"must hold an object, got a {type(content).__name__}", path, "Correct it.")
    channels: Any = content.get("channel_names", content.get("modality"))
    labels: Any = content.get("labels")
    for key, value in (("channel_names", channels), ("labels", labels)):
        if not isinstance(value, Mapping) or not value:
            raise DataProblem(f"must have an object {key}, got {value!r}", path, "See nnU-Net's dataset_format.md.")
    ending = str(content.get("file_ending", ".nii.gz"))
    if ending.lower() not in EXTENSIONS:
        remedy = "For pictures: data=folder data.images=imagesTr data.masks=labelsTr data.classes=[...]."
        raise DataProblem(f"must have a NIfTI file_ending ({' '.join(EXTENSIONS)}), got {ending!r}", path, remedy)
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
        what = f"must have whole numbers in channel_names, labels and regions_class_order ({error})"
        raise DataProblem(what, path) from error
    regions = any(isinstance(value, list) and len(value) > 1 for value in labels.values())
    if not regions:
        labels = dict(sorted(labels.items(), key=lambda entry: entry[1][0] if isinstance(entry[1], list) else entry[1]))
    return {"channel_names": names, "labels": labels, "regions_class_order": order if regions else None}


def settings_from_labels(labels: Labels) -> dict[str, Any]:
    """Return the settings `classes`, `activation` and `exclude_classes` that follow from labels.

    >>> settings_from_labels({"background": 0, "liver": 1, "ignore": 2})
    {'classes': ['background', 'liver'], 'activation': 'softmax', 'exclude_classes': [0]}
    >>> settings_from_labels({"background": 0, "whole": [1, 2], "core": 2})
    {'classes': ['whole', 'core'], 'activation': 'sigmoid', 'exclude_classes': []}
    """
    values = _label_values(labels)
    regions = any(len(part) > 1 for part in values.values())
    names = [name for name, part in values.items() if name != "ignore" and not (regions and set(part) == {0})]
    return {
        "classes": names,
        "activation": "sigmoid" if regions else "softmax",
        "exclude_classes": [] if regions else [0],
    }


def make_label_map(labels: Labels, order: Sequence[int] | None, ignore_index: int | None) -> LabelMap:
    """Return the classes of nnU-Net's labels.

    Args:
        labels: as in `dataset.json`.
        order: `regions_class_order`, required for regions.
        ignore_index: the label that `ignore` becomes.

    Raises:
        ValueError: there is no background, or a label is not a value or a list of values.

    >>> make_label_map({"background": 0, "whole": [1, 2], "core": 2}, order=[1, 2], ignore_index=255).values
    ((1, 2), (2,))
    """
    facts, values = settings_from_labels(labels), _label_values(labels)
    if values.get("background") != (0,) and (0,) not in values.values():
        raise ValueError(f"labels must have a background of 0, got {dict(labels)}")
    if len(values.get("ignore", (0,))) != 1:
        raise ValueError(f"labels must have one value for ignore, got {labels['ignore']}")
    if facts["activation"] == "softmax" and values[facts["classes"][0]] != (0,):
        raise ValueError(f"labels must begin with the background of 0, got {dict(labels)}")
    regions = facts["activation"] == "sigmoid"
    if regions and order is None:
        raise ValueError(f"regions_class_order must have a value for each of the regions {facts['classes']}, got None")
    return LabelMap(
        tuple(facts["classes"]),
        tuple(values[name] for name in facts["classes"]),
        facts["activation"],
        ignored=values.get("ignore", ()),
        ignore_index=ignore_index,
        written=tuple(int(value) for value in order) if regions and order is not None else None,
    )


def find_nnunet_pairs(root: Path, channels: int, fold: int, split_settings: SplitSettings) -> VolumeLayout:
    """Find the cases of a raw data set; see `NnunetSource` for its splits."""
    layout = VolumeLayout()
    problems = layout.problems
    for name in ("imagesTr", "labelsTr"):
        if not (root / name).is_dir():
            remedy = "Set data.root to an nnU-Net raw data set."
            problems.append(DataProblem("does not exist", root / name, remedy))
    if problems:
        return layout
    train = match_masks(find_images(root / "imagesTr", channels, problems), [root / "labelsTr"], problems)
    test: list[VolumePair] | None = None
    if (root / "labelsTs").is_dir() and (root / "imagesTs").is_dir():
        images = find_images(root / "imagesTs", channels, problems)
        test = match_masks(images, [root / "labelsTs"], problems, all_images=False)
        if len(test) < len(images):
            layout.notes.append(f"{len(images) - len(test)} of the {len(images)} images of imagesTs have no mask")
    if (root / SPLITS_FILE).is_file():
        layout.pairs = _read_fold(root / SPLITS_FILE, fold, train, problems)
        if test:
            layout.pairs["test"] = test
        return layout
    parts: dict[Split | None, list[VolumePair]] = {"train": train, "test": test} if test else {None: train}
    layout.pairs = complete_splits(parts, split_settings, problems, root / "imagesTr")
    return layout


def _read_fold(
    path: Path, fold: int, pairs: Sequence[VolumePair], problems: list[DataProblem]
) -> dict[Split, list[VolumePair]]:
    try:
        folds = json.loads(path.read_text(encoding="utf-8"))
        wanted = {split: [str(case) for case in folds[fold][split]] for split in ("train", "val")}
    except IndexError:
        problems.append(DataProblem(f"has folds 0 to {len(folds) - 1}, got {fold}", path, "Set data.fold."))
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
        problems.append(DataProblem(f"has {both[0]} in train and val of fold {fold}", path, "Correct it."))
    order: tuple[Split, ...] = ("train", "val")
    return {split: [known[case] for case in sorted(wanted[split]) if case in known] for split in order}


def _label_values(labels: Labels) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, value in labels.items():
        parts = [value] if isinstance(value, int) else list(value) if isinstance(value, Sequence) else []
        if not parts or isinstance(value, (str, bool)) or not all(isinstance(part, int) for part in parts):
            raise ValueError(f"labels must be a value or a list of values by name, got {name}: {value!r}")
        found[str(name)] = tuple(int(part) for part in parts)
    return found
