"""What can be done on the Model screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("models")
_hidden = ScreenCommands("models", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command("filter", "slash", "filter", "Search", "Filter by name; enter asks the hub too."),
    _command("download", "d", "download", "Download", "Fetch the hub's model, or the demo's."),
    _hidden("cancel", "c", "cancel", "Stop download", "Cancel the download (it can be resumed)."),
    _command("open", "o", "open_path", "Open path", "Use a folder or a GGUF file."),
    _hidden("rescan", "r", "rescan", "Look again", "Look for models again."),
)
