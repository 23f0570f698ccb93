"""Selection of the next token from the model's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qlora_tui.chat.chat_types import Sampling


def make_sampler(sampling: Sampling, device: torch.device) -> Callable[[Tensor, Tensor], int]:
    """Return a function from ids so far (1, tokens) and next logits (1, vocabulary) to the next id."""
    warp: Any = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        warp.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature == 0:
        return lambda ids, logits: int(warp(ids, logits.float()).argmax())
    warp.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warp.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warp.append(TopPLogitsWarper(sampling.top_p))
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)

    def draw(ids: Tensor, logits: Tensor) -> int:
        return int(torch.multinomial(warp(ids, logits.float()).softmax(-1), 1, generator=generator))

    return draw
