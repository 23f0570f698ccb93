"""What can be done on the LoRA screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command


def _command(id_: str, key: str, action: str, label: str, help_: str, *, in_footer: bool = False) -> Command:
    return Command(id=f"lora.{id_}", key=key, action=action, label=label, help=help_, in_footer=in_footer)


COMMANDS: tuple[Command, ...] = (
    _command(
        "toggle",
        "space,enter",
        "toggle_modules",
        "Toggle",
        "Take or drop what is marked.",
        in_footer=True,
    ),
    _command("block", "x", "block", "Block", "Begin a block of layers; again toggles it.", in_footer=True),
    _command("patterns", "i", "patterns", "Patterns", "Type patterns: q,v or 8-23.q.", in_footer=True),
    _command("all", "f", "all_linear", "All", "Every linear module: all-linear.", in_footer=True),
    _command("rank_here", "e", "here('rank')", "Rank here", "A rank of their own for what is marked."),
    _command("alpha_here", "E", "here('alpha')", "Alpha here", "An alpha of their own for what is marked."),
    _command("rank_up", "r", "step(0, True)", "Rank ×2", "Double the rank."),
    _command("rank_down", "R", "step(0, False)", "Rank ÷2", "Halve the rank."),
    _command("alpha_up", "a", "step(1, True)", "Alpha ×2", "Double alpha."),
    _command("alpha_down", "A", "step(1, False)", "Alpha ÷2", "Halve alpha."),
    _command("dropout_up", "d", "step(2, True)", "More dropout", "The next larger dropout."),
    _command("dropout_down", "D", "step(2, False)", "Less dropout", "The next smaller dropout."),
    _command("rslora", "s", "step(3, True)", "rsLoRA", "Scale by alpha/√rank, or by alpha/rank."),
    _command("dora", "w", "step(4, True)", "DoRA", "Train magnitude and direction apart, or not."),
)
