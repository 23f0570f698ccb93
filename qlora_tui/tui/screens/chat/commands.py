"""What can be done on the Chat screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("chat")
_not_in_footer = ScreenCommands("chat", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command("write", "i,enter", "write", "Write", "Type a prompt.", cli_command="chat"),
    _command("stop", "escape", "stop", "Stop", "Stop the answer, or stop loading the model."),
    _command(
        "leave",
        "escape",
        "leave_field",
        "Leave field",
        "Leave the prompt field, so that the keys below work.",
    ),
    _command(
        "adapter",
        "a,ctrl+t",
        "toggle_adapter",
        "One answer",
        "Let only the adapter answer, or only the base.",
    ),
    _command(
        "source", "m", "choose_source", "Model", "Chat with another run, or with a model without an adapter."
    ),
    _command("thinking", "t,ctrl+g", "thinking", "Thinking", "Turn thinking before the answer on or off."),
    _not_in_footer("unfold", "z,ctrl+o", "unfold", "Thoughts", "Show or hide what the model thought."),
    _command("split", "s", "split", "Side by side", "Show both answers side by side, or only one."),
    _command(
        "next_adapter",
        "v",
        "next_adapter('right')",
        "Checkpoint",
        "Select another checkpoint or exported GGUF file of this run.",
    ),
    _not_in_footer(
        "left_adapter",
        "V",
        "next_adapter('left')",
        "Left",
        "Select what answers on the left, to compare two of them.",
    ),
    _not_in_footer("retry", "r", "retry", "Retry", "Answer the last prompt again."),
    _not_in_footer("edit", "e", "edit_last", "Edit", "Edit the last prompt (also Up in the empty field)."),
    _not_in_footer(
        "prefer_right",
        "greater_than_sign",
        "prefer('right')",
        "Right is better",
        "Record that the right one of the last two answers is better.",
    ),
    _not_in_footer(
        "prefer_left",
        "less_than_sign",
        "prefer('left')",
        "Left is better",
        "Record that the left one of the last two answers is better.",
    ),
    _not_in_footer(
        "edit_answer",
        "E",
        "edit_answer",
        "Edit answer",
        "Edit the last answer of the adapter, and record how it should read.",
    ),
    _not_in_footer(
        "train_choices",
        "C",
        "train_on_choices",
        "Train on choices",
        "Prepare a run on your edits or choices, from 20 on, that trains this adapter further.",
    ),
    _command(
        "effect",
        "f",
        "effect",
        "Effect",
        "Measure on validation data how much the adapter changes the model.",
    ),
    _command(
        "settings",
        "o",
        "settings",
        "Sampling",
        "Set temperature, other sampling options and the system prompt.",
    ),
    _command("history", "h", "history", "History", "Continue a saved conversation."),
    _not_in_footer("search", "slash", "search", "Search", "Show only exchanges that contain a text."),
    _not_in_footer("copy", "y", "copy('right')", "Copy", "Copy the last answer of the adapter."),
    _not_in_footer(
        "copy_left", "Y", "copy('left')", "Copy left", "Copy the last answer on the left, of the base."
    ),
    _not_in_footer("clear", "x", "clear", "New", "Start a new conversation."),
    _not_in_footer("unload", "U", "unload", "Unload", "Unload the model to free its memory."),
    _not_in_footer("down", "j,down", "scroll_conversation(1)", "Down", "Scroll down."),
    _not_in_footer("up", "k,up", "scroll_conversation(-1)", "Up", "Scroll up."),
)
