"""The checks of ``qlora-tui doctor``, in a modal."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from qlora_tui.formatting import abbreviate_home
from qlora_tui.runs.machine_checks import Check, check_libraries, check_system
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.screens.base import CancelsWorkersFirst
from qlora_tui.tui.screens.train.launch_pane import SIGNS
from qlora_tui.tui.widgets.controls import ViScroll

_SHOWN_FIRST = ("error", "warning", "note", "ok")
_TESTING = "Testing the libraries on a few real weights. This takes some seconds…"


class MachineReportScreen(ModalScreen[None], CancelsWorkersFirst):
    """The answer on the first line, then what is wrong, then the rest.

    The quick checks are shown at once, those of the libraries when their process has ended.
    """

    CSS_PATH = "modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "dismiss", "Close")]

    def compose(self) -> ComposeResult:
        with ViScroll(classes="dialog") as dialog:
            dialog.border_title = "Can this machine train?"
            dialog.border_subtitle = dialog_keys(self.BINDINGS)
            yield Static("Checking…", id="machine-report")

    def on_mount(self) -> None:
        self.query_one(ViScroll).focus()
        self._check()

    @work
    async def _check(self) -> None:
        checks = await asyncio.to_thread(check_system)
        self._show(checks, Content.styled(_TESTING, "dim"))
        checks += await asyncio.to_thread(check_libraries)
        if any(check.outcome == "error" for check in checks):
            conclusion = Content.styled("Not ready to train: fix the errors below.", "bold $error")
        else:
            conclusion = Content.styled("Ready to train.", "bold $success")
        self._show(checks, conclusion)

    def _show(self, checks: Sequence[Check], conclusion: Content) -> None:
        lines = [conclusion, Content("")]
        for check in sorted(checks, key=lambda check: _SHOWN_FIRST.index(check.outcome)):
            sign, style = SIGNS[check.outcome]
            lines.append(
                Content.assemble(
                    (f"{sign:<10}", style), (f"{check.label}: ", "bold"), abbreviate_home(check.text)
                )
            )
            if check.fix:
                lines.append(Content.styled(f"  ▸ {abbreviate_home(check.fix)}", "$accent"))
        self.query_one("#machine-report", Static).update(Content("\n").join(lines))
