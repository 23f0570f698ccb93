"""Widgets that paint lines of text, and only where these changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from rich.segment import Segment
from rich.style import Style
from textual.content import Content
from textual.geometry import Region, Size
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.visual import Visual
from textual.widget import Widget
from textual.widgets import Static

_PLACE = "offset"


Draw: TypeAlias = Callable[[int, int], Sequence[Content]]
"""Returns the lines for so many cells and rows; lines beyond the last row are not shown."""
_ALL_ROWS = 10_000
"""More rows than any drawing has."""


class Drawing(Widget):
    """Lines that a function draws for the size of the widget; only lines that changed are painted again.

    It fills its container, or is as high as its lines (``height: auto``).
    """

    DEFAULT_CSS = """
    Drawing {
        height: 1fr;
        text-wrap: nowrap;
        text-overflow: ellipsis;
        &.graph {
            min-height: 4;
        }
    }
    """

    def __init__(
        self, draw: Draw = lambda width, height: (), *, id: str | None = None, classes: str | None = None
    ) -> None:
        super().__init__(id=id, classes=classes)
        self._draw = draw
        self._row_count = 0
        """Lines at the last layout, of a drawing as high as its lines."""
        self._strips: list[Strip] = []
        self._drawn_for: object = None

    def show(self, draw: Draw) -> None:
        """Draw by another function; an equal ``partial`` costs nothing."""
        if _parts(draw) != _parts(self._draw):
            self._draw = draw
            self.redraw()

    def redraw(self) -> None:
        """Draw again, and repaint the lines that differ, which costs half of what painting all does."""
        if not self.is_mounted:
            return
        height, width = self.styles.height, self.size.width
        is_as_high_as_lines = height is not None and height.is_auto and width
        if is_as_high_as_lines and len(self._draw(width, _ALL_ROWS)) != self._row_count:
            self.refresh(layout=True)
        if self._drawn_for != self._conditions():
            # Never drawn, or another size or theme: everything is painted anyway.
            self.refresh()
            return
        before, self._strips = self._strips, self._drawn()
        lines = enumerate(zip(before, self._strips, strict=True))
        if changed := [Region(0, y, self.size.width, 1) for y, (old, new) in lines if old != new]:
            self.refresh(*changed)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        self._row_count = len(self._draw(width, _ALL_ROWS))
        return self._row_count

    def render_line(self, y: int) -> Strip:
        conditions = self._conditions()
        if self._drawn_for != conditions:
            self._strips = self._drawn()
            self._drawn_for = conditions
        return self._strips[y] if y < len(self._strips) else Strip.blank(self.size.width)

    def notify_style_update(self) -> None:
        self._drawn_for = None
        super().notify_style_update()

    def _conditions(self) -> object:
        return (self.size, self.app.theme, self.visual_style)

    def _drawn(self) -> list[Strip]:
        width, height = self.size
        if not width or not height:
            return []
        lines = list(self._draw(width, height))[:height]
        lines += [Content("")] * (height - len(lines))
        return render_strips(self, Content("\n").join(lines), width, height)


def _parts(draw: Draw) -> object:
    """What two equal drawings have in common: the function and its arguments."""
    return (draw.func, draw.args, draw.keywords) if isinstance(draw, partial) else draw


def wrapped(lines: Sequence[Content], width: int, height: int) -> list[Content]:
    """Return the lines with long ones going on in the next, indented; the last says if there is no room."""
    shown: list[Content] = []
    for line in lines:
        first, *rest = line.wrap(max(1, width - 2)) or [Content("")]
        shown += [first, *(Content("  ") + piece for piece in rest)]
    if len(shown) > height > 0:
        shown[height - 1] = Content.styled("… the rest is in the tabs", "dim")
    return shown


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


def update_if_changed(static: Static, content: Content) -> None:
    """Show ``content``, with no repaint or layout that is not needed."""
    before = static.content
    # Equal text can differ in its colors.
    if isinstance(before, Content) and before.is_same(content):
        return
    width = static.content_size.width
    same_height = isinstance(before, Content) and _lines(before, width) == _lines(content, width)
    static.update(content, layout=not same_height)


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


def _lines(content: Content, width: int) -> list[int]:
    """Return the rows that each line takes."""
    lines = content.split("\n") if width else []
    return [len(line.wrap(width)) if line.cell_length > width else 1 for line in lines]
