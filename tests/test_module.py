from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from lightning_dice import DiceLoss, DiceScore, SegmentationModule
from lightning_dice.data import Batch, SegmentationData, SyntheticSource
from lightning_dice.losses import BoundaryLoss, CompoundLoss, DeepSupervision, DiceCELoss, FocalLoss, SegmentationLoss
from lightning_dice.losses.batch_loss import deep_supervision_loss

# Some tests train without validation.
pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")


def loader(count=8, *, classes=1, size=(16, 16), form=tuple, batch_size=4):
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(count):
        image = torch.randn(1, *size, generator=generator)
        mask = (image > 1).long() if classes == 1 else (image[0] > 1).long() + (image[0] > 2).long()
        samples.append((image, mask, f"case-{index}"))

    def collate(items):
        images, masks, cases = zip(*items, strict=True)
        fields = {"image": torch.stack(images), "mask": torch.stack(masks), "case": list(cases)}
        return fields if form is dict else form(fields.values()) if form in (tuple, list) else form(**fields)

    return DataLoader(samples, batch_size=batch_size, collate_fn=collate)


def trainer(**settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, "num_sanity_val_steps": 0, **settings})


@pytest.mark.parametrize("form", [tuple, list, dict, Batch], ids=lambda f: f.__name__)
def test_training_improves_the_score(form):
    torch.manual_seed(0)
    module = SegmentationModule(nn.Conv2d(1, 1, 1), optimizer=partial(torch.optim.Adam, lr=0.3))
    batches = loader(form=form)
    before = trainer().validate(module, batches, verbose=False)[0]
    trainer(max_epochs=20).fit(module, batches)
    after = trainer().validate(module, batches, verbose=False)[0]
    assert after["val/loss"] < before["val/loss"] / 2
    assert after["val/dice"] > 0.9 > before["val/dice"]


def multiclass(**settings):
    return SegmentationModule(
        nn.Conv2d(1, 3, 1),
        DiceLoss(activation="softmax"),
        DiceScore(3, activation="softmax", exclude_classes=[0], average="none"),
        class_names=["background", "bright", "brightest"],
        **settings,
    )


def test_logs_losses_and_the_score_of_every_class():
    module = multiclass()
    run = trainer(max_epochs=1)
    run.fit(module, loader(classes=3), loader(classes=3))
    names = {"train/loss", "train/dice", "train/dice/bright", "train/dice/brightest"}
    names |= {"val/loss", "val/dice", "val/dice/bright", "val/dice/brightest"}
    assert names <= set(run.callback_metrics)
    assert "val/dice/background" not in run.callback_metrics
    assert "loss" in run.progress_bar_metrics
    assert "val/dice" in run.progress_bar_metrics
    values = run.callback_metrics
    mean = (values["val/dice/bright"] + values["val/dice/brightest"]) / 2
    torch.testing.assert_close(values["val/dice"], mean)


