"""The driver, asked through NVML (package ``nvidia-ml-py``, module ``pynvml``).

``cards()`` for whoever wants to know once; ``Nvml`` for the sampler, which asks again and again.
A question the card does not answer gives ``None``; a card that cannot be asked at all gives ``NoGpu``.
"""

from __future__ import annotations

import contextlib
import time
from types import TracebackType
from typing import Any, Self

from qlora_tui.gpu.no_gpu import NoGpu, Reason, no_gpu_from_nvml
from qlora_tui.gpu.reading import Card, GpuProcess, Reading

_FATAL = frozenset({1, 9, 15, 16, 18, 28})
"""Errors after which no other question makes sense: not initialised, driver not loaded, GPU lost, reset
required, mismatch, GPU not found. Every other one concerns the one question that was asked."""
_INVALID_ARGUMENT = 2

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
"""``nvmlClocksEventReasons`` in ``nvml.h``. Left out: 0x1, the card is idle; 0x2 and 0x100, clocks somebody
set, which on data-centre cards is always so. 0x8 is told apart in ``throttle_words``."""
_HARDWARE_SLOWDOWN = 0x8


def cards() -> list[Card]:
    """Every card of the machine, at least one. Raises ``NoGpu``."""
    with Nvml() as nvml:
        return nvml.cards()


class Nvml:
    """The driver, open for questions. Raises ``NoGpu`` when it cannot be opened.

    May be used by several threads, and opened several times: NVML counts.
    """

    def __init__(self) -> None:
        # Here, not above: the import takes longer than everything else the first screen needs of this room.
        import pynvml

        self._lib: Any = pynvml
        self._handles: dict[int, Any] = {}
        self._open = False
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise no_gpu_from_nvml(error.value, str(error)) from error
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the driver; a second call does nothing."""
        if not self._open:
            return
        self._open = False
        # A driver that fails to say goodbye changes nothing for us.
        with contextlib.suppress(self._lib.NVMLError):
            self._lib.nvmlShutdown()

    def cards(self) -> list[Card]:
        """Every card that answers, at least one. Raises ``NoGpu``, with the first card's reason."""
        try:
            count: int = self._lib.nvmlDeviceGetCount()
        except self._lib.NVMLError as error:
            raise no_gpu_from_nvml(error.value, str(error)) from error
        found: list[Card] = []
        failures: list[NoGpu] = []
        for index in range(count):
            try:
                found.append(self._card(index))
            except NoGpu as no_gpu:
                failures.append(no_gpu)
        if not found:
            raise failures[0] if failures else NoGpu(Reason.NO_DEVICE)
        return found

    def read(self, index: int, *, processes: bool = False) -> Reading:
        """What card ``index`` says now. Raises ``NoGpu``.

        With ``processes`` also who holds its memory, which costs milliseconds and a lock in the driver.
        """
        lib = self._lib
        handle = self._handle(index)
        utilization = self._ask("nvmlDeviceGetUtilizationRates", handle)
        memory = self._memory(handle)
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if reasons is None:  # Its name before driver 535.
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        temperature = self._ask("nvmlDeviceGetTemperature", handle, lib.NVML_TEMPERATURE_GPU)
        if temperature is None:  # The call above is announced to go with CUDA 14.
            temperature = self._ask("nvmlDeviceGetTemperatureV", handle, lib.NVML_TEMPERATURE_GPU)
        return Reading(
            at=time.time(),
            index=index,
            utilization_percent=getattr(utilization, "gpu", None),
            memory_used_bytes=getattr(memory, "used", None),
            memory_total_bytes=getattr(memory, "total", None),
            power_w=_watts(self._ask("nvmlDeviceGetPowerUsage", handle)),
            power_limit_w=_watts(self._ask("nvmlDeviceGetEnforcedPowerLimit", handle)),
            temperature_c=temperature,
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", handle, lib.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask("nvmlDeviceGetClockInfo", handle, lib.NVML_CLOCK_MEM),
            fan_percent=self._ask("nvmlDeviceGetFanSpeed", handle),
            throttle=None if reasons is None else throttle_words(reasons),
            processes=self._processes(handle) if processes else None,
        )

    def _card(self, index: int) -> Card:
        handle = self._handle(index)
        memory = self._memory(handle)
        capability = self._ask("nvmlDeviceGetCudaComputeCapability", handle)
        return Card(
            index=index,
            name=self._ask("nvmlDeviceGetName", handle) or f"GPU {index}",
            uuid=self._ask("nvmlDeviceGetUUID", handle),
            total_bytes=getattr(memory, "total", None),
            compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
            driver=self._ask("nvmlSystemGetDriverVersion"),
            # Only the second version of the struct has it.
            reserved_bytes=getattr(memory, "reserved", None),
        )

    def _handle(self, index: int) -> Any:
        if index not in self._handles:
            try:
                self._handles[index] = self._lib.nvmlDeviceGetHandleByIndex(index)
            except self._lib.NVMLError as error:
                if error.value == _INVALID_ARGUMENT:
                    raise NoGpu(Reason.NO_DEVICE, f"It has none with index {index}.") from error
                raise no_gpu_from_nvml(error.value, str(error)) from error
        return self._handles[index]

    def _ask(self, function: str, *arguments: Any, **options: Any) -> Any:
        """The answer of one NVML function, or ``None`` where card, driver or binding has none."""
        question = getattr(self._lib, function, None)
        if question is None:
            return None
        try:
            return question(*arguments, **options)
        except self._lib.NVMLError as error:
            if error.value in _FATAL:
                raise no_gpu_from_nvml(error.value, str(error)) from error
            return None

    def _memory(self, handle: Any) -> Any:
        """Total and used bytes. The first version counts what the driver reserves as used."""
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle, version=self._lib.nvmlMemory_v2)
        return self._ask("nvmlDeviceGetMemoryInfo", handle) if memory is None else memory

    def _processes(self, handle: Any) -> tuple[GpuProcess, ...] | None:
        """Who computes and who draws: a desktop or a browser takes memory from a run too."""
        # The name without _v3 raises something that is not an NVMLError when the driver is old.
        computing = self._ask("nvmlDeviceGetComputeRunningProcesses_v3", handle)
        drawing = self._ask("nvmlDeviceGetGraphicsRunningProcesses_v3", handle)
        if computing is None and drawing is None:
            return None
        held: dict[int, int | None] = {}
        for process in [*(computing or ()), *(drawing or ())]:
            # One that does both stands in both lists with the same sum.
            held[process.pid] = held.get(process.pid) or process.usedGpuMemory
        largest_first = sorted(held.items(), key=lambda item: -(item[1] or 0))
        return tuple(GpuProcess(pid, memory_bytes) for pid, memory_bytes in largest_first)


def throttle_words(reasons: int) -> tuple[str, ...]:
    """Plain words, each once, for NVML's bit mask of what holds the clocks back."""
    words = dict.fromkeys(word for bit, word in _THROTTLE_WORDS.items() if reasons & bit)
    # This bit alone says only that the hardware halved the clocks; with it usually comes one that says why.
    if reasons & _HARDWARE_SLOWDOWN and not words.keys() & {_THERMAL, _POWER_BRAKE}:
        words["hardware slowdown"] = None
    return tuple(words)


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000
