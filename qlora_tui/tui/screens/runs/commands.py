"""What can be done on the Runs screen."""

from __future__ import annotations

from qlora_tui.tui.commands import FOLDER_COMMAND, Command, ScreenCommands

_command = ScreenCommands("runs")
_not_in_footer = ScreenCommands("runs", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command("open", "enter", "open", "Open", "Watch the run, or see how it ended.", cli_command="attach"),
    _command("withdraw", "w", "withdraw", "Withdraw", "Remove the run from the queue.", cli_command="stop"),
    _command("mark", "space", "mark", "Mark", "Select up to four runs to compare."),
    _command("compare", "v", "compare", "Compare", "Compare loss curves and the settings that differ."),
    _command("filter", "slash", "filter", "Filter", "Show only runs that contain a text."),
    _command(
        "chat",
        "c",
        "chat",
        "Chat",
        "Chat with the run's adapter; of a running one, with its last checkpoint.",
        cli_command="chat",
    ),
    _not_in_footer(
        "evaluate",
        "a",
        "evaluate",
        "Compare answers",
        "Compare answers of the adapter and its base to validation prompts.",
        cli_command="evaluate",
    ),
    _command(
        "export",
        "e",
        "export",
        "Export",
        "Write the adapter for other programs, such as GGUF; of a running run, its last checkpoint.",
        cli_command="export",
    ),
    _command("rerun", "R", "rerun", "Rerun", "Prepare a new run with this recipe."),
    _not_in_footer(
        "further",
        "T",
        "train_further",
        "Train further",
        "Prepare a new run that starts from this run's adapter.",
    ),
    _not_in_footer(
        "rename",
        "f2",
        "rename",
        "Rename",
        "Rename the run. Its folder keeps its name.",
        cli_command="runs rename",
    ),
    _not_in_footer(
        "resume",
        "r",
        "resume",
        "Resume",
        "Queue the run again, to continue from its last checkpoint.",
        cli_command="resume",
    ),
    _not_in_footer("preset", "S", "save_preset", "Save preset", "Save its settings as a preset."),
    _command(
        "delete",
        "D",
        "delete",
        "Delete",
        "Move the run to the trash. It can be restored for a week.",
        cli_command="runs delete",
    ),
    _command("sort", "o", "sort", "Sort", "Sort by date, loss, name, model or duration."),
    _not_in_footer(
        "restore",
        "u",
        "restore",
        "Restore",
        "Restore the run that was deleted last.",
    ),
    _not_in_footer("copy", "y", "copy('attach')", "Copy command", "Copy the command that shows the run."),
    _not_in_footer("copy_train", "Y", "copy('train')", "Copy training", "Copy the command that trains it."),
    _not_in_footer(*FOLDER_COMMAND),
    _not_in_footer("sooner", "K", "move(-1)", "Sooner", "Move the run up in the queue."),
    _not_in_footer("later", "J", "move(1)", "Later", "Move the run down in the queue."),
)
