"""Settings of an export, and what follows from them for a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor, nn

from lightning_dice.exporting.formats import FORMATS, Format
from lightning_dice.exporting.graph import (
    ExportedGraph,
    ExportWrapper,
    NotExportable,
    OutputType,
    capture_graph,
    is_exportable,
)
from lightning_dice.inference import SlidingWindow

if TYPE_CHECKING:
    from lightning_dice.module import SegmentationModule


@dataclass(frozen=True)
class ExportSettings:
    """Settings of an export; see `conf/export.yaml`.

    Args:
        format: a key of `FORMATS`.
        output_type: what the file returns: `"logits"`, `"probabilities"` or `"labels"`.
        normalization: `"inside"`: the file normalizes images; `"outside"`: it takes normalized ones; `"auto"`: inside
            if it can, and the module does not predict in windows.
        size: pixels of the space axes of all images; `None`: any size.
        opset: the version of ONNX's operators; `None`: the default of torch's exporter.
        split: whose cases file and module are compared on; `None`: the first of test, val and train that has cases.
        cases: the number of these cases.
        tolerance: the fraction of labels that may differ.
        license: the model's license.

    Raises:
        ValueError: a setting out of its range, or one that does not go with another or with the module.

    >>> ExportSettings("safetensors", size=[64, 64])
    Traceback (most recent call last):
    ValueError: safetensors hold weights and no graph: leave size=[64, 64] out
    """

    format: str = "onnx"
    output_type: OutputType = "logits"
    normalization: str = "auto"
    size: Sequence[int] | None = None
    opset: int | None = None
    split: str | None = None
    cases: int = 8
    tolerance: float = 1e-4
    license: str | None = None

    def __post_init__(self) -> None:
        choices: dict[str, Sequence[Any]] = {
            "format": list(FORMATS),
            "output_type": get_args(OutputType),
            "normalization": ["auto", "inside", "outside"],
            "split": [None, "train", "val", "test"],
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)}")
        for name, minimum, optional in (("cases", 0, False), ("opset", 1, True)):
            value = getattr(self, name)
            if not (optional and value is None) and (not isinstance(value, int) or value < minimum):
                raise ValueError(f"{name} must be an integer of at least {minimum}, got {value}")
        if not isinstance(self.tolerance, (int, float)) or not 0 <= self.tolerance <= 1:
            raise ValueError(f"tolerance must be a fraction of the labels in [0, 1], got {self.tolerance}")
        if self.format != "onnx" and self.opset is not None:
            raise ValueError(f"opset is a setting of ONNX: leave it out with format={self.format}")
        if self.format == "safetensors":
            for name, default in (("output_type", "logits"), ("normalization", "auto"), ("size", None)):
                if getattr(self, name) != default:
                    raise ValueError(f"safetensors hold weights and no graph: leave {name}={getattr(self, name)} out")

    def file_format(self) -> Format:
        """Return the file format.

        >>> ExportSettings("torch_export").file_format().suffix
        '.pt2'
        """
        return FORMATS["onnx"](self.opset) if self.format == "onnx" else FORMATS[self.format]()

    def window(self, module: SegmentationModule) -> SlidingWindow | None:
        """Return the windows that the file's images are cut into; `None` for whole images."""
        return module.inference.window if self.size is None else SlidingWindow(self.size)

    def check_module(self, module: SegmentationModule, ndim: int) -> None:
        """Check that `size` has the axes of the module's images, and that logits are returned if windows are used.

        Raises:
            ValueError: otherwise.
        """
        size: Any = self.size
        if size is not None and (
            isinstance(size, (int, str)) or len(size) != ndim or any(not isinstance(n, int) or n < 1 for n in size)
        ):
            raise ValueError(
                f"size must be a number of pixels for each of {ndim} space axes, as in [256,256], got {size}"
            )
        if self.output_type == "logits":
            return
        if size is not None:
            raise ValueError(
                "a file of a fixed size is run in windows, whose logits are averaged: "
                f"output_type={self.output_type} needs size=null"
            )
        if module.inference.window is not None:
            raise ValueError(
                f"the run predicts in windows of {list(module.inference.window.size)}, whose logits are averaged: "
                f"output_type={self.output_type} needs whole images, inference.size=null"
            )

    def normalizes(
        self, module: SegmentationModule, normalize: Callable[[Tensor], Tensor] | None, channels: int, ndim: int
    ) -> bool:
        """Return whether the file normalizes images.

        Raises:
            ValueError: `normalization="inside"`, but it cannot.
        """
        if not self.file_format().has_graph or normalize is None or self.normalization == "outside":
            return False
        # The statistics of a window are not those of its image.
        windows = self.window(module) is not None
        if windows and self.normalization == "auto":
            return False
        exportable = is_exportable(normalize, channels, ndim)
        if self.normalization == "inside" and (windows or not exportable):
            reason = (
                "the model is run in windows"
                if windows
                else f"{type(normalize).__name__} cannot be exported as part of a graph"
            )
            raise ValueError(f"normalization=inside: {reason}; leave it out, and normalize images before")
        return exportable

    def capture(
        self, module: SegmentationModule, normalize: Callable[[Tensor], Tensor] | None, channels: int, ndim: int
    ) -> ExportedGraph | None:
        """Return the graph of a module; `None` for a format without graphs.

        Args:
            module: a trained module.
            normalize: part of the graph; `None`: images are normalized before.
            channels: an image's channels.
            ndim: number of space axes.

        Raises:
            NotExportable: there is no graph.
        """
        if not self.file_format().has_graph:
            return None
        portable = self.format == "onnx"
        wrapper = ExportWrapper(module, normalize, self.output_type, float64_normalization=portable)
        return capture_graph(wrapper, channels, ndim, self.size, portable=portable)

    def explain(self, error: NotExportable, net: nn.Module) -> str:
        """Return a message that tells what to try instead."""
        remedies = (
            [] if self.size is not None else ["size=[...] (of your images or windows, if the network is limited)"]
        )
        if self.format == "onnx":
            remedies.append("format=torch_export")
        remedies.append("format=safetensors (weights and config)")
        return f"{type(net).__name__} cannot be exported as {self.format}: {error}\ntry {', '.join(remedies)}"
