"""Cache of keys and values for one adapter, kept from turn to turn.

A conversation grows at its end, so each turn computes only the new tokens. Memory grows in blocks and is
written in place, where the stock cache copies all its content for every token.

On a GPU a decoding step (:mod:`qlora_tui.chat.decode_step`) works in the same buffers with shapes that never
change: inside :func:`fixed_shapes` each layer writes at a position that a tensor holds, and returns its whole
buffer, of which the model's mask hides the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qlora_tui.training.length_scaled_rope import frequency_switch

if TYPE_CHECKING:
    from qlora_tui.chat.decode_step import DecodeStep

_STRIDE_TOKENS = 256
_SMALLEST_BUCKET_TOKENS = 1024
_ALIGNED_TOKENS = 64
"""Multiple to which a GPU's buffers are rounded, so that kernels can read masks without copying them."""
_MAX_SHARE_OF_FREE_MEMORY = 0.5
"""Share of the free memory that larger buffers may take: prefill and other programs need some too."""

FreeBytesFn = Callable[[], int]


@dataclass
class BufferSize:
    """Size of the buffers of all layers, which grow together."""

    tokens: int = 0


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers' caches are not all typed
    """Keys and values of one layer: views into buffers that grow ahead of need.

    ``keys`` and ``values``: (1, heads, tokens, width), as in :class:`DynamicLayer`. With a sliding ``window``
    the tokens before it are kept too, so that the layer can be truncated; the model's mask hides them.
    """

    def __init__(self, size: BufferSize, window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers' own
        self.size = size
        self.window = window
        self.is_sliding = window is not None
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.position: Tensor | None = None
        """Where a step of fixed shape writes its token: (1,). None outside :func:`fixed_shapes`."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens; return all of them, as views."""
        if self.position is not None and self.buffers is not None:
            keys, values = self.buffers
            keys.index_copy_(2, self.position, key_states)
            values.index_copy_(2, self.position, value_states)
            return keys, values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.buffers is None or end > self.buffers[0].shape[-2]:
            tokens = max(end, self.size.tokens)
            self.buffers = (
                _grow(self.keys if start else None, key_states, tokens),
                _grow(self.values if start else None, value_states, tokens),
            )
        keys, values = self.buffers
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def set_length(self, tokens: int) -> None:
        """Let the first ``tokens`` of the buffers be the content."""
        if self.buffers is not None:
            self.keys, self.values = (buffer[:, :, :tokens] for buffer in self.buffers)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that :meth:`update` will return."""
        if self.position is not None and self.buffers is not None:
            return self.buffers[0].shape[-2], 0
        return super().get_mask_sizes(query_length)

    def get_seq_length(self) -> Any:
        """Return the tokens so far: a number, or a tensor inside :func:`fixed_shapes`."""
        return super().get_seq_length() if self.position is None else self.position[0]


@contextmanager
def fixed_shapes(layers: Sequence[GrowingLayer], position: Tensor) -> Iterator[None]:
    """Write one token at ``position`` (1,) of the buffers, and return whole buffers, inside the block."""
    for layer in layers:
        layer.position = position
        # transformers then makes a mask even for one token, and without looking at the position.
        layer.is_compileable = True
    try:
        yield
    finally:
        for layer in layers:
            layer.position = None
            layer.is_compileable = False


def reusable_prefix(processed: Sequence[int], prompt: Sequence[int]) -> int:
    """Return how many first tokens ``processed`` and ``prompt`` share, without the prompt's last.

    After ``1 2 3``, the prompt ``1 2 3`` reuses two tokens.
    """
    pairs = zip(processed, prompt[:-1], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class PrefixCache:
    """Token ids that one adapter has processed, with their cache.

    Args:
        config: of the model.
        free_bytes: free memory of a GPU. With it the buffers double, so that a step is seldom recorded again,
            and layers with a sliding window keep all tokens, as long as memory allows.
        max_tokens: context length of the model.
    """

    def __init__(self, config: Any, free_bytes: FreeBytesFn | None = None, max_tokens: int = 1 << 30) -> None:
        self._config = config
        self._switch = frequency_switch(config.get_text_config())
        self._free_bytes = free_bytes
        self._max_tokens = max_tokens
        self.clear()

    def clear(self) -> None:
        """Clear ids and cache."""
        self._size = BufferSize()
        self.cache = _new_cache(self._config, self._size, keep_windows=self._free_bytes is not None)
        self.token_ids: list[int] = []
        self.step: DecodeStep | None = None
        """Decoding step on the present buffers."""
        self._has_steps = False
        """Whether decoding steps have added tokens since the layers' lengths were set."""

    @property
    def growing_layers(self) -> list[GrowingLayer] | None:
        """Return the layers, where all of them are growing buffers; else None."""
        layers = self.cache.layers
        return layers if all(isinstance(layer, GrowingLayer) for layer in layers) else None

    @property
    def has_room(self) -> bool:
        """Return whether the buffers have room for one more token."""
        return len(self.token_ids) < self._size.tokens

    def reserve(self, new_tokens: int) -> None:
        """Choose the size of the buffers before ``new_tokens`` are added."""
        if self._has_steps:
            self._set_lengths()
        count = len(self.token_ids)
        tokens = count + new_tokens
        if tokens <= self._size.tokens:
            return
        self.step = None
        if self._free_bytes is None:
            self._size.tokens = max(tokens + _STRIDE_TOKENS, count * 3 // 2)
            return
        bucket = _SMALLEST_BUCKET_TOKENS
        while bucket <= tokens:
            bucket *= 2
        bucket = _aligned(max(tokens, min(bucket, self._max_tokens)))
        if self._bytes_per_token() * bucket <= self._free_bytes() * _MAX_SHARE_OF_FREE_MEMORY:
            self._size.tokens = bucket
        else:
            self._size.tokens = _aligned(tokens + _STRIDE_TOKENS)
            self._cut_windows()

    def outdated_by(self, new_tokens: int) -> bool:
        """Return whether the cached keys have the frequencies of a shorter text than with ``new_tokens``."""
        count = len(self.token_ids)
        return self._switch is not None and 0 < count <= self._switch < count + new_tokens

    def add_step(self, token_id: int) -> None:
        """Note a token that a decoding step has added to the buffers."""
        self.token_ids.append(token_id)
        self._has_steps = True

    def reuse(self, prompt: Sequence[int]) -> int:
        """Truncate the cache to the common prefix with ``prompt``; return its length in tokens.

        The last token is always processed again, because its logits give the first token of the answer.
        """
        if self._switch is not None and len(prompt) <= self._switch < len(self.token_ids):
            self.clear()
        known = reusable_prefix(self.token_ids, prompt)
        if known < len(self.token_ids):
            if known and self.growing_layers is not None:
                del self.token_ids[known:]
                self._set_lengths()
            else:
                # Sliding windows and recurrent states cannot be truncated.
                self.clear()
                known = 0
        return known

    def _set_lengths(self) -> None:
        for layer in self.growing_layers or ():
            layer.set_length(len(self.token_ids))
        self._has_steps = False

    def _bytes_per_token(self) -> int:
        """Return the bytes of keys and values of a token; 0 before the first."""
        return sum(
            buffer.nbytes // buffer.shape[-2]
            for layer in self.cache.layers
            if isinstance(layer, GrowingLayer)
            for buffer in layer.buffers or ()
        )

    def _cut_windows(self) -> None:
        """Drop what lies before the sliding windows, as transformers does."""
        layers = self.cache.layers
        for index, layer in enumerate(layers):
            if not isinstance(layer, GrowingLayer) or layer.window is None:
                continue
            layers[index] = DynamicSlidingWindowLayer(sliding_window=layer.window)
            if layer.is_initialized:
                layers[index].update(layer.keys, layer.values)


def _aligned(tokens: int) -> int:
    return -(-tokens // _ALIGNED_TOKENS) * _ALIGNED_TOKENS


def _new_cache(config: Any, size: BufferSize, *, keep_windows: bool) -> Any:
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer(size)
        elif keep_windows and type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = GrowingLayer(size, layer.sliding_window)
    return cache


def _grow(filled: Tensor | None, sample: Tensor, tokens: int) -> Tensor:
    """Return a buffer for ``tokens``, zero where nothing is filled: masked values must be finite."""
    batch, heads, _, width = sample.shape
    buffer = torch.zeros((batch, heads, tokens, width), dtype=sample.dtype, device=sample.device)
    if filled is not None:
        buffer[:, :, : filled.shape[-2]] = filled
    return buffer
