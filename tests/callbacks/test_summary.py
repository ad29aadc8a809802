import io
import math

from rich.console import Console

from lightning_dice.report.run_summary import summary_table


def shown(table, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_metrics_and_files(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "cases.csv").touch()
    val = {"val/loss": 0.25, "val/dice/car": 0.5, "val/dice": 0.75, "val/dice/sky": math.nan}
    files = {"cases": folder / "cases.csv", "curves": folder / "curves.png", "config": "/dev/null"}
    lines = shown(summary_table(folder, val, {"test/dice": 0.7, "test/loss": 0.3}, files, best_epoch=4), width=200)
    text = "\n".join(lines)
    cells = [line.split() for line in lines if line]
    assert ["loss", "0.2500", "0.3000"] in cells
    assert ["dice", "0.7500", "0.7000"] in cells
    assert ["car", "0.5000"] in cells
    assert [row[0] for row in cells[3:7]] == ["loss", "dice", "car", "sky"]
    assert "best epoch: 4" in text
    assert ["folder", str(folder)] in cells
    assert ["cases", "cases.csv"] in cells
    assert ["config", "/dev/null"] in cells
    assert "curves" not in text


def test_without_a_test_split(tmp_path):
    assert "test " not in "\n".join(shown(summary_table(tmp_path, {"val/dice": 0.5}), width=200)).replace(
        str(tmp_path), ""
    )


def test_brackets_in_names_are_no_markup(tmp_path):
    assert any("[red]car" in line for line in shown(summary_table(tmp_path, {"val/dice/[red]car": 0.5})))
