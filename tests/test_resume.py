"""An interrupted and resumed training equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training import cosine, differences, plateau, train

from lightning_dice.callbacks import ExactResume

SETTINGS = {
    "plain": {},
    "workers": {"workers": 2},
    "validation-within-epochs": {"val_check_interval": 0.5},
    "accumulation": {"accumulate_grad_batches": 2},
    "accumulation-with-a-rest": {"accumulate_grad_batches": 3},
    "validation-every-second-epoch": {"check_val_every_n_epoch": 2},
    "no-validation": {"limit_val_batches": 0},
    "validation-between-accumulated-batches": {"accumulate_grad_batches": 2, "val_check_interval": 1, "epochs": 2},
    "steps": {"max_steps": 10, "epochs": 4},
    "steps-alone": {"max_steps": 10, "epochs": -1},
    "a-logged-metric": {"metric": True, "epochs": 2},
    "plateau": {"schedule": plateau},
    "averaged-weights": {"average": True, "epochs": 2},
    "all": {"workers": 2, "val_check_interval": 0.5, "accumulate_grad_batches": 2, "schedule": plateau},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_from_every_checkpoint(tmp_path, name):
    settings = {"schedule": cosine, **SETTINGS[name]}
    whole = train(tmp_path, **settings)
    assert len(whole["paths"]) >= 8
    for path in whole["paths"]:
        # Another seed, as if none had been given: the checkpoint knows the one that counts.
        resumed = train(checkpoint=path, **settings, seed=8)
        if not resumed["events"]:
            continue  # The training is finished: nothing is done, and no hook called.
        assert not differences(whole, resumed), path.name


def test_with_another_batch_size_no_case_is_seen_twice(tmp_path):
    whole = train(tmp_path, epochs=1)
    path = next(path for path in whole["paths"] if "batch-0-2" in path.name)
    with pytest.warns(UserWarning, match="interrupted with 4 images in a batch of all processes, and resumes with 2"):
        resumed = train(checkpoint=path, epochs=1, batch_size=2)
    seen = [[case for event in run["events"] if event[0] == "batch" for case in event[4:]] for run in (whole, resumed)]
    assert seen[0][8:] == seen[1]


def test_the_same_without_the_callback_is_not_exact(tmp_path):
    """Else the test above would show nothing."""
    whole = train(tmp_path, exact=False)
    path = next(path for path in whole["paths"] if "batch-1" in path.name)
    assert differences(whole, train(checkpoint=path, exact=False))


@pytest.mark.parametrize("hook", ["train", "validation", "test", "predict"])
def test_random_numbers_follow_from_the_step_alone(hook):
    def drawn(rank=0, epoch=0, batch=0, before=0):
        callback = ExactResume()
        callback.seed = 7
        trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank, global_step=3)
        torch.manual_seed(before)
        getattr(callback, f"on_{hook}_batch_start")(trainer, None, None, batch)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert drawn() == drawn(before=1)
    for other in (drawn(rank=1), drawn(epoch=1), drawn(batch=1)):
        assert all(one != two for one, two in zip(drawn(), other, strict=True))


RANKS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch.distributed as dist
from training import train, differences

folder = Path(sys.argv[1])
settings = dict(devices=2, strategy="ddp", epochs=2)
whole = train(folder, **settings)
for path in sorted(folder.glob("*.ckpt")):
    found = differences(whole, train(checkpoint=path, **settings, seed=8))
    assert not found, (path.name, found)
    if dist.get_rank() == 0:
        print("the same from", path.name, flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_on_two_ranks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RANKS)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", str(script)]
    result = subprocess.run(
        [*run, str(tmp_path), str(Path(__file__).parent)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    # Two batches, a validation and an epoch's end in each of two epochs.
    assert result.stdout.count("the same from") == 8


KILLED = """
import os, random, signal, sys, time
# Imported once, so that the killed processes start quickly.
import lightning_dice.fit, lightning_dice.cli.experiment
import lightning_dice.plotting.curves, lightning_dice.callbacks.overlays
import torchmetrics, matplotlib.backends.backend_agg, segmentation_models_pytorch, torchvision.transforms.v2

folder, kills = sys.argv[1], int(sys.argv[2])

def begin(*arguments):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(folder + ".log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
        os.dup2(1, 2)
        sys.argv[1:] = arguments
        lightning_dice.fit.main()
        status = 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(status)

random.seed(kills)
child, done = begin(*sys.argv[3:], "folder=" + folder), 0
while True:
    if done < kills:
        end = time.monotonic() + random.uniform(0.1, 2.5)
        # Of the start nothing can be learned before there is something to go on with.
        while time.monotonic() < end or not os.path.exists(folder + "/config.yaml"):
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        done += 1
        child = begin("resume=" + folder)
        continue
    assert os.waitstatus_to_exitcode(status) == 0, open(folder + ".log").read()
    if done >= kills:
        break
    # Finished too early: it is still killed again, while it scores.
    child = begin("resume=" + folder)
print(done, "times killed")
"""

RUN = [
    "model=custom",
    "data.patch_size=[32,32]",
    "data.cases={train:24,val:6,test:4}",
    "data.batch_size=4",
    "data.num_workers=0",
    "device=cpu",
    "trainer.max_epochs=25",
    "callbacks=[frequent_checkpoint,ema]",
    "callbacks.frequent_checkpoint.every_n_train_steps=2",
]


def rows(path: Path) -> list[dict[str, str]]:
    measured = ("seconds", "images_per_second", "memory_gb")
    with path.open() as file:
        return [{key: value for key, value in row.items() if key not in measured} for row in csv.DictReader(file)]


def test_killed_at_random_moments(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    for name, kills in (("whole", 0), ("killed", 20)):
        line = [sys.executable, str(script), str(tmp_path / name), str(kills), *RUN]
        result = subprocess.run(line, capture_output=True, text=True, timeout=550, check=False)
        assert result.returncode == 0, result.stderr
    assert "20 times killed" in result.stdout
    paths = [tmp_path / name / "checkpoints" / "last.ckpt" for name in ("whole", "killed")]
    one, two = (torch.load(path, weights_only=True) for path in paths)
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key
    for index, state in one["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, two["optimizer_states"][0]["state"][index][key])
    for name in ("metrics.csv", "cases.csv"):
        assert rows(tmp_path / "whole" / name) == rows(tmp_path / "killed" / name), name
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))
