"""Data sets, their checks and the datamodule."""

from lightning_dice.data.batch import Batch, Sample
from lightning_dice.data.datamodule import SegmentationData
from lightning_dice.data.errors import DataError
from lightning_dice.data.images.coco import CocoSource
from lightning_dice.data.images.mask_format import MaskFormat
from lightning_dice.data.images.sources import FolderSource
from lightning_dice.data.interfaces import Cases, Source, Split
from lightning_dice.data.patches import PatchSampler
from lightning_dice.data.synthetic import SyntheticSource
from lightning_dice.data.torch_dataset import DatasetSource
from lightning_dice.data.transforms import RandomIntensity, Standardize
from lightning_dice.data.volumes.augmentation import MonaiAugment
from lightning_dice.data.volumes.nnunet import NnunetSource
from lightning_dice.data.volumes.sources import VolumeSource

__all__ = [
    "Batch",
    "Cases",
    "CocoSource",
    "DataError",
    "DatasetSource",
    "FolderSource",
    "MaskFormat",
    "MonaiAugment",
    "NnunetSource",
    "PatchSampler",
    "RandomIntensity",
    "Sample",
    "SegmentationData",
    "Source",
    "Split",
    "Standardize",
    "SyntheticSource",
    "VolumeSource",
]
