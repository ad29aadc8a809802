"""Masks of images: `python -m lightning_dice.predict run=<folder> input=<folder or file> output=<folder>`."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning_dice.configs import UserError, instantiate, run_command

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from lightning_dice.data.reader import Item, Reader, Scan
    from lightning_dice.inference import Predictor
    from lightning_dice.module import SegmentationModule
    from lightning_dice.shares import Shares

SETTINGS = (
    *("run", "input", "output", "checkpoint", "calibration", "format", "probabilities", "overlays"),
    *("overwrite", "follow_links", "large", "device", "trainer"),
)
# Of a run's config, what no mask hangs on.
_NO_MATTER = {
    "module": {"loss", "metrics", "optimizer", "scheduler", "micro_batch_size", "interval", "monitor", "lr_scaling"},
    "data": {"root", "batch_size", "eval_batch_size", "num_workers"},
}
_WINDOW = 512  # pixels along each axis, where a picture must be read by windows and the run names no size
_LINE = 30.0  # seconds between lines of progress, where there is no terminal
_PREVIEW = 2048  # pixels along the longer axis of an overlay of a picture that is read by windows


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
    from lightning_dice.shares import Shares

    folders = run_folders(config.run)
    shares = Shares(number_of_processes(config.trainer), "lightning_dice.predict", arguments)
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


def _predict(config: DictConfig, overrides: list[str], folders: list[Path], shares: Shares, stop: Stop) -> int:
    from lightning_dice.data.reader import Item

    device = choose_device(config.trainer.accelerator, config.trainer.devices, shares.local)
    output = Path(config.output).expanduser()
    method: Method | None = None

    def decide() -> dict[str, Any]:
        nonlocal method
        method = Method(config, overrides, folders, device)
        return _plan(config, method, output)

    plan = shares.agreed(decide)
    if method is None:
        method = Method(config, overrides, folders, device)
    waiting = [Item(case, tuple(map(Path, files))) for case, files in plan["waiting"]]
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


def _plan(config: DictConfig, method: Method, output: Path) -> dict[str, Any]:
    """Find the images, see that no file would be lost, and what is done already: plain values."""
    from lightning_dice.data import DataError
    from lightning_dice.predictions import Manifest, begin

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
    begin(output, about, files, overwrite=config.overwrite)
    waiting = [item for item in items if not finished_already(method, item, output)]
    return {
        "waiting": [[item.case, [str(path) for path in item.files]] for item in waiting],
        "images": len(items) + len(skipped),
        "there": len(items) - len(waiting),
        "skipped": skipped,
        "notes": notes,
    }


class Skipped(Exception):
    """An image that could not be read or predicted; the others can."""


class Method:
    """Images to masks, as some runs and settings have it.

    Args:
        config: of the command.
        overrides: of the runs' configs.
        folders: of the runs.
        device: where their networks go.

    Attributes:
        reader: of the images.
        settings: everything that a mask hangs on, as plain values.
        made_by: what else is worth keeping beside the masks.
        notes: to be told.
        folders: of what is written beside the masks.

    Raises:
        UserError: a run or a setting is not as it should be.
    """

    def __init__(self, config: DictConfig, overrides: list[str], folders: Sequence[Path], device: torch.device) -> None:
        from lightning_dice import runs
        from lightning_dice.data import DataError
        from lightning_dice.data.volume_reader import VolumeReader
        from lightning_dice.inference import Predictor
        from lightning_dice.inference.decision import digest
        from lightning_dice.session import quiet

        quiet()
        self.device, self.format = device, config.format
        self.overlays, self.wants_probabilities = bool(config.overlays), bool(config.probabilities)
        if len(folders) > 1 and config.checkpoint not in ("best", "last"):
            raise UserError(f"checkpoint must be best or last for several runs, got {config.checkpoint}")
        configs = [runs.reopen(folder, overrides) for folder in folders]
        _check_alike(folders, configs)
        self.run = configs[0]
        try:
            readers = [_reader(run, config) for run in configs]
            self.reader = readers[0]
            self.reader.names("case", self.format)
            # What volumes become for a network is a fact of its training cases.
            prepared = [reader.prepare() for reader in readers if isinstance(reader, VolumeReader)]
        except DataError as error:
            raise UserError(str(error)) from error
        for folder, preparation in zip(folders, prepared, strict=False):
            if preparation != prepared[0]:
                raise UserError(
                    f"the runs of an ensemble must prepare images alike, got {prepared[0]} of {folders[0]} and "
                    f"{preparation} of {folder}"
                )
        self.notes: list[str] = []
        self.settings: dict[str, Any] = {
            "format": self.format,
            "probabilities": self.wants_probabilities,
            "overlays": self.overlays,
            "networks": [],
        }
        self.made_by: dict[str, Any] = {"runs": [], "checkpoints": []}
        predictors = []
        for folder, run in zip(folders, configs, strict=True):
            checkpoint = runs.find_checkpoint(folder, config.checkpoint)
            module = self._module(folder, run, checkpoint, str(config.calibration))
            predictors.append(module.predictor(device))
            own = _what_matters(run) | {"decision": module.inference.decision.settings()}
            self.settings["networks"].append({"checkpoint": digest(checkpoint), **own})
            self.made_by["runs"].append(str(folder.absolute()))
            self.made_by["checkpoints"].append(str(checkpoint.absolute()))
        try:
            self.predictor = predictors[0] if len(predictors) == 1 else Predictor.ensemble(predictors)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.normalize: Any = instantiate(self.run.normalize, "normalize")
        self._context, dtype = numbers(str(config.trainer.precision or self.run.trainer.precision), device)
        self.predictor.nets = [_in_dtype(net.to(dtype), dtype) for net in self.predictor.nets]  # type: ignore[attr-defined]
        self.folders = ["overlays"] * self.overlays + ["probabilities"] * self.wants_probabilities

    def _module(self, folder: Path, run: DictConfig, checkpoint: Path, calibration: str) -> SegmentationModule:
        from lightning_dice import runs
        from lightning_dice.inference import find_decision

        module = runs.build_module(run, trained=True)
        module.load_state_dict(runs.check_weights(module, checkpoint)["state_dict"])
        try:
            decision = find_decision(folder, calibration, checkpoint)
            module.calibrate(decision)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from error
        if decision.origin:
            self.notes.append(f"calibration of {decision.origin}: {decision}")
        return module.eval().to(self.device)

    def masks(self, case: str) -> list[list[Path]]:
        """For each format that a case's mask may have, its files below the output folder."""
        from lightning_dice.data import DataError

        groups = [self.reader.names(case, self.format)]
        if self.format is None:
            # What a large picture gets.
            with suppress(DataError):
                groups.append(self.reader.names(case, "tiff"))
        return groups

    def read(self, item: Item) -> Scan:
        """An image, normalized. Called in the thread that reads ahead.

        Raises:
            Skipped: it cannot be read.
        """
        from lightning_dice.data import DataError
        from lightning_dice.data.large import LargeImage, normalized

        try:
            scan = self.reader.read(item)
            shown: Any = scan.image
            if isinstance(shown, LargeImage):
                image: Any = normalized(shown, self.normalize)
                return scan._replace(image=image)
            image = shown if self.normalize is None else self.normalize(shown)
        except DataError as error:
            raise Skipped(str(error)) from error
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            raise Skipped(f"{item.files[0]}: {type(error).__name__}: {error}") from error
        return scan._replace(image=image)

    def write(self, scan: Scan, item: Item, output: Path) -> None:
        """Predict an image, and write what is made of it; the mask last, by which it is known to be done.

        Raises:
            Skipped: the network or the machine cannot take it.
            UserError: the output cannot be written to.
        """
        from lightning_dice.data.large import LargeImage

        image: Any = scan.image
        try:
            labels, probs = self._labels(scan, item)
            picture = overlay(*_flat(scan, labels), self.run) if self.overlays else None
        except Skipped:
            raise
        except (ValueError, RuntimeError, MemoryError) as error:
            raise Skipped(f"{item.files[0]}: {_explained(error)}") from error
        finally:
            if isinstance(image, LargeImage):
                image.close()
        try:
            if probs is not None:
                self.reader.write_probabilities(output / "probabilities", item.case, probs, scan)
            if picture is not None:
                write_png(output / "overlays" / f"{item.case}.png", picture)
            self.reader.write(output, item.case, labels, scan, self.format)
        except OSError as error:
            raise UserError(
                f"cannot write the mask of {item.case} to {output}: {error.strerror or error}; what is written stays, "
                "and the same command goes on from there"
            ) from error

    def _labels(self, scan: Scan, item: Item) -> tuple[Tensor, Tensor | None]:
        import torch

        from lightning_dice.data.large import LargeImage

        predictor = self.predictor
        if isinstance(scan.image, LargeImage):
            if self.wants_probabilities:
                raise Skipped(f"{item.files[0]}: is read by windows, and is too large for probabilities=true")
            predictor = self._by_windows()
        with torch.inference_mode(), self._context():
            if not self.wants_probabilities:
                return predictor.labels(scan.image, scan.size, scan.spacing), None
            logits = predictor.logits(scan.image, scan.size)
            labels = predictor.decide(logits, scan.spacing)
            return labels.cpu(), predictor.probabilities(logits).cpu()

    def _by_windows(self) -> Predictor:
        """The predictor, with windows of the size of the training's crops if the run has none of its own."""
        from lightning_dice.inference import Predictor, SlidingWindow

        own = self.predictor
        if own.window is not None:
            return own
        size = OmegaConf.select(self.run, "data.size")
        window = SlidingWindow(list(size) if isinstance(size, ListConfig) else [_WINDOW, _WINDOW])
        return Predictor(
            own.nets,
            window,
            own.flips,
            own.decisions,
            activation=own.activation,
            threshold=own.threshold,
            device=own.device,
        )


