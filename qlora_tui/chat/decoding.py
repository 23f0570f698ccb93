"""The keys and values of a conversation, and the step that adds one token to them.

A conversation grows at its end, so each turn computes only the new tokens. Buffers grow in blocks and are
written in place, whereas the stock cache copies its whole content for every token.

On a GPU, a step works in these buffers with shapes that never change, is recorded as a CUDA graph, and is
replayed for each token. A step launches over a thousand small kernels, which takes Python longer than the GPU
needs to compute them. A graph launches all of them at once. It repeats the same kernels at the same
addresses, so everything that changes between tokens is in tensors that stay in place: the token, its
position, and the keys and values so far. Inside :func:`fixed_shapes`, each layer writes at a position that a
tensor holds, and returns its whole buffer, of which the model's mask hides the unused part.

The first tokens of an answer are computed by the same step before it is recorded, so that an answer does not
depend on when the step is recorded. The check of the first prompt compares this step with transformers
(:mod:`qlora_tui.chat.session_check`). When the step has been recorded, the recording is run on the tokens
that were computed before it, and must reproduce their logits up to rounding. If a step cannot be computed in
fixed shapes, for example because of a recurrent state, tokens are decoded as on a CPU. If it can be computed
but not recorded, for example because a layer waits for the GPU, it is computed without a recording. In both
cases, ``DecodeSteps.why_not`` has the reason.

Adapters are not merged. Merging into a 4-bit base quantizes it again, and merging into a 16-bit base rounds.
Both change what was trained, and the base must be able to answer without the adapter too. In a graph, the two
thin products of each layer cost no launches, and their weights are about 2 % of the base's.

On a CPU there is no such step, because it would attend to the whole buffer without a benefit.
"""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qlora_tui.chat.logits import LogitsComparison
from qlora_tui.errors import first_line
from qlora_tui.formatting import format_bytes
from qlora_tui.training.length_scaled_rope import frequency_switch

STRIDE_TOKENS = 256
"""Number of tokens by which buffers grow in advance."""
_SMALLEST_BUCKET_TOKENS = 1024
_ALIGNED_TOKENS = 64
"""Multiple to which a GPU's buffers are rounded up, so that kernels can read masks without copying them."""
MAX_SHARE_OF_FREE_MEMORY = 0.5
"""Share of the free memory that growing buffers may take: prefill and other programs need some too."""

FreeBytesFn = Callable[[], int]


