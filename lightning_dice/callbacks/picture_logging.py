"""Send pictures to the loggers that can show them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer


def log_picture(trainer: Trainer, name: str, path: str | Path) -> None:
    """Send a picture to each logger of the trainer that can show pictures, on rank 0.

    Loggers are recognized by their methods, not by their class, so that none of their libraries is imported: W&B
    (`log_image`), TensorBoard (`experiment.add_image`), MLflow (`experiment.log_artifact`) and Comet
    (`experiment.log_image`). A logger that fails causes a warning only: no run should fail because of a picture.

    Args:
        trainer: the Trainer with the loggers.
        name: title of the picture.
        path: a PNG file.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        try:
            _log_to(logger, name, Path(path), trainer.global_step)
        except Exception as error:
            warnings.warn(f"{type(logger).__name__} did not take the picture {path}: {error}", stacklevel=2)


def _log_to(logger: Any, name: str, path: Path, step: int) -> None:
    if callable(getattr(logger, "log_image", None)):
        logger.log_image(key=name, images=[str(path)])
        return
    experiment: Any = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_image", None)):
        experiment.add_image(name, _read_pixels(path), step, dataformats="HWC")
    elif callable(getattr(experiment, "log_artifact", None)) and getattr(logger, "run_id", None):
        experiment.log_artifact(logger.run_id, str(path), "pictures")
    elif callable(getattr(experiment, "log_image", None)):
        experiment.log_image(image_data=str(path), name=name, step=step)


def _read_pixels(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
