"""A window with the training rows of a run, the most suspicious first: look at one, or train without some."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from textual.binding import Binding, BindingType
from textual.content import Content

from qlora_tui.runs.row_losses import RowClass, RowLoss, RowLosses
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.screens.modals.list_picker import ListPicker
from qlora_tui.tui.widgets.vi_list import ViList

SIGNS: dict[RowClass, tuple[str, str]] = {
    "never learned": ("✗", "$error"),
    "contradicting": ("≠", "$warning"),
    "memorized": ("=", "$accent"),
    "learned": ("✓", "$success"),
}
"""Sign and style of each class: the sign says it without color too."""


class RowChoice(NamedTuple):
    """What was chosen: a row to look at, or rows to train without."""

    row: int
    excluded: tuple[int, ...] = ()


class RowLossScreen(ListPicker[RowChoice]):
    """Returns the row to show, or the rows to leave out; None when closed with Escape."""

    ENTER = "show row"
    DIALOG_CLASSES = "dialog wide"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "mark", "Mark"),
        Binding("x", "exclude", "Queue without"),
    ]

    def __init__(self, losses: RowLosses, source: int, excluded: frozenset[int]) -> None:
        """``source``: rows of this source; ``excluded`` are left out already."""
        super().__init__()
        self._rows = [row for row in losses.rows if row.source == source]
        self._marked: set[int] = set()
        self._excluded = excluded
        counts = {name: sum(row.row_class == name for row in self._rows) for name in SIGNS}
        words = "  ".join(f"{SIGNS[name][0]} {count:,} {name}" for name, count in counts.items() if count)
        self.HEADING = f"Rows of {losses.run}: {words}"

    def on_mount(self) -> None:
        super().on_mount()
        dialog = self.query_one(".dialog")
        dialog.border_subtitle = dialog_keys([*self.BINDINGS, *ListPicker.BINDINGS], f"Enter {self.ENTER}")

    def lines(self) -> list[tuple[str, Content]]:
        return [(str(row.row), self._line(row)) for row in self._rows]

    def picked(self, id_: str) -> RowChoice:
        return RowChoice(int(id_))

    def searched_text(self, id_: str) -> str:
        return ""

    def action_mark(self) -> None:
        """Mark the row under the cursor, or take its mark away."""
        row = self._row_at_cursor()
        if row is None:
            return
        self._marked ^= {row}
        self._lines = self.lines()
        self._show(self._lines, self.EMPTY, str(row))
        self.query_one(ViList).action_cursor_down()

    def action_exclude(self) -> None:
        """Train without the marked rows; without marks, without the row under the cursor."""
        row = self._row_at_cursor()
        rows = self._marked or ({row} if row is not None else set())
        if rows:
            self.dismiss(RowChoice(min(rows), tuple(sorted(rows))))

    def _row_at_cursor(self) -> int | None:
        option = self.query_one(ViList).highlighted_option
        return None if option is None or option.id is None else int(option.id)

    def _line(self, row: RowLoss) -> Content:
        sign, style = SIGNS[row.row_class]
        more = "" if row.contradicts is None else f" row {row.contradicts:,}"
        left_out = "  excluded" if row.row in self._excluded else ""
        return Content.assemble(
            ("● " if row.row in self._marked else "  ", "$accent bold"),
            (f"{sign} ", style),
            f"row {row.row:<6,} ",
            ("loss ", "dim"),
            f"{row.before:5.2f} → {row.after:5.2f} ",
            (f"other prompt {row.other_prompt:5.2f}  ", "dim"),
            (f"{row.row_class}{more}{left_out}", style),
        )
