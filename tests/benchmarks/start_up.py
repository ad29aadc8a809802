"""What an import costs, how soon the command answers, and what a second process costs beyond its imports.

`python -m tests.benchmarks.start_up imports` measures the imports only.
"""

from __future__ import annotations

import os
import resource
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


# A process that Lightning starts for another device, up to the moment in which it would wait for the first one.
SECOND = """
import os, sys
from lightning_dice import fit
from lightning_dice.cli import experiment

def ready(self, *args, **kwargs):
    if len(sys.argv) > 1:
        open(sys.argv[1], "w").write(" ".join(sys.modules))
    os._exit(0)

experiment.Experiment.print_start = ready
fit.main()
"""

IMPORTS = """
import importlib, os, sys
for name in open(sys.argv[1]).read().split():
    try:
        importlib.import_module(name)
    except Exception:  # made by another one, and not there by itself
        pass
os._exit(0)
"""


def timed(*arguments: str, environment: dict[str, str] | None = None) -> Callable[[], float]:
    """A function that runs Python with these arguments and returns the seconds it took."""

    def run() -> float:
        start = time.perf_counter()
        line = [sys.executable, *arguments]
        subprocess.run(line, check=True, capture_output=True, env={**os.environ, **(environment or {})})
        return time.perf_counter() - start

    return run


LOSSES = {
    "torch": "import torch",
    "DiceLoss of lightning_dice": "from lightning_dice import DiceLoss",
    "DiceLoss of MONAI": "from monai.losses import DiceLoss",
    "DiceLoss of segmentation-models-pytorch": "from segmentation_models_pytorch.losses import DiceLoss",
}


def processor_time(code: str) -> Callable[[], float]:
    """A function that runs a line of Python in a new process and returns the CPU seconds it took."""

    def run() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return run


def imports() -> None:
    """Compare the imports of a Dice loss with that of torch, in CPU time."""
    variants = {name: processor_time(code) for name, code in LOSSES.items()}
    table("`from ... import DiceLoss`, CPU time of a new process", interleaved(variants, 11), "torch")


def second_process(folder: Path) -> None:
    """Compare the start of a second process with its imports."""
    import hydra
    from omegaconf import OmegaConf

    from lightning_dice.cli.config import CONF_DIR, RUN_VARIABLE, register_resolvers
    from lightning_dice.cli.rendezvous import RunSpec

    register_resolvers()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = hydra.compose("fit", overrides=[f"folder={folder}", "device=cpu", "trainer.devices=2"])
    config.trainer.strategy = "ddp"
    config.name = "start"
    resolved = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    told = RunSpec(folder, resolved).to_json()
    environment = {RUN_VARIABLE: told, "LOCAL_RANK": "1"}
    second, imports, names = folder / "second.py", folder / "imports.py", folder / "names"
    second.write_text(SECOND)
    imports.write_text(IMPORTS)
    subprocess.run(
        [sys.executable, str(second), str(names)], check=True, capture_output=True, env={**os.environ, **environment}
    )
    variants = {
        "its imports alone": timed(str(imports), str(names)),
        "a second process, until it waits for the first": timed(str(second), environment=environment),
    }
    table("`trainer.devices=2`", interleaved(variants, 7), "its imports alone")


def main() -> None:
    """Compare imports, `--help`, `--cfg job` and the start of a second process."""
    imports()
    if sys.argv[1:] == ["imports"]:
        return
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.py"
        empty.write_text(EMPTY)
        for flags in (["--help"], ["--cfg", "job"]):
            variants = {
                "an empty Hydra program": timed(str(empty), *flags),
                "lightning_dice.fit": timed("-m", "lightning_dice.fit", *flags),
            }
            table(f"`{' '.join(flags)}`", interleaved(variants, 15), "an empty Hydra program")
        second_process(Path(folder))


if __name__ == "__main__":
    main()
