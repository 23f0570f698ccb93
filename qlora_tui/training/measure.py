"""How much memory a run takes, measured beside what was predicted."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

import torch

from qlora_tui.catalog.facts import Architecture
from qlora_tui.errors import Problem
from qlora_tui.gpu.no_gpu import NoGpu
from qlora_tui.gpu.nvml import Nvml
from qlora_tui.gpu.visible import torch_card
from qlora_tui.memory import Device as EstimatedDevice
from qlora_tui.memory import Estimate, estimate
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.events import MemoryMeasured
from qlora_tui.training.device import Device


class MemoryMeter:
    """Peaks of this process, and the estimate of the recipe as it is run."""

    def __init__(self, recipe: Recipe, architecture: Architecture, device: Device) -> None:
        self._device = device
        self.estimate = _estimate(recipe, architecture, device)
        """None where the memory room does not know the model."""

    def measured(self, when: Literal["probe", "end"]) -> MemoryMeasured:
        """The peak so far beside the estimate."""
        allocated = reserved = 0
        if self._device.kind == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device.torch_device)
            reserved = torch.cuda.max_memory_reserved(self._device.torch_device)
            peak = reserved + self._context_bytes()
        else:
            peak = peak_resident_bytes()
        return MemoryMeasured(
            at=time.time(),
            when=when,
            estimated_bytes=self.estimate.process_bytes if self.estimate else 0,
            measured_bytes=peak,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
        )

    def _context_bytes(self) -> int:
        """What the driver holds for this process beside torch's pool; estimated where it does not say."""
        held = _held_on_card()
        if held is None:
            return self.estimate.bytes_of("context") if self.estimate else 0
        return max(0, held - torch.cuda.memory_reserved(self._device.torch_device))


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far; 0 where the kernel does not say.

    Not ``ru_maxrss``: that one begins with the size of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _held_on_card() -> int | None:
    try:
        with Nvml() as nvml:
            processes = nvml.read(torch_card().index, processes=True).processes or ()
    except NoGpu:
        return None
    return next((p.memory_bytes for p in processes if p.pid == os.getpid()), None)


def _estimate(recipe: Recipe, architecture: Architecture, device: Device) -> Estimate | None:
    capability = torch.cuda.get_device_capability(device.torch_device) if device.kind == "cuda" else (0, 0)
    where = EstimatedDevice(
        kind=device.kind,
        capability=capability,
        native_bfloat16=device.dtype == torch.bfloat16,
    )
    try:
        return estimate(recipe, architecture, device=where)
    except Problem:
        return None
