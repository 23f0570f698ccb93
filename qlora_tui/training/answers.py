"""Greedy answers of a model to batches of prompts and to the sample prompts of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch

from qlora_tui.data.conversation import Message
from qlora_tui.data.render import prompt_ids
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.memory.step import ANSWER_TOKENS
from qlora_tui.recipe.schema import Thinking
from qlora_tui.training.scoring import no_grad_eval

SAMPLE_TOKENS = 96
"""Maximum number of tokens of an answer to a sample prompt."""
MOST_LIKELY: Final[dict[str, Any]] = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
"""Arguments of ``generate`` that select the most likely token.

They override settings of the model's generation config that greedy search rejects, or that change which token
is most likely. For example, Qwen2.5's config penalizes tokens of the prompt, such as labels to choose from.
"""


def answer_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: ChatTokenizer,
    device: torch.device,
    max_new_tokens: int = ANSWER_TOKENS,
    max_seconds: float | None = None,
    *,
    may_be_empty: bool = False,
) -> list[tuple[int, ...]]:
    """Return a greedy answer to each prompt, of at most ``max_new_tokens`` tokens including its turn end.

    All prompts are answered in one batch, padded on the left. Draws no random numbers.

    Args:
        prompts: token ids.
        max_seconds: time limit, after which no answer is continued; None for no limit.
        may_be_empty: whether the turn end may be the first token.
    """
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else 0
    length = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (length - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    with no_grad_eval(model), _contiguous_head_input(model):
        output = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            min_new_tokens=0 if may_be_empty else 1,
            **MOST_LIKELY,
            eos_token_id=list(tokenizer.turn_end_ids) or None,
            pad_token_id=pad,
            use_cache=True,
            max_time=max_seconds,
        )
    ends = frozenset(tokenizer.turn_end_ids)
    answers = []
    for answer in output[:, length:].tolist():
        end = next((place for place, token in enumerate(answer) if token in ends), len(answer) - 1)
        answers.append(tuple(answer[: end + 1]))
    return answers


@contextmanager
def _contiguous_head_input(model: Any) -> Iterator[None]:
    """Copy the last states of a prompt batch before they enter the output head.

    These states are a slice of all states and therefore not contiguous. torch then treats the product of a
    16-bit batch as one product for each prompt, and oneDNN copies the head's whole weight for each: 16
    prompts took 864 MiB and 2.3 s with SmolLM2-135M on a CPU instead of 6 MiB and 0.02 s.
    """

    def copy(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].contiguous(), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(copy)
    try:
        yield
    finally:
        hook.remove()


def generate_samples(
    model: Any,
    tokenizer: ChatTokenizer,
    prompts: Sequence[str],
    device: torch.device,
    thinking: Thinking = "auto",
) -> Iterator[tuple[str, str]]:
    """Yield (prompt, greedy answer) for each prompt. Draws no random numbers."""
    for prompt in prompts:
        ids = prompt_ids([Message("user", prompt)], tokenizer, thinking=thinking)
        (answer,) = answer_greedily(model, [ids], tokenizer, device, SAMPLE_TOKENS, may_be_empty=True)
        yield prompt, tokenizer.decode([i for i in answer if i not in tokenizer.special_ids]).strip()
