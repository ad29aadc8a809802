"""Images to masks, as some runs and settings have it: what `predict` does with each image."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning_dice.cli.config import instantiate
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.prediction_manifest import differences

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from lightning_dice.data.interfaces import LoadedImage, PredictionIO, PredictionItem
    from lightning_dice.inference import Predictor
    from lightning_dice.module import SegmentationModule

# Of a run's config, what no mask hangs on.
_NO_MATTER = {
    "module": {"loss", "metrics", "optimizer", "scheduler", "micro_batch_size", "interval", "monitor", "lr_scaling"},
    "data": {
        *("root", "batch_size", "eval_batch_size", "num_workers"),
        *("read_size", "patches_per_image", "oversample_foreground", "cache", "tile"),
    },
}
_WINDOW = 512  # pixels along each axis, where a picture must be read by windows and the run names no size
_WHOLE = 2**22  # pixels of a picture, beyond which a run that was trained on windows predicts by windows, too
_PREVIEW = 2048  # pixels along the longer axis of an overlay of a picture that is read by windows


class Skipped(Exception):
    """An image that could not be read or predicted; the others can."""


class PredictionPipeline:
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
        from lightning_dice.cli import run_folder
        from lightning_dice.cli.experiment import silence_libraries
        from lightning_dice.data import DataError
        from lightning_dice.data.volumes.prediction_io import VolumePredictionIO
        from lightning_dice.inference import Predictor
        from lightning_dice.inference.postprocessing import digest

        silence_libraries()
        self.device, self.format = device, config.format
        self.overlays, self.wants_probabilities = bool(config.overlays), bool(config.probabilities)
        if len(folders) > 1 and config.checkpoint not in ("best", "last"):
            raise UserError(f"checkpoint must be best or last for several runs, got {config.checkpoint}")
        configs = [run_folder.reopen(folder, overrides) for folder in folders]
        _check_alike(folders, configs)
        self.run = configs[0]
        try:
            readers = [_reader(run, config) for run in configs]
            self.reader = readers[0]
            self.reader.names("case", self.format)
            # What volumes become for a network is a fact of its training cases.
            prepared = [
                _plain(
                    reader.prepare()
                    if isinstance(reader, VolumePredictionIO)
                    else getattr(reader, "image_format", None)
                )
                for reader in readers
            ]
        except DataError as error:
            raise UserError(str(error)) from error
        for folder, preparation in zip(folders, prepared, strict=True):
            if unlike := differences(prepared[0], preparation):
                raise UserError(
                    f"the runs of an ensemble must prepare images alike, of {folders[0]} and {folder} differ "
                    + "; ".join(unlike)
                )
        self.notes: list[str] = []
        self._windowed = OmegaConf.select(self.run, "data.read_size") is not None
        precision = str(config.trainer.precision or self.run.trainer.precision)
        self.settings: dict[str, Any] = {
            "format": self.format,
            "probabilities": self.wants_probabilities,
            "overlays": self.overlays,
            "large": int(config.large),
            "precision": precision,
            "prepared": prepared[0],
            "networks": [],
        }
        self.made_by: dict[str, Any] = {"runs": [], "checkpoints": []}
        predictors = []
        for folder, run in zip(folders, configs, strict=True):
            checkpoint = run_folder.find_checkpoint(folder, config.checkpoint)
            module = self._module(folder, run, checkpoint, str(config.calibration))
            predictors.append(module.predictor(device))
            own = _what_matters(run) | {"decision": module.inference.postprocessing.settings()}
            self.settings["networks"].append({"checkpoint": digest(checkpoint), **own})
            self.made_by["runs"].append(str(folder.absolute()))
            self.made_by["checkpoints"].append(str(checkpoint.absolute()))
        try:
            self.predictor = predictors[0] if len(predictors) == 1 else Predictor.ensemble(predictors)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.normalize: Any = instantiate(self.run.normalize, "normalize")
        self._context, dtype = precision_context(precision, device)
        self.predictor.nets = [_in_dtype(net.to(dtype), dtype) for net in self.predictor.nets]  # type: ignore[attr-defined]
        self.folders = ["overlays"] * self.overlays + ["probabilities"] * self.wants_probabilities

    def _module(self, folder: Path, run: DictConfig, checkpoint: Path, calibration: str) -> SegmentationModule:
        from lightning_dice.cli import run_folder

        module = run_folder.build_module(run, trained=True)
        module.load_state_dict(run_folder.check_weights(module, checkpoint)["state_dict"])
        note = run_folder.calibrate(module, folder, calibration, checkpoint)
        self.notes += [note] if note is not None else []
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

    def traces(self, case: str) -> list[Path]:
        """All files that any settings may have made for a case, below the output folder."""
        from lightning_dice.data import DataError

        beside = f"probabilities/{case}.tif", f"probabilities/{case}.nii.gz", f"overlays/{case}.png"
        paths = [Path(name) for name in beside]
        for format in (None, "png", "tiff", "nifti"):
            with suppress(DataError):
                paths += self.reader.names(case, format)
        return list(dict.fromkeys(paths))

    def read(self, item: PredictionItem) -> LoadedImage:
        """An image, normalized. Called in the thread that reads ahead.

        Raises:
            Skipped: it cannot be read.
        """
        from lightning_dice.data import DataError
        from lightning_dice.data.images.windowed_tiff import LargeImage, normalized

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

    def write(self, scan: LoadedImage, item: PredictionItem, output: Path) -> None:
        """Predict an image, and write what is made of it; the mask last, by which it is known to be done.

        Raises:
            Skipped: the network or the machine cannot take it.
            UserError: the output cannot be written to.
        """
        from lightning_dice.data.images.windowed_tiff import LargeImage

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

    def _labels(self, scan: LoadedImage, item: PredictionItem) -> tuple[Tensor, Tensor | None]:
        import torch

        from lightning_dice.data.images.windowed_tiff import LargeImage

        predictor = self.predictor
        if isinstance(scan.image, LargeImage):
            if self.wants_probabilities:
                raise Skipped(f"{item.files[0]}: is read by windows, and is too large for probabilities=true")
            predictor = self._by_windows()
        elif self._windowed and math.prod(scan.image.shape[1:]) > _WHOLE:
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
        size = OmegaConf.select(self.run, "data.patch_size")
        window = SlidingWindow(list(size) if isinstance(size, ListConfig) else [_WINDOW, _WINDOW])
        return Predictor(
            own.nets,
            window,
            own.mirroring,
            own.postprocessing_per_net,
            activation=own.activation,
            threshold=own.threshold,
            device=own.device,
        )


def precision_context(precision: str, device: torch.device) -> tuple[Callable[[], Any], torch.dtype]:
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

    from lightning_dice.plotting.colors import class_colors

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


def _flat(scan: LoadedImage, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Image and labels in a plane: of a volume the slice with most foreground, of a large picture every n-th pixel."""
    import torch.nn.functional as F

    from lightning_dice.data.images.windowed_tiff import LargeImage

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

    from lightning_dice.io import write_atomically

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


