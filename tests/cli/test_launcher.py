"""Processes that come from torchrun, srun or several machines train one thing: what the first one says."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import SMALL, Forked, free_port, rank_environments, rows, run_ranks
from omegaconf import OmegaConf

from lightning_dice.cli import rendezvous, slurm
from lightning_dice.cli.config_consistency import check_config_consistency
from lightning_dice.cli.errors import UserError

RUN = rendezvous.RunSpec(Path("/a folder"), OmegaConf.create({"loss": {"smooth": 1, 255: [1.0e-5, None]}}))
FIT = [
    *SMALL,
    *("data.cases={train:16,val:5,test:5}", "data.batch_size=4", "trainer.max_epochs=2", "trainer.strategy=ddp"),
    *("logger=none", "callbacks=[progress_bar,history,checkpoint,case_table,interrupt]"),
]


def ended(processes: list[Forked], status: int = 0) -> list[tuple[str, str]]:
    results = [process.wait(status) for process in processes]
    return [(result.out, result.err) for result in results]


def same_run(one: Path, two: Path) -> None:
    """Equal but for rounding: torchrun gives each process one thread, which adds up in another order."""
    measured = ("seconds", "images_per_second", "memory_gb")
    for name in ("metrics.csv", "cases.csv"):
        tables = rows(one / name), rows(two / name)
        assert len(tables[0]) == len(tables[1]) > 0
        for row, other in zip(*tables, strict=True):
            assert row.keys() == other.keys()
            for key, value in row.items():
                if key in ("split", "case") or not value:
                    assert value == other[key]
                elif key not in measured:
                    assert float(value) == pytest.approx(float(other[key]), rel=1e-5, abs=1e-6), (name, key)
    weights = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (one, two)]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def two(home):
    """A run on two processes, of which Lightning starts the second."""
    told = Forked("fit", *FIT, "trainer.devices=2", "folder=two", cwd=home).wait()
    assert "batch   4 images x 2 processes = 8 a step, seed 0" in told.out
    return home / "two"


def on_nodes(home: Path, *arguments: str) -> list[Forked]:
    """Two "machines" with a process each, over loopback, with the environment that torchrun gives them."""
    settings = [*FIT, "trainer.devices=1", "trainer.num_nodes=2", *arguments]
    nodes = [
        {**environment, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank)}
        for rank, environment in enumerate(rank_environments(2))
    ]
    return [Forked("fit", *settings, cwd=home, environment=nodes[rank]) for rank in (1, 0)]


@pytest.mark.slow
@pytest.mark.process
def test_two_nodes_train_as_one(home, two):
    """By torchrun itself, whose store the processes then share."""
    port = free_port()
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"),
                *("--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}", "-m", "lightning_dice.fit"),
                *(*FIT, "trainer.devices=1", "trainer.num_nodes=2", "runs=nodes"),
            ],
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
    ]
    told = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], told
    # The first process alone has made a folder, and a name for it that holds the time.
    (folder,) = (home / "nodes").iterdir()
    assert str(folder) in told[1][0]
    same_run(folder, two)


@pytest.mark.process
def test_a_sweep_on_two_nodes(home, two):
    ended(on_nodes(home, "runs=swept", "loss.smooth=0.1,1", "-m"))
    (sweep,) = (home / "swept").iterdir()
    assert "smooth: 0.1" in (sweep / "0" / "config.yaml").read_text()
    same_run(sweep / "1", two)


@pytest.mark.process
def test_started_by_hand_on_each_machine(home, two):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = [*FIT, "trainer.devices=1", "trainer.num_nodes=2", "runs=by-hand"]
    processes = [
        Forked("fit", *arguments, cwd=home, environment={**address, "NODE_RANK": str(rank)}) for rank in (1, 0)
    ]
    told = ended(processes)
    (folder,) = (home / "by-hand").iterdir()
    same_run(folder, two)
    assert not told[0][0]


def slurm_environment(rank: int, port: int, **more: str) -> dict[str, str]:
    """What srun tells a process: two tasks on one node."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "segment",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(port),
        **more,
    }


def by_srun(home: Path, *arguments: str, **environment: str) -> list[Forked]:
    """Both tasks of a job."""
    port = free_port()
    settings = [*FIT, "trainer.devices=2", *arguments]
    return [
        Forked("fit", *settings, cwd=home, environment=slurm_environment(rank, port, **environment)) for rank in (0, 1)
    ]


@pytest.mark.process
def test_srun(home, two):
    ended(by_srun(home, "runs=srun", XDG_CACHE_HOME=str(home / "cache")))
    (folder,) = (home / "srun").iterdir()
    same_run(folder, two)


