"""A form over settings of the recipe, from their declarations: label, value, help on the selected one.

The form changes nothing itself: it posts :class:`SettingsForm.Edited`, the screen makes the change
(``QloraApp.edit``), and :meth:`SettingsForm.show` shows the changed recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Input, Static

from qlora_tui.recipe.conflicts import find_conflicts
from qlora_tui.recipe.diff import format_value
from qlora_tui.recipe.errors import InvalidRecipeError
from qlora_tui.recipe.fields import Field, fields, get_setting
from qlora_tui.recipe.layering import parse_override
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.screens.train.setting_list import SettingList
from qlora_tui.tui.setting_stepper import step_value
from qlora_tui.tui.widgets.controls import TextField

_TEXT_SEPARATOR = " | "
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
        yield SettingList(self._fields)
        yield Static(id="setting-help", markup=False)
        yield TextField(compact=True)

    def focus(self, scroll_visible: bool = True) -> SettingsForm:
        self.query_one(SettingList).focus(scroll_visible)
        return self

    def show(self, recipe: Recipe, base: Recipe) -> None:
        """Show these values; those that differ from ``base`` are marked."""
        self._recipe = recipe
        self.query_one(SettingList).show(recipe, base)
        self._show_help()

    @property
    def field(self) -> Field:
        """The setting under the cursor."""
        return self._fields[self.query_one(SettingList).cursor]

    def on_setting_list_moved(self) -> None:
        self._show_help()

    def on_setting_list_stepped(self, event: SettingList.Stepped) -> None:
        if self.field.kind not in ("bool", "choice", "int", "float"):
            self._edit()
            return
        value = get_setting(self._recipe, self.field.path)
        after = step_value(self.field, value, event.direction)
        if after != value:
            self.post_message(self.Edited(self.field.path, after))

    def on_setting_list_chosen(self) -> None:
        if self.field.kind in ("bool", "choice"):
            value = get_setting(self._recipe, self.field.path)
            self.post_message(self.Edited(self.field.path, step_value(self.field, value, 1)))
        else:
            self._edit()

    def on_setting_list_reset(self, event: SettingList.Reset) -> None:
        self.post_message(self.Edited(self.field.path, event.value))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        try:
            value = self._parsed(event.value)
        except InvalidRecipeError as problem:
            says = "; ".join(
                issue.message.replace(issue.path, self.field.label, 1) for issue in problem.issues
            )
            self.query_one("#setting-help", Static).update(f"✗ {says}.")
            return
        self._leave()
        self.post_message(self.Edited(self.field.path, value))

    def key_escape(self) -> None:
        if self.has_class("-editing"):
            self._leave()

    def _edit(self) -> None:
        field = self._fields[self.query_one(SettingList).cursor]
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
        value = get_setting(self._recipe, field.path)
        if field.kind == "texts":
            return (", " if field.path == "lora.target_modules" else _TEXT_SEPARATOR).join(value)
        if field.kind == "numbers":
            return ", ".join(f"{pattern}={number:g}" for pattern, number in value.items())
        return str(value) if field.kind == "text" else format_value(value).replace(",", "")

    def _parsed(self, typed: str) -> Any:
        field = self.field
        if field.kind == "texts" and field.path != "lora.target_modules":
            return tuple(part.strip() for part in typed.split(_TEXT_SEPARATOR.strip()) if part.strip())
        if field.kind == "text":
            return typed.strip()
        layer = parse_override(f"{field.path}={typed.strip()}")
        value = layer[field.section][field.key] if field.section else layer[field.key]
        return msgspec.convert(value, field.type)

    def _show_help(self) -> None:
        field = self.field
        lines = [field.help + (f" Memory: {field.memory}" if field.memory else "")]
        if self.has_class("-editing"):
            # Quotes belong in a file.
            expected = field.expected.replace(" in quotes", "")
            lines = [f"{field.label}: {expected}. Enter: apply · Esc: cancel"]
        for conflict in find_conflicts(self._recipe):
            if field.path in conflict.paths:
                lines.append(f"✗ {conflict.what}: {conflict.fix}.")
        text = "\n".join(lines)
        box = self.query_one("#setting-help", Static)
        if str(box.content) != text:
            box.update(text)
