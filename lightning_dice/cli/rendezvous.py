"""Agree on the run that several processes train: the first process decides, the others get it from the first.

Processes are started in three ways. Lightning starts one for each other device of this machine, with the parent's
command line; as that may hold a sweep, they read the run from an environment variable instead. torchrun and srun start
all processes alike, and on several machines a user may start one on each; then the first process sends the run through
a store of torch.distributed, whether or not the machines share a file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import DictConfig, OmegaConf

from lightning_dice.cli.config import RUN_VARIABLE
from lightning_dice.cli.errors import UserError

# How long the others wait for a run, while the first process composes the config and checks the data.
PATIENCE = timedelta(hours=2)

# Seconds that the first process waits at its end for the others to notice.
LINGER = 20.0

_END = "end"


@dataclass(frozen=True)
class RunSpec:
    """One run: all that a process needs to train it.

    Attributes:
        folder: where its files go.
        config: resolved, plain values.
        checkpoint: where training resumes; `None`: from the beginning.
        template: the config with its interpolations, if it is to be written when training starts; only in the first
            process.
    """

    folder: Path
    config: DictConfig
    checkpoint: Path | None = None
    template: DictConfig | None = None

    def to_json(self) -> str:
        """Return the text that other processes get."""
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        config = OmegaConf.to_yaml(self.config)
        return json.dumps({"folder": str(self.folder), "config": config, "checkpoint": checkpoint})

    @classmethod
    def from_json(cls, text: str) -> RunSpec:
        """Return the run that `to_json` described."""
        values = json.loads(text)
        checkpoint = values["checkpoint"]
        config = cast("DictConfig", OmegaConf.create(values["config"]))
        return cls(Path(values["folder"]), config, None if checkpoint is None else Path(checkpoint))


def inherited_run_spec() -> RunSpec | None:
    """Return the run for a process that Lightning started; `None` in every other process."""
    text = os.environ.get(RUN_VARIABLE)
    return RunSpec.from_json(text) if text and os.environ.get("LOCAL_RANK", "0") != "0" else None


class ProcessInfo(NamedTuple):
    """The rank of this process among those that torchrun, srun or the user started.

    Attributes:
        rank: counted from 0; process 0 decides.
        processes: their number; `None` if the user started one on each machine, so that it is not known.
        kind: `"torchrun"`, `"srun"`, `"node"` (by hand), or `""` for a single process.
    """

    rank: int
    processes: int | None
    kind: str


def process_info() -> ProcessInfo:
    """Return the rank of this process, as Lightning will see it."""
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
    """Sends runs, one after the other, from the first process to all others.

    With a single process it does nothing.

    Args:
        process: this process.
    """

    def __init__(self, process: ProcessInfo) -> None:
        self.process = process
        self._runs = 0
        self.announced: str | None = None  # the folder of the run that the other processes train
        # torchrun keeps its store when it restarts the processes.
        self.prefix = f"lightning_dice/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.process.kind == "" or self.process.processes == 1

    @cached_property
    def store(self) -> Any:
        """The store of torch.distributed that all processes reach. The first process does not wait for the others."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        if self.process.kind == "srun":
            environment = _environment()
            address, port = environment.main_address, environment.main_port
        else:
            address = os.environ.get("MASTER_ADDR", "127.0.0.1")
            port = int(os.environ.get("MASTER_PORT", "12910"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return TCPStore(address, port, is_master=False, timeout=PATIENCE)
        # Not MASTER_PORT itself, which the training's process group uses.
        port = port + 1 if port < 65535 else port - 1
        first = self.process.rank == 0
        return TCPStore(address, port, is_master=first, wait_for_workers=False, timeout=PATIENCE)

    def announce(self, run: RunSpec) -> None:
        """Let the other processes train the run, if this is the first one."""
        if not self.alone and self.process.rank == 0:
            self.store.set(f"{self.prefix}/{self._runs}", run.to_json())
            self._runs += 1
            self.announced = str(run.folder)

    def end(self, status: int) -> None:
        """Let the others exit with this status, and wait shortly until they have noticed."""
        if self.alone:
            return
        self.store.set(f"{self.prefix}/{self._runs}", json.dumps({_END: status}))
        # Others may still be starting up, and would wait for this process.
        others = None if self.process.processes is None else self.process.processes - 1
        end = time.monotonic() + LINGER
        while self.store.add(f"{self.prefix}/ended", 0) < (self._known() if others is None else others):
            if time.monotonic() > end:
                return
            time.sleep(0.05)

    def _known(self) -> int:
        """How many others have asked for a run."""
        return int(self.store.add(f"{self.prefix}/others", 0))

    def runs(self) -> Iterator[RunSpec]:
        """Yield the runs that the first process announces.

        Raises:
            SystemExit: with the first process's status, if it exited with another one than 0.
            UserError: the first process cannot be reached.
        """
        from torch.distributed import DistError

        while True:
            try:
                if not self._runs:
                    self.store.add(f"{self.prefix}/others", 1)
                text = self.store.get(f"{self.prefix}/{self._runs}").decode()
            except (DistError, RuntimeError) as error:
                if self._runs:  # The first process has ended, and its store with it.
                    return
                raise UserError(f"the first process announced no run: {error}") from error
            self._runs += 1
            message = json.loads(text)
            if _END in message:
                self.store.add(f"{self.prefix}/ended", 1)
                if message[_END]:
                    raise SystemExit(message[_END])
                return
            yield RunSpec.from_json(text)


@contextmanager
def announce_exit(meeting: Rendezvous) -> Iterator[None]:
    """Let the other processes exit as this one, the first, does."""
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
        with contextlib.suppress(Exception):  # The exception that ends this process matters more.
            meeting.end(status)


def leave_process_group() -> None:
    """Leave the process group, as no process may exit while another still sends to it."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
