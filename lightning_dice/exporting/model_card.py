"""Model cards of exported models, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def model_card(
    metadata: Mapping[str, Any],
    *,
    files: Sequence[Path],
    splits: Mapping[str, int] | None = None,
) -> str:
    """Return a card in the sections of Mitchell et al., "Model Cards for Model Reporting" (FAT* 2019).

    Anything the run does not know is marked as not stated or not measured, for the author to fill in.

    Args:
        metadata: the model's metadata, with its verification.
        files: the files beside the card, the model first.
        splits: number of cases in each split; `None` if the data were not available.
    """
    sections = [
        f"# {metadata['name']}",
        _summary(metadata),
        "## Files\n\n" + _list(f"`{file.name}`: {_FILES[file.suffix]}" for file in files),
        "## Input\n\n" + _input(metadata),
        "## Output\n\n" + _output(metadata),
        "## How to run it\n\n" + _usage(metadata, files[0]),
        "## Data\n\n" + _data(metadata, splits),
        "## Training\n\n" + _training(metadata),
        "## Scores\n\n" + _scores(metadata),
        "## The exported file against PyTorch\n\n" + _verification(metadata),
        "## Calibration\n\n" + _calibration(metadata),
        "## Intended use and limits\n\n" + _limits(metadata),
        "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in metadata["versions"].items()) + ".",
    ]
    return "\n\n".join(sections) + "\n"


_FILES = {
    ".onnx": "the model; the entry `lightning_dice` of its `metadata_props` holds the metadata",
    ".pt2": "the model, a program of `torch.export`; its extra file `model.json` holds the metadata",
    ".safetensors": "the weights; the header holds the metadata and the config of the module",
    ".json": "the metadata, as JSON",
    ".py": "runs the model without the package that trained it",
}


def _summary(metadata: Mapping[str, Any]) -> str:
    names = ", ".join(str(entry["name"]) for entry in metadata["classes"])
    space = len(metadata["input"]["axes"]) - 2
    kind = "exclusive classes" if metadata["activation"] == "softmax" else "a plane for each class"
    summary = f"Segmentation of {space}D images into {names} ({kind}), by {_named(metadata['training']['network'])}."
    return f"{summary}\n\nLicence: {metadata['license'] or 'not stated (to be filled in by the author of the model)'}."


def _input(metadata: Mapping[str, Any]) -> str:
    image, normalization = metadata["input"], metadata["normalization"]
    sizes = f"any size along {', '.join(image['dynamic'])}" if image["dynamic"] else "one size"
    if image["minimum"] > 1:
        sizes += f", space axes of at least {image['minimum']} pixels"
    if image["size"]:
        sizes += f"; the space axes are {_by(image['size'])}"
    channels = f": {', '.join(image['channel_names'])}" if image["channel_names"] else ""
    lines = [
        f"`{image['name']}`: {image['dtype']} ({', '.join(image['axes'])}), {sizes}",
        f"{image['channels']} channel{'s' * (image['channels'] != 1)}{channels}",
        f"values: {image['values']}",
    ]
    if image["spacing"] is not None:
        lines.append(f"spacing: {image['spacing']} mm along each axis")
    transform = normalization["transform"]
    if transform is None:
        lines.append("normalization: none")
    elif normalization["inside"]:
        lines.append(f"normalization: `{_call(transform)}` of each image, done by the model")
    else:
        lines.append(f"normalization: `{_call(transform)}`, not done by the model")
    if normalization["intensities"] is not None:
        lines.append(f"intensities: normalized by {normalization['intensities']}, not done by the model")
    if metadata["size_divisor"]["pixels"] > 1:
        lines.append(f"padding to multiples of {metadata['size_divisor']['pixels']} pixels is done by the model")
    return _list(lines)


def _output(metadata: Mapping[str, Any]) -> str:
    output = metadata["output"]
    softmax = metadata["activation"] == "softmax"
    rows = [["class", "channel", "value in masks", "scored"]]
    rows += [
        [entry["name"], entry["channel"], entry["value"], "yes" if entry["scored"] else "no"]
        for entry in metadata["classes"]
    ]
    ignored = metadata["ignore_index"]
    note = (
        ""
        if ignored is None
        else f"\n\nPixels with label {ignored} were ignored in training; the model never predicts it."
    )
    how = "the class with the largest value" if softmax else "each class on its own: a pixel may have several, or none"
    return f"`{output['name']}`: {output['dtype']} ({', '.join(output['axes'])}); {how}.\n\n{_table(rows)}{note}"


def _usage(metadata: Mapping[str, Any], model: Path) -> str:
    window = metadata["window"]
    notes = ""
    if window is not None:
        notes += (
            f"\n\nThe module was evaluated in windows of {_by(window['size'])} pixels with an overlap of "
            f"{window['overlap']:g} and {window['importance_map']} weights: cut images like this, and average the "
            "logits of the windows."
        )
    if metadata["mirror_axes"]:
        notes += (
            "\n\nThe module was evaluated with the mean of predictions of images mirrored along the space axes "
            f"{metadata['mirror_axes']}."
        )
    call = "segment(images)" if len(metadata["input"]["axes"]) == 4 else "predict_step(images)  # normalized"
    code = {
        "onnx": "```bash\npip install numpy onnxruntime pillow\npython run_onnx.py picture.png mask.png\n```"
        if len(metadata["input"]["axes"]) == 4
        else "```bash\npip install numpy onnxruntime\npython run_onnx.py image.npy output.npy\n```",
        "torch_export": f'```python\nimport torch\n\nmodel = torch.export.load("{model.name}").module()\n'
        f"{metadata['output_type']} = model(image)\n```",
        "safetensors": "```python\nfrom lightning_dice import SegmentationModule\n\n"
        f'module = SegmentationModule.from_safetensors("{model.name}")\nlabels = module.{call}\n```',
    }[metadata["format"]]
    return code + notes


def _data(metadata: Mapping[str, Any], splits: Mapping[str, int] | None) -> str:
    lines = []
    if splits is None:
        lines.append("cases: the data were not available when this card was written")
    else:
        lines.append("cases: " + ", ".join(f"{name} {count}" for name, count in splits.items()))
    size, batch = metadata["training"]["size"], metadata["training"]["batch_size"]
    if size is not None:
        lines.append(f"trained on patches of {_by(size)} pixels, {batch} in a batch")
    lines.append("origin, consent, licence and population of the data: not stated")
    return _list(lines)


def _training(metadata: Mapping[str, Any]) -> str:
    training = metadata["training"]
    epochs = "not known" if training["epochs"] is None else str(training["epochs"])
    return _list(
        [
            f"network: `{_call(training['network'])}`",
            f"loss: `{_call(training['loss'])}`",
            f"optimizer: `{_call(training['optimizer'])}`",
            f"scheduler: `{_call(training['scheduler'])}`",
            f"epochs: {epochs}; weights of epoch {training['epoch']}, counted from 0, step {training['step']}",
            f"precision: {training['precision']}; seed {training['seed']}",
        ]
    )


def _scores(metadata: Mapping[str, Any]) -> str:
    scores = metadata["scores"]
    if scores is None:
        return "Not measured for these weights and settings."
    rows = [["class", "Dice", "cases with a score"]]
    rows += [[name, f"{entry['dice']:.4f}", entry["cases"]] for name, entry in scores["classes"].items()]
    before = ", before the calibration" if metadata["postprocessing"]["calibration"] else ""
    return (
        f"Dice of the run's own evaluation{before}, on {scores['cases']} cases of its {scores['split']} split: "
        f"{scores['dice']:.4f}, the mean over the cases, then over the classes. A class that is neither in a case's "
        f"mask nor predicted has no score there.\n\n{_table(rows)}\n\nVariation over seeds and scores other than "
        "Dice: not measured."
    )


def _verification(metadata: Mapping[str, Any]) -> str:
    verification = metadata["verification"]
    if verification is None:
        return "Not measured."
    lines = [
        f"run on {verification['cases']} {verification['data']}",
        f"equal labels: {verification['equal']:.6%} of {verification['pixels']:,} "
        f"({verification['different_pixels']:,} differ)",
    ]
    if verification["largest_difference"] is not None:
        lines.append(f"largest difference of {metadata['output_type']}: {verification['largest_difference']:.3g}")
    if verification["dice"] is None or verification["exported_dice"] is None:
        lines.append("Dice: not measured, as there are no masks")
    else:
        lines.append(
            f"Dice on these cases: {verification['dice']:.6f} by PyTorch, "
            f"{verification['exported_dice']:.6f} by the file"
        )
    return _list(lines)


def _calibration(metadata: Mapping[str, Any]) -> str:
    settings = metadata["postprocessing"]
    if settings["calibration"] is None and settings["temperature"] is None and settings["thresholds"] is None:
        threshold = "" if settings["threshold"] is None else f" The threshold is {settings['threshold']:g}."
        return f"Not done: probabilities may be overconfident.{threshold}"
    lines = []
    if settings["calibration"]:
        lines.append(f"by the run's `{settings['calibration']}`, on its validation split")
    for name in ("temperature", "thresholds", "min_size", "keep_largest"):
        if settings[name]:
            lines.append(f"{name}: {settings[name]}")
    if settings["min_size"] or settings["keep_largest"]:
        lines.append("the file does not remove components; this was not compared")
    return _list(lines)


def _limits(metadata: Mapping[str, Any]) -> str:
    return _list(
        [
            "intended use: not stated",
            "images of another origin, device, stain, scale or range of values than in training: not measured",
            "behaviour for subgroups of patients, sites or conditions: not measured",
            "images without any of the classes: not measured separately",
            "not a medical device, and not shown to be fit for use as one",
        ]
    )


def _table(rows: Sequence[Sequence[Any]]) -> str:
    head, *others = [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *others])


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _named(config: Any) -> str:
    """Return the name of the class that a config calls."""
    return str(config.get("_target_", "a network")).rpartition(".")[2] if isinstance(config, Mapping) else str(config)


def _call(config: Any) -> str:
    """Write a config as a call in Python."""
    if isinstance(config, Mapping):
        settings = {key: value for key, value in config.items() if key not in ("_target_", "_partial_", "_convert_")}
        if "_target_" not in config:
            return "{" + ", ".join(f"{key}: {_call(value)}" for key, value in settings.items()) + "}"
        return f"{_named(config)}({', '.join(f'{key}={_call(value)}' for key, value in settings.items())})"
    if isinstance(config, (list, tuple)):
        return f"[{', '.join(map(_call, config))}]"
    return str(config)
