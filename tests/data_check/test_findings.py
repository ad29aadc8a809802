"""Sound data give no findings; each planted problem is found, with its cases."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from data_check.planted import SIZES, TASK, Listed, broken, change, inspected, sound

from lightning_dice import data_check
from lightning_dice.data import Sample
from lightning_dice.data.errors import DataErrors, DataProblem
from lightning_dice.data_check.alignment import misaligned_share
from lightning_dice.data_check.checks import run_checks
from lightning_dice.data_check.finding import KINDS
from lightning_dice.data_check.survey import survey
from lightning_dice.data_check.task import Task


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(64, 64), (48, 72)])
def test_no_findings_in_sound_data(size):
    found, findings = inspected(sound(size), batch_size=8, channels=1, size=[32, 32])
    assert not findings
    assert (found.sizes, len(found.cases)) == (SIZES, 26)


# By the code that undoes them.
MOVES = {
    "mask.T": lambda mask: mask.transpose(-1, -2),
    "mask[::-1]": lambda mask: mask.flip(-2),
    "mask[:, ::-1]": lambda mask: mask.flip(-1),
    "numpy.rot90(mask)": lambda mask: mask.rot90(-1, (-2, -1)),
}


class TestTurned:
    @pytest.mark.parametrize("code", MOVES)
    def test_all_masks(self, code):
        data = sound()
        for split, part in data.items():
            for index, sample in enumerate(part):
                change(data, split, index, mask=MOVES[code](sample.mask).contiguous())
        finding = inspected(data)[1]["turned-masks"]
        assert (finding.severity, len(finding.cases)) == ("error", 26)
        assert f"from {code}," in finding.remedy

    @pytest.mark.parametrize("code", MOVES)
    def test_single_masks_are_named(self, code):
        data = sound()
        turned = [
            change(data, split, index, mask=MOVES[code](data[split][index].mask).contiguous())
            for split, index in (("train", 2), ("test", 1))
        ]
        findings = inspected(data)[1]
        assert list(findings["turned-masks"].cases) == turned
        assert f"from {code}," in findings["turned-masks"].remedy
        assert "swapped-masks" not in findings

    def test_volumes(self):
        data = sound((32, 32, 32))
        for split, part in data.items():
            for index, sample in enumerate(part):
                change(data, split, index, mask=sample.mask.flip(-1).transpose(1, 2).contiguous())
        finding = inspected(data)[1]["turned-masks"]
        assert "axes permuted (1, 0, 2) and flipped along axis 2" in finding.title
        assert "mask.transpose(1, 0, 2)[:, :, ::-1]" in finding.remedy


class TestSwapped:
    def test_two_swapped_masks(self):
        data = sound()
        one, two = (data["train"][index].mask for index in (3, 9))
        keys = [change(data, "train", 3, mask=two), change(data, "train", 9, mask=one)]
        finding = inspected(data)[1]["swapped-masks"]
        assert (finding.severity, list(finding.cases), list(finding.partners)) == ("error", keys, keys[::-1])

    def test_masks_paired_off_by_one(self):
        data = sound()
        part = data["train"]
        masks = [sample.mask for sample in part]
        for index in range(len(part)):
            change(data, "train", index, mask=masks[index - 1])
        finding = inspected(data)[1]["swapped-masks"]
        right = {f"train/{part[i].case}": f"train/{part[i - 1].case}" for i in range(len(part))}
        partners = dict(zip(finding.cases, finding.partners, strict=True))
        assert len(partners) >= 12
        assert all(right[case] == partner for case, partner in partners.items())

    def test_masks_that_fit_nowhere(self):
        data = sound()
        for split, part in data.items():
            for index in range(len(part)):
                noise = torch.rand(1, 1, 16, 16, generator=generator(index + len(part)))
                mask = (torch.nn.functional.interpolate(noise, size=64)[0] < 0.1).to(torch.uint8)
                change(data, split, index, mask=mask)
        finding = inspected(data)[1]["misaligned-masks"]
        assert finding.severity == "error"

    def test_a_mask_that_fits_another_image_is_swapped_only_if_that_images_mask_is_elsewhere(self):
        data = sound()
        noise = torch.nn.functional.interpolate(torch.rand(1, 1, 16, 16, generator=generator()), size=64)[0] < 0.1
        one, two = data["train"][3], data["train"][9]
        keys = [
            change(data, "train", 9, image=one.image.roll((5, 7), (-2, -1)), mask=one.mask),
            change(data, "train", 3, mask=noise.to(torch.uint8)),
        ]
        findings = inspected(data)[1]
        assert "swapped-masks" not in findings
        assert set(findings["poorly-fitting-masks"].cases) == set(keys)
        change(data, "train", 9, image=two.image)
        change(data, "train", 3, mask=two.mask)
        assert set(inspected(data)[1]["swapped-masks"].cases) == set(keys)

    def test_a_mask_that_was_shifted(self):
        data = sound()
        key = change(data, "val", 3, mask=data["val"][3].mask.roll((9, 14), (-2, -1)))
        finding = inspected(data)[1]["poorly-fitting-masks"]
        assert (finding.severity, list(finding.cases)) == ("note", [key])

    def test_few_cases_are_not_judged(self):
        found, _ = inspected({"train": sound()["train"][:7]})
        assert np.isnan(misaligned_share(found.cases))


class TestDuplicates:
    @pytest.mark.parametrize(
        "copied",
        [
            lambda image: image,
            lambda image: image * 0.7 + 0.1,
            lambda image: (image + 0.02 * torch.randn(image.shape, generator=generator())).clamp(0, 1),
            lambda image: torch.nn.functional.interpolate(image[None], size=77, mode="area")[0],
            lambda image: image.flip(-1),
            lambda image: image.rot90(1, (-2, -1)),
        ],
        ids=["same", "brighter", "noise", "smaller", "mirrored", "turned"],
    )
    def test_across_splits(self, copied):
        data = sound((96, 96))
        image = copied(data["train"][4].image).contiguous()
        mask = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        mask[:, 5:20, 5:20] = 1
        key = change(data, "test", 2, image=image, mask=mask)
        finding = inspected(data)[1]["duplicates-across-splits"]
        assert finding.severity == "error"
        assert (list(finding.cases), list(finding.partners)) == ([f"train/{data['train'][4].case}"], [key])

    def test_within_a_split(self):
        data = sound()
        change(data, "train", 1, image=data["train"][0].image.clone())
        findings = inspected(data)[1]
        assert findings["duplicates"].severity == "note"
        assert findings["contradicting-masks"].severity == "warning"
        assert "duplicates-across-splits" not in findings
        change(data, "train", 1, mask=data["train"][0].mask.clone())
        assert "contradicting-masks" not in inspected(data)[1]

    def test_common_structure_does_not_make_duplicates(self):
        data = sound()
        rings = [
            (torch.hypot(*torch.meshgrid(torch.arange(64.0) - 32, torch.arange(64.0) - 32, indexing="ij")) < r)
            for r in (20, 28)
        ]
        for split, part in data.items():
            for index, sample in enumerate(part):
                change(data, split, index, image=0.1 * sample.image + sum(ring.float() for ring in rings))
        assert "duplicates-across-splits" not in inspected(data)[1]

    def test_black_images_are_not_duplicates(self):
        data = sound()
        for split in ("train", "val"):
            change(data, split, 0, image=torch.zeros(1, 64, 64))
        findings = inspected(data)[1]
        assert "duplicates-across-splits" not in findings
        assert len(findings["constant-images"].cases) == 2

    def test_volumes(self):
        data = sound((32, 32, 32))
        change(data, "val", 0, image=(data["train"][0].image * 0.8).flip(1))
        finding = inspected(data)[1]["duplicates-across-splits"]
        assert "flipped along axis 0" in finding.details[0]


def of_kind(kind, data, severity, cases=None, task=TASK, **facts):
    finding = inspected(data, task, **facts)[1][kind]
    assert finding.severity == severity
    if cases is not None:
        assert list(finding.cases) == cases
    return finding


class TestContents:
    def test_unreadable_cases_are_reported_and_the_rest_is_measured(self):
        data = sound()
        broken(data, "train", 3)
        found, findings = inspected(data)
        assert findings["refused"].severity == "error"
        assert "a.png: is empty (0 bytes)" in findings["refused"].title
        assert (len(found.cases), found.sizes["train"]) == (25, 14)

    def test_unexpected_errors_are_reported(self):
        data = sound()
        data["val"][0] = ZeroDivisionError("hm")
        finding = inspected(data)[1]["refused"]
        assert (list(finding.cases), list(finding.details)) == (["val[0]"], ["cannot be read (ZeroDivisionError: hm)"])

    def test_labels_without_a_class(self):
        data = sound()
        mask = data["train"][0].mask.clone()
        mask[mask == 1] = 7
        key = change(data, "train", 0, mask=mask)
        assert "labels without a class" in of_kind("unknown-labels", data, "error", [key]).title

    def test_nonfinite_values(self):
        data = sound()
        image = data["val"][1].image.clone()
        image[0, 3, 4] = float("nan")
        of_kind("nonfinite-values", data, "error", [change(data, "val", 1, image=image)])

    def test_another_number_of_channels(self):
        data = sound()
        key = change(data, "val", 1, image=data["val"][1].image.expand(3, -1, -1))
        of_kind("channels", data, "error", [key])
        assert len(of_kind("channels", data, "error", channels=3).cases) == 25

    def test_masks_of_another_size(self):
        data = sound((48, 72))
        key = change(data, "train", 1, mask=data["train"][1].mask.transpose(1, 2).contiguous())
        assert "rows and columns are swapped" in of_kind("mask-sizes", data, "error", [key]).title
        resampled = sound((48, 72))  # for evaluation alone
        change(resampled, "val", 1, image=torch.rand(1, 24, 36))
        assert "mask-sizes" not in inspected(resampled)[1]

    def test_absent_classes(self):
        data = sound()
        for index in range(len(data["test"])):
            change(data, "test", index, mask=torch.zeros(1, 64, 64, dtype=torch.uint8))
        finding = of_kind("absent-classes", data, "warning")
        assert finding.title == "no pixel of the test split is object"
        for index in range(len(data["train"])):
            change(data, "train", index, mask=torch.zeros(1, 64, 64, dtype=torch.uint8))
        assert of_kind("absent-classes", {"train": data["train"]}, "error").title.endswith("nothing to learn")

    def test_empty_masks(self):
        data = sound()
        key = change(data, "train", 5, mask=torch.zeros(1, 64, 64, dtype=torch.uint8))
        of_kind("empty-masks", data, "note", [key])
        for index in range(8):
            change(data, "train", index, mask=torch.zeros(1, 64, 64, dtype=torch.uint8))
        of_kind("empty-masks", data, "warning")

    def test_full_and_ignored_masks(self):
        data = sound()
        mask = torch.ones(1, 64, 64, dtype=torch.uint8)
        full = [change(data, "train", 5, mask=mask.clone())]
        mask[:, :9] = 255  # All that counts is of one class.
        full.append(change(data, "train", 7, mask=mask))
        ignored = change(data, "train", 6, mask=torch.full((1, 64, 64), 255, dtype=torch.uint8))
        of_kind("full-masks", data, "warning", full)
        of_kind("ignored-masks", data, "warning", [ignored])
        assert "empty-masks" not in inspected(data)[1]

    def test_inverted_masks(self):
        data = sound()
        for split, part in data.items():
            for index, sample in enumerate(part):
                change(data, split, index, mask=1 - sample.mask)
        of_kind("inverted-masks", data, "note")

    def test_nearly_constant_images(self):
        data = sound()
        image = 0.4 + 1e-4 * torch.rand(1, 64, 64, generator=generator())
        of_kind("constant-images", data, "warning", [change(data, "train", 5, image=image)])

    @pytest.mark.parametrize(
        ("kinds", "severity"),
        [
            (("8-bit gray", "16-bit gray"), "warning"),
            (("8-bit gray", "8-bit RGB"), "note"),
            (("float32", "uint8"), "note"),
        ],
    )
    def test_image_formats(self, kinds, severity):
        class Known(Listed):
            def readable(self, name):
                return self.split(name)

            def kinds(self):
                return {("train", sample.case): kinds[sample.case == "train-0004"] for sample in self.data["train"]}

        (finding,) = run_checks(survey(Known(sound()), TASK))
        assert (finding.kind, finding.severity, list(finding.cases)) == (
            "image-formats",
            severity,
            ["train/train-0004"],
        )

    def test_a_mask_in_place_of_an_image(self):
        data = sound()
        key = change(data, "train", 5, image=data["train"][5].mask.float())
        of_kind("mask-like-images", data, "warning", [key])

    def test_an_image_much_brighter_than_the_rest(self):
        data = sound()
        of_kind("unusual-intensities", data, "note", [change(data, "val", 2, image=data["val"][2].image + 20)])
        for index in range(5):  # a second kind of images, no outliers
            change(data, "train", index, image=data["train"][index].image + 20)
        assert "unusual-intensities" not in inspected(data)[1]

    def test_few_cases(self):
        data = sound()
        data["val"] = data["val"][:2]
        assert of_kind("few-cases", data, "warning").title == "the val split has only 2 cases"
        data = sound()
        assert "data.batch_size=14" in of_kind("few-cases", data, "error", batch_size=16).remedy
        assert "no-validation" in inspected({"train": data["train"]})[1]
        assert "no-test" in inspected({"train": data["train"], "val": data["val"]})[1]

    def test_duplicate_names(self):
        data = sound()
        key = change(data, "train", 1, case=data["train"][0].case)
        of_kind("duplicate-names", data, "error", [key])

    def test_spacings(self):
        data = sound()
        for index in range(14):
            change(data, "train", index, spacing=(1.0, 1.0))
        assert len(of_kind("unknown-spacing", data, "note").cases) == 12
        of_kind("spacings", data, "warning", [change(data, "train", 3, spacing=(1.0, 3.0))])

    def test_sizes(self):
        data = sound()
        big, mask = torch.rand(1, 300, 300, generator=generator()), torch.zeros(1, 300, 300, dtype=torch.uint8)
        mask[:, 9:99, 9:99] = 1
        key = change(data, "train", 3, image=big, mask=mask)
        assert of_kind("sizes", data, "note").cases[1] == key
        assert len(of_kind("smaller-than-crops", sound(), "note", size=[96, 64]).cases) == 14

    def test_hints_for_the_loss(self):
        data = sound()
        for split, part in data.items():
            for index in range(len(part)):
                mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
                mask[0, 5:60:6, 3 * index % 60] = 1
                change(data, split, index, mask=mask)
        findings = inspected(data)[1]
        assert findings["rare-classes"].title.endswith("object 0.24 %")
        assert "260 of 260" in findings["tiny-objects"].title
        assert "thin-structures" in findings

    def test_unequal_splits(self):
        data = sound()
        data["test"] = data["test"] + [s._replace(case=f"more-{s.case}") for s in data["val"]]
        for index, sample in enumerate(data["test"]):
            grown = torch.nn.functional.max_pool2d(sample.mask.float(), 21, 1, 10).to(torch.uint8)
            change(data, "test", index, mask=grown)
        assert "train and test" in of_kind("unequal-splits", data, "note").title


def test_several_classes_and_their_background():
    task = Task(["background", "a", "b"], "softmax", exclude_classes=[0])
    ids = torch.zeros(14, 64, 64, dtype=torch.int64)
    ids[:, 10:30, 10:30] = 1
    part = [Sample(torch.rand(1, 64, 64, generator=generator(i)), ids[i], f"c{i}") for i in range(14)]
    findings = inspected({"train": part}, task)[1]
    assert findings["absent-classes"].title == "no pixel of the train split is b"
    assert task.foreground == [1, 2]
    assert Task(["sky", "road"], "softmax").foreground == [0, 1]


def test_problems_of_the_source_are_reported_once():

    problems = [DataProblem("has no mask", "x/b.png", "Add it."), DataProblem("is empty", "x/a.png", "Copy it again.")]

    class Refusing(Listed):
        def check(self):
            raise DataErrors("all", problems)

    data = sound()
    data["train"][0] = DataProblem("is empty, once more", "x/a.png", "Copy it.")
    found = survey(Refusing(data), TASK, facts={"root": "x"})
    assert [str(problem) for problem in found.problems] == [str(problem) for problem in problems]
    titles = [finding.title for finding in run_checks(found) if finding.kind == "refused"]
    assert titles == ["b.png: has no mask", "a.png: is empty"]


def test_accepted_findings_are_notes():
    data = sound()
    change(data, "val", 0, image=data["train"][0].image.clone(), mask=data["train"][0].mask.clone())
    found, findings = inspected(data)
    assert findings["duplicates-across-splits"].severity == "error"
    (finding,) = run_checks(found, accept=["duplicates-across-splits"])
    assert (finding.severity, finding.title[:9]) == ("note", "accepted:")


def test_all_kinds_are_listed():
    sources = [path.read_text() for path in Path(data_check.__file__).parent.glob("*.py")]
    made = {kind for text in sources for kind in re.findall(r'Finding\(\s*"([a-z-]+)"', text)}
    assert made - {"refused"} == set(KINDS)


def test_threads_and_thumbnails_change_nothing_else():
    data = sound()
    one, many = (survey(Listed(data), TASK, workers=n, thumbnails=t) for n, t in ((1, 0), (5, 100)))
    assert [case.key for case in one.cases] == [case.key for case in many.cases]
    assert all(np.array_equal(a.texture, b.texture) for a, b in zip(one.cases, many.cases, strict=True))
    assert not any(case.thumbnail for case in one.cases)
    assert all(case.thumbnail for case in many.cases)
    assert 4 <= sum(case.thumbnail is not None for case in survey(Listed(data), TASK, thumbnails=6).cases) <= 6
