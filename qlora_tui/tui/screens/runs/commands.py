"""What can be done on the Runs screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("runs")
_hidden = ScreenCommands("runs", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command("open", "enter", "open", "Open", "Watch the run, or see how it ended.", verb="attach"),
    _command("withdraw", "w", "withdraw", "Withdraw", "Take it out of the queue.", verb="stop"),
    _command("mark", "space", "mark", "Mark", "Choose up to four runs to compare."),
    _command("compare", "v", "compare", "Compare", "Curves on one graph, and the settings that differ."),
    _command("filter", "slash", "filter", "Filter", "Only runs with a text in them."),
    _command("chat", "c", "chat", "Chat", "Talk to the run's adapter.", verb="chat"),
    _command("rerun", "R", "rerun", "Rerun", "Prepare a run with this recipe."),
    _hidden("rename", "e", "rename", "Rename", "Call it otherwise; its folder stays.", verb="runs rename"),
    _hidden("preset", "S", "save_preset", "Save preset", "Keep its settings as a preset."),
    _command("delete", "D", "delete", "Delete", "Delete it and all it made; u undoes.", verb="runs delete"),
    _hidden("undelete", "u", "restore", "Undo", "Bring back the run deleted last, until you quit."),
    _hidden("copy", "y", "copy('attach')", "Copy", "Copy the command that shows it."),
    _hidden("copy_train", "Y", "copy('train')", "Copy", "Copy the command that trains it."),
    _hidden("sooner", "K", "move(-1)", "Sooner", "Move it up in the queue."),
    _hidden("later", "J", "move(1)", "Later", "Move it down in the queue."),
)
