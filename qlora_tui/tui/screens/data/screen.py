"""The Data screen: select files, show each token as the model will see it, and find errors before
training.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

from textual import work
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import OptionList

from qlora_tui.data.dataset_report import NO_SUCH_ROW, Report, Shown
from qlora_tui.data.excluded_rows import RowPlace, file_names, parse_excluded_rows, without_rows
from qlora_tui.data.preferences import PAIRS, UNMAPPED_SIDES
from qlora_tui.data.problems import DataProblem
from qlora_tui.data.sources import is_hub_dataset
from qlora_tui.errors import UserError
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.schema import Recipe, Source
from qlora_tui.runs.expected_time import Forecast, forecast
from qlora_tui.runs.length_costs import LengthCost, length_costs
from qlora_tui.runs.row_losses import measure_row_losses, read_row_losses
from qlora_tui.tui.key_names import key_name
from qlora_tui.tui.render.labels import error_content, recipe_fit
from qlora_tui.tui.screens.data.dialogs import (
    MeasuredRows,
    RowLossScreen,
    newest_run_on,
    preference_picker,
)
from qlora_tui.tui.screens.data.report import (
    LABEL_CELLS,
    LengthsPanel,
    ProblemsPanel,
    TotalsPanel,
    has_fix,
    skippable_rows,
    unfixed_problems,
)
from qlora_tui.tui.screens.data.row_engines import PreviewRequest
from qlora_tui.tui.screens.data.sample import (
    TITLE_FRAME,
    SamplePanel,
    TokenStyles,
    neighbor,
    next_problem,
    parse_place,
    refused_preferences,
    row_title,
    unreadable_text,
)
from qlora_tui.tui.screens.data.source_actions import SourceActions, source_line
from qlora_tui.tui.screens.modals.dialogs import TextPromptScreen
from qlora_tui.tui.threads import run_stoppable
from qlora_tui.tui.widgets.controls import Panel, ViList

_COSTS_HEIGHT = 36
"""Minimum height of the window, in lines, at which the table of costs is shown."""
_SETTLE_S = 0.1
"""Seconds to wait after a change before the whole source is read. A key that is held down changes the recipe
many times.
"""
_SOURCE_KEYS = (("data.open", "add"), ("data.replace", "replace"), ("data.remove", "remove"))
_VIEWS = ("both", "figures", "sample")


class DataScreen(SourceActions):
    """The Data screen: the sources of the recipe, and the rows, lengths and problems of the selected
    source.
    """

    MODE = "data"
    CSS_PATH = "data.tcss"
    EDITS_RECIPE = True

    def __init__(self) -> None:
        super().__init__()
        self._request: PreviewRequest | None = None
        self.shown: Shown | None = None
        """The row on the screen; None if no row has been read, or if the row cannot be read."""
        self.row = 1
        self.path = ""
        """Path of the row's file in the source; empty for the source's first file."""
        self._no_tokens: UserError | None = None
        """Why the row cannot be shown as the model sees it; None if it can, or if no model is selected."""
        self._refused_preferences: Literal["", "pairs", "ratings"] = ""
        """Kind of preferences in the source, if the source is refused because the recipe does not say how to
        train on this kind; otherwise empty.
        """
        self._measured: MeasuredRows | None = None
        """Losses of the source's rows before and after a run. Tokens are shaded by the change. None until the
        user has listed the rows by their losses.
        """
        self._measuring = False
        self._costs: list[LengthCost] = []
        self._costs_key: object = None
        self._forecast: Forecast | None = None
        """Steps and time of the run; None until they are known."""

    @property
    def help_state(self) -> str:
        return "empty" if not self.app.workbench.recipe.data.sources else ""

    def compose_body(self) -> Iterable[Widget]:
        yield ProblemsPanel()
        with Horizontal(id="data-body"):
            yield SamplePanel()
            with VerticalScroll(id="data-side", can_focus=False):
                with Vertical(id="file-facts"):
                    yield Panel("Sources", ViList(id="sources"), keys=_SOURCE_KEYS, id="sources-panel")
                    yield TotalsPanel()
                yield LengthsPanel()

    def on_mount(self) -> None:
        self.query_one("#sample-scroll").focus()
        self._start()

    async def on_unmount(self) -> None:
        """Stop the engines when the screen is removed."""
        await self.previews.kill()

    def on_resize(self) -> None:
        # Draw after the layout, because bars and titles depend on the panels' new widths.
        self.call_after_refresh(self._show_report)
        self.call_after_refresh(self._show_row)
        if self._request is not None and self.shown is not None:
            self.call_after_refresh(self._fetch_beside, self._request)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "fix":
            return bool(self._refused_preferences) or has_fix(self.report, self.problems)
        # Without a source, the only available command of this screen is the one that opens data.
        return not self.has_command(action) or action == "open" or self.source is not None

    # Sources

    def show_recipe(self, recipe: Recipe) -> None:
        sources = recipe.data.sources
        self.source_number = min(self.source_number, max(0, len(sources) - 1))
        lines = [(str(n), source_line(source, len(sources) == 1)) for n, source in enumerate(sources)]
        self.query_one("#sources", ViList).show(lines, select=str(self.source_number))
        title = f"Mix of {len(sources)} files" if len(sources) > 1 else "Source"
        self.query_one("#sources-panel", Panel).show_title(title)
        self.query_one("#data-body").set_class(not sources, "-empty")
        self.query_one(ProblemsPanel).display = bool(sources)
        self.refresh_bindings()
        if not sources:
            self._request = self.report = self.shown = None
            self._clear_figures()
            self.query_one(SamplePanel).show_empty()
            return
        wanted = PreviewRequest.of(recipe, self.source_number)
        if wanted != self._request:
            self._set_request(wanted)
        self._show_report()
        self._update_costs()

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Show the source under the cursor."""
        if event.option_list.id == "sources" and event.option_index != self.source_number:
            self.source_number = event.option_index
            self.show_recipe(self.app.workbench.recipe)

    def action_reload(self) -> None:
        """Read the source again, whether or not it has changed."""
        if self._request is not None:
            self._set_request(self._request)
            self.notify("Reading the data again.")

    # Rows

    def action_row(self, by: int) -> None:
        """Show the next row if ``by`` is 1, and the previous row if it is -1."""
        place = neighbor((self.path, self.row), by, self.report.files if self.report else ())
        if self.shown is None or place != (self.path, self.row):
            self._go_to_row(*place)

    def action_go_to(self) -> None:
        """Ask for a row's number, and show that row."""
        files = self.report.files if self.report else ()

        def validate(text: str) -> str:
            return "" if parse_place(text, self.path, files) else "Enter a row number."

        def go(text: str) -> None:
            if place := parse_place(text, self.path, files):
                self._go_to_row(*place)

        help_ = "The row number (the first row is 1)."
        if len(files) > 1:
            help_ += " For a row of another file, type part of the file's name before the number."
        self.ask(TextPromptScreen("Go to a row", help_, "", validate), go)

    def action_problem(self, by: int) -> None:
        """Show the next row with a problem or, if ``by`` is negative, the previous such row. The search wraps
        around at either end.
        """
        if not any(problem.rows for problem in self.problems):
            complete = self.report is not None and self.report.complete
            self.notify("No row has a problem." if complete else "No problems so far. Still reading.")
        else:
            self._go_to_problem(self.problems, by)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Show the next row that has the selected problem."""
        if event.option_list.id == "problems" and event.option_index < len(self.problems):
            self._go_to_problem([self.problems[event.option_index]], 1)

    def _go_to_problem(self, problems: Sequence[DataProblem], by: int) -> None:
        files = self.report.files if self.report else ()
        place = next_problem(problems, (self.path, self.row), by, files)
        if place is not None:
            self._go_to_row(*place)

    def _go_to_row(self, path: str, row: int) -> None:
        if self._request is not None:
            self.path, self.row = path, row
            self._show_place()
            self._fetch_row(self._request, path, row)

    @work
    async def _start(self) -> None:
        # Start the engine early, so that the first row appears sooner. An error is shown once a file is
        # selected.
        with suppress(UserError):
            await self.previews.start()

    def _set_request(self, wanted: PreviewRequest) -> None:
        """Read the row and the report for this request. If the source has changed, clear the screen first. If
        its path has changed, show the first row.
        """
        before, self._request = self._request, wanted
        if before is None or before.source != wanted.source:
            if before is None or before.source.path != wanted.source.path:
                self.path, self.row = "", 1
                self._measured = None
            self.report = self.shown = None
            self._fields = {}
            self._clear_figures()
            doing = "Loading from the Hub…" if is_hub_dataset(wanted.source.path) else "Reading…"
            self.query_one(SamplePanel).show_text(Content.styled(doing, "dim"))
        self._fetch_row(wanted, self.path, self.row)
        self._inspect(wanted)

    @work(exclusive=True, group="row")
    async def _fetch_row(self, wanted: PreviewRequest, path: str, row: int) -> None:
        try:
            shown, problem = await self.previews.row(wanted, row, path)
        except UserError as error:
            if error.code == NO_SUCH_ROW and self.shown is not None:
                self.path, self.row = self.shown.path, self.shown.row
                self.notify(error.what)
                self._show_place()
            else:
                self.shown, self._unreadable_source = None, wanted.source
                self._refused_preferences = refused_preferences(error)
                compares = error.code in (PAIRS, UNMAPPED_SIDES)
                self._mapping_format = "preference" if compares else "prompt-completion"
                self._fields = await self.previews.fields(wanted.source)
                panel = self.query_one(SamplePanel)
                panel.show_legend(Content(""))
                panel.show_text(unreadable_text(error, self._fields))
            return
        self._refused_preferences = ""
        self.shown, self.path, self.row, self._no_tokens = shown, shown.path, shown.row, problem
        self._unreadable_source = None
        self._show_row()
        self.query_one("#sample-scroll").scroll_home(animate=False)
        self._fetch_beside(wanted)

    @work(exclusive=True, group="rows beside")
    async def _fetch_beside(self, wanted: PreviewRequest) -> None:
        """Fetch and show as many of the following rows as fit."""
        panel, rows = self.query_one(SamplePanel), list[Shown]()
        place, files = (self.path, self.row), self.report.files if self.report else ()
        with suppress(UserError):
            while len(rows) < panel.room_beside and (following := neighbor(place, 1, files)) != place:
                place = following
                rows.append((await self.previews.row(wanted, place[1], place[0]))[0])
        panel.show_beside(rows, wanted.data)

    def _show_row(self) -> None:
        self._show_place()
        if self._request is None:
            return
        place = RowPlace(self._file_names().get(self.path, ""), self.row)
        changes = () if self._measured is None else self._measured.token_changes(place)
        panel = self.query_one(SamplePanel)
        has_legend = not (self._is_small and self._measured is None)
        panel.show_row(
            self.shown, self.problems, self._request, changes, self._no_tokens, has_legend=has_legend
        )

    def _show_place(self) -> None:
        if self._request is not None:
            place = self.path, self.row
            panel = self.query_one(SamplePanel)
            width = panel.size.width - TITLE_FRAME
            title = partial(row_title, place, self.report, self.shown, self._request.data, width)
            # A larger window shows the keys in the border.
            learned = TokenStyles.of(self.app).learned if self._is_small and self._measured is None else ""
            panel.show_title(title(has_heading=panel.has_columns, has_keys=self._is_small, learned=learned))

    @property
    def _is_small(self) -> bool:
        return self.has_class("-narrow") or self.has_class("-short")

    # The whole source

    @work(exclusive=True, group="inspect")
    async def _inspect(self, wanted: PreviewRequest) -> None:
        await asyncio.sleep(_SETTLE_S)
        try:
            async for report in self.previews.reports(wanted):
                before, is_first = self.problems, self.report is None
                self.report = report
                self._show_report()
                if is_first or self.problems != before:
                    self._show_row()
        except UserError as error:
            self.report = None
            self._clear_figures()
            # If no row can be read, the error is shown in place of the sample.
            if self.shown is not None:
                self.query_one(TotalsPanel).show_text(error_content(error, is_spaced=True))
            return
        self._update_costs()

    def _update_costs(self) -> None:
        """Estimate the costs of other maximum lengths if the report is complete, and if the report, the
        recipe, the memory limit or the number of samples has changed since the last estimate.
        """
        recipe, budget = self.app.workbench.recipe, self.app.memory_budget
        key = (self.report, recipe, budget, self.app.counts)
        if self.report is None or not self.report.complete or key == self._costs_key:
            return
        self._costs_key = key
        self._read_costs(self.report, recipe)
        self.app.count_samples()

    @work(exclusive=True, group="costs")
    async def _read_costs(self, report: Report, recipe: Recipe) -> None:
        architecture, machine = self.app.workbench.architecture(), self.app.system_status.machine
        self._forecast = await asyncio.to_thread(forecast, recipe, machine)
        self._costs = await asyncio.to_thread(
            length_costs, report, recipe, architecture, self.app.memory_budget, machine
        )
        self._show_report()

    def _show_report(self) -> None:
        """Show the totals, lengths and problems of the part of the source that has been read."""
        report, recipe = self.report, self.app.workbench.recipe
        body = self.query_one("#data-body")
        alone, is_narrow = body.has_class("-figures"), self.has_class("-narrow")
        body.set_class(not (is_narrow or self.size.height < _COSTS_HEIGHT) or alone, "-costs")
        if report is None:
            return
        body.remove_class("-unreadable")
        narrow = is_narrow and not alone
        self.query_one(LengthsPanel).show(report, recipe.data, self._costs)
        totals = self.query_one(TotalsPanel)
        evidence = alone or self.has_class("-very-wide")
        totals.show(report, recipe, self._forecast, self._fit, brief=narrow, evidence=evidence)
        name = Path(self._request.source.path).name if self._request else ""
        totals.show_title(f"Tokens of {name}" if len(recipe.data.sources) > 1 else "Tokens")
        # In a narrow window, a problem takes one line. Its fix is also shown above the rows that have the
        # problem.
        self.query_one(ProblemsPanel).show(report, self.problems, recipe, self._forecast, brief=narrow)
        self._show_place()

    @property
    def _fit(self) -> Content | None:
        """The memory that the recipe needs, as text; None if unknown. This screen shows it in the totals
        instead of in the header.
        """
        fit = recipe_fit(self.app.workbench, self.app.memory_budget)
        if fit is None:
            return None
        # The bar of the tokens to learn is enough; a small window has no room for a second line.
        width = self.query_one(TotalsPanel).content_size.width - LABEL_CELLS
        return fit.draw(width, max_bar=0) if self._is_small else fit.draw_wrapped(width)

    def _clear_figures(self) -> None:
        self._costs, self._costs_key, self._forecast = [], None, None
        self.query_one("#data-body").add_class("-unreadable")
        recipe = self.app.workbench.recipe
        self.query_one(TotalsPanel).show_text(Content(""))
        self.query_one(LengthsPanel).show(None, recipe.data, [])
        self.query_one(ProblemsPanel).show(None, (), recipe, None, brief=True)
        if self.shown is None:  # If not all rows can be read, a row may still be shown.
            panel = self.query_one(SamplePanel)
            panel.show_legend(Content(""))
            panel.show_title("Sample")

    def action_view(self) -> None:
        """Cycle through three views: sample and statistics, statistics only, sample only."""
        body = self.query_one("#data-body")
        now = next((view for view in _VIEWS if body.has_class(f"-{view}")), "both")
        body.set_class(False, f"-{now}")
        body.set_class(True, f"-{_VIEWS[(_VIEWS.index(now) + 1) % len(_VIEWS)]}")
        self.call_after_refresh(self._show_report)

    # Problems

    @property
    def problems(self) -> tuple[DataProblem, ...]:
        """The report's problems, except those that the recipe already fixes."""
        return unfixed_problems(self.report, self.app.workbench.recipe.lora.trainable_tokens)

    def action_fix(self) -> None:
        """Fix a problem by changing a setting. The first of these problems that exists is fixed: refused
        preferences (the user is asked how to train on them), bad rows, texts that are too long, untrained
        tokens.
        """
        if self._refused_preferences:
            rated = self._refused_preferences == "ratings"
            self.ask(preference_picker(rated=rated), self._set_preferences)
        elif skippable_rows(self.report, self.problems):
            self.action_bad_rows()
        elif any(problem.split_rows for problem in self.problems):
            self.app.edit("data.overflow", "split")
            self.notify_undoable("Long texts will be split into rows.")
        elif tokens := [token for problem in self.problems for token in problem.tokens]:
            now = self.app.workbench.recipe.lora.trainable_tokens
            self.app.edit("lora.trainable_tokens", tuple(dict.fromkeys((*now, *tokens))))
            self.notify_undoable(f"Embedding and head will be trained for {', '.join(tokens)}.")

    def _set_preferences(self, choice: str) -> None:
        self.app.edit("data.preferences", choice)
        chosen = "Trains on the better answers only."
        self.notify_undoable(chosen if choice == "chosen" else f"Trains with {choice}.")

    def action_bad_rows(self) -> None:
        """Toggle the setting for bad rows: a run either refuses to start with bad rows, or leaves
        them out.
        """
        bad_rows = skippable_rows(self.report, self.problems)
        skips = self.app.workbench.recipe.data.bad_rows == "skip"
        self.app.edit("data.bad_rows", "refuse" if skips else "skip")
        if skips:
            self.notify_undoable("No run will start while the data has bad rows.")
        elif bad_rows:
            self.notify_undoable(f"Runs will leave out {pluralize(bad_rows, 'bad row')}.")
        else:
            self.notify_undoable("Runs will leave out bad rows, if there are any.")

    # Losses of the rows in a run

    def action_row_losses(self) -> None:
        """List the rows of the source with their losses in the newest run that trained on the source. The
        most suspicious rows come first.
        """
        if self._measuring:
            self.notify("The rows are still being measured. The list opens when the measurement has ended.")
        else:
            self._list_rows(self._selected)

    @work
    async def _list_rows(self, source: Source) -> None:
        run_and_number = await asyncio.to_thread(newest_run_on, source)
        if run_and_number is None:
            self.notify(
                "No run has trained an adapter on this file yet. Train on the file first.", severity="warning"
            )
            return
        run, number = run_and_number
        losses = await asyncio.to_thread(read_row_losses, run)
        if losses is None:
            self._measuring = True
            self.notify(
                f"Measuring the rows of {run.name}, which takes about as long as one epoch. "
                "The list opens when the measurement has ended."
            )
            try:
                losses = await run_stoppable(measure_row_losses, run)
            except UserError as problem:
                self.app.notify_error(problem)
                return
            finally:
                self._measuring = False
        self._measured = measured = MeasuredRows(run, number, losses)
        excluded = parse_excluded_rows(source.excluded_rows)
        choice = await self.app.push_screen_wait(RowLossScreen(losses, number, excluded))
        if choice is None:
            return
        if choice.excluded:
            await self._queue_without(measured, choice.excluded)
        else:
            names = self._file_names().items()
            path = next((path for path, name in names if name == choice.place.file), "")
            self._go_to_row(path, choice.place.row)

    async def _queue_without(self, measured: MeasuredRows, rows: tuple[RowPlace, ...]) -> None:
        """Queue the measured run again without these rows. If the selected source is the one that the run
        was trained on, leave the rows out of the recipe too.
        """
        try:
            queued, trained = await asyncio.to_thread(measured.queue_without, rows)
        except UserError as problem:
            self.app.notify_error(problem)
            return
        source = self.source
        if source is not None and Path(source.path).absolute() == Path(trained.path).absolute():
            self._change_source(without_rows(source, rows))
        self.notify(
            f"Queued {queued.name} without {pluralize(len(rows), 'row')}; the recipe leaves them out too. "
            f"Press {key_name('app.undo')} to undo the change to the recipe."
        )

    def _file_names(self) -> dict[str, str]:
        """Return the name of each file of the source by path; empty until a report has been read."""
        if self.report is None or self.source is None:
            return {}
        paths = [Path(file.path) for file in self.report.files]
        return dict(zip(map(str, paths), file_names(self.source.path, paths), strict=True))
