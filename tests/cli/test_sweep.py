"""Sweeps, run as a user runs them: trials that fail, sweeps that are killed and go on, and what is written of them."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from helpers import LEAN, SMALL, Forked, fork_command, refused, rows, run_command, start_command
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from lightning_dice.callbacks import MedianPruner
from lightning_dice.cli import sweep, trial_process, trial_tables
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.launcher import Launcher
from lightning_dice.extras import MissingExtra
from lightning_dice.plotting.sweep_chart import trials_figure
from lightning_dice.trials import Trial, best_first, read_trial, read_trials, record_outcome, write_trial

# A callback of the user's own: notes each rank's config, fails and kills as the environment says.
PROBE = """
import hashlib, json, os, pathlib, signal
from lightning.pytorch import Callback

class Probe(Callback):
    def on_fit_start(self, trainer, pl_module):
        self.folder = pathlib.Path(trainer.default_root_dir)
        config = next(c.config for c in trainer.callbacks if hasattr(c, "config"))
        text = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        (self.folder / f"rank{trainer.global_rank}").write_text(text)

    def on_train_epoch_start(self, trainer, pl_module):
        here = f"{self.folder.name}/{trainer.current_epoch}"
        if os.environ.get("PROBE_FAIL") == here and trainer.global_rank == trainer.world_size - 1:
            raise RuntimeError("no luck")
        if os.environ.get("PROBE_KILL") == here:
            os.killpg(os.getpgrp(), signal.SIGKILL)
"""


def outcome(sweep: Path) -> list[dict[str, str]]:
    """The table without what differs from one day to the other."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(sweep / "trials.csv")]


@pytest.fixture
def home(tmp_path):
    """Where the callback can be imported from."""
    (tmp_path / "probe.py").write_text(PROBE)
    return tmp_path


PROBED = ["+callbacks.probe._target_=probe.Probe"]


class TestFailures:
    @pytest.fixture(scope="class")
    @classmethod
    def failed(cls, tmp_path_factory):
        """A sweep whose second trial has failed; for reading only."""
        home = tmp_path_factory.mktemp("failed")
        settings = ["trainer.max_epochs=1", "loss.smooth=0.1,-1,1", "folder=f"]
        told = run_command("fit", "-m", *SMALL, *LEAN, *settings, cwd=home, status=1)
        assert "trial 1 failed" in told.err
        assert "best trial" in told.out
        return home / "f"

    @pytest.fixture
    def sweep(self, failed, tmp_path):
        """A copy of it."""
        return shutil.copytree(failed, tmp_path / "f")

    def test_are_recorded_and_the_sweep_goes_on(self, failed):
        table = rows(failed / "trials.csv")
        assert [row["status"] for row in table] == ["finished", "failed", "finished"]
        assert [row["loss.smooth"] for row in table] == ["0.1", "-1", "1"]
        assert "smooth must be a number of pixels >= 0" in table[1]["error"]
        assert "Traceback" in (failed / "1" / "error.txt").read_text()
        best = max(float(row["val/dice"]) for row in rows(failed / "0" / "metrics.csv"))
        assert float(table[0]["val/dice"]) == pytest.approx(best, abs=1e-6)

    def test_a_sweep_that_is_done_shows_its_table(self, sweep):
        before = (sweep / "0" / "trial.json").read_bytes()
        told = run_command("fit", "resume=f", cwd=sweep.parent, status=1).out
        assert "failed: " in told
        assert "Launching" not in told
        assert (sweep / "0" / "trial.json").read_bytes() == before

    def test_are_tried_again_only_when_asked(self, sweep):
        finished = (sweep / "0" / "trial.json").read_bytes()
        told = run_command("fit", "resume=f", "retry_failed=true", cwd=sweep.parent, status=1)
        assert "trial 1 failed" in told.err
        assert "trial 0 is finished, as recorded" in told.out
        assert read_trial(sweep / "1.1").status == "failed"
        assert (sweep / "0" / "trial.json").read_bytes() == finished
        assert [trial.number for trial in read_trials(sweep)] == [0, 1, 2]

    def test_other_overrides_are_refused(self, sweep):
        told = refused("fit", "resume=f", "loss.smooth=3", cwd=sweep.parent)
        assert "loss.smooth=3: a sweep is resumed as it was started" in told

    def test_a_trial_keeps_what_is_swept(self, sweep):
        told = refused("fit", f"resume={sweep / '0'}", "loss.smooth=3", cwd=sweep.parent)
        assert "loss.smooth=3: " in told
        assert "is a trial of a sweep over loss.smooth, and keeps its value" in told
        run_command("fit", f"resume={sweep / '0'}", "trainer.max_epochs=2", cwd=sweep.parent)
        assert len(rows(sweep / "0" / "metrics.csv")) == 2

    def test_nothing_is_overwritten(self, sweep):
        told = refused("fit", "-m", *SMALL, "loss.smooth=3,4", "folder=f", cwd=sweep.parent)
        assert "exists, and nothing is overwritten" in told
        assert len(read_trials(sweep)) == 3

    def test_a_run_after_it_in_the_same_process_is_no_trial(self, sweep):
        run_command("fit", "resume=f", cwd=sweep.parent, status=1)
        told = run_command("fit", *SMALL, "--cfg", "job", cwd=sweep.parent)
        assert "trial" not in told.err
        assert "best trial" not in told.out

    def test_a_typo_leaves_no_folder(self, tmp_path):
        told = refused("fit", "-m", *SMALL, "loss.smoth=1,2", "folder=typo", cwd=tmp_path, status=1)
        assert "did you mean smooth?" in told
        assert not (tmp_path / "typo").exists()


