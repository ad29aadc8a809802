"""Report user errors as one message and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf.errors import MissingMandatoryValue

from lightning_dice.data import DataError


class UserError(ValueError):
    """A mistake in what a command was given; shown as one message, without a traceback."""


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Turn a `UserError` into its message on standard error and exit status 2."""
    try:
        yield
    except (UserError, MissingMandatoryValue) as error:
        message = str(error)
        if isinstance(error, MissingMandatoryValue):
            message = f"{error.full_key} has no value: give {error.full_key}=..."
        print(f"\nerror: {message}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Turn what this package refuses, data or settings that do not fit them, into a message without a traceback."""
    try:
        yield
    except ValueError as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        raised_here = place is not None and str(place.tb_frame.f_globals.get("__name__")).startswith("lightning_dice.")
        if isinstance(error, DataError) or raised_here:
            raise UserError(str(error)) from error
        raise
