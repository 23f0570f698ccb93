"""Whether this is WSL2, where CUDA reaches the GPU through the driver of Windows, and what that rules out."""

from __future__ import annotations

from pathlib import Path

_KERNEL_RELEASE = Path("/proc/sys/kernel/osrelease")
_GPU_OF_WINDOWS = Path("/dev/dxg")
"""The device of Linux's ``dxgkrnl``, which a kernel that the user built without Microsoft's name has too."""


def is_wsl2() -> bool:
    """Return whether this is Linux under Windows, in a container there too.

    The release of its kernel is like ``5.15.153.1-microsoft-standard-WSL2``.
    """
    try:
        release = _KERNEL_RELEASE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        release = ""
    return "microsoft" in release.lower() or _GPU_OF_WINDOWS.exists()


def managed_memory_is_safe() -> bool:
    """Return whether the CPU may touch CUDA's managed memory while the GPU computes.

    Paged optimizers keep their states there. Where ``concurrentManagedAccess`` is 0, as on WSL2, a CPU access
    to any managed memory before the GPU is synchronized is a segmentation fault (CUDA C++ Programming Guide,
    "Unified Memory on Windows or devices with compute capability 5.x"; CUDA on WSL User Guide, "Known
    Limitations for Linux CUDA Applications").
    """
    return not is_wsl2()