@pytest.mark.process
class TestResuming:
    SWEEP = ("-m", *SMALL, *LEAN, *PROBED, "trainer.max_epochs=2", "optimizer.lr=0.1,0.01,0.03")

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, tmp_path_factory):
        """The outcome of a sweep that nothing interrupted."""
        home = tmp_path_factory.mktemp("whole")
        (home / "probe.py").write_text(PROBE)
        fork_command("fit", *cls.SWEEP, "folder=whole", cwd=home)
        return outcome(home / "whole")

    def test_a_killed_sweep_ends_as_the_uninterrupted_one(self, home, whole):
        fork_command("fit", *self.SWEEP, "folder=killed", cwd=home, status=-signal.SIGKILL, PROBE_KILL="1/1")
        assert read_trial(home / "killed" / "1").status == "running"
        assert not (home / "killed" / "2").exists()
        told = fork_command("fit", f"resume={home / 'killed'}", cwd=home.parent).out
        assert "trial 0 is finished, as recorded" in told
        assert "resuming from epoch" in told
        assert outcome(home / "killed") == whole
        assert [row["status"] for row in whole] == ["finished"] * 3

    def test_a_trial_without_a_checkpoint_begins_anew(self, home, whole):
        fork_command("fit", *self.SWEEP, "folder=early", cwd=home, status=-signal.SIGKILL, PROBE_KILL="0/0")
        fork_command("fit", "resume=early", cwd=home)
        assert outcome(home / "early") == whole

    def test_ctrl_c_ends_the_sweep(self, tmp_path):
        long = ["trainer.max_epochs=100000", "loss.smooth=1,2", "folder=stopped"]
        process = Forked("fit", "-m", *SMALL, *LEAN, *long, cwd=tmp_path)
        for _ in range(600):
            if (tmp_path / "stopped" / "0" / "metrics.csv").is_file():
                break
            time.sleep(0.1)
        # While it runs, nobody else may go on with it.
        assert "is still running" in refused("fit", "resume=stopped", cwd=tmp_path)
        process.send_signal(signal.SIGINT)
        assert "continue with: resume=" in process.wait(130).err
        assert [trial.status for trial in read_trials(tmp_path / "stopped")] == ["running"]


