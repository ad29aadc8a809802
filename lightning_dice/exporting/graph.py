"""A module's network as one graph, from images of any size to logits, probabilities or labels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dice.argument_checks import check_choice
from lightning_dice.functional.model_outputs import crop_to, read_logits, resize_to
from lightning_dice.library_internals.torch import unspecialized_sizes

if TYPE_CHECKING:
    from lightning_dice.module import SegmentationModule

OutputType = Literal["logits", "probabilities", "labels"]

# Names of the space axes, by their number.
SPACE = {1: ("length",), 2: ("height", "width"), 3: ("axis_0", "axis_1", "axis_2")}


class NotExportable(ValueError):
    """The network cannot be exported as a graph; the message holds the first line of the cause."""


class ExportWrapper(nn.Module):
    """The function that an exported file computes, of images `(batch, channels, *space)`.

    The image is normalized, and padded to a multiple of the module's `size_divisor` by repeating its last rows and
    columns; the network runs; its finest logits are cropped to the image and, if asked for, become probabilities or
    labels. The arithmetic is the module's own, without windows, mirroring and the removal of small components, which
    single pixels do not determine.

    Args:
        module: a trained module; its network is copied, with weights in the default memory format.
        normalize: a function of one image `(channels, *space)`; `None`: images are normalized already.
        output_type: `"logits"`: float32 `(batch, classes, *space)`; `"probabilities"`: the same, after the temperature;
            `"labels"`: class ids (softmax, `(batch, *space)`) or planes of 0 and 1 (sigmoid, `(batch, classes,
            *space)`), uint8, or int32 for more than 256 classes.
        float64_normalization: for runtimes that add up float32 one by one: the mean of an image is wrong in the fourth
            digit in ONNX Runtime, which changes logits by up to 0.5.

    >>> from lightning_dice import SegmentationModule
    >>> module = SegmentationModule(nn.Conv2d(1, 1, 3, padding=1), size_divisor=4)
    >>> labels = ExportWrapper(module, output_type="labels")(torch.zeros(2, 1, 5, 7))
    >>> labels.shape, labels.dtype
    (torch.Size([2, 1, 5, 7]), torch.uint8)
    """

    def __init__(
        self,
        module: SegmentationModule,
        normalize: Callable[[Tensor], Tensor] | None = None,
        output_type: OutputType = "logits",
        *,
        float64_normalization: bool = False,
    ) -> None:
        super().__init__()
        self.net = copy.deepcopy(module.net).eval()
        for tensor in (*self.net.parameters(), *self.net.buffers()):
            tensor.data = tensor.data.contiguous()
            tensor.requires_grad_(False)
        self.normalize, self.float64_normalization = normalize, float64_normalization
        self.output_type: OutputType = check_choice("output_type", output_type, OutputType)
        self.size_divisor = module.size_divisor
        predictor = module.predictor("cpu")
        self.postprocessing = predictor.postprocessing
        self.activation, self.threshold = predictor.activation, predictor.threshold

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, probabilities or labels of images `(batch, channels, *space)`."""
        space = tuple(image.shape[2:])
        if self.normalize is not None:
            wide = image.double() if self.float64_normalization else image
            image = torch.vmap(self.normalize)(wide).to(image.dtype)
        logits = read_logits(self.net(_pad(image, self.size_divisor)))[0]
        logits = crop_to(resize_to(logits, tuple(_round_up(size, self.size_divisor) for size in space)), space)
        if self.output_type == "logits":
            return logits
        # Post-processing takes the classes first; all other axes are pixels to it.
        by_class = logits.movedim(1, 0)
        if self.output_type == "probabilities":
            return self._probabilities(by_class).movedim(0, 1)
        labels = self.postprocessing.pixelwise(by_class, activation=self.activation, threshold=self.threshold)
        return labels if self.activation == "softmax" else labels.movedim(0, 1).to(torch.uint8)

    def _probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities in float32: graphs need no float64 to be independent of how an image is cut."""
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        tempered = logits if self.postprocessing.scale == 1 else logits / self.postprocessing.scale
        return tempered.softmax(0) if self.activation == "softmax" else tempered.sigmoid()


class InputShape(NamedTuple):
    """The shapes of images that an exported file accepts.

    Attributes:
        ndim: number of space axes.
        dynamic: names of the axes that may have any size: `("batch", "height", "width")`.
        minimum: pixels; the smallest size of a dynamic space axis.
        size: pixels of each space axis, where they are fixed.
    """

    ndim: int
    dynamic: tuple[str, ...]
    minimum: int = 1
    size: tuple[int, ...] | None = None

    @classmethod
    def any_size(cls, ndim: int) -> InputShape:
        """Return the shapes of a network that is run by Python: any size along all axes but the channels.

        >>> InputShape.any_size(2).dynamic
        ('batch', 'height', 'width')
        """
        return cls(ndim, tuple(axis for axis in axes(ndim) if axis != "channels"))


class ExportedGraph(NamedTuple):
    """A graph, and the images that it accepts.

    Attributes:
        program: made by `torch.export`.
        input_shape: the shapes of the images.
    """

    program: torch.export.ExportedProgram
    input_shape: InputShape


def axes(ndim: int) -> tuple[str, ...]:
    """Return the names of the axes of a batch of images with this many space axes.

    >>> axes(2)
    ('batch', 'channels', 'height', 'width')
    """
    return ("batch", "channels", *SPACE[ndim])


def capture_graph(
    wrapper: ExportWrapper, channels: int, ndim: int, size: Sequence[int] | None = None, *, portable: bool = False
) -> ExportedGraph:
    """Trace the graph of a module, for batches and images of any size where the network allows it.

    A network whose graph is right for the traced batch size only gets a batch of 1. One whose graph is right for some
    image sizes only is refused; with a `size`, its graph is for images of this size.

    Args:
        wrapper: computes the function to export.
        channels: an image's channels.
        ndim: number of space axes of an image.
        size: the space axes of all images, if they are fixed.
        portable: whether the graph loses its conditions on sizes, as in ONNX, so that it must be right even where they
            do not hold.

    Raises:
        NotExportable: there is no graph, or none for images of any size.
    """
    size_divisor = wrapper.size_divisor
    failure: Exception | None = None
    # A graph that is traced with two images is usually right for any number.
    for batch, open_batch in ((2, True), (1, False)):
        # All sizes differ: torch would require equal ones to stay equal.
        space = tuple(2 * size_divisor + 3 * axis + 1 for axis in range(ndim)) if size is None else tuple(size)
        names = (*(("batch",) if open_batch else ()), *(SPACE[ndim] if size is None else ()))
        example = torch.rand(batch, channels, *space)
        try:
            program = _export(wrapper, example, [axes(ndim).index(name) for name in names])
        except Exception as error:  # Of any type, by torch or the network.
            failure = failure or error
            continue
        error_found = _find_error(program, _probe_images(example, names, size_divisor), wrapper, portable=portable)
        if error_found is None:
            # Some graphs need more than one cell of the coarsest features along each axis.
            cell = torch.rand(batch, channels, *[size_divisor] * ndim)
            needs_more = size is None and _find_error(program, [cell], wrapper, portable=portable) is not None
            minimum = size_divisor + 1 if needs_more else 1
            shape = InputShape(ndim, names, minimum, None if size is None else tuple(size))
            return ExportedGraph(_without_stack_traces(program), shape)
        failure = failure or error_found
    reason = " ".join(str(failure).strip().splitlines()[:1]) or type(failure).__name__
    raise NotExportable(f"{type(failure).__name__}: {reason}") from failure


def is_exportable(normalize: Callable[[Tensor], Tensor] | None, channels: int, ndim: int) -> bool:
    """Return whether a normalization can be part of a graph: torch's functions only, for images of any size.

    >>> is_exportable(lambda image: image - image.mean(), channels=1, ndim=2)
    True
    """
    if normalize is None:
        return False

    class Normalization(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.vmap(normalize)(image)  # type: ignore[arg-type]

    example = torch.rand(2, channels, *(5 + 3 * axis for axis in range(ndim)))
    try:
        _export(Normalization(), example, [0, *range(2, example.ndim)])
    except Exception:  # Of any type, for whatever a graph cannot compute.
        return False
    return True


def _export(module: nn.Module, example: Tensor, open_axes: Sequence[int]) -> torch.export.ExportedProgram:
    shapes = {"image": dict.fromkeys(open_axes, torch.export.Dim.DYNAMIC)} if open_axes else None
    with torch.no_grad(), unspecialized_sizes(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)


def _probe_images(example: Tensor, dynamic: Sequence[str], size_divisor: int) -> list[Tensor]:
    """Return images of sizes at which graphs go wrong: exact multiples, one image, other numbers of coarse cells."""
    space = tuple(example.shape[2:])
    batch = 3 if "batch" in dynamic else len(example)
    if not set(dynamic) - {"batch"}:
        return [torch.rand(count, *example.shape[1:]) for count in sorted({1, batch})]
    one = 1 if "batch" in dynamic else len(example)
    channels = example.shape[1]
    exact = [2 * size_divisor] * len(space)
    longer = [(4 if axis == len(space) - 1 else 3) * size_divisor + 2 * axis + 1 for axis in range(len(space))]
    return [torch.rand(one, channels, *exact), torch.rand(batch, channels, *longer)]


def _find_error(
    program: torch.export.ExportedProgram, probes: Sequence[Tensor], reference: ExportWrapper, *, portable: bool
) -> Exception | None:
    """Return why a graph is wrong for some of the images; `None` if its results are right."""
    # Without conditions, sizes that they exclude are compared too; with them, they must hold.
    graph = _without_conditions(program) if portable else program.module()
    for image in probes:
        with torch.no_grad():
            try:
                expected, found = reference(image), graph(image)
            except Exception as error:
                return error
        problem = difference(found, expected)
        if problem is not None:
            return NotExportable(f"for images of {tuple(image.shape)} the graph is wrong: {problem}")
    return None


def _without_conditions(program: torch.export.ExportedProgram) -> nn.Module:
    """Return the graph without its conditions on sizes."""
    try:
        return program.module(check_guards=False)
    except TypeError:  # torch 2.6 has no guards to leave out.
        return program.module()


def difference(found: Tensor, expected: Tensor) -> str | None:
    """Describe how results on noise differ; `None` if they are equal to rounding.

    >>> difference(torch.ones(2), torch.ones(3))
    'its shape is (2,) and should be (3,)'
    """
    if found.shape != expected.shape:
        return f"its shape is {tuple(found.shape)} and should be {tuple(expected.shape)}"
    if not found.is_floating_point():
        share = float((found != expected).double().mean())
        # Many logits of noise are near the threshold.
        return f"{share:.1%} of the labels differ" if share > 0.02 else None
    largest = float((found - expected).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    return None if largest <= 1e-3 * scale else f"its values differ by up to {largest:.3g} (of {scale:.3g})"


def _pad(image: Tensor, size_divisor: int) -> Tensor:
    """Pad as `pad_to_multiple` does, but without a condition on the size, which a graph would evaluate only once."""
    if size_divisor == 1:
        return image
    padding: list[int] = []
    for size in reversed(image.shape[2:]):
        padding += [0, _round_up(size, size_divisor) - size]
    return F.pad(image, padding, mode="replicate")


def _round_up(size: int, size_divisor: int) -> int:
    return (size + size_divisor - 1) // size_divisor * size_divisor


def _without_stack_traces(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Remove the paths of the network's source files on this machine."""
    for part in program.graph_module.modules():
        nodes: Any = getattr(getattr(part, "graph", None), "nodes", ())
        for node in nodes:
            node.meta.pop("stack_trace", None)
    return program
