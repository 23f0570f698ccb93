"""What can be done on the presets screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("presets")
_not_in_footer = ScreenCommands("presets", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command("filter", "slash", "filter", "Filter", "Show only presets that contain a text."),
    _command("save", "s", "save_as", "Save", "Save the recipe as a preset, with a note on what it is for."),
    _command("edit", "e", "edit", "Edit", "Open your preset in $EDITOR. It is checked when you return."),
    _command("import", "i", "import_preset", "Import", "Copy a preset file into your presets."),
    _command("export", "x", "export_preset", "Export", "Copy the preset to a file or folder."),
    _command(
        "delete",
        "D",
        "delete",
        "Delete",
        "Delete one of your presets. It can be undone while this window is open.",
    ),
    _command("undo", "u", "undo", "Undo", "Undo the last deletion, save or import."),
    _not_in_footer("preview_down", "J", "scroll_preview(1)", "Down", "Scroll the preview down."),
    _not_in_footer("preview_up", "K", "scroll_preview(-1)", "Up", "Scroll the preview up."),
)