@pytest.mark.slow
@pytest.mark.process
def test_trials_on_two_processes(home):
    """In the second trial one of the two processes fails, and Lightning kills the other: the sweep goes on."""
    two = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.max_epochs=1", "hydra/sweeper=search"]
    search = ["hydra.sweeper.n_trials=2", "loss.smooth=tag(log,interval(1e-5,100))", "folder=two"]
    fork_command("fit", "-m", *SMALL, *LEAN, *PROBED, *two, *search, cwd=home, status=1, PROBE_FAIL="1/0")
    table = outcome(home / "two")
    assert [row["status"] for row in table] == ["finished", "failed"]
    assert table[1]["error"] == "RuntimeError: no luck"
    # Both were given the same config, and each trial another one.
    configs = [{(home / "two" / trial / f"rank{rank}").read_text() for rank in range(2)} for trial in "01"]
    assert [len(given) for given in configs] == [1, 1]
    assert configs[0] != configs[1]


def test_a_sweeper_does_not_look_for_the_worst():
    config = {"hydra": {"sweeper": {"direction": "minimize"}}, "callbacks": {"checkpoint": {"mode": "max"}}}
    with pytest.raises(UserError, match=r"hydra\.sweeper\.direction must be maximize"):
        sweep._check_direction(OmegaConf.create(config))
    config["callbacks"]["checkpoint"]["mode"] = "min"
    sweep._check_direction(OmegaConf.create(config))


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("launcher", [["joblib", "hydra.launcher.n_jobs=2"], ["submitit_local"]], ids=lambda x: x[0])
def test_trials_side_by_side(tmp_path, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher[0].removesuffix('_local')}_launcher")
    name, *settings = launcher
    few = ["data.num_workers=1", "trainer.max_epochs=1", "folder=f", "loss.smooth=-1,0.5"]
    launched = ["-m", *SMALL, *LEAN, *few, f"hydra/launcher={name}", *settings]
    # The threads of joblib outlive a forked process.
    start = start_command if name == "joblib" else fork_command
    told = start("fit", *launched, cwd=tmp_path, status=1).out
    assert [row["status"] for row in rows(tmp_path / "f" / "trials.csv")] == ["failed", "finished"]
    assert "best trial" in told
    assert "smooth: 0.5\n" in (tmp_path / "f" / "1" / "config.yaml").read_text()


def test_a_missing_plugin_is_named(monkeypatch):
    for name in ("optuna", "hydra_plugins.hydra_joblib_launcher", "hydra_plugins.hydra_submitit_launcher"):
        monkeypatch.setitem(sys.modules, name, None)
    for argument in ("hydra/sweeper=search", "hydra/launcher=joblib", "hydra/launcher=submitit_slurm"):
        with pytest.raises(MissingExtra, match=rf"{argument} needs .*: pip install 'lightning-dice\[sweep\]'"):
            sweep.check_plugins([argument])
    sweep.check_plugins(["hydra/launcher=basic", "loss=dice"])


