"""What can be done on the Runs screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command


def _command(
    id_: str, key: str, action: str, label: str, help_: str, *, in_footer: bool = True, verb: str = ""
) -> Command:
    return Command(
        id=f"runs.{id_}", key=key, action=action, label=label, help=help_, in_footer=in_footer, verb=verb
    )


COMMANDS: tuple[Command, ...] = (
    _command("open", "enter", "open", "Open", "Watch the run, or see how it ended.", verb="attach"),
    _command("withdraw", "w", "withdraw", "Withdraw", "Take it out of the queue.", verb="stop"),
    _command("mark", "space", "mark", "Mark", "Choose up to four runs to compare."),
    _command("compare", "v", "compare", "Compare", "Curves on one graph, and the settings that differ."),
    _command("filter", "slash", "filter", "Filter", "Only runs with a text in them."),
    _command("chat", "c", "chat", "Chat", "Talk to the run's adapter.", verb="chat"),
    _command("rerun", "R", "rerun", "Rerun", "Prepare a run with this recipe."),
    _command(
        "rename",
        "e",
        "rename",
        "Rename",
        "Call it otherwise; its folder stays.",
        in_footer=False,
        verb="runs rename",
    ),
    _command("preset", "S", "save_preset", "Save preset", "Keep its settings as a preset.", in_footer=False),
    _command("delete", "D", "delete", "Delete", "Delete it and all it made; u undoes.", verb="runs delete"),
    _command(
        "undelete",
        "u",
        "restore",
        "Undo",
        "Bring back the run deleted last, until you quit.",
        in_footer=False,
    ),
    _command("copy", "y", "copy('attach')", "Copy", "Copy the command that shows it.", in_footer=False),
    _command("copy_train", "Y", "copy('train')", "Copy", "Copy the command that trains it.", in_footer=False),
    _command("sooner", "K", "move(-1)", "Sooner", "Move it up in the queue.", in_footer=False),
    _command("later", "J", "move(1)", "Later", "Move it down in the queue.", in_footer=False),
)
