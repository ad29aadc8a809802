"""Sweeps: trials that may fail, that are written down as they end, and that go on where they stopped.

Hydra's sweeper says which trials there are and its launcher where they run. A trial leaves a record in its folder.
Going on is replaying: the sweeper asks for all trials again, and those that have ended answer with what is recorded. As
the sweepers are seeded, they ask for the same trials as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lightning_dice.cli.command import hydra_quote
from lightning_dice.cli.config import CONF_DIR, register_resolvers
from lightning_dice.cli.errors import UserError, report_user_errors
from lightning_dice.io import number, write_atomically, write_csv
from lightning_dice.library_internals.hydra import parse_overrides
from lightning_dice.trials import ERROR, RECORD, Trial, best_first, read_trial, read_trials, write_trial

if TYPE_CHECKING:
    from rich.table import Table

SWEEP = "sweep.yaml"
LOCK = ".lock"
TABLE, PICTURE = "trials.csv", "trials.png"
STUDY = "optuna.db"

# What may change when a sweep goes on: where trials run, and how many there are.
_CHANGEABLE = ("hydra/launcher=", "hydra.launcher.", "hydra.sweeper.n_trials=")
_PLUGINS = {
    "search": "hydra_plugins.hydra_optuna_sweeper",
    "optuna": "hydra_plugins.hydra_optuna_sweeper",
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
    "submitit_slurm": "hydra_plugins.hydra_submitit_launcher",
}
_OPTUNA = "hydra_optuna_sweeper"
# Windows has no SIGUSR1.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Sweep:
    """A sweep's folder, as the process that leads the sweep sees it.

    Args:
        folder: absolute.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.new = not self.path.is_file()
        self._lock: IO[str] | None = None

    @property
    def path(self) -> Path:
        """Where it is written what was swept."""
        return self.folder / SWEEP

    def settings(self) -> DictConfig:
        """What was swept.

        Raises:
            UserError: this is not the folder of a sweep.
        """
        if not self.path.is_file():
            raise UserError(f"{self.folder} is not the folder of a sweep: it has no {SWEEP}")
        settings = OmegaConf.load(self.path)
        if not isinstance(settings, DictConfig) or "arguments" not in settings:
            raise UserError(f"{self.path} does not say what was swept: it has no arguments")
        return settings

    def save(self, **settings: Any) -> None:
        """Write what is swept."""
        text = OmegaConf.to_yaml(OmegaConf.create(settings))
        write_atomically(self.path, lambda part: part.write_text(text, encoding="utf-8"))

    def hold(self) -> None:
        """Keep others from going on with this sweep, as long as this process or one of its trials lives.

        Raises:
            UserError: another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / LOCK).open("w")
        with contextlib.suppress(ImportError):  # Windows has none.
            import fcntl

            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"the sweep {self.folder} is still running, or one of its trials is; processes of one that was "
                    "killed need some seconds to end"
                ) from None
            except OSError:
                pass  # A file system without locks.

    @property
    def lock(self) -> tuple[int, ...]:
        """What a trial's process must inherit to hold the sweep too."""
        return () if self._lock is None or os.name == "nt" else (self._lock.fileno(),)

    def end(self) -> None:
        """Note that the sweeper has no more trials."""
        settings = self.settings()
        settings.finished = True
        self.save(**{str(key): value for key, value in settings.items()})

    def show(self) -> list[Trial]:
        """Write table and picture, and print what the trials have reached; returns them."""
        trials = read_trials(self.folder)
        if trials:
            write_tables(self.folder)
            from rich.console import Console

            console = Console(width=max(Console().width, len(str(self.folder)) + 24))
            console.print(trial_table(self.folder, trials, swept_parameters(self.folder, trials)))
        return trials


# The sweep that this process leads.
_led: Sweep | None = None


class SweepFolder(Callback):
    """Hydra's hook at the beginning of a sweep: its folder is made, and says what is swept."""

    def __init__(self) -> None:
        register_resolvers()

    def __reduce__(self) -> tuple[type[SweepFolder], tuple[()]]:
        # A process that a launcher starts gets this object before it composes a config with our resolvers.
        return SweepFolder, ()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the folder, or take up that of a sweep that goes on."""
        global _led
        with report_user_errors():
            _check_direction(config)
            folder = Path(config.hydra.sweep.dir).expanduser().absolute()
            if _led is None or _led.folder != folder:
                if (folder / SWEEP).is_file() or (folder.is_dir() and any(folder.iterdir())):
                    hint = f", or resume={folder}" if (folder / SWEEP).is_file() else ""
                    raise UserError(f"{folder} exists, and nothing is overwritten: choose a new folder{hint}")
                _led = Sweep(folder)
                _led.hold()
            _led.save(
                version=_version(),
                cwd=os.getcwd(),
                arguments=sys.argv[1:],
                swept=_swept(config),
                finished=False,
            )
            if _OPTUNA in str(config.hydra.sweeper._target_):
                # Optuna 2 needs SQLAlchemy 1.4, which tells in every run that there is a second version.
                os.environ.setdefault("SQLALCHEMY_SILENCE_UBER_WARNING", "1")
                logging.getLogger("alembic").setLevel(logging.WARNING)  # It tells how it makes a database.
                set_aside(folder / STUDY)
            print(f"sweep   {folder}", flush=True)


def _check_direction(config: DictConfig) -> None:
    """Optuna's own default would look for the worst Dice."""
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
    """The keys that the command line or the sweeper's settings give several values."""
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
    """Whether a sweep has been here."""
    return (Path(folder).expanduser() / SWEEP).is_file()


