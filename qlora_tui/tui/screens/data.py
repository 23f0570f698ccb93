"""Data: choose files, see every token as the model will, find mistakes before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import msgspec
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from qlora_tui.data.inspect import Report, Shown
from qlora_tui.engine.client import EngineClient
from qlora_tui.engine.protocol import DataInspected, DataReport, InspectData, RowShown, ShowRow
from qlora_tui.errors import Problem
from qlora_tui.recipe.fields import fields, source_fields
from qlora_tui.recipe.schema import Data, Recipe, Source
from qlora_tui.tui.commands import Command
from qlora_tui.tui.screens import data_words as words
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.columns import ColumnsScreen
from qlora_tui.tui.screens.open_path import OpenPathScreen

DATA_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".md", ".gz", ".zst", ".ndjson")


def _command(id_: str, key: str, action: str, label: str, help_: str, *, in_footer: bool = True) -> Command:
    return Command(
        id=f"data.{id_}", key=key, action=action, label=label, help=help_, in_footer=in_footer, verb="data"
    )


class DataScreen(WorkScreen):
    """Sources, one sample at a time, lengths and problems."""

    MODE = "data"
    CSS_PATH = "data.tcss"
    EDITS_RECIPE = True
    HELP_TEXT = (
        "The sample is shown as the model will see it: what it learns to say is underlined and bright, "
        "what it only reads is dim, control tokens are reversed. n goes to the next row with a problem."
    )
    ACTIONS: ClassVar[tuple[Command, ...]] = (
        _command("open", "o", "open", "Open", "Choose a data file or a folder of them."),
        _command("next", "right,l", "row(1)", "Next", "The next row.", in_footer=False),
        _command("previous", "left,h", "row(-1)", "Previous", "The row before.", in_footer=False),
        _command("problem", "n", "problem", "Problem", "The next row with a problem."),
        _command("format", "f", "format", "Format", "Read the rows in another format."),
        _command("columns", "c", "columns", "Columns", "Say which column plays which part."),
        _command("longer", "plus,equals_sign", "length(2)", "Longer", "Double the sequence length."),
        _command("shorter", "minus", "length(0.5)", "Shorter", "Halve the sequence length."),
        _command(
            "too_long", "t", "next_choice('data.too_long')", "Too long", "What happens to long samples."
        ),
        _command(
            "train_on",
            "e",
            "next_choice('data.train_on')",
            "Train on",
            "Train on answers only, or on everything.",
            in_footer=False,
        ),
        _command("packing", "k", "packing", "Packing", "Pack several samples into a row.", in_footer=False),
        _command("remove", "x", "remove", "Remove", "Take the source under the cursor out.", in_footer=False),
    )

    def __init__(self) -> None:
        super().__init__()
        self._engine = EngineClient()
        self._asked_for: tuple[Source, Data, str, str] | None = None
        self._report: Report | None = None
        self._shown: Shown | None = None
        self._row = 1
        self._source_number = 0

    def compose_body(self) -> Iterable[Widget]:
        with Horizontal(id="data-body"):
            with VerticalScroll(id="sample-side"):
                yield Static(id="sample")
            with Vertical(id="facts-side"):
                yield OptionList(id="sources")
                yield Static(id="lengths")
                with VerticalScroll(id="problems-side", can_focus=False):
                    yield Static(id="facts")
        yield Static(id="row-line")

    def on_mount(self) -> None:
        super().on_mount()
        self.query_one("#sample-side").focus()

    async def on_unmount(self) -> None:
        """The engine goes with the screen."""
        await self._engine.close()

    def show_recipe(self, recipe: Recipe) -> None:
        sources = recipe.data.sources
        self._source_number = min(self._source_number, max(0, len(sources) - 1))
        self._list_sources(sources)
        if not sources:
            self._asked_for = None
            self._say_empty()
            return
        source = sources[self._source_number]
        wanted = (source, recipe.data, recipe.model.id, recipe.model.chat_template)
        if wanted == self._asked_for:
            return
        if self._asked_for is None or self._asked_for[0].path != source.path:
            self._row = 1
        self._asked_for = wanted
        self._report = None
        self._shown = None
        self.query_one("#sample", Static).update(Content.styled("reading…", "dim"))
        self.run_worker(self._inspect(*wanted), exclusive=True, group="inspect")
        self._ask_row()

    def on_resize(self) -> None:
        self._show_report()

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Look at another source."""
        if event.option_index != self._source_number:
            self._source_number = event.option_index
            self._row = 1
            self.show_recipe(self.workstation.workbench.recipe)

    def action_open(self) -> None:
        """Add a file or folder to the sources."""
        sources = self.workstation.workbench.recipe.data.sources
        start = Path(sources[-1].path).parent if sources else None
        known = start if start is not None and start.is_dir() else None
        self.app.push_screen(OpenPathScreen("Open data", "data", DATA_ENDINGS, known), self._opened)

    def action_row(self, by: int) -> None:
        """Show a neighbouring row."""
        last = self._report.counts.rows if self._report and self._report.complete else None
        row = max(1, self._row + by)
        self._row = row if last is None else min(row, max(1, last))
        self._ask_row()

    def action_problem(self) -> None:
        """Show the next row with a problem, from the first again after the last."""
        rows = sorted({row for p in self._report.problems for row in p.rows}) if self._report else []
        if not rows:
            self.notify("No row has a problem." if self._report else "Still reading.")
            return
        self._row = next((row for row in rows if row > self._row), rows[0])
        self._ask_row()

    def action_format(self) -> None:
        """Read the rows in the next format."""
        choices = _formats()
        source = self._source()
        if source is not None:
            following = choices[(choices.index(source.format) + 1) % len(choices)]
            self._change_source(msgspec.convert(msgspec.to_builtins(source) | {"format": following}, Source))

    def action_columns(self) -> None:
        """Say which column plays which part."""
        source = self._source()
        if source is None or self._report is None or not self._report.files:
            return
        file = self._report.files[0]
        screen = ColumnsScreen(file.format, file.all_columns, {**file.columns, **source.columns})

        def answered(columns: dict[str, str] | None) -> None:
            if columns is not None:
                self._change_source(msgspec.structs.replace(source, columns=columns))

        self.app.push_screen(screen, answered)

    def action_length(self, factor: float) -> None:
        """Change the sequence length."""
        length = round(self.workstation.workbench.recipe.data.max_length * factor)
        field = fields()["data.max_length"]
        self.workstation.edit(
            "data.max_length", min(max(length, int(field.minimum or 1)), int(field.maximum or length))
        )

    def action_next_choice(self, path: str) -> None:
        """The next of a setting's choices."""
        choices = fields()[path].choices
        now = getattr(self.workstation.workbench.recipe.data, path.partition(".")[2])
        self.workstation.edit(path, choices[(choices.index(now) + 1) % len(choices)])

    def action_packing(self) -> None:
        """Pack, or not."""
        self.workstation.edit("data.packing", not self.workstation.workbench.recipe.data.packing)

    def action_remove(self) -> None:
        """Take the source under the cursor out of the recipe; u brings it back."""
        sources = list(self.workstation.workbench.recipe.data.sources)
        if sources:
            gone = sources.pop(self._source_number)
            self.workstation.edit("data.sources", tuple(sources))
            self.notify(f"{gone.path} is out of the recipe. u brings it back.")

    def _opened(self, path: Path | None) -> None:
        if path is not None:
            sources = self.workstation.workbench.recipe.data.sources
            self._source_number = len(sources)
            self.workstation.edit("data.sources", (*sources, Source(path=str(path))))

    def _source(self) -> Source | None:
        sources = self.workstation.workbench.recipe.data.sources
        return sources[self._source_number] if sources else None

    def _change_source(self, source: Source) -> None:
        sources = list(self.workstation.workbench.recipe.data.sources)
        sources[self._source_number] = source
        self.workstation.edit("data.sources", tuple(sources))

    def _ask_row(self) -> None:
        self._show_row_line()
        self.run_worker(self._fetch_row(self._row), exclusive=True, group="row")

    async def _inspect(self, source: Source, data: Data, model: str, template: str) -> None:
        request = InspectData(source=source, data=data, model=model, template=template)
        try:
            async for reply in self._engine.ask(request):
                if isinstance(reply, DataReport | DataInspected) and reply.report is not None:
                    self._report = reply.report
                    self._show_report()
        except Problem as problem:
            self._show_problem(problem)

    async def _fetch_row(self, row: int) -> None:
        if self._asked_for is None:
            return
        source, data, model, template = self._asked_for
        if not model:
            self.query_one("#sample", Static).update(words.NO_MODEL)
            return
        try:
            request = ShowRow(source=source, row=row, data=data, model=model, template=template)
            async for reply in self._engine.ask(request):
                if isinstance(reply, RowShown):
                    self._shown = reply.shown
                    self._row = reply.shown.row
                    self.query_one("#sample", Static).update(words.sample(reply.shown))
                    self.query_one("#sample-side").scroll_home(animate=False)
                    self._show_row_line()
        except Problem as problem:
            self._show_problem(problem)

    def _show_problem(self, problem: Problem) -> None:
        self.query_one("#sample", Static).update(words.problem(problem))

    def _list_sources(self, sources: tuple[Source, ...]) -> None:
        options = self.query_one("#sources", OptionList)
        if options.option_count == len(sources) and self._asked_for is not None:
            for number, source in enumerate(sources):
                options.replace_option_prompt_at_index(number, words.source_line(source))
            return
        options.clear_options()
        options.add_options(Option(words.source_line(source)) for source in sources)
        if sources:
            options.highlighted = self._source_number

    def _show_report(self) -> None:
        report = self._report
        if report is None:
            return
        recipe = self.workstation.workbench.recipe
        side = self.query_one("#facts-side")
        width = max(20, side.content_size.width - 2)
        narrow = self.size.width < 100
        self.query_one("#lengths", Static).update(words.lengths(report, recipe, width, 4 if narrow else 9))
        self.query_one("#facts", Static).update(words.facts(report, recipe))
        self._show_row_line()

    def _show_row_line(self) -> None:
        self.query_one("#row-line", Static).update(words.row_line(self._row, self._report, self._shown))

    def _say_empty(self) -> None:
        self.query_one("#sample", Static).update(words.EMPTY)
        for name in ("#lengths", "#facts", "#row-line"):
            self.query_one(name, Static).update("")


def _formats() -> tuple[str, ...]:
    return source_fields()["format"].choices
