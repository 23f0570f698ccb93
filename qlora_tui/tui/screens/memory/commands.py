"""What can be done on the Memory screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command


def _command(id_: str, key: str, action: str, label: str, help_: str, *, in_footer: bool = False) -> Command:
    return Command(id=f"memory.{id_}", key=key, action=action, label=label, help=help_, in_footer=in_footer)


COMMANDS: tuple[Command, ...] = (
    _command("next", "tab,n", "next_bar(1)", "Next precision", "Take the next bar apart.", in_footer=True),
    _command("previous", "shift+tab,N", "next_bar(-1)", "Previous bar", "Take the one before apart."),
    _command("use", "m", "use", "Train in it", "Train in the precision marked ▸.", in_footer=True),
    _command(
        "apply",
        "a",
        "apply",
        "Make it fit",
        "Change the recipe so that it fits, in the way that costs least; u takes it back.",
        in_footer=True,
    ),
    _command("length_up", "s", "scale('data.max_length', 2)", "Length ×2", "Double the length of rows."),
    _command("length_down", "S", "scale('data.max_length', 0.5)", "Length ÷2", "Halve the length of rows."),
    _command("batch_up", "b", "scale('training.micro_batch', 2)", "Batch ×2", "Double the micro-batch."),
    _command("batch_down", "B", "scale('training.micro_batch', 0.5)", "Batch ÷2", "Halve the micro-batch."),
    _command("rank_up", "r", "scale('lora.rank', 2)", "Rank ×2", "Double the rank."),
    _command("rank_down", "R", "scale('lora.rank', 0.5)", "Rank ÷2", "Halve the rank."),
    _command("targets", "t", "targets", "Targets", "Next choice of target modules."),
    _command("checkpointing", "c", "checkpointing", "Checkpointing", "Checkpoint activations, or not."),
)
