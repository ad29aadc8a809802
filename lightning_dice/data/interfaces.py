"""What the datamodule asks of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from lightning_dice.data.batch import Sample

Split = Literal["train", "val", "test"]


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


class PredictionItem(NamedTuple):
    """An image to predict.

    Attributes:
        case: its name, by which its mask is called: the path below the input folder without the suffix, `sub/a`.
        files: one, or one for each channel.
    """

    case: str
    files: tuple[Path, ...]


class LoadedImage(NamedTuple):
    """An image as training reads it, with what is needed to write a mask that lies on the file it came from.

    Attributes:
        image: float32 `(channels, *space)`, what `Sample.image` would be: before `normalize`, in the orientation and at
            the spacing that the network was trained on.
        size: the space axes of a mask, in the same orientation; other than the image's where that was resampled.
        spacing: distance between neighbouring pixels of a mask along each axis, in mm; `None` where it is not known.
        origin: what the reader needs to write a mask in the file's own geometry; nobody else's business.
    """

    image: Tensor
    size: tuple[int, ...]
    spacing: tuple[float, ...] | None = None
    origin: Any = None


class PredictionIO(Protocol):
    """Reads images and masks as a `Source` does, and writes masks that it could read. `Source.reader` is one."""

    def find(self, path: Path) -> list[PredictionItem]:
        """The images of a folder and its sub-folders, or a file as the only one.

        Raises:
            DataError: there are none, or two would have masks of one name.
        """
        ...

    def read(self, item: PredictionItem) -> LoadedImage:
        """An image.

        Raises:
            DataError: names the file, what is wrong with it and the remedy.
        """
        ...

    def names(self, case: str, format: str | None = None) -> list[Path]:
        """The files that `write` makes for a case, below its folder.

        Args:
            case: as in `PredictionItem`.
            format: `"png"`, `"tiff"` or `"nifti"`; `None`: the customary one of these images.
        """
        ...

    def write(self, folder: Path, case: str, labels: Tensor, scan: LoadedImage, format: str | None = None) -> None:
        """Write a mask, each file whole or not at all, with the values that the training's masks had.

        Args:
            folder: below which the files go.
            case: as in `PredictionItem`.
            labels: class ids `(*size)` or bool planes `(classes, *size)`.
            scan: what `read` gave.
            format: as for `names`.
        """
        ...

    def write_probabilities(self, folder: Path, case: str, probs: Tensor, scan: LoadedImage) -> list[Path]:
        """Write probabilities `(classes, *size)`, float32, in the file's own geometry; returns the files."""
        ...

    def load_probabilities(self, folder: Path, case: str) -> Tensor | None:
        """What `write_probabilities` wrote there, `(classes, *size)`; `None`: nothing.

        Raises:
            DataError: it cannot be read, or has another number of classes.
        """
        ...

    def load(self, folder: Path, case: str) -> Tensor:
        """A mask that `write` wrote, in any of its formats: class ids `(*size)` or planes `(classes, *size)`.

        Raises:
            DataError: it is not there, or not what `write` writes.
        """
        ...
