"""The checkpoint of the best validation, for any sequence of scores."""

from __future__ import annotations

import math
import os

import pytest
import torch
from helpers import run_ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from squares import Cases, Net, load
from training import differences, train

from lightning_dice.callbacks import BestCheckpoint, ExactResume

NAN = math.nan


class Scored(Net):
    """Logs given scores, one at each validation, and its number of steps as a weight."""

    def __init__(self, scores, rank_scores=None):
        super().__init__()
        self.scores, self.position = list(scores), torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    def on_train_batch_end(self, *_):
        self.position.data += 1

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.log("val/dice", torch.tensor(float(self.scores.pop(0))))


def fit(trainer, folder, scores, *, resume=None, cases=4, callback=None, **settings):
    """Train for an epoch of two steps for each score; returns the callback."""
    settings = {"max_epochs": len(scores), "num_sanity_val_steps": 1} | settings
    callback = callback or BestCheckpoint(folder)
    run = trainer(callback, **settings)
    run.fit(Scored(scores), load(Cases(cases)), load(Cases(2)), ckpt_path=resume)
    return callback


def steps(folder):
    """The steps of the weights in each file."""
    found = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.ckpt")}
    assert all(state["global_step"] == int(state["state_dict"]["position"]) for state in found.values())
    return {name: state["global_step"] for name, state in found.items()}


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.5, 0.7, 0.6], 1),
        ([0.5, 0.7, 0.7], 1),
        ([-0.5, 0.0, -0.1], 1),
        ([NAN, 0.1, NAN], 1),
        ([0.2, NAN, 0.1], 0),
        ([NAN, NAN], 0),
        ([NAN, -math.inf, 0.1], 2),
    ],
)
@pytest.mark.parametrize("top", [1, 2, -1])
def test_the_best_of_scores(tmp_path, trainer, scores, best, top):
    callback = fit(trainer, tmp_path, scores, callback=BestCheckpoint(tmp_path, save_top_k=top))
    assert steps(tmp_path)["best.ckpt"] == 2 * (best + 1)
    assert callback.best_model_path == str(tmp_path / "best.ckpt")
    assert float(callback.best_model_score) == pytest.approx(scores[best], nan_ok=True)
    count = {1: 1, 2: min(2, len(scores)) + 1, -1: len(scores) + 1}[top]
    assert len(steps(tmp_path)) == count


def test_the_least_is_the_best(tmp_path, trainer):
    fit(trainer, tmp_path, [0.5, 0.3, 0.4], callback=BestCheckpoint(tmp_path, mode="min", save_top_k=2))
    assert steps(tmp_path) == {"best.ckpt": 4, "best-epoch=1-step=4.ckpt": 4, "best-epoch=2-step=6.ckpt": 6}


def test_none_is_kept_but_the_score_is_known(tmp_path, trainer):
    callback = fit(trainer, tmp_path, [0.5, 0.7, 0.6], callback=BestCheckpoint(tmp_path, save_top_k=0))
    assert steps(tmp_path) == {}
    assert callback.best_model_path == ""
    assert float(callback.best_model_score) == pytest.approx(0.7)


def test_a_name_without_epoch_or_step_is_that_of_the_best(tmp_path, trainer):
    fit(trainer, tmp_path, [0.5, 0.7, 0.6], callback=BestCheckpoint(tmp_path, filename="top"))
    assert steps(tmp_path) == {"best.ckpt": 4, "top.ckpt": 4}
    fit(trainer, tmp_path / "named", [0.5, 0.7], callback=BestCheckpoint(tmp_path / "named", filename="{val/dice:.1f}"))
    assert (tmp_path / "named/val/dice=0.7.ckpt").samefile(tmp_path / "named/best.ckpt")
    assert not (tmp_path / "named/val/dice=0.5.ckpt").exists()


def test_validations_at_the_same_step(tmp_path, trainer):
    """Between batches whose gradients add up; statistics of the network may change there."""
    # Steps 1 and 2 of the epoch are after batches 2 and 4.
    scores = [0.1, 0.4, 0.6, 0.5]
    fit(trainer, tmp_path, scores, max_epochs=1, cases=8, accumulate_grad_batches=2, val_check_interval=1)
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]["position"] == 3


def test_a_validation_within_an_epoch_is_not_saved_again_at_its_end(tmp_path, trainer):
    fit(trainer, tmp_path, [0.6, 0.5], cases=10, val_check_interval=3, callback=BestCheckpoint(tmp_path, save_top_k=-1))
    assert steps(tmp_path) == {"best.ckpt": 3, "best-epoch=0-step=3.ckpt": 3, "best-epoch=1-step=8.ckpt": 8}


