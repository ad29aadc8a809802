"""What the tests of all rooms share: a tiny training, commands in this process, tables."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

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
    with _as_a_process(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
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
def _as_a_process(cwd: Path) -> Iterator[None]:
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


def rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
