"""Colours that colour-blind people can tell apart."""

from __future__ import annotations

from collections.abc import Sequence

Color = tuple[int, int, int]

# Okabe and Ito's colours, then those of Paul Tol's "muted" scheme that differ from them. The order of the first ones
# keeps neighbours distinct; black is left out, because it would vanish in dark images.
PALETTE = (
    *("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00"),
    *("#882255", "#999933", "#332288", "#DDCC77", "#117733", "#AA4499", "#44AA99", "#CC6677", "#BBBBBB"),
)

# The four of Okabe and Ito's colours that are farthest apart (CIE Lab; least distance over normal vision and simulated
# protanopia, deuteranopia and tritanopia: 24.8, and 33.6 among the first three).
TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE, WRONG_CLASS = "#56B4E9", "#D55E00", "#F0E442", "#0072B2"
IGNORED = "#404040"


def parse_color(color: str | Sequence[int]) -> Color:
    """Return red, green and blue, 0 to 255, of `"#RRGGBB"` or of a triple.

    >>> parse_color("#56B4E9")
    (86, 180, 233)

    Raises:
        ValueError: for anything else.
    """
    try:
        if isinstance(color, str):
            red, green, blue = bytes.fromhex(color.removeprefix("#"))
        else:
            red, green, blue = bytes(color)
    except (TypeError, ValueError):
        raise ValueError(f"colors must be '#RRGGBB' or (red, green, blue) of 0 to 255, got {color!r}") from None
    return red, green, blue


def class_colors(
    count: int, colors: Sequence[str | Sequence[int]] | None = None, skip: Sequence[int] = ()
) -> list[Color]:
    """Return a colour for each of `count` classes.

    Args:
        count: number of classes.
        colors: one for each class; None takes them from the palette.
        skip: indices of classes that are never painted; they are black and use up no colour of the palette.

    Raises:
        ValueError: the number of `colors` is not `count`.

    >>> class_colors(3, skip=[0])
    [(0, 0, 0), (86, 180, 233), (230, 159, 0)]
    """
    if colors is not None:
        if len(colors) != count:
            raise ValueError(f"colors must have one entry for each of the {count} classes, got {len(colors)}")
        return [parse_color(color) for color in colors]
    painted = iter(range(count))
    return [
        (0, 0, 0) if index in skip else parse_color(PALETTE[next(painted) % len(PALETTE)]) for index in range(count)
    ]
