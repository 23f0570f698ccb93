"""A window with the training rows of a run, the most suspicious first: look at one, or train without some."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from textual.binding import Binding, BindingType
from textual.content import Content

from qlora_tui.data.excluded_rows import Excluded, RowPlace, is_excluded
from qlora_tui.formatting import truncate_middle
from qlora_tui.runs.row_losses import RowClass, RowLoss, RowLosses
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.screens.modals.list_picker import ListPicker
from qlora_tui.tui.widgets.controls import ViList
from qlora_tui.visible import visible

SIGNS: dict[RowClass, tuple[str, str]] = {
    "never learned": ("✗", "$error"),
    "contradicting": ("≠", "$warning"),
    "memorized": ("=", "$accent"),
    "learned": ("✓", "$success"),
}
"""Sign and style of each class: the sign says it without color too."""

_MIN_PLACE_WIDTH, _MAX_PLACE_WIDTH = 6, 22
"""Columns of a row's number, with the name of its file where the source has several."""


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
        widest = max((len(visible(str(row.place))) for row in self._rows), default=0)
        self._place_width = min(max(_MIN_PLACE_WIDTH, widest), _MAX_PLACE_WIDTH)
        counts = {name: sum(row.row_class == name for row in self._rows) for name in SIGNS}
        words = "  ".join(f"{SIGNS[name][0]} {count:,} {name}" for name, count in counts.items() if count)
        self.HEADING = f"Rows of {losses.run}: {words}"

    def on_mount(self) -> None:
        super().on_mount()
        dialog = self.query_one(".dialog")
        dialog.border_subtitle = dialog_keys([*self.BINDINGS, *ListPicker.BINDINGS], f"Enter {self.ENTER}")

    def lines(self) -> list[tuple[str, Content]]:
        return [(str(number), self._line(row)) for number, row in enumerate(self._rows)]

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

    def _line(self, row: RowLoss) -> Content:
        sign, style = SIGNS[row.row_class]
        left_out = "  excluded" if is_excluded(self._excluded, row.place) else ""
        return Content.assemble(
            ("● " if row.place in self._marked else "  ", "$accent bold"),
            (f"{sign} ", style),
            f"row {truncate_middle(visible(str(row.place)), self._place_width):<{self._place_width}} ",
            ("loss ", "dim"),
            f"{row.before:5.2f} → {row.after:5.2f} ",
            (f"other prompt {row.other_prompt:5.2f}  ", "dim"),
            (f"{visible(row.description)}{left_out}", style),
        )
