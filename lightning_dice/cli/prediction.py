"""Predict image files and write their masks, with the networks of one or more runs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning_dice.cli.config import instantiate
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.prediction_manifest import differences
from lightning_dice.cli.required_extras import check_extras

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from lightning_dice.data.interfaces import LoadedImage, PredictionIO, PredictionItem
    from lightning_dice.inference import Predictor
    from lightning_dice.module import SegmentationModule

# Parts of a run's config that do not influence a mask.
_IRRELEVANT = {
    "module": {"loss", "metrics", "optimizer", "scheduler", "micro_batch_size", "interval", "monitor", "lr_scaling"},
    "data": {
        *("root", "batch_size", "eval_batch_size", "num_workers"),
        *("read_size", "patches_per_image", "oversample_foreground", "cache", "tile"),
    },
}
_WINDOW = 512  # pixels along each axis of the windows of a large image, if the run has no patch size
_LARGEST_WHOLE = 2**22  # pixels that a run trained on parts of its images predicts at once
_PREVIEW = 2048  # pixels along the longer axis of an overlay of a large image


class Skipped(Exception):
    """An image that could not be read or predicted; the others can."""


class Prediction(NamedTuple):
    """The prediction for an image.

    Attributes:
        labels: class ids `(*size)` or bool planes `(classes, *size)`.
        probs: float32 `(classes, *size)`; `None` unless requested.
        overlay: RGB pixels of the image with its classes drawn over it; `None` unless requested.
    """

    labels: Tensor
    probs: Tensor | None = None
    overlay: NDArray[np.uint8] | None = None


class PredictionPipeline:
    """Reads images, predicts them and writes their masks, with the settings of one or more runs.

    Args:
        config: the command's config.
        overrides: applied to the runs' configs.
        folders: the runs; several are an ensemble.
        device: where the networks go.

    Attributes:
        reader: reads the images and writes the masks.
        settings: everything that influences a mask, as plain values.
        made_by: what else is recorded beside the masks: runs and checkpoints.
        notes: lines to print.
        subfolders: folders in the output folder for files other than the masks.

    Raises:
        UserError: a run or a setting is wrong.
    """

    def __init__(self, config: DictConfig, overrides: list[str], folders: Sequence[Path], device: torch.device) -> None:
        from lightning_dice.cli import run_folder
        from lightning_dice.cli.experiment import silence_libraries

        silence_libraries()
        if len(folders) > 1 and config.checkpoint not in ("best", "last"):
            raise UserError(f"checkpoint must be best or last for several runs, got {config.checkpoint}")
        runs = [run_folder.reopen(folder, overrides, command="predict") for folder in folders]
        for run in runs:
            check_extras(run, leave_out=("logger", "callbacks", "augment"))
        _check_same_task(folders, runs)
        self.run, self.format = runs[0], config.format
        self.overlays, self.wants_probabilities = bool(config.overlays), bool(config.probabilities)
        self.subfolders = ["overlays"] * self.overlays + ["probabilities"] * self.wants_probabilities
        self.reader, preprocessing = _open_reader(config, folders, runs)
        self.normalize: Any = instantiate(self.run.normalize, "normalize")
        precision = str(config.trainer.precision or self.run.trainer.precision)
        self.settings: dict[str, Any] = {
            "format": self.format,
            "probabilities": self.wants_probabilities,
            "overlays": self.overlays,
            "large": int(config.large),
            "precision": precision,
            "preprocessing": preprocessing,
            "networks": [],
        }
        self.made_by: dict[str, Any] = {"runs": [], "checkpoints": []}
        self.notes: list[str] = []
        modules = [self._load(config, folder, run, device) for folder, run in zip(folders, runs, strict=True)]
        self._precision, dtype = precision_context(precision, device)
        self.predictor = _join(modules, device)
        self.predictor.nets = [_in_dtype(net.to(dtype), dtype) for net in self.predictor.nets]  # type: ignore[attr-defined]

    def _load(self, config: DictConfig, folder: Path, run: DictConfig, device: torch.device) -> SegmentationModule:
        """Load the trained module of a run, and record its checkpoint and settings."""
        from lightning_dice.cli import run_folder
        from lightning_dice.inference.postprocessing import sha256

        checkpoint = run_folder.find_checkpoint(folder, config.checkpoint)
        module = run_folder.build_module(run, trained=True)
        module.load_state_dict(run_folder.check_weights(module, checkpoint, run)["state_dict"])
        note = run_folder.calibrate(module, folder, str(config.calibration), checkpoint)
        self.notes += [note] if note is not None else []
        postprocessing = module.inference.postprocessing.settings()
        network = {"checkpoint": sha256(checkpoint), **_relevant_settings(run), "postprocessing": postprocessing}
        self.settings["networks"].append(network)
        self.made_by["runs"].append(str(folder.absolute()))
        self.made_by["checkpoints"].append(str(checkpoint.absolute()))
        return module.eval().to(device)

    def mask_files(self, case: str) -> list[list[Path]]:
        """Return the files of a case's mask, relative to the output folder, for each format that it may have."""
        from lightning_dice.data import DataError

        groups = [self.reader.names(case, self.format)]
        if self.format is None:
            with suppress(DataError):
                groups.append(self.reader.names(case, "tiff"))  # of a large image
        return groups

    def possible_files(self, case: str) -> list[Path]:
        """Return all files that a case may have with any settings, relative to the output folder."""
        from lightning_dice.data import DataError

        beside = f"probabilities/{case}.tif", f"probabilities/{case}.nii.gz", f"overlays/{case}.png"
        paths = [Path(name) for name in beside]
        for format in (None, "png", "tiff", "nifti"):
            with suppress(DataError):
                paths += self.reader.names(case, format)
        return list(dict.fromkeys(paths))

    def read(self, item: PredictionItem) -> LoadedImage:
        """Read and normalize an image. Called in the thread that reads ahead.

        Raises:
            Skipped: it cannot be read.
        """
        from lightning_dice.data import DataError

        try:
            return self.reader.read(item).normalized(self.normalize)
        except DataError as error:
            raise Skipped(str(error)) from error
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            raise Skipped(f"{item.files[0]}: {type(error).__name__}: {error}") from error

    def predict(self, loaded: LoadedImage, item: PredictionItem) -> Prediction:
        """Predict an image.

        Raises:
            Skipped: it does not fit the network or the memory.
        """
        import torch

        if loaded.windowed and self.wants_probabilities:
            raise Skipped(f"{item.files[0]}: is read by windows, and is too large for probabilities=true")
        trained_on_parts = OmegaConf.select(self.run, "data.read_size") is not None
        too_large = loaded.windowed or (trained_on_parts and math.prod(loaded.image.shape[1:]) > _LARGEST_WHOLE)
        predictor: Any = self._windowed_predictor() if too_large else self.predictor
        try:
            with torch.inference_mode(), self._precision():
                if self.wants_probabilities:
                    logits = predictor.logits(loaded.image, loaded.size)
                    labels = predictor.labels_from_logits(logits, loaded.spacing).cpu()
                    probs = predictor.probabilities(logits).cpu()
                else:
                    labels, probs = predictor.labels(loaded.image, loaded.size, loaded.spacing), None
            return Prediction(labels, probs, self._overlay(labels, loaded) if self.overlays else None)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise Skipped(f"{item.files[0]}: {_reason(error)}") from error

    def write(self, prediction: Prediction, loaded: LoadedImage, item: PredictionItem, output: Path) -> None:
        """Write the files of an image; the mask last, as an image with a mask counts as done.

        Raises:
            UserError: the output folder cannot be written to.
        """
        from lightning_dice.plotting.mask_overlay import write_png

        try:
            if prediction.probs is not None:
                self.reader.write_probabilities(output / "probabilities", item.case, prediction.probs, loaded)
            if prediction.overlay is not None:
                write_png(output / "overlays" / f"{item.case}.png", prediction.overlay)
            self.reader.write(output, item.case, prediction.labels, loaded, self.format)
        except OSError as error:
            raise UserError(
                f"cannot write the mask of {item.case} to {output}: {error.strerror or error}; finished masks "
                "are kept, and the same command continues from there"
            ) from error

    def _overlay(self, labels: Tensor, loaded: LoadedImage) -> NDArray[np.uint8]:
        from lightning_dice.plotting.mask_overlay import mask_overlay, slice_with_most_foreground

        image, step = loaded.preview(_PREVIEW)
        if len(loaded.size) == 3:
            image, labels = slice_with_most_foreground(image, labels)
        else:
            labels = labels[..., ::step, ::step]
        data = self.run.data
        background = [int(index) for index in data.exclude_classes]
        return mask_overlay(image, labels, len(data.classes), data.activation, background)

    def _windowed_predictor(self) -> Predictor:
        """Return the predictor; if it has no windows of its own, with windows of the training patch size."""
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
    """Translate a Trainer's precision for a device: a context for the network, and the dtype of its weights.

    Float16 becomes float32 on a CPU, which hardly supports it.

    Raises:
        UserError: an unknown precision.
    """
    import torch

    types = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}
    name, _, kind = precision.partition("-")
    dtype = types.get(name)
    if dtype is None:
        raise UserError(f"trainer.precision={precision} is not supported by predict; choose trainer.precision=32-true")
    if device.type == "cpu" and dtype == torch.float16:
        return nullcontext, torch.float32
    if kind == "mixed" or (not kind and name in ("16", "bf16")):
        return lambda: torch.autocast(device.type, dtype=dtype), torch.float32
    return nullcontext, dtype