def test_the_logged_score_is_over_the_epoch_and_the_loss_over_its_images():
    module = multiclass()
    batches = loader(7, classes=3, batch_size=3)
    logged = trainer().test(module, batches, verbose=False)[0]
    score = DiceScore(3, activation="softmax", exclude_classes=[0])
    losses = []
    for image, mask, _ in loader(7, classes=3, batch_size=1):
        logits = module(image)
        score.update(logits, mask)
        # Each image by itself, although the loss has one ratio for all of a batch.
        losses.append(float(module.loss(logits, mask).detach()))
    assert logged["test/dice"] == pytest.approx(float(score.compute()))
    assert logged["test/loss"] == pytest.approx(sum(losses) / 7)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_the_evaluated_loss_does_not_depend_on_the_batches(batch_size):
    torch.manual_seed(0)
    terms = {
        "dice": DiceLoss(activation="softmax", exclude_classes=[0]),
        "boundary": BoundaryLoss(activation="softmax", classes=3),
    }
    module = SegmentationModule(
        nn.Conv2d(1, 3, 1), CompoundLoss(terms, {"boundary": 0.1}), DiceScore(3, activation="softmax")
    )
    whole = loader(7, classes=3, batch_size=7)
    image, mask, _ = next(iter(whole))
    weight = torch.rand(7, 16, 16, generator=torch.Generator().manual_seed(1))
    annotated = torch.ones(7, 3, dtype=torch.bool)
    annotated[2, 1] = False
    maps = {"signed_distance": torch.stack([module.loss.maps["signed_distance"](one) for one in mask]) * 2}
    given = {"image": image, "mask": mask, "weight": weight, "annotated": annotated, **maps}
    batches = [
        {name: values.split(batch_size)[index] for name, values in given.items()}
        for index in range(-(-7 // batch_size))
    ]
    batches = [{**batch, "maps": {"signed_distance": batch.pop("signed_distance")}} for batch in batches]
    logged = trainer().validate(module, DataLoader(batches, batch_size=None), verbose=False)[0]
    logits = module(image).detach()
    expected = {"val/loss": [], "val/loss/dice": [], "val/loss/boundary": []}
    for one in range(7):
        some = slice(one, one + 1)
        own = {"maps": {"signed_distance": maps["signed_distance"][some]}, "annotated": annotated[some]}
        expected["val/loss"].append(float(module.loss(logits[some], mask[some], weight[some], **own)))
        for name, value in module.loss.values.items():
            expected[f"val/loss/{name}"].append(float(value))
    for name, values in expected.items():
        assert logged[name] == pytest.approx(sum(values) / 7, rel=1e-5), name


class NeedsAnImage(nn.Conv2d):
    def forward(self, image):
        assert len(image), "no image"
        return super().forward(image)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_batch_of_no_image_counts_nothing(stage):
    torch.manual_seed(0)
    loss = CompoundLoss({"dice": DiceLoss(ignore_index=255), "focal": FocalLoss(ignore_index=255)})
    module = SegmentationModule(NeedsAnImage(1, 1, 1), loss)
    full = [Batch(*batch) for batch in loader(5, batch_size=3)]
    nothing = Batch(full[0].image[:0], full[0].mask[:0], [])

    def result(batches):
        batches = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
        if stage == "predict":
            return trainer().predict(module, batches)
        return getattr(trainer(), stage)(module, batches, verbose=False)[0]

    # The first batch may be the one without an image: what is logged then has the same names.
    found, expected = result([nothing, *full, nothing]), result(full)
    if stage == "predict":
        assert torch.equal(torch.cat(found), torch.cat(expected))
        assert len(found[0]) == 0
    else:
        assert found == expected
        assert len(found) == 4


@pytest.mark.parametrize("soft", [False, True])
def test_a_validation_step_of_no_image_returns_no_logits(soft):
    loss = DiceCELoss(activation="softmax")
    module = silent(SegmentationModule(NeedsAnImage(1, 3, 1), loss, CountOf(3)))
    logged = {}
    module.log_dict = lambda values, **options: logged.update(values, weight=options["batch_size"])
    mask = torch.zeros(0, 3, 5, 4) if soft else torch.zeros(0, 5, 4, dtype=torch.uint8)
    module.eval()
    returned = module.validation_step((torch.zeros(0, 1, 5, 4), mask), 0)
    assert returned["logits"].shape == (0, 3, 5, 4)
    assert returned["loss"] == 0
    # What the processes with images log too, so that all of them meet.
    assert logged == {"val/loss": 0, "val/loss/dice": 0, "val/loss/ce": 0, "weight": 0}


class CountOf(DiceScore):
    """Takes any target."""

    def update(self, preds, target):
        assert len(preds) == len(target)


def test_other_metrics_and_losses():
    module = SegmentationModule(
        nn.Conv2d(1, 3, 1),
        nn.CrossEntropyLoss(),
        MetricCollection({"dice": DiceScore(3, activation="softmax"), "loss_free": DiceScore(3, activation="softmax")}),
        activation="softmax",
    )
    logged = trainer().test(module, loader(classes=3), verbose=False)[0]
    assert set(logged) == {"test/loss", "test/dice", "test/loss_free"}


def test_channels_last_changes_the_layout_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    image = torch.randn(2, 2, 9, 7)
    expected = SegmentationModule(net)(image)
    module = SegmentationModule(net, channels_last=True)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(module(image), expected)
    volume = SegmentationModule(nn.Conv3d(1, 1, 1), channels_last=True)
    assert volume(torch.zeros(1, 1, 3, 4, 5)).shape == (1, 1, 3, 4, 5)


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (5, 33)])
def test_padding_meets_the_stride_and_is_not_seen(size):
    seen = []

    class Strided(nn.Module):
        def forward(self, image):
            seen.append(tuple(image.shape[2:]))
            return image

    module = SegmentationModule(Strided(), size_divisor=16)
    image = torch.randn(2, 1, *size)
    torch.testing.assert_close(module(image), image, rtol=0, atol=0)
    assert all(length % 16 == 0 for length in seen[0])


