"""Sweeps whose trials may fail, are recorded as they end, and can be resumed.

Hydra's sweeper chooses the trials and its launcher where they run; each trial keeps a record in its folder. Resuming a
sweep replays it: the sweeper, which is seeded, asks for the same trials again, and those that have ended return what
was recorded.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lightning_dice.cli.command import hydra_quote
from lightning_dice.cli.config import CONF_DIR, register_resolvers
from lightning_dice.cli.errors import UserError, report_user_errors
from lightning_dice.cli.required_extras import check_extras
from lightning_dice.cli.trial_tables import SWEEP, swept_parameters, trial_table, write_tables
from lightning_dice.extras import require_all
from lightning_dice.io import write_atomically
from lightning_dice.library_internals.hydra import parse_overrides
from lightning_dice.trials import ERROR, RECORD, Trial, read_trial, read_trials, write_trial

LOCK = ".lock"
STUDY = "optuna.db"

# What may change when a sweep is resumed: where trials run, their number, and when the sweep gives up.
_CHANGEABLE = ("hydra/launcher=", "hydra.launcher.", "hydra.sweeper.n_trials=", "hydra.sweeper.max_failure_rate=")
# What sweepers and launchers need, as the name of a module.
_NEEDS = {
    "search": "optuna",
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
    "submitit_slurm": "hydra_plugins.hydra_submitit_launcher",
}


class Sweep:
    """The folder of a sweep, for the process that runs the sweep.

    Args:
        folder: absolute.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.new = not self.path.is_file()
        self._lock: IO[str] | None = None

    @property
    def path(self) -> Path:
        """The file with the sweep's command line."""
        return self.folder / SWEEP

    def settings(self) -> DictConfig:
        """Load the sweep's command line and swept keys.

        Raises:
            UserError: this is not the folder of a sweep.
        """
        if not self.path.is_file():
            raise UserError(f"{self.folder} is not the folder of a sweep: it has no {SWEEP}")
        settings = OmegaConf.load(self.path)
        if not isinstance(settings, DictConfig) or "arguments" not in settings:
            raise UserError(f"{self.path} is not the description of a sweep: it has no arguments")
        return settings

    def save(self, **settings: Any) -> None:
        """Write the sweep's command line and swept keys."""
        text = OmegaConf.to_yaml(OmegaConf.create(settings))
        write_atomically(self.path, lambda part: part.write_text(text, encoding="utf-8"))

    def hold(self) -> None:
        """Lock the sweep for as long as this process, or one of its trials, lives.

        Raises:
            UserError: another process holds the lock.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / LOCK).open("w")
        with contextlib.suppress(ImportError):  # Windows has none.
            import fcntl

            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                raise UserError(
                    f"the sweep {self.folder} is still running, or one of its trials is; the processes of a "
                    "killed one take some seconds to end"
                ) from None
            except OSError:
                pass  # A file system without locks.

    def release(self) -> None:
        """Close the lock's file, which unlocks it."""
        if self._lock is not None:
            self._lock.close()
        self._lock = None

    @property
    def lock(self) -> tuple[int, ...]:
        """The file descriptors that a trial's process must inherit to hold the lock too."""
        return () if self._lock is None or os.name == "nt" else (self._lock.fileno(),)

    def end(self) -> None:
        """Record that the sweeper has no more trials."""
        settings = self.settings()
        settings.finished = True
        self.save(**{str(key): value for key, value in settings.items()})

    def show(self) -> list[Trial]:
        """Write table and picture, print the table, and return the trials."""
        trials = read_trials(self.folder)
        if trials:
            write_tables(self.folder)
            from rich.console import Console

            console = Console(width=max(Console().width, len(str(self.folder)) + 24))
            console.print(trial_table(self.folder, trials, swept_parameters(self.folder, trials)))
        return trials


# The sweep that this process runs.
_current: Sweep | None = None


