"""From a trained module to files that run without this package: the graph, its facts, their check, the card.

`capture` makes a graph of a module, `FORMATS` are the files that hold it, `describe` says what a user of such a file
must know, `compare` runs the file on real cases beside the module, and `model_card` and `script` write it down.
"""

from lightning_dice.exporting.formats import FORMATS, Format, MissingExtra
from lightning_dice.exporting.graph import ExportedGraph, ExportWrapper, Graph, NotExportable, capture, takes_batches
from lightning_dice.exporting.metadata import SCHEMA, SCHEMA_VERSION, describe
from lightning_dice.exporting.model_card import model_card
from lightning_dice.exporting.onnx_script import script
from lightning_dice.exporting.verification import Agreement, VerificationCase, verify

__all__ = [
    "FORMATS",
    "SCHEMA",
    "SCHEMA_VERSION",
    "Agreement",
    "ExportWrapper",
    "ExportedGraph",
    "Format",
    "Graph",
    "MissingExtra",
    "NotExportable",
    "VerificationCase",
    "capture",
    "describe",
    "model_card",
    "script",
    "takes_batches",
    "verify",
]
