"""The number of optimizer steps that an amount of data makes, before it is tokenized and packed."""

from __future__ import annotations

import math

from qlora_tui.recipe.schema import Recipe

_REPLAY_TOKENS = 90
"""Tokens of a replayed answer with its prompt, on average."""


def steps_per_epoch(samples: float, tokens: float, recipe: Recipe) -> int:
    """Estimate the optimizer steps of one pass over the data, without the share held out for validation.

    Args:
        samples: number of samples.
        tokens: their tokens, those beyond ``data.max_length`` left out.
        recipe: says how samples are packed and how many rows make a step.
    """
    trained = 1.0 if recipe.data.validation_path else 1.0 - recipe.data.validation_fraction
    rows = samples * trained
    replayed = rows * recipe.training.replay_share / (1 - recipe.training.replay_share)
    if recipe.data.packing:
        sequence_length = recipe.data.max_length * (2 if recipe.trains_pairs else 1)
        # How much of each row stays empty is only known once the samples are packed.
        rows = math.ceil((tokens * trained + replayed * _REPLAY_TOKENS) / sequence_length)
    else:
        rows += replayed
    return max(1, math.ceil(rows / recipe.effective_batch))


def total_steps(steps_of_epoch: int, recipe: Recipe) -> int:
    """Steps of all epochs, without ``training.max_steps``."""
    return math.ceil(steps_of_epoch * recipe.training.epochs)
