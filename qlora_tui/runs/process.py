"""Unambiguous process identification: PIDs are reused, and the clock can be set.

A process is identified by its PID, the clock tick since boot at which it started, and the boot. If several
machines or containers share a folder, machine and PID namespace tell where that PID is valid.
"""

from __future__ import annotations

import os
import select
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MACHINE_ID = Path("/etc/machine-id")
_SAME_START_S = 2.0
"""Maximum difference in seconds between two readings of one process's start time, unless the clock is set."""


class ProcessIdentity(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Permanent identity of a process."""

    pid: int
    started: float
    """Unix time of its start, by the clock at that moment; older versions compare it."""
    boot_id: str
    """Changes at every boot of the machine."""
    start_ticks: int = 0
    """Clock ticks from boot to its start; 0 in files of older versions and without ``/proc``."""
    machine: str = ""
    """Machine or container id; empty in files of older versions."""
    host: str = ""
    """Host name, for display."""
    pid_namespace: str = ""
    """PID namespace in which ``pid`` is valid; empty in files of older versions."""

    @property
    def is_from_this_boot(self) -> bool:
        """Whether it belongs to the current boot of this kernel."""
        return self.boot_id == boot_id()

    @property
    def is_of_this_machine(self) -> bool:
        """Whether it ran on this machine, before or since a reboot; True if unknown."""
        return self.is_from_this_boot or self.machine in ("", machine_id())

    @property
    def is_visible(self) -> bool:
        """Whether its PID can be looked up here."""
        return self.is_from_this_boot and self.pid_namespace in ("", _pid_namespace())

    def is_alive(self) -> bool:
        """Whether exactly this process is visible and running; a zombie is not."""
        return self.state not in ("", "Z", "X")

    @property
    def state(self) -> str:
        """State letter of the kernel (``R``, ``S``, ``D``, ``T``, ``Z``…); empty if not visible."""
        seen = _read_process(self.pid) if self.is_visible else None
        if seen is None:
            return ""
        if self.start_ticks and seen.start_ticks:
            return seen.state if seen.start_ticks == self.start_ticks else ""
        return seen.state if abs(seen.started - self.started) < _SAME_START_S else ""

    def wait(self, timeout_s: float) -> None:
        """Return when the process has ended, or after ``timeout_s``."""
        try:
            handle = os.pidfd_open(self.pid)
        except (OSError, OverflowError, AttributeError):
            time.sleep(timeout_s)
            return
        try:
            # The handle refers to the process that had the PID when it was opened, so check identity after.
            if self.is_alive():
                ended = select.poll()
                ended.register(handle, select.POLLIN)
                ended.poll(timeout_s * 1000)
            else:
                time.sleep(timeout_s)
        finally:
            os.close(handle)


class _Seen(NamedTuple):
    state: str
    start_ticks: int
    started: float


def process_identity(pid: int | None = None) -> ProcessIdentity:
    """Identify a running process, this one by default; raises ProcessLookupError if it does not exist."""
    pid = os.getpid() if pid is None else pid
    seen = _read_process(pid)
    if seen is None:
        raise ProcessLookupError(f"no process {pid}")
    return ProcessIdentity(
        pid=pid,
        started=seen.started,
        boot_id=boot_id(),
        start_ticks=seen.start_ticks,
        machine=machine_id(),
        host=os.uname().nodename,
        pid_namespace=_pid_namespace(),
    )


def boot_id() -> str:
    """The kernel's identifier of this boot; empty if unavailable."""
    # Tests simulate a restarted machine with this variable; nothing else sets it.
    if simulated := os.environ.get("QLORA_TUI_BOOT_ID"):
        return simulated
    return _real_boot_id()


@cache
def _real_boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


@cache
def machine_id() -> str:
    """Identify this machine or container by machine id and host name: images can share a machine id."""
    import hashlib

    try:
        machine_id = _MACHINE_ID.read_bytes().strip()
    except OSError:
        machine_id = b""
    # systemd asks not to publish the machine id itself.
    return hashlib.sha256(machine_id + b"/" + os.uname().nodename.encode()).hexdigest()[:16]


@cache
def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _read_process(pid: int) -> _Seen | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        # The second field is the command in parentheses, which may contain any character.
        fields = stat[stat.rindex(b")") + 2 :].split()
        state, start_ticks = fields[0].decode(), int(fields[19])
        return _Seen(state, start_ticks, _boot_time() + start_ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return None if Path("/proc/self/stat").exists() else _read_process_elsewhere(pid)


def _boot_time() -> float:
    """Unix time of the boot by the current clock: it changes when the clock is set."""
    for line in Path("/proc/stat").read_bytes().splitlines():
        if line.startswith(b"btime "):
            return float(line.split()[1])
    return 0.0


def _read_process_elsewhere(pid: int) -> _Seen | None:
    """Read a process on systems without ``/proc``: without ticks."""
    import psutil

    try:
        process = psutil.Process(pid)
        state = "Z" if process.status() == psutil.STATUS_ZOMBIE else "S"
        return _Seen(state, 0, process.create_time())
    except (psutil.Error, ValueError, OverflowError):
        return None
