"""The files that hold an exported model: made, opened again and run, as their users will."""

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

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_dice.module import SegmentationModule

KEY = "lightning_dice"  # under which a file holds its facts
EXTRA = "model.json"  # the same, in a program of torch.export
_PROTOBUF_BYTES = 2**31  # what one ONNX file can hold


class MissingExtra(ImportError):
    """A package that a format needs is not installed."""


class Format(Protocol):
    """A kind of file.

    Attributes:
        suffix: of its name.
        graphs: whether it holds a graph, which `capture` makes; else weights alone.
        opset: of ONNX; `None`: the exporter's own.
    """

    suffix: str
    graphs: bool

    def require(self) -> None:
        """See that what it needs is installed.

        Raises:
            MissingExtra: says what to install.
        """
        ...

    def prepare(self, captured: ExportedGraph | None, module: SegmentationModule, output: str) -> Any:
        """What `write` writes: the slow part, done once."""
        ...

    def write(self, prepared: Any, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the file, with the facts in it."""
        ...

    def open(self, path: Path) -> Callable[[Tensor], Tensor]:
        """The file's function of images `(batch, channels, *space)`, as it runs on the CPU."""
        ...

    def facts(self, path: Path) -> dict[str, Any]:
        """The facts in a file."""
        ...


class Onnx:
    """An ONNX model: any runtime of that standard, without Python.

    Args:
        opset: the version of ONNX's operators; `None`: the one that torch's exporter prefers.
    """

    suffix = ".onnx"
    graphs = True

    def __init__(self, opset: int | None = None) -> None:
        self.opset = opset

    def require(self) -> None:
        """onnx, onnxscript and onnxruntime."""
        _require("onnx", "onnxscript", "onnxruntime", extra="export")

    def prepare(self, captured: ExportedGraph | None, module: SegmentationModule, output: str) -> Any:
        """A model in memory."""
        if captured is None:
            raise ValueError("captured must be a graph, got None")
        size = sum(value.nbytes for value in captured.program.state_dict.values())
        if size > _PROTOBUF_BYTES * 0.98:
            raise NotExportable(f"the weights take {size / 2**30:.1f} GiB, and one ONNX file holds 2 GiB")
        try:
            with _quiet():
                made = torch.onnx.export(
                    captured.program,
                    dynamo=True,
                    input_names=["image"],
                    output_names=[output],
                    opset_version=self.opset,
                    verbose=False,
                )
        except Exception as error:  # Whatever the exporter brings up for an operator that ONNX lacks.
            cause = error.__cause__ or error
            raise NotExportable(f"{type(cause).__name__}: {' '.join(str(cause).strip().splitlines()[:1])}") from error
        if made is None:
            raise NotExportable("torch.onnx.export returned nothing")
        model = made.model_proto
        _strip(model)
        _name_axes(model, captured)
        return model

    def write(self, prepared: Any, path: Path, facts: Mapping[str, Any]) -> None:
        """Facts are an entry of the model's `metadata_props`."""
        import onnx

        del prepared.metadata_props[:]
        onnx.helper.set_model_props(prepared, {KEY: json.dumps(facts, ensure_ascii=False, allow_nan=False)})
        prepared.producer_name = "lightning-dice"
        prepared.producer_version = str(facts["versions"]["lightning-dice"])
        prepared.doc_string = str(facts["name"])
        path.write_bytes(prepared.SerializeToString())

    def open(self, path: Path) -> Callable[[Tensor], Tensor]:
        """By ONNX Runtime, on the CPU."""
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])

    def facts(self, path: Path) -> dict[str, Any]:
        """From the model's metadata."""
        import onnx

        model = onnx.load(path, load_external_data=False)
        found = {entry.key: entry.value for entry in model.metadata_props}
        result: dict[str, Any] = json.loads(found[KEY])
        return result


class Program:
    """A program of `torch.export`: torch alone, in Python, or compiled ahead of time from there."""

    suffix = ".pt2"
    graphs = True

    def require(self) -> None:
        """Nothing but torch."""

    def prepare(self, captured: ExportedGraph | None, module: SegmentationModule, output: str) -> Any:
        """The program itself."""
        if captured is None:
            raise ValueError("captured must be a graph, got None")
        return captured.program

    def write(self, prepared: Any, path: Path, facts: Mapping[str, Any]) -> None:
        """Facts are an extra file, `model.json`."""
        text = json.dumps(facts, ensure_ascii=False, allow_nan=False)
        with _quiet():
            torch.export.save(prepared, path, extra_files={EXTRA: text})

    def open(self, path: Path) -> Callable[[Tensor], Tensor]:
        """By torch, on the CPU."""
        with _quiet():
            return _without_gradients(torch.export.load(path).module())

    def facts(self, path: Path) -> dict[str, Any]:
        """From the extra file."""
        found = {EXTRA: ""}
        with _quiet():
            torch.export.load(path, extra_files=found)
        result: dict[str, Any] = json.loads(found[EXTRA])
        return result


class Weights:
    """The weights as safetensors, with the module's config in the header: no pickle, and nothing to run.

    `SegmentationModule.from_safetensors` makes the module again.
    """

    suffix = ".safetensors"
    graphs = False

    def require(self) -> None:
        """safetensors, which comes with segmentation-models-pytorch."""
        _require("safetensors")

    def prepare(self, captured: ExportedGraph | None, module: SegmentationModule, output: str) -> Any:
        """Copies: the format has neither shared memory nor strides."""
        return {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}

    def write(self, prepared: Any, path: Path, facts: Mapping[str, Any]) -> None:
        """Facts are an entry of the header."""
        from safetensors.torch import save_file

        save_file(prepared, path, {"format": "pt", KEY: json.dumps(facts, ensure_ascii=False, allow_nan=False)})

    def open(self, path: Path) -> Callable[[Tensor], Tensor]:
        """By the module that is made of the file."""
        from lightning_dice.module import SegmentationModule

        return _without_gradients(SegmentationModule.from_safetensors(path))

    def facts(self, path: Path) -> dict[str, Any]:
        """From the header."""
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


def _require(*packages: str, extra: str | None = None) -> None:
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        what = f"'lightning-dice[{extra}]'" if extra else " ".join(missing)
        raise MissingExtra(f"{', '.join(missing)} is not installed: pip install {what}", name=missing[0])


def _strip(model: Any) -> None:
    """Take out what the exporter notes of the code on this machine, and of its own workings."""
    graph = model.graph
    parts = [graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer, *model.functions]
    parts += [node for function in model.functions for node in function.node]
    for part in parts:
        for name in ("metadata_props", "doc_string"):
            part.ClearField(name)


def _name_axes(model: Any, captured: ExportedGraph) -> None:
    """Call the open axes of the graph by their names: `batch`, `height`, instead of `s77`."""
    shape = model.graph.input[0].type.tensor_type.shape.dim
    names = {
        dim.dim_param: name
        for dim, name in zip(shape, axes(len(shape) - 2), strict=True)
        if dim.dim_param and name in captured.dynamic
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
    """Without what exporters say of their own progress and of names that torch deprecates."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
