"""What the base answers to general prompts, and how likely it finds the next tokens there.

The answers are greedy, of at most :data:`ANSWER_TOKENS` tokens. At each of their places the base's
:data:`TOP_TOKENS` most likely tokens are stored with their log-probabilities, so that later comparisons need
no forward pass of the base. Both depend on the base only, and are cached for the next run.

For a prompt of 3 tokens with an answer of 2, of which the second ends the turn::

    ids              p0  p1  p2  a0  a1       (5,)
    predicts a0, a1          ^   ^            places 2 and 3
    top_ids                                   (2, TOP_TOKENS)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.evaluation import no_grad_eval
from qlora_tui.training.quantized_cache import cache_name, weights_state

ANSWER_TOKENS = 48
TOP_TOKENS = 64
_FORMAT = 1
"""Bump when prompts, answers or what is stored of them change."""
_BATCH = 16
"""Prompts answered at a time."""


@dataclass(frozen=True)
class BaseAnswer:
    """The base's answer to one prompt."""

    ids: tuple[int, ...]
    """Prompt and answer."""
    prompt_tokens: int
    top_ids: Tensor
    """The base's most likely tokens at each place of the answer, (answer tokens, TOP_TOKENS), int32; fewer
    where the vocabulary is smaller."""
    top_log_probabilities: Tensor
    """Their log-probabilities, float32."""

    @property
    def places(self) -> range:
        """Places whose next token is one of the answer."""
        return range(self.prompt_tokens - 1, len(self.ids) - 1)


def cache_path(folder: Path, recipe: Recipe, device: ComputeDevice, prompts: Sequence[Sequence[int]]) -> Path:
    """The file for the answers of a base in one state, quantized in one way, to prompts of these tokens."""
    state = {
        "format": _FORMAT,
        "folder": str(folder.resolve()),
        "files": weights_state(folder),
        "quantization": recipe.quantization,
        "dtype": device.dtype_name,
        "device": device.kind,
        "prompts": prompts,
    }
    return private_dir(paths.cache_dir() / "base-answers") / f"{cache_name(recipe, state)}.safetensors"


def prompt_tokens(
    prompts: Sequence[str], tokenizer: ChatTokenizer, thinking: Thinking
) -> tuple[tuple[int, ...], ...]:
    """The prompts rendered as one turn each; without those that the chat template refuses."""
    rendered = []
    for prompt in prompts:
        with suppress(RowRejectedError):
            rendered.append(tuple(prompt_ids([Message("user", prompt)], tokenizer, thinking=thinking)))
    return tuple(rendered)


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
    device: torch.device,
    progress: Callable[[int, int], None],
) -> tuple[BaseAnswer, ...]:
    """Let a base answer the prompts. Draws no random numbers.

    Args:
        model: the base, or a peft model with its adapter disabled.
        progress: called with the number of prompts answered, and of all.
    """
    answers: list[BaseAnswer] = []
    with no_grad_eval(model):
        for start in range(0, len(prompts), _BATCH):
            batch = prompts[start : start + _BATCH]
            for prompt, answer in zip(batch, _generate(model, batch, tokenizer, device), strict=True):
                ids = (*prompt, *answer)
                logits = next_token_logits(model, ids, len(prompt), device)
                top = logits.log_softmax(-1).topk(min(TOP_TOKENS, logits.shape[-1]))
                answers.append(
                    BaseAnswer(ids, len(prompt), top.indices.to(torch.int32).cpu(), top.values.cpu())
                )
                progress(len(answers), len(prompts))
    return tuple(answers)


def next_token_logits(model: Any, ids: Sequence[int], prompt_length: int, device: torch.device) -> Tensor:
    """Logits at the places whose next token is one of the answer, (answer tokens, vocabulary), float32."""
    tokens = torch.tensor([ids], device=device)
    count = len(ids) - prompt_length
    # One more, whose next token is unknown: the last place of the answer predicts nothing.
    logits: Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=count + 1).logits
    return logits[0, -count - 1 : -1].float()


def _generate(
    model: Any, prompts: Sequence[Sequence[int]], tokenizer: ChatTokenizer, device: torch.device
) -> Iterator[tuple[int, ...]]:
    """The greedy answers to prompts, padded to one length at their beginnings; each with its turn end."""
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else 0
    length = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (length - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    output = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=ANSWER_TOKENS,
        min_new_tokens=1,
        do_sample=False,
        # The model's generation config may hold these, which greedy search rejects.
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=list(tokenizer.turn_end_ids) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    ends = frozenset(tokenizer.turn_end_ids)
    for answer in output[:, length:].tolist():
        end = next((place for place, token in enumerate(answer) if token in ends), len(answer) - 1)
        yield tuple(answer[: end + 1])