def test_a_metric_of_the_training(tmp_path, trainer, net, loader):
    callback = BestCheckpoint(tmp_path, "train/loss", "min", save_top_k=-1)
    trainer(callback, max_epochs=2).fit(net(), loader(), loader())
    names = sorted(path.name for path in tmp_path.glob("best-*"))
    assert names == ["best-epoch=0-step=2.ckpt", "best-epoch=1-step=4.ckpt"]


def test_without_a_validation_there_is_none(tmp_path, trainer):
    fit(trainer, tmp_path, [0.5], limit_val_batches=0)
    assert steps(tmp_path) == {}


def test_a_metric_that_is_not_logged(tmp_path, trainer, net, loader):
    with pytest.raises(
        ValueError, match=r"monitor must be a logged metric, got 'val/dicee'; logged are loss, train/loss"
    ):
        trainer(BestCheckpoint(tmp_path, "val/dicee"), max_epochs=2).fit(net(), loader(), loader())


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize("top", [1, 2])
def test_resumed_the_score_of_the_checkpoint_is_not_a_new_one(tmp_path, trainer, top):
    last = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True, enable_version_counter=False)

    def callbacks():
        return ExactResume(), BestCheckpoint(tmp_path, save_top_k=top)  # which restores what was logged

    one = trainer(*callbacks(), last, max_epochs=2)
    one.fit(Scored([0.5, 0.7]), load(Cases(4)), load(Cases(2)))
    two = trainer(*callbacks(), max_epochs=4, check_val_every_n_epoch=4)
    two.fit(Scored([0.6]), load(Cases(4)), load(Cases(2)), ckpt_path=tmp_path / "last.ckpt")
    assert steps(tmp_path)["best.ckpt"] == 4
    assert set(steps(tmp_path)) - {"last.ckpt", "best.ckpt"} == (
        set() if top == 1 else {"best-epoch=1-step=4.ckpt", "best-epoch=3-step=8.ckpt"}
    )


def test_the_checkpoint_that_is_resumed_stays(tmp_path, trainer):
    fit(trainer, tmp_path, [0.5, 0.4], callback=BestCheckpoint(tmp_path, save_top_k=2))
    worst = tmp_path / "best-epoch=1-step=4.ckpt"
    callback = BestCheckpoint(tmp_path, save_top_k=2)
    fit(trainer, tmp_path, [0.6, 0.7], resume=worst, max_epochs=4, callback=callback)
    assert set(steps(tmp_path)) == {
        *("best.ckpt", "best-epoch=1-step=4.ckpt", "best-epoch=2-step=6.ckpt", "best-epoch=3-step=8.ckpt")
    }


def test_without_links_the_best_is_a_copy(tmp_path, trainer, monkeypatch):
    def no_links(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    fit(trainer, tmp_path, [0.5, 0.7, 0.6], callback=BestCheckpoint(tmp_path, save_top_k=2))
    assert steps(tmp_path)["best.ckpt"] == 4


class Ranked(Net):
    """Logs another score on each rank."""

    def validation_step(self, batch, batch_idx):
        rank, epoch = self.global_rank, self.current_epoch
        self.log("val/dice", torch.tensor([[0.5, 0.3], [0.4, 0.6], [0.6, 0.2]][epoch][rank]), rank_zero_only=False)


def two_ranks_of_other_scores(folder):
    import lightning.pytorch as pl

    callback = BestCheckpoint(folder, save_top_k=2)
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, callbacks=[callback], **settings)
    trainer.fit(Ranked(), load(Cases(4)), load(Cases(4)))
    return callback.best_model_path, sorted(callback.best_k_models), float(callback.best_model_score)


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*sync_dist")
def test_ranks_agree(tmp_path):
    one, two = run_ranks(two_ranks_of_other_scores, tmp_path).results
    assert one == two
    assert one[2] == pytest.approx(0.6)
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 2


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_checkpoint_of_the_best_validation_resumes_exactly(tmp_path):
    """It is written within the epoch, before the epoch's end."""
    whole = train(callbacks=(BestCheckpoint(tmp_path),), enable_checkpointing=True)
    assert not differences(whole, train(checkpoint=tmp_path / "best.ckpt"))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"save_top_k": -2}, "save_top_k must be a number of checkpoints, or -1 for all, got -2"),
        ({"save_top_k": True}, "save_top_k must be a number of checkpoints, or -1 for all, got True"),
        ({"monitor": None}, "monitor must be the name of a metric, got None"),
        ({"mode": "best"}, "mode must be one of 'max', 'min', got 'best'"),
        ({"every_n_epochs": 2}, "every_n_epochs is no setting of best.ckpt: it is written after a validation"),
        ({"every": 2}, "there is no setting every"),
    ],
)
def test_arguments_are_checked(tmp_path, setting, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        BestCheckpoint(tmp_path, **setting)
