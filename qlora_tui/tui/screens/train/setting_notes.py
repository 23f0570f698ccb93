"""What the settings of the form do, beside it in a large window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from textual.content import Content

from qlora_tui.recipe.fields import Field
from qlora_tui.tui.widgets.line_widgets import DiffWidget

_INDENT = 2


class SettingNotes(DiffWidget):
    """The help of as many settings as there is room for; that of the selected one is marked.

    It turns pages instead of scrolling, so that a step of the cursor changes two notes and not all of them.
    """

    DEFAULT_CSS = """
    SettingNotes {
        height: 1fr;
    }
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        super().__init__()
        self._fields = fields
        self._selected = fields[0]

    def select(self, field: Field) -> None:
        """Mark this setting, on its page."""
        self._selected = field
        self.redraw()

    def draw(self, width: int, height: int) -> list[Content]:
        return next(page for page, shown in self._pages(width, height) if self._selected in shown)

    def _pages(self, width: int, height: int) -> Iterator[tuple[list[Content], list[Field]]]:
        """Pages of at most ``height`` lines with their settings; a note is not divided between two."""
        page: list[Content] = []
        shown: list[Field] = []
        for field in self._fields:
            lines = note_lines(field, width, is_selected=field == self._selected)
            if shown and len(page) + len(lines) > height:
                yield page, shown
                page, shown = [], []
            page += lines
            shown.append(field)
        yield page, shown


def note_lines(field: Field, width: int, *, is_selected: bool) -> list[Content]:
    """``▸ Epochs  training.epochs``, and below it what the setting does and its effect on memory."""
    head = Content.assemble(
        ("▸ " if is_selected else "  ", "bold $accent"),
        (field.label, "bold" if is_selected else "$primary"),
        (f"  {field.path}", "dim"),
    )
    text = Content(field.help + (f" Memory: {field.memory}" if field.memory else ""))
    return [head, *(Content(" " * _INDENT) + line for line in text.wrap(max(20, width - _INDENT)))]