@dataclass
class BufferSize:
    """Size of the buffers of all layers, which grow together."""

    tokens: int = 0


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers' caches are not all typed
    """Keys and values of one layer, as views into buffers that grow in advance.

    ``keys`` and ``values`` have the shape (rows, heads, tokens, width), as in :class:`DynamicLayer`. With a
    sliding ``window``, the tokens before it are kept too, so that the layer can be truncated; the model's
    mask hides them.
    """

    def __init__(self, size: BufferSize, window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers' own
        self.size = size
        self.window = window
        self.is_sliding = window is not None
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.position: Tensor | None = None
        """Position (1,) at which a step writes its token; None outside :func:`fixed_shapes`."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens; return those of all tokens so far, as views.

        Inside :func:`fixed_shapes`, write them at ``position`` and return the whole buffers.
        """
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
        """Set the content to the first ``tokens`` of the buffers."""
        if self.buffers is not None:
            self.keys, self.values = (buffer[:, :, :tokens] for buffer in self.buffers)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the keys that :meth:`update` will return."""
        if self.position is not None and self.buffers is not None:
            return self.buffers[0].shape[-2], 0
        return super().get_mask_sizes(query_length)

    def get_seq_length(self) -> Any:
        """Return the number of tokens so far, which is a tensor inside :func:`fixed_shapes`."""
        return super().get_seq_length() if self.position is None else self.position[0]


@contextmanager
def fixed_shapes(layers: Sequence[GrowingLayer], position: Tensor) -> Iterator[None]:
    """Make layers write one token at ``position`` (1,) and return their whole buffers, inside the block."""
    for layer in layers:
        layer.position = position
        # transformers then creates a mask even for one token, without reading the position.
        layer.is_compileable = True
    try:
        yield
    finally:
        for layer in layers:
            layer.position = None
            layer.is_compileable = False


def reusable_prefix(processed: Sequence[int], prompt: Sequence[int]) -> int:
    """Return the number of leading tokens that ``processed`` and ``prompt`` share, excluding the prompt's
    last token.

    If ``1 2 3`` was processed, the prompt ``1 2 3`` reuses two tokens.
    """
    pairs = zip(processed, prompt[:-1], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class PrefixCache:
    """Token ids that one adapter has processed, with their keys and values.

    Args:
        config: Config of the model.
        free_bytes: Function that returns the free memory of a GPU. If given, buffers double, so that steps
            are seldom recorded again, and layers with a sliding window keep all tokens as long as memory
            allows.
        max_tokens: Context length of the model.
    """

    def __init__(self, config: Any, free_bytes: FreeBytesFn | None = None, max_tokens: int = 1 << 30) -> None:
        self._config = config
        self._switch = frequency_switch(config.get_text_config())
        self._free_bytes = free_bytes
        self._max_tokens = max_tokens
        self.clear()

    def clear(self) -> None:
        """Remove all token ids, keys and values."""
        self._size = BufferSize()
        self.cache = _new_cache(self._config, self._size, keep_windows=self._free_bytes is not None)
        self.token_ids: list[int] = []
        self.step: DecodeStep | None = None
        """Decoding step on the current buffers."""
        self._has_steps = False
        """Whether decoding steps have added tokens since the layers' lengths were set."""

    def release(self) -> Any:
        """Hand over the cache with the keys and values, and keep only the token ids; see :meth:`restore`."""
        if self._has_steps:
            self._set_lengths()
        cache, token_ids = self.cache, self.token_ids
        self.clear()
        self.token_ids = token_ids
        return cache

    def restore(self, cache: Any, size: BufferSize) -> None:
        """Take back a cache that holds the keys and values of the token ids, in buffers of ``size``."""
        self.cache, self._size, self.step = cache, size, None

    @property
    def depends_on_length(self) -> bool:
        """Return whether the rotary frequencies of keys depend on the length of the text."""
        return self._switch is not None

    @property
    def size_bytes(self) -> int:
        """Return the size of the key and value buffers, in bytes."""
        return bytes_per_token(self.cache) * self._size.tokens

    @property
    def growing_layers(self) -> list[GrowingLayer] | None:
        """Return the layers if all of them are growing buffers; otherwise None."""
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
            self._size.tokens = max(tokens + STRIDE_TOKENS, count * 3 // 2)
            return
        bucket = _SMALLEST_BUCKET_TOKENS
        while bucket <= tokens:
            bucket *= 2
        bucket = _aligned(max(tokens, min(bucket, self._max_tokens)))
        if bytes_per_token(self.cache) * bucket <= self._free_bytes() * MAX_SHARE_OF_FREE_MEMORY:
            self._size.tokens = bucket
        else:
            self._size.tokens = _aligned(tokens + STRIDE_TOKENS)
            self._cut_windows()

    def outdated_by(self, new_tokens: int) -> bool:
        """Return whether adding ``new_tokens`` changes the rotary frequencies of the cached keys."""
        count = len(self.token_ids)
        return self._switch is not None and 0 < count <= self._switch < count + new_tokens

    def add_step(self, token_id: int) -> None:
        """Record a token that a decoding step has added to the buffers."""
        self.token_ids.append(token_id)
        self._has_steps = True

    def reuse(self, prompt: Sequence[int]) -> int:
        """Truncate the cache to the common prefix with ``prompt``, and return its length in tokens.

        A cache with sliding windows or recurrent states cannot be truncated, so it is cleared instead. The
        last token of the prompt is always processed again, because its logits predict the first token of the
        answer.
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

    def _cut_windows(self) -> None:
        """Drop the tokens before the sliding windows, as transformers does."""
        layers = self.cache.layers
        for index, layer in enumerate(layers):
            if not isinstance(layer, GrowingLayer) or layer.window is None:
                continue
            layers[index] = DynamicSlidingWindowLayer(sliding_window=layer.window)
            if layer.is_initialized:
                layers[index].update(layer.keys, layer.values)


def bytes_per_token(cache: Any) -> int:
    """Return the bytes of keys and values per token of one row; 0 before the first token."""
    return sum(
        buffer[0].nbytes // buffer.shape[-2]
        for layer in cache.layers
        if isinstance(layer, GrowingLayer)
        for buffer in layer.buffers or ()
    )


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
    """Return a buffer for ``tokens`` that begins with the content of ``filled``.

    The rest is zeros, because masked values must be finite, too.
    """
    batch, heads, _, width = sample.shape
    buffer = torch.zeros((batch, heads, tokens, width), dtype=sample.dtype, device=sample.device)
    if filled is not None:
        buffer[:, :, : filled.shape[-2]] = filled
    return buffer


_STEPS_BEFORE_RECORDING = 8
"""Number of steps that are computed before one is recorded.

Recording takes as long as several steps. The recorded step is compared with these: with a single one, a
position that never advances would pass.
"""
_WARM_UPS = 2
"""Number of times that a step runs just before it is recorded, so that libraries choose kernels and allocate
workspaces.
"""
_MIN_FREE_BYTES = 512 * 2**20
"""Minimum free memory for recording, in bytes. A graph has its own memory for intermediate results."""

Function = Callable[[], None]
"""A function that reads and writes fixed tensors."""
Record = Callable[[Function], Function]
"""Records what a function computes, and returns a function that repeats it."""
Forward = Callable[[Tensor, Tensor, Any], Tensor]
"""Computes logits (1, vocabulary) from a token (1, 1), its position (1, 1) and transformers' cache."""


@dataclass(frozen=True)
class _ComputedStep:
    """Input and result of a step that was computed without a recording."""

    token: Tensor
    position: int
    logits: Tensor


@dataclass
class _Tensors:
    """Tensors that a step reads and writes in place."""

    token: Tensor
    """Token id, of shape (1, 1)."""
    position: Tensor
    """Position of the token, of shape (1,)."""
    logits: Tensor | None = None
    """Logits of shape (1, vocabulary), set by the first step."""


class DecodeStep:
    """The decoding step of one token, on the buffers of one cache."""

    def __init__(
        self, layers: list[GrowingLayer], cache: Any, forward: Forward, device: torch.device
    ) -> None:
        token, position = (torch.zeros(shape, dtype=torch.long, device=device) for shape in ((1, 1), (1,)))
        self._tensors = tensors = _Tensors(token, position)
        self._steps: deque[_ComputedStep] = deque(maxlen=_STEPS_BEFORE_RECORDING)
        self.is_recorded = False

        # No reference to self: a cycle would keep the buffers until the next garbage collection.
        def compute() -> None:
            with fixed_shapes(layers, position):
                logits = forward(token, position[None], cache)
            if tensors.logits is None:
                tensors.logits = torch.empty_like(logits)
            tensors.logits.copy_(logits)

        self._compute: Function = compute

    def run(self, token: Tensor, position: int) -> Tensor:
        """Process ``token`` (1, 1) at ``position``; return the logits (1, vocabulary) after it.

        The next call overwrites these logits.
        """
        logits = self._run(token, position)
        if not self.is_recorded:
            self._steps.append(_ComputedStep(token.clone(), position, logits.clone()))
        return logits

    @property
    def is_due(self) -> bool:
        """Return whether enough steps were computed to record one."""
        return len(self._steps) == _STEPS_BEFORE_RECORDING

    def record(self, record: Record, noise: float) -> str:
        """Record the step, and use the recording if it reproduces the logits of the earlier steps.

        Args:
            record: Records a function.
            noise: Difference of logits that rounding can cause, as in :class:`LogitsComparison`.

        Returns:
            Why the step is not recorded; empty if it is. If ``record`` raises an exception, its text is the
            reason. What a wrong recording has written to the cache stays there.
        """
        compute, reason = self._compute, ""
        try:
            self._compute = record(compute)
            worst = max(
                LogitsComparison.of(self._run(step.token, step.position), step.logits).difference
                for step in self._steps
            )
            # The kernels are the same as before, so the tolerance is smaller than between two
            # implementations.
            if not worst <= noise:
                reason = f"its logits differed by {worst:.2g} of their standard deviation"
        except Exception as error:
            # Drivers, kernels and models raise any exception, and the step can still be computed without a
            # recording.
            reason = first_line(error).rstrip(".")
        if reason:
            self._compute = compute
            return f"The decoding step could not be recorded: {reason}."
        self.is_recorded = True
        self._steps.clear()
        return ""

    def _run(self, token: Tensor, position: int) -> Tensor:
        self._tensors.token.copy_(token)
        self._tensors.position.fill_(position)
        self._compute()
        assert self._tensors.logits is not None
        return self._tensors.logits


class DecodeSteps:
    """The decoding steps of a session, for the adapters and caches that allow them."""

    def __init__(
        self,
        forward: Callable[[str], Forward],
        record: Record,
        free_bytes: FreeBytesFn,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._device = device
        self._record = record
        self.free_bytes = free_bytes
        self.in_use = True
        """Whether decoding steps in fixed shapes are used."""
        self.why_not = ""
        """Why steps are not recorded, in a sentence; empty while they are recorded."""
        self._with_steps: weakref.WeakSet[PrefixCache] = weakref.WeakSet()
        """Caches that have or had a step."""

    def forget(self) -> None:
        """Drop all steps, because weights that recorded steps use have moved."""
        for prefix_cache in self._with_steps:
            prefix_cache.step = None
        self._with_steps.clear()

    def turn_off(self, why_not: str) -> None:
        """Stop computing steps in fixed shapes."""
        self.in_use = False
        self.why_not = why_not

    def step(self, adapter_name: str, prefix_cache: PrefixCache) -> DecodeStep | None:
        """Return the step for the next token of ``prefix_cache``; None if there is none."""
        if not self.in_use or not prefix_cache.has_room:
            return None
        layers = prefix_cache.growing_layers
        if layers is None:
            self.turn_off(
                "The model's cache holds more than keys and values for every token: it has a recurrent "
                "state, "
                "or a sliding window that keeps only the last tokens."
            )
            return None
        if prefix_cache.step is None:
            prefix_cache.step = DecodeStep(
                layers, prefix_cache.cache, self._forward(adapter_name), self._device
            )
            self._with_steps.add(prefix_cache)
        return prefix_cache.step

    def record_if_due(self, step: DecodeStep, comparison: LogitsComparison | None) -> bool:
        """Record a step if it has computed enough tokens. Return False if the recording fails.

        After a failure, or if the GPU has too little free memory, no further step is recorded in this
        session. ``comparison`` compares the adapter's logits with the logits of transformers, and provides
        the rounding noise; without it, nothing is recorded.
        """
        if self.why_not or comparison is None or not step.is_due:
            return True
        if (free_bytes := self.free_bytes()) < _MIN_FREE_BYTES:
            free = format_bytes(free_bytes)
            self.why_not = f"Only {free} of GPU memory was free, too little to record the decoding step."
            return True
        self.why_not = step.record(self._record, comparison.noise)
        return not self.why_not


class TokenReader:
    """Copies a token id from the GPU while the GPU computes the next step."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._token = torch.zeros((1, 1), dtype=torch.long, pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]  # torch's own

    def start(self, token: Tensor) -> None:
        """Begin to copy ``token`` (1, 1)."""
        self._token.copy_(token, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def wait(self) -> int:
        """Return the token's id."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._token)


def record_cuda_graph(function: Function) -> Function:
    """Record ``function`` as a CUDA graph, and return a function that replays it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    collects = gc.isenabled()
    # A tensor of another stream that is freed during recording would end the recording.
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            function()
    finally:
        if collects:
            gc.enable()
    replay: Function = graph.replay
    return replay


def free_gpu_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, including what torch holds without using it."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
