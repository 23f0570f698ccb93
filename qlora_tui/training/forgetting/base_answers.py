"""What the base answers to general prompts, and how likely it finds the next tokens there.

The answers are greedy and short (:mod:`.greedy_answers`). At each of their places the base's
:data:`TOP_TOKENS` most likely tokens are stored with their log-probabilities, so that later comparisons need
no forward pass of the base. Both depend on the base only, and are cached for the next run.

For a prompt of 3 tokens with an answer of 2, of which the second ends the turn::

    ids              p0  p1  p2  a0  a1       (5,)
    predicts a0, a1          ^   ^            places 2 and 3
    top_ids                                   (2, TOP_TOKENS)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from qlora_tui import paths
from qlora_tui.data.conversation import Message, RowRejectedError
from qlora_tui.data.render import prompt_ids
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.files import atomic_write, private_dir
from qlora_tui.recipe.schema import Recipe, Thinking
from qlora_tui.training.answers import answer_greedily
from qlora_tui.training.batches import RowShape
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.head_chunks import block_rows
from qlora_tui.training.quantized_cache import base_state, cache_name
from qlora_tui.training.scoring import PromptAndAnswer, answer_logits, no_grad_eval

TOP_TOKENS = 64
_FORMAT = 2
"""Bump when prompts, answers or what is stored of them change."""


@dataclass(frozen=True)
class BaseAnswer(PromptAndAnswer):
    """The base's answer to one prompt."""

    top_ids: Tensor
    """The base's most likely tokens at each place of the answer, (answer tokens, TOP_TOKENS), int32; fewer
    where the vocabulary is smaller."""
    top_log_probabilities: Tensor
    """Their log-probabilities, float32."""


def cache_path(folder: Path, recipe: Recipe, device: ComputeDevice, prompts: Sequence[Sequence[int]]) -> Path:
    """The file for the answers of a base in one state, quantized in one way, to prompts of these tokens."""
    state = base_state(_FORMAT, folder, recipe, device) | {"prompts": prompts}
    return private_dir(paths.cache_dir() / "base-answers") / f"{cache_name(recipe, state)}.safetensors"


def prompt_tokens(
    prompts: Sequence[str], tokenizer: ChatTokenizer, thinking: Thinking
) -> dict[str, tuple[int, ...]]:
    """The tokens of each prompt as a turn; without the prompts that the chat template refuses."""
    rendered = {}
    for prompt in prompts:
        with suppress(RowRejectedError):
            rendered[prompt] = tuple(prompt_ids([Message("user", prompt)], tokenizer, thinking=thinking))
    return rendered


def read(path: Path, prompts: Sequence[Sequence[int]]) -> tuple[BaseAnswer, ...] | None:
    """The stored answers to ``prompts``; None where there are none that can be read."""
    try:
        tensors = load_file(path)
        answers = []
        for number, prompt in enumerate(prompts):
            ids = (*prompt, *tensors[f"{number}.answer"].tolist())
            answer = BaseAnswer(ids, len(prompt), tensors[f"{number}.ids"], tensors[f"{number}.log"])
            if not len(answer.places) == len(answer.top_ids) == len(answer.top_log_probabilities) > 0:
                return None
            answers.append(answer)
    except Exception:  # whatever the library raises for a damaged file
        return None
    return tuple(answers)


def write(path: Path, answers: Sequence[BaseAnswer]) -> None:
    """Store answers. A full disk, or any other OSError, costs the cache and not the run."""
    tensors: dict[str, Tensor] = {}
    for number, answer in enumerate(answers):
        tensors[f"{number}.answer"] = torch.tensor(answer.ids[answer.prompt_tokens :], dtype=torch.int32)
        tensors[f"{number}.ids"] = answer.top_ids
        tensors[f"{number}.log"] = answer.top_log_probabilities
    try:
        atomic_write(path, save(tensors))
    except OSError as error:
        print(f"The base's answers are not stored: {error}", flush=True)


def compute(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: ChatTokenizer,
    shape: RowShape,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> tuple[BaseAnswer, ...]:
    """Let a base answer the prompts. Draws no random numbers.

    Args:
        model: the base, or a peft model with its adapter disabled.
        progress: called with the number of prompts answered, and of all.
    """
    answers = [
        PromptAndAnswer((*prompt, *answer), len(prompt))
        for prompt, answer in zip(prompts, answer_greedily(model, prompts, tokenizer, device), strict=True)
    ]
    computed: dict[int, BaseAnswer] = {}
    with no_grad_eval(model):
        for number, logits in answer_logits(model, answers, shape, device):
            answer = answers[number]
            top_ids, top_log_probabilities = _most_likely(logits)
            computed[number] = BaseAnswer(answer.ids, answer.prompt_tokens, top_ids, top_log_probabilities)
            progress(len(computed), len(answers))
    return tuple(computed[number] for number in range(len(answers)))


def _most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely tokens, int32, and their log-probabilities, fp32; both (places, TOP_TOKENS)."""
    parts = []
    for block in torch.split(logits, block_rows(logits.device)):
        top = block.float().topk(min(TOP_TOKENS, block.shape[-1]))
        total = block.float().logsumexp(-1, keepdim=True)
        parts.append((top.indices.to(torch.int32).cpu(), (top.values - total).cpu()))
    ids, log_probabilities = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(log_probabilities)
