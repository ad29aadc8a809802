"""Data sets of pairs, torchvision's among them, made of small local files."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from lightning_dice.data import DatasetSource, FolderSource, MaskFormat
from lightning_dice.data.errors import DataError
from lightning_dice.data.torch_dataset import to_decoded_image
from tests.cli.test_config import composed
from tests.data.image_sources import dataset_source

SIZE = (6, 8)
IDS = np.arange(48).reshape(SIZE).astype(np.uint8) % 3


def save_image(path: Path, array: np.ndarray, mode: str | None = None) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette(list(np.arange(768) % 256))
    image.save(path)
    return array


def pets(root: Path, **splits: list[str]) -> None:
    for split, names in splits.items():
        for name in names:
            image = np.full((*SIZE, 3), len(name), np.uint8)
            save_image(root / "oxford-iiit-pet/images" / f"{name}.jpg", image)
            save_image(root / "oxford-iiit-pet/annotations/trimaps" / f"{name}.png", IDS + 1)
        lines = [f"{name} 1 1 1\n" for name in names]
        (root / f"oxford-iiit-pet/annotations/{split}.txt").write_text("".join(lines))


def voc(root: Path) -> Path:
    base = root / "VOCdevkit/VOC2012"
    for number, name in enumerate(("2007_1", "2007_2", "2007_3")):
        save_image(base / f"JPEGImages/{name}.jpg", np.full((*SIZE, 3), 40 * number, np.uint8))
        save_image(base / f"SegmentationClass/{name}.png", np.where(IDS == 2, 255, IDS).astype(np.uint8), "P")
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    (base / "ImageSets/Segmentation/train.txt").write_text("2007_1\n2007_2\n")
    (base / "ImageSets/Segmentation/val.txt").write_text("2007_3\n")
    return base


def cityscapes(root: Path) -> None:
    for split, city in (("train", "bonn"), ("val", "ulm"), ("test", "kiel")):
        name = f"{city}_000000_000019"
        save_image(
            root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", np.full((*SIZE, 3), len(split), np.uint8)
        )
        labels = np.arange(48).reshape(SIZE).astype(np.uint8) % 34
        save_image(root / f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png", labels)
        save_image(root / f"gtFine/{split}/{city}/{name}_gtFine_color.png", np.zeros((*SIZE, 4), np.uint8))
        save_image(root / f"gtFine/{split}/{city}/{name}_gtFine_instanceIds.png", labels)


def source_of(*overrides: str) -> DatasetSource | FolderSource:
    from hydra.utils import instantiate

    return instantiate(composed("device=cpu", *overrides).data.datamodule.source)


def test_torchvisions_pets(tmp_path):
    pets(tmp_path, trainval=["Abyssinian_1", "Bengal_22", "pug_3", "pug_4"], test=["Birman_5"])
    source = source_of("data=torchvision", f"data.root={tmp_path}")
    report = source.check()
    assert f"{tmp_path}: 5 cases" in report
    found = {split: [sample.case for sample in source.split(split)] for split in ("train", "val", "test")}
    assert sorted([*found["train"], *found["val"]]) == ["Abyssinian_1", "Bengal_22", "pug_3", "pug_4"]
    assert (len(found["val"]), found["test"]) == (1, ["Birman_5"])
    sample = source.split("test")[0]
    assert torch.equal(sample.mask[0], torch.from_numpy(np.array([1, 0, 255], np.uint8)[IDS]))
    assert sample.image == pytest.approx(torch.full((3, *SIZE), 8 / 255), abs=1.01 / 255)  # JPEG
    assert list(source.split("test").sizes) == [SIZE]


def test_torchvisions_voc_is_vocs_layout(tmp_path):
    base = voc(tmp_path)
    form = {"classes": ["background", "aeroplane"], "activation": "softmax"}
    wrapped = dataset_source(
        torchvision.datasets.VOCSegmentation,
        tmp_path,
        MaskFormat(**form),
        train={"image_set": "train"},
        val={"image_set": "val"},
    )
    folder = source_of("data=voc", f"data.root={base}", "data.classes=[background,aeroplane]")
    for split, names in (("train", ["2007_1", "2007_2"]), ("val", ["2007_3"])):
        ours, theirs = folder.split(split), wrapped.split(split)
        assert [sample.case for sample in ours] == [sample.case for sample in theirs] == names
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.image, other.image)
            assert torch.equal(one.mask, other.mask)
            assert torch.equal(one.mask, torch.from_numpy(np.where(IDS == 2, 255, IDS).astype(np.uint8)))
    assert folder.split("test") is wrapped.split("test") is None


def test_cityscapes_layout_against_torchvisions_table(tmp_path):
    cityscapes(tmp_path)
    source = source_of("data=cityscapes", f"data.root={tmp_path}")
    table = {c.id: c.train_id if c.train_id >= 0 else 255 for c in torchvision.datasets.Cityscapes.classes}
    names = [c.name for c in sorted(torchvision.datasets.Cityscapes.classes, key=lambda c: c.train_id)]
    assert list(source.mask_format.classes) == [name for name in names if name in source.mask_format.classes]
    for split, number in (("train", 5), ("val", 3)):
        (sample,) = source.split(split)
        labels = np.arange(48).reshape(SIZE) % 34
        assert sample.mask.tolist() == np.vectorize(table.get)(labels).tolist()
        assert sample.image.unique().tolist() == pytest.approx([number / 255])
    assert sample.case == "ulm_000000_000019"
    assert source.split("test") is None
    theirs = torchvision.datasets.Cityscapes(str(tmp_path), "train", target_type="semantic")
    wrapped = dataset_source(
        lambda root, download=None: theirs, tmp_path, source.mask_format, train={}, fractions=(1, 0, 0)
    )
    assert torch.equal(wrapped.split("train")[0].mask, source.split("train")[0].mask)
    assert wrapped.split("train")[0].case == "bonn_000000_000019_leftImg8bit"


def test_missing_data_name_the_remedy(tmp_path):
    source = source_of("data=torchvision", f"data.root={tmp_path}")
    with pytest.raises(DataError, match=r"OxfordIIITPet cannot be read there.*set data\.download=true, once"):
        source.check()


class Listed:
    """Pairs by their position, as in any data set."""

    def __init__(self, root: str, pairs: list[tuple[object, object]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[object, object]:
        return self.pairs[index]


def listed(*pairs: tuple[object, object], **settings: object) -> DatasetSource:
    given = {"channels": 1, "train": {"pairs": list(pairs)}, "download": None, "fractions": (1, 0, 0), **settings}
    return dataset_source(Listed, "somewhere", MaskFormat(["a", "b", "c"]), **given)


def test_every_form_of_a_pair():
    gray = np.arange(48, dtype=np.uint8).reshape(SIZE)
    forms = [
        (gray, IDS),
        (torch.from_numpy(gray)[None], torch.from_numpy(IDS).long()),
        (torch.from_numpy(gray)[None] / 255, torch.from_numpy(IDS)[None]),
        (Image.fromarray(gray), Image.fromarray(IDS)),
        (gray[..., None].astype(np.float32) / 255, IDS.astype(np.int64)),
    ]
    source = listed(*forms)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.check()
    for number, sample in enumerate(source.split("train")):
        assert sample.case == f"train-{number}"
        assert torch.allclose(sample.image, torch.from_numpy(gray)[None] / 255)
        assert torch.equal(sample.mask, torch.from_numpy(IDS))


def test_every_problem_is_listed_at_once():
    gray = np.zeros(SIZE, np.uint8)
    source = listed((gray, IDS), (gray, IDS + 5), (gray, IDS[1:]), (gray, IDS, 1), ("x", IDS), (gray[0], IDS))
    with pytest.raises(DataError) as caught:
        source.check()
    for line in [
        "the mask of train-1: holds the values 5 (16 pixels), 6 (16 pixels), 7 (16 pixels)",
        "the mask of train-2: is 5x8 (height x width), but its image train-2 is 6x8",
        "train-3: must be a pair of image and mask, got tuple",
        "train-4: must be a Pillow image, an array or a tensor, got str",
        "train-5: must be numbers of two space axes, got uint8 of the shape (8,)",
    ]:
        assert f"- {line}" in str(caught.value)
    with pytest.raises(DataError, match="the mask of train-1: holds the values 5"):
        source.split("train")[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "VOC"}, "dataset must be a class"),
        ({"train": None}, "train must be the arguments of the data set"),
        ({"root": ""}, "root must name a folder"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        dataset_source(
            **{"dataset": Listed, "root": "x", "mask_format": MaskFormat(["a", "b"]), "train": {}, **settings}
        )


def test_arguments_that_the_data_set_does_not_know():
    with pytest.raises(DataError, match=r"Listed does not take .*download.*Set data\.download=null"):
        listed((IDS, IDS), download=False).check()
    with pytest.raises(DataError, match="Listed is empty"):
        listed().check()


def test_colours_of_a_palette():
    image = Image.fromarray(IDS)
    image.putpalette([0, 0, 0, 200, 10, 10, 10, 200, 10])
    decoded = to_decoded_image(image, "a")
    assert decoded.apply_palette()[0, :3].tolist() == [[0, 0, 0], [200, 10, 10], [10, 200, 10]]
    with pytest.raises(DataError, match="has the colours CMYK"):
        to_decoded_image(Image.new("CMYK", (2, 2)), "a")
