"""Properties and metrics of a GPU, for display, messages and ``telemetry.jsonl``.

``None`` means that the GPU does not report the value (WSL2, laptops, containers, old drivers) or, for
processes, that it was not requested. Such values are shown as NA, never as 0.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from qlora_tui.decoding import Count, UnixTime

ComputeMode: TypeAlias = Literal["shared", "exclusive", "prohibited"]


class GpuDevice(msgspec.Struct, frozen=True):
    """Properties of a GPU that do not change while the machine runs."""

    index: int
    """The GPU's number in NVML and ``nvidia-smi``. torch's number may differ: see ``visible_devices``."""
    name: str
    """Name that the driver reports: ``NVIDIA GeForce RTX 4090``."""
    uuid: str | None
    """``GPU-`` and 36 characters; CUDA_VISIBLE_DEVICES accepts this ID."""
    total_bytes: int | None
    """Total memory of the GPU, including the driver's share."""
    compute_capability: str | None
    """Compute capability, such as ``8.9``; bf16 requires 8.0."""
    driver: str | None
    """Version of the driver: ``550.54.14``."""
    reserved_bytes: int | None = None
    """Memory reserved by driver and firmware, which no program can use."""
    cuda_version: str | None = None
    """Newest CUDA that the driver supports: ``12.4``."""
    compute_mode: ComputeMode | None = None
    """How many programs may compute on the GPU at a time (``nvidia-smi -c``)."""
    is_sliced: bool = False
    """Whether the GPU is divided into slices (MIG), of which torch uses one."""
    cores: int | None = None
    """Number of CUDA cores: 64 or 128 per multiprocessor."""

    @property
    def short_name(self) -> str:
        """Return the name without the vendor: ``RTX 4090``."""
        return self.name.removeprefix("NVIDIA ").removeprefix("GeForce ")

    @property
    def usable_bytes(self) -> int | None:
        """Return the total bytes that programs can use, including those in use; None if unknown."""
        return None if self.total_bytes is None else self.total_bytes - (self.reserved_bytes or 0)

    @property
    def capability(self) -> tuple[int, int] | None:
        """Return the compute capability as numbers: ``(8, 9)``."""
        return parse_version(self.compute_capability)

    @property
    def multiprocessors(self) -> int | None:
        """Return the number of multiprocessors. Each has 64 cores on Turing and the A100, and 128 cores on
        later GPUs.
        """
        if self.cores is None or self.capability is None:
            return None
        return self.cores // (64 if self.capability <= (8, 0) else 128)


def parse_version(text: str | None) -> tuple[int, int] | None:
    """Return the major and minor number of a version such as ``12.4``; None if ``text`` is None."""
    if text is None:
        return None
    major, _, minor = text.partition(".")
    return int(major), int(minor.partition(".")[0] or 0)


class GpuProcess(msgspec.Struct, frozen=True, omit_defaults=True):
    """A process that holds memory of the GPU."""

    pid: int
    """The host's process ID, which may be meaningless inside a container."""
    memory_bytes: int | None = None
    computes: bool = True
    """False if the process only draws, as a desktop does."""
    busy_percent: Count | None = None
    """Percentage of the last two seconds during which the process's kernels ran; None if unknown or not
    requested.
    """


class GpuMetrics(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Metrics of one GPU at one moment."""

    at: UnixTime
    """Unix time, in seconds."""
    index: Count
    """``GpuDevice.index``."""
    utilization_percent: Count | None = None
    """Share of the last sample period in which any kernel ran, 0 to 100.

    This is not the share of the GPU that is used.
    """
    memory_used_bytes: Count | None = None
    """Bytes used by all processes, as in ``nvidia-smi``; excludes ``GpuDevice.reserved_bytes`` if known."""
    memory_total_bytes: Count | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    """The enforced power limit in watts, which may be below the GPU's default."""
    temperature_c: int | None = None
    sm_clock_mhz: Count | None = None
    fan_percent: Count | None = None
    throttle: tuple[str, ...] | None = None
    """Names of the reasons why the clocks are reduced; empty if they are not."""
    processes: tuple[GpuProcess, ...] | None = None
    """Processes, largest first; ``None`` also if they were not requested."""