class SweepFolder(Callback):
    """Hydra callback that makes a sweep's folder and records the swept parameters."""

    def __init__(self) -> None:
        register_resolvers()

    def __reduce__(self) -> tuple[type[SweepFolder], tuple[()]]:
        # Unpickling must register our resolvers in a launcher's process, before it composes a config.
        return SweepFolder, ()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the folder, or use that of a resumed sweep."""
        global _current
        with report_user_errors():
            check_extras(config)
            _check_direction(config)
            folder = Path(config.hydra.sweep.dir).expanduser().absolute()
            if _current is None or _current.folder != folder:
                if (folder / SWEEP).is_file() or (folder.is_dir() and any(folder.iterdir())):
                    hint = f", or resume={folder}" if (folder / SWEEP).is_file() else ""
                    raise UserError(f"{folder} exists, and nothing is overwritten: choose a new folder{hint}")
                _current = Sweep(folder)
                _current.hold()
            _current.save(
                version=_version(),
                cwd=os.getcwd(),
                arguments=sys.argv[1:],
                swept=_swept(config),
                finished=False,
            )
            set_aside(folder / STUDY)  # Replaying the sweep writes it again.
            print(f"sweep   {folder}", flush=True)


def _check_direction(config: DictConfig) -> None:
    """Check the direction of the search: Optuna's default would minimize Dice."""
    direction = config.hydra.sweeper.get("direction")
    mode = OmegaConf.select(config, "callbacks.checkpoint.mode")
    wanted = {"max": "maximize", "min": "minimize"}.get(str(mode))
    if direction is None or wanted is None:
        return
    given = str(getattr(direction, "name", direction))
    if given != wanted:
        raise UserError(
            f"hydra.sweeper.direction must be {wanted}, as callbacks.checkpoint.mode is {mode}, got {given}: use "
            f"hydra/sweeper=search, or give hydra.sweeper.direction={wanted}"
        )


def _version() -> str:
    try:
        return metadata.version("lightning-dice")
    except metadata.PackageNotFoundError:
        return "unknown"


def _swept(config: DictConfig) -> list[str]:
    """Return the keys to which the command line, or the sweeper's settings, give several values."""
    overrides = parse_overrides(config.hydra.overrides.task)
    given = [override.get_key_element().lstrip("+~") for override in overrides if override.is_sweep_override()]
    return list(dict.fromkeys([*(str(key) for key in config.hydra.sweeper.get("params") or {}), *given]))


def set_aside(path: Path) -> None:
    """Rename a file or folder to `<name>.<number>`, if it is there, so that a new one can take its place."""
    if path.exists():
        taken = 1
        while (new := path.with_name(f"{path.stem}.{taken}{path.suffix}")).exists():
            taken += 1
        path.rename(new)


def is_sweep(folder: str | Path) -> bool:
    """Return whether this is the folder of a sweep."""
    return (Path(folder).expanduser() / SWEEP).is_file()


def check_trial(folder: Path, overrides: Iterable[str]) -> None:
    """Refuse to change a swept setting of a trial, whose value the sweep's table would then not show.

    Args:
        folder: of a run, which may be a trial of a sweep.
        overrides: for the run, in Hydra's syntax.

    Raises:
        UserError: names the setting.
    """
    sweep = Sweep(folder.parent)
    if not sweep.path.is_file() or read_trial(folder) is None:
        return
    swept = {str(key) for key in sweep.settings().get("swept") or []}
    for override in parse_overrides(text for text in overrides if not text.startswith("-")):
        if override.key_or_group in swept:
            raise UserError(
                f"{override.input_line}: {folder} is a trial of a sweep over {override.key_or_group}, and keeps its "
                "value; train a new run"
            )


