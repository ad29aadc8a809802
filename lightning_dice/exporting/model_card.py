"""The model card: what the model is for, what it was made of, how good it is and what nobody has measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def model_card(
    facts: Mapping[str, Any],
    *,
    files: Sequence[Path],
    splits: Mapping[str, int] | None = None,
) -> str:
    """A card in Markdown, in the sections of Mitchell et al., "Model Cards for Model Reporting" (FAT* 2019).

    Whatever the run does not know is said to be not stated or not measured, for its author to fill in.

    Args:
        facts: of the model, with its verification.
        files: that lie beside the card, the model first.
        splits: how many cases each split of the data has; `None` where the data are not at hand.
    """
    sections = [
        f"# {facts['name']}",
        _summary(facts),
        "## Files\n\n" + _list(f"`{file.name}`: {_FILES[file.suffix]}" for file in files),
        "## Input\n\n" + _input(facts),
        "## Output\n\n" + _output(facts),
        "## How to run it\n\n" + _usage(facts, files[0]),
        "## Data\n\n" + _data(facts, splits),
        "## Training\n\n" + _training(facts),
        "## Scores\n\n" + _scores(facts),
        "## The exported file against PyTorch\n\n" + _verification(facts),
        "## Calibration\n\n" + _calibration(facts),
        "## Intended use and limits\n\n" + _limits(facts),
        "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()) + ".",
    ]
    return "\n\n".join(sections) + "\n"


_FILES = {
    ".onnx": "the model; its facts are the entry `lightning_dice` of its metadata",
    ".pt2": "the model, a program of `torch.export`; its facts are its extra file `model.json`",
    ".safetensors": "the weights; their facts, and the config of the module, are in the header",
    ".json": "the same facts, as JSON",
    ".py": "runs the model without the package that trained it",
}


def _summary(facts: Mapping[str, Any]) -> str:
    names = ", ".join(str(entry["name"]) for entry in facts["classes"])
    space = len(facts["input"]["axes"]) - 2
    kind = "classes that exclude each other" if facts["activation"] == "softmax" else "a plane for each class"
    what = f"Segmentation of {space}D images into {names} ({kind}), by {_named(facts['training']['network'])}."
    return f"{what}\n\nLicence: {facts['license'] or 'not stated (to be filled in by whoever ships the model)'}."


def _input(facts: Mapping[str, Any]) -> str:
    given, normalization = facts["input"], facts["normalization"]
    sizes = f"any size along {', '.join(given['dynamic'])}" if given["dynamic"] else "one size"
    if given["minimum"] > 1:
        sizes += f", space axes of at least {given['minimum']} pixels"
    if given["size"]:
        sizes += f"; the space axes are {_by(given['size'])}"
    channels = f": {', '.join(given['channel_names'])}" if given["channel_names"] else ""
    lines = [
        f"`{given['name']}`: {given['dtype']} ({', '.join(given['axes'])}), {sizes}",
        f"{given['channels']} channel{'s' * (given['channels'] != 1)}{channels}",
        f"values: {given['values']}",
    ]
    if given["spacing"] is not None:
        lines.append(f"spacing: {given['spacing']} mm along each axis")
    transform = normalization["transform"]
    if transform is None:
        lines.append("normalization: none")
    elif normalization["inside"]:
        lines.append(f"normalization: `{_call(transform)}`, done by the model itself, of each image that it is given")
    else:
        lines.append(f"normalization: `{_call(transform)}`, to be done before")
    if normalization["intensities"] is not None:
        lines.append(f"intensities: normalized by {normalization['intensities']}, to be done before")
    if facts["size_divisor"]["pixels"] > 1:
        lines.append(f"padding to multiples of {facts['size_divisor']['pixels']} pixels is done by the model itself")
    return _list(lines)


def _output(facts: Mapping[str, Any]) -> str:
    output = facts["output"]
    softmax = facts["activation"] == "softmax"
    rows = [["class", "channel", "value in masks", "scored"]]
    rows += [
        [entry["name"], entry["channel"], entry["value"], "yes" if entry["scored"] else "no"]
        for entry in facts["classes"]
    ]
    ignored = facts["ignore_index"]
    note = (
        "" if ignored is None else f"\n\nLabel {ignored} in the training's masks was ignored; the model never says it."
    )
    how = (
        "the class of the greatest value" if softmax else "for each class by itself: a pixel may be of several, or none"
    )
    return f"`{output['name']}`: {output['dtype']} ({', '.join(output['axes'])}); {how}.\n\n{_table(rows)}{note}"


def _usage(facts: Mapping[str, Any], model: Path) -> str:
    window = facts["window"]
    by_windows = (
        ""
        if window is None
        else f"\n\nThe module runs by windows of {_by(window['size'])} pixels with an overlap of {window['overlap']:g} "
        f"and {window['importance_map']} weights: cut images so, and put the logits together."
    )
    flips = (
        ""
        if not facts["mirror_axes"]
        else f"\n\nThe module also averages over flips of the space axes {facts['mirror_axes']}."
    )
    take = "segment(images)" if len(facts["input"]["axes"]) == 4 else "predict_step(images)  # normalized"
    code = {
        "onnx": "```bash\npip install numpy onnxruntime pillow\npython run_onnx.py picture.png mask.png\n```"
        if len(facts["input"]["axes"]) == 4
        else "```bash\npip install numpy onnxruntime\npython run_onnx.py image.npy output.npy\n```",
        "torch_export": f'```python\nimport torch\n\nmodel = torch.export.load("{model.name}").module()\n'
        f"{facts['graph']} = model(image)\n```",
        "safetensors": "```python\nfrom lightning_dice import SegmentationModule\n\n"
        f'module = SegmentationModule.from_safetensors("{model.name}")\nlabels = module.{take}\n```',
    }[facts["format"]]
    return code + by_windows + flips


def _data(facts: Mapping[str, Any], splits: Mapping[str, int] | None) -> str:
    lines = []
    if splits is None:
        lines.append("cases: not at hand when this card was written")
    else:
        lines.append("cases: " + ", ".join(f"{name} {count}" for name, count in splits.items()))
    size, batch = facts["training"]["size"], facts["training"]["batch_size"]
    if size is not None:
        lines.append(f"trained on pieces of {_by(size)} pixels, {batch} at a time")
    lines.append("origin, consent, licence and population of the data: not stated")
    return _list(lines)


def _training(facts: Mapping[str, Any]) -> str:
    training = facts["training"]
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


def _scores(facts: Mapping[str, Any]) -> str:
    scores = facts["scores"]
    if scores is None:
        return "Not measured for these weights and settings."
    rows = [["class", "Dice", "cases that have a score"]]
    rows += [[name, f"{entry['dice']:.4f}", entry["cases"]] for name, entry in scores["classes"].items()]
    before = ", before the calibration" if facts["postprocessing"]["calibration"] else ""
    return (
        f"Dice of the run's own evaluation{before}, on {scores['cases']} cases of its {scores['split']} split: the "
        f"mean over the cases, then over the classes, {scores['dice']:.4f}. A class that is neither in a case's mask "
        f"nor predicted has no score there.\n\n{_table(rows)}\n\nSpread over seeds, and anything beside Dice: not "
        "measured here."
    )


def _verification(facts: Mapping[str, Any]) -> str:
    found = facts["verification"]
    if found is None:
        return "Not measured."
    lines = [
        f"run on {found['cases']} {found['data']}",
        f"labels that are equal: {found['equal']:.6%} of {found['pixels']:,} ({found['different_pixels']:,} differ)",
    ]
    if found["largest_difference"] is not None:
        lines.append(f"largest difference of {facts['graph']}: {found['largest_difference']:.3g}")
    if found["dice"] is None or found["exported_dice"] is None:
        lines.append("Dice: not measured, for want of masks")
    else:
        lines.append(f"Dice on these cases: {found['dice']:.6f} by PyTorch, {found['exported_dice']:.6f} by the file")
    return _list(lines)


def _calibration(facts: Mapping[str, Any]) -> str:
    decision = facts["postprocessing"]
    if decision["calibration"] is None and decision["temperature"] is None and decision["thresholds"] is None:
        threshold = "" if decision["threshold"] is None else f" The threshold is {decision['threshold']:g}."
        return f"Not done: probabilities may be too certain.{threshold}"
    lines = []
    if decision["calibration"]:
        lines.append(f"by the run's `{decision['calibration']}`, on its validation split")
    for name in ("temperature", "thresholds", "min_size", "keep_largest"):
        if decision[name]:
            lines.append(f"{name}: {decision[name]}")
    if decision["min_size"] or decision["keep_largest"]:
        lines.append("the removal of components is not a part of the file, and was not compared")
    return _list(lines)


def _limits(facts: Mapping[str, Any]) -> str:
    return _list(
        [
            "intended use: not stated",
            "images of another origin, device, stain, scale or range of values than the training's: not measured",
            "behaviour for subgroups of patients, sites or conditions: not measured",
            "images without any of the classes: not measured by themselves",
            "not a medical device; nothing here says that it may be used as one",
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
    """The last part of what a config calls."""
    return str(config.get("_target_", "a network")).rpartition(".")[2] if isinstance(config, Mapping) else str(config)


def _call(config: Any) -> str:
    """A config as the call that it stands for."""
    if isinstance(config, Mapping):
        settings = {key: value for key, value in config.items() if key not in ("_target_", "_partial_", "_convert_")}
        if "_target_" not in config:
            return "{" + ", ".join(f"{key}: {_call(value)}" for key, value in settings.items()) + "}"
        return f"{_named(config)}({', '.join(f'{key}={_call(value)}' for key, value in settings.items())})"
    if isinstance(config, (list, tuple)):
        return f"[{', '.join(map(_call, config))}]"
    return str(config)
