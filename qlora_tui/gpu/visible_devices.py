"""Detection of the GPU that torch will use, without importing torch.

The trainer and every other process that loads torch must run with ``PCI_BUS_ORDER_ENV`` in its environment:
by default CUDA numbers the fastest GPU first, so its device 0 may differ from NVML's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from qlora_tui.gpu.driver import list_gpus
from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason
from qlora_tui.gpu.metrics import GpuDevice

PCI_BUS_ORDER_ENV = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""Environment that makes CUDA number GPUs like NVML and ``nvidia-smi``."""

_VARIABLE = "CUDA_VISIBLE_DEVICES"


def default_cuda_device(environ: Mapping[str, str] = os.environ) -> GpuDevice:
    """Return the GPU that torch calls ``cuda:0``. Raises ``GpuUnavailableError``."""
    visible = cuda_device_order(list_gpus(), environ)
    if not visible:
        raise GpuUnavailableError(GpuUnavailableReason.HIDDEN, f'It is set to "{environ[_VARIABLE]}".')
    return visible[0]


def cuda_device_order(
    devices: Sequence[GpuDevice], environ: Mapping[str, str] = os.environ
) -> list[GpuDevice]:
    """Return ``devices`` in torch's order: the first is ``cuda:0``. Empty when all are hidden.

    CUDA's rules (CUDA Programming Guide, "CUDA Environment Variables"): indices or UUIDs, which may be
    shortened while they stay unique; the first entry that matches no GPU ends the list. As in
    ``torch/cuda/__init__.py``, a GPU named twice hides them all.
    """
    value = environ.get(_VARIABLE)
    if value is None:
        return list(devices)
    visible: list[GpuDevice] = []
    for entry in value.split(","):
        device = _match_entry(entry.strip(), devices)
        if device is None:
            break
        if device in visible:
            return []
        visible.append(device)
    return visible


def _match_entry(entry: str, devices: Sequence[GpuDevice]) -> GpuDevice | None:
    if entry.startswith("GPU-"):
        matches = [gpu for gpu in devices if gpu.uuid is not None and gpu.uuid.startswith(entry)]
    else:
        matches = [gpu for gpu in devices if entry == str(gpu.index)]
    return matches[0] if len(matches) == 1 else None
