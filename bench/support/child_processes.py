"""Runs a program within a deadline, and leaves none of its processes behind.

A run's processes start sessions of their own, so that they outlive a terminal. Killing a process group
therefore does not reach them. After :func:`adopt_orphans`, they stay descendants of this process whatever
their parents do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

ROOT = Path(__file__).parents[2]
"""The repository, in which ``python -m bench.…`` works."""
POLL_S = 0.05
_PR_SET_CHILD_SUBREAPER = 36
"""Constant in ``linux/prctl.h``."""


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent ends. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl cannot adopt orphaned processes")


def end_descendants() -> None:
    """Kill every descendant of this process, and wait until none is left."""
    looks = 0
    # A single scan may miss a process whose parent has just ended.
    while looks < 2:
        descendants = psutil.Process().children(recursive=True)
        looks = 0 if descendants else looks + 1
        for process in descendants:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in descendants:
            with suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
        time.sleep(POLL_S)


def end_descendants_on_sigterm() -> None:
    """On SIGTERM and SIGINT, kill every descendant and raise SystemExit."""

    def end(number: int, frame: FrameType | None) -> None:
        end_descendants()
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def run_within(
    seconds: float, command: Sequence[str], *, log: Path, environ: Mapping[str, str] = os.environ
) -> int | None:
    """Run a program to its end, and end all processes that it started.

    Call :func:`adopt_orphans` first.

    Args:
        seconds: The deadline.
        command: The program and its arguments.
        log: File to which its output is appended.
        environ: Its environment.

    Returns:
        Its exit code, negative for a signal; None after the deadline.
    """
    until = time.monotonic() + seconds
    with log.open("ab") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT, env=environ
        )
    try:
        while (code := child.poll()) is None and time.monotonic() < until:
            time.sleep(POLL_S)
    finally:
        end_descendants()
    return code


def python_module(module: str, *arguments: object) -> list[str]:
    """Return the command that runs a module of this repository."""
    return [sys.executable, "-m", module, *map(str, arguments)]
