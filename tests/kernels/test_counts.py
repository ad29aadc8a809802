from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dice.functional import hard_sums, label_sums
from lightning_dice.kernels import available, forced

HOW = [
    "reference",
    pytest.param(
        "native", marks=pytest.mark.skipif(available()["native"] is not None, reason=str(available()["native"]))
    ),
]


def plain(predicted, target, classes, ignored):
    """Count overlap, predicted, actual and all of lists of ids, by definition; a prediction may be None."""
    pairs = [(p, t) for p, t in zip(predicted, target, strict=True) if t != ignored]
    return [
        [sum(p == t == c for p, t in pairs) for c in range(classes)],
        [sum(p == c for p, _ in pairs) for c in range(classes)],
        [sum(t == c for _, t in pairs) for c in range(classes)],
        [len(pairs)] * classes,
    ]


def first_greatest(values):
    if any(math.isnan(value) for value in values):
        return None
    return values.index(max(values))


def as_lists(sums):
    assert all(field.dtype == torch.int64 for field in sums.fields.values())
    return [field.tolist() for field in (sums.overlap, sums.predicted, sums.actual, sums.count)]


@pytest.mark.parametrize("how", HOW)
@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    classes=st.sampled_from([2, 3, 5, 19, 130]),
    space=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    target_dtype=st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]),
    layout=st.sampled_from(["plain", "last", "sliced"]),
    nans=st.booleans(),
)
def test_equals_the_definition(how, seed, batch, classes, space, dtype, target_dtype, layout, nans):
    torch.manual_seed(seed)
    # Whole numbers, for ties.
    logits = torch.randint(-3, 4, (batch, classes, *space)).to(dtype)
    if nans:
        logits[torch.rand(logits.shape) < 0.05] = math.nan
    predicted = torch.randint(0, classes, (batch, *space))
    target = torch.where(torch.rand(predicted.shape) < 0.5, predicted, torch.randint(0, classes, predicted.shape))
    target = target.masked_fill(torch.rand(target.shape) < 0.2, 255 if classes < 255 else -1).to(target_dtype)
    move = {
        "plain": lambda x: x,
        "last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
        "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    }[layout]
    with forced(how):
        from_logits = as_lists(hard_sums(move(logits), target, activation="softmax", ignore_index=255))
        from_labels = as_lists(label_sums(predicted, target, classes, ignore_index=255))
    for image in range(batch):
        labels = target[image].flatten().tolist()
        greatest = [first_greatest(pixel) for pixel in logits[image].flatten(1).T.double().tolist()]
        expected = plain(greatest, labels, classes, 255)
        assert [rows[image] for rows in from_logits] == expected
        expected = plain(predicted[image].flatten().tolist(), labels, classes, 255)
        assert [rows[image] for rows in from_labels] == expected


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_planes(how, dtype, threshold):
    torch.manual_seed(0)
    at = torch.tensor(math.log(threshold / (1 - threshold)), dtype=dtype)
    for shape in ((2, 1, 33), (1, 3, 4, 5), (2, 2, 2100)):
        logits = torch.randn(shape).to(dtype)
        logits.view(-1)[::7] = math.nan
        logits.view(-1)[::5] = at  # Not above.
        target = torch.randint(0, 2, shape).masked_fill(torch.rand(shape) < 0.3, 255)
        with forced(how):
            sums = hard_sums(logits, target, threshold=threshold, ignore_index=255)
        above, valid = logits > at, target != 255
        assert torch.equal(sums.predicted, (above & valid).flatten(2).sum(2))
        assert torch.equal(sums.overlap, (above & (target == 1)).flatten(2).sum(2))
        assert torch.equal(sums.actual, (target == 1).flatten(2).sum(2))
        assert torch.equal(sums.count, valid.flatten(2).sum(2))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("pixels", [2047, 2048, 2049, 32767, 32768, 32769, 100_003])
def test_at_the_ends_of_runs_and_units(how, pixels):
    torch.manual_seed(1)
    logits, target = torch.randn(2, 3, pixels), torch.randint(0, 3, (2, pixels))
    predicted = logits.argmax(1)
    with forced(how):
        sums = hard_sums(logits, target, activation="softmax")
        again = label_sums(predicted, target, 3)
    for c in range(3):
        assert torch.equal(sums.overlap[:, c], ((predicted == c) & (target == c)).sum(1))
        assert torch.equal(sums.predicted[:, c], (predicted == c).sum(1))
        assert torch.equal(sums.actual[:, c], (target == c).sum(1))
    for name, field in sums.fields.items():
        assert torch.equal(field, again.fields[name])


@pytest.mark.parametrize("how", HOW)
def test_refuses_values_out_of_range(how):
    ids = torch.tensor([[0, 1, 2]])
    with forced(how):
        with pytest.raises(ValueError, match="target must hold class ids from 0 to 2, got values from 0 to 3"):
            label_sums(ids, torch.tensor([[0, 1, 3]]), 3)
        with pytest.raises(ValueError, match="predicted must hold class ids from 0 to 2, got values from -1 to 1"):
            label_sums(torch.tensor([[0, 1, -1]]), ids, 3)
        with pytest.raises(ValueError, match="equal shape"):
            label_sums(ids, ids.unsqueeze(1), 3)
        with pytest.raises(ValueError, match="predicted holds class ids and must be of an integer dtype"):
            label_sums(ids.float(), ids, 3)
        with pytest.raises(ValueError, match="class ids from 0 to 2"):
            hard_sums(torch.zeros(1, 3, 3), torch.tensor([[0, 1, 7]]), activation="softmax")
        with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
            hard_sums(torch.zeros(1, 1, 3), torch.tensor([[[0, 1, 7]]]))
        # The prediction of an ignored pixel may be anything.
        sums = label_sums(torch.tensor([[0, 1, 9]]), torch.tensor([[0, 1, 255]]), 3, ignore_index=255)
        assert sums.count.tolist() == [[2, 2, 2]]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_ignored_label_of_zero(how, dtype):
    """The padding of the last vector is not ignored pixels."""
    for pixels in (1, 7, 16, 17, 2049):
        logits, target = torch.ones(1, 2, pixels, dtype=dtype), torch.ones(1, 2, pixels, dtype=torch.long)
        target[..., 0] = 0
        with forced(how):
            sums = hard_sums(logits, target, ignore_index=0)
            ids = label_sums(target[:, 0], target[:, 0], 2, ignore_index=0)
        assert sums.count.tolist() == [[pixels - 1] * 2]
        assert sums.overlap.tolist() == sums.actual.tolist() == [[pixels - 1] * 2]
        assert ids.count.tolist() == [[pixels - 1] * 2]


@pytest.mark.parametrize("how", HOW)
def test_runs_of_one_label(how):
    """With predictions that are all the same, and that are not."""
    target = torch.zeros(1, 96, dtype=torch.long)
    target[:, 48:] = 2
    predicted = target.clone()
    predicted[:, 3], predicted[:, 50:90:3] = 1, 0
    with forced(how):
        sums = label_sums(predicted, target, 3)
    assert as_lists(sums) == [[row] for row in plain(predicted[0].tolist(), target[0].tolist(), 3, None)]


@pytest.mark.parametrize("how", HOW)
def test_many_classes_and_large_numbers(how):
    target = torch.tensor([[0, 1, 3]])
    with forced(how):
        sums = label_sums(target, target, 1_000_000)
        assert sums.overlap.sum() == 3
        with pytest.raises(ValueError, match="target must hold class ids"):
            label_sums(target, torch.tensor([[0, 1, 2**24]]), 3, ignore_index=2**24 + 1)


@pytest.mark.parametrize("how", HOW)
def test_a_traced_count_counts_again(how):
    with forced(how), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda z, t: hard_sums(z, t, activation="softmax").overlap, EXAMPLES[0])
        for logits, target in EXAMPLES:
            assert torch.equal(traced(logits, target), hard_sums(logits, target, activation="softmax").overlap)


torch.manual_seed(3)
EXAMPLES = [(torch.randn(1, 3, 50), torch.randint(0, 3, (1, 50))) for _ in range(2)]
