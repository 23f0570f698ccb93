"""Reads GPUs from NVIDIA's driver through NVML (package ``nvidia-ml-py``, module ``pynvml``).

:class:`Nvml` reads properties and metrics; :class:`MetricsSampler` is a thread that reads one GPU every
second; the trainer writes the readings to ``telemetry.jsonl``. A value that the GPU does not report is
``None``; a GPU that cannot be read raises ``GpuUnavailableError``.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Self

import msgspec

from qlora_tui.gpu.errors import GpuUnavailableError, GpuUnavailableReason, from_nvml_error
from qlora_tui.gpu.metrics import ComputeMode, GpuDevice, GpuMetrics, GpuProcess

_FATAL = frozenset({1, 9, 15, 16, 18, 28})
"""Errors after which no other query makes sense; any other error affects only its own query.

Not initialized, driver not loaded, GPU lost, reset required, mismatch, GPU not found.
"""
_INVALID_ARGUMENT = 2
_COMPUTE_MODES: dict[int | None, ComputeMode] = {0: "shared", 1: "exclusive", 2: "prohibited", 3: "exclusive"}
"""``nvmlComputeMode_t`` in ``nvml.h``: default, one thread, prohibited, one process."""
_CONTROL_DEVICE = Path("/dev/nvidiactl")
"""Exists while the kernel module is loaded, also in a container that was given a GPU."""
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_NVIDIA = "0x10de"
"""NVIDIA's vendor ID for PCI devices."""
_THERMAL = "thermal"
_POWER_BRAKE = "power brake"
_THROTTLE_WORDS = {
    0x4: "power cap",
    0x10: "sync boost",
    0x20: _THERMAL,
    0x40: _THERMAL,
    0x80: _POWER_BRAKE,
    0x200: "board limit",
    0x400: "reliability limit",
}
"""Names of ``nvmlClocksEventReasons`` in ``nvml.h``.

Left out: 0x1, the GPU is idle; 0x2, clocks set for applications, which data-center GPUs always have; 0x100,
clocks set for displays.
``describe_throttle`` handles 0x8.
"""
_HARDWARE_SLOWDOWN = 0x8
PROCESSES_EVERY_S = 5.0
"""Seconds between readings of process lists.

A process list takes 4.5 ms and a driver lock; everything else together takes well under one millisecond.
"""
_BUSY_S = 2.0
"""Seconds over which a process's share of the GPU is averaged."""
log = logging.getLogger(__name__)


def list_gpus() -> list[GpuDevice]:
    """Return every GPU that responds, at least one. Raises ``GpuUnavailableError``."""
    with Nvml() as driver:
        return driver.list_gpus()


