"""Exact-match accuracy of short answers: classification, sentiment, question answering.

Greedy search gives the expected answer exactly if each of its tokens is the most likely one after the tokens
before it. The validation pass computes hidden states at all these positions anyway, so nothing is generated:
every validation sample is counted, at the price of one projection of its answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qlora_tui.training.chunked_loss import IGNORED
from qlora_tui.training.tokenized_dataset import TokenizedDataset

SHORT_TOKENS = 16
"""Tokens in the loss, ends of turns included, up to which the answer of a sample counts as short."""
_CHUNK_ROWS = 256
"""Rows of logits in memory at a time."""


def has_short_answers(samples: TokenizedDataset) -> bool:
    """Whether every sample has a short answer, so that exact-match accuracy is meaningful."""
    return len(samples) > 0 and all(sum(samples.loss_mask(i)) <= SHORT_TOKENS for i in range(len(samples)))


@contextmanager
def last_hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """Collect the decoder's output in the last forward of a peft model: a list with one tensor."""
    hidden: list[Tensor] = []

    def save(module: Any, args: Any, output: Any) -> None:
        hidden[:] = [output[0]]

    hook = model.get_base_model().get_decoder().register_forward_hook(save)
    try:
        yield hidden
    finally:
        hook.remove()


def argmax_tokens(model: Any, logits: Tensor | None, hidden: Tensor, wanted: Tensor) -> Tensor:
    """The most likely token at each position that ``wanted`` selects.

    Scaling and capping of logits is skipped, because it does not change which one is largest.

    Args:
        logits: (batch, tokens, vocabulary); None where the loss was computed in chunks, without whole logits.
        hidden: (batch, tokens, hidden), the input of the head.
        wanted: (batch, tokens - 1), bool.

    Returns:
        (positions,), token ids.
    """
    if logits is not None:
        return logits[:, :-1][wanted].argmax(-1)
    head = model.get_base_model().get_output_embeddings()
    # Where rows of the head are trained, peft copies the whole matrix at each access to its weight.
    weight = getattr(head, "original_module", head).weight
    states = hidden[:, :-1][wanted].to(weight.dtype)
    return torch.cat([head(chunk).argmax(-1) for chunk in torch.split(states, _CHUNK_ROWS)])


def exact_answers(
    predicted: Tensor, labels: Tensor, segments: Sequence[int] | None, turn_ends: frozenset[int]
) -> tuple[int, int]:
    """How many samples were answered exactly, and how many have an answer.

    What a chat template writes after the end of a turn is not part of an answer.

    Args:
        predicted: (positions,), one for each label in ``labels[:, 1:]`` that is not ignored.
        labels: (batch, tokens).
        segments: lengths of the samples packed into the one sequence; None where each sequence is a sample.
    """
    wanted = labels[:, 1:] != IGNORED
    wrong = torch.zeros_like(labels, dtype=torch.bool)
    wrong[:, 1:][wanted] = predicted != labels[:, 1:][wanted]
    answered = labels != IGNORED
    for end in turn_ends:
        wrong[:, 1:] &= labels[:, :-1] != end
    if segments is None:
        parts = list(zip(wrong, answered, strict=True))
    else:
        lengths = list(segments)
        parts = list(zip(torch.split(wrong[0], lengths), torch.split(answered[0], lengths), strict=True))
    answers = [part for part in parts if part[1].any()]
    return sum(not bool(part[0].any()) for part in answers), len(answers)
