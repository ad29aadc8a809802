import math

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_dice.callbacks import Overlays
from lightning_dice.functional import hard_prediction
from lightning_dice.plotting.colors import FALSE_NEGATIVE, FALSE_POSITIVE, TRUE_POSITIVE, class_colors, parse_color
from lightning_dice.plotting.panels import draw_overlays
from lightning_dice.plotting.thumbnails import IGNORED_CODE, ErrorCode, ThumbnailSettings, make_thumbnail
from lightning_dice.scoring import CaseScore


def planes(*rows):
    """Planes of one row of pixels each."""
    return torch.tensor(rows).unsqueeze(1)


def thumbnail(image, mask, logits, **kwargs):
    settings = ThumbnailSettings(**{"activation": "sigmoid"} | kwargs)
    predicted = hard_prediction(logits[None], activation=settings.activation)[0]
    return make_thumbnail("case", 0.5, image, mask, predicted, settings)


def names(errors):
    return " ".join(ErrorCode(code).name for code in errors[0])


def test_errors_of_planes():
    truth = planes([1, 1, 0, 0, 1, 255], [0, 0, 0, 0, 0, 255])
    predicted = planes([1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0])
    # A margin that is ignored is cut off, so the ignored pixel is put between others.
    order = [0, 1, 5, 2, 3, 4]
    result = thumbnail(torch.zeros(1, 1, 6), truth[..., order], predicted[..., order] * 2.0 - 1, ignore_index=255)
    assert names(result.errors) == "TRUE_POSITIVE FALSE_NEGATIVE IGNORED FALSE_POSITIVE CORRECT WRONG_CLASS"
    assert result.truth.tolist() == [[1, 1, IGNORED_CODE, 0, 0, 1]]
    assert result.prediction.tolist() == [[1, 0, 1, 1, 0, 2]]


def test_errors_of_ids():
    truth = torch.tensor([[0, 1, 1, 0, 255, 2, 2]])
    predicted = torch.tensor([[0, 1, 0, 1, 0, 1, 2]])
    logits = torch.nn.functional.one_hot(predicted, 3).permute(2, 0, 1).float()
    settings = {"activation": "softmax", "ignore_index": 255, "exclude_classes": [0]}
    result = thumbnail(torch.zeros(1, 1, 7), truth, logits, **settings)
    assert (
        names(result.errors) == "CORRECT TRUE_POSITIVE FALSE_NEGATIVE FALSE_POSITIVE IGNORED WRONG_CLASS TRUE_POSITIVE"
    )
    assert result.truth.tolist() == [[0, 2, 2, 0, IGNORED_CODE, 3, 3]]


def test_where_planes_overlap_the_smaller_class_is_on_top():
    truth = planes([1, 1, 1, 1], [0, 1, 0, 0])
    assert thumbnail(torch.zeros(1, 1, 4), truth, truth * 2.0 - 1).truth.tolist() == [[1, 2, 1, 1]]


def test_ignored_margins_are_cut_off():
    mask = torch.full((1, 8, 8), 255)
    mask[:, :5, :6] = 0
    result = thumbnail(torch.randn(3, 8, 8), mask, -torch.ones(1, 8, 8), ignore_index=255)
    assert result.image.shape == (5, 6, 3)
    assert (result.errors == ErrorCode.CORRECT).all()


@pytest.mark.parametrize("side", [512, 513, 2048, 3000])
def test_a_lone_error_is_seen_at_any_size(side):
    mask = torch.zeros(1, side, 400, dtype=torch.uint8)
    mask[0, side - 30, 100] = 1
    result = thumbnail(torch.zeros(1, side, 400), mask, -torch.ones(1, side, 400))
    assert (result.errors == ErrorCode.FALSE_NEGATIVE).sum() == 1
    assert max(result.errors.shape) <= 512
    assert ("where the most errors are" in result.note) == (side == 3000)
    assert result.note.endswith({512: "", 513: "at 1/2", 2048: "at 1/4", 3000: "at 1/4"}[side])


