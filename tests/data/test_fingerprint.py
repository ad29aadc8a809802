"""Fingerprints of volumes: read once, kept with the run; and normalization."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from volume_files import blob, folders, write

from lightning_dice.data.errors import DataError
from lightning_dice.data.label_map import LabelMap
from lightning_dice.data.volumes import dataset_summary, nifti
from lightning_dice.data.volumes.fingerprint import CaseFacts, Fingerprint
from lightning_dice.data.volumes.normalization import (
    SCHEMES,
    Intensities,
    normalize_intensities,
    scheme_for_channel,
    schemes_for_channels,
)
from lightning_dice.data.volumes.preprocessing import VolumePreprocessing
from lightning_dice.data.volumes.sources import VolumeSource

LABELS = LabelMap.of_ids(["background", "front", "back"])


def source(root, file=None, normalization="CT", spacing="median", **settings) -> VolumeSource:
    preprocessing = VolumePreprocessing(normalization, spacing)
    return VolumeSource(root, LABELS, preprocessing=preprocessing, fingerprint=file, **settings)


def test_intensities_are_those_of_the_training_foreground(tmp_path):
    folders(tmp_path, {"train": 3, "val": 1})
    found = source(tmp_path).fingerprint().intensities[0]
    pairs = [blob(index) for index in range(3)]
    voxels = np.concatenate([image[mask > 0] for image, mask in pairs]).astype(float)
    expected = [voxels.mean(), voxels.std(), *np.percentile(voxels, [0.5, 99.5, 50]), voxels.min(), voxels.max()]
    assert list(vars(found).values()) == pytest.approx(expected)


def test_ignored_voxels_are_left_out_and_the_others_sampled(tmp_path, monkeypatch):
    image, mask = blob(0)
    mask[mask == 2] = 255
    for split in ("train", "val"):
        write(tmp_path / f"images/{split}/a.nii.gz", image)
        write(tmp_path / f"masks/{split}/a.nii.gz", mask)
    assert source(tmp_path).fingerprint().intensities[0].maximum == image[mask == 1].max()
    monkeypatch.setattr(dataset_summary, "MAX_SAMPLED", 10)
    one, other = (source(tmp_path).fingerprint().intensities[0] for _ in range(2))
    assert one == other  # seeded
    assert one.minimum > image[mask == 1].min() or one.maximum < image[mask == 1].max()


class TestFile:
    @pytest.fixture
    def data(self, tmp_path):
        (tmp_path / "run").mkdir()
        return folders(tmp_path / "data", {"train": 3, "val": 1}), tmp_path / "run/fingerprint.json"

    def test_the_file_is_read_instead_of_the_cases(self, data, monkeypatch):
        root, file = data
        report = source(root, file).check()
        stored = Fingerprint.load(file)
        assert [facts.case for facts in stored.cases] == ["train0", "train1", "train2", "val0"]
        assert stored.cases[0].counts == ({0: 880, 1: 48, 2: 32},)
        written = file.read_bytes()

        def unread(*_: object) -> None:
            raise AssertionError("a case was read again")

        monkeypatch.setattr(nifti, "read_volume", unread)
        assert source(root, file).check() == report
        for path in root.rglob("*.nii.gz"):
            os.utime(path, (1, 1))  # As after copying: new times, the same content.
        assert source(root, file).check() == report
        assert file.read_bytes() == written

    def test_changes_are_reported_and_the_statistics_kept(self, data):
        root, file = data
        source(root, file).check()
        before, written = source(root, file).preprocessor(), file.read_bytes()
        image, _ = blob(9)
        write(root / "images/train/train1.nii.gz", image * 3)
        write(root / "images/train/new.nii.gz", image)
        shutil.copy(root / "masks/train/train1.nii.gz", root / "masks/train/new.nii.gz")
        (root / "images/train/train2.nii.gz").unlink()
        (root / "masks/train/train2.nii.gz").unlink()
        report = source(root, file).check()
        assert "the training cases are not those of" in report
        assert "1 added (new); 1 missing (train2); 1 changed (train1)" in report
        assert source(root, file).preprocessor() == before
        assert file.read_bytes() == written
        write(root / "masks/train/train1.nii.gz", np.full((10, 12, 8), 7, np.uint8))
        with pytest.raises(DataError, match="holds the values 7"):
            source(root, file).check()

    def test_prediction_needs_only_the_fingerprint(self, data):
        root, file = data
        expected = source(root, file).split("val")[0].image
        path = shutil.copy(root / "images/val/val0.nii.gz", root.parent / "case.nii.gz")
        shutil.rmtree(root)
        reader = source(root, file).reader
        assert np.array_equal(reader.read(reader.find(root.parent / "case.nii.gz")[0]).image, expected)
        file.unlink()
        with pytest.raises(DataError, match=r"neither their fingerprint, .*fingerprint\.json, nor the cases"):
            source(root, file).reader.read(reader.find(root.parent / "case.nii.gz")[0])
        assert path

    def test_without_resampling_and_ct_no_fingerprint_is_made(self, data):
        root, file = data
        plain = source(root, file, normalization="MR", spacing=None)
        plain.reader.read(plain.reader.find(root / "images/val")[0])
        assert plain.split("val")[0].image.mean().abs() < 1e-5
        assert not file.exists()

    @pytest.mark.parametrize("content", ["", "[]", '{"version": 0}', '{"version": 1, "channels": ["x"]}'])
    def test_a_damaged_file_is_refused(self, data, content):
        root, file = data
        file.write_text(content)
        message = "is a fingerprint of version 0" if "0" in content else "cannot be read"
        with pytest.raises(DataError, match=rf"fingerprint\.json {message}"):
            source(root, file).check()

    def test_a_file_of_other_data_is_refused(self, data):
        root, file = data
        source(root, file).check()
        with pytest.raises(DataError, match=r"has 1 channels, but data\.channels=2"):
            source(root, file, channels=2).preprocessor()

    def test_without_foreground_there_is_no_ct(self, data):
        root, file = data
        for path in (root / "masks").rglob("*.nii.gz"):
            write(path, np.zeros((10, 12, 8), np.uint8))
        with pytest.raises(DataError, match="are all masks empty"):
            source(root, file).check()


def fingerprint(sizes, spacings) -> Fingerprint:
    cases = [
        CaseFacts("train", str(i), {}, s, m, "", ({},)) for i, (s, m) in enumerate(zip(sizes, spacings, strict=True))
    ]
    return Fingerprint(("MR",), (), tuple(cases))


class TestSpacing:
    def test_the_median_of_each_axis(self):
        found = fingerprint([(90, 90, 90)] * 3, [(1, 2, 1), (1.5, 1, 1), (3, 1.5, 1)])
        assert found.median_spacing() == (1.5, 1.5, 1)

    def test_thick_slices_get_the_tenth_percentile(self):
        spacings = [(0.5, 0.5, thick) for thick in (2.0, 3.0, 5.0, 5.0, 5.0, 5.0, 5.0, 6.0, 6.0, 7.0)]
        thin = fingerprint([(400, 400, 40)] * 10, spacings)
        assert thin.median_spacing() == pytest.approx((0.5, 0.5, np.percentile([s[2] for s in spacings], 10)))
        long = fingerprint([(400, 400, 400)] * 10, spacings)  # coarse, but as long as the others
        assert long.median_spacing() == (0.5, 0.5, 5.0)
        near = fingerprint([(400, 400, 40)] * 3, [(1, 1, 1), (1, 1, 2), (1, 1, 2.5)])  # short, but hardly coarser
        assert near.median_spacing() == (1, 1, 2)
        fine = fingerprint([(400, 400, 40)] * 10, [(0.5, 0.5, 0.1)] * 4 + [(0.5, 0.5, 5.0)] * 6)
        assert fine.median_spacing() == (0.5, 0.5, 0.5)
        # Sizes count as stored: at the median spacing the first case would have 44 voxels, which would be the median.
        mixed = fingerprint([(100, 100, 50), (100, 100, 20), (100, 100, 20)], [(1, 1, 3.5), (1, 1, 4), (1, 1, 16)])
        assert mixed.median_spacing() == pytest.approx((1, 1, 3.6))

    def test_the_median_size(self):
        found = fingerprint([(10, 10, 10), (20, 10, 10), (30, 10, 20)], [(2, 1, 1), (1, 1, 1), (1, 1, 1)])
        assert found.median_size(None) == (20, 10, 10)
        assert found.median_size((1, 1, 2)) == (20, 10, 5)

    def test_a_setting_overrides_the_median(self, tmp_path):
        folders(tmp_path, {"train": 2, "val": 1}, np.diag([1, 2, 3, 1.0]))
        spacings = [
            source(tmp_path, spacing=wanted).preprocessor().spacing for wanted in ("median", [None, 5, None], None)
        ]
        assert spacings == [(1, 2, 3), (1, 5, 3), None]


class TestNormalization:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_schemes_are_nnunet_s(self, scheme):
        """Compare with nnU-Net's classes, looked up by the names of channels."""
        peer = pytest.importorskip("nnunetv2.preprocessing.normalization.map_channel_name_to_normalization")
        values = np.random.default_rng(0).uniform(10, 200, (5, 6, 7)).astype(np.float32)
        mine = Intensities(
            mean=90.0, std=40.0, percentile_00_5=20.0, percentile_99_5=180.0, median=0, minimum=0, maximum=0
        )
        nonzero = scheme == "zscore_nonzero"
        values[:2] *= not nonzero
        theirs = peer.get_normalization_scheme("zscore" if nonzero else scheme)(nonzero, vars(mine))
        seg = np.where(values != 0, 0, -1) if nonzero else None
        expected = theirs.run(values.copy(), seg)
        np.testing.assert_allclose(normalize_intensities(values, scheme, mine), expected, rtol=1e-4, atol=1e-5)

    def test_schemes_by_channel_name(self):
        assert [scheme_for_channel(name) for name in ("ct", "T2", "noNORM", "pet")] == [
            "ct",
            "zscore",
            "nonorm",
            "zscore",
        ]
        assert schemes_for_channels("CT", 2) == ("ct", "ct")
        with pytest.raises(ValueError, match="or one for each of the 3 channels"):
            schemes_for_channels(["CT"], 3)

    def test_a_constant_volume_becomes_zeros(self):
        assert not normalize_intensities(np.full((9, 9, 9), 0.1, np.float32), "zscore", None).any()
        assert not normalize_intensities(np.zeros((3, 3, 3), np.float32), "zscore_nonzero", None).any()

    def test_rgb_out_of_range_names_the_file(self, tmp_path):
        folders(tmp_path, {"train": 1, "val": 1})
        write(tmp_path / "images/val/val0.nii.gz", np.full((10, 12, 8), 300, np.int16))
        with pytest.raises(DataError, match=r"val0\.nii\.gz: holds values from 300 to 300"):
            source(tmp_path, normalization="rgb_to_0_1").split("val")[0]
