"""What can be done on the Model screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("models")
_not_in_footer = ScreenCommands("models", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command("filter", "slash", "filter", "Search", "Filter by name. Enter also searches the Hub."),
    _command(
        "download",
        "d",
        "download",
        "Download",
        "Download the selected model from the Hub, or the demo model.",
    ),
    _not_in_footer("cancel", "c", "cancel", "Stop download", "Stop the download (it can be resumed)."),
    _command("open", "o", "open_path", "Open path", "Use a model folder or a GGUF file."),
    _not_in_footer("rescan", "r", "rescan", "Rescan", "Search this machine for models again."),
)
