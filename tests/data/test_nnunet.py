"""nnU-Net's raw data sets: labels, regions, splits, and the config that follows from them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from volume_files import AFFINES, blob, nnunet, write

from lightning_dice.cli.config import CONF_DIR, register_resolvers, resolve_from_files
from lightning_dice.cli.errors import UserError
from lightning_dice.data import NnunetSource, SplitSettings
from lightning_dice.data.errors import DataError
from lightning_dice.data.label_map import LabelMap
from lightning_dice.data.volumes.nnunet import make_label_map, read_dataset_json
from lightning_dice.data.volumes.preprocessing import VolumePreprocessing

AS_STORED = VolumePreprocessing(spacing=None)
REGIONS = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}


def test_labels_channels_and_cases(tmp_path):
    source = NnunetSource(
        nnunet(tmp_path, cases=5, channels=2), preprocessing=AS_STORED, split_settings=SplitSettings([0.6, 0.2, 0.2])
    )
    assert source.schemes == ("zscore", "ct")
    assert {split: len(cases) for split, cases in source.survey().cases.items()} == {"train": 3, "val": 1, "test": 1}
    sample = source.split("train")[0]
    image, mask = blob(int(sample.case[1:]))
    assert sample.image.shape == (2, 10, 12, 8)
    assert torch.equal(sample.mask, torch.from_numpy(mask[::-1, ::-1].copy()))  # LPS, in RAS
    expected = image[::-1, ::-1].astype(np.float64)
    expected = (expected - expected.mean()) / expected.std()
    np.testing.assert_allclose(sample.image[0], expected, atol=1e-5)


def test_version_1_and_the_decathlon(tmp_path):
    facts = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "Anterior", "2": "Posterior"}}
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    assert read_dataset_json(tmp_path) == {
        "channel_names": ["MRI"],
        "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
        "regions_class_order": None,
    }
    for index in range(3):
        write(tmp_path / f"imagesTr/hippocampus_{index}.nii.gz", blob(index)[0])
        write(tmp_path / f"imagesTr/._hippocampus_{index}.nii.gz", blob(index)[0])
        write(tmp_path / f"labelsTr/hippocampus_{index}.nii.gz", blob(index)[1])
    assert "hippocampus_" in NnunetSource(tmp_path).split("train")[0].case


class TestRegions:
    def test_planes_and_written_values(self):
        """A region is a union of values; the last region of a voxel in the order decides its value, as in nnU-Net."""
        regions, order = {"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}, [1, 2, 3]
        labels = make_label_map({"background": 0, **regions}, order, 255)
        stored = np.random.default_rng(0).integers(0, 4, (4, 5, 6))
        planes = labels.encode([stored])
        for plane, region in zip(planes, regions.values(), strict=True):
            assert np.array_equal(plane.numpy(), np.isin(stored, region))
        assert np.array_equal(labels.decode(planes.bool())[0], stored)
        free = torch.from_numpy(np.random.default_rng(1).random((3, 4, 5, 6)) > 0.5)  # core outside the whole, too
        (written,) = labels.decode(free)
        for voxel in np.ndindex(4, 5, 6):
            last = [value for value, plane in zip(order, free, strict=True) if plane[voxel]]
            assert written[voxel] == (last[-1] if last else 0)

    def test_the_ignored_label(self, tmp_path):
        root = nnunet(tmp_path, labels=REGIONS, regions_class_order=[1, 2])
        stored = np.array([[[0, 1], [2, 3]]] * 2, np.uint8)
        write(root / "imagesTr/c0_0000.nii.gz", stored)
        write(root / "labelsTr/c0.nii.gz", stored)
        source = NnunetSource(root, split_settings=SplitSettings([1, 0, 0]), preprocessing=AS_STORED)
        mask = source.split("train")[0].mask
        assert mask[:, 0].tolist() == [[[0, 1], [1, 255]], [[0, 0], [1, 255]]]
        assert source.reader.names("c0")[0].as_posix() == "c0.nii.gz"

    @pytest.mark.parametrize(
        ("labels", "order", "message"),
        [
            ({"whole": [1, 2]}, [1], "labels must have a background of 0"),
            ({"background": 0, "whole": [1, 2]}, None, "regions_class_order must have a value for each of the regions"),
            ({"background": 0, "whole": [1, 2]}, [1, 2], "regions_class_order must have a value for each of the 1"),
            ({"background": 0, "a": "x"}, None, "labels must be a value or a list"),
            ({"background": 0, "a": [1, 2], "ignore": [3, 4]}, [1], "one value for ignore"),
            ({"background": 0, "a": 1, "ignore": 1}, None, "mean one thing each, got 1"),
            ({"background": 0}, None, "at least two different names"),
        ],
    )
    def test_invalid_labels_are_refused(self, labels, order, message):
        with pytest.raises(ValueError, match=message):
            make_label_map(labels, order, 255)


def test_label_values_need_no_order():
    labels = LabelMap(("background", "a", "b"), ((0, 5), (-1,), (300,)), ignored=(7,))
    stored = np.array([0, 5, -1, 300, 7])
    assert labels.encode([stored]).tolist() == [0, 0, 1, 2, 255]
    assert labels.decode(torch.tensor([0, 1, 2]))[0].tolist() == [0, -1, 300]
    assert labels.decode(torch.tensor([0]))[0].dtype == np.int16
    with pytest.raises(ValueError, match=r"4 \(1 voxels\)"):
        labels.encode([np.array([4])])


class TestSplits:
    def test_a_file_of_folds(self, tmp_path):
        root = nnunet(tmp_path, cases=4)
        folds = [{"train": ["c0", "c1", "c2"], "val": ["c3"]}, {"train": ["c3", "c2"], "val": ["c0"]}]
        (root / "splits_final.json").write_text(json.dumps(folds))
        source = NnunetSource(root, fold=1, preprocessing=AS_STORED)
        assert [[pair.case for pair in source.split(split).pairs] for split in ("train", "val")] == [
            ["c2", "c3"],
            ["c0"],
        ]
        assert source.split("test") is None
        for fold, text in (
            (2, r"has folds 0 to 1, got 2.*data\.fold"),
            (0, "names 1 cases that imagesTr does not"),
        ):
            if fold == 0:
                (root / "splits_final.json").write_text(json.dumps([{"train": ["c0", "../x"], "val": ["c1"]}]))
            with pytest.raises(DataError, match=f"(?s){text}"):
                NnunetSource(root, fold=fold).check()

    def test_labels_of_the_test_images(self, tmp_path):
        root = nnunet(tmp_path, cases=4)
        for index in (7, 8):
            write(root / f"imagesTs/t{index}_0000.nii.gz", blob(index)[0], AFFINES["LPS"])
        assert NnunetSource(root).split("test").pairs[0].case in {"c0", "c1", "c2", "c3"}
        write(root / "labelsTs/t7.nii.gz", blob(7)[1], AFFINES["LPS"])
        source = NnunetSource(root)
        assert [pair.case for pair in source.split("test").pairs] == ["t7"]
        assert "1 of the 2 images of imagesTs have no mask" in source.check()
        assert len(source.split("train")) == 3
        (root / "splits_final.json").write_text(json.dumps([{"train": ["c0", "c1"], "val": ["c2"]}]))
        source = NnunetSource(root)
        assert [[pair.case for pair in source.split(split).pairs] for split in ("val", "test")] == [["c2"], ["t7"]]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"dataset\.json: does not exist.*data=volumes"):
        NnunetSource(tmp_path)
    for content, text in (
        ("{", "cannot be read as JSON"),
        ("[]", "must hold an object"),
        ('{"labels": {"background": 0}}', "must have an object channel_names"),
        ('{"channel_names": {"0": "R"}, "labels": {"background": 0, "a": 1}, "file_ending": ".png"}', "data=folder"),
        ('{"channel_names": {"a": "R"}, "labels": {"background": 0}}', "must have whole numbers"),
    ):
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(DataError, match=text):
            NnunetSource(tmp_path)
    nnunet(tmp_path, cases=2, channels=2)
    (tmp_path / "imagesTr/c1_0001.nii.gz").unlink()
    with pytest.raises(
        DataError, match=r"(?s)c1_0000\.nii\.gz: its case has the channel 0000, but 2 channels are required"
    ):
        NnunetSource(tmp_path).check()


class TestConfig:
    @staticmethod
    def composed(*overrides: str):
        register_resolvers()
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return compose("fit", overrides=["data=nnunet", *overrides])

    def test_settings_come_from_the_data_set_and_are_stored(self, tmp_path):
        root = nnunet(tmp_path / "data", channels=2)
        config = self.composed(f"data.root={root}", "folder=run")
        resolve_from_files(config)
        (root / "dataset.json").unlink()
        data = config.data
        assert (data.classes, data.activation, data.exclude_classes) == (
            ["background", "front", "back"],
            "softmax",
            [0],
        )
        assert (data.channels, config.model.in_channels, config.model.out_channels) == (2, 2, 3)
        assert "${nnunet" not in OmegaConf.to_yaml(config)
        assert config.data.datamodule.source.dataset_json.labels == {"background": 0, "front": 1, "back": 2}

    def test_each_setting_can_be_overridden(self, tmp_path):
        root = nnunet(tmp_path / "data")
        merged = self.composed(
            f"data.root={root}", "data.labels={background:0,all:[1,2]}", "data.regions_class_order=[1]"
        )
        resolve_from_files(merged)
        assert (merged.data.classes, merged.data.activation, merged.data.exclude_classes) == (["all"], "sigmoid", [])
        renamed = self.composed(f"data.root={root}", "data.classes=[a,b,c]", "data.channel_names=[CT]")
        resolve_from_files(renamed)
        assert (renamed.model.out_channels, renamed.data.datamodule.source.preprocessing.normalization) == (3, ["CT"])

    def test_what_is_missing_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"data\.root has no value: give data\.root="):
            resolve_from_files(self.composed())
        with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/dataset\.json: does not exist"):
            resolve_from_files(self.composed(f"data.root={tmp_path}"))
