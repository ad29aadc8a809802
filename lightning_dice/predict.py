"""Predict masks of images: `python -m lightning_dice.predict run=<folder> input=<folder or file> output=<folder>`."""

from __future__ import annotations

import csv
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig

from lightning_dice.cli.command import run_command
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.prediction import PredictionPipeline, Skipped
from lightning_dice.cli.progress import Progress, Stop, Terminated

if TYPE_CHECKING:
    import torch

    from lightning_dice.cli.workers import WorkerPool
    from lightning_dice.data.interfaces import LoadedImage, PredictionIO, PredictionItem

SETTINGS = (
    *("run", "input", "output", "checkpoint", "calibration", "format", "probabilities", "overlays"),
    *("overwrite", "follow_symlinks", "large", "device", "trainer"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m lightning_dice.predict` or `dice-predict`.

    Args:
        arguments: the command line, such as `["run=runs/a", "input=images", "output=masks"]`; `None`: this process's.

    Raises:
        SystemExit: the command failed; its exit status.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    run_command("predict", lambda config, overrides: predict(config, overrides, given), SETTINGS, given)


def predict(config: DictConfig, overrides: list[str], arguments: Sequence[str] = ()) -> int:
    """Write a mask for each image as soon as it is predicted.

    Masks have the image's size and name, in the geometry and with the values of the training masks; classes that may
    overlap (sigmoid, more than one) get a folder each. `predictions.json` beside the masks records the networks and
    settings that made them; images that have a mask from the same ones are left out. An image that cannot be read is
    reported and skipped.

    Args:
        config: as in `conf/predict.yaml`.
        overrides: applied to the run's config, in Hydra's syntax: `module.threshold=0.3`.
        arguments: the command line, used to start further processes.

    Returns:
        The exit status: 1 if an image was skipped; 130 or 143 if Ctrl-C or SIGTERM ended it; else 0.

    Raises:
        UserError: a run, its checkpoint, the input or the output is wrong, before any work; or the output folder can no
            longer be written to.
    """
    from lightning_dice.cli.workers import WorkerPool

    folders = run_folders(config.run)
    pool = WorkerPool(number_of_processes(config.trainer), "lightning_dice.predict", arguments)
    stop = Stop(silent=not pool.first)
    if not any(argument.startswith("trainer.precision=") for argument in arguments):
        config.trainer.precision = None  # Each run's own.
    try:
        with stop.listening():
            return _predict(config, overrides, folders, pool, stop)
    except KeyboardInterrupt:
        return stop.status(signal.SIGINT)
    except Terminated:
        return stop.status(signal.SIGTERM)
    finally:
        pool.close()


def _predict(config: DictConfig, overrides: list[str], folders: list[Path], pool: WorkerPool, stop: Stop) -> int:
    device = choose_device(config.trainer.accelerator, config.trainer.devices, pool.local)
    output = Path(config.output).expanduser()
    load = cache(lambda: PredictionPipeline(config, overrides, folders, device))
    plan = Plan.from_plain(pool.agreed(lambda: make_plan(config, load(), output).to_plain()))
    pipeline = load()
    if pool.first:
        for note in (*pipeline.notes, *plan.notes, *plan.skipped):
            print(note, file=sys.stderr)
    failed: list[str] = []
    with Progress(len(plan.waiting), device, pool) as progress, _show_file_warnings(progress.print_line):
        for item, reading in read_ahead(pool.mine(plan.waiting), pipeline.read):
            if stop.asked:
                break
            try:
                loaded = reading.result()
                try:
                    prediction = pipeline.predict(loaded, item)
                finally:
                    loaded.close()
                pipeline.write(prediction, loaded, item, output)
            except Skipped as error:
                failed.append(str(error))
                progress.print_line(str(error))
            progress.count()
        reports = pool.collect({"failed": failed, "stopped": stop.asked}, progress.refresh)
    if not pool.first:
        return 0
    lost = sum(report is None for report in reports)
    failed = [*plan.skipped, *(line for report in reports if report for line in report["failed"])]
    stopped = stop.asked or next((report["stopped"] for report in reports if report and report["stopped"]), 0)
    done = plan.images - len(failed)
    if lost or stopped:
        done = plan.finished + sum(has_mask(pipeline, item, output) for item in plan.waiting)
    earlier = f", {plan.finished} of them from before" if plan.finished else ""
    print(f"{done} of {plan.images} images: masks in {output.absolute()}{earlier}")
    if failed:
        print(f"\n{len(failed)} of the images could not be predicted:", *failed, sep="\n  ", file=sys.stderr)
    if lost:
        print(f"\n{lost} of {pool.size} processes ended early: run the same command again to continue", file=sys.stderr)
    if stopped:
        return stop.status(stopped)
    return 1 if failed or lost else 0


@dataclass
class Plan:
    """The images to predict, agreed on by all processes.

    Attributes:
        waiting: images without a mask.
        images: the number of all images.
        finished: how many of them have a mask already.
        skipped: messages about images that cannot be predicted.
        notes: further lines to print.
    """

    waiting: list[PredictionItem]
    images: int
    finished: int
    skipped: list[str]
    notes: list[str]

    def to_plain(self) -> dict[str, Any]:
        """Return plain values, to send to another process."""
        waiting = [[item.case, [str(path) for path in item.files]] for item in self.waiting]
        return {**vars(self), "waiting": waiting}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Plan:
        """Return the plan that `to_plain` described."""
        from lightning_dice.data.interfaces import PredictionItem

        waiting = [PredictionItem(case, tuple(map(Path, files))) for case, files in values["waiting"]]
        return cls(**{**values, "waiting": waiting})


def make_plan(config: DictConfig, pipeline: PredictionPipeline, output: Path) -> Plan:
    """Find the images, check that no file would be overwritten, and find which have a mask already."""
    from lightning_dice.cli.prediction_manifest import Manifest, prepare_folder
    from lightning_dice.data import DataError

    source = Path(config.input).expanduser()
    try:
        items, skipped, notes = find_images(pipeline.reader, source, output)
        masks = {item.case: pipeline.mask_files(item.case) for item in items}
    except DataError as error:
        raise UserError(f"input {error}") from error
    files = {case: [output / path for group in groups for path in group] for case, groups in masks.items()}
    refuse_collisions(items, files, output, pipeline.subfolders)
    place = source if source.is_dir() else source.parent
    manifest = Manifest(pipeline.settings, pipeline.made_by, [str(place.resolve())])
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the output folder {output}: {error.strerror}") from error
    if config.overwrite:
        files = {item.case: [output / path for path in pipeline.possible_files(item.case)] for item in items}
    prepare_folder(output, manifest, files, overwrite=config.overwrite)
    waiting = [item for item in items if not has_mask(pipeline, item, output)]
    return Plan(waiting, len(items) + len(skipped), len(items) - len(waiting), skipped, notes)


def find_images(reader: PredictionIO, source: Path, output: Path) -> tuple[list[PredictionItem], list[str], list[str]]:
    """Find the images of a folder, without those in the output folder.

    Returns:
        The images, messages about what was skipped, and other messages.

    Raises:
        DataError: there are none.
        UserError: the output folder is the folder of the images.
    """
    from lightning_dice.data import DataError
    from lightning_dice.data.errors import FileWarning, SkippedWarning

    folder = source if source.is_dir() else source.parent
    if output.resolve() == folder.resolve():
        raise UserError(f"output {output} is the folder of the images; choose another")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FileWarning)
        items = reader.find(source)
    inner = output.resolve()
    items = [item for item in items if not any(path.resolve().is_relative_to(inner) for path in item.files)]
    if not items:
        raise DataError(f"{source} holds no image but those in the output folder {output}")
    skipped = [str(warning.message) for warning in caught if issubclass(warning.category, SkippedWarning)]
    texts = [str(warning.message) for warning in caught if issubclass(warning.category, FileWarning)]
    return items, skipped, [text for text in texts if text not in skipped]


def refuse_collisions(
    items: Iterable[PredictionItem], files: dict[str, list[Path]], output: Path, reserved: Sequence[str]
) -> None:
    """Refuse masks that would share a file, overwrite an image, or be written into a folder for other files.

    Args:
        items: the images.
        files: the masks of each case.
        output: the folder that they go to.
        reserved: folders in it for other files.

    Raises:
        UserError: names the file.
    """
    images = {path.resolve() for item in items for path in item.files}
    owner: dict[Path, str] = {}
    for case, paths in files.items():
        for path in paths:
            first = path.relative_to(output).parts[0]
            if path in owner and owner[path] != case:
                raise UserError(f"{path} would be the mask of {owner[path]} and of {case}; rename one")
            if path.resolve() in images:
                raise UserError(f"{path} is one of the images, and would be overwritten; choose another output")
            if first in reserved:
                raise UserError(f"the mask {path} would lie among the {first}; do without {first}=true, or rename it")
            owner[path] = case


def has_mask(pipeline: PredictionPipeline, item: PredictionItem, output: Path) -> bool:
    """Return whether an image has its mask, and the mask is not older than the image."""
    from lightning_dice.cli.prediction_manifest import is_finished

    return is_finished([[output / path for path in group] for group in pipeline.mask_files(item.case)], item.files)


def read_ahead(
    items: Iterable[PredictionItem], read: Callable[[PredictionItem], LoadedImage]
) -> Iterator[tuple[PredictionItem, Future[LoadedImage]]]:
    """Yield each image while a thread reads the next one: two are in memory at a time."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="read")
    reading: deque[tuple[PredictionItem, Future[LoadedImage]]] = deque()
    try:
        for item in items:
            reading.append((item, pool.submit(read, item)))
            if len(reading) > 1:
                yield reading.popleft()
        yield from reading
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def run_folders(run: Any) -> list[Path]:
    """Parse one folder or several: `a`, or `[a,b]` in Hydra's syntax, with quotes around a name with a comma.

    >>> [str(path) for path in run_folders('[a, "b, c"]')]
    ['a', 'b, c']
    """
    if isinstance(run, (list, ListConfig)):
        names = [str(name) for name in run]
    else:
        text = str(run)
        several = text.startswith("[") and text.endswith("]") and not Path(text).is_dir()
        names = next(csv.reader([text[1:-1]], skipinitialspace=True), []) if several else [text]
    if not names or not all(names):
        raise UserError(f"run must be the folder of a run, or several as in run=[a,b], got {run}")
    return [Path(name.strip()).expanduser() for name in names]


def number_of_processes(trainer: DictConfig) -> int:
    """Return how many processes `trainer.devices` asks for on this machine."""
    devices = trainer.devices
    if isinstance(devices, (list, ListConfig)):
        return max(1, len(devices))
    if trainer.accelerator != "cpu" and (devices in (-1, "-1", "auto")):
        import torch

        return max(1, torch.cuda.device_count())
    try:
        number = int(devices)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise UserError(f"trainer.devices must be a number of processes >= 1, got {devices}")
    return number


def choose_device(name: str, devices: Any, local: int) -> torch.device:
    """Return the device of this process.

    Args:
        name: Lightning's accelerator: `auto`, `cpu`, `gpu`, `cuda` or `mps`.
        devices: their number, or a list of them.
        local: the index of this process on its machine.

    Raises:
        UserError: there is no such device.
    """
    import torch

    if name == "cpu":
        return torch.device("cpu")
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    found = [kind for kind, available in kinds.items() if available and name in ("auto", "gpu", kind)]
    if not found and name != "auto":
        raise UserError(f"no {name} is available; use device=cpu")
    if not found or found[0] != "cuda":
        return torch.device(found[0] if found else "cpu")
    index = int(devices[local % len(devices)]) if isinstance(devices, (list, ListConfig)) else local
    if index >= torch.cuda.device_count():
        raise UserError(f"there is no GPU {index}: this machine has {torch.cuda.device_count()}; lower trainer.devices")
    return torch.device("cuda", index)


@contextmanager
def _show_file_warnings(print_line: Callable[[str], None]) -> Iterator[None]:
    """Print warnings about single files as plain lines, without Python's file and line number."""
    from lightning_dice.data.errors import FileWarning

    with warnings.catch_warnings():
        warnings.simplefilter("always", FileWarning)
        default = warnings.showwarning

        def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
            if issubclass(category, FileWarning):
                print_line(str(message))
            else:
                default(message, category, *rest, **more)

        warnings.showwarning = show
        yield


if __name__ == "__main__":
    main()