class Net(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.conv, self.form = nn.Conv2d(1, 1, 3, stride=2, padding=1), form

    def forward(self, image):
        half = self.conv(image)
        return {
            "tensor": half,
            "out": {"out": half, "aux": half},
            "logits": SimpleNamespace(logits=half),
            "list": [half, half[..., ::2, ::2], half[..., ::4, ::4]],
        }[self.form]


@pytest.mark.parametrize("form", ["tensor", "out", "logits", "list"])
def test_outputs_of_any_form_and_size(form):
    module = SegmentationModule(Net(form))
    image, mask, _ = next(iter(loader()))
    assert module(image).shape == mask.shape
    module.trainer = trainer(fast_dev_run=True)
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    module.training_step((image, mask), 0).backward()
    assert module.net.conv.weight.grad.abs().sum() > 0


def test_deep_supervision_adds_the_levels_in_training_alone():
    module = SegmentationModule(Net("list"))
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    image, mask, _ = next(iter(loader()))
    levels = module.levels(image)
    assert [level.shape[-1] for level in levels] == [16, 4, 2]
    losses = [module.loss(levels[0], mask).item()]
    for level in levels[1:]:
        shares = nn.functional.adaptive_avg_pool2d(mask.float(), level.shape[2:])
        losses.append(module.loss(level, shares).item())
    expected = (losses[0] + losses[1] / 2 + losses[2] / 4) / 1.75
    assert module.training_step((image, mask), 0).item() == pytest.approx(expected, rel=1e-6)
    each = [module.loss(levels[0][[one]], mask[[one]]).item() for one in range(len(mask))]
    assert module.validation_step((image, mask), 0)["loss"].item() == pytest.approx(sum(each) / len(each), rel=1e-6)


def silent(module):
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    return module


def test_deep_supervision_of_a_padded_image():
    module = silent(SegmentationModule(Net("list"), DiceLoss(ignore_index=255), size_divisor=8))
    image = torch.randn(2, 1, 13, 16, generator=torch.Generator().manual_seed(0))
    mask = (image > 1).long()
    levels = module.levels(image)
    assert levels[0].shape[2:] == (16, 16)
    assert module(image).shape == mask.shape
    padded = nn.functional.pad(mask, (0, 0, 0, 3), value=255)
    expected = DeepSupervision(module.loss)(levels, padded)
    torch.testing.assert_close(module.training_step((image, mask), 0), expected)


def test_deep_supervision_with_settings_of_its_own():
    module = silent(SegmentationModule(Net("list"), DeepSupervision(DiceLoss(), weights=[1, 0, 0])))
    image, mask, _ = next(iter(loader()))
    alone = DiceLoss()(module(image), mask)
    torch.testing.assert_close(module.training_step((image, mask), 0), alone)
    logits = module(image)
    each = torch.stack([DiceLoss()(logits[[one]], mask[[one]]) for one in range(len(mask))])
    torch.testing.assert_close(module.validation_step((image, mask), 0)["loss"], each.mean())
    assert module.predict_step(image).shape == mask.shape


class WithAuxiliaryHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 2, stride=2)

    def forward(self, image):
        return {"out": self.main(image), "aux": self.head(image)}


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("loss", [DiceLoss(), DeepSupervision(DiceLoss()), nn.BCEWithLogitsLoss()])
def test_auxiliary_heads_are_trained(loss, micro_batch_size):
    net = WithAuxiliaryHead()
    module = SegmentationModule(net, loss, auxiliary_weight=0.3, size_divisor=16, micro_batch_size=micro_batch_size)
    logged = {}
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    module.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign]
    image = torch.randn(3, 1, 14, 20, generator=torch.Generator().manual_seed(0))
    mask = (image > 0.5).long()
    total = module.training_step((image, mask), 0)
    total.backward()
    assert net.head.weight.grad.abs().sum() > 0
    padded = nn.functional.pad(image, (0, 12, 0, 2), mode="replicate")
    fine = nn.functional.interpolate(net.head(padded), scale_factor=2, mode="bilinear")[..., :14, :20]
    target = mask.float()
    main, auxiliary = loss(net.main(padded)[..., :14, :20], target), loss(fine, target)
    torch.testing.assert_close(total, main + 0.3 * auxiliary)
    torch.testing.assert_close(logged["train/loss/auxiliary"], auxiliary)
    each = [loss(module(image[[one]]), target[[one]]) for one in range(3)]
    torch.testing.assert_close(module.validation_step((image, mask), 0)["loss"], torch.stack(each).mean())


def test_auxiliary_heads_may_be_left_out():
    net = WithAuxiliaryHead()
    module = silent(SegmentationModule(net, auxiliary_weight=0))
    image, mask, _ = next(iter(loader()))
    torch.testing.assert_close(module.training_step((image, mask), 0), DiceLoss()(net.main(image), mask))


