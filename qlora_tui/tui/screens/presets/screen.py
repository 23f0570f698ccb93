"""Presets: browse with what each would change, open, save as, edit, import, export, delete with undo."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from textual.app import ComposeResult, SuspendNotSupported
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from qlora_tui.errors import UserError
from qlora_tui.formatting import format_path
from qlora_tui.recipe.presets import (
    OverwriteError,
    Preset,
    PresetSnapshot,
    delete,
    list_presets,
    restore,
    take_snapshot,
)
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.key_names import bare_key, key_name
from qlora_tui.tui.recipe_undo import notify_opened
from qlora_tui.tui.screens.modals.confirm import ConfirmScreen
from qlora_tui.tui.screens.modals.error import ErrorScreen
from qlora_tui.tui.screens.modals.help import screen_help
from qlora_tui.tui.screens.modals.text_prompt import TextPromptScreen
from qlora_tui.tui.screens.presets.commands import COMMANDS
from qlora_tui.tui.screens.presets.preset_files import edit, export_preset, import_preset, save_as
from qlora_tui.tui.screens.presets.preset_preview import preset_line, preset_need, preview
from qlora_tui.tui.screens.registry import PRESETS
from qlora_tui.tui.widgets.text_field import TextField
from qlora_tui.tui.widgets.vi_list import ViList

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

HELP_TEXT = (
    "A preset is part of a recipe. Opening one keeps your model and data; the preview lists what would "
    "change. Saving one leaves out model and data. Your own preset replaces a shipped one of the same "
    "name."
)


@dataclass(frozen=True)
class _PresetChange:
    """A change of a user's preset file, for undo."""

    before: PresetSnapshot
    after: PresetSnapshot
    previous_preset: tuple[str, Recipe] | None
    """The preset that the recipe had started from when it was saved."""


