import re
import sys

import lightning.pytorch as pl
import pytest
import torch
from helpers import run_ranks
from torch.utils.data import DataLoader

from lightning_dice import DiceLoss, SegmentationModule
from lightning_dice.callbacks import InputCheck
from lightning_dice.data import SyntheticSource
from lightning_dice.data.batch import Batch
from lightning_dice.functional.orientation import misplaced

IMAGE = torch.zeros(2, 3, 4, 4)
IDS = torch.tensor([[[0, 1], [2, 255]]], dtype=torch.uint8).repeat(2, 2, 2)
PLANES = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
SOFT = torch.full((2, 3, 4, 4), 1 / 3)
SOFTMAX, SIGMOID = "softmax", "sigmoid"


def check(image, mask, activation, classes=("background", "cell", "core"), ignore_index=255):
    callback = InputCheck(classes, activation, ignore_index)
    callback.on_train_batch_start(None, None, Batch(image, mask, ["first", "second"]), 0)


@pytest.mark.parametrize(
    ("mask", "activation"),
    [(IDS, SOFTMAX), (PLANES, SIGMOID), (IDS * 0, SOFTMAX), (torch.rand(2, 3, 4, 4).softmax(1), SOFTMAX)],
    ids=["ids", "planes", "no-foreground", "soft-labels"],
)
def test_good_batches_pass(mask, activation):
    check(IMAGE, mask, activation)


def bad_in_second(tensor, value):
    tensor = tensor.clone()
    tensor[1, ..., 0] = value
    return tensor


@pytest.mark.parametrize(
    ("image", "mask", "activation", "kwargs", "message"),
    [
        (
            IMAGE,
            bad_in_second(PLANES, 255),
            SIGMOID,
            {"ignore_index": None},
            r"mask of case 'second' holds the values 255, .* looks like a 0/255 picture.*'data.label_map={255:1}'",
        ),
        (
            IMAGE,
            bad_in_second(IDS, 7),
            SOFTMAX,
            {},
            r"'second' holds the values 7, outside 0 to 2 \(background, cell, core\)",
        ),
        (IMAGE, bad_in_second(IDS, 3), SOFTMAX, {}, "'data.label_map={value:class,...}', or .* data.ignore_index"),
        (IMAGE, IDS, SOFTMAX, {"ignore_index": None}, "holds the values 255"),
        (
            bad_in_second(IMAGE, torch.nan),
            IDS,
            SOFTMAX,
            {},
            "the image of case 'second' has values that are not finite",
        ),
        (IMAGE, IDS[:, :3], SOFTMAX, {}, r"must have the shape \(2, 4, 4\), got \(2, 3, 4\)"),
        (IMAGE, IDS, SIGMOID, {}, r"must have the shape \(2, 3, 4, 4\), got \(2, 4, 4\)"),
        (IMAGE, PLANES, SOFTMAX, {}, r"must have the shape \(2, 4, 4\), got \(2, 3, 4, 4\)"),
        (IMAGE, bad_in_second(PLANES.float(), 1.5), SIGMOID, {}, r"'second': target must lie in \[0, 1\], .* to 1.5"),
        (IMAGE, bad_in_second(PLANES.float(), -0.5), SIGMOID, {}, r"'second': target must lie in \[0, 1\]"),
        (IMAGE, bad_in_second(PLANES.float(), torch.nan), SIGMOID, {}, r"'second': target must lie in \[0, 1\]"),
        (IMAGE, bad_in_second(PLANES, 2), SIGMOID, {}, r"'second' holds the values 2, outside 0 to 1"),
        (IMAGE, bad_in_second(SOFT, 0.9), SOFTMAX, {}, r"'second': the soft labels of a pixel must sum to 1"),
    ],
    ids=[
        *("0/255", "outside", "outside-by-one", "ignored-not-named", "nan", "sizes", "ids-for-planes"),
        *("planes-for-ids", "soft-above-1", "soft-below-0", "soft-nan", "planes-of-2", "soft-sums"),
    ],
)
def test_bad_batches_are_refused(image, mask, activation, kwargs, message):
    with pytest.raises(ValueError, match=message):
        check(image, mask, activation, **kwargs)


