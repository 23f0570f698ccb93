"""The layouts of panels. The vertical layout, which is also used inside panels, decides which widgets get
free rows and which widgets lose rows. The horizontal layout makes panels end in the same row.
"""

from __future__ import annotations

from itertools import compress

from textual.geometry import Region, Size
from textual.layout import ArrangeResult, WidgetPlacement
from textual.layouts.horizontal import HorizontalLayout
from textual.layouts.vertical import VerticalLayout
from textual.widget import Widget

from qlora_tui.tui.textual_compat import add_layout
from qlora_tui.tui.widgets.controls import holds_focus

_LEAST_ROWS = 3
"""Minimum number of rows of a widget that is cut, in addition to its border and padding."""
_LEAST_OF_PANEL = 2
"""Minimum number of rows of a panel at the end of a column, in addition to its border and padding."""


class ColumnLayout(VerticalLayout):
    """A vertical layout that cuts a widget only if there are no free rows, and pushes a widget out of view
    only if no other widget can be cut.

    Each widget with ``height: auto`` gets as many rows as its content has. The remaining rows go to the
    widgets with a height in ``fr``, such as a graph. If there are too few rows, widgets that scroll are cut,
    the tallest first, so that everything below them stays in view.

    If rows remain and no widget takes them, they go to the last panel that is not empty, so that the surfaces
    of columns next to each other end in the same row.

    If there are still too few rows, the last panels are cut so that their margin stays in view. A panel that
    could not show its title and two rows is left out, and the widget above it gets its rows.

    In a panel, a widget that does not fit ends where the panel ends, so that it can say how much is hidden.
    """

    name = "column"

    def arrange(
        self, parent: Widget, children: list[Widget], size: Size, greedy: bool = True
    ) -> ArrangeResult:
        placements = list(super().arrange(parent, children, size, greedy))
        flowing = [at for at, each in enumerate(placements) if not each.overlay and not each.absolute]
        excess = max(
            (placements[at].region.bottom + placements[at].margin.bottom for at in flowing), default=0
        )
        excess -= size.height
        if size.height <= 0:
            return placements
        if excess > 0:
            self._cut(placements, flowing, excess)
        elif excess < 0 and not (parent.styles.height is not None and parent.styles.height.is_auto):
            self._stretch(placements, flowing, -excess)
        self._leave_out(placements, flowing, size.height)
        if parent.border_title is not None:
            for at in flowing:
                x, y, width, height = placements[at].region
                region = Region(x, y, width, max(0, min(height, size.height - y)))
                placements[at] = placements[at]._replace(region=region)
        return placements

    @staticmethod
    def _cut(placements: list[WidgetPlacement], flowing: list[int], excess: int) -> None:
        """Cut scrolling widgets by ``excess`` rows in total, and move the widgets below them up. ``flowing``:
        indices of the placements that are stacked vertically.
        """
        heights = {at: placements[at].region.height for at in flowing if _can_scroll(placements[at].widget)}
        least = {at: _LEAST_ROWS + placements[at].widget.gutter.height for at in heights}
        while excess > 0 and (higher := [at for at in heights if heights[at] > least[at]]):
            heights[max(higher, key=heights.__getitem__)] -= 1
            excess -= 1
        moved = 0
        for at in flowing:
            each, before = placements[at], placements[at].region
            region = Region(before.x, before.y - moved, before.width, heights.get(at, before.height))
            placements[at] = each._replace(region=region)
            moved += before.height - region.height

    @staticmethod
    def _stretch(placements: list[WidgetPlacement], flowing: list[int], rows: int) -> None:
        """Give ``rows`` more rows to the last panel that has content, and move the widgets below it down.
        ``flowing``: indices of the placements that are stacked vertically. Without such a panel, nothing
        changes.
        """
        panels = [at for at in flowing if placements[at].widget.border_title is not None]
        filled = [at for at in panels if not placements[at].widget.has_class("-empty")]
        if not filled or flowing[-1] not in panels:
            return
        for at in flowing[flowing.index(filled[-1]) :]:
            x, y, width, height = placements[at].region
            is_last = at == filled[-1]
            region = Region(x, y, width, height + rows) if is_last else Region(x, y + rows, width, height)
            placements[at] = placements[at]._replace(region=region)

    @staticmethod
    def _leave_out(placements: list[WidgetPlacement], flowing: list[int], height: int) -> None:
        """Cut the last panels so that they end above row ``height``. Leave out panels that would have too few
        rows. ``flowing``: indices of the placements that are stacked vertically.
        """
        gap, is_above_gap = 0, False
        for at in reversed(flowing):
            each = placements[at]
            gap = max(gap, each.margin.bottom)
            widget, rows = each.widget, height - gap - each.region.y
            takes_rest = widget.styles.height is not None and widget.styles.height.is_fraction
            if not (is_above_gap or takes_rest or rows < each.region.height):
                return
            if widget.border_title is None or holds_focus(widget):
                return
            x, y, width, before = each.region
            rows = rows if is_above_gap else min(rows, before)
            has_room = rows >= _LEAST_OF_PANEL + widget.gutter.height
            placements[at] = each._replace(region=Region(x, y, width, rows if has_room else 0))
            if has_room:
                return
            is_above_gap = True


def _can_scroll(widget: Widget) -> bool:
    """Return whether a widget or one of its visible descendants scrolls if its content does not fit."""
    return widget.display and (
        widget.styles.overflow_y in ("auto", "scroll") or any(map(_can_scroll, widget.children))
    )


class RowLayout(HorizontalLayout):
    """A horizontal layout that extends all its widgets to the bottom of the tallest one."""

    name = "row"

    def arrange(
        self, parent: Widget, children: list[Widget], size: Size, greedy: bool = True
    ) -> ArrangeResult:
        placements = super().arrange(parent, children, size, greedy)
        is_flowing = [not each.overlay and not each.absolute for each in placements]
        bottom = max((each.region.bottom for each in compress(placements, is_flowing)), default=0)
        return [
            each._replace(region=each.region._replace(height=bottom - each.region.y)) if flows else each
            for each, flows in zip(placements, is_flowing, strict=True)
        ]


add_layout(ColumnLayout)
add_layout(RowLayout)
