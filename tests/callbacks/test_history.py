import pytest
from helpers import rows
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from training import train

from lightning_dice.callbacks import ExactResume, History
from lightning_dice.plotting import curves


def checkpoint(folder, **kwargs):
    return ModelCheckpoint(folder / "checkpoints", save_last=True, enable_version_counter=False, **kwargs)


def test_one_row_for_each_epoch(tmp_path, trainer, net, loader):
    trainer(History(tmp_path), max_epochs=3).fit(net(), loader(), loader())
    table = rows(tmp_path / "metrics.csv")
    assert [row["epoch"] for row in table] == ["0", "1", "2"]
    assert [row["step"] for row in table] == ["2", "4", "6"]
    assert [float(row["lr"]) for row in table] == [0.1, 0.05, 0.025]
    first = ["epoch", "step", "lr", "seconds", "images_per_second", "memory_gb", "train/loss", "val/loss"]
    assert list(table[0])[:8] == first
    assert float(table[0]["train/loss"]) > float(table[2]["train/loss"])
    assert all(float(row["val/dice"]) == pytest.approx(1 - float(row["val/loss"]), abs=1e-5) for row in table)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert not list(tmp_path.glob(".*"))


def test_what_the_module_logs_at_the_epochs_end_stands_in_that_epochs_row(tmp_path, trainer, net, loader):
    trainer(History(tmp_path), max_epochs=3).fit(net(late_train_dice=True), loader(), loader())
    assert [float(row["train/dice"]) for row in rows(tmp_path / "metrics.csv")] == [0.25, 0.5, 0.75]


def test_no_validation_no_val_metrics(tmp_path, trainer, net, loader):
    trainer(History(tmp_path), max_epochs=4, check_val_every_n_epoch=2).fit(net(), loader(), loader())
    assert [row["val/dice"] != "" for row in rows(tmp_path / "metrics.csv")] == [False, True, False, True]


