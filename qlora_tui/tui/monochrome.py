"""The app without colours: the terminal's own ink on its own page, whichever of them is the lighter.

For whoever sets NO_COLOR and for terminals that have none. The screens are laid out in two colours, and as
each line is painted what is drawn on ink becomes reversed, what is fainter than half becomes dim, and no
colour is left.
"""

from __future__ import annotations

import curses
from functools import lru_cache

from rich.color import Color as RichColor
from rich.segment import Segment
from rich.style import Style
from textual.color import Color
from textual.filter import LineFilter
from textual.theme import Theme

_INK, _PAGE = "#ffffff", "#000000"
_HALF = 0.5

TWO_COLORS = Theme(
    name="two-colours",
    dark=True,
    primary=_INK,
    secondary=_INK,
    warning=_INK,
    error=_INK,
    success=_INK,
    accent=_INK,
    foreground=_INK,
    background=_PAGE,
    surface=_PAGE,
    panel=_PAGE,
    boost=_PAGE,
    variables={
        "text-muted": _INK,
        "text-disabled": _INK,
        "block-cursor-foreground": _PAGE,
        "block-cursor-background": _INK,
        "block-cursor-blurred-foreground": _INK,
        "block-cursor-blurred-background": _PAGE,
        "block-cursor-blurred-text-style": "bold",
        "block-hover-background": _PAGE,
        "input-cursor-foreground": _PAGE,
        "input-cursor-background": _INK,
        "input-selection-foreground": _PAGE,
        "input-selection-background": _INK,
        "screen-selection-foreground": _PAGE,
        "screen-selection-background": _INK,
        "border-blurred": _INK,
        "scrollbar": _INK,
        "scrollbar-hover": _INK,
        "scrollbar-active": _INK,
        "scrollbar-background": _PAGE,
        "scrollbar-background-hover": _PAGE,
        "scrollbar-background-active": _PAGE,
    },
)
"""What the screens are laid out in."""


def has_no_colors() -> bool:
    """Whether the terminal that ``TERM`` names has no colours; one that is not known has some."""
    try:
        curses.setupterm(fd=1)
    except (curses.error, OSError):
        return False
    return curses.tigetnum("colors") <= 0


class MonochromeFilter(LineFilter):
    """Takes the colours away; what they said of the two is said by attributes."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [
            Segment(text, None if style is None else _in_ink(style), control)
            for text, style, control in segments
        ]


@lru_cache(1024)
def _in_ink(style: Style) -> Style:
    on_ink = _is_ink(style.bgcolor, otherwise=False)
    faint = style.dim or not (on_ink or _is_ink(style.color, otherwise=True))
    # Without its meta no click would find what it is on.
    reverse = bool(style.reverse) != on_ink
    return style.without_color + Style(dim=faint, reverse=reverse, meta=style.meta or None)


def _is_ink(colour: RichColor | None, *, otherwise: bool) -> bool:
    if colour is None or colour.is_default:
        return otherwise
    return Color.from_rich_color(colour).brightness > _HALF
