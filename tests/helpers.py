"""What the tests of all rooms share: a tiny training, commands in this process, tables."""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.util
import io
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from filelock import FileLock

T = TypeVar("T")

# Trains a single convolution on 16 tiny images: a second or two, with all that a run writes.
SMALL = [
    "model=custom",
    "data.patch_size=[32,32]",
    "data.cases={train:16,val:4,test:4}",
    "data.num_workers=0",
    "device=cpu",
]
# Without pictures and reports, which take most of that time.
LEAN = ["logger=none", "callbacks=[progress_bar,history,checkpoint,interrupt]", "test=false"]

_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    status: int
    out: str
    err: str


def run_command(name: str, *arguments: object, cwd: Path, status: int | None = 0) -> Result:
    """Run a command in this process, as `python -m lightning_dice.<name>` would, and return what it printed.

    Args:
        name: the command, such as `"fit"`.
        arguments: its command line.
        cwd: the folder to run it in.
        status: the exit status that it must have; `None`: any.
    """
    out, err = io.StringIO(), io.StringIO()
    main = importlib.import_module(f"lightning_dice.{name}").main
    with as_a_process(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
            code: int = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    result = Result(code, out.getvalue(), err.getvalue())
    assert status is None or code == status, f"exit status {code}\n{result.out}\n{result.err}"
    return result


def refused(name: str, *arguments: object, cwd: Path, status: int = 2) -> str:
    """Return the message of a command that must fail, without a traceback."""
    result = run_command(name, *arguments, cwd=cwd, status=status)
    assert "Traceback" not in result.err
    return result.err


@contextlib.contextmanager
def as_a_process(cwd: Path) -> Iterator[None]:
    """Run in another folder, and restore what a command changes for the rest of its process."""
    folder, environment, threads = Path.cwd(), dict(os.environ), torch.get_num_threads()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    random = torch.get_rng_state()
    os.chdir(cwd)
    try:
        # pytest turns warnings into errors; a user sees them.
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            for ignored in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning):
                warnings.simplefilter("ignore", ignored)
            yield
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.set_rng_state(random)
        torch.use_deterministic_algorithms(False)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def start_command(
    name: str, *arguments: object, cwd: Path, status: int | None = 0, timeout: float = 300, **environment: str
) -> Result:
    """Run a command in a process of its own, where the process is the subject of the test; mark it `process`."""
    done = subprocess.run(
        [sys.executable, "-m", f"lightning_dice.{name}", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert status is None or done.returncode == status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return Result(done.returncode, done.stdout, done.stderr)


# What a training imports before its first step.
_LIBRARIES = [
    *("lightning_dice.fit", "lightning_dice.cli.experiment", "lightning_dice.callbacks", "lightning_dice.predict"),
    *("lightning_dice.plotting.curves", "matplotlib.backends.backend_agg", "lightning_dice.callbacks.overlays"),
    *("segmentation_models_pytorch", "torchvision.transforms.v2", "torchmetrics", "lightning_dice.losses"),
]


def forkserver() -> ForkServerContext:
    """Return the context of `multiprocessing` whose processes are forked from one that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LIBRARIES)
    return context


class Forked:
    """A command in a process of its own, forked from one that has imported the libraries already.

    That saves the seven seconds of a start. Signals and exit statuses are those of any process; a status below 0 is
    the signal that killed it. Mark the test `process`.

    Args:
        name: the command, such as `"fit"`.
        arguments: its command line.
        cwd: the folder to run it in, where Python also finds modules.
        environment: variables beside those of this process.
    """

    def __init__(self, name: str, *arguments: object, cwd: Path, environment: dict[str, str] | None = None) -> None:
        self._printed = tempfile.TemporaryDirectory()
        given = (name, [*map(str, arguments)], str(cwd), {**os.environ, **(environment or {})}, self._printed.name)
        self._process = forkserver().Process(target=_command_of_process, args=given)
        self._process.start()

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, status: int | None = 0, timeout: float = 300) -> Result:
        """Wait until the command has ended, with this exit status, and return what it printed."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
        out, err = (Path(self._printed.name, name).read_text(encoding="utf-8") for name in ("out", "err"))
        self._printed.cleanup()
        assert code is not None, f"it still ran after {timeout} s\n{out}\n{err}"
        assert status is None or code == status, f"exit status {code}\n{out}\n{err}"
        return Result(code, out, err)


def fork_command(
    name: str, *arguments: object, cwd: Path, status: int | None = 0, timeout: float = 300, **environment: str
) -> Result:
    """Run a command in a forked process, see `Forked`, and return what it printed."""
    return Forked(name, *arguments, cwd=cwd, environment=environment).wait(status, timeout)


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """Return what `make` returns, called once for all workers of pytest-xdist.

    Args:
        factory: the fixture `tmp_path_factory`.
        name: of the result and its folder, unlike any other.
        make: called with a new folder; what it returns can be pickled.
    """
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    result = base / f"{name}.pickle"
    with FileLock(f"{result}.lock"):
        if not result.is_file():
            folder = base / name
            folder.mkdir()
            result.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(result.read_bytes())


def rank_environments(world: int) -> list[dict[str, str]]:
    """Return the variables that torchrun gives to each process of a training on this machine."""
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    group |= {"TORCHELASTIC_RUN_ID": "tests", "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0"}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def free_port() -> int:
    """Return a free port whose successor is free too: the processes of a training agree on the run by that one."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                two.bind(("127.0.0.1", port + 1))
                return port


def _command_of_process(name: str, arguments: list[str], cwd: str, environment: dict[str, str], printed: str) -> None:
    os.setsid()  # A test may kill the whole group.
    for number, file in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(printed, file), os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    command = importlib.import_module(f"lightning_dice.{name}")
    # By these Lightning starts the processes of other devices.
    sys.argv, sys.modules["__main__"].__spec__ = [str(command.__file__)], command.__spec__
    command.main(arguments)


def rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Ranks:
    """What the processes of a group returned and printed."""

    results: list[Any]
    out: str
    err: str


def run_ranks(function: Callable[..., object], *arguments: object, processes: int = 2, timeout: float = 120) -> Ranks:
    """Call a function of a test file in the processes of a group; mark the test `process`.

    A Trainer in it takes the group for torchrun's: `pl.Trainer(devices=2, strategy="ddp")`.

    Args:
        function: see `fork`.
        arguments: passed to it in every process.
        processes: their number.
        timeout: seconds, after which they are killed and the test fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(rank) for rank in range(processes)]
        group = [(rank, processes, Path(name) / "store") for rank in range(processes)]
        started = [fork(function, *arguments, folder=folders[rank], group=group[rank]) for rank in range(processes)]
        return _wait(started, folders, timeout)


def run_forked(function: Callable[..., object], *arguments: object, timeout: float = 120) -> Any:
    """Return the result of a function of a test file, called in a process of its own; mark the test `process`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "process"
        return _wait([fork(function, *arguments, folder=folder)], [folder], timeout).results[0]


def _wait(started: list[BaseProcess], folders: list[Path], timeout: float) -> Ranks:
    end, late = time.monotonic() + timeout, False
    # When one has failed, the others may wait for it.
    while any(process.exitcode is None for process in started) and not any(process.exitcode for process in started):
        running = [process.sentinel for process in started if process.exitcode is None]
        if late := not multiprocessing.connection.wait(running, end - time.monotonic()):
            break
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
        process.join()
    out, err = ("".join((folder / file).read_text() for folder in folders) for file in ("out", "err"))
    assert not late, f"not done after {timeout} s\n{out}\n{err}"
    assert not any(codes), f"exit status {codes}\n{out}\n{err}"
    return Ranks([pickle.loads((folder / "result").read_bytes()) for folder in folders], out, err)


def fork(
    function: Callable[..., object], *arguments: object, folder: Path, group: tuple[int, int, Path] | None = None
) -> BaseProcess:
    """Start a process that calls a function of a test file; mark the test `process`.

    It is forked from the server of `Forked`, so it costs little beyond its own work.

    Args:
        function: at the top of its file, which the process imports again; fixtures of pytest are not there.
        arguments: passed to it.
        folder: for what the process prints, in `out` and `err`, and what the function returns, in `result`.
        group: rank, number of processes and file of a process group to join first.
    """
    folder.mkdir(parents=True)
    path = Path(function.__code__.co_filename)
    process = forkserver().Process(target=_call, args=(path, function.__name__, arguments, folder, group))
    process.start()
    return process


def _call(path: Path, name: str, arguments: tuple[Any, ...], folder: Path, group: tuple[int, int, Path] | None) -> None:
    for descriptor, file in ((1, "out"), (2, "err")):
        with (folder / file).open("w") as target:
            os.dup2(target.fileno(), descriptor)
    torch.set_num_threads(1)
    os.environ.pop("PL_GLOBAL_SEED", None)  # of the test during which the server was started
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if group is not None:
        _join(*group)
    result = getattr(module, name)(*arguments)
    if group is not None:
        # A process that ends while another still talks to it may be killed by torch's own threads.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    (folder / "result").write_bytes(pickle.dumps(result))


def _join(rank: int, processes: int, store: Path) -> None:
    # What torchrun sets, and Lightning looks for. Through a file the group needs no port, which others may use.
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(TORCHELASTIC_RUN_ID="tests", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
