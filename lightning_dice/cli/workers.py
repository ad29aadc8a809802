"""Divide a list of cases among processes that work on them independently.

The first process makes the list and sends it; process r of n works on the cases r, r + n, r + 2n ...; in the end the
first process collects their reports. torchrun or srun start the processes, or the first one starts the others on this
machine with its own command line.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lightning_dice.cli.errors import UserError
from lightning_dice.cli.rendezvous import ProcessInfo, Rendezvous, process_info

T = TypeVar("T")

# Seconds between checks whether the others are done, or have died.
POLL = 0.2


class WorkerPool:
    """The processes that share the work, seen from one of them.

    Args:
        processes: how many work on this machine, this one included; ignored if torchrun or srun have started them.
        module: what `python -m` runs in the processes that are started.
        arguments: their command line.

    Raises:
        UserError: the processes were started by hand, one on each machine.
    """

    def __init__(self, processes: int, module: str, arguments: Sequence[str]) -> None:
        here = process_info()
        if here.kind == "node":
            raise UserError("processes on several machines must be started by torchrun or srun")
        self.started: list[subprocess.Popen[bytes]] = []
        self.local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        if here.kind == "" and processes > 1:
            here = self._start(processes, module, arguments)
        self.rank, self.size = here.rank, here.processes or 1
        self._rendezvous = Rendezvous(here)
        self._done = 0
        if self.size > 1:
            _ = self._rendezvous.store  # Opened at once, as the others may ask for it first.

    @property
    def first(self) -> bool:
        """Whether this process makes the list and reports for all."""
        return self.rank == 0

    def mine(self, cases: Sequence[T]) -> Sequence[T]:
        """Return this process's part of the cases."""
        return cases[self.rank :: self.size]

    def agreed(self, decide: Callable[[], Any]) -> Any:
        """Call `decide` in the first process only, and return its plain values in all of them.

        Raises:
            SystemExit: in the others, if it raised an error in the first, which reports it.
        """
        if self.size == 1:
            return decide()
        if self.first:
            message: dict[str, Any] = {}
            try:
                message["value"] = decide()
                return message["value"]
            finally:
                self._set("agreed", message)
        message = json.loads(self._rendezvous.store.get(self._key("agreed")).decode())
        if "value" not in message:
            raise SystemExit(0)
        return message["value"]

    def count(self, number: int = 1) -> int:
        """Count cases as done; return how many all processes have done."""
        if self.size == 1:
            self._done += number
            return self._done
        try:
            return int(self._rendezvous.store.add(self._key("done"), number))
        except RuntimeError as error:
            raise UserError(f"process {self.rank} has lost its connection to the first one: {error}") from error

    def collect(self, report: Any, progress: Callable[[], None] = lambda: None) -> list[Any]:
        """Send the report of this process to the first one, which waits for all.

        Args:
            report: plain values.
            progress: called repeatedly while the first process waits.

        Returns:
            In the first process the report of each process, `None` for one that died; in the others an empty list.
        """
        if self.size == 1:
            return [report]
        if not self.first:
            self._set(f"report/{self.rank}", report)
            return []
        reports = [report, *(None for _ in range(1, self.size))]
        waiting = set(range(1, self.size))
        while waiting:
            dead = {rank for rank in waiting if self.started and self.started[rank - 1].poll() is not None}
            for rank in sorted(waiting):
                if self._rendezvous.store.check([self._key(f"report/{rank}")]):
                    reports[rank] = json.loads(self._rendezvous.store.get(self._key(f"report/{rank}")).decode())
                    waiting.discard(rank)
            # Checked before the reports: a process that died since may have reported.
            waiting -= dead
            progress()
            time.sleep(POLL if waiting else 0)
        return reports

    def close(self) -> None:
        """Terminate the processes that this one started, if any still run."""
        for process in self.started:
            if process.poll() is None:
                process.terminate()
        for process in self.started:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()

    def _start(self, processes: int, module: str, arguments: Sequence[str]) -> ProcessInfo:
        port = _free_port()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Set before torch is imported, here too, or else each process would use all cores.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes))
        for rank in range(1, processes):
            environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            line = [sys.executable, "-m", module, *arguments]
            self.started.append(subprocess.Popen(line, env=environment))
        return ProcessInfo(0, processes, "torchrun")

    def _key(self, name: str) -> str:
        return f"{self._rendezvous.prefix}/shares/{name}"

    def _set(self, name: str, value: Any) -> None:
        store = self._rendezvous.store
        store.set(self._key(name), json.dumps(value))
        store.get(self._key(name))  # Read back, so that it has arrived when this process exits.


def _free_port() -> int:
    """Return a free port whose successor, where `Rendezvous` opens its store, is free too."""
    for _ in range(100):
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            try:
                two.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
    raise UserError("there is no free port for the processes to connect through")
