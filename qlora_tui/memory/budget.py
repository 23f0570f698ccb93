"""The device of a run, the memory available on it, and the code that the installed libraries run there."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import psutil

from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.metrics import GpuDevice
from qlora_tui.gpu.torch_env import grows_segments, managed_memory_is_safe, torch_version
from qlora_tui.gpu.torch_on_gpu import installed_torch
from qlora_tui.gpu.visible_devices import default_cuda_device
from qlora_tui.memory.calibration import correction_for, measured_speed
from qlora_tui.memory.execution import Device
from qlora_tui.memory.traces import KnownTraces, known_traces
from qlora_tui.remote.calls import at_box_once


@dataclass(frozen=True)
class MemoryBudget:
    """The memory that an estimate is compared with."""

    device: Device
    bytes: int
    """Total memory available to programs, in bytes, if no other program is running."""
    name: str
    """Name for messages: ``RTX 4090``, ``a GPU with 24.0 GiB``, ``this machine's memory``."""
    is_assumed: bool = False
    """Whether the size was given by the user instead of read from this machine."""

    def with_traces(self, traces: KnownTraces) -> MemoryBudget:
        """Return this budget for a device with these traces."""
        return replace(self, device=replace(self.device, traces=traces))


def budget_for(gpu: GpuDevice | None, assumed_bytes: int | None = None) -> MemoryBudget:
    """Return the budget of a GPU with ``assumed_bytes``; if that is None, of ``gpu``; without either, of the
    machine's main memory.
    """
    return _budget_for(gpu, assumed_bytes).with_traces(known_traces())


@at_box_once
def _budget_for(gpu: GpuDevice | None, assumed_bytes: int | None) -> MemoryBudget:
    cuda = Device(
        liger=liger_is_installed(),
        triton=triton_is_installed(),
        varlen=torch_has_varlen(),
        expandable_segments=grows_segments(os.environ),
        managed_memory=managed_memory_is_safe(),
    )
    if assumed_bytes is not None:
        # The GPU is not this machine's, so corrections measured here do not apply.
        device = cuda if gpu is None else _with_chip(cuda, gpu)
        return MemoryBudget(
            device, assumed_bytes, f"a GPU with {assumed_bytes / 2**30:.1f} GiB", is_assumed=True
        )
    if gpu is not None and gpu.usable_bytes is not None:
        device = replace(
            _with_chip(cuda, gpu),
            correction=correction_for(gpu.name),
            speed=measured_speed(gpu.name),
            host_bytes=psutil.virtual_memory().total,
        )
        return MemoryBudget(device, gpu.usable_bytes, gpu.short_name)
    cpu = this_processor()
    return MemoryBudget(
        Device(
            kind="cpu",
            native_bfloat16=cpu.native_bfloat16,
            cuda_libraries=torch_is_for_cuda(),
            correction=correction_for(cpu.name),
        ),
        psutil.virtual_memory().total,
        "this machine's memory",
    )


def local_budget(assumed_bytes: int | None = None) -> MemoryBudget:
    """Return the memory budget of an assumed GPU of ``assumed_bytes``. If None, query the driver and return
    the budget of this machine.
    """
    try:
        gpu = default_cuda_device()
    except GpuUnavailableError:
        gpu = None
    return budget_for(gpu, assumed_bytes)


def _with_chip(device: Device, gpu: GpuDevice) -> Device:
    """Return ``device`` with the properties of this GPU's chip, as far as its driver reports them."""
    capability = gpu.capability or device.capability
    return replace(device, capability=capability, multiprocessors=gpu.multiprocessors)


_BFLOAT16_FLAGS = frozenset(("avx512_bf16", "amx_bf16"))
"""CPU flags for bf16 products. On a CPU without any of these flags, bf16 products are a hundred times slower
than fp32 products.
"""


@dataclass(frozen=True)
class Processor:
    """The CPU properties that a run depends on."""

    name: str
    native_bfloat16: bool
    """Whether the CPU multiplies bfloat16 in hardware; if not, the trainer computes in float32."""


def this_processor() -> Processor:
    """Return the first processor of this machine."""
    name, native = "CPU", False
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return Processor(name, native)
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            native = not _BFLOAT16_FLAGS.isdisjoint(value.split())
            break
    return Processor(name, native)


def torch_is_for_cuda() -> bool:
    """Return whether the installed torch is a CUDA build, without importing torch."""
    torch = installed_torch()
    return torch is not None and torch.platform == "cuda"


@cache
def liger_is_installed() -> bool:
    """Return whether Liger's kernels and Triton, which they need, are installed, without importing them."""
    return find_spec("liger_kernel") is not None and find_spec("triton") is not None


@cache
def triton_is_installed() -> bool:
    """Return whether Triton is installed, without importing it."""
    return find_spec("triton") is not None


@cache
def torch_has_varlen() -> bool:
    """Return whether the installed torch has windowed varlen attention, without importing torch."""
    return torch_version() >= (2, 11)
