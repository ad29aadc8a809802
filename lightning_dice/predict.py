"""Masks of images: `python -m lightning_dice.predict run=<folder> input=<folder or file> output=<folder>`."""

from __future__ import annotations

import csv
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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
    *("overwrite", "follow_links", "large", "device", "trainer"),
)


def main() -> None:
    """Entry point of `python -m lightning_dice.predict` and `dice-predict`."""
    arguments = sys.argv[1:]
    run_command("predict", lambda config, overrides: predict(config, overrides, arguments), SETTINGS)


def predict(config: DictConfig, overrides: list[str], arguments: Sequence[str] = ()) -> int:
    """Write a mask for each image, as soon as it is made.

    Masks are of the image's size and name, in the geometry and with the values that the training's masks had; classes
    that may overlap (sigmoid, more than one) get a folder each. What the folder was made by is kept beside the masks,
    in `predictions.json`; images that have a mask of the same networks and settings are passed over. An image that
    cannot be read is told and skipped.

    Args:
        config: as of `conf/predict.yaml`.
        overrides: of the run's config, in Hydra's syntax: `module.threshold=0.3`.
        arguments: of the command line, with which further processes are started.

    Returns:
        The exit status: 1 if an image was skipped; 130 or 143 if Ctrl-C or SIGTERM ended it; else 0.

    Raises:
        UserError: a run, its checkpoint, the input or the output is not as it should be; before any work. Or the output
            can no longer be written to.
    """
    from lightning_dice.cli.workers import WorkerPool

    folders = run_folders(config.run)
    shares = WorkerPool(number_of_processes(config.trainer), "lightning_dice.predict", arguments)
    stop = Stop()
    stop.silent = not shares.first
    if not any(argument.startswith("trainer.precision=") for argument in arguments):
        config.trainer.precision = None  # That of each run.
    try:
        with stop.listening():
            return _predict(config, overrides, folders, shares, stop)
    except KeyboardInterrupt:
        return stop.status(signal.SIGINT)
    except Terminated:
        return stop.status(signal.SIGTERM)
    finally:
        shares.close()


def _predict(config: DictConfig, overrides: list[str], folders: list[Path], shares: WorkerPool, stop: Stop) -> int:
    from lightning_dice.data.interfaces import PredictionItem

    device = choose_device(config.trainer.accelerator, config.trainer.devices, shares.local)
    output = Path(config.output).expanduser()
    method: PredictionPipeline | None = None

    def decide() -> dict[str, Any]:
        nonlocal method
        method = PredictionPipeline(config, overrides, folders, device)
        return _plan(config, method, output)

    plan = shares.agreed(decide)
    if method is None:
        method = PredictionPipeline(config, overrides, folders, device)
    waiting = [PredictionItem(case, tuple(map(Path, files))) for case, files in plan["waiting"]]
    if shares.first:
        for note in (*method.notes, *plan["notes"], *plan["skipped"]):
            print(note, file=sys.stderr)
    failed: list[str] = []
    with Progress(len(waiting), device, shares) as progress, _files_told(progress.tell):
        for item, coming in ahead(shares.mine(waiting), method.read):
            if stop.asked:
                break
            try:
                method.write(coming.result(), item, output)
            except Skipped as error:
                failed.append(str(error))
                progress.tell(str(error))
            progress.count()
        reports = shares.end({"failed": failed, "stopped": stop.asked}, progress.look)
    if not shares.first:
        return 0
    lost = sum(report is None for report in reports)
    failed = [*plan["skipped"], *(line for report in reports if report for line in report["failed"])]
    stopped = stop.asked or next((r["stopped"] for r in reports if r and r["stopped"]), 0)
    done = plan["images"] - len(failed)
    if lost or stopped:
        done = sum(finished_already(method, item, output) for item in waiting) + plan["there"]
    earlier = f", {plan['there']} of them from before" if plan["there"] else ""
    print(f"{done} of {plan['images']} images: masks in {output.absolute()}{earlier}")
    if failed:
        print(f"\n{len(failed)} of the images could not be predicted:", *failed, sep="\n  ", file=sys.stderr)
    if lost:
        print(f"\n{lost} of {shares.size} processes ended early: run the same command again to go on", file=sys.stderr)
    if stopped:
        return stop.status(stopped)
    return 1 if failed or lost else 0