def test_a_mostly_hit_object_is_not_painted_over_by_its_border():
    mask = torch.zeros(1, 800, 800, dtype=torch.uint8)
    mask[0, 100:112, 100:112] = 1
    logits = mask * 2.0 - 1
    logits[0, 100:112, 111] = -1
    errors = thumbnail(torch.zeros(1, 800, 800), mask, logits, size=400).errors
    assert (errors == ErrorCode.TRUE_POSITIVE).sum() == 30
    assert (errors == ErrorCode.FALSE_NEGATIVE).sum() == 6


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_images_of_any_number_of_channels(channels):
    image = torch.randn(channels, 20, 30) * 5 + 100
    image[:, 3, 3] = math.nan
    result = thumbnail(image, torch.zeros(1, 20, 30, dtype=torch.uint8), -torch.ones(1, 20, 30))
    assert result.image.shape == (20, 30, 3)
    assert result.image.dtype == np.uint8
    assert (result.image.min(), result.image.max()) == (0, 255)
    assert (result.image[..., 0] == result.image[..., 1]).all() == (channels < 3)


def test_a_volume_is_shown_by_the_slice_with_the_most_errors():
    mask = torch.zeros(9, 8, 8, dtype=torch.uint8)
    mask[5, 2:6, 2:6] = 1
    mask[2, 0, 0] = 1
    settings = {"activation": "softmax", "exclude_classes": [0]}
    logits = torch.stack([torch.ones(9, 8, 8), torch.zeros(9, 8, 8)])
    result = thumbnail(torch.zeros(1, 9, 8, 8), mask, logits, **settings)
    assert (result.note, (result.errors == ErrorCode.FALSE_NEGATIVE).sum()) == ("slice 6 of 9", 16)
    assert thumbnail(torch.zeros(1, 9, 8, 8), mask * 0, logits, **settings).note == "slice 5 of 9"
    as_planes = thumbnail(torch.zeros(1, 9, 8, 8), mask[None], -torch.ones(1, 9, 8, 8))
    assert as_planes.note == "slice 6 of 9"
    # The fullest slice is all right, and so are two more pixels of another one that are ignored.
    logits = torch.stack([torch.zeros(9, 8, 8), (mask == 1).float() - 0.5])
    logits[1, 2, 0, 0] = logits[1, 3, 0, :2] = -1
    mask[3, 0, :2] = 255
    logits[1, 3, 0, :2] = 1
    shown = thumbnail(torch.zeros(1, 9, 8, 8), mask, logits, ignore_index=255, **settings)
    assert (shown.note, (shown.errors == ErrorCode.FALSE_NEGATIVE).sum()) == ("slice 3 of 9", 1)
    without = torch.tensor([1, 0]).view(2, 1, 1, 1) * mask
    planes = thumbnail(torch.zeros(1, 9, 8, 8), without, logits[:1] - 0.5, ignore_index=255, exclude_classes=[0])
    assert planes.note == "slice 5 of 9"


def test_an_image_of_another_size_is_shown_at_the_masks():
    """Volumes are resampled for the network alone."""
    mask = torch.zeros(10, 8, 12, dtype=torch.uint8)
    mask[6, 2:6, 2:6] = 1
    image = torch.zeros(1, 5, 4, 6)
    image[0, 3] = torch.linspace(0, 1, 6)
    shown = thumbnail(image, mask[None], -torch.ones(1, 10, 8, 12))
    assert shown.note == "slice 7 of 10"
    assert shown.image.shape == (8, 12, 3)
    assert shown.image.std() > 50


def test_signals_have_no_picture():
    assert thumbnail(torch.zeros(1, 50), torch.zeros(1, 50), torch.zeros(1, 50)) is None


def offer(overlays, monkeypatch, scores):
    """Offer cases with these scores, whatever their masks are."""
    empty = torch.zeros(1, 40, 40, dtype=torch.uint8)
    for case, score in scores.items():
        monkeypatch.setattr("lightning_dice.callbacks.overlays.score_case", lambda *_, it=score: CaseScore(it, []))
        overlays.offer(case, torch.zeros(1, 40, 40), empty, empty)


def test_worst_typical_and_best_are_kept_and_no_more(tmp_path, monkeypatch):
    overlays = Overlays(tmp_path, ["object"], "sigmoid", count=4, typical=2, best=2)
    scores = {f"case{i:03}": (i * 37 % 500) / 500 for i in range(500)}
    offer(overlays, monkeypatch, scores | {"nothing": math.nan})
    assert len(overlays._kept) <= 4 + 2 + 2 * 12
    shown = [r.score for r in overlays._choose(overlays._scores, overlays._kept)]
    assert shown[:4] == [0, 0.002, 0.004, 0.006]
    assert shown[-2:] == [0.996, 0.998]
    assert len(shown) == 8
    assert shown[4:6] == pytest.approx([0.5, 0.5], abs=0.01)
    assert shown == sorted(shown)


