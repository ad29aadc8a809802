"""Evaluation of a module with windows, mirroring and post-processing."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_dice import DiceLoss, DiceScore, SegmentationModule
from lightning_dice.data import Batch
from lightning_dice.functional import hard_prediction
from lightning_dice.inference import Inference, PostProcessing, Predictor

SLIDING = Inference([8, 8], mirror_axes=[1])


def module(inference=None, activation="softmax", **settings):
    torch.manual_seed(0)
    classes = 3 if activation == "softmax" else 2
    return SegmentationModule(
        nn.Conv2d(1, classes, 3, padding=1),
        DiceLoss(activation=activation, pool="image"),
        DiceScore(classes, activation=activation, average="none"),
        inference=inference,
        **settings,
    ).eval()


def batches(activation="softmax", *, mask_size=(19, 13), number=5, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(number, 1, 19, 13, generator=generator) * 3
    shape = (number, *mask_size) if activation == "softmax" else (number, 2, *mask_size)
    mask = torch.randint(3 if activation == "softmax" else 2, shape, generator=generator)
    spacing = [(0.5, 0.5)] * number
    parts = [slice(start, start + batch_size) for start in range(0, number, batch_size)]
    return [Batch(image[p], mask[p], list("abcdefgh"[p]), spacing=spacing[p]) for p in parts]


def evaluated(tested, given, stage="validate"):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    loader = DataLoader(given, batch_size=None, collate_fn=lambda batch: batch)
    return getattr(trainer, stage)(tested, loader, verbose=False)[0]


def silent(tested):
    tested.log = tested.log_dict = lambda *_, **__: None
    return tested


@pytest.mark.parametrize("mask_size", [(19, 13), (25, 30)])
@pytest.mark.parametrize("inference", [None, SLIDING], ids=["whole", "sliding"])
def test_logits_are_those_of_the_predictor_at_the_size_of_the_mask(inference, mask_size):
    tested = silent(module(inference))
    predictor = tested.predictor()
    for batch in batches(mask_size=mask_size):
        with torch.no_grad():
            expected = torch.stack([predictor.logits(one, mask_size) for one in batch.image])
            found = tested.validation_step(batch, 0)
        torch.testing.assert_close(found["logits"], expected)
        each = [tested.loss(logits[None], mask[None]) for logits, mask in zip(expected, batch.mask, strict=True)]
        torch.testing.assert_close(found["loss"], torch.stack(each).mean())
        assert set(found) == {"loss", "logits"}


def test_without_settings_nothing_is_different():
    tested = module()
    for batch in batches():
        with torch.no_grad():
            assert torch.equal(tested.eval_logits(batch.image), tested.net(batch.image))
            expected = hard_prediction(tested.net(batch.image), activation="softmax")
            assert torch.equal(tested.predict_step(batch), expected)


@pytest.mark.parametrize("mask_size", [(19, 13), (25, 30)])
@pytest.mark.parametrize(
    ("activation", "postprocessing"),
    [
        ("softmax", PostProcessing(thresholds=[0.8, 0.1, 0.3])),
        ("softmax", PostProcessing(min_size=2, unit="mm")),
        ("sigmoid", PostProcessing(2.0, [0.3, 0.7], min_size=3)),
    ],
)
def test_post_processed_labels_are_scored_and_predicted(activation, postprocessing, mask_size):
    tested = module(Inference([8, 8], postprocessing=postprocessing), activation)
    given = batches(activation, mask_size=mask_size)
    score = DiceScore(3 if activation == "softmax" else 2, activation=activation)
    predictor = tested.predictor()
    for batch in given:
        with torch.no_grad():
            labels = [predictor.labels(one, mask_size, (0.5, 0.5)) for one in batch.image]
            step = silent(module(tested.inference, activation)).test_step(batch, 0)
        assert torch.equal(step["labels"], torch.stack(labels).to(step["labels"].dtype))
        assert step["labels"].dtype == (torch.int64 if activation == "softmax" else torch.bool)
        for one, mask in zip(labels, batch.mask, strict=True):
            planes = F.one_hot(one.long(), 3).movedim(-1, 0) if activation == "softmax" else one
            score.update(planes[None].float() - 0.5, mask[None])
    assert evaluated(tested, given, "test")["test/dice"] == pytest.approx(float(score.compute()), rel=1e-6)
    plain = evaluated(module(Inference([8, 8]), activation), given, "test")["test/dice"]
    assert plain != pytest.approx(float(score.compute()), rel=1e-3)
    if mask_size == (19, 13):
        with torch.inference_mode():
            assert torch.equal(tested.predict_step(given[0]), silent(tested).test_step(given[0], 0)["labels"])


def test_predicted_components_are_measured_at_the_size_of_the_image():
    given = batches(mask_size=(38, 13))[0]
    # A pixel of the image is two of the mask, 0.5 mm by 0.5 mm each.
    tested = module(Inference(postprocessing=PostProcessing(min_size=1.0, unit="mm")))
    by_pixels = module(Inference(postprocessing=PostProcessing(min_size=2)))
    with torch.no_grad():
        found = tested.predict_step(given)
        assert torch.equal(found, by_pixels.predict_step(given))
        assert not torch.equal(found, module().predict_step(given))


def test_thresholds_of_a_metric_do_not_undo_post_processing():
    given = batches("sigmoid")
    tested = module(Inference(postprocessing=PostProcessing(thresholds=[0.4, 0.4])), "sigmoid")
    strict = SegmentationModule(
        tested.net,
        tested.loss,
        DiceScore(2, threshold=0.99, average="none"),
        inference=tested.inference,
    )
    assert evaluated(strict, given)["val/dice"] == evaluated(tested, given)["val/dice"]


@pytest.mark.parametrize(
    "inference", [SLIDING, Inference([8, 8], postprocessing=PostProcessing(thresholds=[0.2, 0.3, 0.4]))]
)
def test_training_does_not_use_it(inference):
    batch = batches()[0]
    found = [silent(module(each)).train().training_step(batch, 0) for each in (None, inference)]
    assert torch.equal(*found)


def test_a_batch_of_no_image_runs_the_network_on_one_window():
    seen = []

    class Seeing(nn.Conv2d):
        def forward(self, image):
            seen.append(tuple(image.shape))
            return super().forward(image)

    postprocessing = PostProcessing(min_size=3)
    tested = SegmentationModule(
        Seeing(1, 3, 1),
        DiceLoss(activation="softmax"),
        DiceScore(3, activation="softmax"),
        size_divisor=8,
        inference=Inference([8, 8], mirror_axes=[0], postprocessing=postprocessing),
    )
    full = batches(mask_size=(25, 30))
    nothing = Batch(full[0].image[:0], full[0].mask[:0], [])
    assert evaluated(tested, [nothing, *full, nothing]) == evaluated(tested, full)
    seen.clear()
    with torch.inference_mode():
        found = silent(tested).eval().validation_step(nothing, 0)
        assert found["logits"].shape == (0, 3, 25, 30)
        assert len(tested.predict_step(nothing)) == 0
    assert seen == [(1, 1, 8, 8)] * 2


def test_windows_are_padded_to_the_divisor():
    seen = []

    class Seeing(nn.Module):
        def forward(self, image):
            seen.append(tuple(image.shape[2:]))
            return image

    tested = SegmentationModule(Seeing(), size_divisor=16, inference=Inference([12, 20]))
    image = torch.randn(1, 1, 19, 33)
    torch.testing.assert_close(tested.eval_logits(image), image)
    assert set(seen) == {(16, 32)}


def test_calibrating_leaves_other_modules_alone():
    shared = Inference(postprocessing=PostProcessing(min_size=4))
    one, other = module(shared), module(shared)
    one.calibrate(PostProcessing(2.0, [0.2, 0.3, 0.5], min_size=9))
    assert one.inference.postprocessing == PostProcessing(2.0, [0.2, 0.3, 0.5], min_size=4)
    assert other.inference.postprocessing == PostProcessing(min_size=4)


def test_mirrored_predictions_are_averaged():
    tested, image = module(Inference(mirror_axes=[1])), batches()[0].image
    with torch.no_grad():
        mean = (tested.net(image).softmax(1) + tested.net(image.flip(3)).flip(3).softmax(1)) / 2
        torch.testing.assert_close(tested.eval_logits(image).softmax(1), mean)


def test_a_temperature_is_applied_before_the_threshold_and_returned():
    tested = silent(module(Inference(postprocessing=PostProcessing(temperature=2.0)), "sigmoid", threshold=0.3))
    given = batches("sigmoid")[0]
    with torch.no_grad():
        expected = (tested.net(given.image) / 2).sigmoid() > 0.3
        assert torch.equal(tested.predict_step(given), expected)
        found = tested.test_step(given, 0)
    assert torch.equal(found["labels"], expected)
    assert found["temperature"] == 2
    torch.testing.assert_close(found["logits"], tested.net(given.image))


def test_several_modules_are_an_ensemble():
    modules = [module(), module(Inference(postprocessing=PostProcessing(temperature=2.0)))]
    image = batches()[0].image[0]
    with torch.no_grad():
        mean = sum((m(image[None])[0] / t).softmax(0) for m, t in zip(modules, (1, 2), strict=True)) / 2
        joined = Predictor.ensemble([each.predictor() for each in modules])
        torch.testing.assert_close(joined.probabilities(joined.logits(image)), mean)


def test_an_ensemble_has_the_windows_and_mirroring_of_its_first():
    first, other = module(SLIDING), module(Inference([4, 4]))
    joined = Predictor.ensemble([each.predictor() for each in (first, other)])
    assert (joined.window, joined.mirroring) == (SLIDING.window, SLIDING.mirroring)
    image = batches()[0].image[0]
    with torch.no_grad():
        twice = Predictor.ensemble([first.predictor(), first.predictor()])
        torch.testing.assert_close(twice.logits(image).softmax(0), first.eval_logits(image[None])[0].softmax(0))
