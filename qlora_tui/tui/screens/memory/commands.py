"""What can be done on the Memory screen."""

from __future__ import annotations

from qlora_tui.tui.commands import Command, ScreenCommands

_command = ScreenCommands("memory")
_not_in_footer = ScreenCommands("memory", in_footer=False)

COMMANDS: tuple[Command, ...] = (
    _command("next", "tab,n", "next_bar(1)", "Next precision", "Show the next precision's breakdown."),
    _not_in_footer(
        "previous",
        "shift+tab,N",
        "next_bar(-1)",
        "Previous precision",
        "Show the previous precision's breakdown.",
    ),
    _command("use", "m", "use", "Train in this", "Train in the precision marked ▸."),
    _command(
        "apply",
        "a",
        "apply",
        "Make it fit",
        "Apply the change that fits at the least cost.",
    ),
    _command("choose", "f", "choose", "Changes", "Go to the changes that make it fit, or back to the items."),
    _command(
        "timeline",
        "v",
        "timeline",
        "Timeline",
        "In a low window, show the memory over a training step, or the items.",
    ),
    _not_in_footer(
        "length_up", "s", "step_setting('data.max_length', 1)", "Length ×2", "Double the sequence length."
    ),
    _not_in_footer(
        "length_down", "S", "step_setting('data.max_length', -1)", "Length ÷2", "Halve the sequence length."
    ),
    _not_in_footer(
        "batch_up",
        "b",
        "step_setting('training.micro_batch_size', 1)",
        "Batch ×2",
        "Double the micro-batch size.",
    ),
    _not_in_footer(
        "batch_down",
        "B",
        "step_setting('training.micro_batch_size', -1)",
        "Batch ÷2",
        "Halve the micro-batch size.",
    ),
    _not_in_footer("rank_up", "r", "step_setting('lora.rank', 1)", "Rank ×2", "Double the rank."),
    _not_in_footer("rank_down", "R", "step_setting('lora.rank', -1)", "Rank ÷2", "Halve the rank."),
    _not_in_footer("targets", "t", "targets", "Targets", "Select the next choice of target modules."),
    _not_in_footer(
        "checkpointing",
        "c",
        "step_setting('training.gradient_checkpointing')",
        "Recompute",
        "Recompute activations in the backward pass (gradient checkpointing): auto, on or off.",
    ),
)

HELP_TEXT = (
    "The bars show the predicted peak memory of a run, by what takes it: in a training step, or while "
    "loading where that takes more. The line below them is the peak of the bar marked ▸ with its range, "
    "when it is reached, what of it PyTorch holds, and what of that is in tensors. ◂ recipe marks the "
    "precision that the recipe trains in; {memory.use} changes it to the one marked ▸.\n"
    "The list divides that bar into items, and explains the one under the cursor. The graph shows when "
    "memory is needed: while the model is loaded, in the forward pass from the first layer to the last, "
    "in the loss, in the backward pass from the last layer to the first, and in the optimizer's step. "
    "Parts thinner than a row of the graph are not drawn. "
    "In a low window, {memory.timeline} shows it in the place of the list.\n"
    "If the recipe does not fit, {memory.apply} applies the change that costs least, and "
    "{memory.choose} goes to the list of changes, where Enter applies one.\n"
    "Lower-case keys double a setting and capital keys halve it. 'max fit' is the largest value that "
    "fits, in the precision marked ▸, with the other settings unchanged; 'halving' is how halving it "
    "changes the memory. After → stands the next choice of a setting, and how it changes the memory. "
    "Shorter sequences cut or leave out long rows; a lower rank or fewer targets can learn less.\n"
    "recompute is gradient checkpointing: activations are computed again in the backward pass instead of "
    "kept. With auto, the bars show every layer recomputed, which is what the run needs. As many "
    "layers as fit in the memory left keep their activations, which is faster: the run uses more then.\n"
    "'fits': even the upper end of the uncertainty fits. 'tight': less than 5% is left. 'uncertain': "
    "only a part of the range fits.\n"
    "To see the estimate for another GPU, press {app.assume_gpu} and type its memory, or start the app "
    "with qlora-tui --gpu-gib 12."
)
