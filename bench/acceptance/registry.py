"""The checks by name, each with its deadline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.acceptance import memory_checks, run_checks, streaming_checks
from bench.acceptance.context import CheckContext, Outcome


@dataclass(frozen=True)
class Check:
    """A check and the seconds that it may take."""

    make: Callable[[CheckContext], Outcome]
    seconds: float
    """Deadline for a model of up to 2 billion parameters."""
    large_seconds: float
    """Deadline for a larger one, which takes a minute to load."""


CHECKS = {
    "doctor": Check(run_checks.doctor, 60, 60),
    "loop": Check(run_checks.loop, 90, 180),
    "nvml": Check(run_checks.nvml, 60, 120),
    "float16": Check(run_checks.float16, 60, 120),
    "sigterm": Check(run_checks.sigterm, 60, 120),
    "resume": Check(run_checks.resume, 120, 270),
    "resume_8bit": Check(run_checks.resume_8bit, 120, 270),
    "memory": Check(memory_checks.memory, 150, 300),
    "streaming": Check(streaming_checks.streaming, 120, 300),
    "offload": Check(streaming_checks.offload, 120, 300),
    "chat": Check(run_checks.chat, 120, 180),
    "grid": Check(memory_checks.grid, 300, 560),
}

_DRY_RUN_S = 560.0
"""Deadline on a CPU, where the load of the machine decides."""


def deadline_s(name: str, size: str) -> float:
    """Return the seconds that a check may take with a model of this size."""
    check = CHECKS[name]
    if size == "tiny":
        return _DRY_RUN_S
    return check.large_seconds if size == "8b" else check.seconds
