"""Every case of a source, read once and measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, get_args

import torch

from lightning_dice.data.batch import Sample
from lightning_dice.data.errors import DataError, DataErrors, DataProblem
from lightning_dice.data.images.datasets import FolderCases, TiledCases
from lightning_dice.data.interfaces import Cases, Source, Split, Surveyed
from lightning_dice.data_check.alignment_checks import Mismatch, find_mismatches
from lightning_dice.data_check.case_statistics import CaseStatistics, Task, draw, measure

LARGE = 2**25  # pixels, beyond which an image is measured in tiles
TILE = 4096  # pixels along an axis

Place = tuple[Split, int]
SPLITS: tuple[Split, ...] = get_args(Split)

Advance = Callable[[int, int], None]  # cases done, and of how many


@dataclass
class SurveyResult:
    """What a source holds.

    Attributes:
        task: what its masks mean.
        cases: all that could be read, split by split.
        problems: what could not, and everything else that a training refuses.
        sizes: how many cases each split has, the unreadable ones included, and each tile of a large image one; splits
            that do not exist are left out.
        facts: settings of a training that decide what matters: `batch_size`, `channels`, and `size` of the crops; and
            `root`, which is left out of the names of files.
        mismatches: masks that fit another image better than their own.
        images: how many each split has, where that is not the number of its cases.
    """

    task: Task
    cases: list[CaseStatistics] = field(default_factory=list)
    problems: list[DataProblem] = field(default_factory=list)
    sizes: dict[Split, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    mismatches: list[Mismatch] = field(default_factory=list)
    images: dict[Split, int] = field(default_factory=dict)

    def whole(self, split: Split) -> int:
        """How many images a split has."""
        return self.images.get(split, self.sizes.get(split, 0))

    def of(self, split: Split) -> list[CaseStatistics]:
        """The cases of a split."""
        return [case for case in self.cases if case.split == split]

    def by_key(self) -> dict[str, CaseStatistics]:
        """The cases by split and name."""
        return {case.key: case for case in self.cases}


def survey(
    source: Source,
    task: Task,
    *,
    workers: int = 2,
    thumbnails: int = 600,
    facts: Mapping[str, Any] | None = None,
    advance: Advance | None = None,
) -> SurveyResult:
    """Check a source as a training does, then read and measure each of its cases.

    What cannot be read is noted, and the rest is done. Of each case a few kilobytes stay in memory; at any time
    `2 workers` cases are read. Pictures of more than 2**25 pixels are measured in tiles of 4096, each as a case.

    Args:
        source: of cases.
        task: what its masks mean.
        workers: threads.
        thumbnails: how many cases are drawn at most, evenly over all of them.
        facts: as in `SurveyResult`.
        advance: called after each case.

    >>> from lightning_dice.data import SyntheticSource
    >>> source = SyntheticSource(size=(32, 32), cases={"train": 3, "val": 1})
    >>> found = survey(source, Task(["object"], "sigmoid"))
    >>> [case.key for case in found.cases], found.sizes, found.problems
    (['train/train-0000', 'train/train-0001', 'train/train-0002', 'val/val-0000'], {'train': 3, 'val': 1}, [])
    """
    found = SurveyResult(task, facts=facts or {})
    told: set[str] = set()

    def note(problems: Iterable[DataProblem]) -> None:
        for problem in problems:
            # A case that is read once more brings up what the check has told of its files.
            names = {str(problem), *(place.strip() for place in str(problem.where).split(", "))}
            if not (names - {""}) & told:
                told.update({str(problem), str(problem.where)})
                found.problems.append(problem)

    try:
        source.check()
    except DataError as error:
        note(_problems(error))
    parts: dict[Split, Sequence[tuple[Cases, int]]] = {}
    for split in SPLITS:
        cases, refused = _open(source, split)
        if cases is not None:
            parts[split] = _parts(cases)
            found.sizes[split] = len(parts[split])
            if len(cases) != len(parts[split]):
                found.images[split] = len(cases)
        elif refused is not None and not told:
            note(_problems(refused))
    total = sum(found.sizes.values())
    step = max(1, -(-total // thumbnails)) if thumbnails else 0
    kinds = source.kinds() if isinstance(source, Surveyed) else {}

    places = [(split, index) for split, count in found.sizes.items() for index in range(count)]
    drawn = set(places[::step]) if step else set()

    def one(place: Place) -> CaseStatistics:
        split, index = place
        cases, number = parts[split][index]
        sample = cases[number]
        kind = kinds.get((split, sample.case)) or kinds.get((split, sample.case.rpartition("@")[0]), "")
        return measure(sample, split, task, index=index, kind=kind, thumbnail=place in drawn)

    with _single_threaded():
        for done, (place, result) in enumerate(_each(one, places, workers), 1):
            if isinstance(result, CaseStatistics):
                found.cases.append(result)
            else:
                note(_problems(result, f"{place[0]}[{place[1]}]"))
            if advance is not None:
                advance(done, total)

        def again(case: CaseStatistics) -> Sample | None:
            try:
                cases, number = parts[case.split][case.index]
                return cases[number]
            except Exception:  # Whatever a reader raises; what is wrong has been noted above.
                return None

        found.mismatches = find_mismatches(found.cases, task, again)
    return found


def draw_missing(source: Source, found: SurveyResult, keys: Iterable[str]) -> None:
    """Draw the cases named by `keys` that have no thumbnail yet; one that cannot be read any more is passed over."""
    by_key = found.by_key()
    with _single_threaded():
        for case in (by_key[key] for key in dict.fromkeys(keys) if key in by_key):
            if case.thumbnail is None:
                cases, _ = _open(source, case.split)
                with suppress(Exception):
                    if cases is not None:
                        tiled, number = _parts(cases)[case.index]
                        image, mask, *_ = tiled[number]
                        case.thumbnail = draw(torch.nan_to_num(image.float()), mask, found.task)


def _parts(cases: Cases) -> Sequence[tuple[Cases, int]]:
    """Each case as a data set and an index there; then the tiles of those that are too large to be measured whole."""
    if not isinstance(cases, FolderCases):
        return [(cases, index) for index in range(len(cases))]
    large = [index for index, size in enumerate(cases.sizes) if prod(size) > LARGE]
    pairs, sizes = [cases.pairs[index] for index in large], [cases.sizes[index] for index in large]
    tiles = TiledCases(replace(cases, pairs=pairs, sizes=sizes), TILE)
    rest = [(cases, index) for index in range(len(cases)) if index not in large]
    return [*rest, *((tiles, index) for index in range(len(tiles)))]


def _open(source: Source, split: Split) -> tuple[Cases | None, DataError | None]:
    """The cases of a split, also if the source as a whole is refused, where it can tell them; or why there are none."""
    try:
        return source.split(split), None
    except DataError as error:
        return (source.readable(split) if isinstance(source, Surveyed) else None), error


def _each(
    function: Callable[[Place], CaseStatistics], places: Sequence[Place], workers: int
) -> Iterator[tuple[Place, CaseStatistics | Exception]]:
    """What a function makes of each place, in order, by threads that never run far ahead of what is taken."""
    running: deque[tuple[Place, Future[CaseStatistics]]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:

        def taken() -> tuple[Place, CaseStatistics | Exception]:
            place, future = running.popleft()
            error = future.exception()
            if error is None:
                return place, future.result()
            if isinstance(error, Exception):
                return place, error
            raise error

        try:
            for place in places:
                running.append((place, pool.submit(function, place)))
                if len(running) >= 2 * workers:
                    yield taken()
            while running:
                yield taken()
        finally:
            for _, future in running:
                future.cancel()


def _problems(error: Exception, where: str = "") -> Sequence[DataProblem]:
    """The single problems of an error; what no reader foresaw is told with its type."""
    if isinstance(error, DataErrors):
        return [problem for single in error.problems for problem in _problems(single)]
    if isinstance(error, DataProblem):
        return [error]
    what = str(error) if isinstance(error, DataError) else f"cannot be read ({type(error).__name__}: {error})"
    return [DataProblem(what, where)]


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Let each of our threads compute by itself: torch would start others for each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