def replay_arguments(
    folder: str | Path, arguments: Iterable[str] = (), *, retry_failed: bool = False
) -> list[str] | None:
    """Return the command line that replays a sweep.

    Args:
        folder: the sweep's; it may have been moved.
        arguments: another launcher or number of trials.
        retry_failed: train the failed trials again. Their folders are kept as `<number>.1`.

    Returns:
        The command line; `None` if all trials have ended.

    Raises:
        UserError: this is not a sweep, it is still running, or an argument would change its trials.
    """
    global _current
    sweep = Sweep(Path(folder).expanduser().absolute())
    settings, changed = sweep.settings(), list(arguments)
    for argument in changed:
        if not argument.startswith(_CHANGEABLE):
            raise UserError(
                f"{argument}: a sweep is resumed as it was started; only launcher and number of trials can change "
                f"({', '.join(_CHANGEABLE)}..., retry_failed=true). Resume a single trial with "
                f"resume={sweep.folder}/<number>"
            )
    failed = [trial for trial in read_trials(sweep.folder) if trial.status == "failed"]
    sweep.hold()
    if settings.get("finished") and not changed and not (retry_failed and failed):
        _current = sweep
        return None
    if settings.get("version") != _version():
        print(f"this sweep was started with version {settings.get('version')}; this is {_version()}", flush=True)
    for trial in failed if retry_failed else []:
        set_aside(sweep.folder / str(trial.number))
    cwd = settings.get("cwd")
    if cwd and Path(cwd).is_dir() and os.getcwd() != cwd:
        # Relative paths in the arguments, and the user's own modules, are found from there.
        sys.path[:] = [cwd if path == os.getcwd() else path for path in sys.path]
        os.chdir(cwd)
    _current = sweep
    place = f"hydra.sweep.dir={hydra_quote(str(sweep.folder))}"
    keys = {_setting_name(argument) for argument in (*changed, place)}
    return [*(a for a in settings.arguments if a.startswith("-") or _setting_name(a) not in keys), *changed, place]


def _setting_name(argument: str) -> str:
    return argument.partition("=")[0]


@contextmanager
def report_trials() -> Iterator[None]:
    """Print the trials of the sweep that ran in this context, if any.

    Raises:
        SystemExit: 1 if a trial failed, 130 after Ctrl-C, or the status of another `SystemExit`.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if _current is None:
            raise
        status = 130 if isinstance(error, KeyboardInterrupt) else error.code
        if _current.show():
            print(f"the sweep was interrupted; continue with: resume={_current.folder}", file=sys.stderr, flush=True)
        elif _current.new:
            shutil.rmtree(_current.folder)  # A mistake found before the first trial leaves nothing.
        raise SystemExit(status) from None
    if _current is not None:
        _current.end()
        if any(trial.status == "failed" for trial in _current.show()):
            raise SystemExit(1)


def release() -> None:
    """Unlock the sweep that this process ran, so that the process can run another one."""
    global _current
    if _current is not None:
        _current.release()
    _current = None


def lock_descriptors() -> tuple[int, ...]:
    """Return the file descriptors of the running sweep's lock, for the processes of its trials."""
    return () if _current is None else _current.lock


def sweep_started() -> bool:
    """Return whether this process runs a sweep that has trials."""
    return _current is not None and bool(read_trials(_current.folder))


def check_plugins(arguments: Iterable[str]) -> None:
    """Check that the sweeper and the launcher that a command line names are installed.

    Raises:
        MissingExtra: names what is missing, and how to install it.
        UserError: the sweeper is a plugin that `hydra/sweeper=search` replaces.

    >>> check_plugins(["hydra/launcher=basic", "loss.smooth=1"])
    """
    choices = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("hydra/sweeper", "hydra/launcher"):
            choices.append((key, value))
        elif key == "experiment" and (path := CONF_DIR / "experiment" / f"{value}.yaml").is_file():
            choices += re.findall(r"/(hydra/(?:sweeper|launcher)): *(\w+)", path.read_text(encoding="utf-8"))
    if ("hydra/sweeper", "optuna") in choices and find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
        raise UserError(
            "hydra/sweeper=optuna needs hydra-optuna-sweeper, which is not installed: give hydra/sweeper=search"
        )
    require_all({f"{key}={name}": [_NEEDS[name]] for key, name in choices if name in _NEEDS})


