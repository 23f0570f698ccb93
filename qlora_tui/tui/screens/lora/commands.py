"""What can be done on the LoRA screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("lora")
_hidden = ScreenCommands("lora", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command("toggle", "space,enter", "toggle_modules", "Toggle", "Take or drop what is marked."),
    _command("block", "x", "block", "Block", "Begin a block of layers; again toggles it."),
    _command("patterns", "i", "patterns", "Patterns", "Type patterns: q,v or 8-23.q."),
    _command("all", "f", "all_linear", "All", "Every linear module: all-linear."),
    _hidden("rank_here", "e", "here('rank')", "Rank here", "A rank of their own for what is marked."),
    _hidden("alpha_here", "E", "here('alpha')", "Alpha here", "An alpha of their own for what is marked."),
    _hidden("rank_up", "r", "step('lora.rank', 1)", "Rank ×2", "Double the rank."),
    _hidden("rank_down", "R", "step('lora.rank', -1)", "Rank ÷2", "Halve the rank."),
    _hidden("alpha_up", "a", "step('lora.alpha', 1)", "Alpha ×2", "Double alpha."),
    _hidden("alpha_down", "A", "step('lora.alpha', -1)", "Alpha ÷2", "Halve alpha."),
    _hidden("dropout_up", "d", "step('lora.dropout', 1)", "More dropout", "The next larger dropout."),
    _hidden("dropout_down", "D", "step('lora.dropout', -1)", "Less dropout", "The next smaller dropout."),
    _hidden("rslora", "s", "step('lora.use_rslora')", "rsLoRA", "Scale by alpha/√rank, or by alpha/rank."),
    _hidden("dora", "w", "step('lora.use_dora')", "DoRA", "Train magnitude and direction apart, or not."),
)
