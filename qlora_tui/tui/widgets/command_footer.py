"""The last line of a screen: as many of its keys as fit, then always those of the palette and of help.

Textual's Footer mounts a widget for each key at every change of focus, and its style caches keep them.
"""

from __future__ import annotations

from collections.abc import Collection

from textual.app import App
from textual.binding import ActiveBinding
from textual.content import Content
from textual.events import Click
from textual.screen import Screen

from qlora_tui.tui.widgets.diff_widget import DiffWidget


class CommandFooter(DiffWidget):
    """``s Stop z Pause ^p Palette ? Help``. Keys that do not fit are in the help. A click presses a key."""

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
        return [Content(" ").join(item for item, _ in self._fitting_items(width))]

    def on_click(self, event: Click) -> None:
        x = event.x
        for item, active in self._fitting_items(self.size.width):
            if 0 <= x < item.cell_length:
                self.app.simulate_key(active.binding.key)
                return
            x -= item.cell_length + 1

    def _fitting_items(self, width: int) -> list[tuple[Content, ActiveBinding]]:
        """The items that fit ``width``; the screen's last keys are dropped first."""
        items = [(self._item(active), active) for active in (*self._screen_bindings, *self._app_bindings)]
        own = len(self._screen_bindings)
        while own and sum(item.cell_length + 1 for item, _ in items) > width + 1:
            own -= 1
            del items[own]
        return items

    def _item(self, active: ActiveBinding) -> Content:
        dim = "" if active.enabled else " dim"
        return Content.assemble(
            (self.app.get_key_display(active.binding), f"$footer-key-foreground bold{dim}"),
            (f" {active.binding.description}", f"$footer-description-foreground{dim}"),
        )
