"""Batches: their contents, order and distribution over processes."""

import copy
import pickle
import random
import re
from collections import Counter

import lightning
import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.utils.data import DistributedSampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from lightning_dice.data.batch import Batch, Sample
from lightning_dice.data.batching import apply_augment
from lightning_dice.data.datamodule import SegmentationData
from lightning_dice.data.errors import DataError
from lightning_dice.data.samplers import EvalSampler, TrainSampler
from lightning_dice.data.synthetic import SyntheticSource
from lightning_dice.data.transforms import Standardize


class Cases:
    """Case i has i / 100 in every pixel."""

    def __init__(self, sizes, prefix="case"):
        self.sizes = sizes
        self.prefix = prefix

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        size = self.sizes[index]
        mask = torch.ones(size, dtype=torch.uint8)
        return Sample(torch.full((1, *size), index / 100), mask, f"{self.prefix}-{index}")


class Source:
    def __init__(self, train=(), val=(), test=(), problem=None):
        self.splits = {"train": train, "val": val, "test": test}
        self.problem = problem
        self.checks = 0

    def check(self):
        self.checks += 1
        if self.problem:
            raise DataError(self.problem)
        return "found it"

    def split(self, name):
        return Cases(self.splits[name], name) if self.splits[name] else None


class Noisy:
    """An augmentation that draws from torch, `random` and NumPy."""

    def __call__(self, image, mask):
        return image + torch.rand(1) + random.random() + np.random.rand(), mask


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def _step(self, batch, stage):
        self.seen[stage].append((list(batch.case), batch.image.clone()))
        return self.net(batch.image).square().mean()

    def training_step(self, batch):
        return self._step(batch, "train")

    def validation_step(self, batch):
        self._step(batch, "val")

    def test_step(self, batch):
        self._step(batch, "test")

    def predict_step(self, batch):
        return self._step(batch, "predict")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def cases(self, stage):
        return [case for cases, _ in self.seen[stage] for case in cases]


