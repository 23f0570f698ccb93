"""What can be done on the Data screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("data")
_not_in_footer = ScreenCommands("data", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command(
        "open",
        "o",
        "open",
        "Add",
        "Add a data file, a folder of files, or a dataset from the Hub.",
        cli_command="data inspect",
    ),
    _not_in_footer(
        "replace",
        "O",
        "open(True)",
        "Open instead",
        "Train on another file, folder or dataset instead of the ones in the recipe.",
    ),
    _command("remove", "x", "remove", "Remove", "Remove the selected source from the recipe."),
    _not_in_footer("reload", "f5", "reload", "Reload", "Read the source again, after its file changed."),
    _not_in_footer("next", "right,l", "row(1)", "Next", "Show the next row."),
    _not_in_footer("previous", "left,h", "row(-1)", "Previous", "Show the previous row."),
    _command("goto", "colon", "go_to", "Row", "Go to a row by number.", cli_command="data show"),
    _command("problem", "n", "problem(1)", "Problem", "Go to the next row with a problem."),
    _not_in_footer(
        "row_losses",
        "B",
        "row_losses",
        "Losses",
        "List the rows by what the newest run on them learned: wrong answers first.",
        cli_command="data blame",
    ),
    _command("view", "v", "view", "View", "Show the sample and the statistics, or only one of them."),
    _not_in_footer("previous_problem", "N", "problem(-1)", "Back", "Go to the previous row with a problem."),
    _command(
        "format", "f", "format", "Format", "Choose the format of the rows, by how many each format reads."
    ),
    _command(
        "columns", "c", "columns", "Columns", "Map the columns of the file to prompt, answer, and so on."
    ),
    _command(
        "longer",
        "plus,equals_sign",
        "step_setting('data.max_length', 1)",
        "Length",
        "Double the sequence length.",
    ),
    _not_in_footer(
        "shorter", "minus", "step_setting('data.max_length', -1)", "Shorter", "Halve the sequence length."
    ),
    _not_in_footer(
        "too_long",
        "t",
        "step_setting('data.overflow')",
        "Too long",
        "Choose what happens to samples that are too long.",
    ),
    _not_in_footer(
        "validation",
        "s",
        "validation",
        "Split",
        "Hold out a share of the rows for validation, or name a file.",
    ),
    _not_in_footer("weight", "w", "weight", "Weight", "Set how often the rows of a source are seen."),
    _not_in_footer(
        "train_on",
        "e",
        "step_setting('data.train_on')",
        "Train on",
        "Train on the answers only, or on everything.",
    ),
    _not_in_footer(
        "thinking",
        "r",
        "step_setting('data.thinking')",
        "Thinking",
        "Render rows with thinking on, off, or as the reasoning in the row requires.",
    ),
    _not_in_footer(
        "reasoning",
        "R",
        "step_setting('data.reasoning_in_loss')",
        "Reasoning",
        "Learn the reasoning, or only read it.",
    ),
    _not_in_footer(
        "packing",
        "b",
        "step_setting('data.packing')",
        "Packing",
        "Pack several samples into one row, or not.",
    ),
    _not_in_footer(
        "fix",
        "m",
        "fix",
        "Apply fix",
        "Change the setting that a problem names: preferences, bad rows, split texts, tokens to train.",
    ),
    _not_in_footer(
        "bad_rows",
        "d",
        "bad_rows",
        "Bad rows",
        "Leave out rows that cannot be used, or refuse to train while there are any.",
    ),
)

# Keys in the borders of the panels, with a verb for each.
SAMPLE_KEYS = (
    ("data.previous", "previous"),
    ("data.next", "next row"),
    ("data.goto", "go to"),
    ("data.view", "view"),
)
SOURCE_KEYS = (("data.open", "add"), ("data.replace", "replace"), ("data.remove", "remove"))
TOTALS_KEYS = (("data.format", "format"), ("data.columns", "columns"))
LENGTH_KEYS = (("data.longer", "longer"), ("data.shorter", "shorter"), ("data.too_long", "if too long"))
PROBLEM_KEYS: tuple[tuple[str, str], ...] = (("data.problem", "next"), ("data.fix", "fix"))


def problem_keys(*, has_problems: bool, skips: bool, has_bad_rows: bool) -> tuple[tuple[str, str], ...]:
    """The keys for problems of rows: with bad rows, also the one that leaves them out or refuses them."""
    keys = PROBLEM_KEYS if has_problems else ()
    if skips:
        return (*keys, ("data.bad_rows", "refuse bad rows"))
    return (*keys, ("data.bad_rows", "skip bad rows")) if has_bad_rows else keys
