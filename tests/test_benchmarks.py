"""The benchmark of the sums runs to its end, with every contender, and its figure can be drawn."""

from __future__ import annotations

import contextlib
import io
import json
import re
from functools import partial

import pytest
import torch.multiprocessing as mp
from helpers import forkserver, shared

from tests.benchmarks import communication, figure, sums

# The benchmarks measure in processes of their own.
pytestmark = [pytest.mark.slow, pytest.mark.process]

CASES = ("binary", "19", "metrics-19")

TWINS = {"ours: reference", "ours: blocked", "ours: native"}
DICE = {"ours", "logits.clone()", "naive", "naive, compiled", "smp", "MONAI"}
BOTH = {"ours", "logits.clone()", "naive", "naive, compiled", "MONAI", "nnU-Net"} | TWINS
IDS = BOTH | {"F.cross_entropy alone", "nnU-Net, its Dice compiled"}
EXPECTED = {
    ("binary", "Dice"): DICE,
    ("binary", "Dice + cross-entropy"): BOTH | {"F.binary_cross_entropy_with_logits alone"},
    ("19", "Dice"): DICE,
    ("19", "Dice + cross-entropy"): IDS,
    ("metrics-19", "Counts from logits"): {
        "ours",
        "logits.clone()",
        "logits.argmax(1) alone",
        "logits.argmax(1) alone, compiled",
        "logits.max(1) alone",
    },
    ("metrics-19", "Counts from labels"): {"ours", "bincount of pairs", "torchmetrics DiceScore"},
}
# Not to be had everywhere: a compiler, a package without its dependencies.
OPTIONAL = {"nnU-Net", "nnU-Net, its Dice compiled", "ours: native"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What the quick command prints, and the file it writes."""

    def run(folder):
        results = folder / "results.json"
        options = ("--quick", "--device", "cpu", "--dtype", "float32", "--json", str(results), "--cases", *CASES)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            sums.main(options)
        return printed.getvalue(), results

    return shared(tmp_path_factory, "benchmarks", run)


def test_every_contender_has_a_row_with_times_and_memory(quick):
    printed, results = quick
    found = json.loads(results.read_text())
    assert {(t["case"], t["group"]): set(t["rows"]) for t in found["tables"]} == EXPECTED
    for table in found["tables"]:
        for name, row in table["rows"].items():
            assert f"\n| {name} |" in printed
            assert set(row["times"]) == {"default", "kept"}
            for times in row["times"].values():
                if name in OPTIONAL and "failure" in times:
                    continue
                assert "failure" not in times, name
                assert len(times["forward"]) == len(times["backward"]) == len(times["ratios"]) >= 3
                losses = table["backward"] and name != "logits.clone()"
                assert all(seconds > 0 for seconds in times["forward"])
                assert all((seconds > 0) == losses for seconds in times["backward"])
                assert "memory failure" not in row


def test_the_figure_is_drawn_from_its_results(quick, tmp_path):
    figure.main([str(quick[1]), str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_message_of_the_loss_is_timed(monkeypatch, capsys):
    forkserver()  # Its processes start quickly.
    forked = partial(mp.start_processes, start_method="forkserver")
    monkeypatch.setattr(mp, "start_processes", lambda *given, start_method, **named: forked(*given, **named))
    communication.main(["--quick"])
    printed = capsys.readouterr().out
    for name in ("DiceLoss", "DiceCELoss"):
        assert f"4x1x64x64, {name}**" in printed
    for row in ("one process, two threads", "two processes, across_ranks=False", "two processes, across_ranks=True"):
        assert printed.count(f"| {row} |") == 2
    shares = re.findall(r"^\| (?:alone|within a step, .*) \| [\d.]+ \| ([\d.]+)% \|$", printed, re.MULTILINE)
    assert len(shares) == 4
    # A message was sent, and its time is part of a step.
    assert all(0 < float(share) < 100 for share in shares)
