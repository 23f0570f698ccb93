"""What can be done on the Home screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("home")
_not_in_footer = ScreenCommands("home", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command("next", "enter", "next", "Next step", "Do the suggested next step."),
    _command(
        "demo",
        "d",
        "demo",
        "Demo",
        "Download the 135M demo model and prepare a run with it.",
        cli_command="demo",
    ),
    _not_in_footer(
        "resume",
        "r",
        "resume",
        "Resume",
        "Resume the last run from its last checkpoint.",
        cli_command="resume",
    ),
    _not_in_footer(
        "export",
        "e",
        "export",
        "Export",
        "Export the last run's adapter, such as to GGUF.",
        cli_command="export",
    ),
    _not_in_footer(
        "prepare",
        "n",
        "prepare",
        "New run",
        "Open Train, to check the recipe and launch it there.",
        cli_command="train",
    ),
)
