"""The layout of a column of panels, and of the parts of a panel: which of them get or give up rows."""

from __future__ import annotations

from textual.geometry import Region, Size
from textual.layout import ArrangeResult, WidgetPlacement
from textual.layouts.vertical import VerticalLayout
from textual.widget import Widget

from qlora_tui.tui.textual_compat import add_layout

_LEAST_ROWS = 3
"""Minimum number of rows of a widget that gives up rows, in addition to its border and padding."""


class ColumnLayout(VerticalLayout):
    """A vertical layout that cuts no widget while there are free rows, and pushes no widget out of view while
    another can be cut.

    Each widget with ``height: auto`` gets as many rows as its content has. The remaining rows go to the
    widgets with a height in ``fr``, such as a graph. If the rows do not suffice, widgets that scroll are cut,
    the highest first, so that everything below them stays in view.
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
        if size.height <= 0 or excess <= 0:
            return placements
        heights = {at: placements[at].region.height for at in flowing if _can_scroll(placements[at].widget)}
        least = {at: _LEAST_ROWS + placements[at].widget.gutter.height for at in heights}
        while excess > 0 and (higher := [at for at in heights if heights[at] > least[at]]):
            heights[max(higher, key=heights.__getitem__)] -= 1
            excess -= 1
        moved = 0
        for at in flowing:
            each, before = placements[at], placements[at].region
            region = Region(before.x, before.y - moved, before.width, heights.get(at, before.height))
            placements[at] = WidgetPlacement(region, each.offset, each.margin, each.widget, each.order)
            moved += before.height - region.height
        return placements


def _can_scroll(widget: Widget) -> bool:
    """Return whether a widget, or a part of it that is shown, scrolls if it has fewer rows than lines."""
    return widget.display and (
        widget.styles.overflow_y in ("auto", "scroll") or any(map(_can_scroll, widget.children))
    )


add_layout(ColumnLayout)