def test_a_mask_that_is_ignored_entirely_is_a_warning():
    with pytest.warns(UserWarning, match="every pixel of the mask of case 'second' is ignored"):
        check(IMAGE, bad_in_second(IDS, 255).index_fill(0, torch.tensor([1]), 255), SOFTMAX)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(2, 1, 4, 4), "logits with 1 channels, .* but there are 3 classes"),
        (torch.full((2, 3, 4, 4), torch.nan), "logits that are not finite"),
    ],
)
def test_bad_logits_are_refused(logits, message):
    callback = InputCheck(["background", "cell", "core"], SOFTMAX)
    with pytest.raises(ValueError, match=message):
        callback.on_validation_batch_end(None, None, {"logits": logits}, Batch(IMAGE, IDS, ["a", "b"]), 0)


def test_only_the_first_batches_are_looked_at(trainer, net, loader):
    looked = []

    class Counting(InputCheck):
        def _check_batch(self, batch):
            looked.append(batch.case)

    trainer(Counting(["object"], SIGMOID), max_epochs=2).fit(net(), loader(), loader())
    assert looked == [["case00", "case01"]] * 2


def test_the_fit_stops_before_it_trains(trainer, net, loader):
    model = net()
    with pytest.raises(ValueError, match="0/255 picture"):
        trainer(InputCheck(["object"], SIGMOID), max_epochs=1).fit(model, loader(value=255), loader(value=255))
    assert not model.seen


@pytest.mark.parametrize(
    "form",
    [
        lambda batch: tuple(batch)[:3],
        lambda batch: tuple(batch)[:2],
        lambda batch: list(batch)[:2],
        lambda batch: batch._asdict(),
    ],
    ids=["triple", "pair", "list", "mapping"],
)
def test_every_form_of_a_batch_is_read(form):
    batch = form(Batch(IMAGE, bad_in_second(IDS, 7), ["first", "second"]))
    named = "1 of the batch" if len(batch) == 2 else "second"
    with pytest.raises(ValueError, match=f"case '{named}' holds the values 7"):
        InputCheck(["background", "cell", "core"], SOFTMAX, 255).on_train_batch_start(None, None, batch, 0)


def test_a_batch_that_is_not_known_is_named():
    with pytest.warns(UserWarning, match="batches of str are not checked"):
        InputCheck(["object"], SIGMOID).on_train_batch_start(None, None, "batch", 0)


def test_a_softmax_of_one_class_is_refused():
    with pytest.raises(ValueError, match="classes must be at least 2 with a softmax"):
        InputCheck(["object"], SOFTMAX)
    with pytest.raises(ValueError, match="activation must be one of 'sigmoid', 'softmax', got 'relu'"):
        InputCheck(["object"], "relu")


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_normalized_images_pass(scale):
    check(scale * torch.randn(IMAGE.shape), IDS, SOFTMAX)


@pytest.mark.parametrize(
    "image", [255 * torch.rand(IMAGE.shape), 20 + torch.randn(IMAGE.shape), -1000 + torch.randn(IMAGE.shape)]
)
def test_images_that_are_not_normalized_are_a_warning(image):
    with pytest.warns(UserWarning, match=r"not normalized: their values range from .*set normalize=image"):
        check(image, IDS, SOFTMAX)


# Deterministic: the graph of the gradient decides, or values that no net has by chance.
class Functional(torch.nn.Module):
    def __init__(self, classes, last):
        super().__init__()
        self.conv, self.last = torch.nn.Conv2d(3, classes, 1), last

    def forward(self, image):
        return self.last(self.conv(image))