def _in_dtype(net: Any, dtype: torch.dtype) -> Callable[[Tensor], Any]:
    return lambda batch: net(batch.to(dtype))


def _join(modules: Sequence[SegmentationModule], device: torch.device) -> Predictor:
    """Return the predictor of a module, or of the mean of several."""
    from lightning_dice.inference import Predictor

    predictors = [module.predictor(device) for module in modules]
    try:
        return predictors[0] if len(predictors) == 1 else Predictor.ensemble(predictors)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_same_task(folders: Sequence[Path], runs: Sequence[DictConfig]) -> None:
    """Check that the runs of an ensemble take the same images and have the same classes."""
    for name in ("data.classes", "data.activation", "data.channels", "normalize"):
        values = [OmegaConf.select(run, name) for run in runs]
        plain = [OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for v in values]
        for folder, value in zip(folders, plain, strict=True):
            if value != plain[0]:
                raise UserError(
                    f"the runs of an ensemble must have the same {name}, got {plain[0]} in {folders[0]} and {value} in "
                    f"{folder}"
                )


def _open_reader(config: DictConfig, folders: Sequence[Path], runs: Sequence[DictConfig]) -> tuple[PredictionIO, Any]:
    """Return the reader of the first run, and its preprocessing as plain values, which all runs must share."""
    from lightning_dice.data import DataError

    options = {"follow_symlinks": bool(config.follow_symlinks), "large": int(config.large)}
    readers: list[PredictionIO] = []
    try:
        for run in runs:
            source = instantiate(run.data.datamodule.source, "data")
            if getattr(source, "reader", None) is None:
                raise UserError(f"the run's data source, a {type(source).__name__}, has no reader for image files")
            readers.append(source.reader.with_options(**options))
        readers[0].check_output(config.format, probabilities=bool(config.probabilities))
        # Of volumes it depends on the training cases.
        plain = [json.loads(json.dumps(dataclasses.asdict(reader.preprocessing()))) for reader in readers]
    except DataError as error:
        raise UserError(str(error)) from error
    for folder, preprocessing in zip(folders, plain, strict=True):
        if differing := differences(plain[0], preprocessing):
            raise UserError(
                f"the runs of an ensemble must preprocess images alike; {folders[0]} and {folder} differ in "
                + "; ".join(differing)
            )
    return readers[0], plain[0]


def _relevant_settings(run: DictConfig) -> dict[str, Any]:
    """Return the settings of a run that influence a mask, the same wherever the run's folder is."""
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
        "module": without(plain["module"], _IRRELEVANT["module"]),
        "normalize": without(plain["normalize"], set()),
        "data": without(data, _IRRELEVANT["data"]),
    }


def _reason(error: Exception) -> str:
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "is too large for the memory; set inference.size=[512,512], for example, to predict it by windows"
    return f"could not be predicted ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
