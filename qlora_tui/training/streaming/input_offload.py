"""Keeps the input of each checkpointed layer in host memory between its forward and its backward.

Gradient checkpointing keeps one hidden state per layer. For long sequences these are gigabytes. Here the
input of a layer is copied to host memory while this layer computes, and back while the next layer is in its
backward. ``[n]`` is the computation of layer n, ``n→`` the copy of its input to the host, and ``→n`` the copy
back::

    forward          [0] 0→    [1] 1→    [2] 2→    [3] 3→
    backward    →3   [3] →2    [2] →1    [1] →0    [0]

Two inputs are on the device at a time. The last input is copied too, although it is needed at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_tui.training.streaming.slots import Copies, bytes_of


class KeptInput:
    """The input of one layer, kept in host memory."""

    def __init__(self, hidden: Tensor, buffer: Tensor, previous: KeptInput | None) -> None:
        self.buffer = buffer
        """Bytes of the input, uint8."""
        self.shape, self.stride, self.dtype = hidden.shape, hidden.stride(), hidden.dtype
        self.requires_grad = hidden.requires_grad
        self.previous = None if previous is None else weakref.ref(previous)
        """Weak reference to the previous layer's input, which is needed next; None for the first layer."""


class InputOffload:
    """The inputs of all layers of a model, in the order of the forward."""

    def __init__(self, copies: Copies, allocate_host: Callable[[int], Tensor]) -> None:
        """Use ``allocate_host``, which returns a uint8 vector of host memory of a given number of bytes."""
        self._copies = copies
        self._allocate_host = allocate_host
        self._free_buffers: list[Tensor] = []
        self._last: weakref.ref[KeptInput] | None = None
        self._sending: tuple[Tensor, Any] | None = None
        """The input that is being copied to the host, and the event of the copy."""
        self._fetching: tuple[KeptInput, Tensor, Any] | None = None
        """The input that is being copied to the device, its bytes there, and the event of the copy."""
        self.host_bytes = 0
        """Bytes of all buffers."""

    def keep(self, hidden: Tensor) -> KeptInput:
        """Start to copy the input of a layer to the host. The caller need not keep the input."""
        self._end_sending()
        if self._fetching is not None:  # an abandoned step's memory may be freed once its copy has ended
            self._copies.wait_for(self._fetching[2])
            self._fetching = None
        values = bytes_of(hidden.detach())
        buffer = self._buffer(values.numel())
        previous = self._last() if self._last is not None else None
        kept_input = KeptInput(hidden, buffer[: values.numel()], previous)
        self._last = weakref.ref(kept_input)
        # Once the layer's graph is freed, another layer may use the buffer.
        weakref.finalize(kept_input, self._free_buffers.append, buffer).atexit = False
        self._sending = (
            values,
            self._copies.copy(kept_input.buffer, values, self._copies.record_computation()),
        )
        return kept_input

    def fetch(self, kept_input: KeptInput) -> Tensor:
        """Return the input on the device again, and start to fetch the previous layer's input."""
        self._end_sending()
        if self._fetching is None or self._fetching[0] is not kept_input:
            self._start_fetch(kept_input)
        assert self._fetching is not None
        _, values, copied = self._fetching
        self._copies.wait_for(copied)
        self._fetching = None
        previous = kept_input.previous() if kept_input.previous is not None else None
        if previous is not None:
            self._start_fetch(previous)
        hidden = values.view(kept_input.dtype).as_strided(kept_input.shape, kept_input.stride)
        return hidden.requires_grad_(kept_input.requires_grad)

    def _start_fetch(self, kept_input: KeptInput) -> None:
        values = self._copies.allocate(kept_input.buffer.numel())
        copied = self._copies.copy(values, kept_input.buffer, self._copies.record_computation())
        self._fetching = kept_input, values, copied

    def _end_sending(self) -> None:
        """Make the computation wait for the copy to the host, after which the source may be freed."""
        if self._sending is not None:
            self._copies.wait_for(self._sending[1])
            self._sending = None

    def _buffer(self, size_bytes: int) -> Tensor:
        """Return the smallest free buffer that is large enough, or a new one."""
        fitting = [buffer for buffer in self._free_buffers if buffer.numel() >= size_bytes]
        if fitting:
            buffer = min(fitting, key=Tensor.numel)
            self._free_buffers[:] = [each for each in self._free_buffers if each is not buffer]
            return buffer
        self.host_bytes += size_bytes
        return self._allocate_host(size_bytes)


class OffloadingCheckpoint:
    """A layer's checkpoint function that keeps the layer's first argument in host memory."""

    def __init__(self, checkpoint: Callable[..., Any], offload: InputOffload) -> None:
        self._checkpoint = checkpoint
        self._offload = offload

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run ``function`` as torch's ``checkpoint`` does, which calls it again in the backward."""
        if not args or not torch.is_tensor(args[0]) or not args[0].is_floating_point():
            return self._checkpoint(function, *args)
        hidden, *others = args
        kept_input = self._offload.keep(hidden)
        first = [hidden]

        def run(like: Tensor, *inputs: Any) -> Any:
            return function(first.pop() if first else self._offload.fetch(kept_input), *inputs)

        # Checkpointing restores the random state of the devices of its arguments.
        like = hidden.new_empty(0)
        del hidden, args
        return self._checkpoint(run, like, *others)


def offload_inputs(layers: Sequence[Any], offload: InputOffload) -> None:
    """Keep the inputs of checkpointed layers in host memory. Call this after checkpointing was turned on."""
    for layer in layers:
        layer._gradient_checkpointing_func = OffloadingCheckpoint(layer._gradient_checkpointing_func, offload)
