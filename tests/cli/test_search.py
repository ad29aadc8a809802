"""The search sweeper: what Optuna asks for becomes trials, and what comes of them is told to Optuna."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from helpers import rows
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from lightning_dice.cli import launcher, search, sweep
from lightning_dice.cli.command import command_line
from lightning_dice.cli.config import CONF_DIR
from lightning_dice.cli.errors import UserError
from lightning_dice.extras import MissingExtra
from lightning_dice.plotting import sweep_chart
from lightning_dice.trials import Trial, read_trials, record_outcome, write_trial

SPACE = ["loss.smooth=tag(log,interval(1e-5,100))", "loss=dice,tversky"]


def score(smooth: float, loss: str) -> float:
    return 1 / (1 + abs(smooth - 0.5)) - 0.25 * (loss == "tversky")


@dataclass
class Training:
    """Takes the place of training: the score follows from the settings, and some trials end otherwise."""

    outcomes: dict[int, object] = field(default_factory=dict)
    trained: list[int] = field(default_factory=list)

    def __call__(self, config, folder):
        number = int(folder.name)
        self.trained.append(number)
        outcome = self.outcomes.get(number, "finished")
        if isinstance(outcome, BaseException):
            raise outcome
        value = outcome if isinstance(outcome, float) else score(config.loss.smooth, config.loss.name)
        status = outcome if isinstance(outcome, str) else "finished"
        record_outcome(folder, status, value=value, monitor="val/dice", epochs=3)


@pytest.fixture(scope="module", autouse=True)
def small_app(tmp_path_factory):
    """Replace the configs of `fit` by few and small ones, which compose fast, and draw no pictures."""
    folder = tmp_path_factory.mktemp("conf")
    (folder / "loss").mkdir()
    for name in ("dice", "tversky"):
        (folder / "loss" / f"{name}.yaml").write_text(f"name: {name}\nsmooth: 1.0\n")
    (folder / "hydra").symlink_to(CONF_DIR / "hydra")
    (folder / "data").mkdir()
    (folder / "data" / "none.yaml").write_text("batch_size: 8\n")
    (folder / "model").mkdir()
    (folder / "model" / "none.yaml").write_text("{}\n")
    real = OmegaConf.load(CONF_DIR / "fit.yaml")
    config = {
        "defaults": [{"loss": "dice"}, {"data": "none"}, {"model": "none"}, "_self_", *real.defaults[-2:]],
        **{key: real[key] for key in ("seed", "name", "runs", "folder", "hydra")},
        "callbacks": {"checkpoint": {"mode": "max"}},
    }
    (folder / "fit.yaml").write_text(OmegaConf.to_yaml(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "CONF_DIR", folder)
        patch.setattr(sweep_chart, "draw_trials", lambda *_: None)
        yield


class TrialLauncher(launcher.Launcher):
    """Only trains."""

    def train_trial(self, config, folder):
        self._train(config, folder)


@dataclass
class Ended:
    status: int
    out: str
    err: str


def start(cwd: Path, *arguments: str, training: Training) -> Ended:
    """Run a sweep in this process, as `python -m lightning_dice.fit` does."""
    out, err, here = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), command_line(arguments) as given:
            try:
                TrialLauncher(training, given).launch()
                status = 0
            except SystemExit as stop:
                status = stop.code
    finally:
        os.chdir(here)
    return Ended(status, out.getvalue(), err.getvalue())


def run_search(cwd: Path, *arguments: str, training: Training | None = None, status: int = 0) -> Ended:
    training = training or Training()
    ended = start(cwd, "-m", "hydra/sweeper=search", *arguments, "folder=s", training=training)
    assert ended.status == status, f"{ended.status}\n{ended.out}\n{ended.err}"
    return ended


def resume(cwd: Path, *arguments: str, training: Training, status: int = 0) -> Ended:
    ended = start(cwd, "resume=s", *arguments, training=training)
    assert ended.status == status, f"{ended.status}\n{ended.out}\n{ended.err}"
    return ended


def settings_of(folder: Path) -> list[list[str]]:
    return [trial.overrides for trial in read_trials(folder)]


def load(folder: Path, name: str = "sweep") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'optuna.db'}")


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_trials_are_those_of_optuna_alone(tmp_path, jobs):
    few = ["hydra.sweeper.n_trials=5", "hydra.sweeper.sampler.n_startup_trials=2", f"hydra.sweeper.n_jobs={jobs}"]
    run_search(tmp_path, *SPACE, *few, "seed=5")

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=5, n_startup_trials=2))
    space = {
        "loss.smooth": FloatDistribution(1e-5, 100, log=True),
        "loss": CategoricalDistribution(["dice", "tversky"]),
    }
    while len(study.trials) < 5:
        asked = [study.ask(space) for _ in range(min(jobs, 5 - len(study.trials)))]
        for trial in asked:
            study.tell(trial, score(trial.params["loss.smooth"], trial.params["loss"]))

    kept = load(tmp_path / "s")
    assert [trial.params for trial in kept.trials] == [trial.params for trial in study.trials]
    assert [trial.value for trial in kept.trials] == pytest.approx([trial.value for trial in study.trials], abs=1e-12)
    assert len({trial.params["loss.smooth"] for trial in kept.trials}) == 5
    # Every trial was trained with the parameters that Optuna asked for.
    for trial, overrides in zip(kept.trials, settings_of(tmp_path / "s"), strict=True):
        assert overrides[:2] == [f"{key}={value}" for key, value in trial.params.items()]
        assert "seed=5" in overrides
        assert trial.user_attrs["seed"] == "5"
    best = OmegaConf.load(tmp_path / "s" / "optimization_results.yaml")
    assert best == {"name": "optuna", "best_params": study.best_params, "best_value": pytest.approx(study.best_value)}


class TestOutcomes:
    TRAINING = {1: RuntimeError("no luck"), 2: "pruned", 3: float("nan")}  # noqa: RUF012

    @pytest.fixture(scope="class")
    @classmethod
    def done(cls, tmp_path_factory):
        home = tmp_path_factory.mktemp("outcomes")
        training = Training(cls.TRAINING)
        return home, run_search(home, *SPACE, "hydra.sweeper.n_trials=5", training=training, status=1)

    def test_the_study_has_them(self, done):
        home, _ = done
        trials = load(home / "s").trials
        finished, failed, pruned = TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED
        assert [trial.state for trial in trials] == [finished, failed, pruned, failed, finished]
        assert trials[1].user_attrs["error"] == "RuntimeError: no luck"
        assert trials[3].user_attrs["error"] == "the trial has no score"
        assert trials[2].intermediate_values == {3: trials[2].value}
        assert trials[2].value == read_trials(home / "s")[2].value

    def test_the_best_is_printed_and_written(self, done):
        home, ended = done
        best = load(home / "s").best_trial
        assert best.number not in (1, 2, 3)
        assert dict(OmegaConf.load(home / "s" / "optimization_results.yaml").best_params) == best.params
        assert f"loss.smooth={best.params['loss.smooth']} loss={best.params['loss']}" in " ".join(ended.out.split())

    @pytest.mark.slow
    def test_resuming_replays_them(self, done):
        home, _ = done
        before = [(trial.params, trial.state, trial.values) for trial in load(home / "s").trials]
        training = Training()
        resume(home, "hydra.sweeper.n_trials=6", training=training, status=1)
        assert training.trained == [5]
        trials = load(home / "s").trials
        assert [(trial.params, trial.state, trial.values) for trial in trials[:5]] == before
        assert [path.name for path in sorted((home / "s").glob("optuna*.db"))] == ["optuna.1.db", "optuna.db"]
        # The new ones are those of a search that had 6 from the start.
        (home / "whole").mkdir()
        run_search(home / "whole", *SPACE, "hydra.sweeper.n_trials=6", training=Training(self.TRAINING), status=1)
        assert [trial.params for trial in load(home / "whole" / "s").trials] == [trial.params for trial in trials]


@pytest.mark.slow
def test_a_killed_search_ends_as_the_uninterrupted_one(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    few = [*SPACE, "hydra.sweeper.n_trials=5", "hydra.sweeper.sampler.n_startup_trials=1", "hydra.sweeper.n_jobs=2"]
    run_search(tmp_path / "whole", *few)
    killed = run_search(tmp_path / "killed", *few, training=Training({3: KeyboardInterrupt()}), status=130)
    assert "continue with: resume=" in killed.err
    assert [trial.status for trial in read_trials(tmp_path / "killed" / "s")] == ["finished"] * 3 + ["running"]
    training = Training()
    resume(tmp_path / "killed", training=training)
    assert training.trained == [3, 4]
    assert settings_of(tmp_path / "killed" / "s") == settings_of(tmp_path / "whole" / "s")
    kept = [[(t.params, t.values) for t in load(tmp_path / name / "s").trials] for name in ("whole", "killed")]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_too_many_failures_end_the_search(tmp_path):
    training = Training({number: RuntimeError("no luck") for number in (1, 2, 3)})
    few = ["hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=2", "hydra.sweeper.max_failure_rate=0.5"]
    ended = run_search(tmp_path, *SPACE, *few, training=training, status=1)
    assert training.trained == [0, 1, 2, 3]  # 1 of 2, then 2 of 2
    assert "2 of 2 trials failed, which is more than hydra.sweeper.max_failure_rate=0.5 allows" in ended.err
    assert f"resume={tmp_path / 's'}" in ended.err
    assert not (tmp_path / "s" / "optimization_results.yaml").exists()
    resumed = Training()
    resume(tmp_path, "retry_failed=true", "hydra.sweeper.max_failure_rate=1", training=resumed)
    assert resumed.trained == [1, 2, 3, 4, 5]


def test_without_a_score_there_are_no_best_parameters(tmp_path):
    training = Training(dict.fromkeys(range(2), RuntimeError("no luck")))
    ended = run_search(tmp_path, *SPACE, "hydra.sweeper.n_trials=2", training=training, status=1)
    assert "best trial" not in ended.out
    assert [row["status"] for row in rows(tmp_path / "s" / "trials.csv")] == ["failed", "failed"]
    assert not (tmp_path / "s" / "optimization_results.yaml").exists()


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([*SPACE, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials must be an integer >= 1, got 0"),
            ([*SPACE, "hydra.sweeper.n_jobs=two"], "hydra.sweeper.n_jobs must be an integer >= 1, got 'two'"),
            ([*SPACE, "hydra.sweeper.max_failure_rate=2"], "hydra.sweeper.max_failure_rate must be"),
            ([*SPACE, "hydra.sweeper.direction=minimize"], "hydra.sweeper.direction must be maximize"),
            ([*SPACE, "hydra.sweeper.direction=up"], "hydra.sweeper.direction must be maximize"),
            (
                [*SPACE, "hydra.sweeper.sampler._target_=optuna.samplers.Oracle"],
                "cannot be imported",
            ),
            ([*SPACE, "+hydra.sweeper.sampler.speed=3"], "hydra.sweeper.sampler: .*speed"),
            (
                [*SPACE, "hydra.sweeper.sampler={_target_:builtins.dict}"],
                "sampler of Optuna.*got builtins.dict",
            ),
            ([*SPACE, "hydra.sweeper.storage=nosql://x"], "hydra.sweeper.storage: cannot open nosql://x: "),
            (["seed=1"], "hydra/sweeper=search needs a setting with several values"),
            (["loss.smooth=tag(log,interval(0,1))"], r"loss.smooth=tag\(log,interval\(0,1\)\): .*low"),
            (["loss.smooth=interval(2,1)"], r"loss.smooth=interval\(2,1\): .*low"),
            (["loss.smooth=tag(lgo,interval(1,2))"], "the only tag is log"),
            (["loss.smooth=tag(log,range(1,3))"], "only an interval can have it"),
            (["data.batch_size=range(3,3)"], "the range is empty"),
            (["loss=dice,dice"], "loss=dice,dice: a value is listed twice"),
            ([*SPACE, "hydra/sweeper/sampler=grid"], "grid needs values or a range for loss.smooth"),
        ],
        ids=lambda value: value[-1] if isinstance(value, list) else "",
    )
    def test_are_found_before_the_first_trial(self, tmp_path, arguments, message):
        training = Training()
        ended = run_search(tmp_path, *arguments, training=training, status=2)
        assert "error: " in ended.err
        assert "Traceback" not in ended.err
        assert re.search(message, ended.err), ended.err
        assert not training.trained
        assert not (tmp_path / "s").exists()

    def test_of_a_setting_that_does_not_exist(self, tmp_path):
        ended = run_search(tmp_path, "loss.smoth=1,2", status=1)
        assert "did you mean smooth?" in ended.err
        assert not (tmp_path / "s").exists()

    def test_optuna_is_not_installed(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "optuna", None)
        ended = run_search(tmp_path, *SPACE, status=2)
        assert ended.err.strip() == (
            "error: hydra/sweeper=search needs optuna, which is not installed: pip install 'lightning-dice[sweep]'"
        )
        assert not (tmp_path / "s").exists()
        # A config of your own may choose the sweeper too.
        with pytest.raises(MissingExtra, match="needs optuna, which is not installed: pip install"):
            search.Search(OmegaConf.create({}))

    def test_another_package_is_not_installed(self, monkeypatch):
        settings = search.Search(OmegaConf.create({"_target_": "optuna.samplers.CmaEsSampler"}))
        monkeypatch.setitem(sys.modules, "cmaes", None)
        with pytest.raises(MissingExtra, match="pip install cmaes"):
            settings.create_sampler([])

    def test_the_old_plugin_is_not_installed(self):
        with pytest.raises(UserError, match="give hydra/sweeper=search"):
            sweep.check_plugins(["hydra/sweeper=optuna"])


def parameter(text: str, config_loader=None) -> search.Parameter:
    overrides = OverridesParser.create(config_loader=config_loader).parse_overrides([text])
    (one,), fixed = search.split_overrides(overrides)
    assert not fixed
    return one


class TestDistributions:
    @pytest.mark.parametrize(
        ("text", "distribution"),
        [
            ("a=interval(0,1)", FloatDistribution(0, 1)),
            ("a=interval(1,5)", FloatDistribution(1, 5)),
            ("a=int(interval(1,5))", IntDistribution(1, 5)),
            ("a=tag(log,interval(1e-5,100))", FloatDistribution(1e-5, 100, log=True)),
            ("a=tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
            ("a=range(1,4)", IntDistribution(1, 3)),
            ("a=range(1,8,3)", IntDistribution(1, 7, step=3)),
            ("a=range(8,1,-3)", IntDistribution(2, 8, step=3)),
            ("a=shuffle(range(1,4))", IntDistribution(1, 3)),
            ("a=range(0.0,0.5,0.1)", FloatDistribution(0, 0.4, step=0.1)),
            ("a=float(range(1,4))", FloatDistribution(1, 3, step=1)),
            ("a=x,y", CategoricalDistribution(["x", "y"])),
            ("a=choice(x)", CategoricalDistribution(["x"])),
            ("a=shuffle(3,1,2)", CategoricalDistribution([3, 1, 2])),
            ("a=sort(3,1,2)", CategoricalDistribution([1, 2, 3])),
            ("a=1,2.5,true,null,'b c',[1,2]", CategoricalDistribution(["1", "2.5", "True", "null", "'b c'", "[1,2]"])),
            ("a=0,2.5,true,null,'b c',[1,2]", CategoricalDistribution([0, 2.5, True, None, "b c", "[1,2]"])),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_of_hydras_grammar(self, text, distribution):
        assert parameter(text).distribution == distribution
        assert parameter(text).key == "a"

    def test_of_a_glob(self):
        loader = SimpleNamespace(get_group_options=lambda group, results_filter: ["dice", "dice_ce", "tversky"])
        assert parameter("loss=glob(dice*)", loader).distribution == CategoricalDistribution(["dice", "dice_ce"])

    @pytest.mark.parametrize(
        "text",
        ["a=1,2.5,true,null,'b c',[1,2],{x:1},x\\,y", "a=0,1,true", "+a=1e-5,'it\\'s'", "a=\"q 'r'\",s", "a@b=c,d"],
    )
    def test_every_choice_is_written_so_that_hydra_reads_it_again(self, text):
        one = parameter(text)
        parser = OverridesParser.create()
        asked = parser.parse_override(text)
        values = [choice.text if hasattr(choice, "text") else choice for choice in asked.value().list]
        read = [parser.parse_override(one.override(choice)) for choice in one.distribution.choices]
        assert [override.value() for override in read] == values
        assert [type(override.value()) for override in read] == [type(value) for value in values]
        assert {override.get_key_element() for override in read} == {asked.get_key_element()}

    def test_numbers_are_written_with_all_their_digits(self):
        parser = OverridesParser.create()
        for value in (0.1 + 0.2, 1e-05, 1.2345678901234567e-30, 7, 100.0):
            read = parser.parse_override(parameter("a=interval(0,1)").override(value)).value()
            assert (read, type(read)) == (value, type(value))

    def test_fixed_overrides_stay_as_they_are_and_the_last_one_counts(self):
        texts = ["a=1", "b=x,y", "~c", "+d='e f'", "a=2,3", "b=z", "f={g:[1,h]}"]
        (one,), fixed = search.split_overrides(OverridesParser.create().parse_overrides(texts))
        assert (one.key, one.distribution) == ("a", CategoricalDistribution([2, 3]))
        assert fixed == {"b": "b=z", "~c": "~c=null", "+d": "+d='e f'", "f": "f={g:[1,h]}"}


class TestParams:
    def test_of_a_file_are_a_part_of_the_search(self, tmp_path):
        group = tmp_path / "mine" / "experiment"
        group.mkdir(parents=True)
        params = {"loss": "dice,tversky", "loss.smooth": "1,2,3", "data.batch_size": 4}
        text = OmegaConf.to_yaml({"hydra": {"mode": "MULTIRUN", "sweeper": {"n_trials": 3, "params": params}}})
        head = "# @package _global_\ndefaults:\n  - override /hydra/sweeper: search\n"
        (group / "mine.yaml").write_text(head + text)
        arguments = ["--config-dir", "mine", "experiment=mine", "loss.smooth=5,6", "folder=s"]
        ended = start(tmp_path, *arguments, training=Training())
        assert ended.status == 0, ended.err
        for trial in read_trials(tmp_path / "s"):
            assert trial.parameters["data.batch_size"] == "4"
            assert trial.parameters["loss"] in ("dice", "tversky")
            assert trial.parameters["loss.smooth"] in ("5", "6")
        assert len(load(tmp_path / "s").trials) == 3

    def test_null_is_nothing(self):
        assert search.Search(OmegaConf.create({}), params={"a": None, "b": 1.5}).params == ["a=null", "b=1.5"]
        assert search.Search(OmegaConf.create({}), params=None).params == []


class TestSamplers:
    @pytest.mark.slow
    def test_a_grid_has_every_combination_once(self, tmp_path):
        space = ["loss=dice,tversky", "loss.smooth=range(1,6,2)"]
        grid = ["hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=4"]
        run_search(tmp_path, *grid, *space)
        found = [(trial.params["loss"], trial.params["loss.smooth"]) for trial in load(tmp_path / "s").trials]
        assert len(found) == 6
        assert set(found) == {(loss, smooth) for loss in ("dice", "tversky") for smooth in (1, 3, 5)}

    def test_another_one_of_optuna(self, tmp_path):
        another = ["hydra/sweeper/sampler=random", "hydra.sweeper.sampler._target_=optuna.samplers.QMCSampler"]
        with pytest.warns(optuna.exceptions.ExperimentalWarning):
            run_search(tmp_path, *SPACE[:1], *another, "hydra.sweeper.n_trials=2", "seed=3")
        with pytest.warns(optuna.exceptions.ExperimentalWarning):
            study = optuna.create_study(sampler=optuna.samplers.QMCSampler(seed=3))
        space = {"loss.smooth": FloatDistribution(1e-5, 100, log=True)}
        for _ in range(2):
            study.tell(study.ask(space), 0)
        assert [t.params for t in load(tmp_path / "s").trials] == [t.params for t in study.trials]


class TestStorage:
    @pytest.mark.slow
    def test_another_one_keeps_the_studies_of_a_resumed_search(self, tmp_path):
        other = f"hydra.sweeper.storage=sqlite:///{tmp_path}/all.db"
        run_search(tmp_path, *SPACE, other, "hydra.sweeper.n_trials=2")
        resume(tmp_path, "hydra.sweeper.n_trials=3", training=Training())
        names = optuna.get_all_study_names(f"sqlite:///{tmp_path}/all.db")
        assert sorted(names) == ["sweep", "sweep.1"]
        for name, count in (("sweep", 3), ("sweep.1", 2)):
            assert len(optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path}/all.db").trials) == count

    def test_a_study_of_another_search_is_refused(self, tmp_path):
        storage = f"sqlite:///{tmp_path}/all.db"
        optuna.create_study(study_name="sweep", storage=storage)
        ended = run_search(tmp_path, *SPACE, f"hydra.sweeper.storage={storage}", status=2)
        assert "has a study sweep already: choose another name with hydra.sweeper.study_name=<name>" in ended.err
        few = ["hydra.sweeper.n_trials=1", "hydra.sweeper.study_name=mine"]
        run_search(tmp_path, *SPACE, f"hydra.sweeper.storage={storage}", *few)
        assert sorted(optuna.get_all_study_names(storage)) == ["mine", "sweep"]

    def test_none_keeps_nothing(self, tmp_path):
        run_search(tmp_path, *SPACE, "hydra.sweeper.storage=null", "hydra.sweeper.n_trials=2")
        assert not (tmp_path / "s" / "optuna.db").exists()
        assert (tmp_path / "s" / "optimization_results.yaml").is_file()


def test_a_job_that_raises_has_failed(tmp_path):
    """In other programs trials have no records."""

    class Raised:
        @property
        def return_value(self):
            raise RuntimeError("no luck")

    study = optuna.create_study()
    assert not search._tell(study, study.ask(), tmp_path, Raised())
    assert not search._tell(study, study.ask(), tmp_path, SimpleNamespace(return_value="high"))
    assert search._tell(study, study.ask(), tmp_path, SimpleNamespace(return_value="0.5"))
    write_trial(tmp_path / "3", Trial(3, [], "pruned"))
    assert search._tell(study, study.ask(), tmp_path, SimpleNamespace(return_value=None))
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE, TrialState.PRUNED]
    errors = [trial.user_attrs.get("error") for trial in study.trials]
    assert errors == ["RuntimeError: no luck", "ValueError: could not convert string to float: 'high'", None, None]
    assert study.best_value == 0.5