def replay_arguments(
    folder: str | Path, arguments: Iterable[str] = (), *, retry_failed: bool = False
) -> list[str] | None:
    """Prepare a sweep to be replayed.

    Args:
        folder: of the sweep, wherever it lies now.
        arguments: launcher and number of trials, if they change.
        retry_failed: train anew the trials that failed. Their folders are kept, as `<number>.1`.

    Returns:
        The command line to run; `None` if the sweep is done, in which case its table has been printed.

    Raises:
        UserError: this is no sweep, it is still running, or an argument would change its trials.
    """
    global _led
    sweep = Sweep(Path(folder).expanduser().absolute())
    settings, changed = sweep.settings(), list(arguments)
    for argument in changed:
        if not argument.startswith(_CHANGEABLE):
            raise UserError(
                f"{argument}: a sweep goes on as it began; only the launcher and the number of trials can change "
                f"({', '.join(_CHANGEABLE)}..., retry_failed=true). One trial goes on by itself with "
                f"resume={sweep.folder}/<number>"
            )
    failed = [trial for trial in read_trials(sweep.folder) if trial.status == "failed"]
    sweep.hold()
    if settings.get("finished") and not changed and not (retry_failed and failed):
        _led = sweep
        return None
    if settings.get("version") != _version():
        print(f"this sweep was begun with version {settings.get('version')}; this is {_version()}", flush=True)
    for trial in failed if retry_failed else []:
        set_aside(sweep.folder / str(trial.number))
    cwd = settings.get("cwd")
    if cwd and Path(cwd).is_dir() and os.getcwd() != cwd:
        # Where the arguments' relative paths begin, and modules of one's own lie.
        sys.path[:] = [cwd if path == os.getcwd() else path for path in sys.path]
        os.chdir(cwd)
    _led = sweep
    place = f"hydra.sweep.dir={hydra_quote(str(sweep.folder))}"
    keys = {_key(argument) for argument in (*changed, place)}
    return [*(a for a in settings.arguments if a.startswith("-") or _key(a) not in keys), *changed, place]


def _key(argument: str) -> str:
    return argument.partition("=")[0]