def find_images(reader: Reader, source: Path, output: Path) -> tuple[list[Item], list[str], list[str]]:
    """The images of a folder, those of the output folder left out; what was passed over and why; what else to tell.

    Raises:
        DataError: there are none.
        UserError: the output folder is that of the images.
    """
    from lightning_dice.data import DataError
    from lightning_dice.data.pictures import FileWarning, SkippedWarning

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
    items: Iterable[Item], files: dict[str, list[Path]], output: Path, reserved: Sequence[str]
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


def finished_already(method: Method, item: Item, output: Path) -> bool:
    """Whether an image has its mask."""
    from lightning_dice.predictions import finished

    return finished([[output / path for path in group] for group in method.masks(item.case)], item.files)


def ahead(items: Iterable[Item], read: Callable[[Item], Scan]) -> Iterator[tuple[Item, Future[Scan]]]:
    """Each image, while a thread reads the next one: two are in memory at a time."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="read")
    coming: deque[tuple[Item, Future[Scan]]] = deque()
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


def numbers(precision: str, device: torch.device) -> tuple[Callable[[], Any], torch.dtype]:
    """What a Trainer's precision means on a device: a context for the network, and the type of its weights.

    On a CPU, which has no float16 to speak of, that is float32.
    """
    import torch

    types = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}
    name, _, kind = precision.partition("-")
    dtype = types.get(name)
    if dtype is None:
        raise UserError(f"trainer.precision={precision} is not known to predict; choose trainer.precision=32-true")
    if device.type == "cpu" and dtype == torch.float16:
        return nullcontext, torch.float32
    if kind == "mixed" or (not kind and name in ("16", "bf16")):
        return lambda: torch.autocast(device.type, dtype=dtype), torch.float32
    return nullcontext, dtype


def _in_dtype(net: Any, dtype: torch.dtype) -> Callable[[Tensor], Any]:
    return lambda batch: net(batch.to(dtype))


def overlay(image: Tensor, labels: Tensor, run: DictConfig) -> NDArray[np.uint8]:
    """The image in gray or colour, `(height, width, 3)`, with each class in a colour of its own over it.

    Args:
        image: `(channels, height, width)`.
        labels: class ids `(height, width)` or planes `(classes, height, width)`.
        run: the config, for the classes.
    """
    import numpy as np

    from lightning_dice.callbacks.colors import class_colors

    shown = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    low, high = np.percentile(shown.numpy(), [1, 99])
    picture = ((shown - low) / max(float(high - low), 1e-6)).clamp(0, 1).permute(1, 2, 0).numpy() * 255
    background = [int(index) for index in run.data.exclude_classes]
    colors = class_colors(len(run.data.classes), skip=background)
    found = labels.cpu().numpy()
    for index, color in enumerate(colors):
        where = (found == index) if run.data.activation == "softmax" else found[index]
        if index not in background:
            picture[where] = 0.5 * picture[where] + 0.5 * np.array(color)
    pixels: NDArray[np.uint8] = picture.round().astype(np.uint8)
    return pixels


def _flat(scan: Scan, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Image and labels in a plane: of a volume the slice with most foreground, of a large picture every n-th pixel."""
    import torch.nn.functional as F

    from lightning_dice.data.large import LargeImage

    if isinstance(scan.image, LargeImage):
        image, step = scan.image.preview(_PREVIEW)
        return image, labels[..., ::step, ::step]
    image = scan.image
    if tuple(image.shape[1:]) != tuple(scan.size):
        image = F.interpolate(image[None], size=scan.size, mode="nearest")[0]
    if len(scan.size) == 3:
        most = int((labels != 0).flatten(0, -2).sum(0).argmax())
        image, labels = image[..., most], labels[..., most]
        # As it is looked at: with the second axis upwards.
        image, labels = image.transpose(-1, -2).flip(-2), labels.transpose(-1, -2).flip(-2)
    return image, labels


