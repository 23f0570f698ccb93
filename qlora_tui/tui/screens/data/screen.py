"""Data: choose files, see every token as the model will, find mistakes before the first step."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from textual import work
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import OptionList, Static

from qlora_tui.data.dataset_report import NO_SUCH_ROW, Report, Shown
from qlora_tui.data.preferences import PAIRS, UNMAPPED_SIDES
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.length_costs import LengthCost
from qlora_tui.tui.key_names import highlight_keys, name_keys
from qlora_tui.tui.screens.data import report_text
from qlora_tui.tui.screens.data import text as data_text
from qlora_tui.tui.screens.data.actions import DataActions
from qlora_tui.tui.screens.data.histogram import histogram
from qlora_tui.tui.screens.data.length_table import LengthCostReader, cost_table, total_time
from qlora_tui.tui.screens.data.previews import PreviewRequest
from qlora_tui.tui.widgets.controls import ViList, ViScroll
from qlora_tui.tui.widgets.line_widgets import update_if_changed
from qlora_tui.tui.widgets.panel import Panel

_TALL = 50
"""Height of a terminal, in lines, from which each problem is listed with its fix."""
_COSTS_HEIGHT = 36
"""Height from which there is room for the table of lengths."""
_TITLE_FRAME = 6
"""Cells of a panel's corners and of the spaces around its title."""
_SETTLE_S = 0.1
"""Seconds to wait, since a key held down changes the recipe many times."""

# Keys in the borders of the panels, with a verb for each.
_SAMPLE_KEYS = (
    ("data.previous", "previous"),
    ("data.next", "next row"),
    ("data.goto", "go to"),
    ("data.view", "view"),
)
_SOURCE_KEYS = (("data.open", "add"), ("data.replace", "replace"), ("data.remove", "remove"))
_TOTALS_KEYS = (("data.format", "format"), ("data.columns", "columns"))
_LENGTH_KEYS = (("data.longer", "longer"), ("data.shorter", "shorter"), ("data.too_long", "if too long"))
_PROBLEM_KEYS: tuple[tuple[str, str], ...] = (("data.problem", "next"), ("data.fix", "fix"))


def _problem_keys(*, has_problems: bool, skips: bool, has_bad_rows: bool) -> tuple[tuple[str, str], ...]:
    """The keys for problems of rows: with bad rows, also the one that leaves them out or refuses them."""
    keys = _PROBLEM_KEYS if has_problems else ()
    if skips:
        return (*keys, ("data.bad_rows", "refuse bad rows"))
    return (*keys, ("data.bad_rows", "skip bad rows")) if has_bad_rows else keys


