"""Volumes: orientation, geometry, refused files, resampling, written masks."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import LEAN, run_command
from volume_files import AFFINES, blob, folders, nnunet, write

from lightning_dice.data import SegmentationData, SplitSettings
from lightning_dice.data.errors import DataError, SkippedWarning
from lightning_dice.data.interfaces import PredictionItem
from lightning_dice.data.label_map import LabelMap
from lightning_dice.data.volumes.nifti import read_geometry, read_labels, read_volume
from lightning_dice.data.volumes.prediction_io import VolumePredictionIO
from lightning_dice.data.volumes.preprocessing import Preprocessor, VolumePreprocessing
from lightning_dice.data.volumes.resampling import resample_image, resample_mask
from lightning_dice.data.volumes.sources import VolumeSource

THREE = ["background", "front", "back"]
LABELS = LabelMap.of_ids(THREE)
REAL = Path(__file__).parents[2].parent / "shared" / "data" / "hippocampus3d"


def reader(labels: LabelMap | None = None, channels: int = 1) -> VolumePredictionIO:
    return VolumePredictionIO(labels or LabelMap.of_ids(THREE), channels, lambda: Preprocessor(("nonorm",) * channels))


@pytest.mark.parametrize("name", AFFINES)
def test_axes_in_memory_run_right_front_and_up(tmp_path, name):
    """Each voxel holds a world coordinate, which increases fastest along its own axis in memory."""
    affine = AFFINES[name]
    indices = np.stack([*np.indices((4, 5, 6)), np.ones((4, 5, 6))])
    world = np.einsum("ij,jxyz->ixyz", affine, indices)
    parts = [read_volume(write(tmp_path / f"{axis}.nii.gz", world[axis]))[0] for axis in range(3)]
    for axis in range(3):
        path = write(tmp_path / f"own{axis}.nii.gz", world[axis], affine)
        values, geometry = read_volume(path)
        assert values.shape == geometry.size
        steps = [np.diff(values, axis=other).mean() for other in range(3)]
        assert int(np.argmax(np.abs(steps))) == axis
        assert steps[axis] > 0
        assert sorted(values.ravel()) == pytest.approx(sorted(parts[axis].ravel()))
    step = {axis: np.linalg.norm(affine[:3, axis]) for axis in range(3)}
    order = [int(np.argmax(np.abs(np.linalg.inv(affine)[:3, axis] * list(step.values())))) for axis in range(3)]
    assert geometry.spacing == pytest.approx([step[axis] for axis in order], abs=1e-5)


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_a_mask_is_written_as_it_was_stored(tmp_path, name, suffix):
    image, mask = blob(0)
    root = folders(tmp_path, {"train": 0})
    for split in ("train", "val"):
        path = write(root / f"images/{split}/a{suffix}", image, AFFINES[name], descrip=b"scanner")
        write(root / f"masks/{split}/a{suffix}", mask, AFFINES[name])
    source = VolumeSource(root, LABELS, preprocessing=VolumePreprocessing("nonorm", spacing=None))
    sample = source.split("val")[0]
    item, scan = PredictionItem("sub/a", (path,)), source.reader.read(PredictionItem("a", (path,)))
    assert torch.equal(scan.image, sample.image)
    assert (scan.size, scan.spacing) == (tuple(sample.mask.shape), sample.spacing)
    source.reader.write(tmp_path / "out", item.case, sample.mask, scan)
    (written,) = source.reader.names(item.case)
    assert written == Path("sub/a.nii.gz")
    found = nib.load(tmp_path / "out" / written)
    assert np.array_equal(np.asanyarray(found.dataobj), mask)
    assert np.array_equal(found.affine, nib.load(path).affine)
    assert found.get_data_dtype() == np.uint8
    original = nib.load(path).header
    for field in ("sform_code", "qform_code", "pixdim", "xyzt_units", "descrip"):
        assert np.array_equal(found.header[field], original[field])
    assert torch.equal(source.reader.load(tmp_path / "out", item.case), sample.mask)
    again = (tmp_path / "out" / written).read_bytes()
    assert again[4:8] == bytes(4)  # gzip's time
    source.reader.write(tmp_path / "out", item.case, sample.mask, scan)
    assert (tmp_path / "out" / written).read_bytes() == again
    assert [p.name for p in (tmp_path / "out" / "sub").iterdir()] == ["a.nii.gz"]


def test_probabilities_are_the_fourth_axis(tmp_path):
    path = write(tmp_path / "a.nii.gz", blob(0)[0], AFFINES["permuted"])
    scan = reader().read(PredictionItem("a", (path,)))
    probs = torch.rand(3, *scan.size)
    (file,) = reader().write_probabilities(tmp_path / "p", "a", probs, scan)
    found = nib.load(file)
    assert found.get_data_dtype() == np.float32
    assert found.shape == (*nib.load(path).shape, 3)
    assert np.array_equal(found.affine, AFFINES["permuted"])
    for channel in range(3):
        one = write(tmp_path / f"{channel}.nii.gz", np.asarray(found.dataobj)[..., channel], found.affine)
        assert np.array_equal(read_volume(one)[0], probs[channel].numpy())
    assert torch.equal(reader().load_probabilities(tmp_path / "p", "a"), probs)
    assert reader().load_probabilities(tmp_path / "p", "b") is None
    write(tmp_path / "p/c.nii.gz", np.zeros((3, 4, 5, 2), np.float32), np.eye(4))
    with pytest.raises(DataError, match=r"c.nii.gz: holds 2 classes, but 3 are required"):
        reader().load_probabilities(tmp_path / "p", "c")


def test_a_scaled_image_gives_an_unscaled_mask(tmp_path):
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    image.header.set_slope_inter(0.5, 3)
    nib.save(image, tmp_path / "a.nii.gz")
    scan = reader().read(PredictionItem("a", (tmp_path / "a.nii.gz",)))
    assert np.array_equal(scan.image[0].numpy(), np.asanyarray(nib.load(tmp_path / "a.nii.gz").dataobj))
    labels = torch.randint(0, 3, scan.size, dtype=torch.uint8)
    reader().write(tmp_path / "out", "a", labels, scan)
    assert np.array_equal(nib.load(tmp_path / "out/a.nii.gz").dataobj, labels)


def test_units_are_millimeters(tmp_path):
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.diag([250.0, 500, 1000, 1]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii")
    assert read_geometry(tmp_path / "a.nii").spacing == (0.25, 0.5, 1.0)
    image.header["xyzt_units"] = 5  # not a code of NIfTI
    nib.save(image, tmp_path / "b.nii")
    assert read_geometry(tmp_path / "b.nii").spacing == (250, 500, 1000)


def test_overlapping_classes_have_a_folder_each(tmp_path):
    path = write(tmp_path / "in/é x.nii.gz", blob(0)[0])
    own = reader(LabelMap.of_ids(["vein", "artery"], "sigmoid"))
    scan = own.read(own.find(path)[0])
    labels = torch.rand(2, *scan.size) > 0.5
    own.write(tmp_path / "out", "é x", labels, scan)
    assert sorted(p.parent.name for p in (tmp_path / "out").rglob("*.nii.gz")) == ["artery", "vein"]
    assert torch.equal(own.load(tmp_path / "out", "é x").bool(), labels)
    for split in ("train", "val"):  # ... and training reads them.
        write(tmp_path / "images" / split / "é x.nii.gz", blob(0)[0])
        for name in ("vein", "artery"):
            data = (tmp_path / "out" / name / "é x.nii.gz").read_bytes()
            (tmp_path / "masks" / split / name).mkdir(parents=True)
            (tmp_path / "masks" / split / name / "é x.nii.gz").write_bytes(data)
    source = VolumeSource(
        tmp_path, LabelMap.of_ids(["vein", "artery"], "sigmoid"), preprocessing=VolumePreprocessing(spacing=None)
    )
    assert "one mask file for each class" in source.check()
    assert torch.equal(source.split("val")[0].mask.bool(), labels)


class TestFind:
    def test_channels_and_folders(self, tmp_path):
        for name in ("a_0000", "a_0001", "sub/b_0001", "sub/b_0000", ".hidden_0000", "sub/c_0001"):
            write(tmp_path / f"{name}.nii.gz", blob(0)[0])
        (tmp_path / "notes.txt").write_text("x")
        two = reader(channels=2)
        items = {item.case: [path.name for path in item.files] for item in two.find(tmp_path)}
        expected = {"a": ["a_0000.nii.gz", "a_0001.nii.gz"], "sub/b": ["b_0000.nii.gz", "b_0001.nii.gz"]}
        assert {case: items[case] for case in expected} == expected
        assert two.find(tmp_path / "a_0001.nii.gz")[0].case == "a"
        (broken,) = [item for item in two.find(tmp_path) if item.case not in expected]
        with pytest.raises(DataError, match=r"c_0001\.nii\.gz: its case has 1 of 2 channels"):
            two.read(broken)

    def test_the_number_of_a_single_channel_is_optional(self, tmp_path):
        for name in ("scan_0000", "scan_0001"):
            write(tmp_path / f"{name}.nii.gz", blob(0)[0])
        assert [item.case for item in reader().find(tmp_path)] == ["scan_0000", "scan_0001"]
        (tmp_path / "scan_0001.nii.gz").unlink()
        assert [item.case for item in reader().find(tmp_path)] == ["scan"]

    def test_a_link_to_a_folder_is_skipped_with_a_warning(self, tmp_path):
        write(tmp_path / "in/a.nii.gz", blob(0)[0])
        write(tmp_path / "elsewhere/b.nii.gz", blob(0)[0])
        (tmp_path / "in/more").symlink_to("../elsewhere")
        with pytest.warns(SkippedWarning, match=r"in/more: is a link to the folder \.\./elsewhere; it was skipped"):
            assert [item.case for item in reader().find(tmp_path / "in")] == ["a"]

    def test_no_files_and_duplicates(self, tmp_path):
        with pytest.raises(DataError, match="holds no NIfTI file"):
            reader().find(tmp_path)
        with pytest.raises(DataError, match="neither a file nor a folder"):
            reader().find(tmp_path / "none")
        write(tmp_path / "a.nii", blob(0)[0])
        write(tmp_path / "a.nii.gz", blob(0)[0])
        with pytest.raises(DataError, match=r"several files belong to one case: a\.nii, a\.nii\.gz"):
            reader().find(tmp_path)

    def test_other_formats_cannot_hold_it(self):
        with pytest.raises(DataError, match="format must be nifti for volumes, got png"):
            reader().names("a", "png")


def test_masks_that_are_not_ours_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.nii\.gz: does not exist"):
        reader().load(tmp_path, "a")
    write(tmp_path / "a.nii.gz", np.full((3, 3, 3), 9, np.uint8))
    with pytest.raises(DataError, match=r"holds the values 9 \(27 voxels\)"):
        reader().load(tmp_path, "a")


def test_a_mask_that_exists_twice_is_refused(tmp_path):
    for name in ("a.nii", "a.nii.gz"):
        write(tmp_path / name, blob(0)[1])
    with pytest.raises(DataError, match=r"exists twice: a\.nii\.gz, a\.nii"):
        reader().load(tmp_path, "a")


def test_every_bad_file_is_listed_at_once(tmp_path):
    good, mask = blob(0)
    names = [
        *("good", "empty", "truncated", "plain-cut", "text", "damaged", "movie", "slice", "nan", "bomb", "flat", "lfs"),
        *("fractions", "shape", "moved", "labels", "complex", "dangling"),
    ]
    root = tmp_path / "data set"
    for name in names:
        ending = ".nii" if name == "plain-cut" else ".nii.gz"
        write(root / f"images/train/{name}{ending}", good)
        write(root / f"masks/train/{name}{ending}", mask)
    write(root / "images/val/v.nii.gz", good)
    write(root / "masks/val/v.nii.gz", mask)
    images, masks = root / "images/train", root / "masks/train"
    (images / "empty.nii.gz").write_bytes(b"")
    whole = (images / "truncated.nii.gz").read_bytes()
    (images / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (images / "plain-cut.nii").write_bytes((images / "plain-cut.nii").read_bytes()[:-40])
    (images / "text.nii.gz").write_text("no volume at all, but long enough to be read as a header" * 20)
    (images / "damaged.nii.gz").write_bytes(whole[:-8] + b"\0\0\0\0" + whole[-4:])  # the checksum
    (images / "lfs.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\n")
    write(images / "movie.nii.gz", np.zeros((4, 4, 4, 3), np.uint8))
    write(images / "slice.nii.gz", np.zeros((16, 16, 1), np.uint8))
    write(images / "nan.nii.gz", np.where(mask, np.nan, 1.0))
    write(images / "complex.nii.gz", good.astype(np.complex64))
    header = bytearray(gzip.decompress(whole))
    header[40:48] = np.array([3, 30000, 30000, 30000], np.int16).tobytes()
    (images / "bomb.nii.gz").write_bytes(gzip.compress(bytes(header)))
    flat = nib.Nifti1Image(good, None)
    flat.header["sform_code"] = 1
    nib.save(flat, images / "flat.nii.gz")
    (images / "dangling.nii.gz").unlink()
    (images / "dangling.nii.gz").symlink_to("../../elsewhere.nii.gz")
    write(masks / "fractions.nii.gz", mask + 0.5 * (mask == 2))
    write(masks / "shape.nii.gz", mask[1:])
    write(masks / "moved.nii.gz", mask, np.diag([1, 1, 1.2, 1]))
    write(masks / "labels.nii.gz", mask * 3)
    write(masks / "orphan.nii.gz", mask)
    write(images / "alone.nii.gz", good)
    with pytest.raises(DataError) as caught:
        VolumeSource(root, LABELS).check()
    text = str(caught.value)
    for line in [
        "images/train/empty.nii.gz: is empty (0 bytes)",
        "images/train/truncated.nii.gz: cannot be read as NIfTI",
        "images/train/plain-cut.nii: is truncated: 2272 bytes of data expected, 2232 found",
        "images/train/text.nii.gz: is named .gz but is not compressed: it begins with b'no volum'",
        "images/train/damaged.nii.gz: cannot be read as NIfTI (BadGzipFile: CRC check failed",
        "images/train/lfs.nii.gz: is a Git LFS pointer",
        "images/train/movie.nii.gz: has 4 axes (4x4x4x3), but a volume of 3 is required",
        "images/train/slice.nii.gz: is a single slice (16x16x1)",
        "images/train/nan.nii.gz: holds 80 voxels that are not finite",
        "images/train/complex.nii.gz: holds complex64 values",
        "images/train/bomb.nii.gz: may be a decompression bomb: 30000x30000x30000",
        "images/train/flat.nii.gz: has an affine whose axes span no volume",
        "images/train/dangling.nii.gz: does not exist; it is a link to ../../elsewhere.nii.gz",
        "masks/train/fractions.nii.gz: holds 32 voxels that are not whole numbers (2.5)",
        "masks/train/shape.nii.gz: is 9x12x8, but shape.nii.gz is 10x12x8",
        "masks/train/moved.nii.gz: is not aligned with moved.nii.gz: their affines put its corners 1.4 voxels apart",
        "masks/train/labels.nii.gz: holds the values 3 (48 voxels), 6 (32 voxels), which belong to no class",
        "masks/train/orphan.nii.gz: has no image",
        "images/train/alone.nii.gz: has no mask",
    ]:
        assert f"- {line}" in text
    assert text.startswith("19 problems")
    assert "good" not in text


def test_labels_may_be_stored_as_floats_or_in_another_orientation(tmp_path):
    """Whole numbers as floats; a mask that is stored in another orientation than its image but matches it."""
    _, mask = blob(0)
    folders(tmp_path, {"train": 1, "val": 1})
    expected = VolumeSource(tmp_path, LABELS).split("val")[0].mask
    write(tmp_path / "masks/val/val0.nii.gz", mask.astype(np.float32))
    assert torch.equal(VolumeSource(tmp_path, LABELS).split("val")[0].mask, expected)
    turned = np.array([[-1.0, 0, 0, 9], [0, 0, 1.0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]])
    write(tmp_path / "masks/val/val0.nii.gz", mask[::-1].transpose(0, 2, 1), turned)
    assert torch.equal(VolumeSource(tmp_path, LABELS).split("val")[0].mask, expected)
    write(tmp_path / "masks/val/val0.nii.gz", mask, np.diag([2, 2, 2, 1]))
    with pytest.raises(DataError, match=r"data\.check_affine=false"):
        VolumeSource(tmp_path, LABELS).check()
    assert torch.equal(VolumeSource(tmp_path, LABELS, check_affine=False).split("val")[0].mask, expected)


@pytest.mark.parametrize("name", AFFINES)
def test_without_check_affine_a_mask_gets_the_affine_of_its_image(tmp_path, name):
    """A mask whose affine was lost by some tool is oriented as its image."""
    folders(tmp_path, {"train": 1, "val": 1}, AFFINES[name])
    expected = VolumeSource(tmp_path, LABELS).split("val")[0].mask
    write(tmp_path / "masks/val/val0.nii.gz", blob(100)[1], np.diag([-1, 1, 1, 1]))
    what = "has axes along LAS by its affine" if name == "permuted" else "is not aligned with"
    with pytest.raises(DataError, match=rf"(?s){what}.*data\.check_affine=false"):
        VolumeSource(tmp_path, LABELS).check()
    source = VolumeSource(tmp_path, LABELS, check_affine=False)
    assert torch.equal(source.split("val")[0].mask, expected)
    source.check()


def test_labels_may_be_scaled_by_the_header(tmp_path):
    """Nibabel stores floats as uint8 with a slope in single precision: 3 is read as 3.00000006."""
    labels = np.random.default_rng(0).integers(0, 4, (6, 7, 8))
    image = nib.Nifti1Image(labels.astype(np.float32), np.eye(4))
    image.header.set_data_dtype(np.uint8)
    nib.save(image, tmp_path / "scaled.nii.gz")
    assert (nib.load(tmp_path / "scaled.nii.gz").get_fdata() != labels).any()
    found = read_labels(tmp_path / "scaled.nii.gz")[0]
    assert np.array_equal(found, labels)
    assert found.dtype == np.int64


def test_files_of_one_class_may_hold_other_values_than_1(tmp_path):
    """0 and 255, as many tools write masks; 128 is ignored."""
    mask = np.random.default_rng(0).choice([0, 128, 255], (6, 7, 8)).astype(np.uint8)
    for split in ("train", "val"):
        write(tmp_path / f"images/{split}/{split}.nii.gz", mask)
        for name, values in (("front", mask), ("back", 255 - mask)):
            write(tmp_path / f"masks/{split}/{name}/{split}.nii.gz", values)
    source = VolumeSource(tmp_path, LabelMap.of_ids(THREE[1:], "sigmoid", label_map={255: 1, 127: 255, 128: 255}))
    share = source.survey().shares("train")
    assert share["front"] == (pytest.approx((mask == 255).mean()), 1)
    assert share["back"] == (pytest.approx((mask == 0).mean()), 1)
    expected = [np.where(part == 255, 1, np.where(part == 0, 0, 255)) for part in (mask, 255 - mask)]
    assert np.array_equal(source.split("val")[0].mask, np.stack(expected))
    assert source.fingerprint().intensities[0].maximum == 255
    found = source.labels.decode(torch.from_numpy(np.stack(expected) == 1))  # and is written in the same way
    assert np.array_equal(found[0], np.where(mask == 255, 255, 0))
    assert torch.equal(source.labels.encode(found) == 1, torch.from_numpy(np.stack(expected) == 1))


def test_mapped_values_are_written_except_for_the_background():
    labels = LabelMap.of_ids(THREE, label_map={205: 1, 420: 2, 7: 0})
    (found,) = labels.decode(torch.tensor([0, 1, 2]))
    assert found.tolist() == [0, 205, 420]
    assert labels.encode([np.array([0, 7, 1, 205, 2, 420])]).tolist() == [0, 0, 1, 1, 2, 2]


class TestResampling:
    def test_training_has_the_spacing_of_the_network_and_evaluation_that_of_the_file(self, tmp_path):
        folders(tmp_path, {"train": 2, "val": 2}, np.diag([1, 1, 2, 1.0]))
        write(tmp_path / "images/val/val1.nii.gz", np.zeros((20, 12, 8), np.int16), np.diag([0.5, 1, 2, 1]))
        write(tmp_path / "masks/val/val1.nii.gz", np.zeros((20, 12, 8), np.uint8), np.diag([0.5, 1, 2, 1]))
        source = VolumeSource(tmp_path, LABELS, preprocessing=VolumePreprocessing(spacing=[None, 2.0, 1]))
        train, val = source.split("train"), source.split("val")
        sample = train[0]
        assert sample.image.shape[1:] == sample.mask.shape == train.sizes[0] == (10, 6, 16)
        assert sample.spacing == (1.0, 2.0, 1.0)
        assert [tuple(val[i].image.shape[1:]) for i in (0, 1)] == val.sizes == [(10, 6, 16)] * 2
        assert [tuple(val[i].mask.shape) for i in (0, 1)] == [(10, 12, 8), (20, 12, 8)]
        assert [val[i].spacing for i in (0, 1)] == [(1.0, 1.0, 2.0), (0.5, 1.0, 2.0)]
        # Images of one size, masks of different sizes: never in one batch.
        data = SegmentationData(source, batch_size=2, eval_batch_size=2, num_workers=0)
        data.setup("fit")
        assert [batch.case for batch in data.val_dataloader()] == [["val0"], ["val1"]]
        cases = pickle.loads(pickle.dumps(val))  # as in the worker of a data loader
        assert torch.equal(cases[0].image, val[0].image)

    def test_resampling_keeps_the_extent(self):
        """A ramp over the extent of the volume stays that ramp, except for the half voxels at its ends."""

        def ramp(n: int) -> torch.Tensor:
            return ((torch.arange(n) + 0.5) / n).view(1, n, 1, 1).expand(1, n, 3, 3).contiguous()

        for interpolation in ("linear", "cubic"):
            zoomed = resample_image(ramp(8), (20, 3, 3), interpolation)
            torch.testing.assert_close(zoomed[:, 5:-5], ramp(20)[:, 5:-5], atol=0.01, rtol=0)

    def test_masks_against_their_definition(self):
        """Each voxel gets the label with the largest share, interpolated by hand along the only axis that changes."""
        mask = torch.randint(0, 3, (6, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        mask[mask == 2] = 255
        zoomed = resample_mask(mask, (9, 4, 5), planes=False)
        for i, j, k in np.ndindex(9, 4, 5):
            at = min(max((i + 0.5) * 6 / 9 - 0.5, 0), 5)
            low = int(at)
            shares: dict[int, float] = {}
            for index, share in ((low, 1 - (at - low)), (min(low + 1, 5), at - low)):
                shares[int(mask[index, j, k])] = shares.get(int(mask[index, j, k]), 0) + share
            assert shares[int(zoomed[i, j, k])] >= max(shares.values()) - 1e-6
        planes = torch.stack([mask == 1, mask == 255]).to(torch.uint8)
        assert torch.equal(resample_mask(planes, (9, 4, 5), planes=True)[0], resample_mask(planes[0], (9, 4, 5), False))
        for tied in ([1, 2], [2, 1]):
            assert resample_mask(torch.tensor(tied).view(2, 1, 1), (1, 1, 1), planes=False).item() == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": ""}, "root must name a folder"),
        ({"channels": 0}, "channels must be 1 or more"),
        ({"preprocessing": VolumePreprocessing(["ct", "ct"])}, "normalization must be one of"),
        ({"split_settings": SplitSettings(split_files="{split}.txt")}, "split_files must be None for volumes"),
        ({"workers": 0}, "workers must be"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VolumeSource(**{"root": "data", "labels": LABELS, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spacing": "mean"}, "spacing must be median, null or mm along three axes"),
        ({"spacing": [1, 1]}, "spacing must be"),
        ({"spacing": [1, 1, 0]}, "spacing must be"),
        ({"interpolation": "nearest"}, "interpolation must be linear or cubic"),
    ],
    ids=str,
)
def test_invalid_preprocessing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VolumePreprocessing(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ["a"]}, "classes must be at least two"),
        ({"ignore_index": 1}, "mean one thing each, got 1"),
        ({"label_map": {7: 9}}, "label_map must map to the ids 0 to 2 or ignore_index=255, got 9"),
    ],
    ids=str,
)
def test_invalid_labels_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LabelMap.of_ids(**{"classes": THREE, **settings})


def test_report(tmp_path):
    folders(tmp_path, {"train": 2, "val": 1}, AFFINES["LPS"])
    assert VolumeSource(tmp_path, LabelMap.of_ids([*THREE, "never"])).check() == "\n".join(
        [
            f"{tmp_path}: 3 cases, masks of labels, softmax, resampled to 1x2x3 mm",
            "",
            "split  cases  size     spacing (mm)  images",
            "train  2      10x12x8  1x2x3         int16 LPS",
            "val    1      10x12x8  1x2x3         int16 LPS",
            "",
            "voxels (cases)  train     val",
            "background      91.7% (2)  91.7% (1)",
            "front           5% (2)     5% (1)",
            "back            3.33% (2)  3.33% (1)",
            "never           0% (0)     0% (0)",
            "",
            "Warning: class 'never' never occurs in the train split",
        ]
    ).replace("train     val", "train      val")


def test_real_volumes():
    if not REAL.is_dir():
        pytest.skip("no real volumes here")
    survey = VolumeSource(REAL, LABELS, workers=2).survey()
    assert {split: len(cases) for split, cases in survey.cases.items()} == {"train": 180, "val": 40, "test": 20}
    masks = [np.asanyarray(nib.load(path).dataobj) for path in sorted((REAL / "masks/val").iterdir())]
    voxels = sum(mask.size for mask in masks)
    for label, name in enumerate(THREE):
        assert survey.shares("val")[name][0] == pytest.approx(sum((mask == label).sum() for mask in masks) / voxels)


@pytest.mark.slow
def test_trained_and_predicted_by_command(tmp_path):
    """Train an nnU-Net data set at another spacing; predict without the data, in the geometry of the files."""
    nnunet(tmp_path / "data", cases=6)
    for index in range(2):
        write(tmp_path / f"new/sub/n {index}_0000.nii.gz", blob(index)[0], AFFINES["oblique"])
    (tmp_path / "new/sub/bad_0000.nii.gz").write_bytes(b"")
    small = [
        "model=custom",
        "model._target_=torch.nn.Conv3d",
        "device=cpu",
        "data.num_workers=0",
        "augment=volume_flips",
    ]
    run = ["data=nnunet", "data.root=data", "data.patch_size=[8,8,8]", "data.spacing=[2,2,2]", "folder=run", *small]
    run_command("fit", *run, *LEAN, "trainer.max_epochs=1", "loss=dice_ce", cwd=tmp_path)
    assert (tmp_path / "run/fingerprint.json").is_file()
    assert "front: 1" in (tmp_path / "run/config_unresolved.yaml").read_text()
    (tmp_path / "data").rename(tmp_path / "gone")
    predicted = run_command("predict", "run=run", "input=new", "output=out", "device=cpu", cwd=tmp_path, status=1)
    assert "bad_0000.nii.gz" in predicted.err
    for index in range(2):
        found = nib.load(tmp_path / f"out/sub/n {index}.nii.gz")
        assert found.shape == (10, 12, 8)
        assert np.allclose(found.affine, AFFINES["oblique"])
        assert set(np.unique(found.dataobj)) <= {0, 1, 2}
