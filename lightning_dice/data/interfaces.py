"""What the datamodule asks of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

from lightning_dice.data.batch import Sample

Split = Literal["train", "val", "test"]


class DataError(ValueError):
    """Something is wrong with the data; the message names the files and the remedy."""


class DataErrors(DataError):
    """Several things wrong, told in one message.

    Attributes:
        problems: each of them.
    """

    def __init__(self, message: str, problems: Sequence[DataError]) -> None:
        super().__init__(message)
        self.problems = list(problems)


class Cases(Protocol):
    """The cases of one split: a map-style data set of samples."""

    @property
    def sizes(self) -> Sequence[tuple[int, ...]]:
        """The space axes of each case's image, known without decoding it: `[(height, width), ...]`."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Source(Protocol):
    """Where cases come from. A folder of files, or a generator: the datamodule does not care."""

    def check(self) -> str:
        """Read everything once, before any long work starts.

        Returns:
            What was found, as a text to show: cases, sizes, classes with their share of pixels.

        Raises:
            DataError: with everything that is wrong, file by file.
        """
        ...

    def split(self, name: Split) -> Cases | None:
        """The cases of a split, or `None` where the data set has no such split."""
        ...


@runtime_checkable
class Surveyed(Protocol):
    """What a `Source` may offer beside, so that the rest of its data can be inspected though some of it is refused."""

    def readable(self, name: Split) -> Cases | None:
        """The cases of a split that belong together, whatever is wrong with others; each may fail when it is read."""
        ...

    def kinds(self) -> Mapping[tuple[Split, str], str]:
        """Depth and colour of the image of each case that can be read, as in `16-bit RGB`, by split and case."""
        ...
