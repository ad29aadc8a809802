"""The notebooks run from top to bottom, and are stored as they ran."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# The kernel's own sockets, when it is stopped.
@pytest.mark.filterwarnings("ignore:unclosed", "ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_runs(path, tmp_path, monkeypatch):
    # Beside other work, spinning threads would take many times as long.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    notebook = nbformat.read(path, as_version=4)
    stored = kinds_of_output(notebook)
    assert sum(map(len, stored)) > 5, f"{path.name} is stored without its outputs"
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert kinds_of_output(notebook) == stored, f"{path.name} is stored with outputs that are not its code's"


def kinds_of_output(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """What each cell put out, warnings apart: text, or a value or a picture."""
    outputs = [[o for o in cell.get("outputs", []) if o.get("name") != "stderr"] for cell in notebook.cells]
    return [sorted({o.get("name", "data") for o in cell}) for cell in outputs]


def test_there_are_notebooks():
    assert "first_steps" in [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_errors_or_warnings_are_stored(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
