"""Cache of keys and values for one adapter, kept from turn to turn.

A conversation grows at its end, so each turn computes only the new tokens. Memory grows in blocks and is
written in place, where the stock cache copies all its content for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_STRIDE_TOKENS = 256


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers' caches are not all typed
    """Keys and values of one layer: views into buffers that grow ahead of need.

    ``keys`` and ``values``: (1, heads, tokens, width), as in :class:`DynamicLayer`.
    """

    _buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens; return all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            tokens = max(end + _STRIDE_TOKENS, start * 3 // 2)
            self._buffers = (
                _grow(self.keys if start else None, key_states, tokens),
                _grow(self.values if start else None, value_states, tokens),
            )
        keys, values = self._buffers
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def truncate(self, tokens: int) -> None:
        """Keep only the first ``tokens``."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :tokens], self.values[:, :, :tokens]


class PrefixCache:
    """Token ids that one adapter has processed, with their cache."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.clear()

    def clear(self) -> None:
        """Clear ids and cache."""
        self.cache = _new_cache(self._config)
        self.token_ids: list[int] = []

    def reuse(self, prompt: Sequence[int]) -> int:
        """Truncate the cache to the common prefix with ``prompt``; return its length in tokens.

        The last token is always processed again, because its logits give the first token of the answer.
        """
        pairs = zip(self.token_ids, prompt[:-1], strict=False)
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        layers = self.cache.layers
        if known < len(self.token_ids):
            if known and all(isinstance(layer, GrowingLayer) for layer in layers):
                for layer in layers:
                    layer.truncate(known)
            else:
                # Sliding windows and recurrent states cannot be truncated.
                self.clear()
                known = 0
            del self.token_ids[known:]
        return known


def _new_cache(config: Any) -> Any:
    growing: Any = GrowingLayer
    cache = DynamicCache(config=config)
    cache.layers = [growing() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _grow(filled: Tensor | None, sample: Tensor, tokens: int) -> Tensor:
    batch, heads, _, width = sample.shape
    buffer = torch.empty((batch, heads, tokens, width), dtype=sample.dtype, device=sample.device)
    if filled is not None:
        buffer[:, :, : filled.shape[-2]] = filled
    return buffer
