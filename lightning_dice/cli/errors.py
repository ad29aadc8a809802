"""User errors, and errors of a disk: shown as one message instead of a traceback, with exit status 2 or 1."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf.errors import MissingMandatoryValue

from lightning_dice.extras import MissingExtra


class UserError(ValueError):
    """A mistake in the settings or the data, which is shown as one message without a traceback."""


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Print a `UserError`, or a `MissingExtra`, to standard error and exit with status 2."""
    try:
        yield
    except (UserError, MissingMandatoryValue, MissingExtra) as error:
        message = str(error)
        if isinstance(error, MissingMandatoryValue):
            message = f"{error.full_key} has no value: give {error.full_key}=..."
        print(f"\nerror: {message}", file=sys.stderr)
        raise SystemExit(2) from None


# A full disk, a quota, a limit of a file system, a disk that is read-only, broken or gone.
_DISK = tuple(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ESTALE") if hasattr(errno, name)
)


@contextmanager
def report_disk_errors(folder: Path, resume: str) -> Iterator[None]:
    """Print one line if a file of a run cannot be written, and exit with status 1.

    Args:
        folder: the run's.
        resume: the command that continues the run.

    Raises:
        SystemExit: 1, in place of the error of a disk; other errors remain.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        place = error.filename or folder
        print(
            f"\nerror: {place} could not be written: {error.strerror}. What was saved before is intact: make room, and "
            f"continue with {resume}",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Turn a `DataError`, a `MissingExtra`, and any `ValueError` that this package raises, into a `UserError`."""
    try:
        yield
    except MissingExtra as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        from lightning_dice.data.errors import DataError  # Here, as it imports torch.

        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        raised_here = place is not None and str(place.tb_frame.f_globals.get("__name__")).startswith("lightning_dice.")
        if isinstance(error, DataError) or raised_here:
            raise UserError(str(error)) from error
        raise
