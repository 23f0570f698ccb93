"""Widgets that paint lines of text, and only where these changed."""

from __future__ import annotations

from abc import abstractmethod

from rich.segment import Segment
from rich.style import Style
from textual.content import Content
from textual.geometry import Region
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.visual import Visual
from textual.widget import Widget
from textual.widgets import Static

from qlora_tui.tui.render.charts import Axis, Plot, plot

_PLACE = "offset"


class DiffWidget(Widget):
    """Subclasses give :meth:`draw`, and call :meth:`redraw` when what they show may have changed."""

    DEFAULT_CSS = """
    DiffWidget {
        text-wrap: nowrap;
        text-overflow: ellipsis;
    }
    """

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._strips: list[Strip] = []
        self._drawn_for: object = None

    @abstractmethod
    def draw(self, width: int, height: int) -> list[Content]:
        """The lines as they should be now, at most ``height`` of them."""

    def redraw(self) -> None:
        """Draw again, and repaint the lines that differ, which costs half of what painting all does."""
        if not self.is_mounted:
            return
        if self._drawn_for != self._conditions():
            # Never drawn, or another size or theme: everything is painted anyway.
            self.refresh()
            return
        before, self._strips = self._strips, self._drawn()
        lines = enumerate(zip(before, self._strips, strict=True))
        if changed := [Region(0, y, self.size.width, 1) for y, (old, new) in lines if old != new]:
            self.refresh(*changed)

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
        lines = self.draw(width, height)[:height]
        lines += [Content("")] * (height - len(lines))
        return render_strips(self, Content("\n").join(lines), width, height)


class Graph(DiffWidget):
    """Shows a :class:`Plot`."""

    DEFAULT_CSS = """
    Graph {
        height: 1fr;
        min-height: 4;
    }
    """

    def __init__(self, empty: str = "", *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._plot = Plot(Axis(0, 1), Axis(0, 1), empty=empty)

    def show(self, what: Plot) -> None:
        """Draw this; repaints nothing where it looks the same."""
        if what != self._plot:
            self._plot = what
            self.redraw()

    def draw(self, width: int, height: int) -> list[Content]:
        return plot(self._plot, width, height)


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