def _plan(config: DictConfig, method: PredictionPipeline, output: Path) -> dict[str, Any]:
    """Find the images, see that no file would be lost, and what is done already: plain values."""
    from lightning_dice.cli.prediction_manifest import Manifest, prepare_folder
    from lightning_dice.data import DataError

    source = Path(config.input).expanduser()
    try:
        items, skipped, notes = find_images(method.reader, source, output)
        masks = {item.case: method.masks(item.case) for item in items}
    except DataError as error:
        raise UserError(f"input {error}") from error
    files = {case: [output / path for group in groups for path in group] for case, groups in masks.items()}
    refuse_collisions(items, files, output, method.folders)
    place = source if source.is_dir() else source.parent
    about = Manifest(method.settings, method.made_by, [str(place.resolve())])
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the output folder {output}: {error.strerror}") from error
    if config.overwrite:
        files = {item.case: [output / path for path in method.traces(item.case)] for item in items}
    prepare_folder(output, about, files, overwrite=config.overwrite)
    waiting = [item for item in items if not finished_already(method, item, output)]
    return {
        "waiting": [[item.case, [str(path) for path in item.files]] for item in waiting],
        "images": len(items) + len(skipped),
        "there": len(items) - len(waiting),
        "skipped": skipped,
        "notes": notes,
    }


def find_images(reader: PredictionIO, source: Path, output: Path) -> tuple[list[PredictionItem], list[str], list[str]]:
    """The images of a folder, those of the output folder left out; what was passed over and why; what else to tell.

    Raises:
        DataError: there are none.
        UserError: the output folder is that of the images.
    """
    from lightning_dice.data import DataError
    from lightning_dice.data.errors import FileWarning, SkippedWarning

    folder = source if source.is_dir() else source.parent
    if output.resolve() == folder.resolve():
        raise UserError(f"output {output} is the folder of the images; choose another")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", FileWarning)
        items = reader.find(source)
    inner = output.resolve()
    items = [item for item in items if not any(path.resolve().is_relative_to(inner) for path in item.files)]
    if not items:
        raise DataError(f"{source} holds no image but those in the output folder {output}")
    skipped = [str(warning.message) for warning in told if issubclass(warning.category, SkippedWarning)]
    texts = [str(warning.message) for warning in told if issubclass(warning.category, FileWarning)]
    return items, skipped, [text for text in texts if text not in skipped]


def refuse_collisions(
    items: Iterable[PredictionItem], files: dict[str, list[Path]], output: Path, reserved: Sequence[str]
) -> None:
    """See that no two masks have one file, that none would be written over an image, or among other things.

    Args:
        items: the images.
        files: the masks of each case.
        output: the folder that they go to.
        reserved: folders in it that are for other things.

    Raises:
        UserError: otherwise.
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


def finished_already(method: PredictionPipeline, item: PredictionItem, output: Path) -> bool:
    """Whether an image has its mask."""
    from lightning_dice.cli.prediction_manifest import is_finished

    return is_finished([[output / path for path in group] for group in method.masks(item.case)], item.files)


def ahead(
    items: Iterable[PredictionItem], read: Callable[[PredictionItem], LoadedImage]
) -> Iterator[tuple[PredictionItem, Future[LoadedImage]]]:
    """Each image, while a thread reads the next one: two are in memory at a time."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="read")
    coming: deque[tuple[PredictionItem, Future[LoadedImage]]] = deque()
    try:
        for item in items:
            coming.append((item, pool.submit(read, item)))
            if len(coming) > 1:
                yield coming.popleft()
        yield from coming
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def run_folders(run: Any) -> list[Path]:
    """One folder or several: `a`, or `[a,b]` as Hydra has lists, and with quotes where a name has a comma.

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
    """How many processes `trainer.devices` asks for on this machine."""
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
    """A device of this process.

    Args:
        name: an accelerator of Lightning's: `auto`, `cpu`, `gpu`, `cuda` or `mps`.
        devices: their number, or a list of them.
        local: which of this machine's processes this one is.

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
def _files_told(tell: Callable[[str], None]) -> Iterator[None]:
    """Show what readers say of single files as lines without Python's frame around them."""
    from lightning_dice.data.errors import FileWarning

    with warnings.catch_warnings():
        warnings.simplefilter("always", FileWarning)
        before = warnings.showwarning

        def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
            if issubclass(category, FileWarning):
                tell(str(message))
            else:
                before(message, category, *rest, **more)

        warnings.showwarning = show
        yield


if __name__ == "__main__":
    main()
