"""The summary of an evaluation: `summary.csv`, `summary.json`, `report.html` and tables for the terminal."""

from __future__ import annotations

from lightning_dice.report.provenance import ScoreProvenance
from lightning_dice.report.score_table import format_score, score_table
from lightning_dice.report.writer import REPORT, SUMMARY, SUMMARY_DATA, write_report
from lightning_dice.scoring.summary import ScoreSummary

__all__ = [
    "REPORT",
    "SUMMARY",
    "SUMMARY_DATA",
    "ScoreProvenance",
    "ScoreSummary",
    "format_score",
    "score_table",
    "write_report",
]
