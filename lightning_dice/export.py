"""Export a trained model: `python -m lightning_dice.export run=<folder> format=onnx`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from lightning_dice.cli.command import run_command
from lightning_dice.cli.config import instantiate
from lightning_dice.cli.errors import UserError, as_user_errors
from lightning_dice.cli.required_extras import check_extras

if TYPE_CHECKING:
    from lightning_dice.exporting import Agreement, ExportedGraph, ExportSettings, Format
    from lightning_dice.exporting.verification_cases import CaseSelection
    from lightning_dice.module import SegmentationModule

# Those that the class `ExportSettings` checks, and those of the command itself.
_EXPORT_SETTINGS = (
    *("format", "output_type", "normalization", "size", "opset", "split", "cases", "tolerance", "license"),
)
SETTINGS = (*_EXPORT_SETTINGS, "run", "output", "checkpoint", "calibration", "overwrite")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m lightning_dice.export` or `dice-export`.

    Args:
        arguments: the command line, such as `["run=runs/a", "format=onnx"]`; `None`: this process's.

    Raises:
        SystemExit: the command failed; its exit status.
    """

    def run(config: DictConfig, overrides: list[str]) -> int:
        disagreement = export(config, overrides)
        if disagreement is None:
            return 0
        print(f"\nerror: {disagreement}", file=sys.stderr)
        return 1

    run_command("export", run, SETTINGS, arguments)


def export(config: DictConfig, overrides: list[str]) -> str | None:
    """Write a run's model to a file that runs without this package, with metadata, a model card and a script.

    The file is first made in a temporary folder, opened from there, and compared with the module on cases of the run's
    data; nothing is written if their labels differ.

    Args:
        config: the settings of `conf/export.yaml`.
        overrides: applied to the run's config, in Hydra's syntax: `module.threshold=0.3`.

    Returns:
        How the labels differ, if more differ than the tolerance allows; nothing is written then. `None` otherwise.

    Raises:
        UserError: a wrong setting, run, checkpoint or output, a missing package, or a network without a graph.
    """
    from lightning_dice.cli import run_folder
    from lightning_dice.cli.experiment import silence_libraries
    from lightning_dice.exporting import ExportedFile, InputShape, TrainedRun, model_metadata, output_files

    silence_libraries()
    with as_user_errors():
        settings = read_settings(config)
        file_format = installed_format(settings)
        run = run_folder.reopen(config.run, overrides, command="export")
        check_extras(run, leave_out=("logger", "callbacks"))
        plain = cast("dict[str, Any]", OmegaConf.to_container(run, resolve=True))
        folder = Path(config.run).expanduser().absolute()
        # The run's table of cases was made with its best weights and its own settings.
        has_scores = config.checkpoint == "best" and not overrides
        checkpoint = run_folder.find_checkpoint(config.run, config.checkpoint)

        def new_folder() -> Path:
            return run_folder.new_folder(config.run, f"export_{settings.format}", dated=False)

        with output_files(config.output, new_folder, file_format.suffix, overwrite=config.overwrite) as files:
            module, weights = load_module(run, config, checkpoint)
            cases = find_cases(run, settings)
            channels, ndim = int(run.data.channels), len(run.data.patch_size)
            settings.check_module(module, ndim)
            normalize: Any = instantiate(run.normalize, "normalize")
            normalizes = settings.normalizes(module, normalize, channels, ndim)
            graph, content = make_content(settings, module, normalize if normalizes else None, channels, ndim)
            shape = InputShape.any_size(ndim) if graph is None else graph.input_shape
            file = ExportedFile(settings.format, settings.output_type, shape, normalizes, settings.license)
            metadata = model_metadata(TrainedRun(plain, folder, weights, has_scores), module, file)
            if not file_format.has_graph:
                # Enough to build a module that is not trained further.
                metadata["module"] = {
                    key: value for key, value in plain["module"].items() if key not in ("optimizer", "scheduler")
                }
            agreement = compare(settings, module, content, metadata, cases, normalize)
            metadata["verification"] = agreement.metadata(float(settings.tolerance))
            print_agreement(agreement, settings.output_type)
            if agreement.different_fraction > settings.tolerance:
                return (
                    f"{agreement.different_fraction:.3%} of the labels differ from PyTorch's, and "
                    f"tolerance={settings.tolerance:g} allows {float(settings.tolerance):.3%}: nothing was written. "
                    f"tolerance={agreement.different_fraction:.2g} would"
                )
            files.write(file_format, content, metadata, cases.splits)
    print("written  " + "\n         ".join(str(path) for path in files.paths))
    return None


def read_settings(config: DictConfig) -> ExportSettings:
    """Return the checked settings of the command.

    Raises:
        ValueError: a setting out of its range.
    """
    from lightning_dice.exporting import ExportSettings

    values = cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
    return ExportSettings(**{name: values[name] for name in _EXPORT_SETTINGS})


