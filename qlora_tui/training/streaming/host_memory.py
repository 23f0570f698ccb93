"""Host memory for streamed layers, pinned if the system allows it.

A GPU copies from pinned memory directly, during the computation. Copies from other memory pass through a
buffer of the driver, which takes longer and stops the host until they are done. ``doctor`` measures how fast
a GPU receives layers from host memory and computes with them. The estimate uses these speeds to predict how
much streaming slows training down.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from qlora_tui.errors import first_line
from qlora_tui.gpu.torch_env import is_wsl2
from qlora_tui.memory.calibration import TransferSpeed
from qlora_tui.runs.doctor import host_memory_problem
from qlora_tui.training.compute_device import ComputeDevice, host_memory_bytes

_END_BYTES = 256
"""Number of bytes at each end of a buffer that are copied as a test."""


class HostMemory:
    """Allocates the buffers of streamed layers, or of offloaded inputs, for a device."""

    def __init__(self, device: torch.device, on_refused: Callable[[str], None] = lambda why: None) -> None:
        """Allocate for ``device``; ``on_refused`` gets the reason, once, if memory cannot be pinned."""
        self._device = device
        self._pins = device.type == "cuda"
        self._on_refused = on_refused
        self.refused = ""
        """Why memory could not be pinned; empty if it was pinned, or need not be."""
        self._pinned: list[weakref.finalize[Any, Any]] = []

    @property
    def is_pinned(self) -> bool:
        """Whether any buffer is pinned."""
        return any(unpin.alive for unpin in self._pinned)

    def unpin(self, why: str) -> None:
        """Unpin all buffers, and pin no more buffers; ``why`` becomes the reason."""
        for unpin in self._pinned:
            unpin()
        self.refused = why
        self._on_refused(why)

    def allocate(self, size_bytes: int) -> Tensor:
        """Return a uint8 vector of host memory.

        The memory is registered with CUDA instead of allocated by torch, whose pinned allocator rounds up to
        a power of two.
        """
        buffer = torch.empty(size_bytes, dtype=torch.uint8)
        if self._pins and not self.refused:
            self.refused = _pin(buffer, self._device)
            if self.refused:
                self._on_refused(self.refused)
            else:
                # Memory that is freed while registered could not be registered again at the same address.
                unpin = weakref.finalize(buffer, _unpin, buffer.data_ptr(), self._device)
                unpin.atexit = False
                self._pinned.append(unpin)
        return buffer


def _pin(buffer: Tensor, device: torch.device) -> str:
    """Pin a buffer. Returns the reason if that is refused, else an empty text."""
    try:
        result = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return first_line(error)
    code = int(result)
    if code:
        _clear_error(device)
        return f"CUDA error {code}"
    if is_wsl2() and not _arrives(buffer, device):
        _unpin(buffer.data_ptr(), device)
        return "what was copied from it did not arrive on the GPU"
    return ""


def _arrives(buffer: Tensor, device: torch.device) -> bool:
    """Return whether copies of a new buffer's ends reach the GPU, tested twice; overwrites these ends.

    On WSL2 copies from pinned memory may do nothing, without an error (FreeToken issue 291).
    """
    ends = (buffer[:_END_BYTES], buffer[-_END_BYTES:])
    for start in (1, 2):
        for end in ends:
            end.copy_(torch.arange(start, start + end.numel()))
            if not torch.equal(_copied_there(end, device), end):
                return False
    return True


def _copied_there(values: Tensor, device: torch.device) -> Tensor:
    """Return the values that a GPU has after a copy, read back into other memory."""
    there = torch.empty_like(values, device=device).zero_()
    there.copy_(values, non_blocking=True)
    return there.cpu()


def _unpin(address: int, device: torch.device) -> None:
    if int(torch.cuda.cudart().cudaHostUnregister(address)):  # type: ignore[no-untyped-call]  # torch's own
        _clear_error(device)


def _clear_error(device: torch.device) -> None:
    """Clear the error that CUDA's runtime keeps after a failed call.

    Otherwise, the thread's next kernel launch would raise it. torch neither clears the error when the call
    fails (``torch/csrc/cuda/shared/cudart.cpp``) nor binds ``cudaGetLastError``. So launch a kernel here,
    which reads and clears the error, and ignore what it raises.
    """
    with suppress(RuntimeError):
        torch.zeros(1, device=device)


def require_host_memory(needed_bytes: int) -> None:
    """Raise UserError if ``needed_bytes`` do not fit in the free memory of the machine or its container."""
    problem = host_memory_problem(needed_bytes, limit_bytes=host_memory_bytes())
    if problem is not None:
        raise problem


_COPIED_BYTES = 256 << 20
"""Bytes of the measured copy, large enough that the time to start it is negligible."""
_WIDTH, _TOKENS = 4096, 2048
"""Width of the layers of a 7B model, and tokens of a packed sequence: the sizes of the measured product."""
_REPEATS = 5
_MS_PER_S = 1000


def measure_speed(device: ComputeDevice) -> TransferSpeed:
    """Measure the speed of copies from pinned memory, and of products with an NF4 weight.

    The time of a product includes dequantizing the weight. The best of several repeats counts. Takes half a
    second and 0.7 GiB of GPU memory. Needs CUDA.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    where = device.torch_device
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=where)
    packed, state = quantize_4bit(
        torch.randn(_WIDTH, _WIDTH, device=where, dtype=device.dtype), quant_type="nf4"
    )
    x = torch.randn(_TOKENS, _WIDTH, device=where, dtype=device.dtype)
    copy_s = _best_seconds(lambda: target.copy_(source, non_blocking=True))
    product_s = _best_seconds(lambda: x @ dequantize_4bit(packed, state).t())
    return TransferSpeed(
        at=time.time(),
        bytes_per_s=_COPIED_BYTES / copy_s,
        flops_per_s=2 * _TOKENS * _WIDTH * _WIDTH / product_s,
    )


def _best_seconds(work: Callable[[], object]) -> float:
    """Return the shortest time of several repeats on the GPU, after one that is not measured."""
    work()
    seconds = []
    for _ in range(_REPEATS):
        begin, end = _event(), _event()
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(float(begin.elapsed_time(end)) / _MS_PER_S)
    return min(seconds)


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event
