"""The settings window: the theme, notifications, folders, and other settings of the app. The settings are
saved in config.toml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import msgspec
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.theme import Theme
from textual.widgets import Static

from qlora_tui.errors import UserError
from qlora_tui.formatting import format_path
from qlora_tui.recipe.fields import Field, fields_of, get_setting
from qlora_tui.runs.notify import RunNotification
from qlora_tui.settings import KEYS_IN_FILE, Settings, config_path, save_setting, setting_problem
from qlora_tui.tui.commands import screen_commands
from qlora_tui.tui.desktop import notify_run_ended
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.screens.base import Dialog, OnQloraApp
from qlora_tui.tui.screens.modals.dialogs import Choice, ListPicker
from qlora_tui.tui.themes import AUTO, HUES, TERMINAL, theme_names
from qlora_tui.tui.widgets.settings_form import SettingEdited, SettingGroup, SettingPicked, SettingsForm


class SettingsScreen(Dialog[None], OnQloraApp):
    """A form for the app's settings. Settings without a label are not shown."""

    CSS_PATH = "../modals/modal.tcss"
    DEFAULT_CSS = """
    SettingsScreen SettingsForm, SettingsScreen SettingsForm SettingList {
        height: auto;
        max-height: 70vh;
        background: $surface;
    }
    SettingsScreen SettingsForm SettingList {
        max-height: 55vh;
    }
    SettingsScreen #setting-help {
        min-height: 3;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        *(command.binding() for command in screen_commands("settings")),
        Binding("escape,q", "dismiss", "Close"),
    ]

    def compose(self) -> ComposeResult:
        fields = fields_of(Settings)
        theme = msgspec.structs.replace(fields["theme"], kind="choice", choices=tuple(theme_names()))
        with Vertical(classes="dialog wide") as dialog:
            dialog.border_title = "Settings"
            dialog.border_subtitle = dialog_keys(self.BINDINGS, "Enter change")
            yield SettingsForm(
                _groups({**fields, "theme": theme}),
                base_name="default",
                validate=_problem,
                picked=("theme",),
            )
            yield Static(_swatches())
            yield Static(f"Saved in {format_path(config_path())}.", classes="muted", markup=False)

    def on_mount(self) -> None:
        form = self.query_one(SettingsForm)
        form.show(self.app.settings, Settings())
        form.focus()
        # Move the cursor from the title of the first group to the first setting.
        self.call_after_refresh(form.list.action_move, 1)

    def on_setting_picked(self, message: SettingPicked) -> None:
        """Open a list of the themes, each in its own colors, and apply the theme that the user selects."""
        names = message.field.choices
        choices = [Choice(name, _theme_line(name, self.app.available_themes.get(name))) for name in names]

        def on_result(name: str | None) -> None:
            if name is None:
                self.app.preview_theme("")
            else:
                self.post_message(SettingEdited(message.field.path, name))

        self.app.push_screen(ThemePicker("Theme", "apply", choices, selected=message.value), on_result)

    def on_setting_edited(self, message: SettingEdited) -> None:
        """Apply the setting, and save it in the file. If the value is the default, remove the setting from
        the file.
        """
        app, path, value = self.app, message.path, message.value
        is_default = value == get_setting(Settings(), path)
        try:
            settings = save_setting(KEYS_IN_FILE.get(path, path), None if is_default else value)
        except UserError as problem:
            app.show_error(problem)
            return
        if path != "gpu_memory_gib":
            # Keep a GPU size that was entered by key or on the command line, since it is not in the file.
            settings = msgspec.structs.replace(settings, gpu_memory_gib=app.settings.gpu_memory_gib)
        app.apply_settings(settings)
        self.query_one(SettingsForm).show(app.settings, Settings())

    def action_step(self, direction: int) -> None:
        self.query_one(SettingsForm).list.action_step(direction)

    def action_reset(self) -> None:
        self.query_one(SettingsForm).list.action_reset()

    def action_test(self) -> None:
        text = "This is a test: your run is finished."
        notify_run_ended(
            self.app,
            RunNotification(
                event="finished", run="test", name="test", text=text, step=1, total_steps=1, best_loss=None
            ),
        )


class ThemePicker(ListPicker[str], OnQloraApp):
    """A list of themes. While the dialog is open, the app uses the theme under the cursor."""

    def on_option_list_option_highlighted(self) -> None:
        """Apply the theme under the cursor to the app."""
        self.app.preview_theme(self.current or "")


def _theme_line(name: str, theme: Theme | None) -> Content:
    """Return a line with the name and the colors of a theme. If ``theme`` is None, the theme has no colors of
    its own; the line then says how its colors are chosen.
    """
    colors = [theme.variables.get(hue) for hue in (*HUES, "key")] if theme is not None else []
    words = {
        AUTO: "chosen by the terminal's number of colors",
        TERMINAL: "uses the terminal's own colors",
    }.get(name, "")
    swatches = [("██ ", color) for color in colors if color]
    return Content.assemble((f"{name:<16}", "bold"), *swatches, (words, "$text-muted"))


_SWATCHES = (*HUES, "key", "warning", "error")


def _swatches() -> Content:
    """Return the colors of the app's theme with their names. The colors follow the theme when it changes."""
    shown = [Content.assemble(("███ ", f"${name}"), (name, "$text-muted")) for name in _SWATCHES]
    return Content("  ").join(shown)


def _groups(fields: dict[str, Field]) -> list[SettingGroup]:
    """Return the settings of the app, grouped by topic."""
    titles = {
        "Appearance": ("theme", "mouse"),
        "GPU": ("gpu_memory_gib", "gpu"),
        "Models and disk": ("model_folders", "quantized_cache_gib"),
        "When runs train": ("hours", "yields", "max_temperature_c", "max_power_w", "price_per_kwh"),
        "When a run ends": tuple(path for path in fields if path.startswith("notify.")),
    }
    listed = {path for paths in titles.values() for path in paths}
    titles["Other"] = tuple(path for path in fields if path not in listed)
    return [
        SettingGroup(title, tuple(fields[path] for path in paths)) for title, paths in titles.items() if paths
    ]


def _problem(path: str, value: Any) -> str:
    """Return the error in the value of a setting, such as a folder that does not exist; empty if the value is
    valid.
    """
    folders = value if path == "model_folders" else ()
    missing = [folder for folder in folders if not Path(folder).expanduser().is_dir()]
    return f"There is no folder {missing[0]}." if missing else setting_problem(path, value)