def trainer(tmp_path, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {"accelerator": "cpu", "max_epochs": 1, "enable_model_summary": False, **quiet, **settings}
    return lightning.Trainer(default_root_dir=tmp_path, **settings)


def ready(source, **settings):
    data = SegmentationData(source, **{"num_workers": 0, "batch_size": 2, **settings})
    data.prepare_data()
    data.setup()
    return data


def epochs(data, number):
    loader = data.train_dataloader()
    return [[(b.case, b.image) for b in loader] for _ in range(number)]


def same(a, b):
    return all(x[0] == y[0] and torch.equal(x[1], y[1]) for x, y in zip(a, b, strict=True))


# Padding is ignored.


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
@pytest.mark.parametrize("planes", [None, 3], ids=["ids", "planes"])
@pytest.mark.parametrize(
    ("augment", "filled"),
    [
        pytest.param(v2.RandomCrop((12, 10), pad_if_needed=True), 12 * 10 - 8 * 8, id="crop"),
        pytest.param(v2.RandomAffine(0, translate=(0.5, 0.5)), None, id="shift"),
        pytest.param(v2.RandomAffine(45), None, id="affine"),
        pytest.param(v2.RandomRotation((30, 60), expand=True), None, id="rotation"),
        pytest.param(v2.Pad(3), 14 * 14 - 8 * 8, id="pad"),
        pytest.param(v2.Compose([v2.ScaleJitter((20, 20)), v2.CenterCrop(40)]), None, id="scale"),
    ],
)
def test_pixels_outside_the_image_are_ignored(augment, filled, planes, dtype):
    torch.manual_seed(0)
    mask = torch.randint(0, 2 if planes else 9, (planes, 8, 8) if planes else (8, 8)).to(dtype)
    image = torch.ones(1, 8, 8)
    found = 0
    for _ in range(5):
        new, labels = apply_augment(augment, image, mask, 255)
        assert labels.dtype == dtype
        outside = labels == 255
        # These sample the nearest pixel, or nearly so: the image is black exactly there.
        assert torch.equal(outside.reshape(-1, *new.shape[1:])[0], new[0] < 0.5)
        assert set(labels[~outside].tolist()) <= set(mask.flatten().tolist())
        if filled is not None:
            assert outside.sum() == filled * (planes or 1)
        found += int(outside.sum())
    assert found


def test_without_an_ignored_label_the_outside_is_background():
    mask = torch.ones(4, 4, dtype=torch.uint8)
    _, labels = apply_augment(v2.Pad(1), torch.ones(1, 4, 4), mask, None)
    assert labels.sum() == 16
    assert labels.shape == (6, 6)
    assert labels.dtype == torch.uint8


@pytest.mark.parametrize(
    ("ignore_index", "values", "dtype"),
    [(255, [0, 254, 255], torch.uint8), (0, [0, 1, 255], torch.uint8), (-100, [0, 7, 255], torch.int64)],
)
def test_every_label_survives(ignore_index, values, dtype):
    mask = torch.tensor([values], dtype=torch.uint8)
    _, labels = apply_augment(v2.Pad(1), torch.ones(1, 1, 3), mask, ignore_index)
    assert labels[1, 1:-1].tolist() == values
    assert labels[0].tolist() == [ignore_index] * 5
    assert labels.dtype == dtype


def test_a_mask_sees_int32_and_an_image_float():
    kinds = []

    def augment(image, mask):
        kinds.extend((type(image), image.dtype, type(mask), mask.dtype))
        return image, mask

    data = ready(Source(train=[(4, 4)] * 2), augment=augment)
    next(iter(data.train_dataloader()))
    assert kinds[:4] == [tv_tensors.Image, torch.float32, tv_tensors.Mask, torch.int32]


def test_evaluation_is_not_augmented_but_normalized():
    data = ready(Source(train=[(4, 4)] * 2, val=[(4, 4)] * 2), augment=Noisy(), normalize=lambda image: image + 5)
    (batch,) = data.val_dataloader()
    assert batch.image[:, 0, 0, 0].tolist() == pytest.approx([5.0, 5.01])


# Evaluation.


def test_evaluation_batches_hold_one_size():
    sizes = [(4, 4), (4, 4), (4, 4), (6, 4), (4, 4), (4, 6), (4, 6)]
    data = ready(Source(val=sizes), eval_batch_size=2)
    batches = list(data.val_dataloader())
    assert [b.case for b in batches] == [
        ["val-0", "val-1"],
        ["val-2"],
        ["val-3"],
        ["val-4"],
        ["val-5", "val-6"],
    ]
    assert all(isinstance(b, Batch) for b in batches)
    assert [tuple(b.image.shape[2:]) for b in batches] == [sizes[0], sizes[2], sizes[3], sizes[4], sizes[5]]
    assert len(data.val_dataloader()) == len(batches)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize(("number", "world"), [(n, w) for n in (1, 2, 5, 7, 8, 16, 33) for w in (1, 2, 3, 4, 7)])
def test_each_case_is_evaluated_once(number, world, batch_size):
    rng = random.Random(number * world)
    cases = Cases([rng.choice([(4, 4), (8, 4)]) for _ in range(number)])
    shares = [EvalSampler(cases, world, rank, batch_size=batch_size) for rank in range(world)]
    seen = [i for share in shares for batch in share for i in batch]
    assert sorted(seen) == list(range(number))
    # A process with fewer batches than others has empty ones: all must run the network equally often.
    assert len({len(share) for share in shares}) == 1
    assert all(len(list(share)) == len(share) >= 1 for share in shares)
    assert max(len([batch for batch in share if batch]) for share in shares) == len(shares[0])
    counts = [sum(map(len, share)) for share in shares]
    assert max(counts) - min(counts) <= 1
    for share in shares:
        for batch in share:
            assert len({cases.sizes[i] for i in batch}) <= 1
            assert len(batch) <= batch_size
        filled = [bool(batch) for batch in share]
        assert filled == sorted(filled, reverse=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_evaluation(workers):
    source = SyntheticSource(size=(32, 32), cases=(2, 9, 0))
    alone = list(ready(source, normalize=Standardize()).val_dataloader())
    shared = list(ready(source, normalize=Standardize(), num_workers=workers).val_dataloader())
    assert len(alone) == len(shared) == 5
    for a, b in zip(alone, shared, strict=True):
        assert a.case == b.case
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.mask, b.mask)


# Training.


@pytest.mark.parametrize(("number", "world"), [(8, 1), (8, 2), (9, 2), (10, 3), (7, 4), (64, 8)])
def test_processes_share_an_epoch(number, world):
    cases = Cases([(4, 4)] * number)
    shares = [list(TrainSampler(cases, world, rank, seed=3)) for rank in range(world)]
    assert {len(share) for share in shares} == {number // world}
    assert max(Counter(i for share in shares for i, _ in share).values()) == 1
    whole = list(TrainSampler(cases, 1, 0, seed=3))
    together = [pair for step in zip(*shares, strict=True) for pair in step]
    assert together == whole[: len(together)]


def test_the_order_follows_seed_and_epoch():
    def order(seed, epoch):
        sampler = TrainSampler(Cases([(4, 4)] * 50), 1, 0, seed=seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert order(1, 2) == orders[5]
    sampler = TrainSampler(Cases([(4, 4)] * 50), 1, 0, seed=0)
    assert [tuple(sampler) for _ in range(3)] == orders[:3]


def test_training_is_reproducible_with_any_number_of_workers():
    source = Source(train=[(4, 4)] * 9)

    def run(seed, **settings):
        torch.manual_seed(seed)
        torch.rand(3)  # Later draws do not matter.
        return epochs(ready(source, augment=Noisy(), **settings), 2)

    expected = run(1)
    for workers in (0, 1, 2):
        for a, b in zip(run(1, num_workers=workers), expected, strict=True):
            assert same(a, b)
    first, second = expected
    assert [c for c, _ in first] != [c for c, _ in second]
    values = {
        c: x for e in expected for cases, images in e for c, x in zip(cases, images.flatten(1)[:, 0], strict=True)
    }
    assert len({v.item() for v in values.values()}) == len(values)
    assert not same(run(2)[0], first)


def test_augmentation_differs_between_epochs():
    torch.manual_seed(0)
    data = ready(Source(train=[(4, 4)] * 2), augment=Noisy())
    seen = {float(image.max()) for epoch in epochs(data, 4) for _, images in epoch for image in images}
    assert len(seen) == 8


def test_loading_leaves_the_random_state_alone():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    data = ready(Source(train=[(4, 4)] * 8), augment=Noisy())
    iterator = iter(data.train_dataloader())
    next(iterator)  # draws a seed for workers from torch
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    next(iterator)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.initial_seed() == 0
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_a_new_loader_for_each_epoch_continues_the_order():
    torch.manual_seed(0)
    data = ready(Source(train=[(4, 4)] * 20))
    orders = [tuple(c for b in data.train_dataloader() for c in b.case) for _ in range(3)]
    assert len(set(orders)) == 3
    data.setup()
    assert tuple(c for b in data.train_dataloader() for c in b.case) == orders[0]


def test_training_drops_the_last_cases():
    data = ready(Source(train=[(4, 4)] * 7), batch_size=3)
    assert [len(b.case) for b in data.train_dataloader()] == [3, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_stacked_are_refused(workers):
    data = ready(Source(train=[(4, 4), (4, 6)]), num_workers=workers)
    message = (
        r"must share one size, got train-\d: 4x\d, train-\d: 4x\d: crop them to one \(data.patch_size=\[256,256\]\), or"
    )
    with pytest.raises(ValueError, match=message):
        list(data.train_dataloader())
    cropped = ready(Source(train=[(4, 4), (4, 6)]), num_workers=workers, augment=v2.RandomCrop(4))
    assert next(iter(cropped.train_dataloader())).image.shape == (2, 1, 4, 4)


# Maps.


def twice(mask):
    return 2.0 * mask.float()


def first_row(mask):
    return mask[0].to(torch.int32)


MAPS = {"twice": twice, "first_row": first_row}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_maps_are_computed_from_the_masks_of_the_batch(workers):
    torch.manual_seed(0)
    source = SyntheticSource(size=(24, 24), cases=(6, 3, 2))
    data = ready(source, augment=v2.RandomCrop(16), num_workers=workers, maps=MAPS, ignore_index=255)
    splits = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    for name, loader in splits.items():
        batches = list(loader)
        assert sum(len(batch.case) for batch in batches) == {"train": 6, "val": 3, "test": 2}[name]
        for batch in batches:
            assert batch.mask.shape[-1] == (16 if name == "train" else 24)
            assert list(batch.maps) == ["twice", "first_row"]
            for key, make in MAPS.items():
                assert torch.equal(batch.maps[key], torch.stack([make(mask) for mask in batch.mask]))
    assert all(batch.maps == {} for batch in data.predict_dataloader())


def test_maps_can_be_set_later_and_get_ignored_labels():
    data = ready(Source(train=[(4, 4)] * 2), augment=v2.Pad(1), ignore_index=255)
    assert next(iter(data.train_dataloader())).maps == {}
    data.maps = {"twice": twice}
    batch = next(iter(data.train_dataloader()))
    assert batch.maps["twice"][0, 0].tolist() == [510.0] * 6
    assert batch.maps["twice"].shape == (2, 6, 6)


def test_batches_do_not_share_maps():
    first, second = (Batch(torch.zeros(1), torch.zeros(1), ["a"]) for _ in range(2))
    assert first.maps == {}
    first.maps["x"] = torch.zeros(1)
    assert second.maps == {}
    given = {"x": torch.zeros(1)}
    assert Batch(torch.zeros(1), torch.zeros(1), ["a"], given).maps is not given


def test_a_batch_stays_a_batch_when_moved_pickled_or_copied():
    batch = Batch(torch.zeros(1, 1, 2), torch.zeros(1, 2), ["a"], {"x": torch.ones(1, 2)})
    moved = move_data_to_device(batch, torch.device("meta"))
    for other in (moved, pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch), batch._replace(case=["b"])):
        assert isinstance(other, Batch)
        assert list(other.maps) == ["x"]
    assert moved.maps["x"].device.type == moved.mask.device.type == "meta"
    # Pinning makes a new batch of the pinned values.
    made = [type(value)({"x": "pinned"}) if isinstance(value, dict) else value for value in batch]
    assert type(batch)(*made).maps == {"x": "pinned"}
    assert batch._asdict()["maps"] is batch.maps


@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_passes_maps_to_the_module(tmp_path, workers, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(2), raising=False)
    seen = []

    class Looks(Net):
        def _step(self, batch, stage):
            seen.append((stage, set(batch.maps)))
            return super()._step(batch, stage)

    data = SegmentationData(Source(train=[(4, 4)] * 4, val=[(4, 4)] * 2), batch_size=2, num_workers=workers)
    data.maps = MAPS
    net = Looks()
    trainer(tmp_path, log_every_n_steps=1, num_sanity_val_steps=0).fit(net, datamodule=data)
    assert seen == [("train", set(MAPS))] * 2 + [("val", set(MAPS))]


@pytest.mark.parametrize("maps", [{"x": 1}, [twice], twice])
def test_maps_must_be_functions_by_name(maps):
    with pytest.raises(ValueError, match="maps must be None or functions of a mask by name, got"):
        SegmentationData(Source(), maps=maps)


# Checks and setup.


def test_a_normalization_for_other_channels_is_refused():
    source = SyntheticSource(size=(16, 16), cases=(4, 2, 0))
    normalize = v2.Normalize([0.5, 0.5, 0.5], [0.2, 0.2, 0.2])
    data = SegmentationData(source, batch_size=2, num_workers=0, normalize=normalize)
    data.setup()
    with pytest.raises(DataError, match=r"keep the shape .*\(1, 16, 16\), got \(3, 16, 16\): .*normalize=image"):
        next(iter(data.train_dataloader()))


def test_the_source_is_checked_once(caplog):
    source = Source(train=[(4, 4)] * 2)
    data = SegmentationData(source, batch_size=2)
    assert data.report is None
    with caplog.at_level("INFO"):
        data.prepare_data()
        data.prepare_data()
    assert data.report == "found it"
    assert source.checks == 1
    assert caplog.text.count("found it") == 1


def test_problems_of_the_source_are_raised():
    data = SegmentationData(Source(train=[(4, 4)] * 9, problem="b.png is broken"))
    with pytest.raises(DataError, match=re.escape("b.png is broken")):
        data.prepare_data()
    assert data.report is None


@pytest.mark.parametrize("hook", ["prepare_data", "setup"])
def test_a_split_smaller_than_a_batch_is_refused(hook):
    message = "must hold at least one batch of 8, got 3 cases: add cases, or set data.batch_size=3"
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(SegmentationData(Source(train=[(4, 4)] * 3)), hook)()


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (9, 4, "at least one batch of 4 for each of 3 processes, got 9 cases: add cases, or set data.batch_size=3"),
        (2, 4, "got 2 cases: add cases, or set trainer.devices=2 and data.batch_size=1"),
    ],
)
def test_too_few_cases_for_the_processes_are_refused(monkeypatch, train, val, message):
    monkeypatch.setattr(SegmentationData, "_world", lambda self: (3, 1))
    data = SegmentationData(Source(train=[(4, 4)] * train, val=[(4, 4)] * val), batch_size=4)
    with pytest.raises(ValueError, match=re.escape(message)):
        data.setup("fit")


def test_an_empty_split_is_refused():
    source = Source(train=[(4, 4)] * 4)
    source.split = lambda name: Cases([(4, 4)] * 4 if name == "train" else [])
    with pytest.raises(ValueError, match="the val split must hold at least one case, got none: add cases, or leave it"):
        SegmentationData(source, batch_size=2).setup("fit")


def test_an_empty_batch_has_the_shapes_of_a_full_one(monkeypatch):
    monkeypatch.setattr(SegmentationData, "_world", lambda self: (3, 0))
    data = ready(Source(val=[(4, 6)] * 2), maps={"double": lambda mask: mask * 2})
    (batch,) = data.val_dataloader()
    monkeypatch.setattr(SegmentationData, "_world", lambda self: (1, 0))
    full = next(iter(data.val_dataloader()))
    assert batch.case == []
    assert len(batch.image) == len(batch.mask) == 0
    for one, other in ((batch.image, full.image), (batch.mask, full.mask), (batch.maps["double"], full.maps["double"])):
        assert one.shape[1:] == other.shape[1:]
        assert one.dtype == other.dtype
    assert set(batch.maps) == set(full.maps)


def test_missing_splits():
    data = ready(Source(train=[(4, 4)] * 2))
    assert data.val_dataloader() == data.test_dataloader() == data.predict_dataloader() == []
    with pytest.raises(ValueError, match="the data has no test split, which test needs"):
        data.setup("test")
    with pytest.raises(ValueError, match="the data has no train split, which fit needs"):
        SegmentationData(Source(val=[(4, 4)])).setup("fit")
    with pytest.raises(RuntimeError, match=re.escape("the train split is not open: call setup() first")):
        SegmentationData(Source(train=[(4, 4)])).train_dataloader()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": None}, "batch_size must be an integer of at least 1, got None"),
        ({"batch_size": 2.0}, "batch_size must be an integer of at least 1, got 2.0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be None or an integer of at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be None or an integer of at least 0, got -1"),
        ({"augment": [v2.RandomCrop(4)]}, "augment must be None or callable, got [RandomCrop"),
        ({"normalize": "imagenet"}, "normalize must be None or callable, got 'imagenet'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SegmentationData(Source(), **settings)


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(1, 1, 0), (2, 1, 1), (4, 1, 3), (64, 1, 8), (8, 2, 3), (8, 4, 1), (8, 8, 0)]
)
def test_workers_fit_the_cores(monkeypatch, cores, processes, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    data = SegmentationData(Source())
    assert data._workers() == workers


# With a Trainer. Warnings are errors here: a fit, a test and a prediction raise none.


@pytest.mark.parametrize("workers", [None, 0])
def test_a_fit_sees_what_a_bare_loop_sees(tmp_path, workers, monkeypatch):
    # Two cores: with more, Lightning rightly warns of `num_workers=0`.
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(2), raising=False)
    source = Source(train=[(4, 4)] * 9, val=[(4, 4)] * 3, test=[(4, 4), (6, 6), (6, 6)])
    lightning.seed_everything(3, workers=True, verbose=False)
    data, net = SegmentationData(source, batch_size=2, augment=Noisy(), num_workers=workers), Net()
    fit = trainer(tmp_path, max_epochs=3, log_every_n_steps=1)
    fit.fit(net, datamodule=data)
    assert data.train_dataloader().pin_memory is False
    lightning.seed_everything(3, verbose=False)
    expected = [pair for epoch in epochs(ready(source, augment=Noisy()), 3) for pair in epoch]
    assert same(net.seen["train"], expected)
    assert Counter(net.cases("val")) == {f"val-{i}": 3 + (i < 3) for i in range(3)}
    fit.test(net, datamodule=data, verbose=False)
    assert net.cases("test") == ["test-0", "test-1", "test-2"]
    predictions = fit.predict(net, datamodule=data)
    assert net.cases("predict") == ["test-0", "test-1", "test-2"]
    assert len(predictions) == 2