@contextmanager
def report_trials() -> Iterator[None]:
    """Tell what came of the sweep that has run within, if one has.

    Raises:
        SystemExit: 1 if a trial failed, 130 after Ctrl-C; the rest is passed on.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if _led is None:
            raise
        status = 130 if isinstance(error, KeyboardInterrupt) else error.code
        if _led.show():
            print(f"the sweep was broken off; go on with: resume={_led.folder}", file=sys.stderr, flush=True)
        elif _led.new:
            shutil.rmtree(_led.folder)  # A mistake found before the first trial leaves nothing.
        raise SystemExit(status) from None
    if _led is not None:
        _led.end()
        if any(trial.status == "failed" for trial in _led.show()):
            raise SystemExit(1)


def sweep_started() -> bool:
    """Whether this process leads a sweep that has trials."""
    return _led is not None and bool(read_trials(_led.folder))


def missing_plugin(arguments: Iterable[str]) -> str | None:
    """What to install for the sweeper or launcher that a command line names; `None` if it is there.

    >>> missing_plugin(["hydra/launcher=basic", "loss.smooth=1"])
    """
    texts = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("hydra/sweeper", "hydra/launcher"):
            texts.append(value)
        elif key == "experiment" and (path := CONF_DIR / "experiment" / f"{value}.yaml").is_file():
            texts += re.findall(r"/hydra/(?:sweeper|launcher): *(\w+)", path.read_text(encoding="utf-8"))
    for name in texts:
        module = _PLUGINS.get(name)
        try:
            missing = module is not None and importlib.util.find_spec(module) is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            return f"{name} is a plugin of Hydra that is not installed: pip install 'lightning-dice[sweep]'"
    return None


def run_trial(
    folder: Path, overrides: Sequence[str], train: Callable[[], object], *, shared: Callable[[], bool] = lambda: False
) -> float | None:
    """Train one trial, unless its record says that it has ended.

    A trial that fails is recorded, and the sweep goes on.

    Args:
        folder: of the trial, in the sweep's folder and named by its number.
        overrides: what it is trained with.
        train: does it, in `folder`; goes on if something is there. It, or the process that it starts, calls
            `callbacks.trials.conclude`.
        shared: whether processes that others have started train it too. Where such a trial fails they are lost, and the
            sweep ends with it.

    Returns:
        The value that the sweeper learns from; `None` if the trial failed or has none.

    Raises:
        UserError: the record is of another trial.
        SystemExit: the trial was interrupted, or failed on processes that cannot go on.
    """
    trial = read_trial(folder)
    if trial is None:
        # Of what was being written when the machine stopped, or the process was killed, nothing is kept.
        lost = (folder / RECORD).is_file() or list(folder.glob(".*.part*"))
        if not lost and folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} exists, and nothing is overwritten: it has no {RECORD}")
        trial = Trial(int(folder.name), list(overrides))
    elif trial.overrides != list(overrides):
        raise UserError(
            f"trial {trial.number} in {folder.parent} is {' '.join(trial.overrides)}, but the sweeper asks now for "
            f"{' '.join(overrides)}: nothing is overwritten. A sampler without a seed, or another version of the "
            "sweeper, cannot be replayed"
        )
    elif trial.status != "running":
        print(f"trial {trial.number} is {trial.status}, as recorded", flush=True)
        return trial.value if trial.status != "failed" else None
    else:
        trial = replace(trial, seconds=trial.seconds + _lived(folder, trial))
    (folder / ERROR).unlink(missing_ok=True)
    write_trial(folder, replace(trial, started=time.time()))
    try:
        train()
        _ended(folder)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except SystemExit as error:
        if isinstance(error.code, int) and error.code > 128:
            raise  # By a signal: Ctrl-C, SIGTERM.
        _failed(folder, f"exit status {error.code}")
    except UserError as error:
        _failed(folder, str(error))
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        _failed(folder, f"{type(error).__name__}: {first}".removesuffix(": "))
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


def _lived(folder: Path, trial: Trial) -> float:
    """How long a trial that was broken off had trained, in seconds: until it last wrote something."""
    times = [path.stat().st_mtime for path in (folder / "metrics.csv", folder / "checkpoints") if path.exists()]
    return max(0.0, max(times, default=trial.started) - trial.started)


def _ended(folder: Path) -> None:
    trial = read_trial(folder)
    if trial is None or trial.status == "running":
        raise RuntimeError("the training ended without a result")


def _failed(folder: Path, error: str) -> None:
    """Record a failure, while the exception is being handled."""
    path, trial = folder / ERROR, read_trial(folder)
    if not path.is_file():
        path.write_text(traceback.format_exc(), encoding="utf-8")
    if trial is not None:
        write_trial(folder, trial.ended("failed", error=" ".join(error.split())))
        print(f"\ntrial {trial.number} failed: {error}\n(more in {path})", file=sys.stderr, flush=True)


def _free_memory() -> None:
    """Give the next trial what one that ran out of memory had."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def run_in_own_process(folder: Path) -> None:
    """Train a trial by a process of its own, which starts those of the other devices.

    Where one of a trial's processes fails, Lightning kills the one that started it, within seconds; that must not be
    the one that leads the sweep.

    Raises:
        SystemExit: this process got a signal to end, and the trial's has ended.
        UserError: the trial failed; what its processes said on standard error lies in `error.txt`.
    """
    # Lightning would take SLURM's job of one task for one that has started all processes.
    jobs = ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME")  # by which the trial has it requeued
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in jobs}
    command = [sys.executable, "-m", "lightning_dice.fit", f"resume={folder}"]
    lock = () if _led is None else _led.lock
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, pass_fds=lock)
    tail: list[bytes] = []
    copying = threading.Thread(target=_copy, args=(process.stderr, tail), daemon=True)
    copying.start()
    signals: list[int] = []
    with _passed_on(process, signals):
        status = process.wait()
    copying.join(timeout=5)  # Another of the trial's processes may live a little longer.
    if signals:
        raise SystemExit(128 + signals[0])
    if status:
        said = b"".join(tail).decode(errors="replace")
        (folder / ERROR).write_text(said, encoding="utf-8")
        ended = f"signal {-status}" if status < 0 else f"status {status}"
        raise UserError(error_line(said) or f"the trial's process ended with {ended}")


