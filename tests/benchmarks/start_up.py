"""How soon the command answers, against an empty Hydra program."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.timing import interleaved, table

EMPTY = """
import hydra

@hydra.main(version_base="1.3", config_path=None)
def main(config): pass

if __name__ == "__main__": main()
"""


def timed(*arguments: str) -> Callable[[], float]:
    """A function that runs Python with these arguments and returns the seconds it took."""

    def run() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        return time.perf_counter() - start

    return run


def main() -> None:
    """Compare `--help` and `--cfg job`."""
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.py"
        empty.write_text(EMPTY)
        for flags in (["--help"], ["--cfg", "job"]):
            variants = {
                "an empty Hydra program": timed(str(empty), *flags),
                "lightning_dice.fit": timed("-m", "lightning_dice.fit", *flags),
            }
            table(f"`{' '.join(flags)}`", interleaved(variants, 15), "an empty Hydra program")


if __name__ == "__main__":
    main()
