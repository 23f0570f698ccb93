"""Rendering of text to Textual's strips."""

from __future__ import annotations

from rich.segment import Segment
from rich.style import Style
from textual.content import Content
from textual.strip import Strip
from textual.visual import Visual
from textual.widget import Widget

_PLACE = "offset"


def render_strips(widget: Widget, content: Content, width: int, height: int) -> list[Strip]:
    """Render content as lines in the widget's style, each ``width`` cells wide.

    The offset that Textual adds to each segment for mouse selection is removed: with it, the same
    words one cell further on would be another style, and style caches would fill up over hours.
    """
    strips = Visual.to_strips(
        widget, content, width, height, widget.visual_style, pad=True, apply_selection=False
    )
    return [
        Strip([Segment(text, _placeless(style)) for text, style, _ in strip], strip.cell_length)
        for strip in strips
    ]


def render_line(widget: Widget, content: Content, width: int) -> Strip:
    """Render content as one line in the widget's style, ``width`` cells wide."""
    strips = render_strips(widget, content, width, 1)
    return strips[0] if strips else Strip.blank(width, widget.rich_style)


def _placeless(style: Style | None) -> Style | None:
    meta = {} if style is None else style.meta
    if style is None or _PLACE not in meta:
        return style
    del meta[_PLACE]
    plain = style.clear_meta_and_links()
    return plain + Style(meta=meta or None, link=style.link) if meta or style.link else plain
