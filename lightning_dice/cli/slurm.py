"""Jobs that SLURM requeues: find the run that a job was training."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path


class RequeuedJob:
    """The job this process runs in, which SLURM may requeue with the same number and command line.

    Outside SLURM it does nothing.

    Args:
        arguments: the command line, as one job may run several commands.
    """

    def __init__(self, arguments: list[str]) -> None:
        number = os.environ.get("SLURM_JOB_ID")
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0")) if number else 0
        self.path: Path | None = None
        if number:
            command = hashlib.sha256("\0".join([os.getcwd(), *arguments]).encode()).hexdigest()[:12]
            cluster = os.environ.get("SLURM_CLUSTER_NAME", "slurm")
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            self.path = cache / "lightning_dice" / "jobs" / f"{cluster}-{number}-{command}"

    def record(self, folder: Path) -> None:
        """Record the folder of the job's run. Failing to write the record does not stop the run."""
        if self.path is None:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for old in self.path.parent.iterdir():
                if time.time() - old.stat().st_mtime > 90 * 86400:
                    old.unlink(missing_ok=True)
            self.path.write_text(str(folder), encoding="utf-8")

    def earlier(self) -> Path | None:
        """Return the folder of the run or sweep that this job started before SLURM requeued it."""
        if self.path is None or not self.restarts or not self.path.is_file():
            return None
        folder = Path(self.path.read_text(encoding="utf-8"))
        return folder if folder.is_dir() else None
