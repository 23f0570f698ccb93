"""The samples of a row that a preference method trains on: both sides of a pair, or one rated answer.

Methods for pairs store two samples for each rejected answer of a row, the chosen side first. ``kto`` stores
one sample for each answer, good or bad. Used by ``row_result``.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from qlora_tui.data.conversation import Conversation
from qlora_tui.data.sample_tokens import TokenizedSample
from qlora_tui.data.store import BAD, GOOD
from qlora_tui.recipe.schema import PAIR_METHODS, PreferenceMethod


def last_samples(
    conversation: Conversation, rendered: Sequence[Sequence[TokenizedSample]]
) -> list[TokenizedSample]:
    """Return the sample that holds the answer, for the conversation and each of its rejected alternatives.

    Texts without turns share their beginning, which is then their prompt and is not in the loss.
    """
    samples = [each[-1] for each in rendered]
    if not conversation.text or len(samples) < 2:
        return samples
    shared = _shared(samples)
    return [_masked(sample, shared) for sample in samples]


def side_names(conversation: Conversation) -> tuple[str, ...]:
    """Name the samples of :func:`last_samples` for people; empty without a preference method."""
    if conversation.rated_good is not None:
        return ("good" if conversation.rated_good else "bad",)
    return ("chosen", *["rejected"] * len(conversation.rejected)) if conversation.rejected else ()


def sides_of(
    conversation: Conversation, fitted: Sequence[TokenizedSample | None], method: PreferenceMethod
) -> list[tuple[TokenizedSample, int]]:
    """Return the samples to store, each with its side.

    Args:
        fitted: the samples within the length limit, as :func:`last_samples` orders them; None for one of
            which nothing is left to learn. A pair without one of its sides is left out.
    """
    first, *others = fitted
    if method in PAIR_METHODS:
        return [
            one
            for other in others
            if first is not None and other is not None
            for one in ((first, GOOD), (other, BAD))
        ]
    good = BAD if conversation.rated_good is False else GOOD
    rated = [(first, good), *((other, BAD) for other in others)]
    return [(sample, side) for sample, side in rated if sample is not None]


def _shared(samples: Sequence[TokenizedSample]) -> int:
    """Count the tokens that all samples begin with."""
    columns = zip(*(sample.token_ids for sample in samples), strict=False)
    count = 0
    for column in columns:
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _masked(sample: TokenizedSample, tokens: int) -> TokenizedSample:
    mask = bytes(tokens) + sample.loss_mask[tokens:]
    return msgspec.structs.replace(sample, loss_mask=mask)
