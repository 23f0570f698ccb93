"""What can be done on the Memory screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("memory")
_hidden = ScreenCommands("memory", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command("next", "tab,n", "next_bar(1)", "Next precision", "Take the next bar apart."),
    _hidden("previous", "shift+tab,N", "next_bar(-1)", "Previous bar", "Take the one before apart."),
    _command("use", "m", "use", "Train in it", "Train in the precision marked ▸."),
    _command(
        "apply",
        "a",
        "apply",
        "Make it fit",
        "Change the recipe so that it fits, in the way that costs least; u takes it back.",
    ),
    _hidden("length_up", "s", "step('data.max_length', 1)", "Length ×2", "Double the length of rows."),
    _hidden("length_down", "S", "step('data.max_length', -1)", "Length ÷2", "Halve the length of rows."),
    _hidden("batch_up", "b", "step('training.micro_batch_size', 1)", "Batch ×2", "Double the micro-batch."),
    _hidden("batch_down", "B", "step('training.micro_batch_size', -1)", "Batch ÷2", "Halve the micro-batch."),
    _hidden("rank_up", "r", "step('lora.rank', 1)", "Rank ×2", "Double the rank."),
    _hidden("rank_down", "R", "step('lora.rank', -1)", "Rank ÷2", "Halve the rank."),
    _hidden("targets", "t", "targets", "Targets", "Next choice of target modules."),
    _hidden(
        "checkpointing",
        "c",
        "step('training.gradient_checkpointing')",
        "Checkpointing",
        "Checkpoint activations, or not.",
    ),
)
