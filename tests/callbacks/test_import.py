import subprocess
import sys

import pytest

import lightning_dice.callbacks as callbacks


def test_every_name_is_there():
    for name in callbacks.__all__:
        assert getattr(callbacks, name).__name__ == name
    assert set(callbacks.__all__) <= set(dir(callbacks))


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'Histroy'"):
        callbacks.Histroy  # noqa: B018


@pytest.mark.process
def test_nothing_heavy_is_imported_before_it_is_used():
    code = "import sys, lightning_dice.callbacks; print([m for m in ('torch', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
