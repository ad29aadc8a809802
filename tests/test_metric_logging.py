"""What metrics get from a `SegmentationModule` and its Trainer, and what is logged of them."""

from __future__ import annotations

import inspect
import math
from functools import partial

import lightning as L
import pytest
import torch
import torchmetrics
import torchmetrics.classification
import torchmetrics.segmentation
import torchmetrics.wrappers
from helpers import run_ranks
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryJaccardIndex,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassJaccardIndex,
    MulticlassROC,
    MultilabelF1Score,
)
from torchmetrics.segmentation import DiceScore as TorchmetricsDice
from torchmetrics.segmentation import MeanIoU
from torchmetrics.wrappers import (
    BinaryTargetTransformer,
    BootStrapper,
    ClasswiseWrapper,
    LambdaInputTransformer,
    MetricTracker,
    MinMaxMetric,
    MultioutputWrapper,
    MultitaskWrapper,
    Running,
)

from lightning_dice import DiceLoss, DiceScore, SegmentationModule
from lightning_dice.callbacks import CaseTable, History, Overlays
from lightning_dice.io import read_csv

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:DiceScore metric currently defaults"),
    pytest.mark.filterwarnings("ignore:Metric .* will save all targets and predictions"),
]


class AsGiven(nn.Module):
    """A network whose logits are the first channels of the image, times a parameter of 1."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.scale = classes, nn.Parameter(torch.ones(()))

    def forward(self, image):
        return image[:, : self.classes] * self.scale


def trainer(tmp_path=None, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": 1, "default_root_dir": tmp_path}
    return L.Trainer(**{**quiet, **settings})


def batches(activation="softmax", *, classes=3, count=2, seed=0, ignored=True, size=(8, 8)):
    """Batches of two images, whose masks are uint8 with ignored pixels, as the library's data sets make them."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        image = torch.randn(2, classes, *size, generator=generator)
        if activation == "softmax":
            mask = torch.randint(0, classes, (2, *size), generator=generator, dtype=torch.uint8)
        else:
            mask = torch.randint(0, 2, image.shape, generator=generator, dtype=torch.uint8)
        if ignored:
            mask[..., -2:] = 255
        made.append({"image": image, "mask": mask, "case": [f"{index}a", f"{index}b"]})
    return DataLoader(made, batch_size=None)


def module(metrics, activation="softmax", *, classes=3, **settings):
    loss = DiceLoss(activation=activation, ignore_index=255)
    frozen = partial(torch.optim.SGD, lr=0.0)
    return SegmentationModule(AsGiven(classes), loss, metrics, optimizer=frozen, **settings)


def valid(data, activation):
    """All logits and masks that count, as probabilities `(pixels, classes)` and ids or planes."""
    probs, masks = [], []
    for batch in data:
        logits, mask = batch["image"].movedim(1, -1), batch["mask"].long()
        mask = mask if activation == "softmax" else mask.movedim(1, -1)
        kept = (mask if activation == "softmax" else mask[..., 0]) != 255
        probs.append((logits.softmax(-1) if activation == "softmax" else logits.sigmoid())[kept])
        masks.append(mask[kept])
    return torch.cat(probs), torch.cat(masks)


def validated(metrics, data=None, activation="softmax", classes=3, **settings):
    data = batches(activation, classes=classes) if data is None else data
    one = module(metrics, activation, classes=classes, **settings)
    return trainer().validate(one, data, verbose=False)[0]


# A class whose score becomes NaN, or never was a number.


def rare(epochs_with_class_2):
    """A data set for each epoch, of one image; class 2 is there in some of them only."""

    class Changing(torch.utils.data.Dataset):
        epoch = -1

        def __len__(self):
            return 1

        def __getitem__(self, index):
            self.epoch += 1
            has = self.epoch in epochs_with_class_2
            ids = torch.tensor([[0, 1], [2 if has else 0, 1]])
            return {"image": nn.functional.one_hot(ids, 3).movedim(-1, 0).float() * 9, "mask": ids}

    return DataLoader(Changing(), batch_size=1)


