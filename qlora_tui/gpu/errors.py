"""``GpuUnavailableError``: why no GPU can be read, in sentences for the user.

Every NVML failure is mapped to this exception, so that callers need not know NVML.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, NamedTuple

from qlora_tui.errors import EXIT_FAILURE, EXIT_USAGE, UserError


class GpuUnavailableReason(StrEnum):
    """Why no GPU is available."""

    NO_DRIVER = "no_driver"
    """The driver's library is not installed."""
    NOT_LOADED = "not_loaded"
    """The library is installed, but the kernel module is not loaded."""
    MISMATCH = "mismatch"
    """Library and kernel module have different versions."""
    NO_PERMISSION = "no_permission"
    NO_DEVICE = "no_device"
    """The driver runs and finds no GPU, or not the requested one."""
    HIDDEN = "hidden"
    """CUDA_VISIBLE_DEVICES hides every GPU from torch."""
    CPU_CHOSEN = "cpu_chosen"
    """The user chose the CPU."""
    NOT_PRESENT = "not_present"
    """The machine has no GPU of the number, UUID or name that the user chose."""
    SETTING = "setting"
    """Which GPU the user chose cannot be read."""
    MIG = "mig"
    """torch uses a slice of a GPU (MIG), of which the driver reports little."""
    NO_LIBRARY = "no_library"
    """The driver runs, and its library that reports GPUs is not installed, as in some containers."""
    LOST = "lost"
    """The GPU was available and no longer responds."""
    OTHER = "other"

    @property
    def device(self) -> Literal["cpu", "unknown", "none"]:
        """Return where a run would train: on the CPU, as meant; where torch decides; or nowhere.

        ``none``: there is a GPU that cannot be used, and training on the CPU instead would surprise the user.
        """
        if self.value in ("no_driver", "no_device", "hidden", "cpu_chosen"):
            return "cpu"
        return "unknown" if self.value in ("mig", "no_library") else "none"


class ErrorText(NamedTuple):
    """The words of an error: title, what happened, why, and what to do."""

    title: str
    what: str
    why: str
    fix: str


_TEXTS = {
    GpuUnavailableReason.NO_DRIVER: ErrorText(
        "No NVIDIA driver",
        "No NVIDIA driver found.",
        "Its library, libnvidia-ml.so.1, is not installed.",
        "To train on an NVIDIA GPU, install its driver. Estimates work without it: enter a memory size.",
    ),
    GpuUnavailableReason.NOT_LOADED: ErrorText(
        "NVIDIA driver not loaded",
        "The NVIDIA driver is installed but not running.",
        "Its kernel module is not loaded, often because it was not built for this kernel.",
        "Try `sudo modprobe nvidia`; if that fails, reinstall the driver and reboot.",
    ),
    GpuUnavailableReason.MISMATCH: ErrorText(
        "NVIDIA driver mismatch",
        "The NVIDIA driver was updated, and the old version is still running.",
        "Driver library and kernel module have different versions.",
        "Reboot.",
    ),
    GpuUnavailableReason.NO_PERMISSION: ErrorText(
        "No access to the GPU",
        "This user may not access the NVIDIA driver.",
        "The system denied access to /dev/nvidia*.",
        "Check the permissions of these files; a container needs `--gpus all`.",
    ),
    GpuUnavailableReason.NO_DEVICE: ErrorText(
        "No NVIDIA GPU",
        "The NVIDIA driver finds no GPU.",
        "The machine has none, or a virtual machine or container hides it.",
        "Check whether `nvidia-smi -L` lists it; a container needs `--gpus all`.",
    ),
    GpuUnavailableReason.HIDDEN: ErrorText(
        "GPU hidden",
        "CUDA_VISIBLE_DEVICES hides every GPU.",
        "",
        "Unset it, or set it to the index or UUID of a whole GPU; `nvidia-smi -L` lists them.",
    ),
    GpuUnavailableReason.CPU_CHOSEN: ErrorText(
        "CPU chosen",
        "The CPU is chosen.",
        "",
        "Choose a GPU with `--gpu auto`, or with gpu in config.toml.",
    ),
    GpuUnavailableReason.NOT_PRESENT: ErrorText(
        "No such GPU",
        "The chosen GPU is not there.",
        "",
        "Choose another: `--gpu`, CUDA_VISIBLE_DEVICES, or gpu in config.toml. `nvidia-smi -L` lists them.",
    ),
    GpuUnavailableReason.SETTING: ErrorText(
        "Cannot use config.toml",
        "Which GPU to use cannot be read.",
        "",
        "Correct config.toml, or use `--gpu`.",
    ),
    GpuUnavailableReason.MIG: ErrorText(
        "Slice of a GPU",
        "torch uses a slice of a GPU (MIG), which cannot be read.",
        "",
        "For estimates, enter its memory: GPU memory to assume in the settings, or `--gpu-gib`.",
    ),
    GpuUnavailableReason.NO_LIBRARY: ErrorText(
        "GPU cannot be read",
        "The NVIDIA driver runs, and its GPUs cannot be read.",
        "libnvidia-ml.so.1 is missing: a container has it with NVIDIA_DRIVER_CAPABILITIES=compute,utility.",
        "Add that capability. For estimates, enter the memory: `--gpu-gib`, or GPU memory to assume.",
    ),
    GpuUnavailableReason.LOST: ErrorText(
        "GPU lost",
        "The GPU no longer responds.",
        "It fell off the bus or needs a reset; heat, power supply and riser cables are the usual causes.",
        "Reboot, then resume the run; `sudo dmesg | grep -i xid` shows the driver's messages.",
    ),
    GpuUnavailableReason.OTHER: ErrorText(
        "NVIDIA driver error",
        "The NVIDIA driver returned an error.",
        "",
        "Check whether `nvidia-smi` shows it too; if so, reboot or reinstall the driver.",
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
"""Reasons by NVML return code, ``nvmlReturn_t`` in ``nvml.h``: 4 no permission, 6 not found, 9 driver not
loaded, 12 library not found, 15 GPU is lost, 16 reset required, 17 blocked by the operating system, 18
mismatch of library and module, 28 GPU not found."""


class GpuUnavailableError(UserError):
    """No GPU can be read; ``what``, ``why`` and ``fix`` are sentences for the user."""

    def __init__(self, reason: GpuUnavailableReason, why: str = ""):
        text = _TEXTS[reason]
        is_wrong_call = reason is GpuUnavailableReason.NOT_PRESENT
        super().__init__(
            text.title,
            what=text.what,
            why=why or text.why,
            fix=text.fix,
            exit_code=EXIT_USAGE if is_wrong_call else EXIT_FAILURE,
        )
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (GpuUnavailableError, (self.reason, self.why))


def from_nvml_error(code: int, message: str) -> GpuUnavailableError:
    """Return the exception for an NVML error ``code``; ``message`` is shown for an unknown code."""
    reason = _REASON_BY_NVML_CODE.get(code, GpuUnavailableReason.OTHER)
    return GpuUnavailableError(
        reason, f"NVML says: {message}." if reason is GpuUnavailableReason.OTHER else ""
    )
