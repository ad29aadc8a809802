"""The mutations fit the package as it is; whether tests catch them is for `python -m tests.mutations`."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import lightning_dice

HERE, PACKAGE = Path(__file__).parent, Path(lightning_dice.__file__).parent


def mutations():
    spec = importlib.util.spec_from_file_location("mutations", HERE / "mutations.py")
    module = sys.modules["mutations"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MUTATIONS


def test_each_replaces_one_text_and_names_tests_that_exist():
    chosen = mutations()
    texts = {file: (PACKAGE / file).read_text(encoding="utf-8") for file in {one.file for one in chosen}}
    assert [(one.name, one.file) for one in chosen if texts[one.file].count(one.old) != 1] == []
    assert [name for name, count in Counter(one.name for one in chosen).items() if count > 1] == []
    files = {test.partition("::")[0] for one in chosen for test in one.tests}
    assert [file for file in sorted(files) if not (HERE / file).is_file()] == []