class TestRunTrial:
    def test_a_record_of_another_trial_is_not_overwritten(self, tmp_path):
        write_trial(tmp_path / "3", Trial(3, ["loss.smooth=1"], "finished", value=0.5))
        with pytest.raises(UserError, match=r"trial 3 in .* is loss.smooth=1, but the sweeper now asks for loss.smoo"):
            sweep.run_trial(tmp_path / "3", ["loss.smooth=2"], lambda: None)
        assert read_trial(tmp_path / "3").status == "finished"

    @pytest.mark.parametrize(
        ("status", "value"), [("finished", 0.1 + 0.2), ("pruned", 0.25), ("failed", None)], ids=lambda x: str(x)
    )
    def test_what_has_ended_answers_with_its_record(self, tmp_path, status, value):
        write_trial(tmp_path / "0", Trial(0, ["a=1"], status, value=value))
        assert sweep.run_trial(tmp_path / "0", ["a=1"], lambda: pytest.fail("trained again")) == value

    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (MemoryError("CUDA out of\nmemory"), "MemoryError: CUDA out of"),
            (UserError("data.root is\nwrong"), "data.root is wrong"),
            (SystemExit(2), "exit status 2"),
        ],
        ids=["exception", "user", "exit"],
    )
    def test_failures(self, tmp_path, error, told):
        def train():
            raise error

        assert sweep.run_trial(tmp_path / "0", ["a=1"], train) is None
        trial = read_trial(tmp_path / "0")
        assert (trial.status, trial.error) == ("failed", told)
        assert "in train" in (tmp_path / "0" / "error.txt").read_text()
        assert rows(tmp_path / "trials.csv")[0]["error"] == told

    @pytest.mark.parametrize(
        ("error", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)], ids=["ctrl-c", "sigterm"]
    )
    def test_interrupts_end_the_sweep(self, tmp_path, error, code):
        def train():
            raise error

        with pytest.raises(SystemExit) as info:
            sweep.run_trial(tmp_path / "0", ["a=1"], train)
        assert info.value.code == code
        assert read_trial(tmp_path / "0").status == "running"

    def test_a_training_without_a_result_has_failed(self, tmp_path):
        assert sweep.run_trial(tmp_path / "0", ["a=1"], lambda: None) is None
        assert "without a result" in read_trial(tmp_path / "0").error

    def test_what_was_lost_in_writing_a_record_begins_anew(self, tmp_path):
        for number, lost in enumerate((".trial.123.part.json", "trial.json")):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / lost).write_text("")

            def train(folder=folder):
                record_outcome(folder, "finished", value=0.5)

            assert sweep.run_trial(folder, ["a=1"], train) == 0.5

    def test_a_failure_that_takes_other_processes_along_ends_the_sweep(self, tmp_path):
        def fail():
            raise RuntimeError("boom")

        with pytest.raises(SystemExit) as caught:
            sweep.run_trial(tmp_path / "0", ["a=1"], fail, shared=lambda: True)
        assert caught.value.code == 1
        assert read_trial(tmp_path / "0").status == "failed"
        assert sweep.run_trial(tmp_path / "1", ["a=1"], fail) is None

    @pytest.mark.process
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
    def test_signals_reach_the_process_of_a_trial(self, number):
        code = f"import signal, time; signal.signal({int(number)}, lambda *_: exit(7)); print('ready', flush=True)\n"
        child = subprocess.Popen([sys.executable, "-c", code + "time.sleep(60)"], stdout=subprocess.PIPE)
        child.stdout.readline()
        signals: list[int] = []
        with trial_process._forward_signals(child, signals):
            os.kill(os.getpid(), number)
            assert child.wait(timeout=30) == 7
        assert signals == [number]
        child.stdout.close()


@pytest.mark.parametrize("name", ['a "quoted" one', "a\\b", "with $ and {braces}"])
def test_a_sweep_in_any_folder_is_reopened(tmp_path, name, monkeypatch):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    monkeypatch.setattr(sweep, "_current", None)
    opened = sweep.Sweep(tmp_path / name)
    (tmp_path / name).mkdir()
    opened.save(version="0", cwd=None, arguments=["-m", "a=1,2"], finished=False)
    arguments = sweep.replay_arguments(tmp_path / name)
    sweep._current._lock.close()
    override = OverridesParser.create().parse_override(arguments[-1])
    assert override.value() == str(tmp_path / name)


def test_a_sweep_is_resumed_where_it_was_started_and_the_process_returns(tmp_path, monkeypatch):
    """As in a notebook, which goes on afterwards."""
    for name in ("sweep", "there", "here"):
        (tmp_path / name).mkdir()
    settings = {"version": "0", "arguments": ["-m", "a=1,2"], "finished": False}
    sweep.Sweep(tmp_path / "sweep").save(cwd=str(tmp_path / "there"), **settings)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here"), *sys.path])
    before, seen = list(sys.path), []
    launcher = Launcher(lambda *_: None, [])
    monkeypatch.setattr(launcher, "compose", lambda _: seen.append((Path.cwd(), sys.path[0])))
    launcher.resume_sweep(str(tmp_path / "sweep"), [])
    sweep.release()
    assert seen == [(tmp_path / "there", str(tmp_path / "there"))]
    assert Path.cwd() == tmp_path / "here"
    assert sys.path == before


