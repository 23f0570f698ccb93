"""``GpuUnavailableError``, which says in sentences for the user why no GPU can be read.

Every NVML failure is mapped to this exception, so that callers need not know NVML.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

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
    """The driver runs but finds no GPU, or not the requested one."""
    HIDDEN = "hidden"
    """CUDA_VISIBLE_DEVICES hides every GPU from torch."""
    CPU_CHOSEN = "cpu_chosen"
    """The user chose the CPU."""
    NOT_PRESENT = "not_present"
    """The machine has no GPU with the number, UUID or name that the user chose."""
    SETTING = "setting"
    """The user's choice of GPU cannot be read."""
    MIG = "mig"
    """torch uses a slice of a GPU (MIG), about which the driver reports little."""
    NO_LIBRARY = "no_library"
    """The driver runs, but its library that reports GPUs is not installed, as in some containers."""
    LOST = "lost"
    """The GPU was available but no longer responds."""
    OTHER = "other"

    @property
    def device(self) -> Literal["cpu", "unknown", "none"]:
        """Return where a run would train.

        ``cpu``: on the CPU, because the user chose it or there is no GPU. ``unknown``: torch decides.
        ``none``: nowhere, because the machine has a GPU that cannot be used, and training on the CPU instead
        would surprise the user.
        """
        if self.value in ("no_driver", "no_device", "hidden", "cpu_chosen"):
            return "cpu"
        return "unknown" if self.value in ("mig", "no_library") else "none"


class ErrorText(Struct, frozen=True):
    """The parts of an error's text: title, what happened, why, and what to do."""

    title: str
    what: str
    fix: str
    why: str = ""


class _Texts(Struct, frozen=True):
    unavailable: dict[GpuUnavailableReason, ErrorText]
    cuda: dict[str, ErrorText]
    windows_driver: ErrorText


@cache
def error_texts() -> _Texts:
    """Return the content of ``error_texts.toml``."""
    return msgspec.toml.decode(Path(__file__).with_name("error_texts.toml").read_bytes(), type=_Texts)


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
"""Reasons keyed by NVML return code, ``nvmlReturn_t`` in ``nvml.h``.

4 no permission, 6 not found, 9 driver not loaded, 12 library not found, 15 GPU is lost, 16 reset required, 17
blocked by the operating system, 18 mismatch of library and module, 28 GPU not found.
"""


class GpuUnavailableError(UserError):
    """Raised if no GPU can be read; ``what``, ``why`` and ``fix`` are sentences for the user."""

    def __init__(self, reason: GpuUnavailableReason, why: str = ""):
        reason = GpuUnavailableReason(reason)  # decoded from JSON, it is a str
        text = error_texts().unavailable[reason]
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
    """Return the exception for the NVML error ``code``; ``message`` is shown for an unknown code."""
    reason = _REASON_BY_NVML_CODE.get(code, GpuUnavailableReason.OTHER)
    return GpuUnavailableError(
        reason, f"NVML says: {message}." if reason is GpuUnavailableReason.OTHER else ""
    )
