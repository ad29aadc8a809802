from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image

from lightning_dice.callbacks import log_picture


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGBA", (8, 5), "#ff0000").save(path)
    return path


def on(*loggers, rank_zero=True):
    return SimpleNamespace(loggers=loggers, is_global_zero=rank_zero, global_step=7)


def test_wandb(picture):
    logger = MagicMock(spec=["log_image", "experiment"])
    log_picture(on(logger), "curves", picture)
    logger.log_image.assert_called_once_with(key="curves", images=[str(picture)])


def test_tensorboard(picture):
    logger = SimpleNamespace(experiment=MagicMock(spec=["add_image"]))
    log_picture(on(logger), "curves", picture)
    (name, pixels, step), kwargs = logger.experiment.add_image.call_args
    assert (name, pixels.shape, pixels.dtype, step, kwargs) == (
        "curves",
        (5, 8, 3),
        np.uint8,
        7,
        {"dataformats": "HWC"},
    )


def test_mlflow(picture):
    # Its client has a log_image too, with other arguments.
    logger = SimpleNamespace(experiment=MagicMock(spec=["log_artifact", "log_image"]), run_id="1f")
    log_picture(on(logger), "curves", picture)
    logger.experiment.log_artifact.assert_called_once_with("1f", str(picture), "pictures")
    logger.experiment.log_image.assert_not_called()


def test_comet(picture):
    logger = SimpleNamespace(experiment=MagicMock(spec=["log_image"]))
    log_picture(on(logger), "curves", picture)
    logger.experiment.log_image.assert_called_once_with(image_data=str(picture), name="curves", step=7)


def test_loggers_without_pictures_are_skipped(picture):
    last = MagicMock(spec=["log_image"])
    log_picture(on(SimpleNamespace(experiment=object()), object(), last), "curves", picture)
    last.log_image.assert_called_once()


def test_other_ranks_log_nothing(picture):
    logger = MagicMock(spec=["log_image"])
    log_picture(on(logger, rank_zero=False), "curves", picture)
    logger.log_image.assert_not_called()


def test_a_logger_that_fails_is_a_warning(picture):
    logger = MagicMock(spec=["log_image"])
    logger.log_image.side_effect = ConnectionError("no network")
    other = MagicMock(spec=["log_image"])
    with pytest.warns(UserWarning, match="did not take the picture .*no network"):
        log_picture(on(logger, other), "curves", picture)
    other.log_image.assert_called_once()


def test_curves_reach_lightnings_tensorboard(tmp_path, trainer, net, loader):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from lightning_dice.callbacks import History, Overlays

    logger = TensorBoardLogger(tmp_path, name="", version="")
    callbacks = [History(tmp_path), Overlays(tmp_path, ["object"], "sigmoid")]
    session = trainer(*callbacks, logger=logger, max_epochs=1, log_every_n_steps=1)
    session.fit(net(), loader(), loader())
    session.test(net(), loader(), verbose=False)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["curves", "test/overlays"]
