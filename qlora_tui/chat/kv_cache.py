"""Keys and values of what one voice has read, kept from turn to turn.

A conversation grows at its end, so each turn reads only what is new. Memory is taken in strides and written
in place, where the stock cache copies everything it holds for every token.
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
    """One layer's keys and values: views into room that grows ahead of need.

    ``keys`` and ``values``: (1, heads, tokens, width), as :class:`DynamicLayer` has them.
    """

    _buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the keys and values of the tokens just read; all of them, as views."""
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
        """Keep the first ``tokens`` only."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :tokens], self.values[:, :, :tokens]


class PrefixCache:
    """What one voice has read so far, and the cache that goes with it."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.cache = _new_cache(self._config)
        self.token_ids: list[int] = []

    def reuse(self, prompt: Sequence[int]) -> int:
        """Go back to where ``prompt`` parts from what was read; how many of its tokens are known.

        The last token is always read again: the answer begins with what the model says after it.
        """
        pairs = zip(self.token_ids, prompt[:-1], strict=False)
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        layers = self.cache.layers
        if known < len(self.token_ids):
            if known and all(isinstance(layer, GrowingLayer) for layer in layers):
                for layer in layers:
                    layer.truncate(known)
            else:
                # Sliding windows and recurrent states cannot go back.
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