class Gated(torch.nn.Module):
    """As in attention gates and squeeze-and-excitation: a sigmoid, but not on the way out."""

    def __init__(self, classes):
        super().__init__()
        self.conv, self.gate = torch.nn.Conv2d(3, classes, 1), torch.nn.Conv2d(3, 1, 1)

    def forward(self, image):
        return torch.sigmoid(self.gate(image)) * self.conv(image)


def fit(trainer, net, loader, activation, classes, loss=None, **kwargs):
    loss = loss or DiceLoss(activation=activation)
    module = SegmentationModule(net, loss, {}, activation=activation)
    names = ["background", "object"][-classes:]
    settings = {"num_sanity_val_steps": 0, "max_epochs": 1, "limit_val_batches": 0} | kwargs
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trainer(InputCheck(names, activation), **settings).fit(
            module, loader(classes=classes, activation=activation), loader(classes=classes, activation=activation)
        )
    return module


SIGMOID_NETS = {
    "module": lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Sigmoid()),
    "function": lambda: Functional(1, torch.sigmoid),
    "resized": lambda: Functional(1, lambda z: torch.nn.functional.interpolate(z[..., ::2, ::2].sigmoid(), (16, 16))),
    "mapping": lambda: Functional(1, lambda z: {"out": z.sigmoid()}),
    "levels": lambda: Functional(1, lambda z: [z.sigmoid(), z[..., ::2, ::2].sigmoid()]),
}


@pytest.mark.parametrize("name", SIGMOID_NETS)
def test_a_net_that_ends_in_a_sigmoid_is_refused(trainer, loader, name):
    net = SIGMOID_NETS[name]()
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(ValueError, match="the net ends in a sigmoid, and the loss applies a sigmoid"):
        fit(trainer, net, loader, SIGMOID, 1)
    assert all(map(torch.equal, before, net.parameters()))
    assert not net._forward_hooks


def test_a_net_that_ends_in_a_softmax_is_refused(trainer, loader):
    with pytest.raises(ValueError, match="the net ends in a softmax, and the loss applies a softmax"):
        fit(trainer, torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.Softmax(1)), loader, SOFTMAX, 2)


def test_probabilities_are_known_by_their_values_too():
    probs = torch.randn(2, 3, 8, 8).softmax(1)
    with pytest.raises(ValueError, match="on the first validation batch: logits are probabilities"):
        InputCheck(["a", "b", "c"], SOFTMAX).on_validation_batch_end(None, None, {"logits": probs}, None, 0)


def test_a_loss_of_probabilities_may_have_them(trainer, loader):
    net = SIGMOID_NETS["module"]()
    assert not fit(trainer, net, loader, SIGMOID, 1, DiceLoss(activation=None)).net._forward_hooks
    with pytest.warns(UserWarning, match="the net ends in a sigmoid"):
        fit(trainer, net, loader, SIGMOID, 1, BCE())


class BCE(torch.nn.BCELoss):
    def forward(self, probs, target):
        return super().forward(probs, target.float())


def small(net):
    """Logits in [0, 1]: those of a net that has not learned anything yet."""
    torch.nn.init.uniform_(net.weight, 0, 0.01)
    torch.nn.init.constant_(net.bias, 0.5)
    return net


@pytest.mark.parametrize(
    ("make", "activation", "classes"),
    [
        (lambda: small(torch.nn.Conv2d(3, 1, 1)), SIGMOID, 1),
        (lambda: small(torch.nn.Conv2d(3, 2, 1)), SOFTMAX, 2),
        (lambda: Gated(1), SIGMOID, 1),
        (lambda: torch.nn.Sequential(torch.nn.Sigmoid(), torch.nn.Conv2d(3, 1, 1)), SIGMOID, 1),
    ],
    ids=["sigmoid", "softmax", "gated", "sigmoid-first"],
)
def test_logits_of_a_young_net_pass(trainer, loader, make, activation, classes):
    assert not fit(trainer, make(), loader, activation, classes).net._forward_hooks


