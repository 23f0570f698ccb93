"""A widget made of lines of text that repaints only the cells that changed.

A live screen repaints once a second over a slow link: unchanged cells must not be sent again. Graphs,
charts and panels of the live screen are all of this kind.
"""

from __future__ import annotations

from abc import abstractmethod

from rich.segment import Segment
from textual.content import Content
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from qlora_tui.tui.render.strip_rendering import render_strips


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
        """Draw again, and repaint the cells that differ."""
        if not self.is_mounted:
            return
        if self._drawn_for != self._conditions():
            # Never drawn, or another size or theme: everything is painted anyway.
            self.refresh()
            return
        before = self._strips
        self._strips = self._drawn()
        regions = []
        for y, (old, new) in enumerate(zip(before, self._strips, strict=True)):
            start, end = changed_cells(old, new)
            if end > start:
                regions.append(Region(start, y, end - start, 1))
        if regions:
            self.refresh(*regions)

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


def changed_cells(old: Strip, new: Strip) -> tuple[int, int]:
    """From the first to behind the last cell that differs; the same number twice where none does."""
    before, after = list(old), list(new)
    if before == after:
        return 0, 0
    if old.cell_length != new.cell_length:
        return 0, max(old.cell_length, new.cell_length)
    same_left = _same_cells(before, after)
    same_right = _same_cells(before[::-1], after[::-1], from_right=True)
    return same_left, max(same_left, new.cell_length - same_right)


def _same_cells(one: list[Segment], other: list[Segment], *, from_right: bool = False) -> int:
    cells = 0
    for a, b in zip(one, other, strict=False):
        if a == b:
            cells += a.cell_length
            continue
        # Inside a run of one style, only where every character is one cell wide.
        if a.style == b.style and a.cell_length == len(a.text) and b.cell_length == len(b.text):
            pairs = zip(a.text[::-1], b.text[::-1]) if from_right else zip(a.text, b.text)  # noqa: B905
            for x, y in pairs:
                if x != y:
                    break
                cells += 1
        break
    return cells
