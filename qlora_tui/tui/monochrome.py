"""The app without colors: the terminal's default foreground and background.

For users who set NO_COLOR and for terminals without colors. The screens use a theme of two colors. When a
line is painted, a background in the foreground color becomes reversed, a color below half brightness becomes
dim, and no color is left.
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

_FOREGROUND, _BACKGROUND = "#ffffff", "#000000"
_HALF = 0.5

TWO_COLORS = Theme(
    name="two-colors",
    dark=True,
    primary=_FOREGROUND,
    secondary=_FOREGROUND,
    warning=_FOREGROUND,
    error=_FOREGROUND,
    success=_FOREGROUND,
    accent=_FOREGROUND,
    foreground=_FOREGROUND,
    background=_BACKGROUND,
    surface=_BACKGROUND,
    panel=_BACKGROUND,
    boost=_BACKGROUND,
    variables={
        "text-muted": _FOREGROUND,
        "text-disabled": _FOREGROUND,
        "block-cursor-foreground": _BACKGROUND,
        "block-cursor-background": _FOREGROUND,
        "block-cursor-blurred-foreground": _FOREGROUND,
        "block-cursor-blurred-background": _BACKGROUND,
        "block-cursor-blurred-text-style": "bold",
        "block-hover-background": _BACKGROUND,
        "input-cursor-foreground": _BACKGROUND,
        "input-cursor-background": _FOREGROUND,
        "input-selection-foreground": _BACKGROUND,
        "input-selection-background": _FOREGROUND,
        "screen-selection-foreground": _BACKGROUND,
        "screen-selection-background": _FOREGROUND,
        "border-blurred": _FOREGROUND,
        "scrollbar": _FOREGROUND,
        "scrollbar-hover": _FOREGROUND,
        "scrollbar-active": _FOREGROUND,
        "scrollbar-background": _BACKGROUND,
        "scrollbar-background-hover": _BACKGROUND,
        "scrollbar-background-active": _BACKGROUND,
    },
)
"""The theme of two colors."""


def has_no_colors() -> bool:
    """Whether the terminal in ``TERM`` has no colors; an unknown terminal has colors."""
    try:
        curses.setupterm(fd=1)
    except (curses.error, OSError):
        return False
    return curses.tigetnum("colors") <= 0


class MonochromeFilter(LineFilter):
    """Replaces colors by the attributes reverse and dim."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [
            Segment(text, None if style is None else _without_colors(style), control)
            for text, style, control in segments
        ]


@lru_cache(1024)
def _without_colors(style: Style) -> Style:
    on_foreground = _is_foreground(style.bgcolor, otherwise=False)
    faint = style.dim or not (on_foreground or _is_foreground(style.color, otherwise=True))
    # Textual finds what was clicked by the meta.
    reverse = bool(style.reverse) != on_foreground
    return style.without_color + Style(dim=faint, reverse=reverse, meta=style.meta or None)


def _is_foreground(color: RichColor | None, *, otherwise: bool) -> bool:
    if color is None or color.is_default:
        return otherwise
    return Color.from_rich_color(color).brightness > _HALF
