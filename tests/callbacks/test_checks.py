import pytest
import torch

from lightning_dice.callbacks import InputCheck
from lightning_dice.data.batch import Batch

IMAGE = torch.zeros(2, 3, 4, 4)
IDS = torch.tensor([[[0, 1], [2, 255]]], dtype=torch.uint8).repeat(2, 2, 2)
PLANES = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
SOFTMAX, SIGMOID = "softmax", "sigmoid"


def check(image, mask, activation, classes=("background", "cell", "core"), ignore_index=255):
    callback = InputCheck(classes, activation, ignore_index)
    callback.on_train_batch_start(None, None, Batch(image, mask, ["first", "second"]), 0)


@pytest.mark.parametrize(
    ("mask", "activation"),
    [(IDS, SOFTMAX), (PLANES, SIGMOID), (IDS * 0, SOFTMAX), (torch.rand(2, 3, 4, 4), SOFTMAX)],
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
            r"mask of case 'second' holds the values 255, .* looks like a 0/255 picture.*'data.values={255:1}'",
        ),
        (
            IMAGE,
            bad_in_second(IDS, 7),
            SOFTMAX,
            {},
            r"'second' holds the values 7, outside 0 to 2 \(background, cell, core\)",
        ),
        (IMAGE, bad_in_second(IDS, 3), SOFTMAX, {}, "'data.values={value:class,...}', or .* data.ignore_index"),
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
    ],
    ids=["0/255", "outside", "outside-by-one", "ignored-not-named", "nan", "sizes", "ids-for-planes", "planes-for-ids"],
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
