"""File formats of exported models: writing, reading their metadata, and running them as their users will."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lightning_dice.exporting.graph import ExportedGraph, NotExportable, axes
from lightning_dice.extras import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_dice.module import SegmentationModule

KEY = "lightning_dice"  # of the metadata in a file
EXTRA_FILE = "model.json"  # of the metadata in a program of torch.export
_PROTOBUF_BYTES = 2**31  # the largest ONNX file


class Format(Protocol):
    """A file format.

    Attributes:
        suffix: the suffix of the file's name.
        has_graph: whether it holds a graph, made by `capture_graph`; else weights only.
    """

    suffix: str
    has_graph: bool

    def require(self) -> None:
        """Check that the packages that it needs are installed.

        Raises:
            MissingExtra: one is not; the message tells how to install it.
        """
        ...

    def prepare(self, graph: ExportedGraph | None, module: SegmentationModule, output_type: str) -> Any:
        """Return the content that `write` writes: the slow part, done once."""
        ...

    def write(self, content: Any, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write the file, with the metadata in it."""
        ...

    def open(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Return the file's function of images `(batch, channels, *space)`, run on the CPU."""
        ...

    def read_metadata(self, path: Path) -> dict[str, Any]:
        """Return the metadata in a file."""
        ...


class Onnx:
    """An ONNX model, for any runtime of that standard, without Python.

    Args:
        opset: the version of ONNX's operators; `None`: the one that torch's exporter prefers.
    """

    suffix = ".onnx"
    has_graph = True

    def __init__(self, opset: int | None = None) -> None:
        self.opset = opset

    def require(self) -> None:
        """Check for onnx, onnxscript and onnxruntime."""
        require("onnx", "onnxscript", "onnxruntime", needed_by="format=onnx")

    def prepare(self, graph: ExportedGraph | None, module: SegmentationModule, output_type: str) -> Any:
        """Convert the graph to a model in memory."""
        if graph is None:
            raise ValueError("graph must be an ExportedGraph, got None")
        size = sum(value.nbytes for value in graph.program.state_dict.values())
        if size > _PROTOBUF_BYTES * 0.98:
            raise NotExportable(f"the weights take {size / 2**30:.1f} GiB, and one ONNX file holds 2 GiB")
        try:
            with _quiet():
                exported = torch.onnx.export(
                    graph.program,
                    dynamo=True,
                    input_names=["image"],
                    output_names=[output_type],
                    opset_version=self.opset,
                    verbose=False,
                )
        except Exception as error:  # Of any type, for an operator that ONNX lacks.
            cause = error.__cause__ or error
            raise NotExportable(f"{type(cause).__name__}: {' '.join(str(cause).strip().splitlines()[:1])}") from error
        if exported is None:
            raise NotExportable("torch.onnx.export returned nothing")
        model = exported.model_proto
        _remove_notes(model)
        _name_axes(model, graph)
        return model

    def write(self, content: Any, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write the model; the metadata are an entry of its `metadata_props`."""
        import onnx

        del content.metadata_props[:]
        onnx.helper.set_model_props(content, {KEY: json.dumps(metadata, ensure_ascii=False, allow_nan=False)})
        content.producer_name = "lightning-dice"
        content.producer_version = str(metadata["versions"]["lightning-dice"])
        content.doc_string = str(metadata["name"])
        path.write_bytes(content.SerializeToString())

    def open(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Return the model's function, run by ONNX Runtime on the CPU."""
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])

    def read_metadata(self, path: Path) -> dict[str, Any]:
        """Return the entry of `metadata_props`."""
        import onnx

        model = onnx.load(path, load_external_data=False)
        entries = {entry.key: entry.value for entry in model.metadata_props}
        result: dict[str, Any] = json.loads(entries[KEY])
        return result


class Program:
    """A program of `torch.export`, for torch in Python, or to be compiled ahead of time."""

    suffix = ".pt2"
    has_graph = True

    def require(self) -> None:
        """Check for nothing: torch is enough."""

    def prepare(self, graph: ExportedGraph | None, module: SegmentationModule, output_type: str) -> Any:
        """Return the program itself."""
        if graph is None:
            raise ValueError("graph must be an ExportedGraph, got None")
        return graph.program

    def write(self, content: Any, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write the program; the metadata are its extra file `model.json`."""
        text = json.dumps(metadata, ensure_ascii=False, allow_nan=False)
        with _quiet():
            torch.export.save(content, path, extra_files={EXTRA_FILE: text})

    def open(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Return the program's function, run by torch on the CPU."""
        with _quiet():
            return _without_gradients(torch.export.load(path).module())

    def read_metadata(self, path: Path) -> dict[str, Any]:
        """Return the extra file."""
        files = {EXTRA_FILE: ""}
        with _quiet():
            torch.export.load(path, extra_files=files)
        result: dict[str, Any] = json.loads(files[EXTRA_FILE])
        return result


class Weights:
    """Weights as safetensors, with the module's config in the header: no pickle, and no code.

    `SegmentationModule.from_safetensors` loads the module.
    """

    suffix = ".safetensors"
    has_graph = False

    def require(self) -> None:
        """Check for safetensors, which comes with segmentation-models-pytorch."""
        require("safetensors", needed_by="format=safetensors")

    def prepare(self, graph: ExportedGraph | None, module: SegmentationModule, output_type: str) -> Any:
        """Return copies of the weights: the format has neither shared memory nor strides."""
        return {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}

    def write(self, content: Any, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write the weights; the metadata are an entry of the header."""
        from safetensors.torch import save_file

        save_file(content, path, {"format": "pt", KEY: json.dumps(metadata, ensure_ascii=False, allow_nan=False)})

    def open(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Return the module that is loaded from the file."""
        from lightning_dice.module import SegmentationModule

        return _without_gradients(SegmentationModule.from_safetensors(path))

    def read_metadata(self, path: Path) -> dict[str, Any]:
        """Return the entry of the header."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            result: dict[str, Any] = json.loads((file.metadata() or {})[KEY])
        return result


FORMATS: dict[str, Callable[..., Format]] = {"onnx": Onnx, "torch_export": Program, "safetensors": Weights}


def _without_gradients(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(image: Tensor) -> Tensor:
        with torch.no_grad():
            result: Tensor = module(image)
        return result

    return run


def _remove_notes(model: Any) -> None:
    """Remove the exporter's notes on the code on this machine and on its own work."""
    graph = model.graph
    parts = [graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer, *model.functions]
    parts += [node for function in model.functions for node in function.node]
    for part in parts:
        for name in ("metadata_props", "doc_string"):
            part.ClearField(name)


def _name_axes(model: Any, graph: ExportedGraph) -> None:
    """Name the open axes of the graph `batch`, `height` ... instead of `s77`."""
    shape = model.graph.input[0].type.tensor_type.shape.dim
    names = {
        dim.dim_param: name
        for dim, name in zip(shape, axes(len(shape) - 2), strict=True)
        if dim.dim_param and name in graph.input_shape.dynamic
    }
    if not names:
        return
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = pattern.sub(lambda found: names[found[0]], dim.dim_param)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' progress reports and warnings about deprecated names."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
