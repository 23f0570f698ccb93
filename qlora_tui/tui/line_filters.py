"""Filters that each painted line passes through on its way to the terminal.

:class:`VisibleTextFilter` makes control characters visible, so that no text can control the terminal.
:class:`MonochromeFilter` replaces colors with attributes on terminals without color. :func:`dimmed` dims
the screen behind a dialog. :func:`fallback_glyphs` replaces characters that the Linux console lacks.
"""

from __future__ import annotations

import curses
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from rich.cells import cell_len
from rich.color import Color as RichColor
from rich.segment import Segment
from rich.style import Style
from textual.color import Color
from textual.filter import LineFilter
from textual.theme import Theme

from qlora_tui.tui.themes import HUES
from qlora_tui.visible import visible

_BLANKS = re.compile(" {2,}$")


class VisibleTextFilter(LineFilter):
    """Replaces control characters with visible symbols.

    Textual lays out lines as if control characters had no width, but a symbol has a width. To keep the line's
    width, spaces after the symbol are removed. If there are too few spaces, the end of the line is cut off.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Return the segments with symbols instead of control characters, and without links. If ``segments``
        has no control characters and no links, return ``segments`` itself.
        """
        for text, style, control in segments:
            if (not text.isprintable() and _shown(text) != text) or control or (style and style.link):
                return _of_same_width(segments)
        return segments


def _of_same_width(segments: list[Segment]) -> list[Segment]:
    width = sum(cell_len(segment.text) for segment in segments)
    shown: list[Segment] = []
    surplus = 0
    for text, style, _ in segments:
        safe = _shown(text)
        surplus += cell_len(safe) - cell_len(text)
        if surplus > 0 and (blanks := _BLANKS.search(safe)):
            taken = min(surplus, len(blanks[0]) - 1)
            safe, surplus = safe[: len(safe) - taken], surplus - taken
        shown.append(Segment(safe, style.update_link(None) if style and style.link else style))
    return Segment.adjust_line_length(shown, width)


def _shown(text: str) -> str:
    # A line must not contain line breaks, and a tab would shift the text after it.
    return visible(text.replace("\t", " ").replace("\n", "␊"))


_FOREGROUND, _BACKGROUND = "#ffffff", "#000000"
_BRIGHT = 0.51
"""Brightness above which a color is shown as the foreground. That of ``bright_black`` is 0.502."""
_DIM = "#606060"
"""A color that :class:`MonochromeFilter` replaces with the attribute dim."""

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
        **dict.fromkeys(("key", *HUES), _FOREGROUND),
        "text-muted": _FOREGROUND,
        "text-disabled": _FOREGROUND,
        "block-cursor-foreground": _FOREGROUND,
        "block-cursor-background": _BACKGROUND,
        "block-cursor-text-style": "reverse",
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
        "border-blurred": _DIM,
        "scrollbar": _FOREGROUND,
        "scrollbar-hover": _FOREGROUND,
        "scrollbar-active": _FOREGROUND,
        "scrollbar-background": "ansi_default",
        "scrollbar-background-hover": "ansi_default",
        "scrollbar-background-active": "ansi_default",
    },
)
"""A theme in black and white only, for terminals that cannot display colors."""


def has_no_colors() -> bool:
    """Return whether the terminal named by ``TERM`` lacks colors.

    An unknown terminal is assumed to have colors.
    """
    try:
        curses.setupterm(fd=1)
    except (curses.error, OSError):
        return False
    return curses.tigetnum("colors") <= 0


class MonochromeFilter(LineFilter):
    """Replaces colors with the attributes reverse and dim. Reversed text is never dim, because it would be
    hard to read.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [
            Segment(text, None if style is None else _without_colors(style), control)
            for text, style, control in segments
        ]


@lru_cache(1024)
def _without_colors(style: Style) -> Style:
    on_foreground = _is_foreground(style.bgcolor, otherwise=False)
    reverse = bool(style.reverse) != on_foreground
    is_faint = style.dim or not _is_foreground(style.color, otherwise=True)
    faint = is_faint and not (style.reverse or on_foreground)
    # The metadata is kept, since Textual uses it to find what was clicked.
    return style.without_color + Style(dim=faint, reverse=reverse, meta=style.meta or None)


def _is_foreground(color: RichColor | None, *, otherwise: bool) -> bool:
    if color is None or color.is_default:
        return otherwise
    return Color.from_rich_color(color).brightness > _BRIGHT


def dimmed(segments: Iterable[Segment], *, keeps_reverse: bool) -> list[Segment]:
    """Return the segments with dim text, without its color and other attributes. Background colors are kept,
    except under reversed text. With ``keeps_reverse``, reversed text stays reversed.
    """
    return [
        Segment(
            text,
            Style(
                dim=True,
                bgcolor=style.bgcolor if style else None,
                reverse=bool(keeps_reverse and style and style.reverse),
            ),
            control,
        )
        for text, style, control in segments
    ]


_FALLBACKS = {
    "_": "▁▂▔",
    "▄": "▃▅▆▖▗",
    "█": "▇▋▊▉▙▛▜▟",
    "▀": "▘▝",
    "▌": "▏▎▍▚▞",
    "▐": "▕",
    "┌": "╭",
    "┐": "╮",
    "└": "╰",
    "┘": "╯↵⏎",
    "═": "━",
    "║": "┃‖",
    "►": "▸▶",
    "◄": "◂◀❮",
    "▲": "▴",
    "▼": "▾",
    "•": "●⬤",
    "○": "◌◯",
    "♦": "◆",
    "√": "✓✔",
    "x": "✗✘×",
    "*": "★✱",
    "!": "⚠",
    "<": "‹⟨",
    ">": "❯›⟩",
    "[": "⟦",
    "]": "⟧",
    "─": "┈",
    "-": "–—−",
    "|": "✂",
    "~": "…⋯",
    "'": "’‘",
    "> ": "🔎",
    '"': "“”",
}
_CONTROL_PICTURES = range(0x2400, 0x2422)
"""Code points of the symbols that stand for control characters."""
_UPPER = 0x01 | 0x02 | 0x08 | 0x10
"""Bits of the dots in the upper two rows of a braille cell."""


def fallback_glyphs(terminal: str) -> Mapping[int, str]:
    """Return substitutes for characters that the terminal's font lacks, as a table for ``str.translate``;
    empty if none are needed. ``terminal`` is the value of ``TERM``.
    """
    if terminal != "linux":
        return {}
    return (
        {ord(one): fallback for fallback, glyphs in _FALLBACKS.items() for one in glyphs}
        | {0x2800 + dots: _half_blocks(dots) for dots in range(256)}
        | dict.fromkeys(_CONTROL_PICTURES, "?")
    )


def _half_blocks(dots: int) -> str:
    upper, lower = dots & _UPPER, dots & ~_UPPER
    return "█" if upper and lower else "▀" if upper else "▄" if lower else " "
