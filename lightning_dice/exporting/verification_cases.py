"""The cases on which an exported file is compared with its module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from lightning_dice.data.errors import DataError
from lightning_dice.data.interfaces import Cases
from lightning_dice.exporting.verification import VerificationCase

NOISE_IMAGES = 2


class CaseSelection(NamedTuple):
    """Cases, read one after the other.

    Attributes:
        cases: an iterator.
        description: describes the cases, for messages and the model card.
        splits: number of cases in each split of the data; `None` if the data are not available.
    """

    cases: Iterator[VerificationCase]
    description: str
    splits: dict[str, int] | None


def noise(channels: int, size: Sequence[int], splits: dict[str, int] | None) -> CaseSelection:
    """Return images of noise, for use without data.

    >>> noise(3, [32, 32], None).description
    'images of noise of 32 x 32 pixels, as the data were not available'
    """

    def images() -> Iterator[VerificationCase]:
        generator = torch.Generator().manual_seed(0)
        for number in range(NOISE_IMAGES):
            yield VerificationCase(f"noise {number + 1}", torch.rand(channels, *size, generator=generator))

    reason = ", as the data were not available" if splits is None else ""
    return CaseSelection(images(), f"images of noise of {' x '.join(map(str, size))} pixels{reason}", splits)


def evenly_spaced(splits: Mapping[str, Cases | None], name: str | None, count: int) -> CaseSelection:
    """Return cases of a split, evenly spaced.

    Args:
        splits: the cases of each split; `None` for a split that the data do not have.
        name: the split; `None`: the first of test, val and train that has cases.
        count: the most cases.

    Raises:
        ValueError: the data do not have the split; or, when it is read, a case is damaged.
    """
    counts = {split: len(cases) for split, cases in splits.items() if cases is not None}
    chosen = name or next((split for split in ("test", "val", "train") if counts.get(split)), "test")
    cases, total = splits[chosen], counts.get(chosen, 0)
    if cases is None or not total:
        raise ValueError(f"the data have no {chosen} split, only {', '.join(counts)}")
    number = min(count, total)

    def read() -> Iterator[VerificationCase]:
        for index in range(number):
            try:
                sample = cases[(2 * index + 1) * total // (2 * number)]
            except DataError as error:
                raise ValueError(f"the {chosen} split has a case that cannot be read: {error}") from error
            yield VerificationCase(sample.case, sample.image, sample.mask)

    return CaseSelection(read(), f"of {total} cases of the {chosen} split", counts)
