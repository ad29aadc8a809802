"""How the C++ kernels are built, and their guarantees beyond correct sums."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_dice import DiceLoss
from lightning_dice.kernels import RequiredSums, available, forced, native, overlap_sums
from lightning_dice.kernels.native import build

needs_native = pytest.mark.skipif(available()["native"] is not None, reason=str(available()["native"]))


def has_compiler():
    try:
        return bool(build.find_compiler())
    except OSError:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

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
    """Run code in a fresh interpreter and return the lines of its output."""
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    everything.pop("LIGHTNING_DICE_KERNEL", None) if "LIGHTNING_DICE_KERNEL" not in env else None
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=everything, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def by_reference():
    logits = torch.linspace(-3, 3, 96).view(1, 1, 8, 12).requires_grad_()
    with forced("reference"):
        loss = DiceLoss()(logits, (logits.detach() > 1).long())
        loss.backward()
    return f"{float(loss.detach()):.6f} {float(logits.grad.abs().sum()):.6f}"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Kernels built by the compiler."""
    return build.build(tmp_path_factory.mktemp("library") / "kernels.so", build.find_compiler())


@pytest.fixture(scope="module")
def fast_compiler(tmp_path_factory, library):
    """A compiler that copies those kernels, for tests of the cache: a real one takes ten seconds."""
    script = f'for last; do :; done; {shutil.which("cp")} {library} "$last"'
    return str(Path(compiler_in(tmp_path_factory.mktemp("fast") / "bin", script)) / "c++")


def compiler_in(folder, script):
    """Return a folder for PATH that holds one program, a compiler that runs the script."""
    folder.mkdir()
    file = folder / "c++"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(folder)


@needs_compiler
def test_they_build_here():
    """If they did not, the tests of the kernels would be skipped unnoticed."""
    assert available()["native"] is None


@pytest.mark.process
def test_without_a_compiler_the_next_best_runs_and_the_reason_is_reported(tmp_path, by_reference):
    (tmp_path / "nothing").mkdir()
    value, why = python(LOSS, PATH=str(tmp_path / "nothing"), CXX="", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert value == by_reference
    assert why == "no C++ compiler: install g++ or clang, or set CXX"


@pytest.mark.process
def test_a_compiler_that_fails_is_no_failure(tmp_path, by_reference):
    path = compiler_in(tmp_path / "bin", 'echo "internal error 17" >&2; exit 1')
    value, why = python(LOSS, PATH=path, CXX="", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert value == by_reference
    assert "failed to compile the kernels: internal error 17" in why
    assert not list((tmp_path / "cache").rglob("*.so*"))


@pytest.mark.process
def test_a_compiler_that_makes_nonsense_is_no_failure(tmp_path, by_reference):
    echo = shutil.which("printf")
    path = compiler_in(tmp_path / "bin", f'for last; do :; done; {echo} nonsense > "$last"')
    value, why = python(LOSS, PATH=path, CXX="", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert value == by_reference
    assert why != "None"


@pytest.mark.process
@needs_compiler
def test_built_once_and_kept(tmp_path, by_reference):
    cache = tmp_path / "cache"
    assert python(LOSS, XDG_CACHE_HOME=str(cache)) == [by_reference, "None"]
    (file,) = (cache / "lightning_dice").iterdir()
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    before = file.stat().st_mtime_ns
    assert python(LOSS, XDG_CACHE_HOME=str(cache)) == [by_reference, "None"]
    assert file.stat().st_mtime_ns == before


@pytest.mark.process
@needs_compiler
def test_several_processes_may_build_at_once(tmp_path, by_reference, fast_compiler):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "CXX": fast_compiler}
    env.pop("LIGHTNING_DICE_KERNEL", None)
    runs = [
        subprocess.Popen([sys.executable, "-c", LOSS], stdout=subprocess.PIPE, text=True, env=env) for _ in range(3)
    ]
    for run in runs:
        assert run.communicate(timeout=300)[0].splitlines() == [by_reference, "None"]
    assert len(list((tmp_path / "lightning_dice").iterdir())) == 1


@pytest.mark.process
@needs_compiler
def test_a_file_that_was_cut_short_is_built_again(tmp_path, by_reference, fast_compiler):
    """Loading it would crash the process."""
    env = {"XDG_CACHE_HOME": str(tmp_path), "CXX": fast_compiler}
    assert python(LOSS, **env) == [by_reference, "None"]
    for left in (0.0, 0.9):
        (file,) = (tmp_path / "lightning_dice").iterdir()
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * left)])
        assert python(LOSS, **env) == [by_reference, "None"]
        (again,) = (tmp_path / "lightning_dice").iterdir()
        assert again.read_bytes() == whole


