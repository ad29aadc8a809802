"""Data sets and the datamodule.

- `datamodule`: `SegmentationData`, which makes the batches; `samplers`, `batching` and `batch` are its parts.
- `interfaces`: what a data source must offer. Start here to write your own.
- Sources: `images` (files of images and masks, COCO), `volumes` (NIfTI, nnU-Net), `torch_dataset` (any torch or
  torchvision data set), `synthetic` (drawn from a seed).
- Between source and batch: `patches` cuts training patches, `transforms` normalizes and augments.
- What sources share: `splits`, `label_map`, `file_names`, `summary_table`, `errors`.
"""

from lightning_dice.data.batch import Batch, Sample
from lightning_dice.data.datamodule import SegmentationData
from lightning_dice.data.errors import DataError
from lightning_dice.data.images.coco import CocoSource
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.mask_format import MaskFormat
from lightning_dice.data.images.raters import Raters
from lightning_dice.data.images.sources import FolderSource
from lightning_dice.data.interfaces import Cases, Source, Split
from lightning_dice.data.label_map import LabelMap
from lightning_dice.data.patches import PatchSampler
from lightning_dice.data.splits import SplitSettings
from lightning_dice.data.synthetic import SyntheticSource
from lightning_dice.data.torch_dataset import DatasetSource
from lightning_dice.data.transforms import RandomIntensity, Standardize
from lightning_dice.data.volumes.augmentation import MonaiAugment
from lightning_dice.data.volumes.nnunet import NnunetSource
from lightning_dice.data.volumes.preprocessing import VolumePreprocessing
from lightning_dice.data.volumes.sources import VolumeSource

__all__ = [
    "Batch",
    "Cases",
    "CocoSource",
    "DataError",
    "DatasetSource",
    "FolderSource",
    "ImageFormat",
    "LabelMap",
    "MaskFormat",
    "MonaiAugment",
    "NnunetSource",
    "PatchSampler",
    "RandomIntensity",
    "Raters",
    "Sample",
    "SegmentationData",
    "Source",
    "Split",
    "SplitSettings",
    "Standardize",
    "SyntheticSource",
    "VolumePreprocessing",
    "VolumeSource",
]
