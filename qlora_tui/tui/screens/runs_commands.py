"""What can be done on the Runs screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command


def _do(
    id_: str, key: str, action: str, label: str, help_: str, *, in_footer: bool = True, verb: str = ""
) -> Command:
    return Command(
        id=f"runs.{id_}", key=key, action=action, label=label, help=help_, in_footer=in_footer, verb=verb
    )


COMMANDS: tuple[Command, ...] = (
    _do("open", "enter", "open", "Open", "Watch the run, or see how it ended.", verb="attach"),
    _do("withdraw", "w", "withdraw", "Withdraw", "Take it out of the queue.", verb="stop"),
    _do("mark", "space", "mark", "Mark", "Choose up to four runs to compare."),
    _do("compare", "v", "compare", "Compare", "Curves on one graph, and the settings that differ."),
    _do("filter", "slash", "filter", "Filter", "Only runs with a text in them."),
    _do("chat", "c", "chat", "Chat", "Talk to the run's adapter.", verb="chat"),
    _do("rerun", "R", "rerun", "Rerun", "Prepare a run with this recipe."),
    _do(
        "rename",
        "e",
        "rename",
        "Rename",
        "Call it otherwise; its folder stays.",
        in_footer=False,
        verb="runs rename",
    ),
    _do("preset", "S", "save_preset", "Save preset", "Keep its settings as a preset.", in_footer=False),
    _do("delete", "D", "delete", "Delete", "Delete it and all it made; u undoes.", verb="runs delete"),
    _do(
        "undelete",
        "u",
        "bring_back",
        "Undo",
        "Bring back the run deleted last, until you quit.",
        in_footer=False,
    ),
    _do("copy", "y", "copy('attach')", "Copy", "Copy the command that shows it.", in_footer=False),
    _do("copy_train", "Y", "copy('train')", "Copy", "Copy the command that trains it.", in_footer=False),
    _do("sooner", "K", "move(-1)", "Sooner", "Move it up in the queue.", in_footer=False),
    _do("later", "J", "move(1)", "Later", "Move it down in the queue.", in_footer=False),
)
