"""A form over declared settings, of a recipe or of the app: label, value, and help on the selected one.

The form changes nothing itself: it posts :class:`SettingEdited`, the screen makes the change, and
:meth:`SettingsForm.show` shows the changed settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
from msgspec import Struct
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.events import Click, Key
from textual.geometry import Region, Size
from textual.message import Message
from textual.strip import Strip
from textual.widgets import Input, Static

from qlora_tui.recipe.conflicts import find_conflicts
from qlora_tui.recipe.fields import Field, format_value, get_setting
from qlora_tui.recipe.layering import parse_override
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.validation import InvalidRecipeError
from qlora_tui.tui.setting_stepper import step_value
from qlora_tui.tui.widgets.controls import LIST_KEYS, LineView, TextField, render_line

_LETTERS = "asdfghjklqwertyuiopzxcvbnmASDFGHJKLQWERTYUIOPZXCVBNM"
"""The home row first."""
_SEPARATORS = {"lora.target_modules": ", ", "quantization.skip": ", ", "model_folders": ":"}
_TEXT_SEPARATOR = " | "
"""Between the items of another list of texts while it is edited."""


@dataclass
class SettingEdited(Message):
    """The user chose another value for a setting; it is within its bounds."""

    path: str
    value: Any


class SettingList(LineView):
    """The settings under their sections, with a cursor. Left and Right step the one under it."""

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

    class Typing(Message):
        """The setting under the cursor is to be typed."""

    def __init__(self, fields: Sequence[Field], base_name: str) -> None:
        """``base_name``: what the settings are compared with: ``preset``, or ``default``."""
        super().__init__()
        self.cursor = 0
        self._fields = fields
        self._base_name = base_name
        self._letters: dict[str, int] = {}
        """The setting that each letter jumps to; empty unless a jump was started."""
        self._values: Struct | None = None
        self._base: Struct | None = None
        self._label_cells = max(len(field.label) for field in fields)
        self._lines: list[int | str] = []
        """The content of each line: a field's index, or a section's name."""
        for number, field in enumerate(fields):
            if field.section != (fields[number - 1].section if number else ""):
                self._lines.append(field.section)
            self._lines.append(number)

    @property
    def field(self) -> Field:
        """The setting under the cursor."""
        return self._fields[self.cursor]

    @property
    def value(self) -> Any:
        """Its value."""
        return get_setting(self._values, self.field.path) if self._values is not None else None

    def on_mount(self) -> None:
        self.virtual_size = Size(1, len(self._lines))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return len(self._lines)

    def show(self, values: Struct, base: Struct) -> None:
        if (values, base) != (self._values, self._base):
            self._values, self._base = values, base
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
        """Step the setting to its next value; a text is typed."""
        if self.field.kind not in ("bool", "choice", "int", "float") or self.value is None:
            self.post_message(self.Typing())
        elif (after := step_value(self.field, self.value, direction)) != self.value:
            self.post_message(SettingEdited(self.field.path, after))

    def action_choose(self) -> None:
        """Type the setting, or step one that has few values."""
        if self.field.kind in ("bool", "choice"):
            self.action_step(1)
        else:
            self.post_message(self.Typing())

    def action_reset(self) -> None:
        """Reset the setting to the value that it is compared with."""
        if self._base is not None:
            self.post_message(SettingEdited(self.field.path, get_setting(self._base, self.field.path)))

    def on_click(self, event: Click) -> None:
        line = event.y + round(self.scroll_y)
        at = self._lines[line] if 0 <= line < len(self._lines) else ""
        if isinstance(at, int):
            if at == self.cursor:
                self.action_choose()
            self.go_to(at)

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
        if self._values is None or self._base is None:
            return Content(f"  {field.label}")
        value, usual = get_setting(self._values, field.path), get_setting(self._base, field.path)
        changed = value != usual
        here = number == self.cursor
        letter = next((letter for letter, at in self._letters.items() if at == number), "")
        label = f" {field.label:<{self._label_cells}}  "
        meaning = field.zero_meaning if value == 0 else ""
        row = Content.assemble(
            (letter, "bold reverse $key") if letter else "▸" if here else " ",
            (label, "bold" if here else ""),
            (format_value(value), "bold $primary" if changed else ""),
            (f" ({meaning})" if meaning else "", "dim"),
            (f"  * {self._base_name}: {format_value(usual)}" if changed else "", "dim"),
        )
        if here and self.has_focus:
            width_left = self.scrollable_content_region.width - row.cell_length
            return row.pad_right(max(0, width_left)).stylize("reverse")
        return row


class SettingsForm(Vertical):
    """The list of settings, help on the one under the cursor, and a field to type it."""

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
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave_field", show=False)]

    def __init__(
        self,
        fields: Sequence[Field],
        base_name: str = "preset",
        *,
        validate: Callable[[str, Any], str] = lambda path, value: "",
        id: str | None = None,
    ) -> None:
        """Show nothing yet.

        Args:
            base_name: what the settings are compared with.
            validate: returns what is wrong with a typed value of a path; empty if nothing is.
        """
        super().__init__(id=id)
        self.list = SettingList(fields, base_name)
        self._validate = validate
        self._values: Struct | None = None

    def compose(self) -> ComposeResult:
        yield self.list
        yield Static(id="setting-help", markup=False)
        yield TextField(compact=True)

    def focus(self, scroll_visible: bool = True) -> SettingsForm:
        self.list.focus(scroll_visible)
        return self

    def show(self, values: Struct, base: Struct) -> None:
        """Show these values; those that differ from ``base`` are marked."""
        self._values = values
        self.list.show(values, base)
        self._show_help()

    @property
    def field(self) -> Field:
        """The setting under the cursor."""
        return self.list.field

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return self.has_class("-editing") if action == "leave_field" else True

    def on_setting_list_moved(self) -> None:
        self._show_help()

    def on_setting_list_typing(self) -> None:
        box = self.query_one(Input)
        box.value = _as_text(self.field, self.list.value)
        box.border_title = self.field.label
        self.add_class("-editing")
        self._show_help()
        box.focus()
        box.action_end()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        try:
            value = _parsed(self.field, event.value.strip())
            wrong = self._validate(self.field.path, value)
        except (InvalidRecipeError, ValueError) as problem:
            wrong = f"{_problem(self.field, problem)}."
        if wrong:
            self.query_one("#setting-help", Static).update(f"✗ {wrong}")
            return
        self.action_leave_field()
        self.post_message(SettingEdited(self.field.path, value))

    def action_leave_field(self) -> None:
        """Leave the field without a change."""
        self.remove_class("-editing")
        self._show_help()
        self.focus()

    def _show_help(self) -> None:
        field = self.field
        lines = [field.help + (f" Memory: {field.memory}" if field.memory else "")]
        if self.has_class("-editing"):
            # Quotes belong in a file.
            expected = field.expected.replace(" in quotes", "")
            lines = [f"{field.label}: {expected}. Enter: apply · Esc: cancel"]
        if isinstance(self._values, Recipe):
            for conflict in find_conflicts(self._values):
                if field.path in conflict.paths:
                    lines.append(f"✗ {conflict.what}: {conflict.fix}.")
        text = "\n".join(lines)
        box = self.query_one("#setting-help", Static)
        if str(box.content) != text:
            box.update(text)


def _separator(field: Field) -> str:
    return _SEPARATORS.get(field.path, _TEXT_SEPARATOR)


def _as_text(field: Field, value: Any) -> str:
    if value is None:
        return ""
    if field.kind == "texts":
        return _separator(field).join(value)
    if field.kind == "numbers":
        return ", ".join(f"{pattern}={number:g}" for pattern, number in value.items())
    return str(value) if field.kind == "text" else format_value(value).replace(",", "")


def _parsed(field: Field, typed: str) -> Any:
    """Return the value that was typed. Raises InvalidRecipeError or ValueError."""
    if field.kind == "texts" and field.path != "lora.target_modules":
        return tuple(part.strip() for part in typed.split(_separator(field).strip()) if part.strip())
    if field.kind == "text":
        return typed
    if not typed and field.default is None:
        return None
    if field.kind in ("int", "float"):
        return msgspec.convert(typed.replace(",", ""), field.type, strict=False)
    layer = parse_override(f"{field.path}={typed}")
    value = layer[field.section][field.key] if field.section else layer[field.key]
    return msgspec.convert(value, field.type)


def _problem(field: Field, problem: Exception) -> str:
    """Say what is wrong with a typed value, with the setting's label for its path."""
    if isinstance(problem, InvalidRecipeError):
        return "; ".join(issue.message.replace(issue.path, field.label, 1) for issue in problem.issues)
    return f"{field.label} must be {field.expected}"
