"""The synthetic task: reproducible images with the requested shares of foreground."""

import hashlib
import re

import pytest
import torch
from helpers import run_forked

from lightning_dice.data.synthetic import SyntheticSource
from lightning_dice.data.synthetic_scene import LOOKS

NAMES = tuple(f"c{k}" for k in range(9))


def fingerprint(sample):
    return hashlib.sha256(sample.image.numpy().tobytes() + sample.mask.numpy().tobytes()).hexdigest()


def elsewhere():
    cases = SyntheticSource().split("val")
    return [fingerprint(cases[index]) for index in range(3)]


@pytest.mark.parametrize(
    ("settings", "image", "mask", "labels"),
    [
        pytest.param({}, (1, 128, 128), (1, 128, 128), 2, id="binary"),
        pytest.param({"size": (40, 56), "channels": 3}, (3, 40, 56), (1, 40, 56), 2, id="oblong-rgb"),
        pytest.param(
            {"classes": NAMES[:8], "foreground_fraction": 0.2}, (1, 128, 128), (8, 128, 128), 2, id="multilabel"
        ),
        pytest.param(
            {"classes": NAMES, "activation": "softmax", "foreground_fraction": 0.2, "channels": 5},
            (5, 128, 128),
            (128, 128),
            9,
            id="multiclass",
        ),
        pytest.param(
            {"size": (16, 24, 32), "foreground_fraction": 0.1}, (1, 16, 24, 32), (1, 16, 24, 32), 2, id="volume"
        ),
    ],
)
def test_shapes_types_and_labels(settings, image, mask, labels):
    cases = SyntheticSource(**settings, cases=(12, 0, 0)).split("train")
    samples = [cases[i] for i in range(len(cases))]
    assert {tuple(s.image.shape) for s in samples} == {image}
    assert {tuple(s.mask.shape) for s in samples} == {mask}
    assert {s.image.dtype for s in samples} == {torch.float32}
    assert {s.mask.dtype for s in samples} == {torch.uint8}
    assert min(s.image.min() for s in samples) >= 0
    assert max(s.image.max() for s in samples) <= 1
    assert set(torch.stack([s.mask for s in samples]).unique().tolist()) == set(range(labels))
    assert len({s.case for s in samples}) == len(cases) == len(cases.sizes) == 12
    assert set(cases.sizes) == {image[1:]}


def test_images_are_of_8_bits():
    image = SyntheticSource().split("train")[0].image
    assert torch.equal(image, (image * 255).round() / 255)


@pytest.mark.process
def test_a_case_is_the_same_in_any_order_and_process():
    here = SyntheticSource().split("val")
    expected = [fingerprint(here[i]) for i in range(3)]
    again = SyntheticSource().split("val")
    assert [fingerprint(again[i]) for i in (2, 0, 1)] == [expected[i] for i in (2, 0, 1)]
    assert run_forked(elsewhere) == expected


def test_seed_split_and_index_all_matter():
    drawn = [
        fingerprint(SyntheticSource(seed=seed).split(split)[index])
        for seed in (0, 1)
        for split in ("train", "val", "test")
        for index in (0, 1)
    ]
    assert len(set(drawn)) == len(drawn)


def test_cases_do_not_depend_on_their_number():
    few, many = SyntheticSource(cases=(2, 0, 0)), SyntheticSource(cases=(200, 0, 0))
    assert fingerprint(few.split("train")[1]) == fingerprint(many.split("train")[1])


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    SyntheticSource().split("train")[0]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("foreground", "settings"),
    [
        pytest.param(0.005, {}, id="rare"),
        pytest.param(0.03, {}, id="default"),
        pytest.param(0.3, {}, id="frequent"),
        pytest.param(0.03, {"size": (32, 32), "cases": (700, 0, 0)}, id="small-images"),
        pytest.param(0.12, {"classes": NAMES[:4]}, id="multilabel"),
        pytest.param(0.3, {"classes": NAMES[:4], "activation": "softmax"}, id="multiclass"),
    ],
)
def test_foreground_is_the_expected_share(foreground, settings):
    source = SyntheticSource(**{"size": (64, 64), "cases": (250, 0, 0), **settings}, foreground_fraction=foreground)
    cases = source.split("train")
    planes = [cases[i].mask for i in range(len(cases))]
    if source.activation == "softmax":
        planes = [torch.stack([m == k for k in range(1, len(source.classes))]) for m in planes]
    share = torch.stack([p.flatten(1).double().mean(1) for p in planes])
    total = share.sum(1)
    # Five standard errors of the mean.
    assert total.mean().item() == pytest.approx(foreground, abs=5 * (total.std() / len(total) ** 0.5).item())
    each = foreground / share.shape[1]
    assert share.mean(0).tolist() == pytest.approx([each] * share.shape[1], rel=0.2)