def write_png(path: Path, pixels: NDArray[Any]) -> None:
    """Write a picture whole or not at all."""
    from PIL import Image

    from lightning_dice.files import write_atomically

    write_atomically(path, lambda part: Image.fromarray(pixels).save(part, format="PNG"))


def _check_alike(folders: Sequence[Path], configs: Sequence[DictConfig]) -> None:
    """See that the runs of an ensemble take the same images and give the same classes."""
    for name in ("data.classes", "data.activation", "data.channels", "normalize"):
        values = [OmegaConf.select(config, name) for config in configs]
        plain = [OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for v in values]
        for folder, value in zip(folders, plain, strict=True):
            if value != plain[0]:
                raise UserError(
                    f"the runs of an ensemble must have one {name}, got {plain[0]} of {folders[0]} and {value} of "
                    f"{folder}"
                )


def _reader(run: DictConfig, config: DictConfig) -> Reader:
    from lightning_dice.data.pictures import PictureReader

    source = instantiate(run.data.datamodule.source, "data")
    reader: Reader | None = getattr(source, "reader", None)
    if reader is None:
        raise UserError(f"the run's data, a {type(source).__name__}, say nothing of how files are read: no reader")
    if isinstance(reader, PictureReader):
        return dataclasses.replace(reader, follow_links=bool(config.follow_links), large=int(config.large))
    return reader


