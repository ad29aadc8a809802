"""Sources of images from the settings of `conf/data`, which are flat, for tests that vary them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_dice.data import CocoSource, DatasetSource, FolderSource, ImageFormat, MaskFormat, Raters, SplitSettings


def folder_source(root: str | Path, mask_format: MaskFormat, **settings: Any) -> FolderSource:
    raters = _pop(settings, "raters", "fusion", "reference")
    grouped = Raters(raters.pop("raters", None), **raters)
    return FolderSource(root, mask_format, **_grouped(settings), raters=grouped, **settings)


def coco_source(root: str | Path, mask_format: MaskFormat, **settings: Any) -> CocoSource:
    return CocoSource(root, mask_format, **_grouped(settings), **settings)


def dataset_source(dataset: Any, root: str | Path, mask_format: MaskFormat, **settings: Any) -> DatasetSource:
    return DatasetSource(dataset, root, mask_format, **_grouped(settings), **settings)


def _grouped(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "image_format": ImageFormat(**_pop(settings, "channels", "bands", "max_value", "nodata")),
        "split_settings": SplitSettings(**_pop(settings, "fractions", "seed", "splits", "split_files")),
    }


def _pop(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: settings.pop(name) for name in names if name in settings}