def test_a_validation_within_an_epoch_has_a_row_of_its_own(tmp_path, trainer, net, loader):
    trainer(History(tmp_path), max_epochs=2, val_check_interval=3).fit(net(), loader(10), loader())
    table = rows(tmp_path / "metrics.csv")
    positions = [(row["epoch"], row["step"], row["train/loss"] != "", row["val/dice"] != "") for row in table]
    assert positions == [
        *(("0", "3", False, True), ("0", "5", True, False)),
        *(("1", "8", False, True), ("1", "10", True, False)),
    ]
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("rows_drawn", "label", "points"),
    [
        ([{"epoch": 0.0}, {"epoch": 1.0}], "epoch", [0, 1]),
        ([{"epoch": 0.0, "time": -0.5}, {"epoch": 0.0}, {"epoch": 1.0, "time": 0.5}], "epochs trained", [0.5, 1, 1.5]),
    ],
)
def test_validations_within_epochs_are_drawn_where_they_were(tmp_path, monkeypatch, rows_drawn, label, points):
    drawn = []
    monkeypatch.setattr(curves, "save_figure", lambda _, figure, __: drawn.append(figure))
    curves.draw_curves(tmp_path / "x.png", [{**row, "val/loss": 0.5} for row in rows_drawn], "val/dice", "max")
    axes = drawn[0].axes[0]
    assert axes.get_xlabel() == label
    assert list(axes.lines[0].get_xdata()) == points


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("interval", [*(pytest.param(every, marks=pytest.mark.slow) for every in (1, 2)), 3])
def test_rows_of_validations_are_the_same_when_resumed_from_any_of_them(tmp_path, interval):
    def callbacks(folder):
        keep_all = ModelCheckpoint(folder, "{step}", save_top_k=-1, monitor="val/dice", save_on_train_epoch_end=False)
        return History(folder), keep_all

    settings = {"epochs": 2, "val_check_interval": interval, "enable_checkpointing": True}
    train(callbacks=callbacks(tmp_path / "whole"), **settings)
    whole = rows(tmp_path / "whole/metrics.csv")
    paths = list((tmp_path / "whole").glob("step=*.ckpt"))
    assert len(paths) == 2 * (4 // interval)
    for path in paths:
        # The table as an interrupted process left it, and as one did that trained to the end.
        for cut in (True, False):
            folder = tmp_path / f"{path.stem}-{cut}"
            folder.mkdir()
            lines = (tmp_path / "whole/metrics.csv").read_text().splitlines()
            done = [line for line in lines[1:] if not cut or int(line.split(",")[1]) <= int(path.stem[5:])]
            (folder / "metrics.csv").write_text("\n".join([lines[0], *done]) + "\n")
            train(checkpoint=path, callbacks=callbacks(folder), **settings)
            resumed = rows(folder / "metrics.csv")
            measured = ("seconds", "images_per_second", "memory_gb")
            for one, two in zip(whole, resumed, strict=True):
                assert one.keys() == two.keys()
                for name in set(one) - set(measured):
                    assert one[name] == two[name], (path.name, cut, one["step"], name)


def test_the_time_of_a_row_in_epochs():
    history = History("nowhere")
    history._rows = {
        key: ({"seconds": "1"} if key in ((0, 5), (1, 10)) else {})
        for key in ((0, 3), (0, 5), (1, 8), (1, 10), (2, 13), (2, 14))
    }
    assert [history._time(*key) for key in history._rows] == pytest.approx([-0.4, 0, 0.6, 1, 1.6, 1.8])


def test_resuming_goes_on_with_the_table(tmp_path, trainer, net, loader):
    trainer(History(tmp_path), checkpoint(tmp_path), max_epochs=2).fit(net(), loader(), loader())
    before = rows(tmp_path / "metrics.csv")
    last = tmp_path / "checkpoints/last.ckpt"
    trainer(History(tmp_path), checkpoint(tmp_path), max_epochs=4).fit(net(), loader(), loader(), ckpt_path=last)
    after = rows(tmp_path / "metrics.csv")
    assert [row["epoch"] for row in after] == ["0", "1", "2", "3"]
    assert after[:2] == before


def test_epochs_trained_again_lose_their_row(tmp_path, trainer, net, loader):
    keep_all = checkpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(History(tmp_path), keep_all, max_epochs=3).fit(net(), loader(), loader())
    table = tmp_path / "metrics.csv"
    table.write_text(table.read_text().replace("\n1,4,", "\n1,999,"))
    first = tmp_path / "checkpoints/epoch=0.ckpt"
    trainer(History(tmp_path), checkpoint(tmp_path), max_epochs=2).fit(net(), loader(), loader(), ckpt_path=first)
    assert [(row["epoch"], row["step"]) for row in rows(tmp_path / "metrics.csv")] == [("0", "2"), ("1", "4")]


def test_an_epoch_that_a_checkpoint_only_ends_again_keeps_its_metrics(tmp_path, trainer, net, loader):
    at_validation = checkpoint(tmp_path, save_on_train_epoch_end=False)
    trainer(History(tmp_path), at_validation, max_epochs=2).fit(net(), loader(), loader())
    before = rows(tmp_path / "metrics.csv")
    last = tmp_path / "checkpoints/last.ckpt"
    again = checkpoint(tmp_path, save_on_train_epoch_end=False)
    trainer(History(tmp_path), again, max_epochs=3).fit(net(), loader(), loader(), ckpt_path=last)
    after = rows(tmp_path / "metrics.csv")
    assert [row["epoch"] for row in after] == ["0", "1", "2"]
    assert after[:2] == before


class Killed(BaseException):
    """Nobody has the time to react."""


class KillsAfterTheRow(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise Killed


@pytest.mark.parametrize("reacts", [True, False], ids=["raised", "killed"])
def test_a_row_never_has_what_an_epoch_before_logged(tmp_path, trainer, net, loader, monkeypatch, reacts):
    if not reacts:
        monkeypatch.setattr(History, "on_exception", lambda *_: None)
    broken = trainer(History(tmp_path), KillsAfterTheRow(), max_epochs=3)
    with pytest.raises(Killed):
        broken.fit(net(late_train_dice=True), loader(), loader())
    table = rows(tmp_path / "metrics.csv")
    assert [row["train/dice"] for row in table] == ["0.25", ""]
    assert all(row["train/loss"] and row["val/dice"] for row in table)


def test_a_row_that_a_killed_process_left_incomplete_is_completed(tmp_path, trainer, net, loader, monkeypatch):
    def callbacks():
        return ExactResume(), History(tmp_path), checkpoint(tmp_path, every_n_train_steps=1)

    with monkeypatch.context() as patched:
        patched.setattr(History, "on_exception", lambda *_: None)
        broken = trainer(*callbacks(), KillsAfterTheRow(), max_epochs=3)
        with pytest.raises(Killed):
            broken.fit(net(late_train_dice=True), loader(), loader())
    last = tmp_path / "checkpoints/last.ckpt"
    trainer(*callbacks(), max_epochs=3).fit(net(late_train_dice=True), loader(), loader(), ckpt_path=last)
    assert [float(row["train/dice"]) for row in rows(tmp_path / "metrics.csv")] == [0.25, 0.5, 0.75]


def test_curves_are_drawn_when_training_breaks_off(tmp_path, trainer, net, loader):
    model = net()
    step = model.training_step

    def training_step(batch, batch_idx):
        if model.current_epoch == 2:
            raise RuntimeError("out of luck")
        return step(batch, batch_idx)

    model.training_step = training_step
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(History(tmp_path), max_epochs=3).fit(model, loader(), loader())
    assert len(rows(tmp_path / "metrics.csv")) == 2
    assert (tmp_path / "curves.png").exists()


def test_mode_is_checked(tmp_path):
    with pytest.raises(ValueError, match="mode must be one of 'max', 'min', got 'best'"):
        History(tmp_path, mode="best")
