"""Asks before something is done: yes or no."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from qlora_tui.tui.key_names import dialog_keys

CHECK_INTERVAL_S = 1.0
_YES = Binding("y", "dismiss(True)", "Yes")
_ENTER = Binding("enter", "confirm", "Yes")
_NO = Binding("n,escape", "dismiss(False)", "No")


class ConfirmScreen(ModalScreen[bool]):
    """Returns True for yes. Esc is no; Enter is yes only if ``harmless``."""

    CSS_PATH = "modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [_YES, _ENTER, _NO]

    def __init__(
        self,
        title: str,
        text: str,
        yes: str = "Yes",
        no: str = "No",
        *,
        harmless: bool = False,
        is_outdated: Callable[[], bool] | None = None,
    ) -> None:
        """``is_outdated``: called every second in a thread; once it is true, the question closes as no."""
        super().__init__()
        self._is_outdated = is_outdated
        self._title = title
        self._text = text
        self._yes = yes
        self._no = no
        self._harmless = harmless

    def on_mount(self) -> None:
        if self._is_outdated is not None:
            self.set_interval(CHECK_INTERVAL_S, self._check_outdated)

    @work(exclusive=True)
    async def _check_outdated(self) -> None:
        if self._is_outdated is not None and await asyncio.to_thread(self._is_outdated):
            self.dismiss(False)

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = self._title
            yes = replace(_ENTER if self._harmless else _YES, description=self._yes)
            dialog.border_subtitle = dialog_keys([yes, replace(_NO, description=self._no)])
            yield Static(self._text, markup=False)

    def action_confirm(self) -> None:
        """Answer yes by Enter, if nothing can be lost."""
        if self._harmless:
            self.dismiss(True)