@pytest.mark.parametrize("stage", ["train", "val"])
def test_a_class_without_a_score_is_nan_and_not_the_former_value(tmp_path, stage):
    seen = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics.get(f"{stage}/dice/class 2", -1)))

        def on_train_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics[f"{stage}/dice/class 2"]))

    metric = DiceScore(3, activation="softmax", average="none")
    loaders = {"train": rare({0}), "val": rare({0})}
    loaders |= {} if stage == "val" else {"val": None}
    run = trainer(max_epochs=3, callbacks=[Watch(), History(tmp_path)])
    run.fit(module(metric), loaders["train"], loaders["val"])
    assert seen == pytest.approx([-1, 1, math.nan, math.nan], nan_ok=True)
    assert run.callback_metrics[f"{stage}/dice"] == 1
    assert [row.get(f"{stage}/dice/class 2", "") for row in read_csv(tmp_path / "metrics.csv")] == ["1", "", ""]


def test_a_class_without_a_score_can_be_monitored_from_the_first_epoch_on(tmp_path):
    metric = DiceScore(3, activation="softmax", average="none")
    name = "val/dice/class 2"
    best = ModelCheckpoint(tmp_path, monitor=name, mode="max", filename="best")
    stop = EarlyStopping(monitor=name, mode="max", patience=2, check_finite=False)
    run = trainer(max_epochs=9, callbacks=[best, stop], enable_checkpointing=True)
    run.fit(module(metric), rare({1}), rare({1}))
    # The score of the second epoch wins over NaN before and after it, and two epochs without a better one stop.
    assert best.best_model_score == 1
    assert torch.load(best.best_model_path, weights_only=False)["epoch"] == 1
    assert run.current_epoch == 4
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="max", patience=0)
    trainer(max_epochs=3).fit(module(metric, scheduler=plateau, monitor=name), rare({1}), rare({1}))


# Counts of an interrupted epoch.


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_an_interrupted_epoch_is_counted_once(stage):
    class Breaks(AsGiven):
        calls = 0

        def forward(self, image):
            self.calls += 1
            if self.calls == 2:
                raise OSError("the disk is gone")
            return super().forward(image)

    def run(one):
        if stage == "fit":
            loop = trainer()
            loop.fit(one, batches(count=4))
            return loop.callback_metrics["train/dice"]
        return getattr(trainer(), stage)(one, batches(count=4), verbose=False)[0][f"{stage.removesuffix('idate')}/dice"]

    broken = module(DiceScore(3, activation="softmax", pool="dataset", average="none"))
    broken.net = Breaks(3)
    with pytest.raises(OSError, match="disk"):
        run(broken)
    assert float(run(broken)) == float(run(module(DiceScore(3, activation="softmax", pool="dataset", average="none"))))


# Several loaders.


@pytest.mark.parametrize("stage", ["val", "test"])
def test_each_loader_has_its_own_metrics(tmp_path, stage):
    data = [batches(seed=1), batches(seed=2, count=3)]
    metric = DiceScore(3, activation="softmax", average="none")

    def run(loaders, **settings):
        name = "validate" if stage == "val" else stage
        results = getattr(trainer(**settings), name)(module(metric), loaders, verbose=False)
        return {key: value for result in results for key, value in result.items()}

    callbacks = [
        CaseTable(tmp_path, ["a", "b", "c"], "softmax", ignore_index=255, surfaces=False, lesions=False),
        Overlays(tmp_path, ["a", "b", "c"], "softmax", ignore_index=255, size=32),
    ]
    together, alone = run(data, callbacks=callbacks), [run([one]) for one in data]
    assert set(alone[0]) == {f"{stage}/loss", f"{stage}/dice", *(f"{stage}/dice/class {index}" for index in range(3))}
    expected = {
        f"{name}/dataloader_idx_{index}": value for index, one in enumerate(alone) for name, value in one.items()
    }
    assert together == pytest.approx(expected)
    rows = read_csv(tmp_path / "cases.csv")
    # Both have cases of the same names, with other scores.
    names = ["0a", "0a", "0b", "0b", "1a", "1a", "1b", "1b", "2a", "2b"]
    loaders = [0, 1, 0, 1, 0, 1, 0, 1, 1, 1]
    cases = [f"{name} (data loader {index})" for name, index in zip(names, loaders, strict=True)]
    assert [(row["split"], row["case"]) for row in rows] == [(stage, case) for case in cases]
    assert rows[0]["dice"] != rows[1]["dice"]


