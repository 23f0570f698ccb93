"""Where a run would be computed, and how much memory it could have there."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.metrics import GpuDevice
from qlora_tui.gpu.visible_devices import default_cuda_device
from qlora_tui.memory.calibration import correction_for
from qlora_tui.memory.cpu import liger_is_installed, this_processor, torch_is_for_cuda
from qlora_tui.memory.execution import Device


@dataclass(frozen=True)
class MemoryBudget:
    """What an estimate is held against."""

    device: Device
    bytes: int
    """All that a program could have of it, with nothing else running."""
    name: str
    """``RTX 4090``, ``a GPU with 24.0 GiB``, ``this machine's memory``."""
    is_assumed: bool = False
    """The size was given by the user; it is not this machine's."""


def budget_for(card: GpuDevice | None, assumed_bytes: int | None = None) -> MemoryBudget:
    """The budget of this GPU, of an assumed size instead, or of the machine's memory without either."""
    if assumed_bytes is not None:
        # Not this machine's GPU: corrections learned here do not apply.
        liger = liger_is_installed()
        device = Device(liger=liger) if card is None else Device(capability=_capability(card), liger=liger)
        return MemoryBudget(
            device, assumed_bytes, f"a GPU with {assumed_bytes / 2**30:.1f} GiB", is_assumed=True
        )
    if card is not None and card.usable_bytes is not None:
        device = Device(
            capability=_capability(card), liger=liger_is_installed(), correction=correction_for(card.name)
        )
        return MemoryBudget(device, card.usable_bytes, card.short_name)
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
    """The budget of this machine, whose driver is queried, or of an assumed size."""
    try:
        card = default_cuda_device()
    except GpuUnavailableError:
        card = None
    return budget_for(card, assumed_bytes)


def _capability(card: GpuDevice) -> tuple[int, int]:
    if card.compute_capability is None:
        return Device().capability
    major, _, minor = card.compute_capability.partition(".")
    return int(major), int(minor or 0)
