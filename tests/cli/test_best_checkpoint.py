"""best.ckpt is the best validation there was, and the table, the summary and the score are of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import SMALL, rows, run_command

RUN = [
    *(*SMALL, "data.cases={train:40,val:8,test:4}", "data.foreground_fraction=0.2", "data.batch_size=8"),
    *("trainer.max_epochs=6", "optimizer.lr=0.1", "+callbacks.spoil={_target_: training.Spoil, step: 18}"),
    *("logger=none", "callbacks.overlays=null", "callbacks.case_table.surfaces=false"),
]
SETTINGS = {
    "default": [],
    "top-3": ["callbacks.checkpoint.save_top_k=3"],
    "all": ["callbacks.checkpoint.save_top_k=-1"],
    "named": ["callbacks.checkpoint.save_top_k=2", "callbacks.checkpoint.filename='{epoch}-{val/loss:.3f}'"],
    "least-loss": ["callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.mode=min"],
    "twice-an-epoch": ["++trainer.val_check_interval=0.5"],
    "not-at-the-epochs-end": ["++trainer.val_check_interval=3"],
    "by-steps": ["++trainer.val_check_interval=3", "trainer.check_val_every_n_epoch=null"],
    "every-second-epoch": ["trainer.check_val_every_n_epoch=2"],
    "average": ["callbacks=ema", "callbacks.ema.decay=0.5", "callbacks.overlays=null"],
    "training-loss": ["callbacks.checkpoint.monitor=train/loss", "callbacks.checkpoint.mode=min"],
}
QUICK = {"top-3", "by-steps", "least-loss"}


def position(path: Path) -> tuple[str, str]:
    saved = torch.load(path, weights_only=True)
    return str(saved["epoch"]), str(saved["global_step"])


def printed(out: str, name: str) -> list[str]:
    found = re.search(rf"^ {name} +([\d.]+)(?: +([\d.]+))? *$", out, re.MULTILINE)
    assert found is not None, out
    return [value for value in found.groups() if value is not None]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_the_best_validation_is_kept_printed_and_scored(tmp_path, name):
    settings = SETTINGS[name]
    result = run_command("fit", *RUN, *settings, "folder=run", cwd=tmp_path)
    folder, best = tmp_path / "run", tmp_path / "run/checkpoints/best.ckpt"
    monitor = next((text.partition("=")[2] for text in settings if "checkpoint.monitor" in text), "val/dice")
    sign = -1 if "loss" in monitor else 1
    table = [row for row in rows(folder / "metrics.csv") if row[monitor]]
    scores = [sign * float(row[monitor]) for row in table]
    row = table[scores.index(max(scores))]
    if monitor != "train/loss":
        assert row is not table[-1], "the last validation is the best: the test shows nothing"
    assert (row["epoch"], row["step"]) == position(best)
    assert f"best epoch: {row['epoch']}" in result.out
    assert (f", step {row['step']}" in result.out) == (row["seconds"] == "")
    # The weights are those of that validation, and of the score.
    for split, value in (("val", float(row["val/dice"])), ("test", float(printed(result.out, "dice")[1]))):
        again = run_command("evaluate", "run=run", f"split={split}", f"output={split}", "device=cpu", cwd=tmp_path)
        shown = float(printed(again.out, "dice")[0])
        assert shown == pytest.approx(value, abs=1e-4), split
    assert float(printed(result.out, "dice")[0]) == pytest.approx(float(row["val/dice"]), abs=1e-4)


def test_the_files_of_the_three_best(tmp_path):
    run_command("fit", *RUN, "+callbacks.checkpoint.save_top_k=3", "test=false", "folder=run", cwd=tmp_path)
    scored = sorted(rows(tmp_path / "run/metrics.csv"), key=lambda row: -float(row["val/dice"]))
    files = {path.name: position(path) for path in (tmp_path / "run/checkpoints").glob("best*.ckpt")}
    named = {f"best-epoch={row['epoch']}-step={row['step']}.ckpt": (row["epoch"], row["step"]) for row in scored[:3]}
    assert files == named | {"best.ckpt": (scored[0]["epoch"], scored[0]["step"])}


def test_with_no_checkpoint_to_keep_the_last_is_scored(tmp_path):
    arguments = [*RUN, "trainer.max_epochs=2", "callbacks.checkpoint.save_top_k=0", "folder=run"]
    result = run_command("fit", *arguments, cwd=tmp_path)
    assert "no best checkpoint with callbacks.checkpoint.save_top_k=0: scoring the last one" in result.out
    assert "best epoch" not in result.out
    assert not (tmp_path / "run/checkpoints/best.ckpt").exists()
    last = rows(tmp_path / "run/metrics.csv")[-1]
    assert float(printed(result.out, "dice")[0]) == pytest.approx(float(last["val/dice"]), abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["callbacks.checkpoint.save_top_k=3"],
        pytest.param(["++trainer.val_check_interval=0.5"], marks=pytest.mark.slow),
    ],
    ids=["default", "top-3", "twice-an-epoch"],
)
def test_a_resumed_run_keeps_the_best_of_both_parts(tmp_path, settings):
    run_command("fit", *RUN, *settings, "folder=whole", cwd=tmp_path)
    run_command("fit", *RUN, *settings, "trainer.max_epochs=4", "folder=parts", cwd=tmp_path)
    result = run_command("fit", "resume=parts", "trainer.max_epochs=6", cwd=tmp_path)
    one, two = tmp_path / "whole/checkpoints", tmp_path / "parts/checkpoints"
    assert {path.name: position(path) for path in one.glob("best*")} == {
        path.name: position(path) for path in two.glob("best*")
    }
    assert f"best epoch: {position(two / 'best.ckpt')[0]}" in result.out


@pytest.mark.parametrize(("before", "after"), [pytest.param(1, 3, marks=pytest.mark.slow), (3, 1)])
def test_the_number_of_checkpoints_changes_on_resume(tmp_path, before, after):
    key = "callbacks.checkpoint.save_top_k"
    run_command("fit", *RUN, f"{key}={before}", "trainer.max_epochs=3", "test=false", "folder=run", cwd=tmp_path)
    run_command("fit", "resume=run", f"{key}={after}", "trainer.max_epochs=6", cwd=tmp_path)
    table = rows(tmp_path / "run/metrics.csv")
    best = max(table, key=lambda row: float(row["val/dice"]))
    assert position(tmp_path / "run/checkpoints/best.ckpt") == (best["epoch"], best["step"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("every_n_train_steps=5", "every_n_train_steps is no setting of best.ckpt: it is written after a validation"),
        ("save_last=true", "save_last is no setting of best.ckpt: callbacks.last_checkpoint writes last.ckpt"),
        ("save_top_k=1.5", "save_top_k must be a number of checkpoints, or -1 for all, got 1.5"),
        ("every=5", "there is no setting every"),
    ],
)
def test_a_setting_that_it_does_not_have(tmp_path, setting, words):
    error = run_command("fit", *RUN, f"++callbacks.checkpoint.{setting}", cwd=tmp_path, status=2).err
    assert f"callbacks.checkpoint: {words}" in error
