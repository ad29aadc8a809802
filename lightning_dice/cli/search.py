"""Search for the best trial with Optuna: what `hydra/sweeper=search` does.

Optuna proposes the parameters of a trial (`ask`), Hydra's launcher runs it, and Optuna learns its score (`tell`).
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from hydra.core.utils import JobReturn
from omegaconf import DictConfig, OmegaConf

from lightning_dice.argument_checks import check_choice, check_count, check_number
from lightning_dice.cli.config import instantiate
from lightning_dice.cli.errors import UserError, report_user_errors
from lightning_dice.extras import require
from lightning_dice.io import write_atomically
from lightning_dice.library_internals.hydra import list_choices, parse_overrides
from lightning_dice.trials import read_trial, read_trials

if TYPE_CHECKING:
    import optuna
    from hydra.plugins.sweeper import Sweeper
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

    from lightning_dice.library_internals.hydra import Override

RESULTS = "optimization_results.yaml"


@dataclass(frozen=True)
class Parameter:
    """A parameter of the search.

    Attributes:
        key: with the override's prefix, such as `+`.
        distribution: Optuna's.
        texts: Hydra's text of each choice; None if the parameter is a number.
    """

    key: str
    distribution: BaseDistribution
    texts: Mapping[Any, str] | None = None

    def override(self, value: Any) -> str:
        """Return the override that gives a trial this value."""
        return f"{self.key}={value if self.texts is None else self.texts[value]}"


class Search:
    """The settings of a search; they are checked here, before the first trial.

    Args:
        sampler: config of an `optuna.samplers.BaseSampler`.
        direction: `"maximize"` or `"minimize"`.
        storage: Optuna's URL of the database that keeps the study; None keeps none.
        study_name: name of the study in the storage.
        n_trials: number of trials.
        n_jobs: number of trials that are given to the launcher at once. Only then does the sampler learn their scores.
        max_failure_rate: the sweep ends when more than this share of `n_jobs` trials failed.
        params: parameters and fixed overrides by key; the command line's replace them.

    Raises:
        MissingExtra: Optuna is not installed.
        UserError: a setting is wrong.
    """

    def __init__(
        self,
        sampler: DictConfig,
        direction: str = "maximize",
        storage: str | None = None,
        study_name: str = "sweep",
        n_trials: int = 20,
        n_jobs: int = 1,
        max_failure_rate: float = 1.0,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        require("optuna", needed_by="hydra/sweeper=search")
        try:
            self.direction: Literal["maximize", "minimize"] = check_choice(
                "hydra.sweeper.direction", direction, ("maximize", "minimize")
            )
            self.n_trials = check_count("hydra.sweeper.n_trials", n_trials)
            self.n_jobs = check_count("hydra.sweeper.n_jobs", n_jobs)
            self.max_failure_rate = check_number("hydra.sweeper.max_failure_rate", max_failure_rate, 0, 1)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.sampler, self.storage, self.study_name = sampler, storage, study_name
        self.params = ["=".join((str(key), "null" if v is None else str(v))) for key, v in (params or {}).items()]

    def create_sampler(self, parameters: Iterable[Parameter]) -> BaseSampler:
        """Create the sampler.

        Raises:
            MissingExtra: the sampler needs a package that is not installed.
            UserError: it does not exist, it refuses a setting, or it does not fit the parameters.
        """
        from optuna.samplers import BaseSampler

        name = str(self.sampler.get("_target_")).rpartition(".")[2]
        if name == "CmaEsSampler":
            require("cmaes", needed_by="hydra/sweeper/sampler=cmaes")
        arguments: dict[str, Any] = {}
        if name == "GridSampler":
            arguments["search_space"] = {parameter.key: _grid(parameter) for parameter in parameters}
            self.n_trials = min(self.n_trials, math.prod(map(len, arguments["search_space"].values())))
        sampler = instantiate(self.sampler, "hydra.sweeper.sampler", **arguments)
        if not isinstance(sampler, BaseSampler):
            raise UserError(
                f"hydra.sweeper.sampler must be a sampler of Optuna, such as optuna.samplers.TPESampler, got "
                f"{self.sampler.get('_target_')}"
            )
        return sampler

    def create_study(self, sampler: BaseSampler, resumed: bool) -> optuna.Study:
        """Create the study.

        Args:
            sampler: proposes parameters.
            resumed: a study of this name in the storage is this sweep's. It is kept as `<name>.<number>`, because the
                sweep is replayed from its first trial.

        Raises:
            UserError: the storage cannot be opened, or holds a study of this name already.
        """
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)  # It logs how it creates a database.
        try:
            # Trials are pruned by a callback of ours, which works with other sweepers too.
            storage = optuna.storages.get_storage(self.storage)
            names = set(optuna.get_all_study_names(storage))
            if self.study_name in names and resumed:
                new = next(name for n in range(1, len(names) + 2) if (name := f"{self.study_name}.{n}") not in names)
                optuna.copy_study(
                    from_study_name=self.study_name, from_storage=storage, to_storage=storage, to_study_name=new
                )
                optuna.delete_study(study_name=self.study_name, storage=storage)
            study = optuna.create_study(
                storage=storage,
                sampler=sampler,
                pruner=optuna.pruners.NopPruner(),
                study_name=self.study_name,
                direction=self.direction,
            )
        except optuna.exceptions.DuplicatedStudyError as error:
            raise UserError(
                f"{self.storage} has a study {self.study_name} already: choose another name with "
                "hydra.sweeper.study_name=<name>"
            ) from error
        except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"hydra.sweeper.storage: cannot open {self.storage}: {first}") from error
        # A sampler that has tried everything calls `stop`, which Optuna allows in `Study.optimize` only.
        study.stop = lambda: None  # type: ignore[method-assign]
        return study


def run_search(sweeper: Sweeper, arguments: Sequence[str]) -> None:
    """Run the trials of a search, and write the best parameters to `optimization_results.yaml`.

    Args:
        sweeper: Hydra's side, with `settings` and a launcher.
        arguments: the overrides of the command line.

    Raises:
        SystemExit: 2 after a user error, 1 if too many trials failed.
    """
    config, launcher, context = sweeper.config, sweeper.launcher, sweeper.hydra_context
    if config is None or launcher is None or context is None:
        raise RuntimeError("call setup before sweep")
    folder = Path(config.hydra.sweep.dir).expanduser().absolute()
    with report_user_errors():
        search = Search(**cast(Any, sweeper).settings)
        overrides = parse_overrides([*search.params, *arguments], context.config_loader)
        parameters, fixed = split_overrides(overrides)
        folder.mkdir(parents=True, exist_ok=True)
        study = search.create_study(search.create_sampler(parameters), resumed=bool(read_trials(folder)))
    space = {parameter.key: parameter.distribution for parameter in parameters}
    first = 0
    while first < search.n_trials:
        count = min(search.n_jobs, search.n_trials - first)
        trials = [study.ask(space) for _ in range(count)]
        batch = [[*(p.override(trial.params[p.key]) for p in parameters), *fixed.values()] for trial in trials]
        for trial in trials:
            for key, override in fixed.items():
                trial.set_user_attr(key, override.partition("=")[2])
        # Composition errors end the sweep here, not in a process that the launcher starts.
        sweeper.validate_batch_is_legal(batch)
        results = launcher.launch(batch, initial_job_idx=first)
        failed = [not _tell(study, trial, folder, result) for trial, result in zip(trials, results, strict=True)]
        if sum(failed) / count > search.max_failure_rate:
            print(
                f"\n{sum(failed)} of {count} trials failed, which is more than hydra.sweeper.max_failure_rate="
                f"{search.max_failure_rate:g} allows",
                file=sys.stderr,
                flush=True,
            )
            raise SystemExit(1)
        first += count
    _write_results(study, folder / RESULTS)


def split_overrides(overrides: Iterable[Override]) -> tuple[list[Parameter], dict[str, str]]:
    """Separate the parameters of a search from fixed overrides.

    Returns:
        The parameters, and the fixed overrides by their keys. The last override of a key counts.

    Raises:
        UserError: there is no parameter, or one has no distribution.

    >>> parameters, fixed = split_overrides(parse_overrides(["loss=dice,tversky", "seed=1"]))
    >>> parameters[0].override("tversky"), fixed
    ('loss=tversky', {'seed': 'seed=1'})
    """
    last = {override.get_key_element(): override for override in overrides}
    parameters = [_parameter(key, override) for key, override in last.items() if override.is_sweep_override()]
    if not parameters:
        raise UserError(
            "hydra/sweeper=search needs a setting with several values, as in loss=dice,tversky or "
            "'loss.smooth=tag(log,interval(1e-5,100))'"
        )
    fixed = {
        key: f"{key}={override.get_value_element_as_str()}"
        for key, override in last.items()
        if not override.is_sweep_override()
    }
    return parameters, fixed


def _parameter(key: str, override: Override) -> Parameter:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    # An interval, a range or a choice of Hydra's.
    value: Any = override.value()
    tags = set(getattr(value, "tags", ()))
    if tags - ({"log"} if override.is_interval_sweep() else set()):
        raise UserError(f"{override.input_line}: the only tag is log, and only an interval can have it")
    try:
        if override.is_interval_sweep():
            kind = IntDistribution if isinstance(value.start, int) and isinstance(value.end, int) else FloatDistribution
            return Parameter(key, kind(value.start, value.end, log="log" in tags))
        if override.is_range_sweep():
            numbers = sorted(cast("Iterable[float]", override.sweep_iterator()))
            if not numbers:
                raise ValueError("the range is empty")
            step = Decimal(str(abs(value.step)))
            low, high = Decimal(str(numbers[0])), Decimal(str(numbers[0])) + step * (len(numbers) - 1)
            if all(isinstance(number, int) for number in numbers):
                return Parameter(key, IntDistribution(int(low), int(high), step=int(step)))
            return Parameter(key, FloatDistribution(float(low), float(high), step=float(step)))
        pairs = list_choices(override)
        texts = [text for _, text in pairs]
        if len(set(texts)) < len(texts):
            raise ValueError("a value is listed twice")
        plain = (bool, int, float, str, type(None))
        values = [value if isinstance(value, plain) else text for value, text in pairs]
        # Optuna keeps numbers as numbers, but mistakes values for each other that Python holds equal, as 1 and true.
        choices = values if len(set(values)) == len(values) else texts
        return Parameter(key, CategoricalDistribution(choices), dict(zip(choices, texts, strict=True)))
    except ValueError as error:
        raise UserError(f"{override.input_line}: {error}") from error


def _grid(parameter: Parameter) -> list[Any]:
    """Return the values of a parameter that a grid has."""
    distribution: Any = parameter.distribution
    if parameter.texts is not None:
        return list(parameter.texts)
    if distribution.step is None or distribution.log:
        raise UserError(
            f"hydra/sweeper/sampler=grid needs values or a range for {parameter.key}, as in {parameter.key}=1,10,100: "
            "an interval has no end of values"
        )
    low, step = Decimal(str(distribution.low)), Decimal(str(distribution.step))
    count = int((Decimal(str(distribution.high)) - low) / step) + 1
    return [type(distribution.low)(low + step * number) for number in range(count)]


def _tell(study: optuna.Study, trial: optuna.Trial, folder: Path, result: JobReturn) -> bool:
    """Tell Optuna the outcome of a trial, and return whether the trial has one: not if it failed."""
    from optuna.trial import TrialState

    record = read_trial(folder / str(trial.number))
    value, error = math.nan, record.error if record is not None else None
    try:
        returned = result.return_value  # Raises what the trial raised.
        value = math.nan if returned is None else float(returned)
    except Exception as raised:
        error = error or f"{type(raised).__name__}: {raised}"
    if record is not None and record.status == "pruned":
        if not math.isnan(value):
            trial.report(value, record.epochs or 0)
        study.tell(trial, state=TrialState.PRUNED)
        return True
    if math.isnan(value):
        trial.set_user_attr("error", error or "the trial has no score")
        study.tell(trial, state=TrialState.FAIL)
        return False
    study.tell(trial, value)
    return True


def _write_results(study: optuna.Study, path: Path) -> None:
    """Write the best parameters and their score."""
    if all(trial.value is None for trial in study.trials):
        return
    best = study.best_trial
    results = OmegaConf.create({"name": "optuna", "best_params": dict(best.params), "best_value": best.value})
    write_atomically(path, lambda part: part.write_text(OmegaConf.to_yaml(results), encoding="utf-8"))