def _reader(run: DictConfig, config: DictConfig) -> PredictionIO:
    from lightning_dice.data.images.prediction_io import ImagePredictionIO

    source = instantiate(run.data.datamodule.source, "data")
    reader: PredictionIO | None = getattr(source, "reader", None)
    if reader is None:
        raise UserError(f"the run's data, a {type(source).__name__}, say nothing of how files are read: no reader")
    if isinstance(reader, ImagePredictionIO):
        return dataclasses.replace(reader, follow_symlinks=bool(config.follow_symlinks), large=int(config.large))
    return reader


def _what_matters(run: DictConfig) -> dict[str, Any]:
    """Of a run's config, what a mask hangs on, as plain values that are the same wherever the run's folder lies."""
    folder = str(run.folder)

    def without(value: Any, leave: set[str]) -> Any:
        if isinstance(value, dict):
            return {str(k): without(v, leave & {"root", "tile"}) for k, v in value.items() if str(k) not in leave}
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


def _plain(settings: Any) -> Any:
    """A dataclass as a file would give it back."""
    return None if settings is None else json.loads(json.dumps(dataclasses.asdict(settings)))


def _explained(error: Exception) -> str:
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "is too large for the memory; set inference.size=[512,512] or so, to predict it by windows"
    return f"could not be predicted ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
