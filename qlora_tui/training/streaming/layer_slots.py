"""The two buffers of the device through which layers pass, and when each layer is copied into one.

Layers take the two slots in turn, so each layer has its slot for the whole run, and its tensors point there
once and for all. What autograd functions kept of a layer's weights in the forward (bitsandbytes keeps the
packed weight of a 4-bit layer) is therefore valid again in the backward, when the layer is back in its slot.

A step of four streamed layers, with ``[n]`` for layer n at work and ``+n`` for a copy that runs beside it::

    forward      [0] +1   [1] +2   [2] +3   [3]
    backward     [3]      [2] +1   [1] +0   [0]

The backward begins with the layers that are still there, and so does the next forward: a step of S layers
takes 2 (S - 2) copies. Without gradients the first layer is copied again while the last one computes, if it
has the other slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from qlora_tui.training.streaming.copy_devices import CopyDevice
from qlora_tui.training.streaming.host_layer import LayerTensors

Pass: TypeAlias = Literal["forward", "backward", "no gradient"]
"""What a layer runs for: the forward of a step, its recomputation and backward, or an evaluation."""
_SLOTS = 2


class LayerSlots:
    """Two device buffers for the streamed layers of a model, in the order of the forward."""

    def __init__(self, sizes: Sequence[int], copies: CopyDevice) -> None:
        """Allocate the buffers for layers of ``sizes`` bytes."""
        self._copies = copies
        self._layers: list[Tensor | None] = [None] * len(sizes)
        """The bytes of each layer in host memory."""
        self._slots = [copies.allocate(max(sizes)) for _ in range(min(_SLOTS, len(sizes)))]
        self._held: list[int | None] = [None] * len(self._slots)
        """The layer whose bytes are in each slot, or on their way."""
        self._copied: list[Any] = [None] * len(self._slots)
        """Event of the copy that no computation has waited for yet."""

    def add(self, place: int, layer: LayerTensors, host_buffer: Tensor) -> None:
        """Set the bytes of a layer, (size_bytes,) uint8 in host memory, and point its tensors to its slot."""
        self._layers[place] = host_buffer
        layer.point_to(self._slots[self._slot_of(place)])

    @property
    def size_bytes(self) -> int:
        """Bytes of both buffers."""
        return sum(slot.numel() for slot in self._slots)

    @property
    def held(self) -> tuple[int | None, ...]:
        """The layer in each slot; None before the first."""
        return tuple(self._held)

    def receives(self, place: int) -> bool:
        """Whether the bytes of a layer arrive in its slot, which holds no layer afterwards.

        They are copied twice: where such copies are lost, the first may not be.
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
        """Have the layer in its slot before what is computed next, and start to copy the one after it.

        Everything of the layers that ran before must have been computed, or queued on the device.
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
        """The layer that runs next; None where it is one of those in the slots already."""
        last = len(self._layers) - 1
        if purpose == "backward":
            return place - 1 if place else None
        if place < last:
            return place + 1
        return 0 if purpose == "no gradient" else None

    def _start_copy(self, place: int) -> None:
        """Copy a layer into its slot once all that was computed so far has ended: it may read the slot."""
        slot, source = self._slot_of(place), self._layers[place]
        assert source is not None
        target = self._slots[slot][: source.numel()]
        self._copied[slot] = self._copies.copy(target, source, self._copies.record_computation())
        self._held[slot] = place
