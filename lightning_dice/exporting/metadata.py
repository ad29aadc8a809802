"""The metadata of an exported model, one JSON object: the same in the file, beside it and in the model card.

`schema.json` describes it field by field, in JSON Schema (draft 2020-12). `schema_version` grows with every change that
a reader would notice.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_dice.exporting.graph import InputShape, OutputType, axes
from lightning_dice.inference import SlidingWindow
from lightning_dice.io import read_csv

if TYPE_CHECKING:
    from lightning_dice.inference import Predictor
    from lightning_dice.module import SegmentationModule

SCHEMA = Path(__file__).with_name("schema.json")
SCHEMA_VERSION = 2

_PACKAGES = ("lightning-dice", "torch", "lightning", "torchvision", "segmentation-models-pytorch", "monai")
_WRITERS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch_export": (), "safetensors": ("safetensors",)}
_IMAGE_VALUES = (
    "pixels as floats: 8-bit values divided by 255, 16-bit values by 65535, floats as they are; rows from the top; "
    "colours in the order red, green, blue; gray repeated where the model has 3 channels"
)
_VOLUME_VALUES = (
    "voxels as floats, as the training's reader returns them: axes in RAS orientation, at `spacing` where it is given, "
    "intensities normalized as `normalization.intensities` names it, by `normalization.fingerprint`"
)


class TrainedRun(NamedTuple):
    """The run that trained a model.

    Attributes:
        config: the run's config, resolved to plain values.
        folder: the run's folder, whose tables are read.
        checkpoint: the checkpoint's content, without the weights.
        has_scores: whether the run's table of cases was made with these weights and settings.
    """

    config: Mapping[str, Any]
    folder: Path
    checkpoint: Mapping[str, Any]
    has_scores: bool = True


class ExportedFile(NamedTuple):
    """An exported file.

    Attributes:
        format: a key of `FORMATS`.
        output_type: what the file's function returns.
        input_shape: the shapes of images that it accepts.
        normalizes: whether it normalizes the images.
        license: the model's license, in the user's words.
    """

    format: str
    output_type: OutputType
    input_shape: InputShape
    normalizes: bool = False
    license: str | None = None


def model_metadata(run: TrainedRun, module: SegmentationModule, file: ExportedFile) -> dict[str, Any]:
    """Return the metadata of a model; `schema.json` explains each field.

    Args:
        run: the run that trained the module.
        module: the trained and calibrated module.
        file: the file to be written.
    """
    data, predictor = run.config["data"], module.predictor("cpu")
    window, size = predictor.window, file.input_shape.size
    if size is not None:
        # Larger images are predicted in windows of this size.
        window = SlidingWindow(size)
    fingerprint = _fingerprint(run.folder)
    return {
        "schema": "lightning-dice/model",
        "schema_version": SCHEMA_VERSION,
        "name": run.folder.name,
        "license": file.license,
        "format": file.format,
        "output_type": file.output_type,
        "input": _input(data, file.input_shape, fingerprint),
        "normalization": {
            "inside": file.normalizes,
            "transform": _transform(run.config.get("normalize")),
            "intensities": _plain(data.get("normalization")),
            "fingerprint": fingerprint,
        },
        "output": _output(file, predictor.activation, len(data["classes"])),
        "classes": _classes(data, predictor.activation),
        "other_value": None if predictor.activation == "softmax" else _stored_value(data, 0),
        "activation": predictor.activation,
        "postprocessing": _postprocessing(predictor, inside=file.output_type == "labels"),
        "ignore_index": data.get("ignore_index"),
        "size_divisor": {"pixels": module.size_divisor, "inside": True},
        "window": None
        if window is None
        else {"size": list(window.size), "overlap": window.overlap, "importance_map": window.importance_map},
        "mirror_axes": list(predictor.mirroring.axes),
        "scores": case_scores(run.folder, [str(name) for name in data["classes"]]) if run.has_scores else None,
        "training": _training(run),
        "verification": None,
        "versions": _versions(file.format),
    }


def _input(data: Mapping[str, Any], shape: InputShape, fingerprint: Mapping[str, Any] | None) -> dict[str, Any]:
    is_volume, channels = shape.ndim > 2, int(data["channels"])
    # With these settings, training reads other values than those of the files.
    settings = [f"data.{key}={data[key]}" for key in ("max_value", "bands", "nodata") if data.get(key) is not None]
    return {
        "name": "image",
        "dtype": "float32",
        "axes": list(axes(shape.ndim)),
        "channels": channels,
        "channel_names": _channel_names(data, channels, is_volume=is_volume),
        "dynamic": list(shape.dynamic),
        "minimum": shape.minimum,
        "size": None if shape.size is None else list(shape.size),
        "values": "; ".join([_VOLUME_VALUES if is_volume else _IMAGE_VALUES, *settings]),
        "range": None if is_volume or settings else [0.0, 1.0],
        "spacing": _spacing(data, fingerprint),
        "orientation": "RAS" if shape.ndim == 3 else None,
    }


def _output(file: ExportedFile, activation: str, classes: int) -> dict[str, Any]:
    batch, _, *space = axes(file.input_shape.ndim)
    are_labels, are_ids = file.output_type == "labels", activation == "softmax"
    label_type = "int32" if are_ids and classes > 256 else "uint8"
    return {
        "name": file.output_type,
        "dtype": label_type if are_labels else "float32",
        "axes": [batch, *space] if are_labels and are_ids else [batch, "classes", *space],
    }


def _classes(data: Mapping[str, Any], activation: str) -> list[dict[str, Any]]:
    excluded = [int(index) for index in data.get("exclude_classes") or []]
    return [
        {
            "name": str(name),
            "channel": channel,
            "value": _stored_value(data, channel if activation == "softmax" else 1),
            "scored": channel not in excluded,
        }
        for channel, name in enumerate(data["classes"])
    ]


def _postprocessing(predictor: Predictor, *, inside: bool) -> dict[str, Any]:
    origin = predictor.postprocessing.origin
    return {
        **predictor.postprocessing.settings(),
        "threshold": None if predictor.activation == "softmax" else predictor.threshold,
        "inside": inside,
        "calibration": None if origin is None else Path(origin).name,
    }


def case_scores(folder: Path, classes: Sequence[str]) -> dict[str, Any] | None:
    """Return the mean Dice of a run's table of cases: over the cases, for each class, and then over the classes.

    Returns:
        `None` if there is no table, or it has no scores of these classes.
    """
    table = read_csv(folder / "cases.csv")
    split = next((name for name in ("test", "val") if any(row.get("split") == name for row in table)), None)
    rows = [row for row in table if row.get("split") == split]
    each: dict[str, dict[str, Any]] = {}
    for name in classes:
        values = [float(row[f"dice/{name}"]) for row in rows if f"dice/{name}" in row]
        values = [value for value in values if math.isfinite(value)]
        if values:
            each[name] = {"dice": sum(values) / len(values), "cases": len(values)}
    if not each:
        return None
    mean = sum(entry["dice"] for entry in each.values()) / len(each)
    return {"split": split, "cases": len(rows), "dice": mean, "classes": each}


def _training(run: TrainedRun) -> dict[str, Any]:
    data, module, trainer = run.config["data"], run.config["module"], run.config.get("trainer") or {}
    epochs = [int(row["epoch"]) for row in read_csv(run.folder / "metrics.csv") if "epoch" in row]
    return {
        "network": _plain(module["net"]),
        "loss": _plain(module["loss"]),
        "optimizer": _plain(module.get("optimizer")),
        "scheduler": _plain(module.get("scheduler")),
        "size": _plain(data.get("patch_size")),
        "batch_size": data.get("batch_size"),
        "precision": trainer.get("precision"),
        "seed": run.config.get("seed"),
        "epochs": max(epochs) + 1 if epochs else None,
        "epoch": run.checkpoint.get("epoch"),
        "step": run.checkpoint.get("global_step"),
    }


def _transform(config: Any) -> Any:
    """Return the config of a normalization; `None` for one that changes nothing."""
    is_identity = isinstance(config, Mapping) and str(config.get("_target_")).endswith(".Identity")
    return None if is_identity else _plain(config)


def _channel_names(data: Mapping[str, Any], channels: int, *, is_volume: bool) -> list[str] | None:
    names = data.get("channel_names")
    if names:
        return [str(name) for name in names]
    return None if is_volume else {1: ["gray"], 3: ["red", "green", "blue"]}.get(channels)


def _stored_value(data: Mapping[str, Any], label: int) -> int | list[int]:
    """Return the value or colour of a label in a mask's file."""
    colors = data.get("colors")
    if colors and label < len(colors):
        return [int(part) for part in colors[label]]
    for old, new in (data.get("label_map") or {}).items():
        if int(new) == label and str(old).lstrip("-").isdigit():
            return int(old)
    return label


def _fingerprint(folder: Path) -> dict[str, Any] | None:
    """Return the statistics of the training's volumes by which intensities are normalized, if the run has them."""
    path = folder / "fingerprint.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        return None
    # The names of cases may be confidential.
    return {key: value for key, value in found.items() if key != "cases"}


def _spacing(data: Mapping[str, Any], fingerprint: Mapping[str, Any] | None) -> list[float | None] | None:
    """Return the spacing that images are resampled to, in mm along each axis."""
    spacing = data.get("spacing")
    if spacing == "median":
        spacing = (fingerprint or {}).get("median_spacing")
    if spacing is None or isinstance(spacing, str):
        return None
    return [None if step is None else float(step) for step in spacing]


def _versions(format: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_WRITERS[format]):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found.setdefault("lightning-dice", "unknown")
    return found


def _plain(value: Any) -> Any:
    """Return a value without tuples and other types that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