def _what_matters(run: DictConfig) -> dict[str, Any]:
    """Of a run's config, what a mask hangs on, as plain values that are the same wherever the run's folder lies."""
    folder = str(run.folder)

    def without(value: Any, leave: set[str]) -> Any:
        if isinstance(value, dict):
            return {str(k): without(v, leave & {"root"}) for k, v in value.items() if str(k) not in leave}
        if isinstance(value, list):
            return [without(entry, set()) for entry in value]
        return value.replace(folder, "<run>") if isinstance(value, str) else value

    plain: Any = OmegaConf.to_container(run, resolve=True)
    data = {key: value for key, value in plain["data"].items() if key != "datamodule"}
    data["source"] = plain["data"]["datamodule"]["source"]
    return {
        "module": without(plain["module"], _NO_MATTER["module"]),
        "normalize": without(plain["normalize"], set()),
        "data": without(data, _NO_MATTER["data"]),
    }


def _explained(error: Exception) -> str:
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "is too large for the memory; set inference.size=[512,512] or so, to predict it by windows"
    return f"could not be predicted ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"


@contextmanager
def _files_told(tell: Callable[[str], None]) -> Iterator[None]:
    """Show what readers say of single files as lines without Python's frame around them."""
    from lightning_dice.data.pictures import FileWarning

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


class Progress:
    """A bar with the time left, on standard error; where that is no terminal, a line now and then.

    Args:
        total: images, of all processes.
        device: for the description.
        shares: which counts them.
    """

    def __init__(self, total: int, device: torch.device, shares: Shares) -> None:
        import time

        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._shares, self._total, self._clock = shares, total, time.monotonic
        self._console = Console(stderr=True)
        live = shares.first and self._console.is_terminal and total > 0
        columns = [
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
            *(TextColumn("left"), TimeRemainingColumn()),
        ]
        self._bar = RichProgress(*columns, console=self._console) if live else None
        processes = f", {shares.size} processes" if shares.size > 1 else ""
        self._task: Any = self._bar.add_task(f"predicting on {device}{processes}", total=total) if self._bar else None
        self._begun = self._printed = self._clock()

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, text: str) -> None:
        """Print a line above the bar, at once."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def count(self) -> None:
        """One more image is done, or skipped."""
        self._show(self._shares.count())

    def look(self) -> None:
        """Show what all processes have done by now."""
        if self._shares.first and self._shares.size > 1:
            self._show(self._shares.count(0))

    def _show(self, done: int) -> None:
        now = self._clock()
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif self._shares.first and now - self._printed >= _LINE and 0 < done < self._total:
            self._printed = now
            left = (now - self._begun) / done * (self._total - done)
            self.tell(f"{done} of {self._total} images, about {left / 60:.1f} minutes left")


class Terminated(BaseException):
    """SIGTERM has come. No `Exception`: nothing that handles errors shall take it for one."""


class Stop:
    """Ctrl-C lets the current image be finished, a second one and SIGTERM drop it; in no case is half a file left.

    Attributes:
        asked: the number of the signal after which no further image shall be begun; 0: none.
        silent: another process says how to go on.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.silent = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Act on signals within this context."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGTERM:
            raise Terminated
        if self.asked:
            raise KeyboardInterrupt
        # Not by print, in the middle of which this may have come.
        os.write(2, b"\nStopping after this image; Ctrl-C again drops it and stops at once.\n")
        self.asked = number

    def status(self, number: int) -> int:
        """Say how to go on; the exit status that shells expect."""
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if not self.silent:
            print(f"\nStopped by {name}: run the same command again to go on.", file=sys.stderr)
        return 128 + number


if __name__ == "__main__":
    main()