class TestTables:
    TRIALS = (
        Trial(0, ["loss=dice", "loss.smooth=1e-5", "seed=0"], "finished", 0.5, "val/dice", "max", 8, 61.04),
        Trial(1, ["loss=tversky", "loss.smooth=1", "seed=0"], "pruned", 0.25, "val/dice", "max", 2, 10.0),
        Trial(2, ["loss=dice", "loss.smooth=1000", "seed=0"], "failed", error="no luck, at all"),
        Trial(3, ["loss=dice", "loss.smooth=10", "seed=0"], "finished", 0.75, "val/dice", "max", 8, 3700.0),
        Trial(4, ["loss=dice", "loss.smooth=5", "seed=0"], "running", None),
    )

    @pytest.fixture
    def folder(self, tmp_path):
        for trial in self.TRIALS:
            write_trial(tmp_path / str(trial.number), trial)
        write_trial(tmp_path / "2.1", Trial(2, ["loss=dice"], "failed"))  # Set aside.
        return tmp_path

    def test_csv(self, folder):
        trial_tables.write_tables(folder)
        assert (folder / "trials.csv").read_text() == (
            "number,status,val/dice,seconds,epochs,loss,loss.smooth,error\n"
            "0,finished,0.5,61.0,8,dice,1e-5,\n"
            "1,pruned,0.25,10.0,2,tversky,1,\n"
            '2,failed,,0.0,,dice,1000,"no luck, at all"\n'
            "3,finished,0.75,3700.0,8,dice,10,\n"
            "4,running,,0.0,,dice,5,\n"
        )

    def test_what_was_asked_for_has_a_column_also_if_it_does_not_differ(self, folder):
        sweep.Sweep(folder).save(arguments=[], swept=["seed", "loss"])
        assert trial_tables.swept_parameters(folder, read_trials(folder)) == ["seed", "loss", "loss.smooth"]

    def test_picture(self, folder):
        trial_tables.write_tables(folder)
        with Image.open(folder / "trials.png") as picture:
            assert picture.width > 1000

    def test_picture_shows_every_trial_against_every_parameter(self):
        nan = Trial(5, ["loss=dice", "loss.smooth=2"], "finished", float("nan"), "val/dice")
        figure = trials_figure([*self.TRIALS, nan], ["loss", "loss.smooth"])
        trials, loss, smooth = [axes for axes in figure.axes if axes.get_visible()]

        def drawn(axes, label):
            (line,) = [line for line in axes.lines if line.get_label() == label]
            return [tuple(point) for point in line.get_xydata()]

        assert drawn(trials, "finished") == [(0, 0.5), (3, 0.75)]
        assert drawn(trials, "pruned") == [(1, 0.25)]
        assert [place for place, _ in drawn(trials, "failed")] == [2]
        assert drawn(trials, "best so far") == [(0, 0.5), (1, 0.5), (3, 0.75), (5, 0.75)]
        assert drawn(smooth, "finished") == [(1e-5, 0.5), (10, 0.75)]
        assert smooth.get_xscale() == "log"
        assert [label.get_text() for label in loss.get_xticklabels()] == ["dice", "tversky"]
        assert [round(place) for place, _ in drawn(loss, "finished")] == [0, 0]
        assert [round(place) for place, _ in drawn(loss, "pruned")] == [1]
        assert (trials.get_ylabel(), smooth.get_xlabel()) == ("val/dice", "loss.smooth")

    @pytest.mark.parametrize("trials", [[], [Trial(0, ["a=1"], "failed")], [Trial(0, [], "finished", float("nan"))]])
    def test_pictures_of_hardly_anything(self, tmp_path, trials):
        for trial in trials:
            write_trial(tmp_path / str(trial.number), trial)
        trial_tables.write_tables(tmp_path)
        assert (tmp_path / "trials.png").stat().st_size > 0

    def test_best_first(self, folder):
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(trial_tables.trial_table(folder, self.TRIALS, ["loss", "loss.smooth"]))
        told = console.export_text()
        lines = [line.split() for line in told.splitlines() if line.strip()[:1].isdigit()]
        assert [line[0] for line in lines] == ["3", "0", "1", "2", "4"]
        assert lines[0] == ["3", "0.7500", "dice", "10", "8", "1:01:40", "finished"]
        assert lines[-1][-1] == "interrupted"
        assert "failed: no luck, at all" in told
        assert "best trial" in told

    def test_least_first_where_less_is_better(self):
        trials = [Trial(n, [], "finished", value, "val/loss", "min") for n, value in enumerate([0.5, 0.25, 0.75])]
        assert [trial.number for trial in best_first(trials)] == [1, 0, 2]


