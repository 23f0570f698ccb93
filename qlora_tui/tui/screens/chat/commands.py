"""What can be done on the Chat screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("chat", verb="chat")
_hidden = ScreenCommands("chat", verb="chat", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command("write", "i,enter", "write", "Write", "Type a prompt."),
    _command("stop", "escape", "stop", "Stop", "Stop the answer, or the loading of the model."),
    _command(
        "leave", "escape", "leave_field", "Leave field: then 0-7 work", "Leave the field, so that keys work."
    ),
    _command("voice", "a,ctrl+t", "switch", "On/off", "Switch the adapter off and on: one voice alone."),
    _command("thinking", "t,ctrl+g", "thinking", "Think", "Have the model think before it answers, or not."),
    _hidden("unfold", "z,ctrl+o", "unfold", "Thoughts", "Show what was thought, or fold it into a line."),
    _command("split", "s", "split", "Split", "Both voices side by side, or one alone."),
    _command("right", "v", "voice('right')", "Voice", "Another checkpoint of this run."),
    _hidden("left", "V", "voice('left')", "Left", "Another voice on the left: compare two checkpoints."),
    _hidden("retry", "r", "retry", "Retry", "Answer the last prompt again."),
    _hidden("edit", "e", "edit_last", "Edit", "Change the last prompt; up in the empty field does it too."),
    _command(
        "effect", "f", "effect", "Effect", "Measure on held-out data how far the adapter moves the model."
    ),
    _command("settings", "o", "settings", "Options", "Sampling and system prompt."),
    _command("source", "m", "choose", "Whom", "Talk to another run, or to a model as it is."),
    _hidden("clear", "x", "clear", "New", "Begin a new conversation."),
    _hidden("unload", "U", "unload", "Unload", "Give back the model's memory."),
    _hidden("down", "j,down", "scroll_talk(1)", "Down", "Scroll down."),
    _hidden("up", "k,up", "scroll_talk(-1)", "Up", "Scroll up."),
)
