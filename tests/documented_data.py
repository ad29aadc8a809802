"""Small data sets for the commands of the documentation, in the formats that its pages describe.

Each function below `write_data` writes the folder of its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from volume_files import AFFINES, blob, folders, nnunet, write

SPLITS = {"train": 8, "val": 3, "test": 3}
SIDE = 40


def write_data(root: Path) -> None:
    """Write all data sets below `root`."""
    for name, classes, channels in (
        ("cells", ["cell"], 1),
        ("elsewhere", ["cell"], 1),
        ("axons", ["background", "axon", "myelin"], 1),
        ("crackforest", ["crack"], 3),
        ("tissue", ["background", "tumor", "stroma"], 3),
    ):
        for split, case, ids in scenes(len(classes) - (classes[0] == "background")):
            if name == "axons":
                ids[:2] = 9  # void
            save(root / name / f"images/{split}/{case}.png", grays(ids, channels))
            save(root / name / f"masks/{split}/{case}_mask.png", ids)
    for split, case, ids in scenes(2):
        image = grays(ids, 3)
        for number, name in enumerate(("artery", "vein"), start=1):
            save(root / f"vessels/masks/{split}/{name}/{case}.png", np.uint8(ids == number))
            save(root / f"flat_vessels/masks/{split}_{case}_{name}.png", np.uint8(ids == number))
        save(root / f"vessels/images/{split}/{case}.png", image)
        save(root / f"flat_vessels/images/{split}_{case}.png", image)
        planes = np.stack([ids == 1, ids == 2, (ids == 1) & (image[..., 0] > 120)], axis=2)
        save(root / f"planes/images/{split}/{case}.png", image)
        save(root / f"planes/masks/{split}/{case}.png", np.uint8(planes))
        save(root / f"colours/images/{split}/{case}.png", image)
        colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)
        save(root / f"colours/masks/{split}/{case}.png", colours[ids])
        save(root / f"raters/images/{split}/{case}.png", image)
        for rater in ("anna", "ben", "clara"):
            save(root / f"raters/masks/{split}/{rater}/{case}.png", np.roll(np.uint8(ids == 1), len(rater), axis=1))
        save(root / f"patterns/{split}/a/{case}_rgb.png", image)
        save(root / f"patterns/{split}/a/{case}_label.png", np.uint8(ids == 1))
    unannotated(root / "partly")
    bands(root / "bands")
    coco(root / "coco")
    voc(root / "VOC2012")
    cityscapes(root / "cityscapes")
    slides(root / "slides")
    folders(root / "liver", SPLITS, AFFINES["LPS"], size=(20, 24, 18))
    for mask in (root / "liver").glob("masks/*/*"):  # one class
        write(mask, np.uint8(blob(0, (20, 24, 18))[1] > 0), AFFINES["LPS"])
    nnunet(root / "Dataset004_Hippocampus", cases=6, labels={"background": 0, "anterior": 1, "posterior": 2})


def write_inputs(root: Path) -> None:
    """Write images without masks, to predict."""
    for _, case, ids in scenes(1):
        save(root / f"images/{case}.png", grays(ids, 1))
    image, _ = blob(1, (20, 24, 18))
    write(root / "scans/patient_1.nii.gz", image, AFFINES["LPS"])


def scenes(objects: int) -> Iterator[tuple[str, str, NDArray[np.uint8]]]:
    """Yield split, case and ids of images with a rectangle of each class."""
    rng = np.random.default_rng(0)
    for split, count in SPLITS.items():
        for index in range(count):
            ids = np.zeros((SIDE, SIDE), np.uint8)
            for label in range(1, objects + 1):
                top, left = rng.integers(2, SIDE - 14, 2)
                ids[top : top + 12, left : left + 10] = label
            yield split, f"{split[0]}{index}", ids


def grays(ids: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Objects of other brightness on a texture of its own, so that no image looks like a copy of another one."""
    rng = np.random.default_rng(ids.astype(np.int64).ravel() @ np.arange(ids.size))
    texture = np.asarray(Image.fromarray(rng.integers(0, 70, (7, 7)).astype(np.uint8)).resize(ids.shape[::-1]))
    image = np.uint8(texture[..., None] + 80 * (ids[..., None] % 9) + rng.integers(0, 20, (*ids.shape, channels)))
    return image if channels > 1 else image[..., 0]


def save(path: Path, array: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def unannotated(root: Path) -> None:
    """Two classes in folders of their own; the first image is not annotated for the second class."""
    for split, case, ids in scenes(2):
        save(root / f"images/{split}/{case}.png", grays(ids, 3))
        for number, name in enumerate(("lesion", "vessel"), start=1):
            mask = np.uint8(ids == number)
            save(
                root / f"masks/{split}/{name}/{case}.png",
                np.full_like(mask, 255) if number == 2 and "0" in case else mask,
            )


def bands(root: Path) -> None:
    """Eight bands of 16 bit, with a border without data."""
    import tifffile

    for split, case, ids in scenes(1):
        image = np.uint16(grays(ids, 8)) * 100
        image[:, :3] = 0
        save(root / f"masks/{split}/{case}.png", ids)
        path = root / f"images/{split}/{case}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, image, photometric="minisblack", planarconfig="contig")


def coco(root: Path) -> None:
    annotations: dict[str, dict[str, list[dict[str, object]]]] = {}
    for split, case, ids in scenes(2):
        if split == "test":
            continue
        year = f"{split}2017"
        found = annotations.setdefault(year, {"images": [], "annotations": [], "categories": []})
        found["categories"] = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
        save(root / f"{year}/{case}.png", grays(ids, 3))
        image = len(found["images"])
        found["images"].append({"id": image, "file_name": f"{case}.png", "height": SIDE, "width": SIDE})
        for label, category in ((1, 1), (2, 3)):
            ys, xs = np.nonzero(ids == label)
            left, top, right, bottom = map(int, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
            entry = {
                "id": len(found["annotations"]),
                "image_id": image,
                "category_id": category,
                "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                "area": (right - left) * (bottom - top),
                "iscrowd": 0,
            }
            found["annotations"].append(entry)
    (root / "annotations").mkdir(parents=True)
    for year, content in annotations.items():
        (root / f"annotations/instances_{year}.json").write_text(json.dumps(content))


def voc(root: Path) -> None:
    lists: dict[str, list[str]] = {}
    for split, case, ids in scenes(2):
        if split != "test":
            save(root / f"JPEGImages/{case}.png", grays(ids, 3))
            save(root / f"SegmentationClass/{case}.png", ids)
            lists.setdefault(split, []).append(case)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for split, cases in lists.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(cases) + "\n")


def cityscapes(root: Path) -> None:
    for split, case, ids in scenes(2):
        if split != "test":
            save(root / f"leftImg8bit/{split}/ulm/{case}_leftImg8bit.png", grays(ids, 3))
            save(root / f"gtFine/{split}/ulm/{case}_gtFine_labelIds.png", np.array([7, 8, 26], np.uint8)[ids])


def slides(root: Path) -> None:
    import tifffile

    for split, case, ids in scenes(1):
        large = np.kron(ids, np.ones((12, 12), np.uint8))
        save(root / f"masks/{split}/{case}.png", large)
        path = root / f"images/{split}/{case}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, grays(large, 3), tile=(64, 64), photometric="rgb")
