"""What a survey finds beyond its report: exchanged files, and cases that can be read although others are wrong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lightning_dice.data import DataError, MaskFormat
from lightning_dice.data.errors import DataErrors
from lightning_dice.data.interfaces import InspectableSource
from tests.data.image_sources import folder_source

TWO = MaskFormat(["background", "lesion"])


def folder(root, channels=1, count=6):
    """Photographs of noise, and masks of a disc."""
    for part in ("images/train", "masks/train", "images/val", "masks/val"):
        (root / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    disc = (np.hypot(*np.mgrid[-16:16, -16:16]) < 9).astype(np.uint8)
    for split, number in (("train", count), ("val", 2)):
        for index in range(number):
            photo = rng.integers(0, 256, (32, 32, 3) if channels == 3 else (32, 32), dtype=np.uint8)
            Image.fromarray(photo).save(root / f"images/{split}/c{index}.png")
            Image.fromarray(disc).save(root / f"masks/{split}/c{index}.png")


def exchange(root, name):
    one, two = root / f"images/{name}", root / f"masks/{name}"
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)


def refused(source) -> DataErrors:
    with pytest.raises(DataErrors) as caught:
        source.check()
    return caught.value


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_and_its_mask_exchanged(tmp_path, channels):
    folder(tmp_path, channels)
    exchange(tmp_path, "train/c2.png")
    (problem,) = refused(folder_source(tmp_path, TWO, channels=channels if channels == 1 else 3)).problems
    assert problem.where == str(tmp_path / "masks/train/c2.png")
    assert problem.what == "looks like a photograph, and its image c2.png like a mask: it holds 2 values"
    assert "Exchange the two files" in problem.remedy


def test_all_of_them_exchanged(tmp_path):
    folder(tmp_path)
    problems = refused(folder_source(tmp_path, TWO, channels=1, images="masks", masks="images")).problems
    assert len(problems) == 8
    assert all("like a mask" in problem.what for problem in problems)


def test_a_photograph_among_the_masks_does_not_spoil_the_advice_for_the_others(tmp_path):
    folder(tmp_path)
    for path in tmp_path.glob("masks/*/*.png"):
        Image.fromarray(np.asarray(Image.open(path)) * 200).save(path)
    (tmp_path / "masks/train/c5.png").write_bytes((tmp_path / "images/train/c5.png").read_bytes())
    problems = refused(folder_source(tmp_path, TWO, channels=1)).problems
    (photo,) = [problem for problem in problems if "looks like a photograph" in problem.what]
    assert "like a mask" not in photo.what
    rest = [problem for problem in problems if problem is not photo]
    assert len(rest) == 7
    assert all("data.label_map={200:1}" in problem.remedy for problem in rest)


def test_the_rest_can_be_read(tmp_path):
    folder(tmp_path)
    (tmp_path / "masks/train/c1.png").unlink()
    (tmp_path / "images/train/c3.png").write_bytes(b"")
    source = folder_source(tmp_path, TWO, channels=1)
    assert isinstance(source, InspectableSource)
    assert len(refused(source).problems) == 2
    with pytest.raises(DataError):
        source.split("train")
    cases = source.readable("train")
    assert cases is not None
    assert [pair.case for pair in cases.pairs] == ["c0", "c2", "c3", "c4", "c5"]
    assert (cases.sizes[1], cases.sizes[2]) == ((32, 32), (0, 0))
    assert cases[1].case == "c2"
    with pytest.raises(DataError, match="is empty"):
        cases[2]
    assert source.readable("test") is None
    assert source.kinds()["train", "c2"] == "8-bit gray"
    assert ("train", "c3") not in source.kinds()