class Nvml:
    """An open NVML session. Raises ``GpuUnavailableError`` if it cannot be opened.

    Sessions are thread-safe, and several can be open, because NVML counts its initializations.
    """

    def __init__(self) -> None:
        # Imported here: importing takes longer than everything else that the first screen needs of this
        # package.
        import pynvml

        self._lib: Any = pynvml
        self._handles: dict[int, Any] = {}
        self._open = False
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise _unavailable(error) from error
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the session; a second call does nothing."""
        if not self._open:
            return
        self._open = False
        # An error of the driver at shutdown has no consequences here.
        with contextlib.suppress(self._lib.NVMLError):
            self._lib.nvmlShutdown()

    def list_gpus(self) -> list[GpuDevice]:
        """Return every GPU that responds. Raises ``GpuUnavailableError`` if none does."""
        try:
            count: int = self._lib.nvmlDeviceGetCount()
        except self._lib.NVMLError as error:
            raise from_nvml_error(error.value, str(error)) from error
        devices: list[GpuDevice] = []
        failures: list[GpuUnavailableError] = []
        for index in range(count):
            try:
                devices.append(self._read_device(index))
            except GpuUnavailableError as unavailable:
                failures.append(unavailable)
        if not devices:
            raise failures[0] if failures else GpuUnavailableError(GpuUnavailableReason.NO_DEVICE)
        return devices

    def read(self, index: int, *, processes: bool = False) -> GpuMetrics:
        """Return the current metrics of GPU ``index``. Raises ``GpuUnavailableError``.

        ``processes`` adds the processes that use the GPU's memory, which takes milliseconds and a lock.
        """
        lib = self._lib
        handle = self._handle(index)
        utilization = self._query("nvmlDeviceGetUtilizationRates", handle)
        memory = self._memory(handle)
        reasons = self._query("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if reasons is None:  # its name before driver 535
            reasons = self._query("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        temperature = self._query("nvmlDeviceGetTemperature", handle, lib.NVML_TEMPERATURE_GPU)
        if temperature is None:  # the call above will be removed with CUDA 14
            temperature = self._query("nvmlDeviceGetTemperatureV", handle, lib.NVML_TEMPERATURE_GPU)
        return GpuMetrics(
            at=time.time(),
            index=index,
            utilization_percent=getattr(utilization, "gpu", None),
            memory_used_bytes=getattr(memory, "used", None),
            memory_total_bytes=getattr(memory, "total", None),
            power_w=_watts(self._query("nvmlDeviceGetPowerUsage", handle)),
            power_limit_w=_watts(self._query("nvmlDeviceGetEnforcedPowerLimit", handle)),
            temperature_c=temperature,
            sm_clock_mhz=self._query("nvmlDeviceGetClockInfo", handle, lib.NVML_CLOCK_SM),
            fan_percent=self._query("nvmlDeviceGetFanSpeed", handle),
            throttle=None if reasons is None else describe_throttle(reasons),
            processes=self._processes(handle) if processes else None,
        )

    def busy_processes(self, index: int) -> tuple[GpuProcess, ...] | None:
        """Return the processes on GPU ``index``, with the share of the GPU that each uses.

        None if the driver does not list processes. Raises ``GpuUnavailableError``.
        """
        handle = self._handle(index)
        since_us = round((time.time() - _BUSY_S) * 1e6)
        # If the GPU is idle, the driver has no sample and returns an error.
        samples = self._query("nvmlDeviceGetProcessUtilization", handle, since_us) or ()
        shares: dict[int, list[int]] = {}
        for sample in samples:
            shares.setdefault(sample.pid, []).append(sample.smUtil)
        processes = self._processes(handle)
        return processes and tuple(
            msgspec.structs.replace(process, busy_percent=round(fmean(shares.get(process.pid, [0]))))
            for process in processes
        )

    def _read_device(self, index: int) -> GpuDevice:
        handle = self._handle(index)
        memory = self._memory(handle)
        capability = self._query("nvmlDeviceGetCudaComputeCapability", handle)
        cuda = self._query("nvmlSystemGetCudaDriverVersion")
        slices = self._query("nvmlDeviceGetMigMode", handle)
        return GpuDevice(
            index=index,
            name=self._query("nvmlDeviceGetName", handle) or f"GPU {index}",
            uuid=self._query("nvmlDeviceGetUUID", handle),
            total_bytes=getattr(memory, "total", None),
            compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
            driver=self._query("nvmlSystemGetDriverVersion"),
            # Only the second version of the struct has this field.
            reserved_bytes=getattr(memory, "reserved", None),
            cuda_version=None if not cuda else f"{cuda // 1000}.{cuda % 1000 // 10}",
            compute_mode=_COMPUTE_MODES.get(self._query("nvmlDeviceGetComputeMode", handle)),
            is_sliced=bool(slices and slices[0]),
            cores=self._query("nvmlDeviceGetNumGpuCores", handle),
        )

    def _handle(self, index: int) -> Any:
        if index not in self._handles:
            try:
                self._handles[index] = self._lib.nvmlDeviceGetHandleByIndex(index)
            except self._lib.NVMLError as error:
                if error.value == _INVALID_ARGUMENT:
                    raise GpuUnavailableError(
                        GpuUnavailableReason.NO_DEVICE, f"The driver has no GPU with index {index}."
                    ) from error
                raise from_nvml_error(error.value, str(error)) from error
        return self._handles[index]

    def _query(self, function: str, *arguments: Any, **options: Any) -> Any:
        """Call one NVML function; return ``None`` if GPU, driver or binding does not support it."""
        question = getattr(self._lib, function, None)
        if question is None:
            return None
        try:
            return question(*arguments, **options)
        except self._lib.NVMLError as error:
            if error.value in _FATAL:
                raise from_nvml_error(error.value, str(error)) from error
            return None

    def _memory(self, handle: Any) -> Any:
        """Return total and used bytes. The struct's first version counts the driver's reserve as used."""
        memory = self._query("nvmlDeviceGetMemoryInfo", handle, version=self._lib.nvmlMemory_v2)
        return self._query("nvmlDeviceGetMemoryInfo", handle) if memory is None else memory

    def _processes(self, handle: Any) -> tuple[GpuProcess, ...] | None:
        """Return compute and graphics processes, because a desktop or browser also uses GPU memory."""
        # With an old driver, the name without _v3 raises something that is not an NVMLError.
        computing = self._query("nvmlDeviceGetComputeRunningProcesses_v3", handle)
        drawing = self._query("nvmlDeviceGetGraphicsRunningProcesses_v3", handle)
        if computing is None and drawing is None:
            return None
        computing_pids = {process.pid for process in computing or ()}
        memory_by_pid: dict[int, int | None] = {}
        for process in [*(computing or ()), *(drawing or ())]:
            # A process that computes and draws is in both lists with the same total.
            memory_by_pid[process.pid] = memory_by_pid.get(process.pid) or process.usedGpuMemory
        largest_first = sorted(memory_by_pid.items(), key=lambda item: -(item[1] or 0))
        return tuple(
            GpuProcess(pid, memory_bytes, computes=pid in computing_pids)
            for pid, memory_bytes in largest_first
        )


def _unavailable(error: Any) -> GpuUnavailableError:
    """Return the exception for a session that cannot be opened, depending on the machine's hardware."""
    unavailable = from_nvml_error(error.value, str(error))
    if unavailable.reason is GpuUnavailableReason.NO_DRIVER and _CONTROL_DEVICE.exists():
        return GpuUnavailableError(GpuUnavailableReason.NO_LIBRARY)
    if unavailable.reason is GpuUnavailableReason.NOT_LOADED and not _has_nvidia_card():
        why = "A driver is installed, but the machine has no NVIDIA GPU."
        return GpuUnavailableError(GpuUnavailableReason.NO_DEVICE, why)
    return unavailable


