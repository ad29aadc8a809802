"""The survey of a data set: every case is read and measured once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeAlias, get_args

import torch

from lightning_dice.data.batch import Sample
from lightning_dice.data.errors import DataError, DataErrors, DataProblem
from lightning_dice.data.images.datasets import FolderCases, TiledCases
from lightning_dice.data.interfaces import Cases, InspectableSource, Source, Split
from lightning_dice.data_check.alignment import Mismatch, find_mismatches
from lightning_dice.data_check.case_statistics import CaseStatistics, measure
from lightning_dice.data_check.task import Task
from lightning_dice.data_check.thumbnail import draw_thumbnail

LARGE = 2**25  # pixels, above which an image is measured in tiles
TILE = 4096  # pixels along an axis

SPLITS: tuple[Split, ...] = get_args(Split)

Location: TypeAlias = tuple[Split, int]  # of a case in the source: split and index
Readers: TypeAlias = dict[Split, Sequence[tuple[Cases, int]]]  # of each case: a data set, and the index there
Advance: TypeAlias = Callable[[int, int], None]  # number of cases done, and of all cases


@dataclass
class SurveyResult:
    """Everything measured about a data set.

    Attributes:
        task: meaning of its masks.
        cases: those that could be read, split by split.
        problems: those that could not, and everything else that training rejects.
        sizes: number of cases of each split, including unreadable ones, where each tile of a large image is a case;
            splits that do not exist are left out.
        facts: training settings that the checks use: `batch_size`, `channels` and `size` of the crops; and `root`,
            which is removed from file names.
        mismatches: masks that fit another image better than their own.
        images: number of images of each split, where that differs from the number of cases.

    >>> SurveyResult(Task(["cell"]), sizes={"train": 12}, images={"train": 3}).image_count("train")
    3
    """

    task: Task
    cases: list[CaseStatistics] = field(default_factory=list)
    problems: list[DataProblem] = field(default_factory=list)
    sizes: dict[Split, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    mismatches: list[Mismatch] = field(default_factory=list)
    images: dict[Split, int] = field(default_factory=dict)
    _reported: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def image_count(self, split: Split) -> int:
        """Return the number of images of a split."""
        return self.images.get(split, self.sizes.get(split, 0))

    def of(self, split: Split) -> list[CaseStatistics]:
        """Return the cases of a split."""
        return [case for case in self.cases if case.split == split]

    def by_key(self) -> dict[str, CaseStatistics]:
        """Return the cases by split and name."""
        return {case.key: case for case in self.cases}

    def add_problems(self, error: Exception, where: str = "") -> None:
        """Add the problems of an error, except for files that already have one.

        Args:
            error: raised by the source, or by reading a case.
            where: the case, if the error does not name a file.
        """
        for problem in _split_error(error, where):
            # Reading a case again raises what the source's own check has reported for its files.
            names = {str(problem), *(name.strip() for name in str(problem.where).split(", "))} - {""}
            if not names & self._reported:
                self.problems.append(problem)
                self._reported |= {str(problem), str(problem.where)}


def survey(
    source: Source,
    task: Task,
    *,
    workers: int = 2,
    thumbnails: int = 600,
    facts: Mapping[str, Any] | None = None,
    advance: Advance | None = None,
) -> SurveyResult:
    """Check a source as training does, then read and measure each of its cases.

    Cases that cannot be read are recorded as problems, and the others are measured. Each case leaves a few kilobytes in
    memory, and at most `2 * workers` cases are read at a time. Images of more than 2**25 pixels are measured in tiles
    of 4096 pixels along each axis, each as a case.

    Args:
        source: the source of the cases.
        task: the meaning of the masks.
        workers: number of threads.
        thumbnails: how many cases to draw at most, evenly spaced over all of them.
        facts: as in `SurveyResult`.
        advance: called after each case.

    >>> from lightning_dice.data import SyntheticSource
    >>> source = SyntheticSource(size=(32, 32), cases={"train": 3, "val": 1})
    >>> result = survey(source, Task(["object"], "sigmoid"))
    >>> [case.key for case in result.cases], result.sizes, result.problems
    (['train/train-0000', 'train/train-0001', 'train/train-0002', 'val/val-0000'], {'train': 3, 'val': 1}, [])
    """
    result = SurveyResult(task, facts=facts or {})
    try:
        source.check()
    except DataError as error:
        result.add_problems(error)
    readers = _open_splits(source, result)
    locations = [(split, index) for split, count in result.sizes.items() for index in range(count)]
    drawn = set(locations[:: max(1, -(-len(locations) // thumbnails))]) if thumbnails else set()
    kinds = source.kinds() if isinstance(source, InspectableSource) else {}

    def read(split: Split, index: int) -> Sample:
        cases, number = readers[split][index]
        return cases[number]

    def measure_at(location: Location) -> CaseStatistics:
        split, index = location
        sample = read(split, index)
        kind = kinds.get((split, sample.case)) or kinds.get((split, sample.case.rpartition("@")[0]), "")
        return measure(sample, split, task, index=index, kind=kind, thumbnail=location in drawn)

    def read_again(case: CaseStatistics) -> Sample | None:
        try:
            return read(case.split, case.index)
        except Exception:  # Readers may raise anything; what is wrong has been recorded when the case was measured.
            return None

    with _single_threaded():
        for done, (location, measured) in enumerate(_map_in_order(measure_at, locations, workers), 1):
            if isinstance(measured, CaseStatistics):
                result.cases.append(measured)
            else:
                result.add_problems(measured, f"{location[0]}[{location[1]}]")
            if advance is not None:
                advance(done, len(locations))
        result.mismatches = find_mismatches(result.cases, task, read_again)
    return result


def draw_missing(source: Source, result: SurveyResult, keys: Iterable[str]) -> None:
    """Draw the missing thumbnails of the cases named by `keys`; cases that cannot be read again are skipped."""
    by_key = result.by_key()
    with _single_threaded():
        for case in (by_key[key] for key in dict.fromkeys(keys) if key in by_key):
            if case.thumbnail is None:
                cases, _ = _open_split(source, case.split)
                with suppress(Exception):
                    if cases is not None:
                        dataset, number = _tile_large(cases)[case.index]
                        image, mask, *_ = dataset[number]
                        case.thumbnail = draw_thumbnail(torch.nan_to_num(image.float()), mask, result.task)


def _open_splits(source: Source, result: SurveyResult) -> Readers:
    """Open all splits that can be read, and record their sizes, or why they cannot be read."""
    readers: Readers = {}
    for split in SPLITS:
        cases, error = _open_split(source, split)
        if cases is not None:
            readers[split] = _tile_large(cases)
            result.sizes[split] = len(readers[split])
            if len(cases) != len(readers[split]):
                result.images[split] = len(cases)
        elif error is not None and not result.problems:
            result.add_problems(error)
    return readers


def _open_split(source: Source, split: Split) -> tuple[Cases | None, DataError | None]:
    """Return the cases of a split and any error; some sources give their readable cases despite the error."""
    try:
        return source.split(split), None
    except DataError as error:
        return (source.readable(split) if isinstance(source, InspectableSource) else None), error


def _tile_large(cases: Cases) -> Sequence[tuple[Cases, int]]:
    """Return each case as a data set and an index into it, followed by the tiles of images too large to measure."""
    if not isinstance(cases, FolderCases):
        return [(cases, index) for index in range(len(cases))]
    large = [index for index, size in enumerate(cases.sizes) if prod(size) > LARGE]
    pairs, sizes = [cases.pairs[index] for index in large], [cases.sizes[index] for index in large]
    tiles = TiledCases(replace(cases, pairs=pairs, sizes=sizes), TILE)
    rest = [(cases, index) for index in range(len(cases)) if index not in large]
    return [*rest, *((tiles, index) for index in range(len(tiles)))]


def _map_in_order(
    function: Callable[[Location], CaseStatistics], locations: Sequence[Location], workers: int
) -> Iterator[tuple[Location, CaseStatistics | Exception]]:
    """Apply a function in threads and yield results or errors in order, never more than `2 * workers` ahead."""
    running: deque[tuple[Location, Future[CaseStatistics]]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:

        def next_result() -> tuple[Location, CaseStatistics | Exception]:
            location, future = running.popleft()
            error = future.exception()
            if error is None:
                return location, future.result()
            if isinstance(error, Exception):
                return location, error
            raise error

        try:
            for location in locations:
                running.append((location, pool.submit(function, location)))
                if len(running) >= 2 * workers:
                    yield next_result()
            while running:
                yield next_result()
        finally:
            for _, future in running:
                future.cancel()


def _split_error(error: Exception, where: str = "") -> Sequence[DataProblem]:
    """Return the single problems of an error; an unexpected error is described with its type."""
    if isinstance(error, DataErrors):
        return [problem for single in error.problems for problem in _split_error(single)]
    if isinstance(error, DataProblem):
        return [error]
    what = str(error) if isinstance(error, DataError) else f"cannot be read ({type(error).__name__}: {error})"
    return [DataProblem(what, where)]


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Limit torch to one thread for each of ours: it would start others in each of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