def test_the_output_is_looked_at_once(trainer, loader, monkeypatch):
    looked = []
    monkeypatch.setattr(InputCheck, "_check_logits", lambda self, logits, split, module: looked.append(split))
    fit(trainer, torch.nn.Conv2d(3, 1, 1), loader, SIGMOID, 1, max_epochs=2)
    assert looked == ["training"]


class Masks(torch.utils.data.Dataset):
    """One mask for each image."""

    def __init__(self, *masks):
        self.masks = masks

    def __len__(self):
        return len(self.masks)

    def __getitem__(self, index):
        return torch.zeros(1, *self.masks[index].shape[-2:]), self.masks[index]


def ids(*labels):
    mask = torch.zeros(6, 6, dtype=torch.uint8)
    mask[0, : len(labels)] = torch.tensor(labels, dtype=torch.uint8)
    return mask


def watched(trainer, train, val=None, activation=SOFTMAX, classes=("background", "cell", "core"), **kwargs):
    callback = InputCheck(classes, activation, kwargs.pop("ignore_index", 255))
    module = SegmentationModule(
        torch.nn.Conv2d(1, len(classes), 1), DiceLoss(activation=activation, ignore_index=callback.ignore_index), {}
    )
    loaders = [DataLoader(Masks(*masks), 1) for masks in (train, val or train)]
    settings = {"num_sanity_val_steps": 0, "max_epochs": 2, "limit_val_batches": 1.0 if val else 0}
    trainer(callback, **settings | kwargs).fit(module, *loaders)


def test_classes_that_occur_in_different_batches_pass(trainer):
    watched(trainer, [ids(), ids(1), ids(2, 255)], [ids(1), ids(2)], num_sanity_val_steps=1)
    watched(trainer, [ids(1), torch.full((6, 6), 2)], classes=("a", "b", "c"))
    watched(trainer, [ids(1)[None], ids()[None]], activation=SIGMOID, classes=("cell",))


@pytest.mark.parametrize(
    ("masks", "kwargs", "message"),
    [
        ([ids(1, 255), ids(1)], {}, "no pixel is core: a class that never occurs"),
        ([ids(255)], {}, "every pixel of every mask is background in the first epoch of {split}"),
        ([ids() + 2], {}, "every pixel of every mask is core in"),
        ([ids(), ids(2)], {"ignore_index": 2}, "every pixel of every mask is background"),
        (
            [torch.stack([ids(1), ids(255)])],
            {"activation": SIGMOID, "classes": ("cell", "core")},
            "no pixel is core: .*data.label_map",
        ),
        ([ids()[None] + 1], {"activation": SIGMOID, "classes": ("cell",)}, "every pixel of every mask is cell"),
        ([ids()[None]], {"activation": SIGMOID, "classes": ("cell",)}, "no pixel is cell"),
        (
            [torch.stack([1 - ids(1).float(), ids(1).float(), ids().float()])],
            {},
            "no pixel is core",
        ),
    ],
    ids=["absent", "background", "one", "ignored", "plane", "full-plane", "empty-plane", "soft"],
)
@pytest.mark.parametrize("split", ["training", "validation"])
def test_classes_that_do_not_occur_are_named_once(trainer, masks, kwargs, message, split):
    if kwargs.get("activation") == SIGMOID:
        classes = len(kwargs["classes"])
        good = [torch.stack([ids(1, 0)] * classes)]
    elif "ignore_index" in kwargs:
        good = [ids(1)]
    else:
        good = [ids(1, 2)]
    with pytest.warns(UserWarning, match=message.format(split=split)) as warned:
        watched(trainer, *((masks, good) if split == "training" else (good, masks)), **kwargs)
    (message,) = of_masks(warned)
    assert f"epoch of {split}" in message


def test_a_class_that_is_ignored_is_not_to_occur(trainer):
    watched(trainer, [ids(1, 2), ids(1, 2)], ignore_index=0)


def of_masks(warned):
    """Lightning's own warnings apart."""
    return [str(one.message) for one in warned if re.search("masks? |class ", str(one.message))]