def test_a_few_images_are_empty():
    cases = SyntheticSource(cases=(400, 0, 0)).split("train")
    empty = sum(not cases[i].mask.any() for i in range(len(cases))) / len(cases)
    assert 0.02 < empty < 0.07


def test_objects_can_be_seen_and_are_faint():
    source = SyntheticSource(noise=0.0)
    cases = source.split("train")
    inside, outside = [], []
    for i in range(40):
        image, mask, *_ = cases[i]
        if mask.any():
            inside.append(image[mask == 1].mean())
            outside.append(image[mask == 0].mean())
    difference = torch.stack(inside) - torch.stack(outside)
    assert 0.1 < difference.mean() < 0.3


def test_looks_differ():
    assert len(set(LOOKS)) == len(LOOKS)


def test_planes_may_overlap_and_ids_may_not():
    settings = {"foreground_fraction": 0.5, "cases": (5, 0, 0)}
    planes = SyntheticSource(classes=NAMES[:4], **settings).split("train")
    assert max(planes[i].mask.sum(0).max() for i in range(5)) > 1
    ids = SyntheticSource(classes=NAMES[:4], activation="softmax", **settings).split("train")
    assert {int(ids[i].mask.max()) for i in range(5)} == {3}


def test_report():
    source = SyntheticSource(
        size=(32, 48), cases={"train": 100, "test": 1}, foreground_fraction=0.1, classes=("cell", "crack")
    )
    train, test = source.check().splitlines()
    assert re.fullmatch(
        r"train: 100 cases, 32x48; cell \d+\.\d % of pixels, in \d+ % of the first 64 cases; "
        r"crack \d+\.\d % of pixels, in \d+ % of the first 64 cases",
        train,
    )
    assert test.startswith("test: 1 case, 32x48; cell ")
    mask = source.split("test")[0].mask
    assert test.endswith(f"crack {100 * mask[1].double().mean():.1f} % of pixels, in {100 * mask[1].any()} % of cases")


def test_report_counts_the_background_of_ids():
    source = SyntheticSource(size=(32, 32), cases=(4, 0, 0), classes=("ground", "cell"), activation="softmax")
    found = dict(re.findall(r"(ground|cell) ([\d.]+) %", source.check()))
    assert float(found["ground"]) + float(found["cell"]) == pytest.approx(100, abs=0.2)


def test_splits():
    source = SyntheticSource(cases={"train": 3})
    assert len(source.split("train")) == 3
    assert source.split("val") is None
    assert source.split("test") is None
    assert [s.case for s in list(source.split("train"))] == ["train-0000", "train-0001", "train-0002"]
    with pytest.raises(IndexError, match="index must be between 0 and 2, got 3"):
        source.split("train")[3]
    with pytest.raises(ValueError, match="name must be one of train, val, test, got 'valid'"):
        source.split("valid")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (128,)}, "size must be two or three integers of at least 16 pixels, got (128,)"),
        ({"size": (128, 8)}, "size must be two or three integers of at least 16 pixels, got (128, 8)"),
        ({"channels": 0}, "channels must be a positive integer, got 0"),
        ({"activation": None}, "activation must be 'sigmoid' or 'softmax', got None"),
        ({"classes": ()}, "classes must be 1 to 8 names with activation='sigmoid', none being the background, got ()"),
        ({"classes": "object"}, "got 'object'"),
        ({"classes": NAMES}, "classes must be 1 to 8 names with activation='sigmoid'"),
        (
            {"classes": ("object",), "activation": "softmax"},
            "classes must be 2 to 9 names with activation='softmax', the first being the background, got ('object',)",
        ),
        ({"classes": ("a", "a")}, "classes must differ from each other, got ('a', 'a')"),
        ({"ignore_index": 1}, "integer outside the labels of a mask, 0 to 1, got 1"),
        ({"classes": NAMES[:4], "activation": "softmax", "ignore_index": 3}, "labels of a mask, 0 to 3, got 3"),
        ({"foreground_fraction": 0}, "foreground_fraction must be a share of the pixels in (0, 0.5], got 0"),
        ({"foreground_fraction": 3}, "foreground_fraction must be a share of the pixels in (0, 0.5], got 3"),
        ({"noise": -0.1}, "noise must lie in [0, 1], where black is 0 and white 1, got -0.1"),
        ({"contrast": 20}, "contrast must lie in [0, 1], where black is 0 and white 1, got 20"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"cases": (1, 2)}, "cases must be a mapping from train, val and test to numbers of cases, or three such"),
        ({"cases": {"train": 1, "valid": 1}}, "got {'train': 1, 'valid': 1}"),
        ({"cases": (0, 0, 0)}, "at least one of them above 0, got (0, 0, 0)"),
        ({"cases": (4, -1, 0)}, "got (4, -1, 0)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SyntheticSource(**settings)