def test_an_output_of_another_form():
    class Own(SegmentationModule):
        def read_output(self, output, space):
            return super().read_output(output[0], space)

    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    net.register_forward_hook(lambda _, __, output: (output, {"features": None}))
    assert Own(net)(torch.zeros(1, 1, 4, 4)).shape == (1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"override SegmentationModule\.read_output"):
        SegmentationModule(net)(torch.zeros(1, 1, 4, 4))


class Recorder(SegmentationLoss):
    maps = {"double": lambda target: target * 2}  # noqa: RUF012

    def forward(self, logits, target, weight=None, *, annotated=None, maps=None):
        self.given = {"weight": weight, "annotated": annotated, "double": self.get_map("double", target, maps)}
        return logits.sum() * 0


def test_the_loss_gets_what_the_batch_has():
    module = silent(SegmentationModule(nn.Conv2d(1, 1, 1), Recorder()))
    image, mask, _ = next(iter(loader()))
    batch = {"image": image, "mask": mask, "weight": image.abs(), "annotated": torch.ones(4, 1, dtype=torch.bool)}
    module.training_step({**batch, "maps": {"double": mask * 3}}, 0)
    assert torch.equal(module.loss.given["weight"], image.abs())
    assert module.loss.given["annotated"].all()
    assert torch.equal(module.loss.given["double"], mask * 3)
    module.training_step((image, mask), 0)
    assert torch.equal(module.loss.given["double"], mask * 2)
    with pytest.raises(ValueError, match="a BCEWithLogitsLoss does not take"):
        silent(SegmentationModule(nn.Conv2d(1, 1, 1), nn.BCEWithLogitsLoss())).training_step(batch, 0)


def test_the_data_module_computes_what_the_loss_needs():
    source = SyntheticSource(size=(32, 32), cases=(4, 2, 0))
    data = SegmentationData(source, batch_size=2, num_workers=0, ignore_index=255, maps={"mine": lambda mask: mask + 1})
    module = SegmentationModule(nn.Conv2d(1, 1, 1), BoundaryLoss(ignore_index=255))
    trainer(max_epochs=1).fit(module, data)
    batch = next(iter(data.train_dataloader()))
    assert set(batch.maps) == {"mine", "signed_distance"}
    expected = torch.stack([module.loss.maps["signed_distance"](one) for one in batch.mask])
    torch.testing.assert_close(batch.maps["signed_distance"], expected)


def test_a_data_module_of_ones_own_keeps_its_maps():
    class Cities(L.LightningDataModule):
        maps = ("city", "rural")

        def train_dataloader(self):
            return loader()

    data = Cities()
    trainer(max_epochs=1).fit(SegmentationModule(nn.Conv2d(1, 1, 1), BoundaryLoss()), data)
    assert data.maps == ("city", "rural")


@pytest.mark.parametrize(("size_divisor", "size"), [(1, 16), (8, 13)])
def test_torch_losses_take_masks_as_they_are_stored(size_divisor, size):
    image = torch.randn(2, 1, size, 16, generator=torch.Generator().manual_seed(0))
    mask = (image > 1).to(torch.uint8)
    module = silent(
        SegmentationModule(Net("list"), nn.BCEWithLogitsLoss(), activation="sigmoid", size_divisor=size_divisor)
    )
    module.training_step((image, mask), 0).backward()
    loss = module.validation_step((image, mask), 0)["loss"]
    torch.testing.assert_close(loss, nn.BCEWithLogitsLoss()(module(image), mask.float()))


