"""From an image of any size to logits and labels: windows, flips, ensembles, thresholds.

`Predictor` does it; `Inference` holds its settings, for a module and its config; `PostProcessing` turns logits into
labels, and `find_postprocessing` reads the one that `lightning_dice.calibrate` has written for a run.
"""

from lightning_dice.inference.postprocessing import CALIBRATION, PostProcessing, find_postprocessing, pooled
from lightning_dice.inference.predictor import Inference, Predictor
from lightning_dice.inference.sliding_window import Net, Slab, Sliceable, SlidingWindow
from lightning_dice.inference.test_time_augmentation import Mirroring, mean_logits

__all__ = [
    "CALIBRATION",
    "Mirroring",
    "Inference",
    "Net",
    "PostProcessing",
    "Predictor",
    "Slab",
    "Sliceable",
    "SlidingWindow",
    "find_postprocessing",
    "mean_logits",
    "pooled",
]
