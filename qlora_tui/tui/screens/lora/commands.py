"""What can be done on the LoRA screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("lora")
_not_in_footer = ScreenCommands("lora", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command(
        "toggle",
        "space,enter",
        "toggle_modules",
        "Toggle",
        "Add or remove the adapter of the selected modules.",
    ),
    _command(
        "block",
        "x",
        "block",
        "Select layers",
        "Start selecting a block of layers; press again to toggle it.",
    ),
    _command("patterns", "i", "edit_targets", "Patterns", "Type target patterns, such as q,v or 8-23.q."),
    _command("all", "f", "all_linear", "All", "Select every linear module (all-linear)."),
    _not_in_footer(
        "rank_here",
        "e",
        "set_custom_value('rank')",
        "Rank here",
        "Set a custom rank for the selected modules.",
    ),
    _not_in_footer(
        "alpha_here",
        "E",
        "set_custom_value('alpha')",
        "Alpha here",
        "Set a custom alpha for the selected modules.",
    ),
    _not_in_footer("rank_up", "r", "step_setting('lora.rank', 1)", "Rank ×2", "Double the rank."),
    _not_in_footer("rank_down", "R", "step_setting('lora.rank', -1)", "Rank ÷2", "Halve the rank."),
    _not_in_footer("alpha_up", "a", "step_setting('lora.alpha', 1)", "Alpha ×2", "Double alpha."),
    _not_in_footer("alpha_down", "A", "step_setting('lora.alpha', -1)", "Alpha ÷2", "Halve alpha."),
    _not_in_footer(
        "dropout_up", "d", "step_setting('lora.dropout', 1)", "More dropout", "Increase dropout by one step."
    ),
    _not_in_footer(
        "dropout_down",
        "D",
        "step_setting('lora.dropout', -1)",
        "Less dropout",
        "Decrease dropout by one step.",
    ),
    _not_in_footer(
        "rslora",
        "s",
        "step_setting('lora.use_rslora')",
        "rsLoRA",
        "Scale the update by alpha/√rank (rsLoRA) or by alpha/rank.",
    ),
    _not_in_footer(
        "dora",
        "w",
        "step_setting('lora.use_dora')",
        "DoRA",
        "Turn DoRA on or off: magnitude and direction are trained separately.",
    ),
    _not_in_footer(
        "embeddings",
        "b",
        "step_setting('lora.train_embeddings')",
        "Embeddings",
        "Train the whole embedding and head too, for a new language or domain, or leave them frozen.",
    ),
)

HELP_TEXT = (
    "Each row is a kind of linear module, each cell one layer: ■ gets an adapter, · stays frozen. On "
    "a name, {lora.toggle} selects or deselects the whole kind; on a cell, only that layer. "
    "{lora.block} starts a block of cells; pressed again, it toggles the block. The first row stands "
    "for every kind. {lora.rank_here} gives the selected modules a custom rank, shown as ◆.\n"
    "Tab goes to the settings, where Left and Right change the one under the cursor. In a large window, "
    "a panel explains it, or the kind of module under the cursor; and a table shows what other ranks and "
    "targets would cost.\n"
    "An adapter adds B·A × alpha/rank to a weight. Only A and B are trained; their parameters are counted as "
    "trainable. In memory is what Memory lists under Adapter: its weights and their 16-bit copy, gradients, "
    "and optimizer states."
)