def test_several_loaders_within_a_training(tmp_path):
    run = trainer(tmp_path, max_epochs=2, num_sanity_val_steps=2)
    run.fit(module(DiceScore(3, activation="softmax")), batches(), [batches(seed=1), batches(seed=2)])
    for index in (0, 1):
        expected = validated(DiceScore(3, activation="softmax"), batches(seed=1 + index))["val/dice"]
        assert float(run.callback_metrics[f"val/dice/dataloader_idx_{index}"]) == pytest.approx(expected)
    predictions = trainer().predict(module(None, "sigmoid", classes=1), [batches(), batches()])
    assert len(predictions) == 2


def on_each_rank(folder):
    """Validate on two loaders, of whose batches the second of the first loader has a NaN; only one rank gets it."""
    data = []
    for seed in (1, 2):
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        images[3, 0, 0, 0] = math.nan if seed == 1 else 0.0
        data.append(
            DataLoader([{"image": image, "mask": image.nan_to_num().argmax(0)} for image in images], batch_size=1)
        )
    metrics = {
        "dice": DiceScore(3, activation="softmax", average="none"),
        "b": MinMaxMetric(DiceScore(3, activation="softmax")),
        "iou": ClasswiseWrapper(MeanIoU(3, per_class=True)),
    }
    loop = trainer(folder, devices=2, strategy="ddp")
    return {key: value for one in loop.validate(module(metrics), data, verbose=False) for key, value in one.items()}


@pytest.mark.process
def test_two_processes_log_the_same_of_two_loaders(tmp_path):
    first, second = run_ranks(on_each_rank, tmp_path).results
    assert first == pytest.approx(second, nan_ok=True)
    scores = {key: value for key, value in first.items() if not key.startswith("val/loss")}
    broken = {key for key, value in scores.items() if math.isnan(value)}
    assert {"val/dice/dataloader_idx_0", "val/b/raw/dataloader_idx_0", "val/dice/class 2/dataloader_idx_0"} <= broken
    others = {key: value for key, value in scores.items() if key.endswith("dataloader_idx_1")}
    assert len(others) == 10
    assert set(others.values()) == {1.0}


# What the metrics of torchmetrics get.


@pytest.mark.parametrize("seed", range(2))
def test_metrics_of_classification_get_probabilities_and_the_masks_they_take(seed):
    metrics = {
        "jaccard": MulticlassJaccardIndex(3, average="none"),
        "auroc": MulticlassAUROC(3, thresholds=20),
    }
    data = batches(seed=seed)
    found = validated(metrics, data)
    probs, ids = valid(data, "softmax")
    each = MulticlassJaccardIndex(3, average="none")(probs, ids)
    assert found["val/jaccard"] == pytest.approx(float(each.mean()))
    assert [found[f"val/jaccard/class {index}"] for index in range(3)] == pytest.approx(each.tolist())
    assert found["val/auroc"] == pytest.approx(float(MulticlassAUROC(3, thresholds=20)(probs, ids)))


def test_logits_between_0_and_1_are_not_taken_for_probabilities():
    image = torch.tensor([[[[0.2, 0.4, -0.4, -0.2]]]])
    mask = torch.tensor([[[[1, 1, 0, 0]]]], dtype=torch.uint8)
    low = image.clamp(min=0.1)
    for logits, expected in ((image, 1.0), (low, 2 / 3)):
        data = DataLoader([{"image": logits, "mask": mask}], batch_size=None)
        found = validated({"f1": BinaryF1Score(), "ours": DiceScore()}, data, "sigmoid", classes=1)
        assert found["val/f1"] == pytest.approx(expected)
        assert found["val/ours"] == pytest.approx(expected)


def test_binary_and_multilabel_metrics_get_planes():
    data = batches("sigmoid", classes=2)
    metrics = {"f1": MultilabelF1Score(2), "iou": BinaryJaccardIndex()}
    found = validated(metrics, data, "sigmoid", classes=2)
    probs, planes = valid(data, "sigmoid")
    assert found["val/f1"] == pytest.approx(float(MultilabelF1Score(2)(probs, planes)))
    assert found["val/iou"] == pytest.approx(float(BinaryJaccardIndex()(probs, planes)))


def test_a_binary_metric_of_two_exclusive_classes_and_the_reverse():
    data = batches(classes=2)
    probs, ids = valid(data, "softmax")
    assert validated({"iou": BinaryJaccardIndex()}, data, classes=2)["val/iou"] == pytest.approx(
        float(BinaryJaccardIndex()(probs[:, 1], ids))
    )
    data = batches("sigmoid", classes=1)
    probs, planes = valid(data, "sigmoid")
    found = validated({"iou": MulticlassJaccardIndex(2, average="none")}, data, "sigmoid", classes=1)
    each = MulticlassJaccardIndex(2, average="none")(torch.cat([1 - probs, probs], 1), planes[:, 0])
    assert [found["val/iou/background"], found["val/iou/class 0"]] == pytest.approx(each.tolist())


