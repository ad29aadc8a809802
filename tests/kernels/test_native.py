"""How the C++ kernels come to be, and what they promise beyond the numbers."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_dice.kernels import Wanted, available, forced, native, overlap_sums
from lightning_dice.kernels.native import build

needs_native = pytest.mark.skipif(available()["native"] is not None, reason=str(available()["native"]))
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")

LOSS = """
import torch
from lightning_dice import DiceLoss
from lightning_dice.kernels import available
logits = torch.linspace(-3, 3, 96).view(1, 1, 8, 12).requires_grad_()
loss = DiceLoss()(logits, (logits.detach() > 1).long())
loss.backward()
print(f"{float(loss.detach()):.6f} {float(logits.grad.abs().sum()):.6f}")
print(available()["native"])
"""


def python(code, **env):
    """Output lines of a fresh interpreter."""
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    everything.pop("LIGHTNING_DICE_KERNEL", None) if "LIGHTNING_DICE_KERNEL" not in env else None
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=everything, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def by_reference():
    return python(LOSS, LIGHTNING_DICE_KERNEL="reference")[0]


def compiler_in(folder, script):
    """A folder for PATH that has one program: a compiler that does what the script says."""
    folder.mkdir()
    file = folder / "c++"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(folder)


def test_without_a_compiler_the_next_best_works_and_says_so(tmp_path, by_reference):
    (tmp_path / "nothing").mkdir()
    value, why = python(LOSS, PATH=str(tmp_path / "nothing"), CXX="", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert value == by_reference
    assert why == "no C++ compiler: install g++ or clang, or set CXX"


def test_a_compiler_that_fails_is_no_failure(tmp_path, by_reference):
    path = compiler_in(tmp_path / "bin", 'echo "internal error 17" >&2; exit 1')
    value, why = python(LOSS, PATH=path, CXX="", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert value == by_reference
    assert "failed to compile the kernels: internal error 17" in why
    assert not list((tmp_path / "cache").rglob("*.so*"))


def test_a_compiler_that_makes_nonsense_is_no_failure(tmp_path, by_reference):
    echo = shutil.which("printf")
    path = compiler_in(tmp_path / "bin", f'for last; do :; done; {echo} nonsense > "$last"')
    value, why = python(LOSS, PATH=path, CXX="", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert value == by_reference
    assert why != "None"


@needs_compiler
def test_built_once_and_kept(tmp_path, by_reference):
    cache = tmp_path / "cache"
    assert python(LOSS, XDG_CACHE_HOME=str(cache)) == [by_reference, "None"]
    (file,) = (cache / "lightning_dice").iterdir()
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    before = file.stat().st_mtime_ns
    assert python(LOSS, XDG_CACHE_HOME=str(cache)) == [by_reference, "None"]
    assert file.stat().st_mtime_ns == before


@needs_compiler
def test_several_processes_may_build_at_once(tmp_path, by_reference):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env.pop("LIGHTNING_DICE_KERNEL", None)
    runs = [
        subprocess.Popen([sys.executable, "-c", LOSS], stdout=subprocess.PIPE, text=True, env=env) for _ in range(3)
    ]
    for run in runs:
        assert run.communicate(timeout=300)[0].splitlines() == [by_reference, "None"]
    assert len(list((tmp_path / "lightning_dice").iterdir())) == 1


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path, by_reference):
    (tmp_path / "file").write_text("")
    assert python(LOSS, XDG_CACHE_HOME=str(tmp_path / "file")) == [by_reference, "None"]


@needs_compiler
def test_a_prebuilt_file_needs_no_compiler(tmp_path, monkeypatch):
    file = build.build(tmp_path / "kernels.so", str(build.compiler()), "native")
    monkeypatch.setattr(build, "PREBUILT", file)
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert build.library().lightning_dice_count_size() > 0


@needs_compiler
def test_a_processor_that_the_compiler_does_not_know(tmp_path):
    with pytest.raises(OSError, match="failed to compile the kernels"):
        build.build(tmp_path / "kernels.so", str(build.compiler()), "abacus-7")
    assert not list(tmp_path.iterdir())


def test_a_kernel_named_in_the_environment_must_be_there(tmp_path):
    (tmp_path / "nothing").mkdir()
    code = f"""
try:
    exec({LOSS!r})
except ValueError as error:
    print(error)
"""
    env = {"PATH": str(tmp_path / "nothing"), "CXX": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    (said,) = python(code, LIGHTNING_DICE_KERNEL="native", **env)
    assert said.startswith("'native' cannot run here: no C++ compiler")
    (said,) = python(code, LIGHTNING_DICE_KERNEL="quick")
    assert said == "LIGHTNING_DICE_KERNEL must be one of reference, native, blocked, triton, got 'quick'"


def test_the_command_tells_what_there_is():
    done = subprocess.run([sys.executable, "-m", "lightning_dice.kernels"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["reference", "can", "run"]
    assert [line.split()[0] for line in lines[:4]] == list(available())


@needs_native
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_results_do_not_depend_on_the_number_of_threads(activation):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 300, 301)
    shape = (2, 300, 301) if activation == "softmax" else logits.shape
    target = torch.randint(0, 2, shape)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            leaf = logits.clone().requires_grad_()
            with forced("native", strict=True):
                sums = overlap_sums(leaf, target, activation=activation, wanted=Wanted(nll=True))
            stacked = torch.stack(list(sums.fields.values()))
            (stacked * torch.linspace(-1, 1, stacked.numel()).view(stacked.shape)).sum().backward()
            results.append((stacked.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for stacked, gradient in results[1:]:
        assert torch.equal(stacked, results[0][0])
        assert torch.equal(gradient, results[0][1])


@needs_native
def test_works_in_a_forked_process_with_one_thread_and_in_a_thread():
    code = """
import os, threading, torch
from lightning_dice import DiceLoss
logits, target = torch.randn(2, 1, 400, 400), torch.randint(0, 2, (2, 1, 400, 400))
expected = float(DiceLoss()(logits, target))
seen = []
thread = threading.Thread(target=lambda: seen.append(float(DiceLoss()(logits, target))))
thread.start(); thread.join()
child = os.fork()
if not child:
    torch.set_num_threads(1)
    os._exit(0 if float(DiceLoss()(logits, target)) == expected else 7)
print(seen == [expected], os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code, OMP_NUM_THREADS="2", LIGHTNING_DICE_KERNEL="native") == ["True 0"]


def test_sources_travel_with_the_package():
    folder = Path(native.__file__).parent
    assert {"common.h", "sums.cpp", "counts.cpp"} <= {file.name for file in folder.iterdir()}
