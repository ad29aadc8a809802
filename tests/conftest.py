from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Two workers of pytest-xdist with all threads each would wait for one another most of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests share tests/helpers.py, tests/definitions.py and others by plain import, whatever folder they lie in.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """The folder of a finished run of two epochs, with scores and report; for reading only."""
    from helpers import SMALL, run_command

    home = tmp_path_factory.mktemp("trained")
    run_command("fit", *SMALL, "trainer.max_epochs=2", "folder=run", cwd=home)
    before = _contents(home)
    yield home / "run"
    assert _contents(home) == before, "a test wrote into the run that all tests share: copy it first"


def _contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


_test: pytest.Item | None = None
_start = subprocess.Popen.__init__


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    global _test
    _test = item
    yield
    _test = None


def _start_if_marked(self, args, *others, **options):
    """Fail a test of the quick tier that starts Python: a start costs as much as a hundred tests."""
    line = [args] if isinstance(args, (str, bytes, os.PathLike)) else list(args)
    ours = os.path.basename(os.fsdecode(line[0])).startswith(("python", "torchrun")) if line else False
    library = any("torch/_inductor" in str(part) for part in line)  # Its compile workers.
    if ours and not library and _test is not None and _test.get_closest_marker("process") is None:
        pytest.fail(f"{_test.nodeid} starts a process: mark it `process`, or use helpers.run_command", pytrace=True)
    return _start(self, args, *others, **options)


subprocess.Popen.__init__ = _start_if_marked
