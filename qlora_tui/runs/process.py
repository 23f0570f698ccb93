"""Telling a process from another that got its number later."""

from __future__ import annotations

import os
from pathlib import Path

from msgspec import Struct

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ProcessMark(Struct, frozen=True, kw_only=True):
    """A process for good: its number alone comes round again."""

    pid: int
    started: float
    """Unix time at which the process began, as the kernel tells it."""
    boot_id: str
    """Changes at every boot of the machine."""

    def is_alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        if self.boot_id != boot_id():
            return False
        import psutil  # a start that finds no active run need not load it

        try:
            process = psutil.Process(self.pid)
            # The kernel's start time is in ticks since boot; the clock may have been set since.
            return abs(process.create_time() - self.started) < 2 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def is_from_this_boot(self) -> bool:
        """False after the machine was restarted."""
        return self.boot_id == boot_id()


def boot_id() -> str:
    """The kernel's name for this boot; empty where it has none."""
    # A test plays a restarted machine with this variable; nothing else sets it.
    if played := os.environ.get("QLORA_TUI_BOOT_ID"):
        return played
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def mark(pid: int | None = None) -> ProcessMark:
    """The mark of a running process, this one unless told; raises psutil.NoSuchProcess."""
    import psutil

    process = psutil.Process(pid)
    return ProcessMark(pid=process.pid, started=process.create_time(), boot_id=boot_id())
