"""The files that an export writes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning_dice.exporting.formats import FORMATS, Format
from lightning_dice.exporting.model_card import model_card
from lightning_dice.io import write_atomically

SCRIPT = Path(__file__).with_name("run_onnx.py")
_SUFFIXES = [make_format().suffix for make_format in FORMATS.values()]


class OutputFiles(NamedTuple):
    """Paths of the files.

    Attributes:
        model: the exported model.
        metadata: the metadata, as JSON.
        card: the model card.
        script: runs the model; `None` for a format without one.
    """

    model: Path
    metadata: Path
    card: Path
    script: Path | None

    @property
    def paths(self) -> list[Path]:
        """All of them, the model first."""
        return [path for path in self if path is not None]

    def write(
        self, file_format: Format, content: Any, metadata: Mapping[str, Any], splits: Mapping[str, int] | None
    ) -> None:
        """Write the files, each atomically.

        Args:
            file_format: the model's format.
            content: returned by `file_format.prepare`.
            metadata: the model's metadata.
            splits: number of cases in each split, for the card; `None` if unknown.
        """
        write_atomically(self.model, lambda path: file_format.write(content, path, metadata))
        _write_text(self.metadata, json.dumps(metadata, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        if self.script is not None:
            write_atomically(self.script, partial(shutil.copyfile, SCRIPT))
        names = [path for path in (self.model, self.metadata, self.script) if path is not None]
        _write_text(self.card, model_card(metadata, files=names, splits=splits))


@contextmanager
def output_files(
    output: str | None, new_folder: Callable[[], Path], suffix: str, *, overwrite: bool
) -> Iterator[OutputFiles]:
    """Make the output folder, and remove it at the end if nothing was written.

    Args:
        output: a folder, or the path of the model's file in one; `None`: `new_folder()`.
        new_folder: makes a folder.
        suffix: the suffix of the model's file.
        overwrite: whether existing files may be replaced.

    Yields:
        The paths of the files.

    Raises:
        ValueError: a file exists, the output's suffix does not fit the format, or the folder cannot be written to.
    """
    if output is None:
        folder, stem = new_folder(), "model"
        created = [folder]
    else:
        path = Path(output).expanduser().absolute()
        if path.suffix in _SUFFIXES and path.suffix != suffix:
            raise ValueError(f"output {path.name} must end in {suffix} in this format, or be a folder")
        folder, stem = (path.parent, path.stem) if path.suffix == suffix else (path, "model")
        created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the output folder {folder}: {error.strerror}") from error
    script = folder / SCRIPT.name if suffix == ".onnx" else None
    files = OutputFiles(folder / f"{stem}{suffix}", folder / f"{stem}.json", folder / "MODEL_CARD.md", script)
    try:
        existing = [path for path in files.paths if path.exists()]
        if existing and not overwrite:
            raise ValueError(
                f"{existing[0]} exists, and nothing is overwritten: choose another output, or set overwrite=true"
            )
        if not os.access(folder, os.W_OK):
            raise ValueError(f"the output folder {folder} cannot be written to; choose another output")
        yield files
    finally:
        for parent in created:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, partial(Path.write_text, data=text, encoding="utf-8"))
