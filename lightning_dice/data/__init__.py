"""Data sets, their checks and the datamodule."""

from lightning_dice.data.batch import Batch, Sample
from lightning_dice.data.datamodule import SegmentationData
from lightning_dice.data.folder import FolderSource
from lightning_dice.data.masks import MaskFormat
from lightning_dice.data.source import Cases, DataError, Source, Split
from lightning_dice.data.synthetic import SyntheticSource
from lightning_dice.data.transforms import RandomIntensity, Standardize

__all__ = [
    "Batch",
    "Cases",
    "DataError",
    "FolderSource",
    "MaskFormat",
    "RandomIntensity",
    "Sample",
    "SegmentationData",
    "Source",
    "Split",
    "Standardize",
    "SyntheticSource",
]
