from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch.utilities import move_data_to_device

from lightning_dice.data import Batch
from lightning_dice.data.batch import find_batch, read_batch

IMAGE, MASK = torch.rand(3, 1, 4, 8), torch.arange(3 * 8 * 8).view(3, 8, 8)


class Named(NamedTuple):
    image: torch.Tensor
    mask: torch.Tensor
    weight: torch.Tensor


@pytest.mark.parametrize(
    ("form", "case"),
    [
        ((IMAGE, MASK), None),
        ([IMAGE, MASK, ["a", "b", "c"]], ["a", "b", "c"]),
        ({"image": IMAGE, "mask": MASK, "case": ("a", 1, 2), "city": "x"}, ["a", "1", "2"]),
        ((IMAGE, MASK, None), None),
        ((IMAGE, MASK, torch.tensor([7, 8, 9])), ["7", "8", "9"]),
        ((IMAGE, MASK, (Path("a.png"), "b", 2)), ["a.png", "b", "2"]),
        (Named(IMAGE, MASK, MASK), None),
        (Batch(IMAGE, MASK, ["a", "b", "c"]), ["a", "b", "c"]),
    ],
    ids=["pair", "triple", "mapping", "none", "ids", "paths", "named tuple", "batch"],
)
def test_reads_the_usual_forms(form, case):
    for batch in (read_batch(form), find_batch(form)):
        assert type(batch) is Batch
        assert batch.image is IMAGE
        assert batch.mask is MASK
        assert batch.case == (case or ["0 of the batch", "1 of the batch", "2 of the batch"])
        assert batch.spacing == [None] * 3
        assert batch.weight is (MASK if isinstance(form, Named) else None)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (IMAGE, r"must be \(image, mask\[, case\]\) or a mapping with image and mask, got Tensor"),
        ({"image": IMAGE, "city": "x"}, r"got \['city', 'image'\]"),
        ((IMAGE,), "got tuple"),
        ((IMAGE, MASK, None, None), "got tuple"),
        (SimpleNamespace(image=IMAGE, mask=MASK), "got SimpleNamespace"),
        (("a.png", MASK), "the image of a batch must be a tensor, got str"),
    ],
)
def test_refuses_other_forms(form, message):
    with pytest.raises(ValueError, match=message):
        read_batch(form)
    assert find_batch(form) is None


@pytest.mark.parametrize(
    ("case", "got"),
    [
        (["too few"], "1 names"),
        ("abc", "1 names"),
        (torch.rand(3, 4, 8), r"a Tensor \(3, 4, 8\)"),  # a weight of each pixel
        (torch.rand(3), r"a Tensor \(3,\)"),
        ({"path": ["a", "b", "c"]}, "a dict"),
        ([{"path": "a"}, {"path": "b"}, {"path": "c"}], "a list"),
    ],
)
def test_what_is_no_name_is_not_ignored(case, got):
    for form in ((IMAGE, MASK, case), {"image": IMAGE, "mask": MASK, "case": case}):
        with pytest.raises(ValueError, match=f"must name each of the 3 images, got {got}; for pixel weights"):
            read_batch(form)
        assert find_batch(form).case == Batch(IMAGE, MASK).case  # for callbacks of other modules


def test_one_image_may_have_its_name_alone():
    batch = read_batch((IMAGE[:1], MASK[:1], "abc"))
    assert batch.case == ["abc"]
    assert batch.has_names
    assert not read_batch((IMAGE, MASK)).has_names


def test_a_batch_to_predict_needs_no_mask():
    assert read_batch((IMAGE, None)).mask is None
    assert find_batch((IMAGE, None)) is None


def full():
    return Batch(
        IMAGE,
        MASK,
        ["a", "b", "c"],
        {"distance": MASK * 2},
        [(0.5, 0.5), None, (1.0, 2.0)],
        weight=MASK * 3,
        annotated=torch.eye(3, 2).bool(),
    )


def test_one_image_has_all_that_the_batch_has_of_it():
    one = full().image_at(2)
    assert (one.case, one.spacing) == (["c"], [(1.0, 2.0)])
    assert torch.equal(one.image, IMAGE[2:])
    assert torch.equal(one.mask, MASK[2:])
    assert torch.equal(one.maps["distance"], MASK[2:] * 2)
    assert torch.equal(one.weight, MASK[2:] * 3)
    assert one.annotated.tolist() == [[False, False]]
    assert Batch(IMAGE, MASK).image_at(0).weight is None
    nothing = full().select(slice(0))
    assert (len(nothing.image), nothing.case, nothing.spacing) == (0, [], [])
    assert nothing.maps["distance"].shape == (0, 8, 8)


def test_a_resampled_image_has_another_spacing_than_its_mask():
    assert full().spacing_of_image() == [[1.0, 0.5], None, [2.0, 2.0]]
    assert Batch(IMAGE, MASK).spacing_of_image() == [None] * 3


def test_survives_what_loaders_and_lightning_do_with_it():
    for batch in (
        pickle.loads(pickle.dumps(full())),
        copy.deepcopy(full()),
        move_data_to_device(full(), torch.device("cpu")),
        torch.utils.data._utils.pin_memory.pin_memory(full()) if torch.cuda.is_available() else full(),
    ):
        assert type(batch) is Batch
        assert batch.case == ["a", "b", "c"]
        assert batch.spacing == [(0.5, 0.5), None, (1.0, 2.0)]
        assert torch.equal(batch.weight, MASK * 3)
        assert torch.equal(batch.maps["distance"], MASK * 2)