@pytest.mark.process
@needs_compiler
def test_a_folder_that_others_can_write_is_not_trusted(tmp_path, by_reference, fast_compiler):
    folder = tmp_path / "lightning_dice"
    folder.mkdir()
    folder.chmod(0o777)
    assert python(LOSS, XDG_CACHE_HOME=str(tmp_path), CXX=fast_compiler) == [by_reference, "None"]
    assert not list(folder.iterdir())


@pytest.mark.process
def test_a_compiler_that_is_named_must_exist(tmp_path, by_reference):
    value, why = python(LOSS, CXX="/does/not/exist -m64", XDG_CACHE_HOME=str(tmp_path))
    assert value == by_reference
    assert why == "no C++ compiler: CXX is /does/not/exist -m64, but /does/not/exist was not found"


@pytest.mark.slow
@needs_compiler
def test_a_compiler_may_have_arguments(monkeypatch, tmp_path, fast_compiler):
    monkeypatch.setenv("CXX", f"env {fast_compiler} -g0")
    assert build.find_compiler() == ["env", fast_compiler, "-g0"]
    assert build.build(tmp_path / "kernels.so", build.find_compiler()).is_file()


@pytest.mark.process
@needs_compiler
def test_threads_that_come_at_once_build_once(tmp_path, fast_compiler):
    code = """
import threading, pathlib, os
from lightning_dice.kernels import native
seen = []
threads = [threading.Thread(target=lambda: seen.append(native.unavailable_reason())) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print(seen, len(list((pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "lightning_dice").iterdir())))
"""
    assert python(code, XDG_CACHE_HOME=str(tmp_path), CXX=fast_compiler) == ["[None, None, None, None] 1"]


@pytest.mark.process
@needs_compiler
def test_a_user_without_a_home(by_reference, fast_compiler):
    code = f"import pathlib\ndef home(): raise RuntimeError('no home')\npathlib.Path.home = home\n{LOSS}"
    assert python(code, XDG_CACHE_HOME="", HOME="", CXX=fast_compiler) == [by_reference, "None"]


@needs_native
def test_no_memory_is_an_error_and_no_crash(monkeypatch):
    logits = torch.zeros(1, 2, 4)
    monkeypatch.setattr(native, "_NO_MEMORY", 0)
    with forced("native"), pytest.raises(MemoryError, match="not enough memory for the partial results"):
        overlap_sums(logits, torch.zeros(1, 4, dtype=torch.long), activation="softmax")


@pytest.mark.process
@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path, by_reference, fast_compiler):
    (tmp_path / "file").write_text("")
    assert python(LOSS, XDG_CACHE_HOME=str(tmp_path / "file"), CXX=fast_compiler) == [by_reference, "None"]


@pytest.mark.slow
@needs_compiler
def test_a_prebuilt_file_needs_no_compiler(library, monkeypatch):
    monkeypatch.setattr(build, "PREBUILT", library)
    monkeypatch.setattr(build, "find_compiler", lambda: pytest.fail("not needed"))
    assert build.load_library().lightning_dice_count_call_size() > 0
    monkeypatch.setattr(build, "source_digest", lambda: "0123456789abcdef")
    with pytest.raises(OSError, match="was built from other sources"):
        build.load_library()


@pytest.mark.slow
@needs_compiler
def test_a_processor_that_the_compiler_does_not_know(tmp_path):
    with pytest.raises(OSError, match="failed to compile the kernels"):
        build.build(tmp_path / "kernels.so", build.find_compiler(), "abacus-7")
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_a_kernel_named_in_the_environment_must_be_available(tmp_path):
    (tmp_path / "nothing").mkdir()
    code = f"""
try:
    exec({LOSS!r})
except ValueError as error:
    print(error)
"""
    env = {"PATH": str(tmp_path / "nothing"), "CXX": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    (message,) = python(code, LIGHTNING_DICE_KERNEL="native", **env)
    assert message.startswith("'native' cannot run here: no C++ compiler")
    (message,) = python(code, LIGHTNING_DICE_KERNEL="quick")
    assert message == "the implementation of the sums must be one of reference, native, blocked, triton, got 'quick'"


@pytest.mark.process
def test_the_command_lists_the_implementations():
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
                sums = overlap_sums(leaf, target, activation=activation, required=RequiredSums(nll=True))
            stacked = torch.stack(list(sums.fields.values()))
            (stacked * torch.linspace(-1, 1, stacked.numel()).view(stacked.shape)).sum().backward()
            results.append((stacked.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for stacked, gradient in results[1:]:
        assert torch.equal(stacked, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.process
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