def test_overfitting_a_few_batches(tmp_path):
    source = Source(train=[(4, 4)] * 9, val=[(4, 4)] * 3)
    net = Net()
    with pytest.warns(UserWarning, match="You requested to overfit"):
        trainer(tmp_path, max_epochs=2, overfit_batches=2, log_every_n_steps=1).fit(
            net, datamodule=SegmentationData(source, batch_size=2, num_workers=0)
        )
    assert net.cases("train") == [f"train-{i}" for i in range(4)] * 2


@pytest.mark.process
@pytest.mark.parametrize("own", [True, False], ids=["lightning-may-replace", "lightning-may-not"])
def test_two_processes_see_each_case_once(tmp_path, own):
    source = SyntheticSource(size=(16, 16), cases=(9, 5, 3))
    lightning.seed_everything(0, verbose=False)
    data = SegmentationData(source, batch_size=2, num_workers=0)
    run = trainer(
        tmp_path, devices=2, strategy="ddp_fork", max_epochs=2, use_distributed_sampler=own, log_every_n_steps=1
    )
    net = Recorder(tmp_path)
    run.fit(net, datamodule=data)
    trained = [(tmp_path / f"train-{r}").read_text().split() for r in range(2)]
    assert [len(t) for t in trained] == [8, 8]
    both = [set(t[4 * e : 4 * e + 4]) for t in trained for e in range(2)]
    assert not both[0] & both[2]
    assert not both[1] & both[3]
    lightning.seed_everything(0, verbose=False)
    alone = [[set(cases) for cases, _ in epoch] for epoch in epochs(ready(source, batch_size=4), 2)]
    together = [[set(trained[0][s : s + 2] + trained[1][s : s + 2]) for s in (e, e + 2)] for e in (0, 4)]
    assert together == alone
    evaluated = [(tmp_path / f"val-{r}").read_text().split() for r in range(2)]
    # One batch of each process for the sanity check or two, then two epochs.
    assert set(evaluated[0]) | set(evaluated[1]) == {f"val-000{i}" for i in range(5)}
    assert not set(evaluated[0]) & set(evaluated[1])
    run.test(net, datamodule=data, verbose=False)
    tested = [(tmp_path / f"test-{r}").read_text().split() for r in range(2)]
    assert sorted(tested[0] + tested[1]) == ["test-0000", "test-0001", "test-0002"]


