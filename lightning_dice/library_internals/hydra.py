"""Internals of Hydra, read in hydra-core 1.3.8: the parser of overrides, which its documentation does not mention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning_dice.library_internals import internal

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def parse_override(text: str) -> Override:
    """Parse an override by Hydra's grammar (`OverridesParser.parse_override`).

    Raises:
        hydra.errors.HydraException: the text does not follow the grammar.

    >>> override = parse_override("+loss.smooth=0.5")
    >>> override.key_or_group, override.value(), override.is_add()
    ('loss.smooth', 0.5, True)
    """
    override: Override = _parser().parse_override(text)
    return override


def parse_overrides(texts: Iterable[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar (`OverridesParser.parse_overrides`).

    Raises:
        hydra.errors.HydraException: a text does not follow the grammar.
    """
    overrides: list[Override] = _parser().parse_overrides(list(texts))
    return overrides


def _parser() -> Any:
    return internal("hydra.core.override_parser.overrides_parser", "OverridesParser.create", "hydra-core")()
