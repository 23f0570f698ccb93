"""What can be done on the settings screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("settings")

COMMANDS: tuple[Command, ...] = (
    _command("next", "l,right", "step(1)", "Next", "Change the setting to its next value."),
    _command("previous", "h,left", "step(-1)", "Previous", "Change the setting to its previous value."),
    _command("reset", "backspace", "reset", "Reset", "Restore the setting's default."),
    _command("test", "t", "test", "Test notification", "Send a test notification, as after a run."),
)
