"""Export of trained modules to files that run without this package.

`capture_graph` traces the graph of a module, `FORMATS` write it to a file, `model_metadata` describes it, `verify`
compares the file with the module on real cases, and `model_card` writes all of this down. `SCRIPT` runs an ONNX file.
"""

from lightning_dice.exporting.formats import FORMATS, Format
from lightning_dice.exporting.graph import (
    ExportedGraph,
    ExportWrapper,
    InputShape,
    NotExportable,
    OutputType,
    capture_graph,
    is_exportable,
)
from lightning_dice.exporting.metadata import SCHEMA, SCHEMA_VERSION, ExportedFile, TrainedRun, model_metadata
from lightning_dice.exporting.model_card import model_card
from lightning_dice.exporting.output_files import SCRIPT, OutputFiles, output_files
from lightning_dice.exporting.settings import ExportSettings
from lightning_dice.exporting.verification import Agreement, OpenedFile, VerificationCase, verify
from lightning_dice.extras import MissingExtra

__all__ = [
    "FORMATS",
    "SCHEMA",
    "SCHEMA_VERSION",
    "SCRIPT",
    "Agreement",
    "ExportSettings",
    "ExportWrapper",
    "ExportedFile",
    "ExportedGraph",
    "Format",
    "InputShape",
    "MissingExtra",
    "NotExportable",
    "OpenedFile",
    "OutputFiles",
    "OutputType",
    "TrainedRun",
    "VerificationCase",
    "capture_graph",
    "is_exportable",
    "model_card",
    "model_metadata",
    "output_files",
    "verify",
]
