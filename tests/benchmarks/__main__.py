"""All benchmarks: `python -m tests.benchmarks`. Ratios from one process, with the variants interleaved."""

from __future__ import annotations

import platform

import lightning
import torch

from tests.benchmarks import communication, losses, pipeline, start_up, step

print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
print(f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}\n")
for benchmark in (start_up, step, losses):
    benchmark.main()
communication.main([])
pipeline.main([])
