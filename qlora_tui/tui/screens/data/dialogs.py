"""Dialogs of the Data screen: columns, formats, preferences, and a list of rows with their losses in a run,
the most suspicious rows first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import msgspec
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.suggester import SuggestFromList
from textual.widgets import Input, Label, Static

from qlora_tui.data.excluded_rows import Excluded, RowPlace, is_excluded, without_rows
from qlora_tui.data.formats import parts_of
from qlora_tui.data.sources import AUTO, FormatChoice
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_loss, truncate_middle
from qlora_tui.recipe.preference_methods import PREFERENCE_TRAITS
from qlora_tui.recipe.schema import Source
from qlora_tui.runs import actions as run_actions
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.row_losses import (
    RowClass,
    RowLoss,
    RowLosses,
    token_changes,
)
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.render.columns import Column, table
from qlora_tui.tui.screens.base import Dialog
from qlora_tui.tui.screens.modals.dialogs import Choice, ListPicker
from qlora_tui.tui.widgets.controls import TextField, ViList
from qlora_tui.visible import visible

_LINE_WIDTH = 200
"""Width of a line of a list, in cells. The dialog cuts off what does not fit."""


class ColumnMappingScreen(Dialog[dict[str, str] | None]):
    """Dialog in which the user maps each part of a format, such as the answer, to a column of the file by
    typing the column's name. Returns a mapping from parts to columns; None if closed with Escape.
    """

    CSS_PATH = ["../modals/modal.tcss", "../modals/fields.tcss"]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Close")]

    def __init__(self, format_: str, columns: tuple[str, ...], mapping: dict[str, str]) -> None:
        super().__init__()
        self._format = format_
        self._columns = columns
        self._mapping = mapping

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog", can_focus=False) as dialog:
            dialog.border_title = f"Columns of {self._format}"
            dialog.border_subtitle = dialog_keys(self.BINDINGS, "Tab next", "→ complete", "Enter apply")
            yield Static(f"Columns in the file: {', '.join(self._columns)}", markup=False, classes="muted")
            for part in parts_of(self._format):
                with Horizontal(classes="field"):
                    yield Label(part.replace("_", " "))
                    yield TextField(
                        self._mapping.get(part, ""),
                        name=part,
                        placeholder="none",
                        compact=True,
                        suggester=SuggestFromList(self._columns, case_sensitive=False),
                    )

    def on_input_submitted(self) -> None:
        """Close the dialog and return the columns that the user typed, by part of the format. Parts whose
        field is empty are left out.
        """
        given = {field.name or "": field.value.strip() for field in self.query(Input)}
        self.dismiss({part: column for part, column in given.items() if column})


def format_picker(choices: Sequence[FormatChoice], now: str) -> ListPicker[str]:
    """Return a dialog for choosing the format of a source. ``choices``: what each format can read of the
    source. ``now``: the current format.
    """

    def name(choice: FormatChoice) -> Content:
        name = f"{AUTO}: {choice.detected}" if choice.detected else choice.format
        return Content.styled(name, "bold" if choice.format == now else "")

    columns = (
        Column[FormatChoice](text=_reads),
        Column[FormatChoice](text=name, gap=1),
        Column[FormatChoice](text=lambda choice: f"{choice.read:,} rows", right=True),
        Column[FormatChoice](
            text=lambda choice: "now" if choice.format == now else "", width=3, style="$primary"
        ),
        Column[FormatChoice](text=lambda choice: choice.problem or choice.example, style="dim"),
    )
    return ListPicker(
        f"Format: how the first {choices[0].rows:,} rows are read",
        "read as",
        [
            Choice(choice.format, line.rstrip())
            for choice, line in zip(choices, table(columns, choices, _LINE_WIDTH), strict=True)
        ],
        selected=now,
        is_wide=True,
    )


def _reads(choice: FormatChoice) -> Content:
    """Return a symbol that says whether a format can read all, some, or none of the rows."""
    if not choice.read:
        return Content.styled("✗", "$error")
    return Content.styled("✓", "$success") if choice.read == choice.rows else Content.styled("!", "$warning")


def preference_picker(*, rated: bool) -> ListPicker[str]:
    """Return a dialog for choosing a value of ``data.preferences``.

    ``rated``: whether the answers are rated one by one, not compared in pairs.
    """
    better_only = (
        ("good only", "ignore the bad answers") if rated else ("chosen only", "ignore the rejected answers")
    )
    methods = [
        (method, traits.label, traits.effect)
        for method, traits in PREFERENCE_TRAITS.items()
        if traits.rates_answers == rated
    ]
    choices = [
        Choice[str](method, Content.assemble((f"{name:<12}", "bold"), (text, "dim")))
        for method, name, text in (*methods, ("chosen", *better_only))
    ]
    title = "Good and bad answers" if rated else "Chosen and rejected answers"
    return ListPicker(title, "choose", choices, is_wide=True)


_ROW_SIGNS: dict[RowClass, tuple[str, str]] = {
    "never learned": ("✗", "$error"),
    "contradicting": ("≠", "$warning"),
    "memorized": ("=", "$primary"),
    "learned": ("✓", "$success"),
}
"""(symbol, style) of each class of rows. The symbol distinguishes the classes on terminals without color."""
_MAX_PLACE_WIDTH = 22
"""Maximum width of the text that identifies a row, in cells: its number, with the name of its file if the
source has several files.
"""


@dataclass(frozen=True)
class MeasuredRows:
    """Losses of the rows of one source, measured before and after the training of a run."""

    run: RunDir
    number: int
    """Index of the source in the run's recipe."""
    losses: RowLosses

    def token_changes(self, place: RowPlace) -> tuple[tuple[float, float], ...]:
        """Return (loss before, loss after) for each token to learn in this row; empty if the row was not
        measured.
        """
        row = self.losses.row_of(self.number, place)
        return () if row is None else token_changes(self.run, row)

    def queue_without(self, rows: tuple[RowPlace, ...]) -> tuple[RunDir, Source]:
        """Queue the run again without these rows. Return the new run, and its source without the rows. Raises
        UserError if the run cannot be queued.
        """
        recipe = self.run.recipe()
        sources = list(recipe.data.sources)
        sources[self.number] = without_rows(sources[self.number], rows)
        data = msgspec.structs.replace(recipe.data, sources=tuple(sources))
        return run_actions.submit(msgspec.structs.replace(recipe, data=data)), sources[self.number]


