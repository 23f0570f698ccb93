"""``GpuUnavailableError``: why the card cannot be asked, in sentences a screen can show as they are.

Every way to lack a card ends here, so that callers handle one exception and need not know NVML.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from qlora_tui.errors import UserError


class GpuUnavailableReason(StrEnum):
    """Which of the ways to have no card it is."""

    NO_DRIVER = "no_driver"
    """The driver's library is not on the machine."""
    NOT_LOADED = "not_loaded"
    """The library is there, the kernel module does not run."""
    MISMATCH = "mismatch"
    """Library and kernel module are of different versions."""
    NO_PERMISSION = "no_permission"
    NO_DEVICE = "no_device"
    """The driver runs and finds no card, or not the one asked for."""
    HIDDEN = "hidden"
    """CUDA_VISIBLE_DEVICES leaves no card to torch."""
    LOST = "lost"
    """The card was there and no longer answers."""
    OTHER = "other"


class _Text(NamedTuple):
    title: str
    what: str
    why: str
    fix: str


_TEXTS = {
    GpuUnavailableReason.NO_DRIVER: _Text(
        "No NVIDIA driver",
        "No NVIDIA driver found.",
        "Its library, libnvidia-ml.so.1, is not on this machine.",
        "Estimates use a size you give; to train on an NVIDIA card, install its driver.",
    ),
    GpuUnavailableReason.NOT_LOADED: _Text(
        "NVIDIA driver not loaded",
        "The NVIDIA driver is installed but does not run.",
        "Its kernel module is not loaded; often it was not built for this kernel.",
        "Try `sudo modprobe nvidia`; if that fails, reinstall the driver and reboot.",
    ),
    GpuUnavailableReason.MISMATCH: _Text(
        "NVIDIA driver mismatch",
        "The NVIDIA driver was updated, and its old version is still running.",
        "Driver library and kernel module are of different versions.",
        "Reboot.",
    ),
    GpuUnavailableReason.NO_PERMISSION: _Text(
        "No access to the card",
        "This user may not talk to the NVIDIA driver.",
        "The system refused access to /dev/nvidia*.",
        "Check the rights on these files; a container needs `--gpus all`.",
    ),
    GpuUnavailableReason.NO_DEVICE: _Text(
        "No NVIDIA card",
        "The NVIDIA driver finds no card.",
        "There is none in the machine, or a virtual machine or container keeps it away.",
        "See whether `nvidia-smi -L` lists it; a container needs `--gpus all`.",
    ),
    GpuUnavailableReason.HIDDEN: _Text(
        "Card hidden",
        "CUDA_VISIBLE_DEVICES hides every card.",
        "",
        "Unset it, or name a whole card by index or UUID; `nvidia-smi -L` lists them.",
    ),
    GpuUnavailableReason.LOST: _Text(
        "Card lost",
        "The card no longer answers.",
        "It fell off the bus or needs a reset; heat, power supply and riser cables are the usual causes.",
        "Reboot, then resume the run; `sudo dmesg | grep -i xid` shows what the driver saw.",
    ),
    GpuUnavailableReason.OTHER: _Text(
        "NVIDIA driver error",
        "The NVIDIA driver answered with an error.",
        "",
        "See whether `nvidia-smi` shows the same; if so, reboot or reinstall the driver.",
    ),
}

_REASON_BY_NVML_CODE = {
    4: GpuUnavailableReason.NO_PERMISSION,
    6: GpuUnavailableReason.NO_DEVICE,
    9: GpuUnavailableReason.NOT_LOADED,
    12: GpuUnavailableReason.NO_DRIVER,
    15: GpuUnavailableReason.LOST,
    16: GpuUnavailableReason.LOST,
    17: GpuUnavailableReason.NO_PERMISSION,
    18: GpuUnavailableReason.MISMATCH,
    28: GpuUnavailableReason.NO_DEVICE,
}
"""By NVML's own numbers, ``nvmlReturn_t`` in ``nvml.h``: 4 no permission, 6 not found, 9 driver not loaded,
12 library not found, 15 GPU is lost, 16 reset required, 17 blocked by the operating system, 18 mismatch of
library and module, 28 GPU not found."""


class GpuUnavailableError(UserError):
    """The card cannot be asked; ``what``, ``why`` and ``fix`` are ready to be shown."""

    def __init__(self, reason: GpuUnavailableReason, why: str = ""):
        text = _TEXTS[reason]
        super().__init__(text.title, what=text.what, why=why or text.why, fix=text.fix)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (GpuUnavailableError, (self.reason, self.why))


def from_nvml_error(code: int, message: str) -> GpuUnavailableError:
    """The outcome for an error ``code`` of NVML, whose own ``message`` is shown where we have no better."""
    reason = _REASON_BY_NVML_CODE.get(code, GpuUnavailableReason.OTHER)
    return GpuUnavailableError(
        reason, f"NVML says: {message}." if reason is GpuUnavailableReason.OTHER else ""
    )
