"""Prompts and reference answers of validation samples: the last answer of each row that is in the loss.

The prompt is what the model read in training before that answer, token by token::

    ids        <user> how are you <end> <assistant> fine <end>
    mask         0     0   0   0    0        0        1    1
    prompt     ------------------------------------
    reference                                         ----------
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qlora_tui.data.store import Samples

_MIN_NEW_TOKENS, _MAX_NEW_TOKENS = 32, 512
_STEP_TOKENS = 32
"""The limit of an answer is a multiple of this, so that answers to other rows are stored in the same file."""


class TaskPrompt(NamedTuple):
    """One prompt with its reference."""

    source: int
    row: int
    file: str
    """Name of the row's file in the source; empty where the source is one file."""
    ids: tuple[int, ...]
    """Token ids of the prompt."""
    reference: tuple[int, ...]
    """Token ids of the reference answer, without what follows its turn end."""
    sample: int
    """Number of its sample in the validation data."""


def task_prompts(samples: Samples, turn_ends: frozenset[int], most: int) -> list[TaskPrompt]:
    """Up to ``most`` prompts, spread evenly over the rows.

    Rows that were cut before the end of their answer, and rows without a prompt, have none.

    Args:
        samples: the validation data.
        turn_ends: token ids that end a turn.
        most: at least 1.
    """
    prompts = []
    for i in range(len(samples)):
        place = *samples.origin(i), samples.file_name(i)
        if i + 1 < len(samples) and (*samples.origin(i + 1), samples.file_name(i + 1)) == place:
            # With this template, each turn of this row is a separate sample.
            continue
        ids, mask = tuple(samples.token_ids(i)), tuple(samples.loss_mask(i))
        bounds = last_answer(ids, mask, turn_ends)
        if bounds is not None:
            start, end = bounds
            prompts.append(TaskPrompt(*place, ids[:start], ids[start:end], i))
    count = min(len(prompts), most)
    return [prompts[number * len(prompts) // count] for number in range(count)]


def answer_limit(longest_reference: int, context_length: int) -> int:
    """Most tokens of an answer: half as many again as the longest reference, in steps, within the context."""
    wanted = -(-longest_reference * 3 // (2 * _STEP_TOKENS)) * _STEP_TOKENS
    return min(max(_MIN_NEW_TOKENS, wanted), _MAX_NEW_TOKENS, max(1, context_length // 2))


def last_answer(ids: Sequence[int], mask: Sequence[int], turn_ends: frozenset[int]) -> tuple[int, int] | None:
    """Start and end of the last stretch in the loss, up to its turn end; None where it is cut, or is all."""
    stop = next((place + 1 for place in range(len(mask) - 1, -1, -1) if mask[place]), 0)
    start = stop
    while start and mask[start - 1]:
        start -= 1
    end = next((place + 1 for place in range(stop - 1, start - 1, -1) if ids[place] in turn_ends), 0)
    return (start, end) if start > 0 and end > start + 1 else None
