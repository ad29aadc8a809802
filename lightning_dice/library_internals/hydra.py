"""Internals of Hydra, read in hydra-core 1.3.8: the parser of overrides, which its documentation does not mention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning_dice.library_internals import internal

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.types import Override as Override


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


def parse_overrides(texts: Iterable[str], config_loader: ConfigLoader | None = None) -> list[Override]:
    """Parse overrides by Hydra's grammar (`OverridesParser.parse_overrides`).

    Args:
        texts: the overrides.
        config_loader: finds the configs that `glob` names.

    Raises:
        hydra.errors.HydraException: a text does not follow the grammar.
    """
    overrides: list[Override] = _parser(config_loader).parse_overrides(list(texts))
    return overrides


def list_choices(override: Override) -> list[tuple[Any, str]]:
    """Return the values of a choice, and their texts in Hydra's grammar (`Transformer.str`).

    They keep the order of the command line also in `shuffle(...)`, which differs from one call to the next.

    >>> list_choices(parse_override("a=1,'b c',[1,2]"))
    [(1, '1'), ('b c', "'b c'"), ([1, 2], '[1,2]')]
    """
    write = internal("hydra.core.override_parser.types", "Transformer.str", "hydra-core")
    items = getattr(override.value(), "list", None)
    if items is None:  # A glob.
        items = list(override.sweep_iterator())
    return [(getattr(item, "text", item), write(item)) for item in items]


def _parser(config_loader: ConfigLoader | None = None) -> Any:
    create = internal("hydra.core.override_parser.overrides_parser", "OverridesParser.create", "hydra-core")
    return create(config_loader)
