"""Checkpoints that are whole or not there, and are found again."""

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
    """Lightning's way of writing checkpoints, for disks that fill up and machines that stop.

    A checkpoint is written beside its place, flushed to the disk and then moved there; the one before it is whole until
    that moment, and of those named in `keep` it stays beside it as `<name>.former.ckpt`. Writing that fails is tried
    again for a while, with a message each time; the training waits.

    Args:
        patience: seconds for which a failing disk is tried again.
        keep: names without suffix of checkpoints whose former one is kept.

    Raises:
        OSError: by `save_checkpoint`, once patience is over; what was there is still whole.

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
        """Write `checkpoint` to the file `path`; one of another place than this machine's files as Lightning does."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        # In memory first: what fails later is the disk alone, and the state is that of this moment.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        retried(lambda: self._write(buffer, target), self.patience, f"the checkpoint {target}")

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
    """Give a file, about to be replaced, a second name, so that there is a whole one at every moment."""
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


def retried(write: Callable[[], object], patience: float, what: str) -> None:
    """Call `write`, again and again while it fails for the disk's sake, for `patience` seconds."""
    end, pause = time.monotonic() + patience, 1.0
    while True:
        try:
            write()
            return
        except OSError as error:
            left = end - time.monotonic()
            if left <= 0:
                raise
            message = f"{what} could not be written: {error}. The training waits, and tries again for {left:.0f} s."
            print(message, file=sys.stderr, flush=True)
            time.sleep(min(pause, left))
            pause = min(2 * pause, 30.0)


def newest_readable(folder: Path) -> Path | None:
    """The checkpoint to go on from: the last one, or if that is damaged the one before; `None` if there is none.

    Warns of a damaged one.

    Raises:
        ValueError: there are some, and all are damaged.
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
            warnings.warn(f"damaged: {', '.join(damaged)}; going on from {path}, which is older", stacklevel=2)
        return path
    if damaged:
        raise ValueError(f"no checkpoint can be read: {', '.join(damaged)}")
    return None


def _candidates(folder: Path) -> Iterator[Path]:
    """Checkpoints in the order of preference: last, the one before it, then others, newest first."""
    first = [folder / f"last{SUFFIX}", folder / f"last{FORMER}{SUFFIX}"]
    others = [path for path in folder.glob(f"*{SUFFIX}") if path not in first and not path.name.startswith(".")]
    yield from (path for path in first if path.is_file())
    yield from sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)


def remove_parts(folder: Path) -> None:
    """Remove what a process that was killed while writing has left; no other may be writing."""
    for path in folder.glob(f".*.part{SUFFIX}"):
        path.unlink(missing_ok=True)