class DataScreen(DataActions):
    """Sources, one sample at a time, lengths and problems."""

    MODE = "data"
    CSS_PATH = "data.tcss"
    EDITS_RECIPE = True
    HELP_TEXT = (
        "The sample is shown as the model will see it. What it is to learn (the tokens in the loss) is bold "
        "and underlined, what it only reads is dim. Control tokens are reversed, those to learn in a color "
        "too; ↵ is a line break to learn. packed: several samples share one sequence, and do not see each "
        "other. Bars hatched ▒ after ✂ are samples longer than the sequence length.\n"
        "{data.open} adds a file to those of the recipe, {data.replace} opens one instead of them; "
        "{data.remove} removes the selected one. {data.bad_rows} leaves out rows that cannot be used. "
        "Press Enter on a problem to go to its next row. Tab moves between the lists."
    )

    def __init__(self) -> None:
        super().__init__()
        self._request: PreviewRequest | None = None
        self.report: Report | None = None
        self.shown: Shown | None = None
        self.row = 1
        self.path = ""
        """The file of the source that the row is from; empty is its first."""
        self._no_tokens: UserError | None = None
        """Why the row is shown as it is in the file although a model is selected."""
        self._costs: list[LengthCost] = []
        self._costs_key: object = None
        self._cost_reader = LengthCostReader()

    def compose_body(self) -> Iterable[Widget]:
        with Horizontal(id="data-body"):
            with Panel("Sample", keys=_SAMPLE_KEYS, id="sample-panel"):
                with ViScroll(id="sample-scroll"):
                    yield Static(id="sample")
                yield Static(id="legend")
            with VerticalScroll(id="data-side", can_focus=False):
                with Vertical(id="file-facts"):
                    yield Panel("Sources", ViList(id="sources"), keys=_SOURCE_KEYS, id="sources-panel")
                    yield Panel("Tokens", Static(id="data-totals"), keys=_TOTALS_KEYS, id="totals-panel")
                with Vertical(id="length-facts"):
                    with Panel("Lengths", keys=_LENGTH_KEYS, id="lengths-panel"):
                        yield Static(id="lengths-line")
                        yield Static(id="histogram")
                        yield Static(id="costs")
                    yield Panel("Problems", ViList(id="problems"), keys=_PROBLEM_KEYS, id="problems-panel")

    def on_mount(self) -> None:
        self.query_one("#sample-scroll").focus()
        self._start()

    async def on_unmount(self) -> None:
        """The engines go with the screen."""
        await self.previews.close()

    def show_recipe(self, recipe: Recipe) -> None:
        sources = recipe.data.sources
        self.source_number = min(self.source_number, max(0, len(sources) - 1))
        lines = [(str(n), data_text.source_line(s, len(sources) == 1)) for n, s in enumerate(sources)]
        self.query_one("#sources", ViList).show(lines, select=str(self.source_number))
        title = f"Mix of {len(sources)} files" if len(sources) > 1 else "Source"
        self.query_one("#sources-panel", Panel).show_title(title)
        self.query_one("#data-body").set_class(not sources, "-empty")
        if not sources:
            self._show_empty()
            return
        wanted = PreviewRequest.of(recipe, self.source_number)
        if wanted != self._request:
            self._set_request(wanted)
        self.show_report()
        self._update_costs()

    def on_resize(self) -> None:
        # Once the panels have their new widths, for which bars and titles are drawn.
        self.call_after_refresh(self.show_report)
        self.call_after_refresh(self._show_row)

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Look at another source."""
        if event.option_list.id == "sources" and event.option_index != self.source_number:
            self.source_number = event.option_index
            self.show_recipe(self.qlora_app.workbench.recipe)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Go to the next row with the problem chosen."""
        if event.option_list.id == "problems" and event.option_index < len(self.problems):
            self.go_to_next_problem([self.problems[event.option_index]], 1)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return self.can_fix if action == "fix" else super().check_action(action, parameters)

    def _set_request(self, wanted: PreviewRequest) -> None:
        """Look at another source, or with other settings."""
        before, self._request = self._request, wanted
        if before is None or before.source != wanted.source:
            if before is None or before.source.path != wanted.source.path:
                self.path, self.row = "", 1
                self.measured = None
            self.report = None
            self.shown = None
            self.fields = {}
            self._clear_figures()
            self.query_one("#sample", Static).update(data_text.reading(wanted.source))
        self._fetch_row(wanted, self.path, self.row)
        self._inspect(wanted)

    def go_to_row(self, path: str, row: int) -> None:
        """Read and show another row."""
        if self._request is not None:
            self.path, self.row = path, row
            self._show_row_title()
            self._fetch_row(self._request, path, row)

    def reload(self) -> None:
        if self._request is not None:
            self._set_request(self._request)

    @work
    async def _start(self) -> None:
        # Started before a file is selected; an error is reported when one is.
        with suppress(UserError):
            await self.previews.start()

    @work(exclusive=True, group="row")
    async def _fetch_row(self, wanted: PreviewRequest, path: str, row: int) -> None:
        try:
            shown, problem = await self.previews.row(wanted, row, path)
        except UserError as error:
            if error.code == NO_SUCH_ROW and self.shown is not None:
                self.path, self.row = self.shown.path, self.shown.row
                self.notify(error.what)
                self._show_row_title()
            else:
                self.shown, self.unreadable_source = None, wanted.source
                self.refused_preferences = data_text.refused_preferences(error)
                compares = error.code in (PAIRS, UNMAPPED_SIDES)
                self.mapping_format = "preference" if compares else "prompt-completion"
                self.fields = await self.previews.fields(wanted.source)
                self._show_legend(Content(""))
                self.query_one("#sample", Static).update(data_text.unreadable_text(error, self.fields))
            return
        self.refused_preferences = ""
        self.shown, self.path, self.row, self._no_tokens = shown, shown.path, shown.row, problem
        self.unreadable_source = None
        self._show_row()
        self.query_one("#sample-scroll").scroll_home(animate=False)

    @work(exclusive=True, group="inspect")
    async def _inspect(self, wanted: PreviewRequest) -> None:
        await asyncio.sleep(_SETTLE_S)
        try:
            async for report in self.previews.reports(wanted):
                news = self.report is None or report.problems != self.report.problems
                self.report = report
                self.show_report()
                if news:
                    self._show_row()
        except UserError as error:
            self.report = None
            self._clear_figures()
            # If not even a row can be read, the error is shown in place of the sample.
            if self.shown is not None:
                self.query_one("#data-totals", Static).update(data_text.error_text(error))
            return
        self._update_costs()

    def _update_costs(self) -> None:
        """Work out what other lengths would cost, once there is a whole report."""
        recipe, budget = self.qlora_app.workbench.recipe, self.qlora_app.memory_budget
        key = (self.report, recipe, budget)
        if self.report is None or not self.report.complete or key == self._costs_key:
            return
        self._costs_key = key
        self._costs_of(self.report, recipe)

    @work(exclusive=True, group="costs")
    async def _costs_of(self, report: Report, recipe: Recipe) -> None:
        architecture = self.qlora_app.workbench.architecture()
        budget = self.qlora_app.memory_budget
        self._costs = await self._cost_reader.read(report, recipe, architecture, budget)
        self.show_report()

    def _show_row(self) -> None:
        self._show_row_title()
        changes = self.token_changes()
        self._show_legend(data_text.legend(self.shown, changes))
        if self.shown is None or self._request is None:
            return
        text = data_text.sample(self.shown, self.problems, self._request.data, changes)
        if self._no_tokens is not None:
            text = Content.assemble(data_text.error_text(self._no_tokens), "\n\n", text)
        elif not self._request.model:
            text = Content.assemble(highlight_keys(name_keys(data_text.NO_MODEL), "dim"), text)
        self.query_one("#sample", Static).update(text)

    def _show_legend(self, legend: Content) -> None:
        self.query_one("#legend").display = bool(legend)
        self._show("#legend", legend)

    def _show_row_title(self) -> None:
        if self._request is not None:
            panel = self.query_one("#sample-panel", Panel)
            place = self.path, self.row
            width = panel.size.width - _TITLE_FRAME
            panel.show_title(data_text.row_title(place, self.report, self.shown, self._request.data, width))

    def show_report(self) -> None:
        """Show lengths and problems, as far as the source was read."""
        report, recipe = self.report, self.qlora_app.workbench.recipe
        body = self.query_one("#data-body")
        alone = body.has_class("-figures")
        body.set_class(not (self.has_class("-narrow") or self.size.height < _COSTS_HEIGHT) or alone, "-costs")
        if report is None:
            return
        body.remove_class("-unreadable")
        brief = self.has_class("-narrow") and not alone
        width = self.query_one("#lengths-panel").content_size.width
        height = 6 if self.size.height >= _TALL else 4 if self.has_class("-tall") else 3
        cut = recipe.data.max_length if report.template else None
        self._show("#lengths-line", report_text.lengths_line(report, recipe.data, width))
        self._show("#histogram", histogram(report.lengths, cut, width, height))
        time = total_time(self._costs) if report.complete else ""
        facts_width = self.query_one("#totals-panel").content_size.width
        evidence = alone or self.has_class("-very-wide")
        figures = report_text.totals(report, recipe, facts_width, time, brief=brief, evidence=evidence)
        self._show("#data-totals", figures)
        self._show("#costs", cost_table(self._costs, width) if report.complete else Content(""))
        name = Path(self._request.source.path).name if self._request else ""
        several = len(recipe.data.sources) > 1
        self.query_one("#totals-panel", Panel).show_title(f"Tokens of {name}" if several else "Tokens")
        # In a short window, the fix is shown above a row that has the problem.
        short = brief or (self.size.height < _TALL and not alone)
        lines = report_text.problem_lines(
            report, self.problems, recipe.data, brief=short, bad_rows=self.bad_rows()
        )
        problems = self.query_one("#problems", ViList)
        if few_steps := report_text.few_steps_line(report, recipe, brief=brief or (short and bool(lines))):
            lines.append(("steps", few_steps))
        # Errors found later come before what the cursor was on.
        select = lines[0][0] if lines and not problems.has_focus else None
        problems.show(lines or [("none", report_text.no_problem_line(report))], select)
        count = f"Problems ({len(lines)})" if lines else "Problems"
        problems_panel = self.query_one("#problems-panel", Panel)
        problems_panel.show_title(count)
        skips = recipe.data.bad_rows == "skip"
        problems_panel.show_keys(
            _problem_keys(has_problems=bool(self.problems), skips=skips, has_bad_rows=bool(self.bad_rows()))
        )
        self._show_row_title()

    def _show(self, name: str, text: Content) -> None:
        update_if_changed(self.query_one(name, Static), text)

    def _clear_figures(self) -> None:
        self._costs, self._costs_key = [], None
        self.query_one("#data-body").add_class("-unreadable")
        for name in ("#lengths-line", "#histogram", "#data-totals", "#costs"):
            self._show(name, Content(""))
        self.query_one("#problems", ViList).show([])
        self.query_one("#problems-panel", Panel).show_title("Problems")
        if self.shown is None:  # else a row is still shown, though not all of them can be read
            self._show_legend(Content(""))
            self.query_one("#sample-panel", Panel).show_title("Sample")

    def _show_empty(self) -> None:
        self.query_one("#sources-panel", Panel).show_title("Source")
        self._request = self.report = self.shown = None
        self._clear_figures()
        self.query_one("#sample", Static).update(highlight_keys(name_keys(data_text.EMPTY)))
