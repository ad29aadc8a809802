"""What a user of an exported file must know, as one JSON object: the same in the file, beside it and in the card.

`schema.json` describes it field by field, in JSON Schema (draft 2020-12); `schema_version` grows with every change that
a reader would notice.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dice.exporting.graph import Graph, axes
from lightning_dice.inference import SlidingWindow
from lightning_dice.io import read_csv

if TYPE_CHECKING:
    from lightning_dice.module import SegmentationModule

SCHEMA = Path(__file__).with_name("schema.json")
SCHEMA_VERSION = 2

_PACKAGES = ("lightning-dice", "torch", "lightning", "torchvision", "segmentation-models-pytorch", "monai")
_WRITERS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch_export": (), "safetensors": ("safetensors",)}


def describe(
    run: Mapping[str, Any],
    module: SegmentationModule,
    *,
    format: str,
    graph: Graph,
    ndim: int,
    dynamic: Sequence[str],
    minimum: int,
    size: Sequence[int] | None,
    inside: bool,
    checkpoint: Mapping[str, Any],
    folder: Path,
    license: str | None = None,
    own_scores: bool = True,
) -> dict[str, Any]:
    """The facts of a model; `schema.json` says what each means.

    Args:
        run: the run's config, resolved to plain values.
        module: trained, with its decision.
        format: of the file, as in `FORMATS`.
        graph: what it computes.
        ndim: space axes of an image.
        dynamic: the axes of a batch that may have any size.
        minimum: pixels, of space axes that do.
        size: the space axes of every image, where they are fixed.
        inside: whether the graph normalizes the image itself.
        checkpoint: as in the file, without its weights.
        folder: of the run, whose tables are read.
        license: the user's word.
        own_scores: whether the run's table of cases is of these weights and settings.
    """
    data, predictor = run["data"], module.predictor("cpu")
    decision, softmax = predictor.postprocessing, predictor.activation == "softmax"
    channels = int(data["channels"])
    classes = [str(name) for name in data["classes"]]
    labels_first = [axis for axis in axes(ndim) if axis != "channels"]
    planes = ["batch", "classes", *labels_first[1:]]
    # Of images of one size, larger ones are put together.
    window = predictor.window if size is None else SlidingWindow(size)
    fingerprint = _fingerprint(folder)
    # By which the training read other values than those of the files.
    settings = [f"data.{key}={data[key]}" for key in ("max_value", "bands", "nodata") if data.get(key) is not None]
    return {
        "schema": "lightning-dice/model",
        "schema_version": SCHEMA_VERSION,
        "name": folder.name,
        "license": license,
        "format": format,
        "graph": graph,
        "input": {
            "name": "image",
            "dtype": "float32",
            "axes": list(axes(ndim)),
            "channels": channels,
            "channel_names": _channel_names(data, channels, ndim),
            "dynamic": list(dynamic),
            "minimum": minimum,
            "size": None if size is None else list(size),
            "values": "; ".join([_VALUES[ndim > 2], *settings]),
            "range": [0.0, 1.0] if ndim < 3 and not settings else None,
            "spacing": _spacing(data, fingerprint),
            "orientation": "RAS" if ndim == 3 else None,
        },
        "normalization": {
            "inside": inside,
            "transform": _transform(run.get("normalize")),
            "intensities": _plain(data.get("normalization")),
            "fingerprint": fingerprint,
        },
        "output": {
            "name": graph,
            "dtype": "float32" if graph != "labels" else "uint8" if not softmax or len(classes) <= 256 else "int32",
            "axes": labels_first if graph == "labels" and softmax else planes,
        },
        "classes": [
            {
                "name": name,
                "channel": channel,
                "value": _stored(data, channel if softmax else 1),
                "scored": channel not in [int(index) for index in data.get("exclude_classes") or []],
            }
            for channel, name in enumerate(classes)
        ],
        "other_value": None if softmax else _stored(data, 0),
        "activation": predictor.activation,
        "postprocessing": {
            **decision.settings(),
            "threshold": None if softmax else predictor.threshold,
            "inside": graph == "labels",
            "calibration": None if decision.origin is None else Path(decision.origin).name,
        },
        "ignore_index": data.get("ignore_index"),
        "size_divisor": {"pixels": module.size_divisor, "inside": True},
        "window": None
        if window is None
        else {"size": list(window.size), "overlap": window.overlap, "importance_map": window.importance_map},
        "mirror_axes": list(predictor.mirroring.axes),
        "scores": case_scores(folder, classes) if own_scores else None,
        "training": _training(run, checkpoint, folder),
        "verification": None,
        "versions": _versions(format),
    }


_VALUES = {
    False: "pixels as floats: 8-bit values divided by 255, 16-bit values by 65535, floats as they are; rows from the "
    "top; colours in the order red, green, blue; gray repeated where the model has 3 channels",
    True: "voxels as floats, as the training's reader gives them: axes in RAS orientation, at `spacing` where it is "
    "given, intensities normalized as `normalization.intensities` names it, by `normalization.fingerprint`",
}


def thresholds(facts: Mapping[str, Any]) -> list[float]:
    """The probability of each class above which a pixel is of it (sigmoid), or by which probabilities are divided."""
    decision, classes = facts["postprocessing"], facts["classes"]
    if decision["thresholds"] is not None:
        return [float(value) for value in decision["thresholds"]]
    return [float(decision["threshold"] or 0.5)] * len(classes)


def case_scores(folder: Path, classes: Sequence[str]) -> dict[str, Any] | None:
    """The mean Dice of a run's table of cases: over the cases, of each class, and then over the classes.

    Returns:
        `None` where there is no table, or none that has scores of these classes.
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


