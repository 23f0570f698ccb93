"""The last line of a screen: as many of its keys as fit, then always those of the palette and of help.

Textual's Footer mounts a widget for each key at every change of focus, and its style caches keep them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

from textual.app import App
from textual.binding import ActiveBinding
from textual.content import Content
from textual.events import Click
from textual.screen import Screen

from qlora_tui.tui.key_names import short_key
from qlora_tui.tui.widgets.diff_widget import DiffWidget

_MARGIN = 1
_GAP, _NARROW_GAP = 3, 1
"""Cells between two keys, where all fit and where not."""
_Items: TypeAlias = list[tuple[Content, ActiveBinding]]


class CommandFooter(DiffWidget):
    """``s Stop   z Pause   ^P Palette``; keys that do not fit are in the help. A click presses a key."""

    DEFAULT_CSS = """
    CommandFooter {
        dock: bottom;
        height: 1;
        background: $panel;
    }
    """

    def __init__(self, also: Collection[str] = ()) -> None:
        """``also``: ids of commands of the app that are shown after the screen's own."""
        super().__init__()
        self._also = also
        self._screen_bindings: list[ActiveBinding] = []
        self._app_bindings: list[ActiveBinding] = []

    def on_mount(self) -> None:
        self.screen.bindings_updated_signal.subscribe(self, self._bindings_changed, immediate=True)

    def on_unmount(self) -> None:
        self.screen.bindings_updated_signal.unsubscribe(self)

    def _bindings_changed(self, screen: Screen[object]) -> None:
        shown: dict[str, ActiveBinding] = {}
        for active in screen.active_bindings.values():
            if active.binding.show or active.binding.id in self._also:
                shown.setdefault(active.binding.action, active)
        own = [active for active in shown.values() if not isinstance(active.node, App)]
        of_app = [active for active in shown.values() if isinstance(active.node, App)]
        also = [active for active in of_app if active.binding.id in self._also]
        self._screen_bindings = [*own, *also]
        self._app_bindings = [active for active in of_app if active not in also]
        self.redraw()

    def draw(self, width: int, height: int) -> list[Content]:
        own, of_app, gap = self._fitting_items(width)
        left, right = (Content(" " * gap).join(item for item, _ in items) for items in (own, of_app))
        space = width - 2 * _MARGIN - left.cell_length - right.cell_length
        return [Content.assemble(" " * _MARGIN, left, " " * max(gap, space), right)]

    def on_click(self, event: Click) -> None:
        own, of_app, gap = self._fitting_items(self.size.width)
        width_of_app = sum(item.cell_length + gap for item, _ in of_app) - gap
        for items, x in ((own, _MARGIN), (of_app, self.size.width - _MARGIN - width_of_app)):
            for item, active in items:
                if x <= event.x < x + item.cell_length:
                    self.app.simulate_key(active.binding.key)
                    return
                x += item.cell_length + gap

    def _fitting_items(self, width: int) -> tuple[_Items, _Items, int]:
        """Items of the screen and of the app that fit ``width``, and the cells between two.

        The gap becomes narrow before a key is dropped; the screen's last keys are dropped first.
        """
        own = [(self._item(active), active) for active in self._screen_bindings]
        of_app = [(self._item(active), active) for active in self._app_bindings]
        room = width - 2 * _MARGIN
        for gap in (_GAP, _NARROW_GAP):
            if sum(item.cell_length + gap for item, _ in (*own, *of_app)) - gap <= room:
                return own, of_app, gap
        while own and sum(item.cell_length + _NARROW_GAP for item, _ in (*own, *of_app)) > room + _NARROW_GAP:
            own.pop()
        return own, of_app, _NARROW_GAP

    def _item(self, active: ActiveBinding) -> Content:
        dim = "" if active.enabled else " dim"
        return Content.assemble(
            (short_key(active.binding.key), f"$footer-key-foreground bold{dim}"),
            (f" {active.binding.description}", f"$footer-description-foreground{dim}"),
        )
