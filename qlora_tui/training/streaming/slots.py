"""The frozen tensors of streamed layers in host memory, and the two device buffers that they are copied to.

The weights of a layer and their scales lie side by side in one buffer of host memory, so a layer is one copy,
at the full speed of the bus. Norms and biases stay on the device: they are small, and other parts of the
trainer read them outside of the layer's forward. Layers alternate between the two slots, so each layer has
the same slot for the whole run, and its tensors always point there. Weights that autograd functions saved in
the forward (bitsandbytes saves the packed weight of a 4-bit layer) are therefore valid again in the backward,
when the layer is back in its slot.

A step of four streamed layers. ``[n]`` is the computation of layer n, and ``[n] +m`` means that layer m is
copied during it::

    forward      [0]      [1] +2   [2] +3   [3]
    backward     [3]      [2] +1   [1] +0   [0]

The backward begins with the layers that are still in the slots, and so does the next forward: a step of S
layers takes 2 (S - 2) copies. The first forward also copies layers 0 and 1. Without gradients the first layer
is copied again while the last one computes, if the two have different slots.

On a GPU a copy runs on its own stream. Events enforce two rules that keep the values right: a copy waits for
the end of the computation that last read the buffer, and a computation waits for the copy that it reads. On a
CPU there are no streams, and a copy is done when the call returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn


class Copies:
    """Buffers of a device, copies between device and host memory, and events that order them.

    On a CPU a copy is done when the call returns, and there are no events.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own

    def allocate(self, size_bytes: int) -> Tensor:
        """Return a uint8 buffer on the device."""
        return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)

    def record_computation(self) -> Any:
        """Return an event that occurs when all computation queued so far has ended."""
        return None if self._stream is None else torch.cuda.current_stream(self._device).record_event()

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Start a copy that waits for the event ``after``; returns the event of its end."""
        if self._stream is None:
            target.copy_(source)
            return None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait_for(self, copied: Any) -> None:
        """Make later computation wait for the event of a copy."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)


_STATE_PACKAGES = ("bitsandbytes", "qlora_tui")
"""Packages whose objects may hold tensors of a quantized weight."""
_MIN_DIMENSIONS = 2
"""Minimum number of dimensions of a plain parameter or buffer that is streamed. Norms and biases have one
dimension, and stay on the device.
"""

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Attributes of every module: parameters, buffers, submodules, hooks."""


def movable_tensors(layer: nn.Module) -> list[Tensor]:
    """Return the tensor objects of a layer that can be streamed. Several objects may share memory."""
    by_id: dict[int, Tensor] = {}
    for module in layer.modules():
        for tensor in _owned_tensors(module):
            if tensor.dim() >= _MIN_DIMENSIONS and not tensor.requires_grad:
                by_id[id(tensor)] = tensor
        for tensor in _state_tensors(module):
            by_id[id(tensor)] = tensor
    return [tensor for tensor in by_id.values() if tensor.numel()]


def all_tensors(model: nn.Module) -> list[Tensor]:
    """Return every tensor object of a model: parameters, buffers, attributes, quantization states."""
    by_id: dict[int, Tensor] = {}
    for module in model.modules():
        for tensor in (*_owned_tensors(module), *_state_tensors(module)):
            by_id[id(tensor)] = tensor
    return list(by_id.values())


@dataclass(frozen=True)
class Extent:
    """The memory range that a tensor reads."""

    address: int
    size_bytes: int


def extent_of(tensor: Tensor) -> Extent:
    """Return the range from the first to the last element of a tensor, which must not be empty."""
    return Extent(tensor.data_ptr(), _span(tensor) * tensor.element_size())


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor as a uint8 vector that shares it, gaps between strides included."""
    return tensor.data.as_strided((_span(tensor),), (1,)).view(torch.uint8)


def point_to(tensor: Tensor, buffer: Tensor) -> None:
    """Make a tensor read its values from ``buffer``, a uint8 vector of the size of its extent.

    The tensor object stays the same, so everything that refers to it sees the values in the buffer.
    """
    tensor.data = buffer.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _span(tensor: Tensor) -> int:
    """Return the number of elements in storage from a tensor's first element to its last, including any gaps
    that its strides leave.
    """
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _owned_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers of the module itself, and tensors among its attributes."""
    for values in (module._parameters, module._buffers, vars(module)):
        for value in values.values():
            if isinstance(value, Tensor):
                yield value


def _state_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield tensors in the state objects of the module's own quantized weights."""
    seen: set[int] = set()
    for parameter in module._parameters.values():
        if parameter is not None and not parameter.requires_grad:
            for value in vars(parameter).values():
                yield from _tensors_in(value, seen)
    for name, value in vars(module).items():
        if name not in _MODULE_ATTRIBUTES and not isinstance(value, Tensor):
            yield from _tensors_in(value, seen)


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item, seen)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item, seen)
    elif _is_state(value):
        for item in vars(value).values():
            yield from _tensors_in(item, seen)


def _is_state(value: Any) -> bool:
    """Return whether an object holds the state of a quantized weight. False for modules."""
    package = type(value).__module__.partition(".")[0]
    return package in _STATE_PACKAGES and hasattr(value, "__dict__") and not isinstance(value, nn.Module)