def test_soft_labels_are_not_padded_with_an_ignored_label():
    net = nn.Conv2d(1, 2, 3, padding=1)

    class Levels(nn.Module):
        def forward(self, image):
            logits = net(image)
            return [logits, nn.functional.avg_pool2d(logits, 2)]

    image = torch.randn(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    soft = torch.full((1, 2, 12, 12), 0.5)
    module = silent(
        SegmentationModule(Levels(), nn.CrossEntropyLoss(), DiceScore(2), activation="softmax", size_divisor=8)
    )
    assert deep_supervision_loss(module.loss, module.levels(image), Batch(image, soft)) > 0.5


def test_every_term_of_a_loss_is_logged():
    loss = CompoundLoss({"dice": DiceLoss(), "focal": FocalLoss()}, {"focal": 2.0})
    module = SegmentationModule(nn.Conv2d(1, 1, 1), loss)
    run = trainer(max_epochs=1)
    run.fit(module, loader(), loader())
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    for stage in ("train", "val"):
        total = logged[f"{stage}/loss/dice"] + 2 * logged[f"{stage}/loss/focal"]
        assert logged[f"{stage}/loss"] == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(("activation", "shape"), [("softmax", (2, 8, 8)), ("sigmoid", (2, 3, 8, 8))])
def test_predicts_masks(activation, shape):
    module = SegmentationModule(nn.Conv2d(1, 3, 1), DiceLoss(activation=activation))
    image = torch.randn(2, 1, 8, 8)
    assert module.predict_step(image).shape == shape
    assert torch.equal(module.predict_step((image, None)), module.predict_step(image))


def test_predicting_needs_an_activation():
    module = SegmentationModule(nn.Conv2d(1, 1, 1), nn.BCEWithLogitsLoss())
    with pytest.raises(ValueError, match=r'SegmentationModule.*activation="softmax"'):
        module.predict_step(torch.zeros(1, 1, 4, 4))


def test_metrics_of_equal_first_states_stay_apart():
    metrics = {"low": DiceScore(threshold=0.3), "high": DiceScore(threshold=0.7)}
    module = SegmentationModule(nn.Identity(), metrics=metrics)
    half = torch.zeros(1, 1, 4, 4)
    half[..., :2] = 1
    for logits in (torch.full_like(half, -9.0), torch.full_like(half, 0.2)):
        module.val_metrics.update(logits, half)
    assert module.val_metrics.compute() == {"val/low": pytest.approx(1 / 3), "val/high": 0}


def test_scheduler_steps_and_watches():
    module = SegmentationModule(
        nn.Conv2d(1, 1, 1),
        optimizer=partial(torch.optim.SGD, lr=1.0),
        scheduler=partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="max", factor=0.5, patience=0),
    )
    run = trainer(max_epochs=4)
    run.fit(module, loader(), loader())
    assert isinstance(run.lr_scheduler_configs[0].scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    steps = SegmentationModule(
        nn.Conv2d(1, 1, 1),
        optimizer=partial(torch.optim.SGD, lr=1.0),
        scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        interval="step",
    )
    run = trainer(max_epochs=1)
    run.fit(steps, loader())
    assert run.optimizers[0].param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(("scaling", "factor"), [(None, 1), ("linear", 4), ("sqrt", 2)])
def test_the_rate_follows_the_number_of_processes(monkeypatch, scaling, factor):
    monkeypatch.setattr(L.Trainer, "distributed_sampler_kwargs", {"num_replicas": 4, "rank": 1})

    def groups(parameters):
        weight, bias = parameters
        return torch.optim.SGD([{"params": [weight], "lr": 0.5}, {"params": [bias]}], lr=0.125)

    def module(scheduler):
        return SegmentationModule(nn.Conv2d(1, 1, 1), optimizer=groups, scheduler=scheduler, lr_scaling=scaling)

    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=2)
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=9)
    for scheduler in (None, cosine, plateau):
        attached = module(scheduler)
        attached.trainer = trainer()
        # Asked twice, as for a resumed training, it is scaled once.
        for configured in (attached.configure_optimizers(), attached.configure_optimizers()):
            optimizer = configured if scheduler is None else configured["optimizer"]
            assert [group["lr"] for group in optimizer.param_groups] == [0.5 * factor, 0.125 * factor]
        if scheduler is cosine:
            schedule = configured["lr_scheduler"]["scheduler"]
            optimizer.step()
            schedule.step()
            assert schedule.get_last_lr() == pytest.approx([0.25 * factor, 0.0625 * factor])
        alone = module(scheduler).configure_optimizers()
        optimizer = alone if scheduler is None else alone["optimizer"]
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.125]


def test_frozen_parameters_are_not_optimized():
    module = SegmentationModule(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)))
    module.net[0].requires_grad_(False)
    assert len(module.configure_optimizers().param_groups[0]["params"]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size_divisor": 0}, "size_divisor must be"),
        ({"threshold": 1.5}, "threshold must be a probability"),
        ({"lr_scaling": "cubic"}, "lr_scaling must be one of 'linear', 'sqrt', None, got 'cubic'"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SegmentationModule(nn.Identity(), **settings)


@pytest.mark.parametrize("batch", [torch.zeros(1), {"image": 1}, (1,), (1, 2, 3, 4)])
def test_refuses_batches(batch):
    with pytest.raises(ValueError, match="a batch must be"):
        SegmentationModule(nn.Identity()).shared_step(batch, "val")


def test_wrong_class_names():
    module = multiclass()
    module.class_names = ["a", "b"]
    with pytest.raises(ValueError, match=r"name each of the 3 classes, got \['a', 'b'\]"):
        trainer().validate(module, loader(classes=3), verbose=False)
