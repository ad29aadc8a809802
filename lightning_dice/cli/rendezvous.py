"""Several processes, one run: the first decides what is trained, and the others start from that.

Processes come from three places. Lightning starts those of this machine's other devices itself, with the parent's
command line; an environment variable tells them the run instead, as that command line may hold a sweep. torchrun and
srun start all processes alike, and on several machines a user may start one on each; there the first process tells the
others through a store of torch.distributed, whichever file systems the machines have.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any, NamedTuple

from lightning_dice.cli.config import RUN_VARIABLE
from lightning_dice.cli.errors import UserError

# How long the first process may take to say what is trained: it composes a config and checks the data.
PATIENCE = timedelta(hours=2)

# Seconds for which the first process waits at its end until the others know.
LINGER = 20.0

_END = "end"


class RunSpec(NamedTuple):
    """What every process of a run starts from.

    Attributes:
        folder: of the run.
        config: resolved, as YAML.
        checkpoint: the path of the one to go on from, or `None`.
    """

    folder: str
    config: str
    checkpoint: str | None = None

    def text(self) -> str:
        """To be sent to other processes."""
        return json.dumps(self._asdict())

    @classmethod
    def of(cls, text: str) -> RunSpec:
        """What `text` has made."""
        return cls(**json.loads(text))


def inherited_run_spec() -> RunSpec | None:
    """What a process that Lightning has started is to train; `None` in every other process."""
    text = os.environ.get(RUN_VARIABLE)
    return RunSpec.of(text) if text and os.environ.get("LOCAL_RANK", "0") != "0" else None


class ProcessInfo(NamedTuple):
    """Which of the processes that were started from outside this one is.

    Attributes:
        rank: from 0; the first decides.
        processes: how many there are; `None`: a user started one on each machine, who knows how many.
        kind: `""` (this is the only one), `"torchrun"`, `"srun"` or `"node"`.
    """

    rank: int
    processes: int | None
    kind: str


def process_info() -> ProcessInfo:
    """This process's place, as Lightning will see it."""
    environment = os.environ
    if inherited_run_spec() is not None:
        return ProcessInfo(0, 1, "")
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return ProcessInfo(int(environment["RANK"]), int(environment["WORLD_SIZE"]), "torchrun")
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and _environment().__class__.__name__ == "SLURMEnvironment":
        return ProcessInfo(int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"]), "srun")
    if "NODE_RANK" in environment and "MASTER_ADDR" in environment:
        return ProcessInfo(int(environment["NODE_RANK"]), None, "node")
    return ProcessInfo(0, 1, "")


def _environment() -> Any:
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return SLURMEnvironment() if SLURMEnvironment.detect() else LightningEnvironment()


class Rendezvous:
    """How the first process tells the others what to train, run after run, until it ends.

    Args:
        process: this process.

    A process alone has nobody to tell, and its channel does nothing.
    """

    def __init__(self, process: ProcessInfo) -> None:
        self.process = process
        self._runs = 0
        self.told: str | None = None  # the folder of the run that the others train
        # torchrun keeps its store when it starts the processes anew.
        self.prefix = f"lightning_dice/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.process.kind == "" or self.process.processes == 1

    @cached_property
    def store(self) -> Any:
        """The store of torch.distributed that all processes reach; the first one waits here for nobody."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        if self.process.kind == "srun":
            environment = _environment()
            address, port = environment.main_address, environment.main_port
        else:
            address = os.environ.get("MASTER_ADDR", "127.0.0.1")
            port = int(os.environ.get("MASTER_PORT", "12910"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return TCPStore(address, port, is_master=False, timeout=PATIENCE)
        # Not the port itself, which is that of the training's own connection.
        port = port + 1 if port < 65535 else port - 1
        first = self.process.rank == 0
        return TCPStore(address, port, is_master=first, wait_for_workers=False, timeout=PATIENCE)

    def tell(self, start: RunSpec) -> None:
        """Let the others train the same, if this is the first process."""
        if not self.alone and self.process.rank == 0:
            self.store.set(f"{self.prefix}/{self._runs}", start.text())
            self._runs += 1
            self.told = start.folder

    def end(self, status: int) -> None:
        """Let the others end, with this exit status, and wait a moment until they know."""
        if self.alone:
            return
        self.store.set(f"{self.prefix}/{self._runs}", json.dumps({_END: status}))
        # Those that have not been heard of yet may still come, and would wait for this process.
        others = None if self.process.processes is None else self.process.processes - 1
        end = time.monotonic() + LINGER
        while self.store.add(f"{self.prefix}/ended", 0) < (self._known() if others is None else others):
            if time.monotonic() > end:
                return
            time.sleep(0.05)

    def _known(self) -> int:
        """How many others have asked what to train."""
        return int(self.store.add(f"{self.prefix}/others", 0))

    def starts(self) -> Iterator[RunSpec]:
        """What the first process tells, one run after the other.

        Raises:
            SystemExit: with the first process's status, when it has ended with another one than 0.
            UserError: it is not heard.
        """
        from torch.distributed import DistError

        while True:
            try:
                if not self._runs:
                    self.store.add(f"{self.prefix}/others", 1)
                text = self.store.get(f"{self.prefix}/{self._runs}").decode()
            except (DistError, RuntimeError) as error:
                if self._runs:  # It has ended, and the store with it.
                    return
                raise UserError(f"the first process did not say what to train: {error}") from error
            self._runs += 1
            message = json.loads(text)
            if _END in message:
                self.store.add(f"{self.prefix}/ended", 1)
                if message[_END]:
                    raise SystemExit(message[_END])
                return
            yield RunSpec(**message)


@contextmanager
def announce_exit(channel: Rendezvous) -> Iterator[None]:
    """Tell the others when this process, the first one, has ended, and how."""
    status = 1
    try:
        yield
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    except UserError:
        status = 2
        raise
    finally:
        with contextlib.suppress(Exception):  # What ended this process is the news.
            channel.end(status)


def leave_process_group() -> None:
    """Close the connection of the processes: none may end while another still talks to it."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
