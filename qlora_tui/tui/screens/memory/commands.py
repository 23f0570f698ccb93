"""What can be done on the Memory screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("memory")
_hidden = ScreenCommands("memory", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command("next", "tab,n", "next_bar(1)", "Next precision", "Show the next precision's breakdown."),
    _hidden(
        "previous",
        "shift+tab,N",
        "next_bar(-1)",
        "Previous precision",
        "Show the previous precision's breakdown.",
    ),
    _command("use", "m", "use", "Use precision", "Train in the precision marked ▸."),
    _command(
        "apply",
        "a",
        "apply",
        "Make it fit",
        "Apply the change that fits at the least cost.",
    ),
    _hidden(
        "length_up", "s", "step_setting('data.max_length', 1)", "Length ×2", "Double the sequence length."
    ),
    _hidden(
        "length_down", "S", "step_setting('data.max_length', -1)", "Length ÷2", "Halve the sequence length."
    ),
    _hidden(
        "batch_up",
        "b",
        "step_setting('training.micro_batch_size', 1)",
        "Batch ×2",
        "Double the micro-batch size.",
    ),
    _hidden(
        "batch_down",
        "B",
        "step_setting('training.micro_batch_size', -1)",
        "Batch ÷2",
        "Halve the micro-batch size.",
    ),
    _hidden("rank_up", "r", "step_setting('lora.rank', 1)", "Rank ×2", "Double the rank."),
    _hidden("rank_down", "R", "step_setting('lora.rank', -1)", "Rank ÷2", "Halve the rank."),
    _hidden("targets", "t", "targets", "Targets", "Select the next choice of target modules."),
    _hidden(
        "checkpointing",
        "c",
        "step_setting('training.gradient_checkpointing')",
        "Checkpointing",
        "Gradient checkpointing: auto, on or off.",
    ),
)
