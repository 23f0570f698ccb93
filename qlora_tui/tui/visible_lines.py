"""The app's text layer: every line of every widget passes here before it is painted."""

from __future__ import annotations

import re

from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

from qlora_tui.visible import visible

_BLANKS = re.compile(" {2,}$")


class VisibleTextFilter(LineFilter):
    """Shows control characters as symbols.

    Textual laid out the line as if these characters had no width. The line keeps its width: what a symbol
    adds is taken from the spaces after it, or from the end of the line if there are too few.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Return the same list if there are no control characters."""
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
    # A line has no line breaks, and a tab would shift what follows.
    return visible(text.replace("\t", " ").replace("\n", "␊"))
