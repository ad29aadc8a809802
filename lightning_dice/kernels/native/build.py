"""Build the C++ kernels on the machine that runs them: once, in a few seconds, with no headers but the compiler's."""

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
# No fast-math, which some compilers enable by default: it breaks NaN and reorders sums.
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread"),
    *("-fno-fast-math", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-w"),
)
_TIMEOUT = 300  # seconds


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: `$CXX`, or the first of c++, g++ and clang++ on the path.

    Raises:
        OSError: no compiler was found.
    """
    if command := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(command[0]) is None:
            raise OSError(f"no C++ compiler: CXX is {shlex.join(command)}, but {command[0]} was not found")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise OSError("no C++ compiler: install g++ or clang, or set CXX")


def load_library() -> ctypes.CDLL:
    """Load the kernels from a prebuilt file or the cache of an earlier run, or build them now.

    A file `lightning_dice_kernels.so` beside this module, built by `python -m lightning_dice.kernels --build` for
    machines without a compiler, takes precedence. Kernels built here are kept in the user's cache folder
    (`$XDG_CACHE_HOME`) by sources, compiler and processor, or serve only this process if it cannot be written.

    Raises:
        OSError: there is neither a file nor a compiler, or the compiler failed; names the remedy.
    """
    if PREBUILT.is_file():
        return _load(PREBUILT)
    if sys.platform == "win32":
        raise OSError("the C++ kernels are not built on Windows")
    command = find_compiler()
    with tempfile.TemporaryDirectory() as private:
        folder = cache_folder()
        if not _is_private(folder):
            folder = Path(private)
        name = f"kernels-{_cache_key(command)}"
        for file in folder.glob(f"{name}-*.so"):
            if file.name == f"{name}-{_digest(file)}.so":
                return _load(file)
            file.unlink(missing_ok=True)  # Loading a truncated file would crash the process.
        handle, built = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            build(Path(built), command)
            try:
                library = _load(Path(built))
            except OSError:
                # The folder is mounted without permission to execute.
                return _load(Path(shutil.copy(built, private)))
            # Atomic, as several processes may build at once.
            os.replace(built, folder / f"{name}-{_digest(Path(built))}.so")
        finally:
            Path(built).unlink(missing_ok=True)
        return library


def cache_folder() -> Path:
    """Return the folder that holds built kernels."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_dice"
    except RuntimeError:  # The user has no home.
        return Path(os.devnull) / "lightning_dice"


def build(to: Path, command: list[str], machine: str = "native") -> Path:
    """Compile the kernels to a shared library.

    Args:
        to: path of the library.
        command: command of the compiler.
        machine: processors on which it will run, a value of the compiler's `-march`; `"native"` means this one.

    Raises:
        OSError: the compiler failed; quotes the beginning of its output.
    """
    sources = [str(HERE / source) for source in SOURCES]
    output = ""
    # Compilers differ in the flag for this processor, and some have none.
    for architecture in ([f"-march={machine}"], [f"-mcpu={machine}"], *([[]] if machine == "native" else [])):
        full = [*command, *FLAGS, f"-DSOURCE=0x{source_digest()}ULL", *architecture, *sources, "-o", str(to)]
        try:
            done = subprocess.run(full, capture_output=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{command[0]} took more than {_TIMEOUT} s to compile the kernels") from error
        if done.returncode == 0:
            with to.open("rb+") as file:
                os.fsync(file.fileno())
            return to
        output = output or done.stderr.strip()[:500]
        if machine not in done.stderr:
            break
    raise OSError(f"{shlex.join(command)} failed to compile the kernels: {output}")


def source_digest() -> str:
    """Return a digest of the sources, 16 hexadecimal digits."""
    parts = [(HERE / name).read_bytes() for name in ("common.h", *SOURCES)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _load(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    try:
        library.lightning_dice_source.restype = ctypes.c_uint64
        matches = library.lightning_dice_source() == int(source_digest(), 16)
    except AttributeError:
        matches = False
    if not matches:
        raise OSError(f"{file} was built from other sources: delete it, or build it again")
    return library


def _is_private(folder: Path) -> bool:
    """Whether a folder can be written by this user and nobody else."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _cache_key(command: list[str]) -> str:
    """Return a digest of all that a built file depends on, as different machines may share a home."""
    processor = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        pass
    program = Path(str(shutil.which(command[0]))).resolve()
    parts = (
        source_digest(),
        *command,
        *FLAGS,
        str(program),
        str(program.stat().st_size),
        platform.machine(),
        processor,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