def test_typical_cases_of_data_in_the_order_of_their_scores(tmp_path, monkeypatch):
    overlays = Overlays(tmp_path, ["object"], "sigmoid", count=1)
    offer(overlays, monkeypatch, {f"case{i:03}": i / 300 for i in range(300)})
    shown = [r.score for r in overlays._choose(overlays._scores, overlays._kept)]
    assert shown[1:3] == pytest.approx([0.5, 0.5], abs=0.2)


def test_cases_without_a_score_are_drawn_only_if_there_are_no_others(tmp_path, monkeypatch):
    overlays = Overlays(tmp_path, ["object"], "sigmoid", count=2)
    offer(overlays, monkeypatch, {"a": math.nan, "b": math.nan, "c": math.nan})
    assert [r.case for r in overlays._choose(overlays._scores, overlays._kept)][:2] == ["a", "b"]
    offer(overlays, monkeypatch, {"d": 0.9})
    assert [r.case for r in overlays._choose(overlays._scores, overlays._kept)] == ["d"]


def picture_of(folder):
    with Image.open(folder / "overlays.png") as picture:
        return np.asarray(picture.convert("RGB"))


def test_picture_holds_the_colours_of_the_errors(tmp_path, trainer, net, loader):
    # A network that predicts from the noise makes every kind of error.
    settings = {"folder": tmp_path, "classes": ["object_$1$"], "activation": "sigmoid"}
    trainer(Overlays(**settings)).test(net(), loader(3, size=40), verbose=False)
    pixels = picture_of(tmp_path).reshape(-1, 3)
    for color in (TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE):
        near = np.abs(pixels.astype(int) - parse_color(color)).max(1) < 40
        assert near.sum() > 500, color


def test_objects_of_a_pixel_are_drawn_thicker_where_a_pixel_is_small(tmp_path):
    def reddish(*objects):
        mask = torch.zeros(1, 400, 400, dtype=torch.uint8)
        for place in objects:
            mask[0][place] = 1
        case = thumbnail(torch.zeros(1, 400, 400), mask, -torch.ones(1, 400, 400))
        draw_overlays(tmp_path / "a.png", [case], ["a"], [(255, 0, 0)], dense=False, title="", labels={})
        with Image.open(tmp_path / "a.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        size = pixels.shape[1] // 4  # the second panel has the truth, below the legend
        truth = pixels[-450:, size : 2 * size]
        return ((truth[..., 0] > 20) & (truth[..., 1:].sum(-1) == 0)).sum()

    square = (slice(300, 320), slice(300, 320))
    assert reddish(square) == 400
    assert reddish(square, (100, 100)) == 400 + 9
    assert reddish(square, (100, slice(100, 110))) == 400 + 3 * 12


def test_rows_of_different_sizes_and_many_classes(tmp_path):
    classes = [f"class with a long name {i}" for i in range(40)]
    cases = []
    for high, wide in ((30, 50), (500, 100), (7, 400)):
        mask = torch.randint(0, 40, (high, wide))
        logits = torch.randn(40, high, wide)
        cases.append(thumbnail(torch.randn(3, high, wide), mask, logits, activation="softmax"))
    path = tmp_path / "overlays.png"
    draw_overlays(path, cases, classes, class_colors(40), dense=True, title="3 cases", labels={})
    with Image.open(path) as picture:
        assert picture.width < 4 * 512 + 100


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"colors": ["#FF0000"]}, "colors must have one entry for each of the 2 classes, got 1"),
        ({"colors": ["red", "blue"]}, "colors must be '#RRGGBB' or .* got 'red'"),
        ({"colors": [[1, 2, 300], [0, 0, 0]]}, "got \\[1, 2, 300\\]"),
        ({"count": 0}, "count must be at least 1"),
    ],
)
def test_settings_are_checked(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        Overlays(tmp_path, ["a", "b"], "sigmoid", **kwargs)
