"""What can be done on the presets screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("presets")

COMMANDS: tuple[Command, ...] = (
    _command(
        "save", "s", "save_as", "Save as", "Save the recipe under a name, with a note of what it is for."
    ),
    _command("edit", "e", "edit", "Edit", "Open your file in $EDITOR; it is checked when you come back."),
    _command("import", "i", "import_preset", "Import", "Copy a preset file among yours."),
    _command("export", "x", "export_preset", "Export", "Copy the preset to a file or a folder."),
    _command("delete", "D", "delete", "Delete", "Delete one of yours; u brings it back while this is open."),
    _command("undo", "u", "undo", "Undo", "Take back the last deletion, save or import made here."),
    _command("preview_down", "J", "scroll_preview(1)", "Down", "Scroll what it would change."),
    _command("preview_up", "K", "scroll_preview(-1)", "Up", "Scroll it back."),
)
