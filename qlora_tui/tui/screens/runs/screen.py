"""Runs: the queue, every run so far, and what can be done with one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import ClassVar

from textual import work
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Input, Static

from qlora_tui.formatting import format_percent
from qlora_tui.runs.exports import read_exports
from qlora_tui.runs.run_summary import RunSummary, SummaryCache
from qlora_tui.tui.commands import Command
from qlora_tui.tui.key_names import name_keys
from qlora_tui.tui.screens.runs.actions import RunActions
from qlora_tui.tui.screens.runs.commands import COMMANDS
from qlora_tui.tui.screens.runs.export_choices import export_line
from qlora_tui.tui.screens.runs.run_table import RunTable
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.widgets.static_update import update_if_changed
from qlora_tui.tui.widgets.text_field import TextField

_NO_RUNS = "No runs yet. Press {go.train} to launch one."
_READ_BUDGET_S = 0.3
"""A look takes about so long at most; hundreds of runs are read in several."""


class RunsScreen(RunActions):
    """A list with the queue on top."""

    MODE = "runs"
    CSS_PATH = "runs.tcss"
    HELP_TEXT = (
        "Queued runs are listed first, in order; then the active one, then the newest. best is the lowest "
        "validation loss, or with * the last training loss if none was measured. exact is the share of "
        "short answers that were exactly right in the last evaluation. The small curve is scaled from the "
        "lowest to the highest loss of its run."
    )
    SCREEN_COMMANDS: ClassVar[tuple[Command, ...]] = COMMANDS

    def __init__(self) -> None:
        super().__init__()
        self._summaries = SummaryCache()
        self._filter = ""
        self._reading = False
        self._footer_key: object = None

    def compose_body(self) -> Iterable[Widget]:
        yield TextField(placeholder="Part of a name, model, setting or state", id="runs-filter", compact=True)
        yield RunTable()
        yield Static(name_keys(_NO_RUNS), id="runs-empty", markup=False)
        yield Static(id="run-detail")

    def on_mount(self) -> None:
        self.query_one(RunTable).focus()

    @property
    def current(self) -> RunSummary | None:
        """The run under the cursor."""
        return self.query_one(RunTable).current

    def show_system_status(self, system_status: SystemStatus) -> None:
        self.refresh_runs()
        self._show_detail()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in ("withdraw", "move"):
            return self.current is not None and self._is_waiting(self.current)
        if action == "restore":
            # If nothing was deleted, ``u`` undoes a change of the recipe as on other screens.
            return bool(self.trash)
        return super().check_action(action, parameters)

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter the list while typing."""
        self._filter = event.value.casefold()
        self.show_listing()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Back to the list."""
        self.set_class(bool(event.value), "-filtering")
        self.query_one(RunTable).focus()

    def key_escape(self) -> None:
        """Show all runs again."""
        self.query_one("#runs-filter", Input).value = ""
        self.remove_class("-filtering")
        self.query_one(RunTable).focus()

    def on_run_table_moved(self) -> None:
        """Say more of the run under the cursor."""
        self._show_detail()
        self._refresh_footer()

    async def on_run_table_opened(self) -> None:
        """Open the run that was clicked, as the key does."""
        await self.action_open()

    def on_screen_resume(self) -> None:
        self.query_one(RunTable).start_at_top()

    def refresh_runs(self) -> None:
        """Read the runs again, unless that is being done."""
        if not self._reading and self.is_current:
            self._reading = True
            self._read_runs()

    @work(group="poll")
    async def _read_runs(self) -> None:
        try:
            listing = await asyncio.to_thread(self._summaries.read_all, _READ_BUDGET_S)
        finally:
            self._reading = False
        before, self.listing = self.listing, listing
        names = {summary.id for summary in listing.summaries}
        self.marked = tuple(name for name in self.marked if name in names)
        if listing != before or self.query_one(RunTable).starts_at_top:
            self.show_listing()
        if not listing.complete:
            self.refresh_runs()

    def show_listing(self) -> None:
        """Show what was read, filtered."""
        if self.listing is None:
            return
        rows = [row for row in self.listing.summaries if self._filter in _search_text(row)]
        self.set_class(not rows, "-empty")
        if not rows:
            text = "No run matches. Press Esc to show all." if self.listing.summaries else _NO_RUNS
            self.query_one("#runs-empty", Static).update(name_keys(text))
        self.query_one(RunTable).show(rows, self.listing.waiting, self.marked)
        self._show_detail()
        self._refresh_footer()

    def _refresh_footer(self) -> None:
        """Change the footer where other keys mean something than before."""
        current = self.current
        waits = current is not None and self._is_waiting(current)
        if waits != self._footer_key:
            self._footer_key = waits
            self.refresh_bindings()

    def _show_detail(self) -> None:
        summary = self.current
        lines = [Content(""), Content("")]
        if summary is not None:
            facts = [part for part in (summary.model, summary.settings) if part]
            if summary.accuracy is not None:
                facts.append(f"{format_percent(summary.accuracy)} of short answers exactly right")
            if summary.energy:
                facts.append(summary.energy)
            name = summary.name if summary.name == summary.id else f"{summary.name}  ({summary.id})"
            lines[0] = Content.assemble((name, "bold"), f"  {' · '.join(facts)}")
            detail = Content.styled(summary.status.detail.replace("\n", " "), "dim")
            wrong = Content.styled(f"{summary.defect.sentence} " if summary.defect else "", "$error")
            lines[1] = wrong + detail
            if exports := read_exports(summary.run):
                lines[1] += Content.assemble(("  Export: ", "dim"), export_line(exports[0]))
        update_if_changed(self.query_one("#run-detail", Static), Content("\n").join(lines))

    def _is_waiting(self, summary: RunSummary) -> bool:
        return self.listing is not None and summary.id in self.listing.waiting


def _search_text(summary: RunSummary) -> str:
    words = (summary.name, summary.id, summary.model, summary.settings, summary.status.state)
    return " ".join(words).casefold()
