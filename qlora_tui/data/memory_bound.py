"""A memory limit for a block of code, enforced by the kernel.

For libraries without a limit: a compressed page declares its size, a chat template is a program. An
allocation over the bound fails with ``MemoryError`` instead of exhausting the machine's memory.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS = Path("/proc/self/status")
_FRESH_S = 0.25
"""Seconds that a reading of the process's memory stays valid: reading costs as much as a short row."""
_lock = threading.Lock()
_open_blocks = 0
_before = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
_held_bytes = 0
_read_at = float("-inf")


@contextmanager
def memory_bound(more_bytes: int) -> Iterator[None]:
    """Let the process hold ``more_bytes`` more than now while the block runs.

    The limit applies to all threads, so leave room. Blocks may overlap: the first one's bound applies. Does
    nothing where the kernel has no such limit, or a lower one.
    """
    enter(more_bytes)
    try:
        yield
    finally:
        leave()


def enter(more_bytes: int) -> None:
    """Start the limit of ``memory_bound``; for code that runs thousands of times a second."""
    global _open_blocks, _before
    with _lock:
        _open_blocks += 1
        if _open_blocks == 1:
            _before = resource.getrlimit(resource.RLIMIT_DATA)
            soft, hard = _before
            bound = _held() + more_bytes
            if bound > more_bytes and (soft == resource.RLIM_INFINITY or bound < soft):
                resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))


def leave() -> None:
    """End a block that ``enter`` started."""
    global _open_blocks
    with _lock:
        _open_blocks -= 1
        if not _open_blocks:
            resource.setrlimit(resource.RLIMIT_DATA, _before)


def _held() -> int:
    """Return the bytes of private memory that count toward the limit; 0 where the kernel does not say."""
    global _held_bytes, _read_at
    now = time.monotonic()
    if now - _read_at > _FRESH_S:
        _read_at = now
        try:
            status = _STATUS.read_bytes()
            _held_bytes = int(status.partition(b"VmData:")[2].split(maxsplit=1)[0]) << 10
        except (OSError, ValueError, IndexError):
            _held_bytes = 0
    return _held_bytes
