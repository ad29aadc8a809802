"""Protocols of data sources. Implement `Source` to train on data of your own.

A source opens splits. A split is a map-style data set of samples that knows the size of each image. No base class is
needed:

>>> import torch
>>> from lightning_dice.data import Sample, SegmentationData
>>> class Bars:
...     def __init__(self, count):
...         self.sizes = [(16, 16)] * count  # known without reading an image
...     def __len__(self):
...         return len(self.sizes)
...     def __getitem__(self, index):
...         mask = torch.zeros(1, 16, 16, dtype=torch.uint8)
...         mask[:, index] = 1
...         return Sample(image=mask + 0.1 * torch.randn(1, 16, 16), mask=mask, case=f"bar-{index}")
>>> class BarSource:
...     def check(self):
...         return "4 bars to train on, 2 to validate on"
...     def split(self, name):
...         return {"train": Bars(4), "val": Bars(2)}.get(name)
>>> data = SegmentationData(BarSource(), batch_size=2, num_workers=0)
>>> data.setup("fit")
>>> next(iter(data.train_dataloader())).image.shape
torch.Size([2, 1, 16, 16])

Optional extras: `InspectableSource` lets `inspect` look at the good cases of a data set that also has bad ones; a
property `reader`, a `PredictionIO`, lets `predict` and `evaluate` read and write files as the source does;
`lightning_dice.data.patches.CaseReader` lets patches be read from images that are too large to decode whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from lightning_dice.data.batch import Sample

Split = Literal["train", "val", "test"]


class Cases(Protocol):
    """The cases of one split: a map-style data set of samples.

    In training, what `__getitem__` draws from torch, NumPy or `random` is seeded by run, epoch and case.
    """

    @property
    def sizes(self) -> Sequence[tuple[int, ...]]:
        """The space axes of each image, `[(height, width), ...]`, without decoding it."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Source(Protocol):
    """A data set: a folder of files, a generator, or anything else that has splits of cases."""

    def check(self) -> str:
        """Check all of the data once, before any long work starts.

        Returns:
            A report to show: cases, sizes, classes with their share of pixels.

        Raises:
            DataError: lists every problem, file by file.
        """
        ...

    def split(self, name: Split) -> Cases | None:
        """Return the cases of a split, or `None` if the data set has no such split."""
        ...


@runtime_checkable
class InspectableSource(Protocol):
    """A `Source` whose good cases can be inspected although `check` refuses others."""

    def readable(self, name: Split) -> Cases | None:
        """Return the cases of a split whose files match, even if others do not; reading one may still fail."""
        ...

    def kinds(self) -> Mapping[tuple[Split, str], str]:
        """Return the kind of each readable image, such as `16-bit RGB`, by split and case."""
        ...


class PredictionItem(NamedTuple):
    """An image to predict.

    Attributes:
        case: its name, which its mask gets too: the path below the input folder without the suffix, `sub/a`.
        files: one, or one for each channel.
    """

    case: str
    files: tuple[Path, ...]


class LoadedImage(NamedTuple):
    """An image as training reads it, with all that is needed to write a mask in the geometry of its file.

    Attributes:
        image: float32 `(channels, *space)` as in `Sample.image`: before `normalize`, in the orientation and at the
            spacing that the network was trained on.
        size: the space axes of a mask in the same orientation; they differ from the image's if it was resampled.
        spacing: distance between neighbouring pixels of a mask along each axis, in mm; `None` if unknown.
        origin: private to the `PredictionIO` that read the image: what it needs to write a mask.
    """

    image: Tensor | WindowedImage
    size: tuple[int, ...]
    spacing: tuple[float, ...] | None = None
    origin: Any = None

    @property
    def windowed(self) -> bool:
        """Whether the image is too large for the memory, and is read window by window."""
        return not isinstance(self.image, Tensor)

    def normalized(self, normalize: Callable[[Tensor], Tensor] | None) -> LoadedImage:
        """Return the image normalized as training images are.

        Raises:
            DataError: a windowed image cannot be normalized this way.
        """
        if normalize is None:
            return self
        if isinstance(self.image, Tensor):
            return self._replace(image=normalize(self.image))
        return self._replace(image=self.image.normalized(normalize))

    def preview(self, longest: int) -> tuple[Tensor, int]:
        """Return an image to look at, and the step at which its pixels were taken along each axis.

        Args:
            longest: pixels along an axis that a windowed image is reduced to; others are returned whole.
        """
        return (self.image, 1) if isinstance(self.image, Tensor) else self.image.preview(longest)

    def close(self) -> None:
        """Close the file of a windowed image."""
        if not isinstance(self.image, Tensor):
            self.image.close()


