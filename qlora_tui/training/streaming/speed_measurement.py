"""Measures how fast a GPU gets layers from host memory, and how fast it computes with them.

``doctor`` runs this once per machine; from the result the estimate says how much slower streamed layers are.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from qlora_tui.memory.calibration import TransferSpeed
from qlora_tui.training.compute_device import ComputeDevice

_COPIED_BYTES = 256 << 20
"""Large enough that starting the copy takes no share of its time."""
_WIDTH, _TOKENS = 4096, 2048
"""Shape of the products: those of a 7B model, with as many tokens as a packed sequence."""
_REPEATS = 5
_MS_PER_S = 1000


def measure_speed(device: ComputeDevice) -> TransferSpeed:
    """Copy from pinned memory, and multiply with a dequantized NF4 weight; the best of a few repeats.

    Takes half a second and 0.7 GiB of the GPU. Needs CUDA.
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
    """Shortest time of some repeats on the GPU, after one that is not measured."""
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
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own
    return event
