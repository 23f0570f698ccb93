"""An error as a modal: what happened, why, and what to do."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen
from textual.widgets import Static

from qlora_tui.errors import UserError
from qlora_tui.formatting import abbreviate_home
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.widgets.vi_scroll import ViScroll


class ErrorScreen(ModalScreen[None]):
    """Closed by any of Escape, Enter and q."""

    CSS_PATH = "modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,q", "dismiss", "Close")]

    def __init__(self, problem: UserError) -> None:
        super().__init__()
        self._problem = problem

    def compose(self) -> ComposeResult:
        with ViScroll(classes="dialog") as dialog:
            dialog.border_title = self._problem.title
            dialog.border_subtitle = dialog_keys(self.BINDINGS)
            yield Static(abbreviate_home(self._problem.what), markup=False)
            if self._problem.why:
                yield Static(abbreviate_home(self._problem.why), markup=False, classes="muted")
            if self._problem.fix:
                yield Static(f"▸ {abbreviate_home(self._problem.fix)}", markup=False, classes="fix")
