"""Selects the format in which rows are read, by what each format makes of the first rows."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content

from qlora_tui.data.format_choices import AUTO, FormatChoice
from qlora_tui.tui.screens.modals.list_picker import ListPicker


class FormatPickerScreen(ListPicker[str]):
    """Returns the chosen format; None when closed with Escape."""

    ENTER = "read as"
    DIALOG_CLASSES = "dialog wide"

    def __init__(self, choices: Sequence[FormatChoice], now: str) -> None:
        super().__init__()
        self.HEADING = f"Format: how the first {choices[0].rows:,} rows are read"
        self.selected = now
        self._choices = choices

    def lines(self) -> list[tuple[str, Content]]:
        width = max(len(_name(choice)) for choice in self._choices)
        return [
            (choice.format, _line(choice, width, is_now=choice.format == self.selected))
            for choice in self._choices
        ]

    def picked(self, id_: str) -> str:
        return id_


def _name(choice: FormatChoice) -> str:
    return f"{AUTO}: {choice.detected}" if choice.detected else choice.format


def _line(choice: FormatChoice, width: int, *, is_now: bool) -> Content:
    sign, style = (
        ("✗", "$error")
        if not choice.read
        else ("✓", "$success")
        if choice.read == choice.rows
        else ("!", "$warning")
    )
    count = f"{choice.read:,}".rjust(len(f"{choice.rows:,}"))
    return Content.assemble(
        (f"{sign} ", style),
        (f"{_name(choice):<{width}}", "bold" if is_now else ""),
        f"  {count} rows",
        ("  now" if is_now else "     ", "$accent"),
        (f"  {choice.problem or choice.example}", "dim"),
    )