def newest_run_on(source: Source) -> tuple[RunDir, int] | None:
    """Return the newest run that trained on a source and has an adapter, and the index of the source in that
    run's recipe; None if there is no such run.
    """
    path = Path(source.path).expanduser().absolute()
    for run in all_runs():
        if not (run.adapter_dir / "adapter_config.json").is_file():
            continue
        try:
            sources = run.recipe().data.sources
        except UserError:
            continue
        for number, trained in enumerate(sources):
            if Path(trained.path).expanduser().absolute() == path:
                return run, number
    return None


class RowChoice(NamedTuple):
    """What the user selected: a row to show or, if ``excluded`` is not empty, rows to leave out."""

    place: RowPlace
    excluded: tuple[RowPlace, ...] = ()


class RowLossScreen(ListPicker[RowChoice]):
    """Dialog that lists the measured rows of a source. Returns the row to show or the rows to leave out; None
    if closed with Escape.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "mark", "Mark"),
        Binding("x", "exclude", "Queue without"),
    ]

    def __init__(self, losses: RowLosses, source: int, excluded: Excluded) -> None:
        """Create the dialog for the source at index ``source`` in the measured run's recipe. ``excluded``:
        rows that the recipe being edited already leaves out.
        """
        self._rows = [row for row in losses.rows if row.source == source]
        self._marked: set[RowPlace] = set()
        self._excluded = excluded
        counts = {name: sum(row.row_class == name for row in self._rows) for name in _ROW_SIGNS}
        words = "  ".join(
            f"{_ROW_SIGNS[name][0]} {count:,} {name}" for name, count in counts.items() if count
        )
        super().__init__(f"Rows of {losses.run}: {words}", "show row", self._listed(), is_wide=True)

    def _listed(self) -> list[Choice[RowChoice]]:
        columns = (
            Column[RowLoss](
                text=lambda row: "●" if row.place in self._marked else " ", style="$primary bold"
            ),
            Column[RowLoss](text=lambda row: Content.assemble(_ROW_SIGNS[row.row_class]), gap=1),
            Column[RowLoss](text=_place, gap=1),
            Column[RowLoss](
                text=lambda row: Content.assemble(
                    ("loss ", "dim"), f"{format_loss(row.before):>6} → {format_loss(row.after):>6}"
                ),
                gap=1,
            ),
            Column[RowLoss](
                text=lambda row: f"other prompt {format_loss(row.other_prompt):>6}", style="dim", gap=1
            ),
            Column[RowLoss](text=self._description),
        )
        lines = table(columns, self._rows, _LINE_WIDTH)
        rows = zip(self._rows, lines, strict=True)
        return [Choice(RowChoice(row.place), line.rstrip()) for row, line in rows]

    def action_mark(self) -> None:
        """Mark the row under the cursor, or remove its mark if it has one. Then move the cursor down."""
        if self.current is not None:
            self._marked ^= {self.current.place}
            self.choices = self._listed()
            self.show_choices()
            self.query_one(ViList).action_cursor_down()

    def action_exclude(self) -> None:
        """Close the dialog and return the rows to leave out: the marked rows or, if no row is marked, the row
        under the cursor.
        """
        places = self._marked or ({self.current.place} if self.current is not None else set())
        if places:
            self.dismiss(RowChoice(min(places), tuple(sorted(places))))

    def _description(self, row: RowLoss) -> Content:
        left_out = "  excluded" if is_excluded(self._excluded, row.place) else ""
        return Content.styled(f"{visible(row.description)}{left_out}", _ROW_SIGNS[row.row_class][1])


def _place(row: RowLoss) -> str:
    return f"row {truncate_middle(visible(str(row.place)), _MAX_PLACE_WIDTH):<6}"
