"""Training rows by what a run learned of them: a window that lists them, and the run without some."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import msgspec
from textual.binding import Binding, BindingType
from textual.content import Content

from qlora_tui.data.excluded_rows import Excluded, RowPlace, is_excluded, without_rows
from qlora_tui.errors import UserError
from qlora_tui.formatting import truncate_middle
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
from qlora_tui.tui.screens.modals.dialogs import ListPicker
from qlora_tui.tui.widgets.controls import ViList
from qlora_tui.visible import visible

_ROW_SIGNS: dict[RowClass, tuple[str, str]] = {
    "never learned": ("✗", "$error"),
    "contradicting": ("≠", "$warning"),
    "memorized": ("=", "$accent"),
    "learned": ("✓", "$success"),
}
"""Sign and style of each class: the sign says it without color too."""
_MAX_PLACE_WIDTH = 22
"""Cells of a row's number, with the name of its file if the source has several."""
_LINE_WIDTH = 200
"""Cells of a line, which the dialog cuts."""


@dataclass(frozen=True)
class MeasuredRows:
    """The losses of a run's rows."""

    run: RunDir
    number: int
    """Number of the source among those of the run."""
    losses: RowLosses

    def token_changes(self, place: RowPlace) -> tuple[tuple[float, float], ...]:
        """Loss before and after of each token in the loss of a row; empty if it was not measured."""
        row = self.losses.row_of(self.number, place)
        return () if row is None else token_changes(self.run, row)

    def queue_without(self, rows: tuple[RowPlace, ...]) -> tuple[RunDir, Source]:
        """Queue the run again without some rows; return the new run and its source. Raises UserError."""
        recipe = self.run.recipe()
        sources = list(recipe.data.sources)
        sources[self.number] = without_rows(sources[self.number], rows)
        data = msgspec.structs.replace(recipe.data, sources=tuple(sources))
        return run_actions.submit(msgspec.structs.replace(recipe, data=data)), sources[self.number]


def newest_run_on(source: Source) -> tuple[RunDir, int] | None:
    """The newest run with an adapter that trained on a source, and the source's number there."""
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
    """What was chosen: a row to look at, or rows to train without."""

    place: RowPlace
    excluded: tuple[RowPlace, ...] = ()


class RowLossScreen(ListPicker[RowChoice]):
    """Returns the row to show, or the rows to leave out; None when closed with Escape."""

    ENTER = "show row"
    DIALOG_CLASSES = "dialog wide"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "mark", "Mark"),
        Binding("x", "exclude", "Queue without"),
    ]

    def __init__(self, losses: RowLosses, source: int, excluded: Excluded) -> None:
        """``source``: rows of this source; ``excluded`` are left out already."""
        super().__init__()
        self._rows = [row for row in losses.rows if row.source == source]
        self._marked: set[RowPlace] = set()
        self._excluded = excluded
        counts = {name: sum(row.row_class == name for row in self._rows) for name in _ROW_SIGNS}
        words = "  ".join(
            f"{_ROW_SIGNS[name][0]} {count:,} {name}" for name, count in counts.items() if count
        )
        self.HEADING = f"Rows of {losses.run}: {words}"

    def on_mount(self) -> None:
        super().on_mount()
        dialog = self.query_one(".dialog")
        dialog.border_subtitle = dialog_keys([*self.BINDINGS, *ListPicker.BINDINGS], f"Enter {self.ENTER}")

    def lines(self) -> list[tuple[str, Content]]:
        columns = (
            Column[RowLoss](text=lambda row: "●" if row.place in self._marked else " ", style="$accent bold"),
            Column[RowLoss](text=lambda row: Content.assemble(_ROW_SIGNS[row.row_class]), gap=1),
            Column[RowLoss](text=_place, gap=1),
            Column[RowLoss](
                text=lambda row: Content.assemble(("loss ", "dim"), f"{row.before:5.2f} → {row.after:5.2f}"),
                gap=1,
            ),
            Column[RowLoss](text=lambda row: f"other prompt {row.other_prompt:5.2f}", style="dim", gap=1),
            Column[RowLoss](text=self._description),
        )
        lines = table(columns, self._rows, _LINE_WIDTH)
        return [(str(number), line.rstrip()) for number, line in enumerate(lines)]

    def picked(self, id_: str) -> RowChoice:
        return RowChoice(self._rows[int(id_)].place)

    def searched_text(self, id_: str) -> str:
        return ""

    def action_mark(self) -> None:
        """Mark the row under the cursor, or take its mark away."""
        number = self._number_at_cursor()
        if number is None:
            return
        self._marked ^= {self._rows[number].place}
        self._lines = self.lines()
        self._show(self._lines, self.EMPTY, str(number))
        self.query_one(ViList).action_cursor_down()

    def action_exclude(self) -> None:
        """Train without the marked rows; without marks, without the row under the cursor."""
        number = self._number_at_cursor()
        places = self._marked or ({self._rows[number].place} if number is not None else set())
        if places:
            self.dismiss(RowChoice(min(places), tuple(sorted(places))))

    def _number_at_cursor(self) -> int | None:
        option = self.query_one(ViList).highlighted_option
        return None if option is None or option.id is None else int(option.id)

    def _description(self, row: RowLoss) -> Content:
        left_out = "  excluded" if is_excluded(self._excluded, row.place) else ""
        return Content.styled(f"{visible(row.description)}{left_out}", _ROW_SIGNS[row.row_class][1])


def _place(row: RowLoss) -> str:
    return f"row {truncate_middle(visible(str(row.place)), _MAX_PLACE_WIDTH):<6}"
