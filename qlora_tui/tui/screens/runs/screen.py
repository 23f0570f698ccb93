"""The Runs screen: the queue, all earlier runs, and the commands for a run."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from textual import work
from textual.actions import SkipAction
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Input, Static

from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_bytes, pluralize
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import actions as run_actions
from qlora_tui.runs import run_queue
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.main_settings import MainSetting, setting_words, shared_settings
from qlora_tui.runs.run_summary import Listing, RunSummary, SummaryCache
from qlora_tui.runs.status import ACTIVE, RESUMABLE
from qlora_tui.tui import clock
from qlora_tui.tui.key_names import highlight_keys, key_name, name_keys
from qlora_tui.tui.render.loss import summary_lines
from qlora_tui.tui.screens.modals.dialogs import ConfirmScreen, TextPromptScreen, write_or_ask
from qlora_tui.tui.screens.presets.screen import save_as
from qlora_tui.tui.screens.runs.compare import MAX_COMPARED, CompareScreen
from qlora_tui.tui.screens.runs.run_list import (
    RunFiles,
    RunTable,
    can_be_used,
    detail_lines,
    ending,
    files_lines,
    log_lines,
    preview_title,
    rates_have_exponents,
    result_lines,
    run_keys,
    settings_lines,
)
from qlora_tui.tui.screens.runs.sweep import show_sweeps
from qlora_tui.tui.screens.runs_and_train_commands import RunCommands
from qlora_tui.tui.screens.train.screen import prepare_run, show_run
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.threads import SLOW_ACTIONS, act_on_run
from qlora_tui.tui.widgets.controls import Drawing, Lines, Panel, TextField

T = TypeVar("T")
_NO_RUNS = "No runs yet. Press {go.train} to launch one."
_LIST_KEYS = (("runs.sort", "sort"), ("runs.filter", "filter"))
_FILES_INTERVAL_S = 5.0
"""Minimum time between two reads of the folder of the run under the cursor, in seconds."""
_READ_BUDGET_S = 0.3
"""Approximate time limit of a read, in seconds. Listing hundreds of runs takes several reads."""


@dataclass(frozen=True)
class Order:
    """A sort order, with its label in the title of the list."""

    label: str
    key: Callable[[RunSummary], Any] | None
    """Sort key of the runs that have ended; None to keep the order of the listing."""


def _best_loss(summary: RunSummary) -> float:
    loss = summary.loss if summary.best is None else summary.best[0]
    return math.inf if loss is None or math.isnan(loss) else loss


ORDERS = (
    Order("newest first", None),
    Order("lowest loss first", _best_loss),
    Order("by name", lambda summary: summary.name.casefold()),
    Order("by model and settings", lambda summary: (summary.model.casefold(), summary.settings)),
    Order("longest training first", lambda summary: -(summary.seconds or 0.0)),
)


class RunsScreen(RunCommands):
    """A list with active and queued runs on top, and a preview of the run under the cursor."""

    MODE = "runs"
    ANSWERS_COMMAND = "runs.evaluate"
    CSS_PATH = "runs.tcss"

    def __init__(self) -> None:
        super().__init__()
        self.listing: Listing | None = None
        self.order = ORDERS[0]
        self.marked: tuple[str, ...] = ()
        """Ids of the runs selected for a comparison."""
        self._summaries = SummaryCache()
        self._filter = ""
        self._reading = False
        self._files: tuple[str, RunFiles] | None = None
        """Id of the run under the cursor, and what was read from the run's folder; None until the folder has
        been read.
        """
        self._files_read_at = 0.0
        self._files_reading = ""
        """Id of the run whose folder is being read; empty if no folder is being read."""
        self._footer_key: object = None
        self._shared: tuple[MainSetting, ...] = ()
        """The settings that all listed runs share."""
        self._has_exponents = False
        """Whether the list writes learning rates with exponents."""

    @property
    def help_state(self) -> str:
        return "empty" if self.listing is None or not self.listing.summaries else ""

    def compose_body(self) -> Iterable[Widget]:
        with Panel("Runs", keys=_LIST_KEYS, id="runs-panel"):
            yield TextField(
                placeholder="Part of a name, model, setting or state", id="runs-filter", compact=True
            )
            yield RunTable()
            yield Static(highlight_keys(name_keys(_NO_RUNS)), id="runs-empty", markup=False)
        with Horizontal(id="preview"):
            yield Panel(
                "Run",
                Lines(id="run-detail"),
                Drawing(id="run-graph", classes="graph"),
                id="run-panel",
            )
            with Vertical(id="preview-side"):
                yield Panel("Result", Lines(id="run-result"), id="result-panel")
                yield Panel("Settings", Lines(id="run-settings"), keys=(("runs.rerun", "rerun"),))
                yield Panel(
                    "Files",
                    Lines(id="run-files"),
                    keys=(("runs.copy", "copy command"), ("runs.folder", "open folder")),
                    id="files-panel",
                )
                yield Panel("Log", Drawing(id="run-log"), id="log-panel")

    def on_mount(self) -> None:
        self.query_one(RunTable).focus()

    @property
    def current(self) -> RunSummary | None:
        """The run under the cursor; None if the list is empty."""
        return self.query_one(RunTable).current

    @property
    def _selected(self) -> RunSummary:
        """The run under the cursor. Raises SkipAction if the list is empty."""
        if self.current is None:
            raise SkipAction
        return self.current

    @property
    def target_run(self) -> RunDir:
        return self._selected.run

    def show_system_status(self, system_status: SystemStatus) -> None:
        self.refresh_runs()
        self._show_detail()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "restore":
            # If no run was deleted, disable the action. Its key then undoes a change of the recipe, as on
            # other screens.
            return bool(self.app.deleted_runs)
        if action not in ("filter", "sort", "sweeps") and self.has_command(action):
            current = self.current
            return current is not None and self._works_on(current, action)
        return super().check_action(action, parameters)

    def _works_on(self, summary: RunSummary, action: str) -> bool:
        """Return whether an action is available for this run."""
        match action:
            case "withdraw":
                return summary.status.state == "queued"
            case "move":
                return self._is_waiting(summary)
            case "now":
                return summary.status.hold is not None and summary.status.hold.has_left
            case "resume":
                return summary.status.state in RESUMABLE
            case "chat" | "export" | "answers" | "card":
                return can_be_used(summary, self._known_files)
        return True

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show only the runs that match the text typed in the filter."""
        self._filter = event.value.casefold()
        self.show_listing()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Move the focus from the filter to the list, and hide the filter if it is empty."""
        self.set_class(bool(event.value), "-filtering")
        self.query_one(RunTable).focus()

    def key_escape(self) -> None:
        """Clear and hide the filter, and focus the list."""
        self.query_one("#runs-filter", Input).value = ""
        self.remove_class("-filtering")
        self.query_one(RunTable).focus()

    def on_resize(self) -> None:
        # The lines of the preview depend on the width of its panels.
        self.call_after_refresh(self._show_detail)

    def on_run_table_moved(self) -> None:
        """Show the preview of the run under the cursor."""
        self._show_detail()
        self._refresh_footer()

    async def on_run_table_opened(self) -> None:
        """Open the clicked run, as the command Open does."""
        await self.action_open()

    def on_screen_resume(self) -> None:
        self.query_one(RunTable).start_at_top()

    def refresh_runs(self) -> None:
        """Read the runs again, unless they are already being read or another screen is shown."""
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
        """Show those runs of the latest listing that match the filter."""
        if self.listing is None:
            return
        # Leave out deleted runs, which a listing from before the deletion still contains.
        summaries = [row for row in self.listing.summaries if row.id not in self.app.deleted_runs]
        matching = [row for row in summaries if self._filter in _search_text(row)]
        rows = in_order(matching, self.listing.waiting, self.order)
        any_unmeasured = any(row.best is None and row.loss is not None for row in rows)
        self._show_title(rows, len(summaries), any_unmeasured=any_unmeasured)
        self.set_class(not rows, "-empty")
        self.query_one("#runs-panel", Panel).show_keys(_LIST_KEYS if summaries else ())
        if not rows:
            text = "No run matches. Press Esc to show all." if summaries else _NO_RUNS
            self.query_one("#runs-empty", Static).update(highlight_keys(name_keys(text)))
        self.query_one(RunTable).show(rows, self.listing.waiting, self.marked)
        self._show_detail()
        self._refresh_footer()

    def _refresh_footer(self) -> None:
        """Refresh the footer if the keys for the run under the cursor have changed since the last call."""
        current = self.current
        key = (
            None
            if current is None
            else (current.status.state, self._is_waiting(current), can_be_used(current, self._known_files))
        )
        if key != self._footer_key:
            self._footer_key = key
            self.refresh_bindings()

    def _show_title(self, rows: Sequence[RunSummary], total: int, *, any_unmeasured: bool) -> None:
        shown = len(rows)
        number = pluralize(total, "run") if shown == total else f"{shown:,} of {pluralize(total, 'run')}"
        words = f" · {number}, {self.order.label}" if total else ""
        self._shared = shared_settings(row.settings for row in rows)
        self._has_exponents = rates_have_exponents(rows)
        if self._shared:
            words += f" · all {setting_words(self._shared)}"
        if any_unmeasured:
            words += " · * training loss, not validated"
        title = Content.assemble("Runs", (words, "not bold $text-muted"))
        self.query_one("#runs-panel", Panel).show_title(title)

    def _show_detail(self) -> None:
        summary = self.current
        if summary is None:
            return
        if self._files is not None and self._files[0] != summary.id:
            self._files = None
        is_old = self._files is None or time.monotonic() - self._files_read_at > _FILES_INTERVAL_S
        if is_old and self._files_reading != summary.id:
            self._files_read_at = time.monotonic()
            self._files_reading = summary.id
            self._read_files(summary)
        self._show_preview(summary)

    @work(group="preview", exclusive=True)
    async def _read_files(self, summary: RunSummary) -> None:
        try:
            files = await asyncio.to_thread(RunFiles.read, summary)
        finally:
            if self._files_reading == summary.id:
                self._files_reading = ""
        if self.current is not None and self.current.id == summary.id:
            self._files = (summary.id, files)
            self._show_preview(self.current)

    def _show_preview(self, summary: RunSummary) -> None:
        files = self._known_files
        self._refresh_footer()
        is_short = not self.query_one("#preview-side").display
        panel = self.query_one("#run-panel", Panel)
        panel.show_title(preview_title(summary))
        panel.show_keys(run_keys(summary, files))
        # Unless the answers have been compared, the text of the verdict already names the key.
        is_named = summary.verdict is not None and not summary.verdict.has_answers
        has_key = can_be_used(summary, files) and not is_named
        compare = (("runs.evaluate", "compare answers"),) if has_key else ()
        self.query_one("#result-panel", Panel).show_keys(compare)
        if is_short:
            detail = detail_lines(summary, files, self._shared)
        else:
            detail = ending(summary, files, beside_verdict=True)
        self._show("run-detail", detail)
        self.query_one("#run-detail").display = any(detail) or is_short
        self.query_one("#run-graph", Drawing).show(partial(summary_lines, summary))
        if is_short:
            return
        width = max(20, self.query_one("#run-result").content_size.width)
        self._show("run-result", result_lines(summary, clock.now(), width, self.progress_of(summary.id)))
        if files is not None:
            settings = settings_lines(files.recipe, width, has_exponents=self._has_exponents)
            self._show("run-settings", settings)
            self._show("run-files", files_lines(summary, files, width))
            self.query_one("#run-log", Drawing).show(partial(log_lines, files.log))

    @property
    def _known_files(self) -> RunFiles | None:
        """The contents of the folder of the run under the cursor; None until they have been read."""
        return self._files[1] if self._files and self.current and self._files[0] == self.current.id else None

    def _show(self, name: str, lines: list[Content]) -> None:
        self.query_one(f"#{name}", Lines).show(lines)

    def _is_waiting(self, summary: RunSummary) -> bool:
        return self.listing is not None and summary.id in self.listing.waiting

    async def action_open(self) -> None:
        await show_run(self.app, self.target_run)

    def action_mark(self) -> None:
        name = self._selected.id
        if name in self.marked:
            self.marked = tuple(marked for marked in self.marked if marked != name)
        elif len(self.marked) == MAX_COMPARED:
            self.notify(f"At most {MAX_COMPARED} runs can be compared.", severity="warning")
        else:
            self.marked = (*self.marked, name)
        self.show_listing()
        self.query_one(RunTable).action_move(1)

    def action_compare(self) -> None:
        if len(self.marked) < 2:
            another = "Mark another run" if self.marked else "Mark two to four runs"
            self.notify(f"{another} with {key_name('runs.mark')} to compare them.")
            return
        known = {summary.id: summary.run for summary in self.listing.summaries} if self.listing else {}
        self.app.push_screen(CompareScreen([known[name] for name in self.marked if name in known]))

    def action_sweeps(self) -> None:
        """Open the sweep of the run under the cursor or, if the run belongs to no sweep, the newest sweep."""
        show_sweeps(self, self.current.run.sweep if self.current is not None else "")

    def action_sort(self) -> None:
        self.order = ORDERS[(ORDERS.index(self.order) + 1) % len(ORDERS)]
        self.show_listing()

    def action_filter(self) -> None:
        self.add_class("-filtering")
        self.query_one("#runs-filter", Input).focus()

    def action_move(self, places: int) -> None:
        """Move the run under the cursor later in the queue by this many places, or earlier if ``places`` is
        negative.
        """
        self._act_on(self.target_run, lambda run: run_queue.move(run, places))

    def action_resume(self) -> None:
        done = f"Queued. Press {key_name('runs.withdraw')} to remove it from the queue."
        self.act_on_target(run_actions.resume, done)

    async def action_rerun(self) -> None:
        await self._prepare(self.target_run.recipe())

    async def action_train_further(self) -> None:
        run = self.target_run
        run_actions.initial_adapter(run.id)
        await self._prepare(replace_setting(run.recipe(), "lora.init_from", run.id))

    async def _prepare(self, recipe: Recipe) -> None:
        """Load a recipe, and switch to the Train screen, which checks the recipe before launch."""
        if self.app.load_recipe(recipe):
            self.notify_undoable("Loaded the run's recipe.")
        await prepare_run(self.app)

    def action_save_preset(self) -> None:
        recipe, text = self.target_run.recipe(), "Name of the preset. Model and data are left out."
        prompt = TextPromptScreen("Save as a preset", text)
        self.ask(prompt, lambda name: self._save_preset(name, recipe))

    @work
    async def _save_preset(self, name: str, recipe: Recipe) -> None:
        if name and await write_or_ask(self.app, lambda sure: save_as(name, recipe, overwrite=sure)):
            self.notify(f"Saved as {name}. Press {key_name('app.presets')} to see your presets.")

    def action_rename(self) -> None:
        summary, text = self._selected, "The new name. The folder keeps its name."
        prompt = TextPromptScreen("Rename the run", text, summary.name, run_actions.validate_name)
        self.ask(prompt, lambda name: self._act_on(summary.run, lambda run: run_actions.rename(run, name)))

    def action_delete(self) -> None:
        """Move the run to the trash. If something else uses the run, ask first."""
        self._refuse_while_acting()
        summary = self._selected

        def ask_if_used(uses: list[str]) -> None:
            if uses:
                text = f"{summary.name} is in use: {'; '.join(uses)}."
                question = ConfirmScreen("Delete the run?", text, "Delete")
                self.ask(question, lambda _yes: self._delete(summary))
            else:
                self._delete(summary)

        act_on_run(self, summary.run, run_actions.uses_of, ask_if_used)

    def _delete(self, summary: RunSummary) -> None:
        def delete(run: RunDir) -> int:
            run_actions.move_to_trash(run)
            return run_actions.trash_bytes()

        def then(trash_bytes: int) -> None:
            self.app.deleted_runs.append(summary.id)
            self.show_listing()
            self.notify(
                f"{summary.name} stays in the trash for {run_actions.KEPT_DAYS} days. The trash takes "
                f"{format_bytes(trash_bytes)}. Press {key_name('runs.restore')} to restore the run."
            )

        self._act_on(summary.run, delete, then)

    def action_restore(self) -> None:
        self._refuse_while_acting()
        deleted = self.app.deleted_runs

        def then(run: RunDir) -> None:
            deleted.remove(run.id)
            self.notify(f"Restored {run.name}.")

        if deleted:
            run = RunDir(paths.runs_dir() / deleted[-1])
            self._act_on(run, lambda run: run_actions.restore_run(run.id), then)

    def _refuse_while_acting(self) -> None:
        """Raise UserError if an action of this screen is still in progress, for example because another
        machine has not answered yet. Without this check, a run might be deleted or restored twice.
        """
        if any(worker.group == SLOW_ACTIONS for worker in self.workers):
            raise UserError(
                "The last action is still in progress",
                what="The other machine has not answered yet.",
                fix="Try again after the result of that action is shown.",
            )

    def _act_on(
        self, run: RunDir, act: Callable[[RunDir], T], then: Callable[[T], object] = lambda _: None
    ) -> None:
        """Call ``act`` with the run, then ``then`` with its result. Then reload the list, even if ``act``
        raised an error.
        """

        def act_and_reload(run: RunDir) -> T:
            try:
                return act(run)
            finally:
                self.call_later(self.refresh_runs)

        act_on_run(self, run, act_and_reload, then)

    def act_on_target(self, act: Callable[[RunDir], None], done: str) -> None:
        self._act_on(self.target_run, act, lambda _: self.notify(done))


def in_order(summaries: Sequence[RunSummary], waiting: Collection[str], order: Order) -> list[RunSummary]:
    """Return the runs in this order. The active runs and the queued runs come first and keep their order.
    ``waiting``: ids of the queued runs.
    """
    if order.key is None:
        return list(summaries)
    first = [row for row in summaries if row.status.state in ACTIVE or row.id in waiting]
    ended = [row for row in summaries if row not in first]
    return first + sorted(ended, key=order.key)


def _search_text(summary: RunSummary) -> str:
    settings = setting_words(summary.settings)
    words = (summary.name, summary.id, summary.model, settings, summary.status.state)
    return " ".join(words).casefold()