@contextmanager
def _passed_on(process: subprocess.Popen[bytes], signals: list[int]) -> Iterator[None]:
    """Pass signals on to a process, and note them, instead of ending."""

    def pass_on(number: int, frame: Any) -> None:
        signals.append(number)
        # Ctrl-C in a terminal has reached the process already, and a second one would keep it from saving.
        if not (number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()):
            process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _copy(stream: IO[bytes], tail: list[bytes], limit: int = 2000) -> None:
    """Copy lines to standard error, and keep the last ones."""
    for line in stream:
        sys.stderr.write(line.decode(errors="replace"))
        sys.stderr.flush()
        tail.append(line)
        del tail[:-limit]


def error_line(text: str) -> str | None:
    r"""The line of a program's last words that says what was wrong.

    >>> error_line("Traceback ...\n  File ...\nValueError: smooth must be >= 0\n[rank 0] bye\n")
    'ValueError: smooth must be >= 0'
    >>> error_line("[rank1]: KeyError: 'a'\n[rank0]: RuntimeError: gloo: Connection reset by peer\n")
    "KeyError: 'a'"
    >>> error_line("error: data.root has no value\n")
    'data.root has no value'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = []
    for line in lines:
        if match := re.match(r"(?:\[rank\d+\]:? ?)?(?:error: (.+)|([\w.]+(?:Error|Exception)\b.*))", line):
            found.append(match[1] or match[2])
    # That the other process is gone is not why it went.
    causes = [line for line in found if not re.search(r"gloo|NCCL|Connection (?:reset|closed|refused)", line)]
    return next(reversed([*lines[-1:], *found, *causes]), None)


def swept_parameters(sweep: Path, trials: Sequence[Trial]) -> list[str]:
    """The keys that trials differ in, and those that were asked for."""
    asked = [str(key) for key in Sweep(sweep).settings().get("swept") or []] if is_sweep(sweep) else []
    parameters = [trial.parameters for trial in trials]
    known = dict.fromkeys(key for given in parameters for key in given)
    differ = [key for key in known if len({given.get(key) for given in parameters}) > 1]
    return list(dict.fromkeys([*(key for key in asked if key in known), *differ]))


def write_tables(sweep: Path) -> None:
    """Write `trials.csv` and `trials.png` of the trials as they are now.

    The table has a row for each trial: number, status, the best of what is watched (under its name, such as
    `val/dice`), seconds, epochs, a column for each parameter that is swept, and the error.
    """
    trials = read_trials(sweep)
    parameters = swept_parameters(sweep, trials)
    value = next((trial.monitor for trial in trials if trial.monitor), "value")
    rows = []
    for trial in trials:
        row = {"number": str(trial.number), "status": trial.status, "seconds": f"{trial.seconds:.1f}"}
        row[value] = "" if trial.value is None else number(trial.value)
        row["epochs"] = "" if trial.epochs is None else str(trial.epochs)
        row["error"] = trial.error or ""
        rows.append({**{key: trial.parameters.get(key, "") for key in parameters}, **row})
    write_csv(sweep / TABLE, ["number", "status", value, "seconds", "epochs", *parameters, "error"], rows)
    from lightning_dice.plotting.sweep_chart import draw_trials

    draw_trials(sweep / PICTURE, trials, parameters)


def trial_table(sweep: Path, trials: Sequence[Trial], parameters: Sequence[str]) -> Table:
    """The table printed at the end of a sweep: best trials first.

    Args:
        sweep: the sweep's folder.
        trials: in any order.
        parameters: the keys that are swept.

    Returns:
        A rich table.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    value = next((trial.monitor for trial in trials if trial.monitor), "value")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("trial", value, *parameters, "epochs", "time", "status"):
        table.add_column(name, justify="left" if name in ("status", *parameters) else "right")
    ordered = best_first(trials)
    best = ordered[0] if ordered and ordered[0].value is not None else None
    for trial in ordered:
        outcome = trial.status if trial.status != "running" else "broken off"
        table.add_row(
            str(trial.number),
            "" if trial.value is None else f"{trial.value:.4f}",
            *(Text(trial.parameters.get(key, "")) for key in parameters),
            "" if trial.epochs is None else str(trial.epochs),
            _clock(trial.seconds),
            Text(f"{outcome}: {trial.error}" if trial.error else outcome, overflow="ellipsis", no_wrap=True),
            style="bold" if trial is best else "red" if trial.status == "failed" else "",
        )
    whole, paths = Table.grid(padding=(0, 0)), Table.grid(padding=(0, 2))
    paths.add_column(style="dim", no_wrap=True)
    paths.add_column(overflow="fold")
    paths.add_row("sweep", Text(str(sweep), style="bold"))
    if best is not None:
        paths.add_row("best trial", Text(str(best.number)))
    for label, name in (("trials", TABLE), ("picture", PICTURE)):
        if (sweep / name).is_file():
            paths.add_row(label, Text(name))
    whole.add_row(table)
    whole.add_row(paths)
    return whole


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
