"""What a question works with: the device, the models, and how to measure."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.support.random_model import random_model

Answer = dict[str, Any]
_TOP_KERNELS = 14


@dataclass(frozen=True)
class Probe:
    """The device that is asked about."""

    on_gpu: bool
    models: Path
    """Folder in which the random models are, or are made."""

    @property
    def device(self) -> str:
        """Name of the device for torch."""
        return "cuda" if self.on_gpu else "cpu"

    def model(self, size: str) -> Path:
        """Return the folder of a model; on a CPU of the tiny one."""
        size = size if self.on_gpu else "tiny"
        return random_model(self.models / size, size)

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], object], *, repeats: int = 20, warmup: int = 3) -> float:
        """Return the median time of a call."""
        if not self.on_gpu:
            repeats, warmup = 2, 1
        times = []
        for number in range(warmup + repeats):
            self.synchronize()
            began = time.perf_counter()
            call()
            self.synchronize()
            if number >= warmup:
                times.append(time.perf_counter() - began)
        return statistics.median(times) * 1e3

    def peak_gib(self, call: Callable[[], object]) -> float | None:
        """Return the most that was allocated during a call, without what was before; None on a CPU."""
        if not self.on_gpu:
            call()
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)

    def free_memory(self) -> None:
        """Give back what earlier questions held."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def waits(self, call: Callable[[], object]) -> list[str]:
        """Return the lines of code at which the CPU waits for the GPU during a call."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sorted(
            {f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)}
        )

    def kernels(self, call: Callable[[], object]) -> Answer:
        """Return the number of kernels of a call, the share of time at work, and the costliest kernels."""
        from torch.profiler import ProfilerActivity, profile

        call()
        self.synchronize()
        began = time.perf_counter()
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            call()
            self.synchronize()
        wall_s = time.perf_counter() - began
        rows = [row for row in record.key_averages() if row.self_device_time_total]
        busy_s = sum(row.self_device_time_total for row in rows) / 1e6
        rows.sort(key=lambda row: -row.self_device_time_total)
        return {
            "kernels": sum(row.count for row in rows),
            "busy_share": round(busy_s / wall_s, 2),
            "kernel_ms": round(busy_s * 1e3, 1),
            "top": [
                [row.key[:80], row.count, round(row.self_device_time_total / 1e4 / busy_s, 1)]
                for row in rows[:_TOP_KERNELS]
            ],
        }


def relative_difference(result: Tensor, reference: Tensor) -> float:
    """Return |result − reference| / |reference|, in float64."""
    expected = reference.double()
    return float((result.double() - expected).norm() / expected.norm())


def attention_inputs(
    probe: Probe, tokens: int, *, heads: int = 32, key_heads: int = 8, width: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random query, key and value: (1, heads, tokens, width), by default those of an 8B Llama."""

    def random(count: int) -> Tensor:
        return torch.randn(
            1, count, tokens, width, device=probe.device, dtype=torch.bfloat16, requires_grad=True
        )

    return random(heads), random(key_heads), random(key_heads)
