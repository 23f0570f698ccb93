"""Presets: browse with what each would change, open, save as, edit, import, export, delete with undo."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Input, Static

from qlora_tui.recipe.presets import (
    Preset,
    list_presets,
)
from qlora_tui.tui.commands import screen_commands
from qlora_tui.tui.key_names import bare_key
from qlora_tui.tui.recipe_undo import notify_opened
from qlora_tui.tui.screens.modals.help import screen_help
from qlora_tui.tui.screens.presets.preset_actions import PresetActions
from qlora_tui.tui.screens.presets.preset_preview import preset_line, preset_need, preview
from qlora_tui.tui.widgets.controls import TextField, ViList

_COMMANDS = screen_commands("presets")
HELP_TEXT = (
    "A preset is part of a recipe. Opening one keeps your model and data; the preview lists what would "
    "change. Saving one leaves out model and data. Your own preset replaces a shipped one of the same "
    "name."
)


class PresetsScreen(PresetActions):
    """Shipped presets and the user's own, beside what opening one would change."""

    CSS_PATH = "presets.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Close"),
        Binding("question_mark", "help", "Help"),
        *(command.binding() for command in _COMMANDS),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._presets: list[Preset] = []
        self._filter = ""

    @property
    def current(self) -> Preset | None:
        name = self.query_one(ViList).current
        return next((preset for preset in self._presets if preset.name == name), None)

    def compose(self) -> ComposeResult:
        with Vertical(id="presets-dialog") as dialog:
            hints = ((bare_key("presets.filter"), "filter"), ("Esc", "close"), ("?", "help"))
            dialog.border_title = Content.assemble("Presets  ", _key_hints(hints))
            dialog.border_subtitle = _key_hints(
                (("Enter", "open"), *((bare_key(each.id), each.label.lower()) for each in _SHOWN))
            )
            yield TextField(placeholder="Part of a name or note", compact=True, id="preset-filter")
            with Horizontal():
                yield ViList(id="preset-list")
                with VerticalScroll(id="preview-side", can_focus=False):
                    yield Static(id="preview")
            with Horizontal(id="save-line"):
                yield Static("Save as ", id="save-label")
                yield TextField(placeholder="name (optionally, name: note)", compact=True, id="save-name")

    def on_mount(self) -> None:
        self.query_one("#save-line").display = False
        self.query_one("#preset-filter").display = False
        self.refresh_list(self.qlora_app.workbench.preset)
        self.query_one(ViList).focus()

    def on_vi_list_resized(self) -> None:
        self.refresh_list()

    def on_option_list_option_highlighted(self) -> None:
        """Show what opening it would change."""
        self._show_preview()

    def on_option_list_option_selected(self) -> None:
        """Open it; model and data stay."""
        preset, workbench = self.current, self.qlora_app.workbench
        before = workbench.recipe
        if preset is not None and self.qlora_app.try_or_show_error(
            lambda: workbench.open_preset(preset.name)
        ):
            self.qlora_app.recipe_edited()
            self.dismiss()
            notify_opened(self.qlora_app, before)

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter the list while typing."""
        if event.input.id == "preset-filter":
            self._filter = event.value.casefold()
            self.refresh_list()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Go from the filter to the list, or save the recipe under the name given."""
        if event.input.id == "preset-filter":
            event.input.display = bool(event.value)
            self.query_one(ViList).focus()
            return
        name, _, note = event.value.partition(":")
        if name.strip():
            self.save(name.strip(), note.strip(), overwrite=False)

    def action_help(self) -> None:
        """Show the keys of this list."""
        self.app.push_screen(screen_help("presets", HELP_TEXT, _COMMANDS))

    def action_leave(self) -> None:
        """Leave the name field first, then the filter, then the screen."""
        line, field = self.query_one("#save-line"), self.query_one("#preset-filter", Input)
        if line.display:
            line.display = False
        elif field.display:
            field.display, field.value = False, ""
        else:
            self.dismiss()
            return
        self.query_one(ViList).focus()

    def action_filter(self) -> None:
        """Show only presets that contain a text."""
        field = self.query_one("#preset-filter", Input)
        field.display = True
        field.focus()

    def action_scroll_preview(self, lines: int) -> None:
        """Scroll what the preset would change."""
        self.query_one("#preview-side").scroll_relative(y=3 * lines, animate=False)

    def action_save_as(self) -> None:
        """Ask for a name."""
        self.query_one("#save-line").display = True
        self.query_one("#save-name", Input).focus()

    def refresh_list(self, select: str | None = None) -> None:
        self._presets = list_presets()
        current = self.qlora_app.workbench.preset
        shown = [p for p in self._presets if self._filter in f"{p.name} {p.note}".casefold()]
        list_, budget = self.query_one(ViList), self.qlora_app.memory_budget
        recipe, model = self.qlora_app.workbench.recipe, self.qlora_app.workbench.architecture()
        width = list_.scrollable_content_region.width
        lines = [
            (p.name, preset_line(p, current, preset_need(p, recipe, model, budget), width)) for p in shown
        ]
        list_.show(lines, select)
        self._show_preview()

    def _show_preview(self) -> None:
        preset, workbench = self.current, self.qlora_app.workbench
        if preset is None:
            self.query_one("#preview", Static).update("No preset matches. Press Esc to show all.")
        else:
            shown = preview(
                preset,
                workbench.recipe,
                workbench.architecture(),
                self.qlora_app.memory_budget,
                self.query_one("#preview-side").scrollable_content_region.width,
            )
            self.query_one("#preview", Static).update(shown)


_SHOWN = [command for command in _COMMANDS if command.footer and command.id != "presets.filter"]
"""Commands named in the lower border: there is no footer in a modal."""


def _key_hints(hints: Iterable[tuple[str, str]]) -> Content:
    """``Enter open  s save``: keys and verbs, as in the borders of panels."""
    shown = [
        Content.assemble((key, "$footer-key-foreground bold"), (f" {verb}", "not bold $text-muted"))
        for key, verb in hints
    ]
    return Content("  ").join(shown)