def installed_format(settings: ExportSettings) -> Format:
    """Return the file format, whose packages are installed.

    Raises:
        MissingExtra: a package is missing.
    """
    file_format = settings.file_format()
    file_format.require()
    return file_format


def load_module(run: DictConfig, config: DictConfig, checkpoint: Path) -> tuple[SegmentationModule, dict[str, Any]]:
    """Return the trained and calibrated module in evaluation mode, and the content of its checkpoint."""
    from lightning_dice.cli import run_folder

    module = run_folder.build_module(run, trained=True)
    content = run_folder.check_weights(module, checkpoint, run)
    module.load_state_dict(content["state_dict"])
    calibration = run_folder.calibrate(module, config.run, config.calibration, checkpoint)
    if calibration is not None:
        print(calibration, flush=True)
    return module.eval(), content


def find_cases(run: DictConfig, settings: ExportSettings) -> CaseSelection:
    """Return the cases to compare on, or noise if the data are not available.

    Raises:
        ValueError: the data are available, but do not have the split.
    """
    from lightning_dice.data import DataError
    from lightning_dice.exporting.verification_cases import evenly_spaced, noise

    channels, size = int(run.data.channels), list(run.data.patch_size)
    try:
        source = instantiate(run.data.datamodule, "data").source
        splits = {name: source.split(name) for name in ("train", "val", "test")}
    except (DataError, UserError, OSError) as error:
        print(f"the data are not available, noise is used instead: {str(error).splitlines()[0]}", flush=True)
        return noise(channels, size, None)
    selection = evenly_spaced(splits, settings.split, settings.cases)
    return selection if settings.cases else noise(channels, size, selection.splits)


def make_content(
    settings: ExportSettings, module: SegmentationModule, normalize: Any, channels: int, ndim: int
) -> tuple[ExportedGraph | None, Any]:
    """Return the graph, for formats that hold one, and the content of the file.

    Raises:
        UserError: the network has no graph, or one that the format cannot hold; the message tells what to try.
    """
    from lightning_dice.exporting import NotExportable

    try:
        graph = settings.capture(module, normalize, channels, ndim)
        if graph is not None:
            shape = graph.input_shape
            sizes = f"any size along {', '.join(shape.dynamic)}" if shape.dynamic else "one size"
            sizes += f" (of at least {shape.minimum} pixels)" if shape.minimum > 1 else ""
            normalized = "" if normalize is not None else " that are normalized before"
            print(f"graph    {settings.output_type} of images of {sizes}{normalized}", flush=True)
        return graph, settings.file_format().prepare(graph, module, settings.output_type)
    except NotExportable as error:
        raise UserError(settings.explain(error, module.net)) from error


def compare(
    settings: ExportSettings,
    module: SegmentationModule,
    content: Any,
    metadata: dict[str, Any],
    cases: CaseSelection,
    normalize: Any,
) -> Agreement:
    """Write the file to a temporary folder, open it, and compare it with the module."""
    from tempfile import TemporaryDirectory

    from rich.progress import track

    from lightning_dice.exporting import OpenedFile, verify
    from lightning_dice.scoring import Scoring

    file_format = settings.file_format()
    takes_any_number = "batch" in metadata["input"]["dynamic"]
    scoring = Scoring(
        [entry["name"] for entry in metadata["classes"]],
        metadata["activation"],
        metadata["ignore_index"],
        [entry["channel"] for entry in metadata["classes"] if not entry["scored"]],
        surfaces=False,
        lesions=False,
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"model{file_format.suffix}"
        file_format.write(content, path, metadata)
        run = file_format.open(path)
        file = OpenedFile(
            run, settings.output_type, metadata["normalization"]["inside"], None if takes_any_number else 1
        )
        progress = track(
            cases.cases,
            description="comparing the file with PyTorch",
            total=None,
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        return verify(
            file,
            module.predictor("cpu"),
            progress,
            data=cases.description,
            scoring=scoring,
            normalize=normalize,
            window=settings.window(module),
        )


def print_agreement(agreement: Agreement, output_type: str) -> None:
    """Print the result of the comparison."""
    print(f"compared on {agreement.cases} {agreement.data}")
    equal = 1 - agreement.different_fraction
    print(f"         {equal:.6%} of {agreement.pixels:,} labels equal, {agreement.different:,} differ")
    if agreement.largest_difference is not None:
        print(f"         largest difference of {output_type} {agreement.largest_difference:.3g}")
    if agreement.dice is not None and agreement.exported_dice is not None:
        print(f"         Dice {agreement.dice:.6f} by PyTorch, {agreement.exported_dice:.6f} by the file")


if __name__ == "__main__":
    main()
