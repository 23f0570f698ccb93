"""What can be done on the Data screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("data", verb="data")
_hidden = ScreenCommands("data", verb="data", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command("open", "o", "open", "Open", "Add a data file, a folder of them, or a Hub dataset."),
    _hidden("next", "right,l", "row(1)", "Next", "The next row."),
    _hidden("previous", "left,h", "row(-1)", "Previous", "The row before."),
    _command("goto", "colon", "go_to", "Row", "Go to a row by its number."),
    _command("problem", "n", "problem(1)", "Problem", "The next row with a problem."),
    _hidden("back", "N", "problem(-1)", "Back", "The problem before."),
    _command("format", "f", "format", "Format", "Read the rows in another format."),
    _command("columns", "c", "columns", "Columns", "Say which column plays which part."),
    _command(
        "longer", "plus,equals_sign", "step('data.max_length', 1)", "Length", "Double the sequence length."
    ),
    _hidden("shorter", "minus", "step('data.max_length', -1)", "Shorter", "Halve the sequence length."),
    _hidden("too_long", "t", "step('data.overflow')", "Too long", "What happens to long samples."),
    _command("view", "v", "view", "View", "Sample and figures, figures alone, or the sample alone."),
    _hidden("validation", "s", "validation", "Split", "Hold rows back to validate on, or name a file."),
    _hidden("weight", "w", "weight", "Weight", "How often the rows of a source are seen."),
    _hidden("train_on", "e", "step('data.train_on')", "Train on", "Learn the answers only, or everything."),
    _hidden(
        "thinking",
        "r",
        "step('data.thinking')",
        "Thinking",
        "Render rows with thinking on or off, or as their reasoning asks.",
    ),
    _hidden(
        "reasoning",
        "R",
        "step('data.reasoning_in_loss')",
        "Reasoning",
        "Learn the reasoning too, or only read it before the answer.",
    ),
    _hidden("packing", "b", "step('data.packing')", "Packing", "Pack several samples into a row."),
    _hidden(
        "mend",
        "m",
        "fix",
        "Fix",
        "Change the setting that a problem names: chosen answers, split texts, tokens to train.",
    ),
    _hidden("remove", "x", "remove", "Remove", "Take the source under the cursor out."),
)
