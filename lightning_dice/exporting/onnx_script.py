"""A script of ten lines that runs an exported ONNX file without this package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_dice.exporting.metadata import thresholds


def script(facts: Mapping[str, Any], model: str) -> str:
    """Python that makes a mask of an image by ONNX Runtime, NumPy and Pillow.

    Of pictures it reads a PNG, 8 or 16 bit, gray or colour, and writes the mask as a PNG with the values that the
    training's masks had; classes that may overlap get a file each. Of volumes, of normalizations that are not known to
    it and of models that run by windows it takes an array as the graph does, a `.npy`, and says so.

    Args:
        facts: of the model.
        model: the name of the file, beside which the script will lie.
    """
    ready = _prepared(facts)
    pictures = len(facts["input"]["axes"]) == 4 and facts["input"]["channels"] in (1, 3)
    pictures = pictures and facts["input"]["range"] is not None
    whole = facts["window"] is None and facts["input"]["size"] is None
    if ready is None or not pictures or not whole:
        return _of_arrays(facts, model)
    channels = facts["input"]["channels"]
    lines = [
        "import pathlib",
        "import sys",
        "",
        "import numpy as np",
        "import onnxruntime",
        "from PIL import Image",
        "",
        "if len(sys.argv) != 3:",
        '    sys.exit("usage: python run_onnx.py picture.png mask.png")',
        f'model = pathlib.Path(__file__).with_name("{model}")',
        'net = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])',
        "picture = Image.open(sys.argv[1])",
        'picture = picture.convert({"P": "RGB", "1": "L", "LA": "L"}.get(picture.mode, picture.mode))',
        'pixels = np.asarray(picture, np.float32) / (65535 if picture.mode.startswith("I") else 255)',
        f"image = np.dstack([pixels] * {channels})[..., :{channels}].transpose(2, 0, 1)",
        *ready,
        'output = net.run(None, {"image": image[None]})[0][0]',
        *_labels(facts),
    ]
    about = [
        f"# {facts['name']}: a mask of a picture, without the package that trained the model.",
        "#   python run_onnx.py picture.png mask.png",
        "# pip install numpy onnxruntime pillow",
    ]
    return "\n".join([*about, *lines]) + "\n"


def _prepared(facts: Mapping[str, Any]) -> list[str] | None:
    """Lines that normalize `image`; `None` where it is not known how."""
    normalization = facts["normalization"]
    transform = normalization["transform"]
    if normalization["inside"] or (transform is None and normalization["intensities"] is None):
        return []
    target = str((transform or {}).get("_target_", ""))
    if target == "lightning_dice.data.Standardize":
        return [
            "std = image.std((1, 2), keepdims=True)",
            "image = (image - image.mean((1, 2), keepdims=True)) / np.where(std > 1e-7, std, np.inf)",
        ]
    if target == "torchvision.transforms.v2.Normalize":
        mean, std = (f"np.float32({transform[name]})[:, None, None]" for name in ("mean", "std"))
        return [f"image = (image - {mean}) / {std}"]
    return None


def _labels(facts: Mapping[str, Any]) -> list[str]:
    """Lines from `output` to files."""
    values = [entry["value"] for entry in facts["classes"]]
    graph, classes = facts["graph"], len(facts["classes"])
    if facts["activation"] == "softmax":
        table = f'np.array({values}, "{_dtype(values)}")'
        shown = f"Image.fromarray({table}[labels]).save(sys.argv[2])"
        if graph == "labels":
            return ["labels = output", shown]
        given = facts["postprocessing"]["thresholds"]
        if given is None:
            return ["labels = output.argmax(0)", shown]
        if graph == "probabilities":
            return [f"labels = (output / np.float32({given})[:, None, None]).argmax(0)", shown]
        offsets = [(facts["postprocessing"]["temperature"] or 1.0) * math.log(value) for value in given]
        return [f"labels = (output - np.float32({offsets})[:, None, None]).argmax(0)", shown]
    if graph == "labels":
        planes = "planes = output"
    elif graph == "probabilities":
        planes = f"planes = output > np.float32({thresholds(facts)})[:, None, None]"
    else:
        scale = facts["postprocessing"]["temperature"] or 1.0
        limits = [scale * math.log(value / (1 - value)) for value in thresholds(facts)]
        planes = f"planes = output > np.float32({limits})[:, None, None]"
    table = f'np.array({[facts["other_value"], values[0]]}, "{_dtype([facts["other_value"], values[0]])}")'
    lines = [planes, f"masks = {table}[planes.astype(int)]"]
    if classes == 1:
        return [*lines, "Image.fromarray(masks[0]).save(sys.argv[2])"]
    names = [entry["name"].replace("/", "_").replace("\\", "_") for entry in facts["classes"]]
    return [
        *lines,
        f"for name, mask in zip({names}, masks):",
        '    Image.fromarray(mask).save(sys.argv[2].replace(".png", f"_{name}.png"))',
    ]


def _dtype(values: list[Any]) -> str:
    return "uint8" if max(max(value) if isinstance(value, list) else value for value in values) < 256 else "uint16"


def _of_arrays(facts: Mapping[str, Any], model: str) -> str:
    how = (
        f"in windows of {facts['window']['size']}, whose logits are put together as `window` in the file's facts says"
        if facts["window"]
        else "of any size"
        if len(facts["input"]["dynamic"]) > 1
        else f"of the space axes {facts['input']['size']}"
    )
    return f"""# {facts["name"]}: what the model makes of an array, without the package that trained it.
#   python run_onnx.py image.npy output.npy
# pip install numpy onnxruntime
# The array is float32 ({", ".join(facts["input"]["axes"])}), {how};
# `input` and `normalization` in the file's facts, printed below, say what its values are.
import json
import pathlib
import sys

import numpy as np
import onnxruntime

if len(sys.argv) != 3:
    sys.exit("usage: python run_onnx.py image.npy output.npy")
model = pathlib.Path(__file__).with_name("{model}")
net = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
facts = json.loads(net.get_modelmeta().custom_metadata_map["lightning_dice"])
print(json.dumps({{key: facts[key] for key in ("input", "normalization", "output", "window")}}, indent=2))
np.save(sys.argv[2], net.run(None, {{"image": np.load(sys.argv[1]).astype(np.float32)}})[0])
"""
