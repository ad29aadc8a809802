from __future__ import annotations

import sys
from pathlib import Path

# Tests share tests/definitions.py and helpers by plain import, whatever folder they lie in.
sys.path.insert(0, str(Path(__file__).parent))
