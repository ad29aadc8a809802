"""NIfTI files for the tests."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

# Voxel to world coordinates, as stored by different scanners and tools.
AFFINES = {
    "RAS": np.diag([1.0, 2.0, 3.0, 1.0]),
    "LPS": np.array([[-1.0, 0, 0, 40], [0, -2.0, 0, 30], [0, 0, 3.0, -5], [0, 0, 0, 1]]),
    "permuted": np.array([[0, 0, -1.5, 9], [1.25, 0, 0, 2], [0, -2.0, 0, 7], [0, 0, 0, 1]]),
    "oblique": np.array([[0.9, 0.3, 0.1, -4], [-0.2, -1.4, 0.4, 20], [0.1, 0.3, 2.5, 3], [0, 0, 0, 1]]),
}


def write(path: Path, array: object, affine: object = None, **header: object) -> Path:
    """Write an array as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.eye(4) if affine is None else np.asarray(affine)
    image = nib.Nifti1Image(np.asarray(array), affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def blob(seed: int, size: tuple[int, ...] = (10, 12, 8)) -> tuple[np.ndarray, np.ndarray]:
    """Make an image and a mask with two boxes, labels 1 and 2."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(size, np.uint8)
    mask[2:5, 3:7, 2:6], mask[5:7, 3:7, 2:6] = 1, 2
    image = (rng.normal(100, 10, size) + 50 * mask).astype(np.int16)
    return image, mask


def folders(root: Path, splits: dict[str, int], affine: object = None, **settings: object) -> Path:
    """Write `images/<split>/<case>.nii.gz` and masks, with the given number of cases."""
    for number, (split, count) in enumerate(splits.items()):
        for index in range(count):
            image, mask = blob(100 * number + index, **settings)
            write(root / "images" / split / f"{split}{index}.nii.gz", image, affine)
            write(root / "masks" / split / f"{split}{index}.nii.gz", mask, affine)
    return root


def nnunet(root: Path, cases: int = 4, channels: int = 1, labels: dict | None = None, **facts: object) -> Path:
    """Write an nnU-Net raw data set."""
    facts = {
        "channel_names": {str(number): "CT" if number else "T1" for number in range(channels)},
        "labels": labels or {"background": 0, "front": 1, "back": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
        **facts,
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(facts))
    for index in range(cases):
        image, mask = blob(index)
        for channel in range(channels):
            write(root / "imagesTr" / f"c{index}_{channel:04d}.nii.gz", image + channel, AFFINES["LPS"])
        write(root / "labelsTr" / f"c{index}.nii.gz", mask, AFFINES["LPS"])
    return root
