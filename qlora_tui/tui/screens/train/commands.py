"""What can be done on the Train screen, and when."""

from __future__ import annotations

from qlora_tui.runs.control import Kind
from qlora_tui.runs.status import ACTIVE, RESUMABLE, State
from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("train")
_hidden = ScreenCommands("train", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command("launch", "t", "launch", "Launch", "Launch a run with this recipe, or queue it.", verb="train"),
    _hidden("recheck", "f5", "recheck", "Check again", "Check again what the run needs."),
    _command(
        "stop", "s", "stop", "Stop", "Save a checkpoint and the adapter, then stop the run.", verb="stop"
    ),
    _command("pause", "z", "pause", "Pause", "Save a checkpoint and free the GPU.", verb="pause"),
    _command("resume", "r", "resume", "Resume", "Resume from the last checkpoint.", verb="resume"),
    _hidden("checkpoint", "k", "request('checkpoint')", "Checkpoint", "Save a checkpoint now.", verb="ask"),
    _hidden(
        "evaluate", "e", "request('evaluate')", "Evaluate", "Measure the validation loss now.", verb="ask"
    ),
    _hidden("sample", "g", "request('sample')", "Sample", "Answer the sample prompts now.", verb="ask"),
    _hidden(
        "finish_epoch",
        "f",
        "request('finish_epoch')",
        "Finish epoch",
        "Stop the run at the end of this epoch.",
        verb="ask",
    ),
    _hidden(
        "learning_rate",
        "L",
        "learning_rate",
        "Learning rate",
        "Change the learning rate of the run.",
        verb="ask",
    ),
    _command("fix", "m", "fix", "Fix", "Apply the suggested fix for the latest warning (asks first)."),
    _command("chat", "c", "chat", "Chat", "Chat with this run's adapter.", verb="chat"),
    _command("another", "x", "watch_another", "Another run", "Watch another run.", verb="attach"),
    _command("prepare", "n", "prepare", "New run", "Prepare a new run: edit the recipe and see its checks."),
    _command("detach", "d", "detach", "Detach", "Leave the app. The run continues."),
    _hidden("tab", "tab", "next_tab(1)", "Next tab", "Show the next tab: log, samples, health, output."),
    _hidden("tab_back", "shift+tab", "next_tab(-1)", "Previous tab", "Show the previous tab."),
    _hidden("zoom_in", "plus,equals_sign", "zoom(1)", "Zoom in", "Show only the last half of the steps."),
    _hidden("zoom_out", "minus", "zoom(-1)", "Zoom out", "Show twice as many steps."),
    _hidden("level", "v", "level", "Level", "Show all lines, warnings only, or errors only."),
    _hidden("search", "slash", "search", "Search", "Show only lines that contain a text."),
    _hidden(
        "copy",
        "y",
        "copy_command",
        "Copy command",
        "Copy the command that shows this run in a terminal.",
        verb="attach",
    ),
)

REQUEST_NOTICES: dict[Kind, str] = {
    "checkpoint": "The run will save a checkpoint after this step.",
    "evaluate": "The run will measure the validation loss after this step.",
    "sample": "The run will answer the sample prompts after this step.",
    "finish_epoch": "The run will stop at the end of this epoch.",
}
"""Notification for each kind of request."""
_WHEN_RUNNING = frozenset(("pause", "request", "learning_rate"))
_WHEN_LIVE = frozenset(
    ("watch_another", "prepare", "detach", "next_tab", "zoom", "level", "search", "copy_command")
)
ACTION_NAMES = frozenset(command.action.partition("(")[0] for command in COMMANDS)
"""The action names of all commands."""


def is_available(action: str, watching: bool, state: State | None) -> bool:
    """Whether one of :data:`ACTION_NAMES` means something now; ``state`` is that of the run being watched."""
    if not watching:
        return action in ("launch", "recheck", "watch_another")
    return (
        action in _WHEN_LIVE
        or (action in _WHEN_RUNNING and state in ACTIVE)
        or (action == "stop" and (state in ACTIVE or state == "queued"))
        or (action == "resume" and state in RESUMABLE)
        or (action == "chat" and state in ("finished", "stopped", "paused"))
    )


def validate_rate(text: str) -> str:
    """Return what is wrong with a typed learning rate, or an empty string."""
    try:
        rate = float(text)
    except ValueError:
        return "Enter a number, such as 1e-4."
    return "" if 0 < rate <= 1 else "It must be above 0 and at most 1."
