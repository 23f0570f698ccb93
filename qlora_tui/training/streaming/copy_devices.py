"""What streaming needs of a device: buffers, copies beside the computation, and events that order the two.

On a GPU a copy runs on its own stream. Two rules keep the values right, and both are events: a copy waits
until the computation that read the buffer before has ended, and a computation waits for the copy it reads.
On a CPU there are no streams, and a copy is done when the call returns.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class CopyDevice(Protocol):
    """Buffers of a device, and copies to it from host memory."""

    def allocate(self, size_bytes: int) -> Tensor:
        """A uint8 buffer on the device."""

    def record_computation(self) -> Any:
        """An event that occurs when everything that was computed so far has ended."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Start a copy from host memory behind the event ``after``; returns the event of its end."""

    def wait_for(self, copied: Any) -> None:
        """Let what is computed from now on start after the event of a copy."""


class CudaCopies:
    """Copies on a second stream of a CUDA GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own

    def allocate(self, size_bytes: int) -> Tensor:
        """A uint8 buffer on the GPU."""
        return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)

    def record_computation(self) -> Any:
        """An event after all that is queued on the current stream."""
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Queue a copy on the second stream, behind the event ``after``."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait_for(self, copied: Any) -> None:
        """Let the current stream wait for a copy."""
        torch.cuda.current_stream(self._device).wait_event(copied)


class CpuCopies:
    """Copies of a machine without a GPU: each is done when the call returns."""

    def allocate(self, size_bytes: int) -> Tensor:
        """A uint8 buffer."""
        return torch.empty(size_bytes, dtype=torch.uint8)

    def record_computation(self) -> Any:
        """Nothing runs beside the caller."""
        return None

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copy now."""
        target.copy_(source)
        return None

    def wait_for(self, copied: Any) -> None:
        """The copy is done."""


def copies_for(device: torch.device) -> CopyDevice:
    """The copies of this kind of device."""
    return CudaCopies(device) if device.type == "cuda" else CpuCopies()
