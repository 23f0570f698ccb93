"""The base of widgets that draw their own lines: one list, one way to scroll."""

from __future__ import annotations

from textual.scroll_view import ScrollView


class LineView(ScrollView, can_focus=True):
    """Lines that are cut at the right edge and scroll up and down; a subclass renders them."""

    DEFAULT_CSS = """
    LineView {
        height: 1fr;
        overflow-x: hidden;
        scrollbar-size-vertical: 1;
        text-wrap: nowrap;
        text-overflow: ellipsis;
    }
    """
