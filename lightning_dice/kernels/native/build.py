"""Builds the C++ kernels on the machine they run on: no headers but the compiler's own, a few seconds, once."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("sums.cpp", "counts.cpp")
PREBUILT = HERE / "lightning_dice_kernels.so"
# No fast-math, which some compilers have by default: a NaN must stay one, and sums keep their order.
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread"),
    *("-fno-fast-math", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-w"),
)
_LIMIT = 300  # seconds


def compiler() -> list[str]:
    """The command of the C++ compiler: `$CXX`, or the first of c++, g++ and clang++ that there is.

    Raises:
        OSError: there is none.
    """
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(chosen[0]) is None:
            raise OSError(f"no C++ compiler: CXX is {shlex.join(chosen)}, and there is no {chosen[0]}")
        return chosen
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise OSError("no C++ compiler: install g++ or clang, or set CXX")


def library() -> ctypes.CDLL:
    """The kernels, from a prebuilt file, from the cache of an earlier run, or built now.

    A file `lightning_dice_kernels.so` beside this module is taken as it is: what a package for machines without a
    compiler brings (`python -m lightning_dice.kernels --build`). What is built here is kept in the user's cache folder
    (`$XDG_CACHE_HOME`), by sources, compiler and processor; where that cannot be, it serves this process alone.

    Raises:
        OSError: there is neither a file nor a compiler, or the compiler failed; says what to do.
    """
    if PREBUILT.is_file():
        return _loaded(PREBUILT)
    if sys.platform == "win32":
        raise OSError("the C++ kernels are not built on Windows")
    command = compiler()
    with tempfile.TemporaryDirectory() as private:
        folder = cache()
        if not _is_ours(folder):
            folder = Path(private)
        name = f"kernels-{_key(command)}"
        for file in folder.glob(f"{name}-*.so"):
            if file.name == f"{name}-{_digest(file)}.so":
                return _loaded(file)
            file.unlink(missing_ok=True)  # Loading what was cut short would end the process.
        handle, part = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            build(Path(part), command)
            try:
                found = _loaded(Path(part))
            except OSError:
                # A folder from which nothing may be run.
                return _loaded(Path(shutil.copy(part, private)))
            # Whole or not at all: several processes may build at once.
            os.replace(part, folder / f"{name}-{_digest(Path(part))}.so")
        finally:
            Path(part).unlink(missing_ok=True)
        return found


def cache() -> Path:
    """The folder in which built kernels are kept."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_dice"
    except RuntimeError:  # A user without a home.
        return Path(os.devnull) / "lightning_dice"


def build(to: Path, command: list[str], machine: str = "native") -> Path:
    """Compile the kernels to a shared library.

    Args:
        to: the file.
        command: of the compiler.
        machine: the processors it is to run on, as the compiler's `-march`; `"native"`: this one.

    Raises:
        OSError: with the first lines that the compiler said.
    """
    sources = [str(HERE / source) for source in SOURCES]
    said = ""
    # What "this processor" is called differs, and not every compiler knows it.
    for architecture in ([f"-march={machine}"], [f"-mcpu={machine}"], *([[]] if machine == "native" else [])):
        full = [*command, *FLAGS, f"-DSOURCE=0x{source()}ULL", *architecture, *sources, "-o", str(to)]
        try:
            done = subprocess.run(full, capture_output=True, encoding="utf-8", errors="replace", timeout=_LIMIT)
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{command[0]} took more than {_LIMIT} s to compile the kernels") from error
        if done.returncode == 0:
            with to.open("rb+") as file:
                os.fsync(file.fileno())
            return to
        said = said or done.stderr.strip()[:500]
        if machine not in done.stderr:
            break
    raise OSError(f"{shlex.join(command)} failed to compile the kernels: {said}")


def source() -> str:
    """What a library was built of: 16 hexadecimal digits."""
    parts = [(HERE / name).read_bytes() for name in ("common.h", *SOURCES)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _loaded(file: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(file))
    try:
        found.lightning_dice_source.restype = ctypes.c_uint64
        matches = found.lightning_dice_source() == int(source(), 16)
    except AttributeError:
        matches = False
    if not matches:
        raise OSError(f"{file} was built of other sources: delete it, or build it again")
    return found


def _is_ours(folder: Path) -> bool:
    """Whether files can be put into a folder, by nobody but its owner."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _key(command: list[str]) -> str:
    """What a built file depends on, as a short name: a home may be shared by machines that differ."""
    processor = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        pass
    program = Path(str(shutil.which(command[0]))).resolve()
    parts = (source(), *command, *FLAGS, str(program), str(program.stat().st_size), platform.machine(), processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
