"""Checks before a launch how many steps a run has, and which of Max steps and Epochs ends it."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_tui.data.quick_check import FileSize, steps_per_epoch, total_steps
from qlora_tui.formatting import pluralize
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.machine_checks import Check, CheckKind
from qlora_tui.runs.suggested_fix import FEW_STEPS, SuggestedFix

_MARGIN = 1.25
"""Factor between the two limits from which the estimate says for certain which comes first."""


def check_step_limit(recipe: Recipe, sizes: Sequence[FileSize], *, complete: bool) -> list[Check]:
    """Say how many steps the run has, and warn if they are too few or Max steps and Epochs clearly disagree.

    ``sizes``: the data that was read; ``complete``: whether that is all of it.
    """
    limit, epochs, sources = recipe.training.max_steps, recipe.training.epochs, recipe.data.sources
    # The sources come first; after them is the validation file, which no step trains on.
    trained = [(size, sources[size.source].weight) for size in sizes if size.source < len(sources)]
    samples = sum(size.samples * weight for size, weight in trained)
    if not samples:
        return []
    steps_of_epoch = steps_per_epoch(samples, sum(size.tokens * weight for size, weight in trained), recipe)
    steps = total_steps(steps_of_epoch, recipe)
    of_epochs = "1 epoch" if epochs == 1 else f"{epochs:g} epochs"
    suggested_fix = None
    if limit and limit * _MARGIN < steps:
        suggested_fix = SuggestedFix("train all epochs", changes={"training.max_steps": 0})
        about = "about" if complete else "less than"
        text = (
            f"Max steps is {limit:,}: the run ends after {about} {limit / steps_of_epoch:.2g} of the "
            f"{of_epochs} set."
        )
        every = f" (about {pluralize(steps, 'step')})" if complete else ""
        fix = f"To train all epochs{every}, set Max steps (training.max_steps) to 0."
    elif complete and steps < FEW_STEPS:
        text = f"The run has only about {pluralize(steps, 'step')}: it will learn hardly anything."
        sequences = pluralize(recipe.effective_batch, "sequence")
        fix = f"One step takes {sequences}: raise Epochs, or lower Gradient accumulation or Micro-batch size."
    elif limit and complete and limit > steps * _MARGIN:
        text = (
            f"Epochs is {epochs:g}: the run ends after about {pluralize(steps, 'step')}, before the "
            f"{limit:,} of Max steps."
        )
        fix = "To train longer, raise Epochs (training.epochs)."
    elif complete:
        about = pluralize(min(steps, limit or steps), "step")
        return [Check(CheckKind.SETTINGS, "ok", f"About {about} in {of_epochs}.")]
    else:
        return []
    return [Check(CheckKind.SETTINGS, "warning", text, fix, suggested_fix=suggested_fix)]