@pytest.mark.parametrize("form", ["one-hot", "index", "mixed"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_metrics_of_segmentation_get_labels_without_the_ignored_pixels(activation, form):
    data = batches(activation)
    metrics = {
        "dice": TorchmetricsDice(3, average="none", input_format=form),
        "foreground": TorchmetricsDice(3, include_background=False, average="none", input_format=form),
        "iou": MeanIoU(3, per_class=True, input_format=form),
    }
    found = validated(metrics | {"ours": DiceScore(3, activation=activation, average="none")}, data, activation)
    kept = DataLoader(
        [{**one, **{key: one[key][..., :-2] for key in ("image", "mask")}} for one in data], batch_size=None
    )
    iou = MeanIoU(3, per_class=True)
    for batch in kept:
        logits, mask = batch["image"], batch["mask"].long()
        if activation == "softmax":
            planes = [nn.functional.one_hot(ids, 3).movedim(-1, 1) for ids in (logits.argmax(1), mask)]
        else:
            planes = [(logits > 0).long(), mask]
        iou.update(*planes)
    for name, score in (("dice", "ours"), ("foreground", "ours")):
        classes = range(3) if name == "dice" else range(1, 3)
        for index in classes:
            assert found[f"val/{name}/class {index}"] == pytest.approx(found[f"val/{score}/class {index}"])
    assert "val/foreground/class 0" not in found
    assert [found[f"val/iou/class {index}"] for index in range(3)] == pytest.approx(iou.compute().tolist())


def test_a_class_that_mean_iou_has_not_seen_is_no_score_of_minus_1():
    ids = torch.tensor([[[0, 1]]])
    data = DataLoader([{"image": nn.functional.one_hot(ids, 3).movedim(-1, 1) * 9.0, "mask": ids}], batch_size=None)
    found = validated({"iou": MeanIoU(3, per_class=True)}, data)
    assert found["val/iou"] == 1
    assert math.isnan(found["val/iou/class 2"])


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_our_score_ignores_what_the_loss_ignores(activation):
    data = batches(activation)
    given = DiceScore(3, activation=activation, ignore_index=255)
    assert validated(DiceScore(3, activation=activation), data, activation) == validated(given, data, activation)


def test_soft_labels_are_made_hard_in_every_stage():
    soft = torch.tensor([[[[0.7, 0.3, 1.0, 0.0]]]])
    data = DataLoader([{"image": torch.tensor([[[[1.0, 1.0, 1.0, -1.0]]]]), "mask": soft}], batch_size=None)
    metrics = {"ours": DiceScore(), "iou": BinaryJaccardIndex()}
    for stage in ("validate", "test"):
        one = module(metrics, "sigmoid", classes=1)
        found = getattr(trainer(), stage)(one, data, verbose=False)[0]
        name = stage.removesuffix("idate")
        assert found[f"{name}/ours"] == pytest.approx(2 * 2 / (3 + 2))
        assert found[f"{name}/iou"] == pytest.approx(2 / 3)


# Wrappers.


def iou(data):
    probs, ids = valid(data, "softmax")
    return float(MulticlassJaccardIndex(3)(probs, ids))


def test_min_and_max_of_validations():
    data = [batches(seed=1), batches(seed=2)]
    one, loop = module({"b": MinMaxMetric(MulticlassJaccardIndex(3))}), trainer()
    values = [iou(part) for part in data]
    for part, value, known in ((data[0], values[0], values[:1]), (data[1], values[1], values)):
        found = loop.validate(one, part, verbose=False)[0]
        assert [found[f"val/b/{key}"] for key in ("raw", "min", "max")] == pytest.approx(
            [value, min(known), max(known)]
        )


def test_the_check_before_a_training_is_no_minimum_of_it(tmp_path):
    one = module({"b": MinMaxMetric(DiceScore(3, activation="softmax"))})
    run = trainer(tmp_path, num_sanity_val_steps=1)
    first, rest = batches(seed=1, count=1), batches(seed=1, count=3)
    run.fit(one, first, rest)
    logged = run.callback_metrics
    assert logged["val/b/min"] == logged["val/b/raw"] == logged["val/b/max"]
    assert run.callback_metrics["train/b/max"] == run.callback_metrics["train/b/raw"]


def test_other_wrappers_log_and_reset():
    data = batches(count=3)
    metrics = {
        "boot": BootStrapper(MulticlassJaccardIndex(3), num_bootstraps=4, sampling_strategy="multinomial"),
        "class": ClasswiseWrapper(MulticlassJaccardIndex(3, average="none"), labels=["a", "b", "c"], prefix="iou_"),
        "running": Running(MulticlassJaccardIndex(3), window=2),
        "last": Running(DiceScore(3, activation="softmax", pool="dataset"), window=1),
        "each": MultioutputWrapper(BinaryJaccardIndex(), 3, output_dim=1),
        "target": BinaryTargetTransformer(MulticlassJaccardIndex(3, ignore_index=255), threshold=300),
        "own": LambdaInputTransformer(MulticlassJaccardIndex(3), lambda x: x.argmax(1), lambda y: y.clamp(max=2)),
    }
    one, loop = module(metrics), trainer()
    # The second time, all have begun again.
    torch.manual_seed(0)
    first = loop.validate(one, data, verbose=False)[0]
    torch.manual_seed(0)
    assert loop.validate(one, data, verbose=False)[0] == first
    probs, ids = valid(data, "softmax")
    each = MulticlassJaccardIndex(3, average="none")(probs, ids).tolist()
    assert [first[f"val/class/iou_{name}"] for name in "abc"] == pytest.approx(each)
    last = list(data)
    assert first["val/running"] == pytest.approx(iou(DataLoader(last[1:], batch_size=None)))
    expected = validated(DiceScore(3, activation="softmax", pool="dataset"), DataLoader(last[2:], batch_size=None))
    assert first["val/last"] == pytest.approx(expected["val/dice"])
    assert first["val/boot/mean"] == pytest.approx(iou(data), abs=0.05)
    assert first["val/boot/std"] > 0
    planes = nn.functional.one_hot(ids, 3)
    outputs = [float(BinaryJaccardIndex()(probs[:, index], planes[:, index])) for index in range(3)]
    assert [first[f"val/each/class {index}"] for index in range(3)] == pytest.approx(outputs)
    whole = [torch.cat([batch[key] for batch in data]) for key in ("image", "mask")]
    own = MulticlassJaccardIndex(3)(whole[0].argmax(1), whole[1].long().clamp(max=2))
    assert first["val/own"] == pytest.approx(float(own))


def test_a_wrapper_within_a_training_is_logged():
    run = trainer(max_epochs=2)
    run.fit(
        module({"b": MinMaxMetric(MulticlassJaccardIndex(3)), "r": Running(DiceScore(3, activation="softmax"))}),
        batches(),
    )
    assert {"train/b/raw", "train/b/min", "train/b/max", "train/r"} <= set(run.callback_metrics)
    assert float(run.callback_metrics["train/b/raw"]) == pytest.approx(iou(batches()))


# Names and values.


class Value(Metric):
    """A metric with a value of any kind."""

    def __init__(self, value, **_):
        super().__init__()
        self.value = value
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds, target):
        self.count += 1

    def compute(self):
        return self.value


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_numbers_of_any_kind_are_logged():
    metrics = {"number": Value(0.5), "whole": Value(torch.tensor(3)), "one": Value(torch.tensor([0.25]))}
    found = validated(metrics | {"nested": Value({"a": {"b": 1.0}}), "all": Value(torch.tensor([1.0, 2, 6]))})
    expected = {"number": 0.5, "whole": 3, "one": 0.25, "nested/a/b": 1, "all": 3}
    assert {name: found[f"val/{name}"] for name in expected} == expected
    assert found["val/all/class 2"] == 6


def test_a_list_of_metrics_has_the_names_of_their_classes():
    found = validated([DiceScore(3, activation="softmax"), MulticlassJaccardIndex(3)])
    assert {"val/DiceScore", "val/MulticlassJaccardIndex"} <= set(found)
    nested = {"group": MetricCollection([MulticlassJaccardIndex(3)]), "other": DiceScore(3, activation="softmax")}
    assert {"val/group_MulticlassJaccardIndex", "val/other"} <= set(validated(nested))
    assert "val/dice_x" in validated(MetricCollection({"dice": DiceScore(3, activation="softmax")}, postfix="_x"))


def test_metrics_in_a_collection_of_the_module_share_no_state():
    metrics = MetricCollection({"low": DiceScore(threshold=0.3), "high": DiceScore(threshold=0.5)})
    images = [torch.tensor([[[[9.0, -9.0]]]]), torch.tensor([[[[-0.5, -0.5]]]])]
    data = DataLoader([{"image": one, "mask": torch.tensor([[[[1, 0]]]])} for one in images], batch_size=None)
    found = validated(metrics, data, "sigmoid", classes=1)
    assert [found["val/low"], found["val/high"]] == pytest.approx([(1 + 2 / 3) / 2, 0.5])


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": DiceScore()}, "a metric must not be named 'loss'"),
        ("dice", "metrics must be a metric, a list of metrics or metrics by name, got 'dice'"),
        (0.5, "metrics must be a metric, .* got 0.5"),
        ({"x": 0.5}, "metrics must be metrics of torchmetrics, got 0.5"),
        ([DiceScore(), "dice"], "metrics must be metrics of torchmetrics, got 'dice'"),
        ({"x": MetricTracker(DiceScore())}, "metrics must be metrics of torchmetrics, got a MetricTracker"),
        ([DiceScore(), DiceScore()], "two metrics both named DiceScore; give each a name"),
        ({"x": MultitaskWrapper({"a": DiceScore()})}, "metric 'x', a MultitaskWrapper: it takes several predictions"),
        ({"x": MultioutputWrapper(DiceScore(), 3)}, "metric 'x', a MultioutputWrapper: .* output_dim=1"),
        ({"x": MulticlassJaccardIndex(3), "y": BootStrapper(MultitaskWrapper({"a": DiceScore()}))}, "metric 'y'"),
        (
            {"x": torchmetrics.classification.BinaryAccuracy(multidim_average="samplewise")},
            "metric 'x', a BinaryAccuracy: it has a value for each image",
        ),
        ({"x": torchmetrics.classification.BinaryFairness(2)}, "it takes the group of each pixel"),
        (
            {"x": LambdaInputTransformer(MetricCollection([DiceScore(), BinaryF1Score()]))},
            "the metrics in it take different forms",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_metrics_that_are_refused_at_once(metrics, message):
    with pytest.raises(ValueError, match=message):
        module(metrics)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (MulticlassROC(3), "its value is a tuple, and only numbers can be logged"),
        (MulticlassConfusionMatrix(3), r"the shape \(3, 3\), and only a number, or one for each of the 3 classes"),
        (Value("text"), "its value is a str"),
        (Value(torch.zeros(5)), r"the shape \(5,\)"),
        (BootStrapper(DiceScore(3, activation="softmax"), raw=True), r"the shape \(10,\)"),
        (MulticlassJaccardIndex(4), "it is for 4 classes, the logits have 3"),
        (MinMaxMetric(MulticlassJaccardIndex(4)), "it is for 4 classes, the logits have 3"),
        (TorchmetricsDice(4), "it is for 4 classes, the logits have 3"),
        (MultilabelF1Score(3), "it is for classes that may overlap"),
        (BinaryF1Score(), "it is for one class, the logits have 3"),
        (MinMaxMetric(MulticlassJaccardIndex(3, average="none")), "should be a float or scalar tensor"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_metrics_that_are_refused_before_the_first_step(metric, message):
    one = module({"x": metric}, class_names=["a", "b", "c"])
    run = trainer()
    with pytest.raises(ValueError, match=f"metric 'x', a {type(metric).__name__}: .*{message}"):
        run.fit(one, batches())
    assert run.global_step == 0


def test_multiclass_metrics_of_overlapping_classes_are_refused():
    with pytest.raises(ValueError, match="it is for classes that exclude each other"):
        validated(MulticlassJaccardIndex(3), activation="sigmoid")


# Every metric of torchmetrics that takes a segmentation.


def segmentation_metrics():
    """Classes of torchmetrics, by name, with the arguments of each that a segmentation of 3 classes needs."""
    found = {}
    for room in (torchmetrics.classification, torchmetrics.segmentation, torchmetrics.wrappers):
        for name in room.__all__:
            kind = getattr(room, name)
            if not inspect.isclass(kind) or name in ("FeatureShare", "MetricInputTransformer"):
                continue  # A collection for networks that score images, and a base class.
            parameters = {**inspect.signature(kind.__init__).parameters, **inspect.signature(kind.__new__).parameters}
            values = {
                "num_classes": 3,
                "num_labels": 3,
                "num_outputs": 3,
                "num_groups": 2,
                "window": 2,
                "output_dim": 1,
            }
            values |= {"min_recall": 0.5, "min_precision": 0.5, "min_sensitivity": 0.5, "min_specificity": 0.5}
            values |= {"task": "multiclass", "fpr_range": (0.1, 0.9), "beta": 1.0, "thresholds": 10}
            base = DiceScore(3, activation="softmax")
            values |= {"base_metric": base, "metric": DiceScore(3, activation="softmax", average="none")}
            values |= {"task_metrics": {"a": base}, "wrapped_metric": base, "sampling_strategy": "multinomial"}
            values |= {"task": "all"} if name == "BinaryFairness" else {}
            values |= {"base_metric": BinaryF1Score()} if name == "MultioutputWrapper" else {}
            arguments = {key: value for key, value in values.items() if key in parameters}
            found[name] = (room.__name__, partial(kind, **arguments))
    return found


KINDS = segmentation_metrics()


def outcome(name):
    """Whether a metric is logged, refused when the module is made, or refused in the first batch."""
    if name in ("MetricTracker", "MultitaskWrapper", "BinaryFairness", "BinaryGroupStatRates"):
        return "constructor"
    if name.endswith("AUROC"):
        return "logged"
    curves = ("ROC", "PrecisionRecallCurve")
    pairs = ("RecallAtFixed", "PrecisionAtFixed", "SensitivityAt", "SpecificityAt", "LogAUC_")
    tables = ("ConfusionMatrix", "StatScores")
    if name.endswith((*curves, *tables)) or any(part in name for part in pairs):
        return "batch"
    return "logged"


def activation_of(name):
    return "sigmoid" if name.startswith(("Binary", "Multilabel")) and "Transformer" not in name else "softmax"


def test_the_list_of_metrics_is_that_of_torchmetrics():
    assert {"DiceScore", "MeanIoU", "HausdorffDistance", "MulticlassAUROC", "MultilabelF1Score", "BinaryROC"} <= set(
        KINDS
    )
    assert {"BootStrapper", "MinMaxMetric", "Running", "ClasswiseWrapper"} <= set(KINDS)
    assert len(KINDS) > 100


@pytest.mark.filterwarnings("ignore")  # Of torchmetrics, about classes without a pixel and memory.
@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_metric_of_torchmetrics_logs_and_resets_or_is_refused(name):
    room, make = KINDS[name]
    activation = activation_of(name)
    metric = make()
    expected = outcome(name)
    if expected == "constructor":
        with pytest.raises(ValueError, match=r"metric|it takes"):
            module({"x": metric}, activation)
        return
    one = module({"x": metric}, activation)
    data = batches(activation)
    if expected == "batch":
        run = trainer()
        with pytest.raises(ValueError, match=f"metric 'x', a {type(metric).__name__}: its value"):
            run.fit(one, data)
        assert run.global_step == 0
        return
    run = trainer(max_epochs=1)
    run.fit(one, data, data)
    logged = {key: float(value) for key, value in run.callback_metrics.items()}
    for stage in ("train", "val"):
        values = [value for key, value in logged.items() if key.startswith((f"{stage}/x/", f"{stage}/x"))]
        assert values
        assert all(math.isfinite(value) for value in values)
    # An epoch with other images has its own values: nothing of the first is left.
    other = batches(activation, seed=7)
    torch.manual_seed(0)
    again = trainer().validate(one, other, verbose=False)[0]
    torch.manual_seed(0)
    fresh = trainer().validate(module({"x": make()}, activation), other, verbose=False)[0]
    assert {key: value for key, value in again.items() if not key.endswith(("min", "max"))} == {
        key: value for key, value in fresh.items() if not key.endswith(("min", "max"))
    }
    if room == "torchmetrics.classification":
        # What the metric gives for the pixels that count alone, converted as its own documentation asks.
        probs, masks = valid(other, activation)
        direct = make()
        if name.startswith("Binary"):
            probs, masks = probs.flatten(), masks.flatten()
        if "ExactMatch" not in name:
            value = torch.as_tensor(direct(probs, masks)).float()
            assert again["val/x"] == pytest.approx(float(value.nanmean()), abs=1e-5)
