"""The frozen tensors of one decoder layer, side by side in one buffer of host memory.

One buffer is one copy to the device, at the full speed of the bus. The tensors themselves are pointed to a
buffer of the device once, and stay there: when the layer is needed, its bytes are copied to that place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from qlora_tui.training.streaming.frozen_tensors import Extent, bytes_of, extent_of, point_to

ALIGNMENT_BYTES = 256
"""Each tensor starts at a multiple of this, as kernels expect of memory from CUDA."""


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of one layer that move, and the place of each in the layer's buffer."""

    tensors: tuple[Tensor, ...]
    offsets: tuple[int, ...]
    """Where each tensor starts in the buffer, in bytes. Tensors that share memory start at the same place."""
    size_bytes: int
    """Bytes of the buffer."""

    def write_to(self, buffer: Tensor) -> None:
        """Copy the values of all tensors into a uint8 vector of ``size_bytes``."""
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            values = bytes_of(tensor)
            buffer[offset : offset + values.numel()].copy_(values)

    def point_to(self, buffer: Tensor) -> None:
        """Let all tensors read from a uint8 vector of at least ``size_bytes``; frees their own memory."""
        sizes = [extent_of(tensor).size_bytes for tensor in self.tensors]
        for tensor, offset, size in zip(self.tensors, self.offsets, sizes, strict=True):
            point_to(tensor, buffer[offset : offset + size])


def lay_out(tensors: Sequence[Tensor]) -> LayerTensors:
    """Give each tensor of a layer its place in a buffer."""
    offsets: dict[Extent, int] = {}
    size = 0
    for tensor in tensors:
        extent = extent_of(tensor)
        if extent not in offsets:
            offsets[extent] = size
            size += aligned(extent.size_bytes)
    return LayerTensors(tuple(tensors), tuple(offsets[extent_of(tensor)] for tensor in tensors), size)


def aligned(size_bytes: int) -> int:
    """Round up to the place of the next tensor in the buffer."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