def _has_nvidia_card() -> bool:
    """Return whether the PCI bus has an NVIDIA device; true if no devices can be read from the bus."""
    try:
        vendors = [(device / "vendor").read_text().strip() for device in _PCI_DEVICES.iterdir()]
    except OSError:
        return True
    return not vendors or _NVIDIA in vendors


def describe_throttle(reasons: int) -> tuple[str, ...]:
    """Return the unique names of the throttle reasons in NVML's bit mask."""
    descriptions = dict.fromkeys(word for bit, word in _THROTTLE_WORDS.items() if reasons & bit)
    # This bit only says that the hardware halved the clocks; usually another bit says why.
    if reasons & _HARDWARE_SLOWDOWN and not descriptions.keys() & {_THERMAL, _POWER_BRAKE}:
        descriptions["hardware slowdown"] = None
    return tuple(descriptions)


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


class MetricsSampler:
    """Reads GPU ``index`` in a thread, until :meth:`stop` is called.

    ``on_sample`` is called in the sampler's thread: with every reading, and once with a
    ``GpuUnavailableError`` whenever the GPU becomes unavailable or the reason changes. The driver is then
    reopened every ``retry_s`` seconds until the GPU responds again. An exception in ``on_sample`` is logged
    and does not stop the sampler.
    """

    def __init__(
        self,
        index: int,
        on_sample: Callable[[GpuMetrics | GpuUnavailableError], None],
        *,
        period_s: float = 1.0,
        retry_s: float = 10.0,
    ):
        self.latest: GpuMetrics | GpuUnavailableError | None = None
        """The last sample; ``None`` before the first."""
        self._index = index
        self._on_sample = on_sample
        self._period_s = period_s
        self._retry_s = retry_s
        self._callback_fails = False
        self._stopping = threading.Event()
        # A daemon thread, because a driver that hangs in a call must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="gpu-sampler", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the thread, which takes the first reading now. A sampler can be started only once."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop, and wait at most ``timeout_s`` seconds until ``on_sample`` is no longer called.

        May be called twice, before the start, and from ``on_sample`` itself.
        """
        self._stopping.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with Nvml() as driver:
                    self._read_until_stopped(driver)
            except GpuUnavailableError as unavailable:
                if not (
                    isinstance(self.latest, GpuUnavailableError) and self.latest.reason is unavailable.reason
                ):
                    self._deliver(unavailable)
                self._stopping.wait(self._retry_s)

    def _read_until_stopped(self, driver: Nvml) -> None:
        """Read until stopped, or until ``GpuUnavailableError`` is raised."""
        due_s = processes_due_s = time.monotonic()
        processes: tuple[GpuProcess, ...] | None = None
        while not self._stopping.is_set():
            if time.monotonic() >= processes_due_s:
                processes_due_s += PROCESSES_EVERY_S
                reading = driver.read(self._index, processes=True)
                processes = reading.processes
            else:
                reading = msgspec.structs.replace(driver.read(self._index), processes=processes)
            self._deliver(reading)
            now_s = time.monotonic()
            due_s += self._period_s
            if due_s < now_s:  # late by a period or more: skip the missed samples
                due_s = now_s + self._period_s
            self._stopping.wait(due_s - now_s)

    def _deliver(self, sample: GpuMetrics | GpuUnavailableError) -> None:
        self.latest = sample
        try:
            self._on_sample(sample)
        except Exception:
            if not self._callback_fails:  # a full disk would fail each second; once is enough
                log.exception("the callback failed on a GPU sample")
            self._callback_fails = True
        else:
            self._callback_fails = False
