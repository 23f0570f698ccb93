"""Access to the GPU driver: NVML, for NVIDIA GPUs.

Everything outside this package reads GPUs through :func:`open_driver` and :func:`list_gpus`. To support the
GPUs of another vendor, implement :class:`GpuDriver` beside ``nvml.py`` and let :func:`open_driver` choose.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from qlora_tui.gpu.metrics import GpuDevice, GpuMetrics


class GpuDriver(Protocol):
    """A session with a GPU driver: a context manager, closed at its end. Safe in several threads.

    A value that the GPU does not report is ``None``; a GPU that cannot be read raises
    ``GpuUnavailableError``.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def list_gpus(self) -> list[GpuDevice]:
        """Return every GPU that responds, at least one."""

    def read(self, index: int, *, processes: bool = False) -> GpuMetrics:
        """Return the current metrics of GPU ``index``; ``processes`` adds those that hold its memory."""

    def close(self) -> None:
        """Close the session; a second call does nothing."""


def open_driver() -> GpuDriver:
    """Open a session with the driver of this machine. Raises ``GpuUnavailableError``."""
    # Imported here: importing this module must load neither the driver nor its binding.
    from qlora_tui.gpu.nvml import Nvml

    return Nvml()


def list_gpus() -> list[GpuDevice]:
    """Return every GPU of the machine, at least one. Raises ``GpuUnavailableError``."""
    with open_driver() as driver:
        return driver.list_gpus()
