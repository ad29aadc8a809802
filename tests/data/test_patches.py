"""Patches: their positions, padding, seeds and cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from volume_files import folders

from lightning_dice.data import LabelMap, MonaiAugment, PatchSampler, SegmentationData, VolumeSource
from lightning_dice.data.batch import Sample
from lightning_dice.data.synthetic import SyntheticSource


class Listed:
    """Cases in memory that count how often they are read."""

    def __init__(self, *samples: Sample) -> None:
        self.samples, self.reads = samples, 0
        self.sizes = [tuple(sample.image.shape[1:]) for sample in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        self.reads += 1
        return self.samples[index]

    def stamp(self, index: int) -> str:
        return str(self.samples[index].image.sum())


def sample(
    size: tuple[int, ...] = (20, 20, 20), spots: dict[tuple[int, ...], int] | None = None, name: str = "a"
) -> Sample:
    """Make an image whose voxels hold their flat index, and a mask that is empty except for spots."""
    mask = torch.zeros(size, dtype=torch.uint8)
    for place, label in (spots or {}).items():
        mask[place] = label
    return Sample(torch.arange(mask.numel(), dtype=torch.float32).view(1, *size), mask, name, (1.0,) * len(size))


def starts(patches, size: int, times: int) -> np.ndarray:
    """Return the first voxel of each patch, which its values show."""
    first = [int(patches[i % len(patches)].image[(0, *[0] * len(patches.sizes[0]))]) for i in range(times)]
    return np.array(np.unravel_index(first, (size,) * len(patches.sizes[0]))).T


class TestPositions:
    def test_the_share_centred_on_foreground(self):
        torch.manual_seed(0)
        cases = Listed(sample(spots={(3, 10, 10): 1}))
        patches = PatchSampler((4, 4, 4), oversample_foreground=0.4).cut(cases)
        there = np.mean([int(patches[0].mask.max()) == 1 for _ in range(600)])
        # A patch drawn anywhere contains the spot with a probability of at most (4/17)^3.
        assert there == pytest.approx(0.4 + 0.6 * (4 / 17) ** 3, abs=0.06)

    def test_patches_are_centred_on_evenly_drawn_classes(self):
        torch.manual_seed(0)
        mask = {(5, 5, 5): 2, **{(15, y, z): 1 for y in range(20) for z in range(20)}}
        patches = PatchSampler((5, 5, 5), oversample_foreground=1, ignore_index=255).cut(Listed(sample(spots=mask)))
        found = [patches[0].mask for _ in range(300)]
        rare = [patch for patch in found if (patch == 2).any()]
        assert len(rare) / 300 == pytest.approx(0.5, abs=0.1)
        assert all(patch[2, 2, 2] == 2 for patch in rare)

    def test_ignored_voxels_are_not_foreground(self):
        torch.manual_seed(0)
        patches = PatchSampler((2, 2, 2), oversample_foreground=1).cut(
            Listed(sample(spots={(9, 9, 9): 255, (4, 4, 4): 1}))
        )
        assert all((patches[0].mask == 1).any() for _ in range(20))

    def test_planes(self):
        torch.manual_seed(0)
        planes = torch.zeros(2, 20, 20, dtype=torch.uint8)
        planes[0, 4, 4], planes[1, 15, 15], planes[:, 0] = 1, 1, 255
        image = torch.rand(1, 20, 20)
        patches = PatchSampler((3, 3), oversample_foreground=1).cut(Listed(Sample(image, planes, "a")))
        found = torch.stack([patches[0].mask for _ in range(60)])
        assert found.shape == (60, 2, 3, 3)
        assert ((found == 1).sum((1, 2, 3)) == 1).all()
        assert 15 < int((found[:, 0] == 1).sum()) < 45

    def test_positions_without_oversampling_are_uniform(self):
        torch.manual_seed(0)
        patches = PatchSampler((4, 4), oversample_foreground=0).cut(Listed(sample((6, 6))))
        counts = np.unique(starts(patches, 6, 900), axis=0, return_counts=True)[1]
        assert len(counts) == 9
        assert counts.min() > 60

    def test_a_small_image_is_padded_on_both_sides_and_the_padding_ignored(self):
        for foreground in (0.0, 1.0):
            patches = PatchSampler((4, 9, 5), oversample_foreground=foreground).cut(
                Listed(sample((5, 4, 5), {(2, 2, 2): 1}))
            )
            patch = patches[0]
            inside = patch.mask != 255
            assert inside.any((0, 2)).tolist() == [False] * 2 + [True] * 4 + [False] * 3
            assert int(inside.sum()) == 4 * 4 * 5
            assert torch.equal(patch.image[0, :, 0], patch.image[0, :, 2])  # the border is repeated
        plain = PatchSampler((7, 4, 5), ignore_index=None).cut(Listed(sample((5, 4, 5))))[0]
        assert not plain.mask.any()


class TestSeeds:
    @pytest.fixture
    def source(self, tmp_path):
        return VolumeSource(folders(tmp_path, {"train": 5, "val": 1}), LabelMap.of_ids(["background", "front", "back"]))

    @staticmethod
    def batches(source, workers: int = 0, **settings) -> list:
        torch.manual_seed(3)
        from monai.transforms import RandFlipd, RandGaussianNoised

        augment = MonaiAugment(
            [RandFlipd(keys=["image", "mask"], prob=0.5), RandGaussianNoised(keys=["image"], prob=0.9)]
        )
        patches = PatchSampler((6, 6, 6), patches_per_image=2, **settings)
        data = SegmentationData(
            source, batch_size=3, num_workers=workers, augment=augment, patches=patches, ignore_index=255
        )
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
        return [batch for _ in range(2) for batch in loader]

    def test_workers_and_caches_change_nothing(self, source, tmp_path):
        expected = self.batches(source)
        assert len(expected) == 6  # 5 cases, 2 patches of each, the last left out, two epochs
        folder = tmp_path / "cache"
        others = [
            {"workers": 2},
            {"cache": 0},
            {"cache": 0, "cache_folder": folder},  # written ...
            {"cache": 0, "cache_folder": folder, "workers": 1},  # ... and read
        ]
        for settings in others:
            for mine, other in zip(expected, self.batches(source, **settings), strict=True):
                assert mine.case == other.case
                assert torch.equal(mine.image, other.image)
                assert torch.equal(mine.mask, other.mask)
                assert mine.spacing == other.spacing
        assert len(list(folder.glob("*.json"))) == 5

    def test_epochs_differ(self, source):
        found = self.batches(source)
        assert not any(torch.equal(a.image, b.image) for a in found[:3] for b in found[3:])

    def test_images_too(self):
        data = SegmentationData(
            SyntheticSource(size=(64, 48), cases=(3, 1, 0)), batch_size=2, num_workers=0, patches=PatchSampler((32, 16))
        )
        data.setup("fit")
        assert next(iter(data.train_dataloader())).mask.shape == (2, 1, 32, 16)
        assert next(iter(data.val_dataloader())).mask.shape == (1, 1, 64, 48)


class TestCache:
    def test_cached_cases_are_not_read_again(self):
        cases = Listed(sample(name="a"), sample(name="b"))
        one = (cases[0].image.nbytes + cases[0].mask.nbytes) / 2**30
        for cache, reads in ((3 * one, 2), (1.5 * one, 1 + 4), (0, 8)):
            cases.reads = 0
            patches = PatchSampler((4, 4, 4), cache=cache).cut(cases)
            for index in (0, 1) * 4:
                assert patches[index].case == "ab"[index]
            assert cases.reads == reads

    def test_a_changed_case_is_read_again(self, tmp_path):
        before, after = Listed(sample()), Listed(sample()._replace(image=sample().image + 1))
        for cases in (before, after):
            patches = PatchSampler((20, 20, 20), cache=0, cache_folder=tmp_path).cut(cases)
            for _ in range(3):
                assert torch.equal(patches[0].image, cases.samples[0].image)
            assert cases.reads == 1

    def test_a_cache_folder_needs_stamps(self, tmp_path):
        cases = SyntheticSource(size=(32, 32), cases=(2, 0, 0)).split("train")
        with pytest.raises(ValueError, match="cache_folder must be null"):
            PatchSampler((16, 16), cache_folder=tmp_path).cut(cases)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 3}, "patch_size must be the pixels of a patch"),
        ({"patch_size": [0, 3]}, "patch_size must be"),
        ({"oversample_foreground": 1.5}, "oversample_foreground must be a share"),
        ({"patches_per_image": 0}, "patches_per_image must be None or an integer of at least 1"),
        ({"cache": -1}, "cache must be GiB"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PatchSampler(**{"patch_size": (4, 4), **settings})
    with pytest.raises(ValueError, match=r"patch_size must have the images' 3 axes, got \[4, 4\]"):
        PatchSampler((4, 4)).cut(Listed(sample()))


def test_voxels_that_a_rotation_brings_in_are_ignored():
    """In the datamodule, a mask full of class 1 holds 1 and the ignored label after a rotation, and no background."""
    from monai.transforms import RandAffined

    rotate = RandAffined(
        keys=["image", "mask"], prob=1, rotate_range=[0.5] * 3, mode=["bilinear", "nearest"],
        padding_mode=["border", "zeros"],
    )  # fmt: skip
    full = Sample(torch.rand(1, 12, 12, 12), torch.ones(12, 12, 12, dtype=torch.uint8), "a")
    source = type("Source", (), {"split": lambda self, name: Listed(full, full)})()
    data = SegmentationData(source, batch_size=1, num_workers=0, augment=MonaiAugment([rotate]), ignore_index=255)
    data.setup("fit")
    torch.manual_seed(0)
    first, second = list(data.train_dataloader())
    assert set(first.mask.unique().tolist()) == {1, 255}
    assert first.mask.dtype == torch.uint8
    assert not torch.equal(first.mask, second.mask)
