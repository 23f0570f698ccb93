"""Settings as a list with a cursor: the upper part of a settings form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click, Key
from textual.geometry import Region, Size
from textual.message import Message
from textual.strip import Strip

from qlora_tui.recipe.diff import format_value
from qlora_tui.recipe.fields import Field, get_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.widgets.controls import LIST_KEYS
from qlora_tui.tui.widgets.line_widgets import LineView, render_line

_LETTERS = "asdfghjklqwertyuiopzxcvbnmASDFGHJKLQWERTYUIOPZXCVBNM"
"""The home row first."""


class SettingList(LineView):
    """The list of settings with its cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        *LIST_KEYS,
        Binding("left,h", "step(-1)", show=False),
        Binding("right,l", "step(1)", show=False),
        Binding("enter,space", "choose", show=False),
        Binding("backspace", "reset", show=False),
        Binding("apostrophe", "jump", show=False),
    ]

    class Moved(Message):
        """The cursor is on another setting."""

    class Chosen(Message):
        """The setting under the cursor is to be edited or toggled."""

    class Stepped(Message):
        """The setting under the cursor is to be stepped to its next value."""

        def __init__(self, direction: int) -> None:
            super().__init__()
            self.direction = direction

    class Reset(Message):
        """The setting under the cursor is to be reset to the preset's value."""

        def __init__(self, value: Any) -> None:
            super().__init__()
            self.value = value

    def __init__(self, fields_: Sequence[Field]) -> None:
        super().__init__()
        self.cursor = 0
        self._fields = fields_
        self._letters: dict[str, int] = {}
        """The setting that each letter jumps to; empty unless a jump was started."""
        self._recipe = self._base = Recipe()
        self._label_cells = max(len(field.label) for field in fields_)
        self._lines: list[int | str] = []
        """The content of each line: a field's index, or a section's name."""
        for number, field in enumerate(fields_):
            if field.section != (fields_[number - 1].section if number else ""):
                self._lines.append(field.section)
            self._lines.append(number)
        if len({field.section for field in fields_}) == 1:
            self._lines = list(range(len(fields_)))

    def on_mount(self) -> None:
        self.virtual_size = Size(1, len(self._lines))

    def show(self, recipe: Recipe, base: Recipe) -> None:
        if (recipe, base) != (self._recipe, self._base):
            self._recipe, self._base = recipe, base
            self.refresh()

    def go_to(self, number: int) -> None:
        before, self.cursor = self.cursor, min(max(number, 0), len(self._fields) - 1)
        if self.cursor == before:
            return
        line = self._lines.index(self.cursor)
        # The first setting brings its section's name into view.
        top = 0 if self.cursor == 0 else line
        self.scroll_to_region(Region(0, top, 1, line - top + 1), animate=False, force=True)
        for moved in (before, self.cursor):
            self.refresh_line(self._lines.index(moved))
        self.post_message(self.Moved())

    def action_move(self, places: int) -> None:
        """Move the cursor; the ends stop it."""
        self.go_to(self.cursor + places)

    def action_jump(self) -> None:
        """Label each setting in view with a letter; the next key goes there, any other leaves it."""
        top = round(self.scroll_y)
        shown = self._lines[top : top + self.scrollable_content_region.height]
        numbers = [at for at in shown if isinstance(at, int)]
        self._letters = dict(zip(_LETTERS, numbers, strict=False))
        self.refresh()

    def on_key(self, event: Key) -> None:
        """While letters are shown, any key ends the jump."""
        if not self._letters:
            return
        event.stop()
        event.prevent_default()
        number = self._letters.get(event.character or "", self.cursor)
        self._letters = {}
        self.refresh()
        self.go_to(number)

    def action_step(self, direction: int) -> None:
        """Step the setting to its next value."""
        self.post_message(self.Stepped(direction))

    def action_choose(self) -> None:
        """Edit or toggle the setting."""
        self.post_message(self.Chosen())

    def action_reset(self) -> None:
        """Reset the setting to the preset's value."""
        self.post_message(self.Reset(get_setting(self._base, self._fields[self.cursor].path)))

    def on_click(self, event: Click) -> None:
        line = event.y + round(self.scroll_y)
        if 0 <= line < len(self._lines):
            at = self._lines[line]
            if isinstance(at, int):
                chosen = at == self.cursor
                self.go_to(at)
                if chosen:
                    self.action_choose()

    def on_focus(self) -> None:
        self.refresh_line(self._lines.index(self.cursor))

    def on_blur(self) -> None:
        self._letters = {}
        self.refresh()

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        line = y + round(self.scroll_y)
        if line >= len(self._lines):
            return Strip.blank(width, self.rich_style)
        at = self._lines[line]
        content = Content.styled(at, "bold $primary") if isinstance(at, str) else self._row(at)
        return render_line(self, content, width)

    def _row(self, number: int) -> Content:
        field = self._fields[number]
        value, usual = get_setting(self._recipe, field.path), get_setting(self._base, field.path)
        changed = value != usual
        here = number == self.cursor
        letter = next((letter for letter, at in self._letters.items() if at == number), "")
        label = f" {field.label:<{self._label_cells}}  "
        meaning = field.zero_meaning if value == 0 else ""
        row = Content.assemble(
            (letter, "bold reverse $accent") if letter else "▸" if here else " ",
            (label, "bold" if here else ""),
            (format_value(value), "bold $accent" if changed else ""),
            (f" ({meaning})" if meaning else "", "dim"),
            (f"  * preset: {format_value(usual)}" if changed else "", "dim"),
        )
        if here and self.has_focus:
            width_left = self.scrollable_content_region.width - row.cell_length
            return row.pad_right(max(0, width_left)).stylize("reverse")
        return row
