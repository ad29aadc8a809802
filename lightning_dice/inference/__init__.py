"""Prediction of images of any size: windows, mirroring, ensembles and post-processing.

`Predictor` predicts; `Inference` holds its settings, for a module and its config; `PostProcessing` turns logits into
labels, and `find_postprocessing` reads the settings that `lightning_dice.calibrate` has written for a run.
"""

from lightning_dice.inference.postprocessing import (
    CALIBRATION,
    PostProcessing,
    combine_postprocessing,
    find_postprocessing,
)
from lightning_dice.inference.predictor import Inference, Predictor
from lightning_dice.inference.sliding_window import Chunk, Net, Sliceable, SlidingWindow
from lightning_dice.inference.test_time_augmentation import Mirroring, mean_logits

__all__ = [
    "CALIBRATION",
    "Chunk",
    "Inference",
    "Mirroring",
    "Net",
    "PostProcessing",
    "Predictor",
    "Sliceable",
    "SlidingWindow",
    "combine_postprocessing",
    "find_postprocessing",
    "mean_logits",
]
