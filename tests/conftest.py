from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

# Tests share tests/definitions.py and helpers by plain import, whatever folder they lie in.
sys.path.insert(0, str(Path(__file__).parent))

# Hydra imports its plugins when it first composes a config. Optuna's warn as they are imported; where warnings are
# errors that leaves half a module behind, for all tests that follow.
os.environ.setdefault("SQLALCHEMY_SILENCE_UBER_WARNING", "1")
with warnings.catch_warnings(), contextlib.suppress(ImportError):
    warnings.simplefilter("ignore")
    import optuna  # noqa: F401
