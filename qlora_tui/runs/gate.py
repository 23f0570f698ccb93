"""Decides whether a run may train now, given the training hours and the other programs on its GPU.

The runner calls this module about once a second for a run in training, and every few seconds for a waiting
run. :mod:`qlora_tui.runs.holds` has the rules; this module reads the clock, the settings and the driver.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path

from qlora_tui.gpu.errors import GpuUnavailableError
from qlora_tui.gpu.metrics import GpuProcess
from qlora_tui.gpu.nvml import Nvml
from qlora_tui.hours import Clock
from qlora_tui.runs.devices import RunDevice
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.holds import Hold, Sharing
from qlora_tui.runs.status import read_status
from qlora_tui.settings import LiveSettings, Settings

PERIOD_S = 1.0
"""Seconds between two readings of a GPU. Reading the process list takes 4.5 ms and locks the driver."""
_FORGETS_AFTER_S = 300.0
"""Seconds without a reading of a GPU after which its programs count as new.

A GPU is not read outside the training hours, or if the ``yield`` setting is off.
"""
_COMMAND_BYTES = 4096


class GpuReader:
    """Reads the processes on GPUs, and tolerates a driver that disappears. Thread-safe."""

    def __init__(self) -> None:
        self._driver: Nvml | None = None

    def __call__(self, index: int) -> tuple[GpuProcess, ...] | None:
        """Return the processes on a GPU; None if the driver does not list them."""
        try:
            self._driver = self._driver or Nvml()
            return self._driver.busy_processes(index)
        except GpuUnavailableError:
            if self._driver is not None:
                self._driver.close()
            self._driver = None
            return None


def closed_hours(settings: Settings, clock: Clock) -> Hold | None:
    """Return the hold that applies to all runs outside the training hours; None during training hours."""
    now = clock.now()
    opens_at = settings.training_hours.opens_at(now, clock.zone())
    return None if opens_at <= now else Hold(cause="hours", until=opens_at)


class Gate:
    """Decides whether runs may train now. Thread-safe, because each run in training has a thread."""

    def __init__(
        self,
        clock: Clock | None = None,
        read_processes: Callable[[int], Iterable[GpuProcess] | None] | None = None,
    ) -> None:
        """Create a gate.

        ``read_processes`` returns the processes on a GPU, or None if the driver does not list them.
        """
        self._clock = clock or Clock()
        self._read_processes = read_processes or GpuReader()
        self._settings = LiveSettings()
        self._gpus: dict[str, Sharing] = {}
        """Use of each GPU by other programs, by the GPU's UUID."""
        self._holds: dict[str, tuple[float, Hold | None]] = {}
        """Time of the last reading of each GPU, and the resulting hold."""
        self._lock = threading.Lock()

    def hours_hold(self, run: RunDir) -> Hold | None:
        """Return the run's hold outside the training hours.

        None during training hours, or if the user asked the run to train now.
        """
        with self._lock:
            # Do not read the GPU here, because it may sleep until the hours begin.
            return None if run.trains_now else closed_hours(self._settings.read(), self._clock)

    def programs_on(
        self, run: RunDir, devices: Iterable[RunDevice], *, is_training: bool = False
    ) -> dict[str, Hold]:
        """Return the run's holds because of other programs, by the key of the device that the program uses.

        ``is_training`` says whether the run trains on these devices.
        """
        devices = list(devices)
        if not devices:
            # Of a long queue, most runs wait for a device.
            return {}
        with self._lock:
            if run.trains_now or not self._settings.read().yields:
                return {}
            holds = {
                device.key: self._program_on(run, device.key, device.index, is_training=is_training)
                for device in devices
                if device.index is not None
            }
        return {key: hold for key, hold in holds.items() if hold is not None}

    def hold(self, run: RunDir, devices: Iterable[RunDevice]) -> Hold | None:
        """Return why a run in training on these devices must stop now; None if it may continue."""
        used = self.programs_on(run, devices, is_training=True)
        return self.hours_hold(run) or next(iter(used.values()), None)

    def _program_on(self, run: RunDir, key: str, index: int, *, is_training: bool) -> Hold | None:
        elapsed_s = self._clock.elapsed()
        looked_at, hold = self._holds.get(key, (-inf, None))
        if elapsed_s - looked_at < PERIOD_S:
            return hold
        if elapsed_s - looked_at > _FORGETS_AFTER_S:
            self._gpus[key] = Sharing(_held_for(run))
        listed = self._read_processes(index)
        own, processes = set[int](), None
        if listed is not None:
            whose = {process: is_own(process.pid) for process in listed}
            own = {process.pid for process, is_ours in whose.items() if is_ours}
            # A process that has ended may have belonged to this program.
            processes = [process for process, is_ours in whose.items() if is_ours is not None]
        user = self._gpus[key].update(elapsed_s, processes, own, is_training=is_training)
        if user is None:
            hold = None
        elif hold is None or hold.pid != user.pid:
            # The name of a process is unknown once it has ended.
            hold = Hold(cause="program", program=program_name(user.pid), pid=user.pid)
        self._holds[key] = elapsed_s, hold
        return hold


def _held_for(run: RunDir) -> int:
    """Return the PID of the program that the run was waiting for under an earlier runner; 0 if there was none
    or it has ended.
    """
    hold = read_status(run).hold
    return hold.pid if hold and hold.cause == "program" and program_name(hold.pid) == hold.program else 0


def is_own(pid: int) -> bool | None:
    """Return whether a process is a trainer, an engine or a server of this program and this user.

    None if it has ended, or if its id belongs to another namespace, as in some containers. A run yields to
    processes of other users, so these are not own processes.
    """
    process = Path(f"/proc/{pid}")
    try:
        with (process / "cmdline").open("rb") as file:
            arguments = file.read(_COMMAND_BYTES).split(b"\0")
        is_ours = process.stat().st_uid == os.getuid()
    except OSError:
        return None
    return is_ours and any(argument.split(b".")[0] == b"qlora_tui" for argument in arguments)


def program_name(pid: int) -> str:
    """Return the name of a process; "another program" if it has ended or cannot be read."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip() or "another program"
    except OSError:
        return "another program"
