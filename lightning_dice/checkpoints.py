"""Write checkpoints safely, and find the newest one that can be read."""

from __future__ import annotations

import io
import os
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_dice.io import write_atomically

SUFFIX = ".ckpt"
FORMER = ".former"  # last.ckpt's is last.former.ckpt


class SafeCheckpointIO(TorchCheckpointIO):
    """Write checkpoints safely on disks that may be full and machines that may stop.

    A checkpoint is written beside the one before, flushed to the disk and then renamed, so that one of them is intact
    at any moment. For the names in `keep`, the one before stays as `<name>.former.ckpt`. A write that fails is repeated
    for a while, with a message each time, while training waits.

    Args:
        patience: seconds for which a failing write is repeated.
        keep: names, without suffix, of the checkpoints whose predecessor is kept.

    Raises:
        OSError: `save_checkpoint` has failed for longer than `patience`; the checkpoint before is intact.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in range(2):
    ...         SafeCheckpointIO().save_checkpoint({"global_step": step}, f"{folder}/last.ckpt")
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['last.ckpt', 'last.former.ckpt']
    """

    def __init__(self, patience: float = 600.0, keep: tuple[str, ...] = ("last",)) -> None:
        super().__init__()
        if not patience >= 0:
            raise ValueError(f"patience must be a number of seconds >= 0, got {patience!r}")
        self.patience, self.keep = patience, tuple(keep)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to the file `path`; a URL is left to Lightning."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        # In memory first: then only the disk can fail, and each attempt writes the state of this moment.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        retry_writing(lambda: self._write(buffer, target), self.patience, f"the checkpoint {target}")

    def _write(self, buffer: io.BytesIO, target: Path) -> None:
        def write(part: Path) -> None:
            with part.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if target.stem in self.keep and target.is_file():
                keep_former(target)

        write_atomically(target, write)


def keep_former(target: Path) -> None:
    """Give a file that is about to be replaced a second name, so that an intact one exists at every moment."""
    former = target.with_name(f"{target.stem}{FORMER}{target.suffix}")
    link = target.with_name(f".{former.stem}.{os.getpid()}.part{target.suffix}")
    try:
        os.link(target, link)
        os.replace(link, former)
    except OSError:
        # A file system without links.
        os.replace(target, former)
    finally:
        link.unlink(missing_ok=True)


def retry_writing(write: Callable[[], object], patience: float, name: str) -> None:
    """Call `write`; while it raises `OSError`, wait and call it again, for up to `patience` seconds.

    Args:
        write: writes a file.
        patience: in seconds; afterwards the error is raised.
        name: the file's name, for the message.

    >>> retry_writing(lambda: None, patience=1.0, name="the file")
    """
    end, pause = time.monotonic() + patience, 1.0
    while True:
        try:
            write()
            return
        except OSError as error:
            left = end - time.monotonic()
            if left <= 0:
                raise
            message = f"{name} could not be written: {error}. The training waits, and tries again for {left:.0f} s."
            print(message, file=sys.stderr, flush=True)
            time.sleep(min(pause, left))
            pause = min(2 * pause, 30.0)


def newest_readable(folder: Path) -> Path | None:
    """Return the checkpoint to resume from: the newest that is not damaged, or None if the folder has none.

    Damaged checkpoints cause a warning.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    damaged: list[str] = []
    for path in _candidates(folder):
        try:
            torch.load(path, map_location="meta", weights_only=True, mmap=True)
            with zipfile.ZipFile(path) as archive:
                if (part := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {part} is wrong")
        except Exception as error:
            damaged.append(f"{path} ({str(error).splitlines()[0]})")
            continue
        if damaged:
            warnings.warn(f"damaged: {', '.join(damaged)}; resuming from {path}, which is older", stacklevel=2)
        return path
    if damaged:
        raise ValueError(f"no checkpoint can be read: {', '.join(damaged)}")
    return None


def _candidates(folder: Path) -> Iterator[Path]:
    """Yield checkpoints in the order of preference: last, its predecessor, then the others, newest first."""
    first = [folder / f"last{SUFFIX}", folder / f"last{FORMER}{SUFFIX}"]
    others = [path for path in folder.glob(f"*{SUFFIX}") if path not in first and not path.name.startswith(".")]
    yield from (path for path in first if path.is_file())
    yield from sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files of a process that was killed while writing; no process may be writing now."""
    for path in folder.glob(f".*.part{SUFFIX}"):
        path.unlink(missing_ok=True)
