"""A device without a GPU on which streamed layers show every mistake in the order of copies.

A copy may run at any time between the event that it waits for and the computation that waits for it. Here the
target holds NaN from the start of the copy, and the values arrive when a computation waits for them: whatever
is computed with a buffer that is still in use, or without waiting, becomes NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_tui.training.streaming.slots import Copies

_NAN = 0xFF
"""Every byte of a NaN, in each float format, and the highest code of a quantized weight."""


class Copy(NamedTuple):
    """A copy that was started, and is not complete."""

    number: int
    target: Tensor
    source: Tensor


@dataclass
class RecordedCopies(Copies):
    """Logs ``copy N``, ``wait N`` and, from the tests, what is computed between them."""

    log: list[str] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    """Buffers of the device."""
    copied: int = 0

    @property
    def allocated_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self.buffers)

    def allocate(self, size_bytes: int) -> Tensor:
        self.buffers.append(torch.full((size_bytes,), _NAN, dtype=torch.uint8))
        return self.buffers[-1]

    def record_computation(self) -> Any:
        return len(self.log)

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        # Nothing may have been computed since the event, or the copy would not wait for it.
        assert after == len(self.log)
        self.copied += 1
        self.log.append(f"copy {self.copied}")
        target.fill_(_NAN)
        return Copy(self.copied, target, source)

    def wait_for(self, copied: Any) -> None:
        self.log.append(f"wait {copied.number}")
        copied.target.copy_(copied.source)
