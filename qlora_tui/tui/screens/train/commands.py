"""What can be done on the Train screen, and when."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from qlora_tui.runs.status import ACTIVE, RESUMABLE, State
from qlora_tui.tui.commands import FOLDER_COMMAND, Command, ScreenCommands

_command = ScreenCommands("train")
_not_in_footer = ScreenCommands("train", in_footer=False)

# Requests to a run are upper case: lower-case letters scroll its log, or are pressed by mistake.
COMMANDS: tuple[Command, ...] = (
    _command(
        "launch", "t", "launch", "Launch", "Launch a run with this recipe, or queue it.", cli_command="train"
    ),
    _command("recheck", "f5", "recheck", "Check again", "Check again what the run needs."),
    _command(
        "stop",
        "s",
        "stop",
        "Stop and save",
        "Save a checkpoint and the adapter after this step, then stop the run. Pressed again, it stops now.",
        cli_command="stop",
    ),
    _command(
        "pause",
        "z",
        "pause",
        "Pause",
        "Save a checkpoint after this step and free the GPU.",
        cli_command="pause",
    ),
    _command("resume", "r", "resume", "Resume", "Resume from the last checkpoint.", cli_command="resume"),
    _not_in_footer(
        "checkpoint", "K", "request('checkpoint')", "Checkpoint", "Save a checkpoint now.", cli_command="ask"
    ),
    _not_in_footer(
        "evaluate",
        "E",
        "request('evaluate')",
        "Evaluate",
        "Measure the validation loss now.",
        cli_command="ask",
    ),
    _not_in_footer(
        "sample",
        "A",
        "request('sample')",
        "Sample answers",
        "Answer the sample prompts now.",
        cli_command="ask",
    ),
    _not_in_footer(
        "finish_epoch",
        "F",
        "request('finish_epoch')",
        "Finish epoch",
        "Stop the run at the end of this epoch.",
        cli_command="ask",
    ),
    _not_in_footer(
        "learning_rate",
        "L",
        "learning_rate",
        "Learning rate",
        "Change the learning rate of the run.",
        cli_command="ask",
    ),
    _command("fix", "m", "fix", "Apply fix", "Apply the fix that a check or a run's latest warning names."),
    _command("chat", "c", "chat", "Chat", "Chat with this run's adapter.", cli_command="chat"),
    _not_in_footer(
        "answers",
        "a",
        "answers",
        "Compare answers",
        "Compare answers of this run's adapter and its base to validation prompts.",
        cli_command="evaluate",
    ),
    _command("another", "x", "watch_another", "Other run", "Watch another run.", cli_command="attach"),
    _command("prepare", "n", "prepare", "New run", "Prepare a new run: edit the recipe and see its checks."),
    _command("detach", "d", "detach", "Leave app", "Leave the app, as Quit does. The run continues."),
    _not_in_footer(
        "tab",
        "tab",
        "next_tab(1)",
        "Next tab",
        "Show the next tab: log, answers, health, output. Before a run: go to the checks, and back.",
    ),
    _not_in_footer("tab_back", "shift+tab", "next_tab(-1)", "Previous tab", "Show the previous tab."),
    _not_in_footer(
        "zoom_in", "plus,equals_sign", "zoom(1)", "Zoom in", "Show only the last half of the steps."
    ),
    _not_in_footer("zoom_out", "minus", "zoom(-1)", "Zoom out", "Show twice as many steps."),
    _not_in_footer("level", "v", "level", "Warnings", "Show warnings only, errors only, or all lines."),
    _not_in_footer("search", "slash", "search", "Search", "Show only lines that contain a text."),
    _not_in_footer(*FOLDER_COMMAND),
    _not_in_footer(
        "copy",
        "y",
        "copy_command",
        "Copy command",
        "Copy the command that shows this run in a terminal.",
        cli_command="attach",
    ),
)

ACTION_NAMES = frozenset(command.action.partition("(")[0] for command in COMMANDS)
"""The action names of all commands."""
_PREPARING = frozenset(("launch", "recheck", "watch_another", "next_tab"))
"""Actions available while a run is prepared; all others need a run to watch."""
_PREPARING_ONLY = frozenset(("launch", "recheck"))
_STATES: Mapping[str, Collection[State]] = {
    "pause": ACTIVE,
    "request": ACTIVE,
    "learning_rate": ACTIVE,
    "stop": (*ACTIVE, "queued"),
    "resume": RESUMABLE,
    "chat": ("finished", "stopped", "paused"),
    "answers": ("finished", "stopped"),
}
"""States of the watched run that an action needs; one not listed is available in every state."""


def is_available(action: str, watching: bool, state: State | None) -> bool:
    """Whether one of :data:`ACTION_NAMES` has an effect now; ``state`` is that of the run being watched."""
    if not watching:
        return action in _PREPARING
    if action in _PREPARING_ONLY:
        return False
    return action not in _STATES or state in _STATES[action]
