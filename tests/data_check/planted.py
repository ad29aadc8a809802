"""Data sets in memory, with and without problems."""

from __future__ import annotations

from functools import cache

from lightning_dice.data import DataError, Sample, SyntheticSource
from lightning_dice.data_check.checks import run_checks
from lightning_dice.data_check.finding import Finding
from lightning_dice.data_check.survey import SurveyResult, survey
from lightning_dice.data_check.task import Task

TASK = Task(["object"], "sigmoid")
SIZES = {"train": 14, "val": 6, "test": 6}

Data = dict[str, list[Sample]]


class Listed:
    """A source of samples in memory."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def check(self) -> str:
        return ""

    def split(self, name: str) -> _Cases | None:
        return _Cases(self.data[name]) if name in self.data else None


class _Cases(list[Sample]):
    @property
    def sizes(self) -> list[tuple[int, ...]]:
        return [tuple(sample.image.shape[1:]) for sample in self]

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if isinstance(sample, Exception):
            raise sample
        return sample


@cache
def _drawn(size: tuple[int, ...]) -> dict[str, tuple[Sample, ...]]:
    source = SyntheticSource(size=size, cases=SIZES, foreground_fraction=0.08, contrast=0.5, seed=3)
    # The few images without an object are replaced by spare ones.
    spare = iter(
        SyntheticSource(size=size, cases=(40, 0, 0), foreground_fraction=0.08, contrast=0.5, seed=4).split("train")
    )
    parts = {}
    for split in SIZES:
        samples = list(source.split(split))
        for index, sample in enumerate(samples):
            while not samples[index].mask.any():
                samples[index] = next(spare)._replace(case=sample.case)
        parts[split] = tuple(samples)
    return parts


def sound(size: tuple[int, ...] = (64, 64)) -> Data:
    """Three splits of blobs without problems."""
    return {
        split: [Sample(s.image.clone(), s.mask.clone(), s.case) for s in part] for split, part in _drawn(size).items()
    }


def change(data: Data, split: str, index: int, **fields: object) -> str:
    """Replace fields of a sample; return its key in findings."""
    data[split][index] = data[split][index]._replace(**fields)
    return f"{split}/{data[split][index].case}"


def inspected(data: Data, task: Task = TASK, **facts: object) -> tuple[SurveyResult, dict[str, Finding]]:
    """The survey of the data, and its findings by kind."""
    found = survey(Listed(data), task, facts=facts)
    return found, {finding.kind: finding for finding in run_checks(found)}


def broken(data: Data, split: str, index: int) -> None:
    """Make a case unreadable."""
    data[split][index] = DataError("a.png: is empty (0 bytes)")
