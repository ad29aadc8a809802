"""Run an exported ONNX model without the package that trained it.

    pip install numpy onnxruntime pillow
    python run_onnx.py picture.png mask.png

The script is beside the model, and reads all that it must know of it from the JSON file of the same name, such as
`model.json`. A third argument chooses that file, if the folder holds several models.

A model of whole pictures takes a PNG of 8 or 16 bit, gray or colour. The mask is a PNG with the values that the masks
in training had; classes that may overlap get a file each.

Every other model takes and returns arrays: `python run_onnx.py image.npy output.npy`. That is a model of volumes, one
that is run by windows, or one whose normalization this script does not know. The fields `input` and `normalization` of
the JSON file, which the script prints, tell how to make the array.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Metadata = dict[str, Any]

STANDARDIZE, NORMALIZE = "lightning_dice.data.Standardize", "torchvision.transforms.v2.Normalize"


def main() -> None:
    """Run the model on the files that the command line names."""
    path = find_metadata(sys.argv[3:4])
    metadata = json.loads(path.read_text(encoding="utf-8"))
    pictures = takes_pictures(metadata)
    if len(sys.argv) not in (3, 4):
        sys.exit(f"usage: python run_onnx.py {'picture.png mask.png' if pictures else 'image.npy output.npy'}")
    import onnxruntime

    net = onnxruntime.InferenceSession(path.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    if pictures:
        image = normalize(read_picture(sys.argv[1], metadata["input"]["channels"]), metadata["normalization"])
        output = net.run(None, {"image": image[None]})[0][0]
        write_masks(sys.argv[2], output, metadata)
    else:
        print(json.dumps({key: metadata[key] for key in ("input", "normalization", "output", "window")}, indent=2))
        np.save(sys.argv[2], net.run(None, {"image": np.load(sys.argv[1]).astype(np.float32)})[0])


def find_metadata(named: list[str]) -> Path:
    """Return the JSON file of the model: the one that is named, or the only one beside this script."""
    if named:
        return Path(named[0])
    found = [path for path in Path(__file__).parent.glob("*.json") if path.with_suffix(".onnx").is_file()]
    if len(found) != 1:
        names = ", ".join(sorted(path.name for path in found)) or "none"
        sys.exit(f"there must be one model beside {__file__}, such as model.onnx and model.json, found {names}")
    return found[0]


def takes_pictures(metadata: Metadata) -> bool:
    """Return whether the model takes whole pictures that this script can read and normalize."""
    images, normalization = metadata["input"], metadata["normalization"]
    picture = len(images["axes"]) == 4 and images["channels"] in (1, 3) and images["range"] is not None
    whole = metadata["window"] is None and images["size"] is None
    transform = str((normalization["transform"] or {}).get("_target_", ""))
    known = transform in (STANDARDIZE, NORMALIZE)
    needs_none = normalization["inside"] or (
        normalization["transform"] is None and normalization["intensities"] is None
    )
    return picture and whole and (known or needs_none)


def read_picture(path: str, channels: int) -> Array:
    """Return a picture as float32 `(channels, height, width)` in [0, 1]; gray is repeated for a model of colours."""
    from PIL import Image

    picture: Image.Image = Image.open(path)
    picture = picture.convert({"P": "RGB", "1": "L", "LA": "L"}.get(picture.mode, picture.mode))
    pixels = np.asarray(picture, np.float32) / (65535 if picture.mode.startswith("I") else 255)
    return np.dstack([pixels] * channels)[..., :channels].transpose(2, 0, 1)


def normalize(image: Array, normalization: Metadata) -> Array:
    """Normalize an image as in training, unless the model does it itself.

    >>> settings = {"inside": False, "transform": {"_target_": NORMALIZE, "mean": [0.5], "std": [0.25]}}
    >>> normalize(np.ones((1, 1, 2), np.float32), settings).tolist()
    [[[2.0, 2.0]]]
    """
    transform = normalization["transform"]
    if normalization["inside"] or transform is None:
        return image
    if transform["_target_"] == STANDARDIZE:
        deviation = image.std((1, 2), keepdims=True)
        normalized: Array = (image - image.mean((1, 2), keepdims=True)) / np.where(deviation > 1e-7, deviation, np.inf)
    else:
        mean, deviation = per_class(transform["mean"]), per_class(transform["std"])
        normalized = (image - mean) / deviation
    return normalized


def write_masks(path: str, output: Array, metadata: Metadata) -> None:
    """Write the mask of one picture; for several classes that may overlap one each, `<path>_<class>.png`."""
    from PIL import Image

    labels = find_labels(output, metadata)
    values = [entry["value"] for entry in metadata["classes"]]
    if metadata["activation"] == "softmax":
        Image.fromarray(table(values)[labels]).save(path)
        return
    masks = table([metadata["other_value"], values[0]])[labels.astype(int)]
    if len(masks) == 1:
        Image.fromarray(masks[0]).save(path)
        return
    for index, mask in enumerate(masks):
        name = metadata["classes"][index]["name"].replace("/", "_").replace("\\", "_")
        Image.fromarray(mask).save(path.replace(".png", f"_{name}.png"))


def find_labels(output: Array, metadata: Metadata) -> Array:
    """Return class ids `(height, width)` (softmax), or planes `(classes, height, width)` (sigmoid).

    Args:
        output: what the model returned for one picture: logits, probabilities or labels.
        metadata: the model's metadata.
    """
    kind, settings = metadata["output_type"], metadata["postprocessing"]
    thresholds, temperature = settings["thresholds"], settings["temperature"] or 1.0
    if kind == "labels":
        return output
    if metadata["activation"] == "softmax":
        if thresholds is not None and kind == "probabilities":
            output = output / per_class(thresholds)
        elif thresholds is not None:
            output = output - per_class([temperature * math.log(value) for value in thresholds])
        ids: Array = output.argmax(0)
        return ids
    if thresholds is None:
        thresholds = [settings["threshold"] or 0.5] * len(output)
    if kind == "logits":
        thresholds = [temperature * math.log(value / (1 - value)) for value in thresholds]
    planes: Array = output > per_class(thresholds)
    return planes


def per_class(values: list[float]) -> Array:
    """Return values of classes or channels as float32 `(classes, 1, 1)`."""
    return np.array(values, np.float32)[:, None, None]


def table(values: list[Any]) -> Array:
    """Return values or colours in the smallest unsigned type that holds them, to be indexed by labels."""
    array = np.array(values)
    return array.astype("uint8" if array.max() < 256 else "uint16")


if __name__ == "__main__":
    main()