ALIGNMENT_BYTES = 256
"""Each tensor starts at a multiple of this many bytes, as kernels expect of memory from CUDA."""


@dataclass(frozen=True)
class LayerTensors:
    """The streamed tensors of one layer, and the offset of each in the layer's buffer."""

    tensors: tuple[Tensor, ...]
    offsets: tuple[int, ...]
    """Start of each tensor in the buffer, in bytes. Tensors that share memory have the same start."""
    size_bytes: int
    """Bytes of the buffer."""

    def write_to(self, buffer: Tensor) -> None:
        """Copy the values of all tensors into a uint8 vector of ``size_bytes``."""
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            values = bytes_of(tensor)
            buffer[offset : offset + values.numel()].copy_(values)

    def point_to(self, buffer: Tensor) -> None:
        """Make all tensors read from a uint8 vector of at least ``size_bytes``; frees their own memory."""
        sizes = [extent_of(tensor).size_bytes for tensor in self.tensors]
        for tensor, offset, size in zip(self.tensors, self.offsets, sizes, strict=True):
            point_to(tensor, buffer[offset : offset + size])


def lay_out(tensors: Sequence[Tensor]) -> LayerTensors:
    """Assign each tensor of a layer an offset in a buffer."""
    offsets: dict[Extent, int] = {}
    size = 0
    for tensor in tensors:
        extent = extent_of(tensor)
        if extent not in offsets:
            offsets[extent] = size
            size += aligned(extent.size_bytes)
    return LayerTensors(tuple(tensors), tuple(offsets[extent_of(tensor)] for tensor in tensors), size)


def aligned(size_bytes: int) -> int:
    """Round up to the offset of the next tensor in the buffer."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


Pass: TypeAlias = Literal["forward", "backward", "no gradient"]
"""The pass in which a layer runs: the forward pass of a step, its backward pass with recomputation, or an
evaluation.
"""
_SLOTS = 2


class LayerSlots:
    """Two device buffers for the streamed layers of a model. Layers are numbered in forward order."""

    def __init__(self, sizes: Sequence[int], copies: Copies) -> None:
        """Allocate the buffers for layers of ``sizes`` bytes."""
        self._copies = copies
        self._layers: list[Tensor | None] = [None] * len(sizes)
        """The bytes of each layer in host memory."""
        self._slots = [copies.allocate(max(sizes)) for _ in range(min(_SLOTS, len(sizes)))]
        self._held: list[int | None] = [None] * len(self._slots)
        """The layer whose bytes are in each slot, or are being copied there."""
        self._copied: list[Any] = [None] * len(self._slots)
        """Event of each slot's copy that no computation has waited for yet."""

    def add(self, place: int, layer: LayerTensors, host_buffer: Tensor) -> None:
        """Register ``host_buffer`` (size_bytes,), uint8, as the bytes of a layer in host memory. The layer's
        tensors then point to its slot.
        """
        self._layers[place] = host_buffer
        layer.point_to(self._slots[self._slot_of(place)])

    @property
    def size_bytes(self) -> int:
        """Bytes of both buffers."""
        return sum(slot.numel() for slot in self._slots)

    @property
    def held(self) -> tuple[int | None, ...]:
        """The layer in each slot; None before a slot's first layer."""
        return tuple(self._held)

    def receives(self, place: int) -> bool:
        """Return whether the bytes of a layer arrive in its slot. The slot is then marked empty. The bytes
        are copied twice, because on a system where copies do nothing, the first one may still succeed.
        """
        slot, source = self._slot_of(place), self._layers[place]
        assert source is not None
        target = self._slots[slot][: source.numel()]
        for _ in range(2):
            target.zero_()
            self._start_copy(place)
            self._copies.wait_for(self._copied[slot])
            self._held[slot] = self._copied[slot] = None
            if not torch.equal(target.cpu(), source):
                return False
        return True

    def enter(self, place: int, purpose: Pass) -> None:
        """Make sure that the layer is in its slot when it computes, and start to copy the next layer.

        All computation of the layers that ran before must have ended, or be queued on the device.
        """
        slot = self._slot_of(place)
        if self._held[slot] != place:
            self._start_copy(place)
        if self._copied[slot] is not None:
            self._copies.wait_for(self._copied[slot])
            self._copied[slot] = None
        following = self._following(place, purpose)
        if following is None:
            return
        other = self._slot_of(following)
        if other != slot and self._held[other] != following:
            self._start_copy(following)

    def _slot_of(self, place: int) -> int:
        return place % len(self._slots)

    def _following(self, place: int, purpose: Pass) -> int | None:
        """Return the index of the layer that runs after ``place``. Return None at the end of a step's forward
        or backward pass, because the layers with which the next pass begins are already in the slots.
        """
        last = len(self._layers) - 1
        if purpose == "backward":
            return place - 1 if place else None
        if place < last:
            return place + 1
        return 0 if purpose == "no gradient" else None

    def _start_copy(self, place: int) -> None:
        """Copy a layer into its slot after all computation so far, which may read the slot, has ended."""
        slot, source = self._slot_of(place), self._layers[place]
        assert source is not None
        target = self._slots[slot][: source.numel()]
        self._copied[slot] = self._copies.copy(target, source, self._copies.record_computation())
        self._held[slot] = place