class Recorder(Net):
    """Writes the cases that each process sees to a separate file."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def _step(self, batch, stage):
        with (self.folder / f"{stage}-{self.trainer.global_rank}").open("a") as file:
            file.write(" ".join(batch.case) + "\n")
        return super()._step(batch, stage)


def test_samplers_are_left_in_place():
    data = ready(Source(train=[(4, 4)] * 4, val=[(4, 4)] * 4))
    assert isinstance(data.train_dataloader().sampler, DistributedSampler)
    assert isinstance(data.val_dataloader().sampler, DistributedSampler)


class Ramp(Cases):
    """One image whose pixels all differ."""

    def __getitem__(self, index):
        image = torch.linspace(0, 1, 32 * 32).view(1, 32, 32) ** 2
        return Sample(image, (image[0] > 0.5).byte(), f"{self.prefix}-{index}")


class RampSource(Source):
    def split(self, name):
        return Ramp(self.splits[name], name) if self.splits[name] else None


def test_a_crop_is_normalized_as_in_evaluation():
    source = RampSource(train=[(32, 32)] * 2, val=[(32, 32)])
    data = ready(source, augment=v2.RandomCrop(8), normalize=Standardize())
    whole = next(iter(data.val_dataloader())).image[0]
    values = set(whole.flatten().tolist())
    crops = next(iter(data.train_dataloader())).image
    assert crops.shape == (2, 1, 8, 8)
    assert set(crops.flatten().tolist()) <= values


def test_normalization_does_not_undo_an_augmentation_of_brightness():
    source = RampSource(train=[(32, 32)] * 2, val=[(32, 32)])
    data = ready(source, augment=lambda image, mask: (image + 0.2, mask), normalize=Standardize())
    whole = next(iter(data.val_dataloader())).image[0]
    brighter = next(iter(data.train_dataloader())).image[0]
    std = (torch.linspace(0, 1, 32 * 32) ** 2).std(correction=0)
    assert torch.allclose(brighter - whole, 0.2 / std, atol=1e-5)