class PresetsScreen(ModalScreen[None]):
    """Shipped presets and the user's own, beside what opening one would change."""

    CSS_PATH = "presets.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Close"),
        Binding("question_mark", "help", "Help"),
        *(command.binding() for command in COMMANDS),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._presets: list[Preset] = []
        self._filter = ""
        self._undo: list[_PresetChange] = []
        """Changes made in this window, oldest first."""

    @property
    def qlora_app(self) -> QloraApp:
        """The app, typed."""
        return cast("QloraApp", self.app)

    @property
    def _current(self) -> Preset | None:
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
        self._refresh_list(self.qlora_app.workbench.preset)
        self.query_one(ViList).focus()

    def on_vi_list_resized(self) -> None:
        self._refresh_list()

    def on_option_list_option_highlighted(self) -> None:
        """Show what opening it would change."""
        self._show_preview()

    def on_option_list_option_selected(self) -> None:
        """Open it; model and data stay."""
        preset, workbench = self._current, self.qlora_app.workbench
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
            self._refresh_list()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Go from the filter to the list, or save the recipe under the name given."""
        if event.input.id == "preset-filter":
            event.input.display = bool(event.value)
            self.query_one(ViList).focus()
            return
        name, _, note = event.value.partition(":")
        if name.strip():
            self._save(name.strip(), note.strip(), overwrite=False)

    def action_help(self) -> None:
        """Show the keys of this list."""
        self.app.push_screen(screen_help(PRESETS.name, HELP_TEXT, COMMANDS))

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

    def action_delete(self) -> None:
        """Delete one of the user's own."""
        preset = self._current
        if preset is not None and self.qlora_app.try_or_show_error(
            lambda: self._remember(delete(preset.name))
        ):
            self.notify(f"Deleted {preset.name}. Press {key_name('presets.undo')} here to undo.")
            self._refresh_list()

    def action_undo(self) -> None:
        """Undo the last deletion, save or import in this window."""
        if not self._undo:
            key = key_name("app.undo")
            self.notify(f"No preset was changed here. Press Esc, then {key} to undo changes of the recipe.")
            return
        last = self._undo[-1]
        # What was edited since is somebody's work: then restore asks.
        self._restore(last, overwrite=take_snapshot(last.before.name) == last.after)

    def _restore(self, change: _PresetChange, *, overwrite: bool) -> None:
        before = change.before
        try:
            restore(before, overwrite=overwrite)
        except OverwriteError as problem:
            self._confirm_overwrite(problem, lambda: self._restore(change, overwrite=True))
        except UserError as problem:
            self.app.push_screen(ErrorScreen(problem))
        else:
            self._undo.pop()
            if change.previous_preset is not None:
                self.qlora_app.workbench.undo_saved_as(before.name, change.previous_preset)
                self.qlora_app.recipe_edited()
            self._refresh_list(before.name)
            done = "Removed" if before.content is None else "Restored"
            self.notify(f"Undone. {done} your preset {before.name}.")

    def _remember(self, before: PresetSnapshot, previous_preset: tuple[str, Recipe] | None = None) -> None:
        self._undo.append(_PresetChange(before, take_snapshot(before.name), previous_preset))

    def action_edit(self) -> None:
        """Open the user's file in the editor, and check it on return."""
        preset = self._current
        if preset is None:
            return
        try:
            with self.app.suspend():
                tried = self.qlora_app.try_or_show_error(lambda: edit(preset))
        except SuspendNotSupported:
            self.notify(
                "This terminal cannot run an editor inside the app. "
                f"Edit the file yourself: {format_path(preset.path)}",
                severity="warning",
            )
            return
        self._refresh_list(preset.name)
        after = self._current
        if tried and after is not None and after.problem is not None:
            self.app.push_screen(ErrorScreen(after.problem))

    def action_import_preset(self) -> None:
        """Ask for a file and copy it to the user's presets."""
        self._ask(
            "Import a preset", "Path of a TOML file:", lambda path: self._import_preset(path, overwrite=False)
        )

    def action_export_preset(self) -> None:
        """Ask for a place and copy the preset there."""
        preset = self._current
        if preset is not None:
            self._ask(
                f"Export {preset.name}",
                "Path of a file or folder:",
                lambda path: self._export_preset(preset, path),
            )

    def _import_preset(self, path: Path, *, overwrite: bool) -> None:
        try:
            self._remember(import_preset(path, overwrite=overwrite))
        except OverwriteError as problem:
            self._confirm_overwrite(problem, lambda: self._import_preset(path, overwrite=True))
        except UserError as problem:
            self.app.push_screen(ErrorScreen(problem))
        else:
            self._refresh_list(path.stem)
            self.notify(f"Imported {path.stem}. Press {key_name('presets.undo')} here to undo.")

    def _export_preset(self, preset: Preset, target: Path) -> None:
        file = target / preset.path.name if target.is_dir() else target

        def write() -> None:
            if self.qlora_app.try_or_show_error(lambda: export_preset(preset, target)):
                self.notify(f"Exported to {file}.")

        if file.exists():
            self._confirm_overwrite(
                UserError("File already exists", what=f"{file} would be replaced."), write
            )
        else:
            write()

    def _save(self, name: str, note: str, *, overwrite: bool) -> None:
        workbench = self.qlora_app.workbench
        try:
            before = save_as(name, workbench.recipe, note=note, own=workbench.preset, overwrite=overwrite)
        except OverwriteError as problem:
            self._confirm_overwrite(problem, lambda: self._save(name, note, overwrite=True))
            return
        except UserError as problem:
            self.app.push_screen(ErrorScreen(problem))
            return
        self._remember(before, workbench.saved_as(name))
        self.qlora_app.recipe_edited()
        self.notify(
            f"Saved the settings as {name}, without the model and the data. Use it with "
            f"--preset {shlex.quote(name)}. Press {key_name('presets.undo')} here to undo."
        )
        self.action_leave()
        self._refresh_list(name)

    def _ask(self, title: str, words: str, then: Callable[[Path], None]) -> None:
        def on_result(text: str | None) -> None:
            if text and text.strip():
                then(Path(text.strip()).expanduser())

        self.app.push_screen(TextPromptScreen(title, words), on_result)

    def _confirm_overwrite(self, problem: UserError, yes: Callable[[], None]) -> None:
        def on_result(agreed: bool | None) -> None:
            if agreed:
                yes()

        text = f"{problem.what} {problem.why}".strip()
        self.app.push_screen(ConfirmScreen(problem.title, text, yes="Replace it", no="Keep it"), on_result)

    def _refresh_list(self, select: str | None = None) -> None:
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
        preset, workbench = self._current, self.qlora_app.workbench
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


_SHOWN = [command for command in COMMANDS if command.in_footer and command.id != "presets.filter"]
"""Commands named in the lower border: there is no footer in a modal."""


def _key_hints(hints: Iterable[tuple[str, str]]) -> Content:
    """``Enter open  s save``: keys and verbs, as in the borders of panels."""
    shown = [
        Content.assemble((key, "$footer-key-foreground bold"), (f" {verb}", "not bold $text-muted"))
        for key, verb in hints
    ]
    return Content("  ").join(shown)
