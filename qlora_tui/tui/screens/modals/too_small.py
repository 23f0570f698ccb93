"""Shown while the window is too small."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.events import Resize
from textual.geometry import Size
from textual.screen import ModalScreen
from textual.widgets import Static

from qlora_tui.tui.key_names import dialog_keys

MIN_SIZE = Size(80, 24)


def is_too_small(size: Size) -> bool:
    """Whether parts of the screens would be cut off."""
    return size.width < MIN_SIZE.width or size.height < MIN_SIZE.height


class TooSmallScreen(ModalScreen[None]):
    """Covers any screen; the app closes it when the window is large enough."""

    CSS_PATH = "modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter,escape", "dismiss", "Show it cut off")]

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = "This window is too small"
            yield Static(markup=False)
            # On a line that wraps: the border of a narrow window would cut it.
            yield Static(dialog_keys(self.BINDINGS), markup=False, classes="fix")

    def on_resize(self, event: Resize) -> None:
        """Show the size."""
        size = event.size
        self.query(Static).first().update(
            f"It is {size.width}×{size.height}; the screens need {MIN_SIZE.width}×{MIN_SIZE.height}. "
            "Enlarge the window or reduce the font size. Runs continue either way."
        )
