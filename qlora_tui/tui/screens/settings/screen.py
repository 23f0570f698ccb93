"""Settings: the theme with a live preview, notifications, folders. Each change is saved in config.toml."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import msgspec
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from qlora_tui.errors import UserError
from qlora_tui.formatting import format_path
from qlora_tui.runs.notify import RunNotification
from qlora_tui.settings import Settings, config_path
from qlora_tui.settings_file import save_setting
from qlora_tui.tui.commands import screen_commands
from qlora_tui.tui.desktop import notify_run_ended
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.screens.modals.dialogs import TextPromptScreen
from qlora_tui.tui.screens.settings.rows import (
    ROWS,
    SettingRow,
    check_typed,
    setting_value,
    shown_value,
    typed_value,
)
from qlora_tui.tui.themes import theme_names
from qlora_tui.tui.widgets.controls import ViList

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp

_COMMANDS = screen_commands("settings")
_LABEL = max(len(row.label) for row in ROWS) + 2


class SettingsScreen(ModalScreen[None]):
    """The list of settings, and an explanation of the one under the cursor."""

    CSS_PATH = "../modals/modal.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        *(command.binding() for command in _COMMANDS),
        Binding("escape,q", "dismiss", "Close"),
    ]

    @property
    def qlora_app(self) -> QloraApp:
        """The app, typed."""
        return cast("QloraApp", self.app)

    @property
    def _row(self) -> SettingRow:
        name = self.query_one(ViList).current
        return next((row for row in ROWS if row.name == name), ROWS[0])

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide") as dialog:
            dialog.border_title = "Settings"
            dialog.border_subtitle = dialog_keys(self.BINDINGS, "Enter change")
            yield ViList(id="settings")
            yield Static(id="setting-help", markup=False)
            yield Static(f"Saved in {format_path(config_path())}.", classes="muted", markup=False)

    def on_mount(self) -> None:
        self._show()
        self.query_one(ViList).focus()

    def on_option_list_option_highlighted(self) -> None:
        """Explain the setting under the cursor."""
        row = self._row
        later = " Takes effect at the next start." if row.at_next_start else ""
        self.query_one("#setting-help", Static).update(f"{row.help}{later}")

    def on_option_list_option_selected(self) -> None:
        """Change the setting: the next value, or a field to type it."""
        row = self._row
        if row.kind in ("theme", "bool"):
            self.action_step(1)
            return
        value = setting_value(self.qlora_app.settings, row.name)
        text = "" if value is None else ":".join(value) if row.kind == "folders" else f"{value}"

        def on_result(typed: str | None) -> None:
            if typed is not None:
                self._save(row, typed_value(row.kind, typed))

        self.app.push_screen(TextPromptScreen(row.label, row.help, text, check_typed(row.kind)), on_result)

    def action_step(self, direction: int) -> None:
        """Change a switch, or go to the next theme."""
        row = self._row
        value = setting_value(self.qlora_app.settings, row.name)
        if row.kind == "bool":
            self._save(row, not value)
        elif row.kind == "theme":
            names = theme_names()
            place = names.index(value) if value in names else 0
            self._save(row, names[(place + direction) % len(names)])

    def action_reset(self) -> None:
        """Remove the setting from the file."""
        self._save(self._row, None)

    def action_test(self) -> None:
        """Notify as after a run, with what is switched on here."""
        text = "This is a test: your run is finished."
        notify_run_ended(
            self.qlora_app,
            RunNotification(
                event="finished", run="test", name="test", text=text, step=1, total_steps=1, best_loss=None
            ),
        )

    def _save(self, row: SettingRow, value: Any) -> None:
        app = self.qlora_app
        try:
            settings = save_setting(row.name, value)
        except UserError as problem:
            app.show_error(problem)
            return
        if row.name != "card_gib":
            # A size assumed by a key or on the command line is not in the file, and stays.
            settings = msgspec.structs.replace(settings, gpu_memory_gib=app.settings.gpu_memory_gib)
        app.apply_settings(settings)
        self._show()

    def _show(self) -> None:
        settings, usual = self.qlora_app.settings, Settings()
        lines = []
        for row in ROWS:
            value, default = setting_value(settings, row.name), setting_value(usual, row.name)
            changed = value != default
            note = f"  default: {shown_value(row.kind, default)}" if changed else ""
            line = Content.assemble(
                f" {row.label:<{_LABEL}}",
                (shown_value(row.kind, value), "bold $accent" if changed else ""),
                (note, "dim"),
            )
            lines.append((row.name, line))
        self.query_one(ViList).show(lines)