SENDER = """
import os
import signal

import lightning as L


class Send(L.Callback):
    \"""SIGUSR1 to this process while it trains its last batch of the second epoch, unless SLURM restarted the job.\"""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        last = trainer.current_epoch == 1 and batch_idx == trainer.num_training_batches - 1
        if last and "SLURM_RESTART_COUNT" not in os.environ:
            os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.process
def test_a_job_that_slurm_requeues_goes_on(tmp_path):
    """SIGUSR1, sent to all tasks, saves and requeues; the same command then goes on in the same folder."""
    calls = tmp_path / "calls"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    (tmp_path / "sender.py").write_text(SENDER)
    job = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    arguments = ["trainer.max_epochs=3", "+callbacks.send={_target_: sender.Send}", "runs=requeued"]
    told = ended(by_srun(tmp_path, *arguments, **job), status=138)
    assert "Stopped by SIGUSR1 in epoch 1, step 4: saved" in told[0][1]
    assert calls.read_text() == "requeue 4711\n"
    (folder,) = (tmp_path / "requeued").iterdir()
    assert [row["epoch"] for row in rows(folder / "metrics.csv")] == ["0"]
    told = ended(by_srun(tmp_path, *arguments, **job, SLURM_RESTART_COUNT="1"))
    assert "SLURM restarted the job (SLURM_RESTART_COUNT=1): resuming" in told[0][0]
    assert [path.name for path in (tmp_path / "requeued").iterdir()] == [folder.name]
    table = rows(folder / "metrics.csv")
    assert [(row["epoch"], bool(row["val/dice"])) for row in table] == [("0", True), ("1", True), ("2", True)]


@pytest.mark.process
def test_a_mistake_ends_all(home):
    told = ended(on_nodes(home, "loss.smooth=-1", "runs=mistaken"), status=2)
    assert "smooth must be a number of pixels >= 0" in told[1][1]
    assert not list((home / "mistaken").iterdir())


class TestPlace:
    @pytest.fixture(autouse=True)
    def _bare(self, monkeypatch):
        for name in list(os.environ):
            if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK", "MASTER_ADDR"):
                monkeypatch.delenv(name)

    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({}, (0, 1, "")),
            ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8, "torchrun")),
            ({"RANK": "3", "WORLD_SIZE": "8", **slurm_environment(0, 1)}, (3, 8, "torchrun")),
            (slurm_environment(1, 1), (1, 2, "srun")),
            ({**slurm_environment(0, 1), "SLURM_NTASKS": "1"}, (0, 1, "")),
            ({**slurm_environment(1, 1), "SLURM_JOB_NAME": "bash"}, (0, 1, "")),
            ({"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}, (1, None, "node")),
            ({"NODE_RANK": "0"}, (0, 1, "")),
            # Lightning's own child of a process on the second machine.
            (
                {"NODE_RANK": "1", "MASTER_ADDR": "a", "LOCAL_RANK": "1", rendezvous.RUN_VARIABLE: RUN.to_json()},
                (0, 1, ""),
            ),
        ],
    )
    def test_where_a_process_is(self, monkeypatch, environment, expected):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert rendezvous.process_info() == expected

    def test_a_process_alone_tells_nobody(self):
        meeting = rendezvous.Rendezvous(rendezvous.process_info())
        meeting.announce(RUN)
        meeting.end(0)
        assert "store" not in vars(meeting)


@pytest.mark.parametrize("run", [RUN, replace(RUN, checkpoint=Path("/a folder/checkpoints/last.ckpt"))])
def test_a_run_arrives_as_it_was_sent(run):
    assert rendezvous.RunSpec.from_json(run.to_json()) == run


class TestJob:
    def test_only_a_restarted_job_has_an_earlier_run(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        run = tmp_path / "run"
        run.mkdir()
        slurm.RequeuedJob(["a=1"]).record(run)
        assert slurm.RequeuedJob(["a=1"]).earlier() is None
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert slurm.RequeuedJob(["a=1"]).earlier() == run
        assert slurm.RequeuedJob(["a=2"]).earlier() is None, "another command of the same job"
        monkeypatch.setenv("SLURM_JOB_ID", "13")
        assert slurm.RequeuedJob(["a=1"]).earlier() is None
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        run.rmdir()
        assert slurm.RequeuedJob(["a=1"]).earlier() is None, "its folder is gone"

    def test_outside_of_slurm_there_is_no_note(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        slurm.RequeuedJob([]).record(tmp_path)
        assert slurm.RequeuedJob([]).earlier() is None
        assert not list(tmp_path.iterdir())


def agreed(configs: list[str]) -> str:
    """On each rank."""
    try:
        check_config_consistency(configs[torch.distributed.get_rank()])
    except UserError as error:
        return str(error)
    return "agreed"


@pytest.mark.process
@pytest.mark.parametrize("differ", [False, True])
def test_ranks_with_other_configs_are_stopped(differ):
    configs = ["loss:\n  smooth: 1\nseed: 0\n", f"loss:\n  smooth: {0.419 if differ else 1}\nseed: 0\n"]
    told = run_ranks(agreed, configs).results
    if not differ:
        assert told == ["agreed"] * 2
        return
    assert told[0] == told[1]
    for part in ("would train different things", "--- rank 0", "+++ rank 1", "-  smooth: 1", "+  smooth: 0.419"):
        assert part in told[0]