class Moved(torch.utils.data.Dataset):
    def __init__(self, move, flips=False, count=16):
        self.cases = SyntheticSource(size=(96, 96), classes=["a", "b"], cases=(count, 0, 0), seed=2).split("train")
        self.move, self.flips = move, flips

    def __len__(self):
        return len(self.cases)

    def __getitem__(self, index):
        image, mask, *_ = self.cases[index]
        mask = self.move(mask)
        axes = [axis for axis, flipped in ((-1, index % 2), (-2, index % 4 > 1)) if self.flips and flipped]
        return image.flip(axes) * 4 - 2, mask.flip(axes)


def train_on(trainer, data):
    module = SegmentationModule(torch.nn.Conv2d(1, 2, 1), DiceLoss(), {})
    settings = {"num_sanity_val_steps": 0, "max_epochs": 1, "limit_val_batches": 0}
    trainer(InputCheck(["a", "b"], SIGMOID), **settings).fit(module, DataLoader(data, 4), DataLoader(data, 4))


MOVES = {
    r"transposed \(": lambda m: m.transpose(-1, -2),
    "flipped along one axis": lambda m: m.flip(-1),
    "rotated by 90": lambda m: m.rot90(1, (-2, -1)),
    "rotated by 180": lambda m: m.rot90(2, (-2, -1)),
}


@pytest.mark.parametrize("flips", [False, True], ids=["upright", "augmented"])
@pytest.mark.parametrize("name", MOVES)
def test_moved_masks_are_a_warning(trainer, name, flips):
    with pytest.warns(UserWarning, match=f"the masks of training look {name}") as warned:
        train_on(trainer, Moved(MOVES[name], flips))
    assert len(of_masks(warned)) == 1


@pytest.mark.parametrize("flips", [False, True], ids=["upright", "augmented"])
def test_masks_in_their_places_pass(trainer, flips):
    train_on(trainer, Moved(lambda mask: mask, flips))


def test_scores_that_hardly_differ_do_not_tell():
    scores = torch.full((16, 8), 0.5)
    scores[:, 1] += torch.linspace(0.02, 0.03, 16)
    assert misplaced(scores) is None
    scores[:, 1] += 0.02
    assert misplaced(scores).startswith("transposed")
    scores[::2, 1] -= 0.5
    assert misplaced(scores) is None


def test_few_images_do_not_tell(trainer):
    train_on(trainer, Moved(MOVES["rotated by 180"], count=7))


def test_no_value_is_read_back_after_the_first_batch(trainer, monkeypatch):
    watch = sys.modules["lightning_dice.callbacks.input_check"]._MaskStatistics
    add = watch.add

    def forbidden(*_):
        raise AssertionError("a value was read back")

    def adding(self, image, mask):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "nonzero"):
                patch.setattr(torch.Tensor, name, forbidden)
            add(self, image, mask)

    monkeypatch.setattr(watch, "add", adding)
    train_on(trainer, Moved(lambda mask: mask))
    watched(trainer, [ids(1, 2)] * 3)


def train_as_a_rank():
    """Of two ranks, one sees class 1 and one class 2."""
    masks = [torch.tensor([0, 1 + i % 2] * 8).view(4, 4) for i in range(4)]
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False, max_epochs=1,
        enable_progress_bar=False, callbacks=[InputCheck(["none", "one", "two", "three"], "softmax")],
    )  # fmt: skip
    module = SegmentationModule(torch.nn.Conv2d(1, 4, 1), DiceLoss(activation="softmax"), {})
    trainer.fit(module, DataLoader(Masks(*masks), 1), DataLoader(Masks(*masks), 1))


@pytest.mark.process
def test_a_class_that_another_rank_sees_is_not_named():
    err = run_ranks(train_as_a_rank).err
    for split in ("training", "validation"):
        assert err.count(f"in the first epoch of {split} no pixel is three:") == 1, err