def run_trial(
    folder: Path, overrides: Sequence[str], train: Callable[[], object], *, shared: Callable[[], bool] = lambda: False
) -> float | None:
    """Train one trial, unless its record shows that it has ended.

    A failure is recorded, and the sweep continues.

    Args:
        folder: the trial's, in the sweep's folder and named by its number.
        overrides: the trial's.
        train: trains in `folder`, or resumes there. It, or a process that it starts, calls `trials.record_outcome`.
        shared: returns whether processes started by torchrun or srun train the trial too. If such a trial fails they
            are lost, and the sweep ends.

    Returns:
        The value for the sweeper; `None` if the trial failed or has none.

    Raises:
        UserError: the record is of another trial.
        SystemExit: the trial was interrupted, or failed on processes that cannot go on.
    """
    trial = read_trial(folder)
    if trial is None:
        # Half-written files of a killed process are not kept.
        lost = (folder / RECORD).is_file() or list(folder.glob(".*.part*"))
        if not lost and folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} exists, and nothing is overwritten: it has no {RECORD}")
        trial = Trial(int(folder.name), list(overrides))
    elif [one.lstrip("+") for one in trial.overrides] != [one.lstrip("+") for one in overrides]:
        raise UserError(
            f"trial {trial.number} in {folder.parent} is {' '.join(trial.overrides)}, but the sweeper now asks for "
            f"{' '.join(overrides)}: nothing is overwritten. A sampler without a seed, or another version of the "
            "sweeper, cannot be replayed"
        )
    elif trial.status != "running":
        print(f"trial {trial.number} is {trial.status}, as recorded", flush=True)
        return trial.value if trial.status != "failed" else None
    else:
        trial = replace(trial, seconds=trial.seconds + _trained_seconds(folder, trial))
    (folder / ERROR).unlink(missing_ok=True)
    write_trial(folder, replace(trial, started=time.time()))
    try:
        train()
        _check_outcome(folder)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except SystemExit as error:
        if isinstance(error.code, int) and error.code > 128:
            raise  # By a signal: Ctrl-C, SIGTERM.
        _record_failure(folder, f"exit status {error.code}")
    except UserError as error:
        _record_failure(folder, str(error))
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        _record_failure(folder, f"{type(error).__name__}: {first}".removesuffix(": "))
        del error
        _free_memory()
    try:
        write_tables(folder.parent)
    except OSError as error:
        warnings.warn(f"could not write the table of trials: {error}", stacklevel=2)
    trial = read_trial(folder)
    if trial is not None and trial.status == "failed" and shared():
        print("processes that torchrun or srun started end with a trial that fails", file=sys.stderr, flush=True)
        raise SystemExit(1)
    return None if trial is None or trial.status == "failed" else trial.value


def _trained_seconds(folder: Path, trial: Trial) -> float:
    """Return the seconds that an interrupted trial had trained, until it last wrote a file."""
    times = [path.stat().st_mtime for path in (folder / "metrics.csv", folder / "checkpoints") if path.exists()]
    return max(0.0, max(times, default=trial.started) - trial.started)


def _check_outcome(folder: Path) -> None:
    trial = read_trial(folder)
    if trial is None or trial.status == "running":
        raise RuntimeError("the training ended without a result")


def _record_failure(folder: Path, error: str) -> None:
    """Record a failure, while the exception is being handled."""
    path, trial = folder / ERROR, read_trial(folder)
    if not path.is_file():
        path.write_text(traceback.format_exc(), encoding="utf-8")
    if trial is not None:
        write_trial(folder, trial.ended("failed", error=" ".join(error.split())))
        print(f"\ntrial {trial.number} failed: {error}\n(more in {path})", file=sys.stderr, flush=True)


def _free_memory() -> None:
    """Free the memory of a trial that ran out of it, for the next one."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
