"""What the imports of a script load: torch for the losses, and nothing else that is slow."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

LOADED = """
import sys
import torch

before = set(sys.modules)
import lightning_dice
from lightning_dice import DiceLoss

target = torch.randint(0, 2, (1, 1, 8, 8)).float()
DiceLoss()(torch.randn(1, 1, 8, 8, requires_grad=True), target).backward()
print(*sorted({name for name in set(sys.modules) - before if not name.startswith("lightning_dice")}))
"""


def run(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_the_loss_loads_torch_and_nothing_heavy():
    loaded = run(LOADED)
    others = {name.split(".")[0] for name in loaded} - sys.stdlib_module_names
    assert others <= {"torch"}
    # `torch._dynamo` alone takes a second, and brings sympy and Triton.
    assert not {"torch._dynamo", "torch._inductor", "torch.onnx", "torch.fx.experimental"} & set(loaded)


def test_the_package_alone_does_not_load_torch():
    code = "import sys, lightning_dice; print(*({'torch', 'numpy', 'lightning', 'hydra'} & set(sys.modules)))"
    assert run(code) == []
