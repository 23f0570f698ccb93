"""A form over settings of the recipe, made from their declarations: label, value, help on the one in hand.

The form changes nothing itself: it posts :class:`SettingsForm.Edited`, the screen makes the change
(``workstation.edit``), and :meth:`SettingsForm.show` shows the recipe as it then is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.events import Click
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.visual import Visual
from textual.widgets import Input, Static

from qlora_tui.recipe.conflicts import conflicts
from qlora_tui.recipe.difference import human
from qlora_tui.recipe.fields import Field, fields, value_of
from qlora_tui.recipe.mistakes import InvalidRecipe
from qlora_tui.recipe.overlay import parse_set
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.widgets.setting_steps import stepped

_BETWEEN_TEXTS = " | "
"""Between the items of a list of texts while it is edited."""


class SettingsForm(Vertical):
    """``paths`` name the settings, in order. Focus goes to the rows."""

    DEFAULT_CSS = """
    SettingsForm {
        height: 1fr;
    }
    SettingsForm > #setting-help {
        height: auto;
        max-height: 4;
        padding: 0 1;
        color: $text-muted;
    }
    SettingsForm > Input {
        display: none;
    }
    SettingsForm.-editing > Input {
        display: block;
    }
    """

    class Edited(Message):
        """The user chose another value for a setting; it is within its bounds."""

        def __init__(self, path: str, value: Any) -> None:
            super().__init__()
            self.path = path
            self.value = value

    def __init__(self, paths: Sequence[str], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._fields = [fields()[path] for path in paths]
        self._recipe = Recipe()

    def compose(self) -> ComposeResult:
        yield _Rows(self._fields)
        yield Static(id="setting-help", markup=False)
        yield Input(compact=True)

    def focus(self, scroll_visible: bool = True) -> SettingsForm:
        self.query_one(_Rows).focus(scroll_visible)
        return self

    def show(self, recipe: Recipe, base: Recipe) -> None:
        """Show these values; those that differ from ``base`` are marked."""
        self._recipe = recipe
        self.query_one(_Rows).show(recipe, base)
        self._show_help()

    def choose(self, path: str) -> None:
        """Put the cursor on a setting."""
        self.query_one(_Rows).go_to(next(i for i, field in enumerate(self._fields) if field.path == path))

    @property
    def field(self) -> Field:
        """The setting under the cursor."""
        return self._fields[self.query_one(_Rows).cursor]

    def on__rows_moved(self) -> None:
        self._show_help()

    def on__rows_stepped(self, event: _Rows.Stepped) -> None:
        if self.field.kind not in ("bool", "choice", "int", "float"):
            self._edit()
            return
        value = value_of(self._recipe, self.field.path)
        after = stepped(self.field, value, event.direction)
        if after != value:
            self.post_message(self.Edited(self.field.path, after))

    def on__rows_chosen(self) -> None:
        if self.field.kind in ("bool", "choice"):
            value = value_of(self._recipe, self.field.path)
            self.post_message(self.Edited(self.field.path, stepped(self.field, value, 1)))
        else:
            self._edit()

    def on__rows_reset(self, event: _Rows.Reset) -> None:
        self.post_message(self.Edited(self.field.path, event.value))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        try:
            value = self._parsed(event.value)
        except InvalidRecipe as problem:
            says = "; ".join(str(mistake.says) for mistake in problem.mistakes)
            self.query_one("#setting-help", Static).update(f"✗ {says}. It must be {self.field.expected}.")
            return
        self._leave()
        self.post_message(self.Edited(self.field.path, value))

    def key_escape(self) -> None:
        if self.has_class("-editing"):
            self._leave()

    def _edit(self) -> None:
        field = self._fields[self.query_one(_Rows).cursor]
        box = self.query_one(Input)
        box.value = self._as_text(field)
        box.border_title = field.label
        self.add_class("-editing")
        self._show_help()
        box.focus()
        box.action_end()

    def _leave(self) -> None:
        self.remove_class("-editing")
        self._show_help()
        self.focus()

    def _as_text(self, field: Field) -> str:
        value = value_of(self._recipe, field.path)
        if field.kind == "texts":
            return (", " if field.path == "lora.target_modules" else _BETWEEN_TEXTS).join(value)
        return str(value) if field.kind == "text" else human(value).replace(",", "")

    def _parsed(self, typed: str) -> Any:
        field = self.field
        if field.kind == "texts" and field.path != "lora.target_modules":
            return tuple(part.strip() for part in typed.split(_BETWEEN_TEXTS.strip()) if part.strip())
        if field.kind == "text":
            return typed.strip()
        layer = parse_set(f"{field.path}={typed.strip()}")
        value = layer[field.section][field.key] if field.section else layer[field.key]
        if field.kind == "texts":
            return tuple(value)
        return float(value) if field.kind == "float" else value

    def _show_help(self) -> None:
        field = self.field
        lines = [field.help + (f" Memory: {field.memory}" if field.memory else "")]
        if self.has_class("-editing"):
            lines = [f"{field.label}: {field.expected}. Enter takes it, esc leaves it."]
        for conflict in conflicts(self._recipe):
            if field.path in conflict.paths:
                lines.append(f"✗ {conflict.what}: {conflict.fix}.")
        text = "\n".join(lines)
        box = self.query_one("#setting-help", Static)
        if str(box.content) != text:
            box.update(text)


class _Rows(ScrollView, can_focus=True):
    """The list of settings with its cursor."""

    DEFAULT_CSS = """
    _Rows {
        height: 1fr;
        overflow-x: hidden;
        scrollbar-size-vertical: 1;
        text-wrap: nowrap;
        text-overflow: ellipsis;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "move(-8)", show=False),
        Binding("pagedown", "move(8)", show=False),
        Binding("home,g", "move(-1000)", show=False),
        Binding("end,G", "move(1000)", show=False),
        Binding("left,h", "step(-1)", show=False),
        Binding("right,l", "step(1)", show=False),
        Binding("enter,space", "choose", show=False),
        Binding("backspace", "reset", show=False),
    ]

    class Moved(Message):
        """The cursor is on another setting."""

    class Chosen(Message):
        """The setting under the cursor is to be edited or toggled."""

    class Stepped(Message):
        """It is to have its next value."""

        def __init__(self, direction: int) -> None:
            super().__init__()
            self.direction = direction

    class Reset(Message):
        """It is to be as the preset has it."""

        def __init__(self, value: Any) -> None:
            super().__init__()
            self.value = value

    def __init__(self, fields_: Sequence[Field]) -> None:
        super().__init__()
        self.cursor = 0
        self._fields = fields_
        self._recipe = self._base = Recipe()
        self._label_cells = max(len(field.label) for field in fields_)
        self._lines: list[int | str] = []
        """What stands on each line: a field's number, or a section's name."""
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

    def action_step(self, direction: int) -> None:
        """To the setting's next value."""
        self.post_message(self.Stepped(direction))

    def action_choose(self) -> None:
        """Edit or toggle the setting."""
        self.post_message(self.Chosen())

    def action_reset(self) -> None:
        """Back to the preset's value."""
        self.post_message(self.Reset(value_of(self._base, self._fields[self.cursor].path)))

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
        self.refresh_line(self._lines.index(self.cursor))

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        line = y + round(self.scroll_y)
        if line >= len(self._lines):
            return Strip.blank(width, self.rich_style)
        at = self._lines[line]
        content = Content.styled(at, "bold $primary") if isinstance(at, str) else self._row(at)
        strips = Visual.to_strips(self, content, width, 1, self.visual_style, pad=True, apply_selection=False)
        return strips[0] if strips else Strip.blank(width, self.rich_style)

    def _row(self, number: int) -> Content:
        field = self._fields[number]
        value, usual = value_of(self._recipe, field.path), value_of(self._base, field.path)
        changed = value != usual
        here = number == self.cursor
        label = f"{'▸' if here else ' '} {field.label:<{self._label_cells}}  "
        row = Content.assemble(
            (label, "bold" if here else ""),
            (human(value), "bold $accent" if changed else ""),
            (f"  * preset: {human(usual)}" if changed else "", "dim"),
        )
        if here and self.has_focus:
            room = self.scrollable_content_region.width - row.cell_length
            return row.pad_right(max(0, room)).stylize("reverse")
        return row
