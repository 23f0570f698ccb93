"""Selection of the next token from the model's logits."""

from __future__ import annotations

from collections.abc import Sequence
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


class TokenSampler:
    """Selects the tokens of one answer, on the device of the logits."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], device: torch.device) -> None:
        self._warp: Any = LogitsProcessorList()
        self._ids: Tensor | None = None
        """Tokens so far (1, tokens), where a setting depends on them."""
        self._generator: torch.Generator | None = None
        if sampling.repetition_penalty != 1.0:
            self._warp.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
            self._ids = torch.tensor([prompt], device=device)
        if sampling.temperature == 0:
            return
        self._warp.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self._warp.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warp.append(TopPLogitsWarper(sampling.top_p))
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def next(self, logits: Tensor) -> Tensor:
        """Return the next token (1, 1) from its logits (1, vocabulary)."""
        warped = self._warp(self._ids, logits.float())
        if self._generator is None:
            token: Tensor = warped.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(warped.softmax(-1), 1, generator=self._generator)
        if self._ids is not None:
            self._ids = torch.cat([self._ids, token], dim=1)
        return token
