"""Updates a Static only if its text differs, and lays it out only if its height changes."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Static


def update_if_changed(static: Static, content: Content) -> None:
    """Show ``content``, with no repaint or layout that is not needed."""
    before = static.content
    # Equal text can differ in its colors.
    if isinstance(before, Content) and before.plain == content.plain and before.spans == content.spans:
        return
    width = static.content_size.width
    same_height = isinstance(before, Content) and _lines(before, width) == _lines(content, width)
    static.update(content, layout=not same_height)


def _lines(content: Content, width: int) -> list[int]:
    """Return the rows that each line takes."""
    lines = content.split("\n") if width else []
    return [len(line.wrap(width)) if line.cell_length > width else 1 for line in lines]