def write_history(folder: Path, scores: list[float | None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{epoch},{'' if score is None else score}" for epoch, score in enumerate(scores)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,val/dice", *lines]) + "\n")


def write_finished(sweep: Path, number: int, scores: list[float | None], status: str = "finished") -> None:
    write_trial(sweep / str(number), Trial(number, [], status))
    write_history(sweep / str(number), scores)


class TestMedianPruner:
    @pytest.fixture
    def sweep(self, tmp_path):
        # At epoch 1: 0.2, 0.4, 0.6; the pruned and the failed one do not count.
        write_finished(tmp_path, 0, [0.9, 0.2, 0.9])
        write_finished(tmp_path, 1, [0.9, 0.4, 0.9])
        write_finished(tmp_path, 2, [0.9, 0.6, None])
        write_finished(tmp_path, 3, [0.99, 0.99], "pruned")
        write_finished(tmp_path, 4, [0.99, 0.99], "failed")
        write_trial(tmp_path / "5", Trial(5, []))
        return tmp_path

    @pytest.mark.parametrize(
        ("best", "epoch", "settings", "pruned"),
        [
            (0.39, 1, {}, True),
            (0.4, 1, {}, False),
            (0.41, 1, {}, False),
            (0.89, 2, {}, True),
            (0.1, 3, {}, False),
            (0.39, 1, {"startup_trials": 4}, False),
            (0.39, 1, {"warmup_epochs": 2}, False),
            (0.89, 2, {"warmup_epochs": 2}, True),
            (0.39, 1, {"mode": "min"}, False),
            (0.41, 1, {"mode": "min"}, True),
            (float("nan"), 1, {}, True),
            (0.1, 1, {"monitor": "val/loss"}, False),
        ],
        ids=[
            *("below", "equal", "above", "those that validated", "longer than the others"),
            *("too few trials", "warming up", "warm", "less is better", "more is worse", "nan", "nobody has it"),
        ],
    )
    def test_against_the_median_at_the_epoch(self, sweep, best, epoch, settings, pruned):
        pruner = MedianPruner(sweep / "5", **{"startup_trials": 3, **settings})
        assert (pruner.reason(epoch, best) is not None) == pruned

    def test_a_run_that_is_no_trial_is_left_alone(self, sweep):
        (sweep / "6").mkdir()
        assert MedianPruner(sweep / "6", startup_trials=1).reason(1, 0.0) is None

    @pytest.mark.parametrize("mode", ["max", "min"])
    def test_is_optunas(self, tmp_path, mode):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SQLAlchemy's and Optuna's, of themselves.
            optuna = pytest.importorskip("optuna")
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            import random

            draw = random.Random(0)
            decisions = []
            for turn in range(40):
                sweep = tmp_path / str(turn)
                pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1)
                study = optuna.create_study(direction=f"{mode}imize", pruner=pruner)
                for number in range(draw.randint(2, 6)):
                    scores = [round(draw.random(), 2) for _ in range(draw.randint(1, 4))]
                    state = draw.choice(["COMPLETE", "COMPLETE", "COMPLETE", "FAIL"])
                    study.add_trial(
                        optuna.trial.create_trial(
                            state=optuna.trial.TrialState[state],
                            value=scores[-1] if state == "COMPLETE" else None,
                            intermediate_values=dict(enumerate(scores)),
                        )
                    )
                    write_finished(sweep, number, scores, {"COMPLETE": "finished", "FAIL": "failed"}[state])
                write_trial(sweep / "99", Trial(99, []))
                ours, theirs = MedianPruner(sweep / "99", mode=mode, startup_trials=3, warmup_epochs=1), study.ask()
                best = None
                for epoch in range(4):
                    score = round(draw.random(), 2)
                    best = score if best is None else (max if mode == "max" else min)(best, score)
                    theirs.report(score, epoch)
                    decisions.append(theirs.should_prune())
                    assert (ours.reason(epoch, best) is not None) == decisions[-1]
        assert 10 < sum(decisions) < len(decisions) - 10

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"mode": "best"}, "mode must be one of 'max', 'min', got 'best'"),
            ({"startup_trials": -1}, "startup_trials must be an integer >= 0, got -1"),
            ({"warmup_epochs": 0.5}, r"warmup_epochs must be an integer >= 0, got 0\.5"),
        ],
    )
    def test_refuses(self, settings, message):
        with pytest.raises(ValueError, match=message):
            MedianPruner("x", **settings)

    def test_remembers_its_best_score(self):
        one, two = MedianPruner("x"), MedianPruner("x")
        one._best, one.pruned = 0.5, True
        state = one.state_dict()
        two.load_state_dict(json.loads(json.dumps(one.state_dict())))
        assert (two._best, two.pruned) == (0.5, True)
        # A version before 0.3 did not save what had decided it.
        two.load_state_dict({"best": 0.25, "pruned": True})
        assert (two._best, two.pruned) == (0.25, True)
        three = MedianPruner("x", startup_trials=9)
        three.load_state_dict(state)
        assert (three._best, three.pruned) == (0.5, False)
        four = MedianPruner("x", "val/loss", "min")
        four.load_state_dict(state)
        assert math.isnan(four._best)
        assert not four.pruned

    @pytest.mark.slow
    def test_a_sweep(self, tmp_path, monkeypatch):
        monkeypatch.setattr("lightning_dice.plotting.report_plots.figure_url", lambda figure: "data:,")
        pruning = ["callbacks=[progress_bar,history,checkpoint,case_table,median_pruner]", "logger=none"]
        settings = [f"callbacks.median_pruner.{name}" for name in ("startup_trials=1", "warmup_epochs=1")]
        few = ["trainer.max_epochs=3", "scheduler=constant", "optimizer.lr=0.1,0", "folder=f"]
        told = run_command("fit", "-m", *SMALL, *pruning, *settings, *few, cwd=tmp_path).out
        assert "pruned: the best val/dice up to epoch 1" in told
        first, second = rows(tmp_path / "f" / "trials.csv")
        assert (first["status"], first["epochs"]) == ("finished", "3")
        assert (second["status"], second["epochs"]) == ("pruned", "2")
        assert float(second["val/dice"]) < float(first["val/dice"])
        # A trial without hope is not scored on the test split.
        assert (tmp_path / "f" / "0" / "cases.csv").is_file()
        assert not (tmp_path / "f" / "1" / "cases.csv").is_file()


@pytest.mark.slow
def test_the_experiment_sweeps_by_itself(tmp_path):
    shorter = [*SMALL, *LEAN, "trainer.max_epochs=1", "folder=smoothing"]
    run_command("fit", "experiment=sweep_smoothing", *shorter, cwd=tmp_path)
    table = rows(tmp_path / "smoothing" / "trials.csv")
    assert {(row["loss"], float(row["loss.smooth"])) for row in table} == {
        (loss, smooth) for loss in ("dice", "tversky") for smooth in (1e-5, 1.0, 1000.0)
    }
    assert {row["status"] for row in table} == {"finished"}
