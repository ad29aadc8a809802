"""One list of cases, shared out among processes that need not talk to each other while they work.

The first process makes the list and says what is in it; every process does the cases whose number is its own, counted
by the number of processes; in the end the first hears what became of them. Processes come from torchrun or srun, or
the first starts them on this machine with its own command line.
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

# Seconds between two looks at whether the others are done, or have died.
POLL = 0.2


class WorkerPool:
    """This process's part of the work, and what it hears of the others'.

    Args:
        processes: how many this machine's first process shall start, itself included; torchrun and srun have started
            theirs already, and decide instead.
        module: what `python -m` runs in the processes that are started.
        arguments: of the command line.

    Raises:
        UserError: processes that were started by hand, one on each machine.
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
        self._channel = Rendezvous(here)
        self._done = 0
        if self.size > 1:
            _ = self._channel.store  # Opened at once: the others may ask before this one has anything to say.

    @property
    def first(self) -> bool:
        """Whether this process decides and speaks for all."""
        return self.rank == 0

    def mine(self, cases: Sequence[T]) -> Sequence[T]:
        """This process's part."""
        return cases[self.rank :: self.size]

    def agreed(self, decide: Callable[[], Any]) -> Any:
        """What `decide`, called in the first process alone, returns: plain values, the same in all of them.

        Raises:
            SystemExit: in the others, where it raised something in the first, which tells it.
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
        message = json.loads(self._channel.store.get(self._key("agreed")).decode())
        if "value" not in message:
            raise SystemExit(0)
        return message["value"]

    def count(self, number: int = 1) -> int:
        """Note that cases are done; how many are, by all processes."""
        if self.size == 1:
            self._done += number
            return self._done
        try:
            return int(self._channel.store.add(self._key("done"), number))
        except RuntimeError as error:
            raise UserError(f"process {self.rank} no longer reaches the first one: {error}") from error

    def end(self, report: Any, progress: Callable[[], None] = lambda: None) -> list[Any]:
        """Say what became of this process's part.

        Args:
            report: plain values.
            progress: called now and then while the first process waits.

        Returns:
            In the first process the report of each, `None` of one that has died; in the others nothing.
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
                if self._channel.store.check([self._key(f"report/{rank}")]):
                    reports[rank] = json.loads(self._channel.store.get(self._key(f"report/{rank}")).decode())
                    waiting.discard(rank)
            # Looked at before the reports: what died since may have reported.
            waiting -= dead
            progress()
            time.sleep(POLL if waiting else 0)
        return reports

    def close(self) -> None:
        """End the processes that this one has started, should any still run."""
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
        # Read when torch is imported, here too: else each process would take all cores.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes))
        for rank in range(1, processes):
            environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            line = [sys.executable, "-m", module, *arguments]
            self.started.append(subprocess.Popen(line, env=environment))
        return ProcessInfo(0, processes, "torchrun")

    def _key(self, name: str) -> str:
        return f"{self._channel.prefix}/shares/{name}"

    def _set(self, name: str, value: Any) -> None:
        store = self._channel.store
        store.set(self._key(name), json.dumps(value))
        store.get(self._key(name))  # Heard back: it has arrived when this process ends.


def _free_port() -> int:
    """A port that is free, as is the one after it, where `Channel` opens its store."""
    for _ in range(100):
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            try:
                two.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
    raise UserError("there is no free port for the processes to meet at")
