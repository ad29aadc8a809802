"""A module's network as one graph: from an image of any size to logits, probabilities or labels."""

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

Graph = Literal["logits", "probabilities", "labels"]

# Names of a graph's axes, by the number of space axes.
SPACE = {1: ("length",), 2: ("height", "width"), 3: ("axis_0", "axis_1", "axis_2")}


class NotExportable(ValueError):
    """The network cannot be made into a graph; the message says why, in its cause's own first line."""


class ExportWrapper(nn.Module):
    """What an exported file computes of images `(batch, channels, *space)`.

    The image is normalized, its last rows and columns are repeated up to a multiple of the module's size_divisor, the
    network runs, its finest logits are cropped to the image again and, if so asked for, become probabilities or labels.
    That is the module's own arithmetic, but for the removal of small components, which is not a matter of single
    pixels, and for windows and flips.

    Args:
        module: a trained module; its network is copied, with weights in the default memory format.
        normalize: a function of one image `(channels, *space)`; `None`: images come normalized.
        graph: `"logits"`: float32 `(batch, classes, *space)`; `"probabilities"`: the same, after the temperature;
            `"labels"`: class ids (softmax, `(batch, *space)`) or planes of 0 and 1 (sigmoid, `(batch, classes,
            *space)`), uint8, or int32 of more than 256 classes.
        wide: normalize in float64, for runtimes that add up float32 one by one: ONNX Runtime's mean of an image is
            wrong in the fourth digit, which moves logits by as much as half.

    >>> from lightning_dice import SegmentationModule
    >>> deployed = ExportWrapper(SegmentationModule(nn.Conv2d(1, 1, 3, padding=1), size_divisor=4), graph="labels")
    >>> labels = deployed(torch.zeros(2, 1, 5, 7))
    >>> labels.shape, labels.dtype
    (torch.Size([2, 1, 5, 7]), torch.uint8)
    """

    def __init__(
        self,
        module: SegmentationModule,
        normalize: Callable[[Tensor], Tensor] | None = None,
        graph: Graph = "logits",
        *,
        wide: bool = False,
    ) -> None:
        super().__init__()
        self.net = copy.deepcopy(module.net).eval()
        for tensor in (*self.net.parameters(), *self.net.buffers()):
            tensor.data = tensor.data.contiguous()
            tensor.requires_grad_(False)
        self.normalize, self.wide = normalize, wide
        self.graph: Graph = check_choice("graph", graph, Graph)
        self.size_divisor = module.size_divisor
        predictor = module.predictor("cpu")
        self.postprocessing, self.activation, self.threshold = (
            predictor.postprocessing,
            predictor.activation,
            predictor.threshold,
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits, probabilities or labels of images `(batch, channels, *space)`."""
        space = tuple(image.shape[2:])
        if self.normalize is not None:
            image = torch.vmap(self.normalize)(image.double() if self.wide else image).to(image.dtype)
        logits = read_logits(self.net(_padded(image, self.size_divisor)))[0]
        logits = crop_to(resize_to(logits, tuple(_up(size, self.size_divisor) for size in space)), space)
        if self.graph == "logits":
            return logits
        # A decision takes the classes first; whatever follows are pixels to it.
        first = logits.movedim(1, 0)
        if self.graph == "probabilities":
            return self.postprocessing.probabilities(first, activation=self.activation).movedim(0, 1)
        labels = self.postprocessing.pixelwise(first, activation=self.activation, threshold=self.threshold)
        return labels if self.activation == "softmax" else labels.movedim(0, 1).to(torch.uint8)


class ExportedGraph(NamedTuple):
    """A graph, and the images that it takes.

    Attributes:
        program: of `torch.export`.
        dynamic: the axes of an image that may have any size, by name: `("batch", "height", "width")`.
        minimum: pixels, the least size of a space axis that is dynamic.
    """

    program: torch.export.ExportedProgram
    dynamic: tuple[str, ...]
    minimum: int = 1


def axes(ndim: int) -> tuple[str, ...]:
    """Names of the axes of a batch of images with this many space axes.

    >>> axes(2)
    ('batch', 'channels', 'height', 'width')
    """
    return ("batch", "channels", *SPACE[ndim])


def capture(
    deployed: ExportWrapper, channels: int, ndim: int, size: Sequence[int] | None = None, *, portable: bool = False
) -> ExportedGraph:
    """Make a graph.

    Its batch and space axes are open where the network allows it. A network that would be right at the traced batch
    alone gets a batch of 1. One whose graph holds at some sizes only is refused: given back with a size, it is made for
    images of just that.

    Args:
        deployed: what to compute.
        channels: of an image.
        ndim: how many space axes an image has.
        size: the space axes of all images, where they are not to be open.
        portable: whether the graph's conditions on sizes will be lost, as in ONNX, so that it must be right where it
            does not ask.

    Raises:
        NotExportable: there is no graph, or none for images of any size.
    """
    size_divisor = deployed.size_divisor
    failure: Exception | None = None
    # With an example of two images, the graph that torch makes is mostly right for any number.
    for batch, open_batch in ((2, True), (1, False)):
        # Sizes that are equal by chance would be taken for equal by law.
        space = tuple(2 * size_divisor + 3 * axis + 1 for axis in range(ndim)) if size is None else tuple(size)
        names = (*(("batch",) if open_batch else ()), *(SPACE[ndim] if size is None else ()))
        example = torch.rand(batch, channels, *space)
        try:
            program = _exported(deployed, example, [axes(ndim).index(name) for name in names])
        except Exception as error:  # Whatever torch, or the network, brings up.
            failure = failure or error
            continue
        refusal = _refusal(program, _probes(example, names, size_divisor), deployed, portable=portable)
        if refusal is None:
            # Some graphs need more than one cell of the coarsest features along each axis.
            cell = torch.rand(batch, channels, *[size_divisor] * ndim)
            large = size is None and _refusal(program, [cell], deployed, portable=portable) is not None
            return ExportedGraph(_cleaned(program), names, size_divisor + 1 if large else 1)
        failure = failure or refusal
    reason = " ".join(str(failure).strip().splitlines()[:1]) or type(failure).__name__
    raise NotExportable(f"{type(failure).__name__}: {reason}") from failure


def takes_batches(normalize: Callable[[Tensor], Tensor] | None, channels: int, ndim: int) -> bool:
    """Whether a normalization can be a part of a graph: made of torch's functions alone, for images of any size."""
    if normalize is None:
        return False

    class Alone(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.vmap(normalize)(image)  # type: ignore[arg-type]

    example = torch.rand(2, channels, *(5 + 3 * axis for axis in range(ndim)))
    try:
        _exported(Alone(), example, [0, *range(2, example.ndim)])
    except Exception:  # Whatever it does that a graph cannot: then it stays outside.
        return False
    return True


def _exported(module: nn.Module, example: Tensor, open_axes: Sequence[int]) -> torch.export.ExportedProgram:
    shapes = {"image": dict.fromkeys(open_axes, torch.export.Dim.DYNAMIC)} if open_axes else None
    with torch.no_grad(), unspecialized_sizes(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)


def _probes(example: Tensor, dynamic: Sequence[str], size_divisor: int) -> list[Tensor]:
    """Images of sizes at which graphs go wrong: exact multiples, one image, another number of coarse cells."""
    space = tuple(example.shape[2:])
    batch = 3 if "batch" in dynamic else len(example)
    if not set(dynamic) - {"batch"}:
        return [torch.rand(count, *example.shape[1:]) for count in sorted({1, batch})]
    one = 1 if "batch" in dynamic else len(example)
    channels = example.shape[1]
    exact = [2 * size_divisor] * len(space)
    longer = [(4 if axis == len(space) - 1 else 3) * size_divisor + 2 * axis + 1 for axis in range(len(space))]
    return [torch.rand(one, channels, *exact), torch.rand(batch, channels, *longer)]


def _refusal(
    program: torch.export.ExportedProgram, probes: Sequence[Tensor], reference: ExportWrapper, *, portable: bool
) -> Exception | None:
    """Why a graph does not take some of the images; `None` if it does, with the right results."""
    # A size that the conditions exclude may be right without them, which the numbers tell; else they must hold.
    graph = _unconditional(program) if portable else program.module()
    for image in probes:
        with torch.no_grad():
            try:
                expected, found = reference(image), graph(image)
            except Exception as error:
                return error
        problem = differs(found, expected)
        if problem is not None:
            return NotExportable(f"for images of {tuple(image.shape)} the graph is wrong: {problem}")
    return None


def _unconditional(program: torch.export.ExportedProgram) -> nn.Module:
    """The graph without its conditions on sizes."""
    try:
        return program.module(check_guards=False)
    except TypeError:  # torch 2.6 has no guards to leave out.
        return program.module()


def differs(found: Tensor, expected: Tensor) -> str | None:
    """How results on noise differ by more than rounding; `None` if they do not.

    >>> differs(torch.ones(2), torch.ones(3))
    'its shape is (2,) and should be (3,)'
    """
    if found.shape != expected.shape:
        return f"its shape is {tuple(found.shape)} and should be {tuple(expected.shape)}"
    if not found.is_floating_point():
        share = float((found != expected).double().mean())
        # Of noise many logits lie near the threshold.
        return f"{share:.1%} of the labels differ" if share > 0.02 else None
    largest = float((found - expected).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    return None if largest <= 1e-3 * scale else f"its values differ by up to {largest:.3g} (of {scale:.3g})"


def _padded(image: Tensor, size_divisor: int) -> Tensor:
    """As `pad_to_multiple`, without a question about the size that a graph would answer once and for all."""
    if size_divisor == 1:
        return image
    padding: list[int] = []
    for size in reversed(image.shape[2:]):
        padding += [0, _up(size, size_divisor) - size]
    return F.pad(image, padding, mode="replicate")


def _up(size: int, size_divisor: int) -> int:
    return (size + size_divisor - 1) // size_divisor * size_divisor


def _cleaned(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without the paths of the files that the network's code lies in on this machine."""
    for part in program.graph_module.modules():
        nodes: Any = getattr(getattr(part, "graph", None), "nodes", ())
        for node in nodes:
            node.meta.pop("stack_trace", None)
    return program