def _training(run: Mapping[str, Any], checkpoint: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    data, trainer = run["data"], run.get("trainer") or {}
    epochs = [int(row["epoch"]) for row in read_csv(folder / "metrics.csv") if "epoch" in row]
    return {
        "network": _plain(run["module"]["net"]),
        "loss": _plain(run["module"]["loss"]),
        "optimizer": _plain(run["module"].get("optimizer")),
        "scheduler": _plain(run["module"].get("scheduler")),
        "size": _plain(data.get("patch_size")),
        "batch_size": data.get("batch_size"),
        "precision": trainer.get("precision"),
        "seed": run.get("seed"),
        "epochs": max(epochs) + 1 if epochs else None,
        "epoch": checkpoint.get("epoch"),
        "step": checkpoint.get("global_step"),
    }


def _transform(config: Any) -> Any:
    """The config of a normalization; `None` for one that changes nothing."""
    same = isinstance(config, Mapping) and str(config.get("_target_")).endswith(".Identity")
    return None if same else _plain(config)


def _channel_names(data: Mapping[str, Any], channels: int, ndim: int) -> list[str] | None:
    named = data.get("channel_names")
    if named:
        return [str(name) for name in named]
    return {1: ["gray"], 3: ["red", "green", "blue"]}.get(channels) if ndim < 3 else None


def _stored(data: Mapping[str, Any], label: int) -> int | list[int]:
    """What stands in a mask's file for a label: a value, or a colour."""
    colors = data.get("colors")
    if colors and label < len(colors):
        return [int(part) for part in colors[label]]
    values = data.get("label_map") or {}
    for old, new in values.items():
        if int(new) == label and str(old).lstrip("-").isdigit():
            return int(old)
    return label


def _fingerprint(folder: Path) -> dict[str, Any] | None:
    """Facts of the training's volumes by which intensities were normalized, where the run has them."""
    path = folder / "fingerprint.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        return None
    # The names of the cases are nobody's business.
    return {key: value for key, value in found.items() if key != "cases"}


def _spacing(data: Mapping[str, Any], fingerprint: Mapping[str, Any] | None) -> list[float | None] | None:
    """What the network's images are resampled to, in mm along each axis."""
    asked = data.get("spacing")
    if asked == "median":
        asked = (fingerprint or {}).get("median_spacing")
    return (
        None if asked is None or isinstance(asked, str) else [None if step is None else float(step) for step in asked]
    )


def _versions(format: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_WRITERS[format]):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found.setdefault("lightning-dice", "unknown")
    return found


def _plain(value: Any) -> Any:
    """Without tuples and what JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
