"""Train a trial of a sweep in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lightning_dice.cli.errors import UserError
from lightning_dice.trials import ERROR

# Windows has no SIGUSR1.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


def run_in_own_process(folder: Path, pass_fds: tuple[int, ...] = ()) -> None:
    """Train a trial in a process of its own, which starts the processes for the other devices.

    If one of a trial's processes fails, Lightning kills the one that started it; that must not be the sweep's process.

    Args:
        folder: the trial's folder.
        pass_fds: file descriptors that the process inherits: the sweep's lock.

    Raises:
        SystemExit: this process got a signal to end, and the trial's process has ended.
        UserError: the trial failed; `error.txt` holds the standard error of its processes.
    """
    # Lightning would take SLURM's job of one task for one that has started all processes.
    jobs = ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME")  # needed to requeue the job
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in jobs}
    command = [sys.executable, "-m", "lightning_dice.fit", f"resume={folder}"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, pass_fds=pass_fds)
    tail: list[bytes] = []
    copying = threading.Thread(target=_copy, args=(process.stderr, tail), daemon=True)
    copying.start()
    signals: list[int] = []
    with _forward_signals(process, signals):
        status = process.wait()
    copying.join(timeout=5)  # Another of the trial's processes may live a little longer.
    if signals:
        raise SystemExit(128 + signals[0])
    if status:
        text = b"".join(tail).decode(errors="replace")
        (folder / ERROR).write_text(text, encoding="utf-8")
        ended = f"signal {-status}" if status < 0 else f"status {status}"
        raise UserError(error_line(text) or f"the trial's process ended with {ended}")


@contextmanager
def _forward_signals(process: subprocess.Popen[bytes], signals: list[int]) -> Iterator[None]:
    """Forward signals to a process and record them, instead of exiting."""

    def forward(number: int, frame: Any) -> None:
        signals.append(number)
        # A terminal sends Ctrl-C to the process too, and a second one would keep it from saving.
        if not (number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()):
            process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _copy(stream: IO[bytes], tail: list[bytes], limit: int = 2000) -> None:
    """Copy lines to standard error, and keep the last ones in `tail`."""
    for line in stream:
        sys.stderr.write(line.decode(errors="replace"))
        sys.stderr.flush()
        tail.append(line)
        del tail[:-limit]


def error_line(text: str) -> str | None:
    r"""Find the line of a program's standard error that names the cause.

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
    # A lost connection is the effect of another process's error.
    causes = [line for line in found if not re.search(r"gloo|NCCL|Connection (?:reset|closed|refused)", line)]
    return next(reversed([*lines[-1:], *found, *causes]), None)