class WindowedImage(Protocol):
    """An image that is read window by window: `image[:, rows, columns]` is a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(channels, *space)`."""
        ...

    def __getitem__(self, index: Any) -> Tensor: ...

    def normalized(self, normalize: Callable[[Tensor], Tensor], /) -> WindowedImage:
        """Normalize every window as the whole image would be."""
        ...

    def preview(self, longest: int, /) -> tuple[Tensor, int]:
        """Return every n-th pixel, at most `longest` along an axis, and n."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class PredictionIO(Protocol):
    """Reads images and masks as a `Source` does, and writes masks that it can read; see `Source.reader`."""

    def with_options(self, *, follow_symlinks: bool, large: int) -> PredictionIO:
        """Return a copy with the applicable options of the `predict` command.

        Args:
            follow_symlinks: follow symbolic links that lead out of the input folder.
            large: pixels beyond which an image is read window by window, where its format allows that.
        """
        ...

    def for_cases(self, cases: Cases) -> PredictionIO:
        """Return a copy whose `load` also checks the geometry of masks against these cases, where files have one."""
        ...

    def preprocessing(self) -> Any:
        """Return all that is done to an image before the network, as a dataclass of plain values."""
        ...

    def find(self, path: Path) -> list[PredictionItem]:
        """Find the images in a folder and its sub-folders, or take a single file.

        Raises:
            DataError: there are none, or two would have masks of the same name.
        """
        ...

    def read(self, item: PredictionItem) -> LoadedImage:
        """Read an image.

        Raises:
            DataError: names the file, what is wrong with it and the remedy.
        """
        ...

    def names(self, case: str, format: str | None = None) -> list[Path]:
        """Return the files that `write` makes for a case, relative to its folder.

        Args:
            case: as in `PredictionItem`.
            format: `"png"`, `"tiff"` or `"nifti"`; `None`: the customary one for these images.
        """
        ...

    def check_output(self, format: str | None, *, probabilities: bool) -> None:
        """Check that files of a format, and of probabilities, can be written.

        Raises:
            DataError: the format is unknown.
        """
        self.names("case", format)

    def write(self, folder: Path, case: str, labels: Tensor, scan: LoadedImage, format: str | None = None) -> None:
        """Write a mask with the values that the training masks had. Each file is written whole or not at all.

        Args:
            folder: where the files go.
            case: as in `PredictionItem`.
            labels: class ids `(*size)` or bool planes `(classes, *size)`.
            scan: the image, from `read`.
            format: as for `names`.
        """
        ...

    def write_probabilities(self, folder: Path, case: str, probs: Tensor, scan: LoadedImage) -> list[Path]:
        """Write probabilities `(classes, *size)`, float32, in the geometry of the file; return the files."""
        ...

    def load_probabilities(self, folder: Path, case: str) -> Tensor | None:
        """Load what `write_probabilities` wrote, `(classes, *size)`; `None` if there is no such file.

        Raises:
            DataError: it cannot be read, or has another number of classes.
        """
        ...

    def load(self, folder: Path, case: str) -> Tensor:
        """Load a mask that `write` wrote, in any of its formats: class ids `(*size)` or planes `(classes, *size)`.

        Raises:
            DataError: it does not exist, or `write` did not write it.
        """
        ...
