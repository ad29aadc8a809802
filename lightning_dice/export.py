"""Ship a model: `python -m lightning_dice.export run=<folder> format=onnx`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from lightning_dice.cli.command import run_command
from lightning_dice.cli.config import instantiate
from lightning_dice.cli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_dice.exporting import Agreement, ExportedGraph, Format, VerificationCase
    from lightning_dice.module import SegmentationModule

SETTINGS = (
    *(
        "run",
        "format",
        "output",
        "output_type",
        "normalization",
        "size",
        "opset",
        "checkpoint",
        "calibration",
        "split",
        "cases",
    ),
    *("tolerance", "license", "overwrite"),
)
NOISE = 2  # images, where there is no case to compare on


def main() -> None:
    """Entry point of `python -m lightning_dice.export` and `dice-export`."""

    def act(config: DictConfig, overrides: list[str]) -> int:
        disagreement = export(config, overrides)
        if disagreement is None:
            return 0
        print(f"\nerror: {disagreement}", file=sys.stderr)
        return 1

    run_command("export", act, SETTINGS)


class Target(NamedTuple):
    """Where the files go.

    Attributes:
        model: the model's file.
        facts: its facts as JSON.
        card: the model card.
        script: runs the model; `None` where there is none.
    """

    model: Path
    facts: Path
    card: Path
    script: Path | None

    @property
    def files(self) -> list[Path]:
        """All of them, the model first."""
        return [file for file in self if file is not None]


class Checked(NamedTuple):
    """What file and PyTorch are compared on.

    Attributes:
        cases: made as they are asked for.
        words: what they are.
        splits: how many cases each split of the data has; `None` where the data are not at hand.
    """

    cases: Iterator[VerificationCase]
    words: str
    splits: dict[str, int] | None


def export(config: DictConfig, overrides: list[str]) -> str | None:
    """Write a run's model as a file that runs without this package, with its facts, a card and a script.

    Nothing is written before the file itself, made in a temporary folder and opened from there, has been run on cases
    of the run's data beside the module and makes the same labels.

    Args:
        config: as of `conf/export.yaml`.
        overrides: of the run's config, in Hydra's syntax: `module.threshold=0.3`.

    Returns:
        How the labels differ, if they do by more than the tolerance; then nothing is written.

    Raises:
        UserError: the run, its checkpoint, a setting, the output or a missing package; or the network cannot be
            exported.
    """
    made = checked_format(config)
    from tempfile import TemporaryDirectory

    from lightning_dice.cli import run_folder
    from lightning_dice.cli.experiment import silence_libraries
    from lightning_dice.exporting import MissingExtra, describe, model_card, script
    from lightning_dice.io import write_atomically
    from lightning_dice.scoring import Scoring

    silence_libraries()
    try:
        made.require()
    except MissingExtra as error:
        raise UserError(f"format={config.format}: {error}") from error
    run = run_folder.reopen(config.run, overrides)
    plain: Any = OmegaConf.to_container(run, resolve=True)
    checkpoint_path = run_folder.find_checkpoint(config.run, config.checkpoint)
    with made_folder(config, made.suffix) as target:
        module = run_folder.build_module(run, trained=True)
        checkpoint = run_folder.check_weights(module, checkpoint_path)
        module.load_state_dict(checkpoint["state_dict"])
        calibration = run_folder.calibrate(module, config.run, config.calibration, checkpoint_path)
        if calibration is not None:
            print(calibration, flush=True)
        module.eval()
        normalize: Any = instantiate(run.normalize, "normalize")
        checked = find_cases(run, config, channels := int(run.data.channels))
        ndim = len(run.data.patch_size)
        check_windows(module, config, ndim)
        inside = normalized_inside(module, config, made, normalize, channels, ndim)
        captured = graph_of(module, config, made, normalize if inside else None, channels, ndim)
        facts = describe(
            plain,
            module,
            format=config.format,
            graph=config.output_type,
            ndim=ndim,
            dynamic=dynamic_axes(captured, ndim),
            minimum=1 if captured is None else captured.minimum,
            size=None if config.size is None else list(config.size),
            inside=inside,
            checkpoint=checkpoint,
            folder=Path(config.run).expanduser().absolute(),
            license=config.license,
            own_scores=config.checkpoint == "best" and not overrides,
        )
        if not made.graphs:
            facts["module"] = built_anew(plain["module"])
        prepared = prepare(made, captured, module, config)
        scoring = Scoring(
            list(run.data.classes),
            run.data.activation,
            run.data.ignore_index,
            list(run.data.exclude_classes),
            surfaces=False,
            lesions=False,
        )
        with TemporaryDirectory() as folder:
            trial = Path(folder) / target.model.name
            made.write(prepared, trial, facts)
            found = agreement(
                made.open(trial), module, checked, config, captured, scoring, normalize=normalize, inside=inside
            )
        facts["verification"] = found.facts(float(config.tolerance))
        say(found, config.output_type)
        if found.share > float(config.tolerance):
            return (
                f"{found.share:.3%} of the labels differ from PyTorch's, and tolerance={config.tolerance:g} allows "
                f"{float(config.tolerance):.3%}: nothing was written. tolerance={found.share:.2g} would"
            )
        write_atomically(target.model, lambda part: made.write(prepared, part, facts))
        write_text(target.facts, json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        if target.script is not None:
            write_text(target.script, script(facts, target.model.name))
        files = [target.model, target.facts, *([target.script] if target.script else [])]
        write_text(target.card, model_card(facts, files=files, splits=checked.splits))
    print("written  " + "\n         ".join(str(file) for file in target.files))
    return None


def checked_format(config: DictConfig) -> Format:
    """What writes the file.

    Raises:
        UserError: a setting out of its range.
    """
    from lightning_dice.exporting import FORMATS

    choices: tuple[tuple[str, Sequence[Any]], ...] = (
        ("format", list(FORMATS)),
        ("graph", ["logits", "probabilities", "labels"]),
        ("normalization", ["auto", "inside", "outside"]),
        ("split", [None, "train", "val", "test"]),
    )
    for name, known in choices:
        if config[name] not in known:
            raise UserError(f"{name} must be one of {', '.join(map(str, known))}, got {config[name]}")
    for name, least in (("cases", 0), ("opset", 1)):
        value = config[name]
        if not (name == "opset" and value is None) and (not isinstance(value, int) or value < least):
            raise UserError(f"{name} must be an integer of at least {least}, got {value}")
    tolerance = config.tolerance
    if not isinstance(tolerance, (int, float)) or not 0 <= tolerance <= 1:
        raise UserError(f"tolerance must be a share of the labels in [0, 1], got {tolerance}")
    if config.format != "onnx" and config.opset is not None:
        raise UserError(f"opset is of ONNX: leave it out with format={config.format}")
    if config.format == "safetensors":
        for name, only in (("output_type", "logits"), ("normalization", "auto"), ("size", None)):
            if config[name] != only:
                raise UserError(f"safetensors hold weights and no graph: leave {name}={config[name]} out")
    return FORMATS["onnx"](config.opset) if config.format == "onnx" else FORMATS[config.format]()


@contextmanager
def made_folder(config: DictConfig, suffix: str) -> Iterator[Target]:
    """The files to write, in a folder that is there; one that was made for them goes again if nothing comes of it.

    Raises:
        UserError: a file is there already, the output has another ending than the format, or cannot be written to.
    """
    import os

    from lightning_dice.cli import run_folder

    made: list[Path] = []
    if config.output is None:
        folder, stem = run_folder.new_folder(config.run, f"export_{config.format}", dated=False), "model"
        made = [folder]
    else:
        path = Path(config.output).expanduser().absolute()
        if path.suffix in (".onnx", ".pt2", ".safetensors") and path.suffix != suffix:
            raise UserError(f"output {path.name} must end in {suffix} with format={config.format}, or be a folder")
        folder, stem = (path.parent, path.stem) if path.suffix == suffix else (path, "model")
        made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the output folder {folder}: {error.strerror}") from error
    model = folder / f"{stem}{suffix}"
    script = folder / "run_onnx.py" if config.format == "onnx" else None
    target = Target(model, folder / f"{stem}.json", folder / "MODEL_CARD.md", script)
    try:
        there = [file for file in target.files if file.exists()]
        if there and not config.overwrite:
            raise UserError(f"{there[0]} exists, and nothing is overwritten: choose another output, or overwrite=true")
        if not os.access(folder, os.W_OK):
            raise UserError(f"the output folder {folder} cannot be written to; choose another output")
        yield target
    finally:
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def check_windows(module: SegmentationModule, config: DictConfig, ndim: int) -> None:
    """See that what is put together of windows are logits, and that a size has the data's axes.

    Raises:
        UserError: otherwise.
    """
    size = config.size
    if size is not None and (
        isinstance(size, (int, str)) or len(size) != ndim or any(not isinstance(n, int) or n < 1 for n in size)
    ):
        raise UserError(f"size must be a number of pixels for each of {ndim} space axes, as in [256,256], got {size}")
    if config.output_type != "logits" and size is not None:
        raise UserError(
            f"a file of a fixed size is used by windows, of which logits are averaged: output_type={config.output_type} "
            "needs size=null"
        )
    if config.output_type != "logits" and module.inference.window is not None:
        raise UserError(
            f"the run predicts by windows of {list(module.inference.window.size)}, of which logits are averaged: "
            f"output_type={config.output_type} needs whole images, inference.size=null"
        )


def normalized_inside(
    module: SegmentationModule, config: DictConfig, made: Format, normalize: Any, channels: int, ndim: int
) -> bool:
    """Whether the graph normalizes images itself.

    Raises:
        UserError: it was asked to, and cannot.
    """
    from lightning_dice.exporting import takes_batches

    if not made.graphs or normalize is None or config.normalization == "outside":
        return False
    # The values of a window are not those of its image.
    windows = config.size is not None or module.inference.window is not None
    if windows and config.normalization == "auto":
        return False
    able = takes_batches(normalize, channels, ndim)
    if config.normalization == "inside" and (not able or windows):
        why = "the model is run by windows" if windows else f"{type(normalize).__name__} cannot be a part of a graph"
        raise UserError(f"normalization=inside: {why}; leave it out, and images are to be normalized before")
    return able


def graph_of(
    module: SegmentationModule, config: DictConfig, made: Format, normalize: Any, channels: int, ndim: int
) -> ExportedGraph | None:
    """The graph of a module, for formats that hold one.

    Raises:
        UserError: there is none; the message says what to try.
    """
    from lightning_dice.exporting import ExportWrapper, NotExportable, capture

    if not made.graphs:
        return None
    size = None if config.size is None else list(config.size)
    deployed = ExportWrapper(module, normalize, config.output_type, wide=config.format == "onnx")
    try:
        captured = capture(deployed, channels, ndim, size, portable=config.format == "onnx")
    except NotExportable as error:
        raise not_exportable(module, config, error) from error
    sizes = f"any size along {', '.join(captured.dynamic)}" if captured.dynamic else "one size"
    if captured.minimum > 1:
        sizes += f" (of at least {captured.minimum} pixels)"
    ready = "" if normalize is not None else " that are normalized before"
    print(f"graph    {config.output_type} of images of {sizes}{ready}", flush=True)
    return captured


def prepare(made: Format, captured: ExportedGraph | None, module: SegmentationModule, config: DictConfig) -> Any:
    """What the format writes.

    Raises:
        UserError: an operator that it lacks.
    """
    from lightning_dice.exporting import NotExportable

    try:
        return made.prepare(captured, module, str(config.output_type))
    except NotExportable as error:
        raise not_exportable(module, config, error) from error


def not_exportable(module: SegmentationModule, config: DictConfig, error: Exception) -> UserError:
    """The message for a network that there is no graph of."""
    tries = ["size=[...] (of your images or windows, for networks that cannot take any)"] if config.size is None else []
    if config.format == "onnx":
        tries.append("format=torch_export")
    tries.append("format=safetensors (weights and config)")
    return UserError(
        f"{type(module.net).__name__} cannot be exported as {config.format}: {error}\ntry {', '.join(tries)}"
    )


def dynamic_axes(captured: ExportedGraph | None, ndim: int) -> tuple[str, ...]:
    """The axes of a batch that may have any size; without a graph all but the channels."""
    from lightning_dice.exporting.graph import axes

    return tuple(axis for axis in axes(ndim) if axis != "channels") if captured is None else captured.dynamic


def built_anew(module: dict[str, Any]) -> dict[str, Any]:
    """The config of a module that will not be trained: without optimizer and schedule."""
    return {key: value for key, value in module.items() if key not in ("optimizer", "scheduler")}


def find_cases(run: DictConfig, config: DictConfig, channels: int) -> Checked:
    """The cases to compare on, or noise where the data are not at hand; says so.

    Raises:
        UserError: a split that the data do not have, though they are there.
    """
    import torch

    from lightning_dice.data import DataError
    from lightning_dice.exporting import VerificationCase

    def noise() -> Iterator[VerificationCase]:
        generator = torch.Generator().manual_seed(0)
        for number in range(NOISE):
            yield VerificationCase(f"noise {number + 1}", torch.rand(channels, *run.data.patch_size, generator=generator))

    words = f"images of noise of {' x '.join(map(str, run.data.patch_size))} pixels"
    try:
        source = instantiate(run.data.datamodule, "data").source
        splits = {name: source.split(name) for name in ("train", "val", "test")}
    except (DataError, UserError, OSError) as error:
        print(f"the data are not at hand, and noise is taken instead: {str(error).splitlines()[0]}", flush=True)
        return Checked(noise(), f"{words}, as the data were not at hand", None)
    counts = {name: len(cases) for name, cases in splits.items() if cases is not None}
    name = config.split or next((name for name in ("test", "val", "train") if counts.get(name)), "test")
    if not counts.get(name):
        raise UserError(f"the data have no {name} split, only {', '.join(counts)}")
    if not config.cases:
        return Checked(noise(), words, counts)
    count = min(int(config.cases), counts[name])

    def real() -> Iterator[VerificationCase]:
        for index in range(count):
            try:
                sample = splits[name][(2 * index + 1) * counts[name] // (2 * count)]
            except DataError as error:
                raise UserError(f"the {name} split has a case that cannot be read: {error}") from error
            yield VerificationCase(sample.case, sample.image, sample.mask)

    return Checked(real(), f"of {counts[name]} cases of the {name} split", counts)


def agreement(
    run: Callable[[Tensor], Tensor],
    module: SegmentationModule,
    checked: Checked,
    config: DictConfig,
    captured: ExportedGraph | None,
    scoring: Any,
    *,
    normalize: Any,
    inside: bool,
) -> Agreement:
    """Run the file beside the module."""
    from rich.progress import track

    from lightning_dice.exporting import verify
    from lightning_dice.inference import SlidingWindow

    window = module.inference.window
    if config.size is not None:
        window = SlidingWindow(list(config.size))
    fixed = captured is not None and "batch" not in captured.dynamic
    return verify(
        run,
        module.predictor("cpu"),
        track(
            checked.cases,
            description="running the file beside PyTorch",
            total=None,
            transient=True,
            disable=not sys.stdout.isatty(),
        ),
        data=checked.words,
        graph=config.output_type,
        scoring=scoring,
        normalize=normalize,
        inside=inside,
        window=window,
        batch=1 if fixed else None,
    )


def say(found: Agreement, graph: str) -> None:
    """Print what the comparison found."""
    print(f"compared on {found.cases} {found.data}")
    print(f"         {1 - found.share:.6%} of {found.pixels:,} labels equal, {found.different:,} differ")
    if found.largest_difference is not None:
        print(f"         largest difference of {graph} {found.largest_difference:.3g}")
    if found.dice is not None and found.exported_dice is not None:
        print(f"         Dice {found.dice:.6f} by PyTorch, {found.exported_dice:.6f} by the file")


def write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all."""
    from lightning_dice.io import write_atomically

    write_atomically(path, partial(Path.write_text, data=text, encoding="utf-8"))


if __name__ == "__main__":
    main()
