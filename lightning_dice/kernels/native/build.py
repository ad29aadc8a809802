"""Builds the C++ kernels on the machine they run on: no headers but the compiler's own, a few seconds, once."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("sums.cpp", "counts.cpp")
PREBUILT = HERE / "lightning_dice_kernels.so"
# No fast-math: a NaN must stay one, and sums keep their order.
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-w"),
)
_LIMIT = 300  # seconds


def compiler() -> str | None:
    """The C++ compiler: `$CXX`, or the first of c++, g++ and clang++ that there is."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def library() -> ctypes.CDLL:
    """The kernels, from a prebuilt file, from the cache of an earlier run, or built now.

    A file `lightning_dice_kernels.so` beside this module is taken as it is: what a package for machines without a
    compiler brings (`python -m lightning_dice.kernels --build`). What is built here is kept in the user's cache folder
    (`$XDG_CACHE_HOME`), by sources, compiler and processor; where that cannot be written, it serves this process alone.

    Raises:
        OSError: there is neither a file nor a compiler, or the compiler failed; says what to do.
    """
    if PREBUILT.is_file():
        return ctypes.CDLL(str(PREBUILT))
    if sys.platform == "win32":
        raise OSError("the C++ kernels are not built on Windows")
    command = compiler()
    if command is None:
        raise OSError("no C++ compiler: install g++ or clang, or set CXX")
    name = f"kernels-{_key(command)}.so"
    folder = cache()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (folder / name).is_file():
            build(folder / name, command)
        return ctypes.CDLL(str(folder / name))
    except OSError:  # A home that cannot be written, or from which nothing may be run.
        with tempfile.TemporaryDirectory() as temporary:
            return ctypes.CDLL(str(build(Path(temporary) / name, command)))


def cache() -> Path:
    """The folder in which built kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_dice"


def build(to: Path, command: str, machine: str = "native") -> Path:
    """Compile the kernels to a shared library.

    Args:
        to: the file.
        command: the compiler.
        machine: the processors it is to run on, as the compiler's `-march`; `"native"`: this one.

    Raises:
        OSError: with the last lines that the compiler said.
    """
    sources = [str(HERE / source) for source in SOURCES]
    part = to.with_name(f"{to.name}.{os.getpid()}")  # Whole or not at all: several processes may build at once.
    # What "this processor" is called differs, and not every compiler knows it.
    for architecture in ([f"-march={machine}"], [f"-mcpu={machine}"], *([[]] if machine == "native" else [])):
        try:
            done = subprocess.run(
                [command, *FLAGS, *architecture, *sources, "-o", str(part)],
                capture_output=True,
                text=True,
                timeout=_LIMIT,
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{command} took more than {_LIMIT} s to compile the kernels") from error
        if done.returncode == 0:
            os.replace(part, to)
            return to
    part.unlink(missing_ok=True)
    raise OSError(f"{command} failed to compile the kernels: {done.stderr.strip()[-500:]}")


def _key(command: str) -> str:
    """What a built file depends on, as a short name: a home may be shared by machines that differ."""
    processor = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        pass
    parts = [(HERE / name).read_bytes() for name in ("common.h", *SOURCES)]
    stamp = Path(command).resolve()
    parts += [text.encode() for text in (*FLAGS, str(stamp), str(stamp.stat().st_size), platform.machine(), processor)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
