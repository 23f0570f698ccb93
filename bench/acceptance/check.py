"""The checks by name, and the program that runs one.

``python -m bench.acceptance.check NAME CONTEXT OUTCOME``, where CONTEXT and OUTCOME are JSON files.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.acceptance import memory_checks, probe_checks, run_checks, streaming_checks
from bench.acceptance.context import CheckContext, CheckSkipped, Outcome


@dataclass(frozen=True)
class Check:
    """A check, with the seconds that it may take."""

    make: Callable[[CheckContext], Outcome]
    seconds: float
    """Deadline in seconds for a model of up to 2 billion parameters."""
    large_seconds: float
    """Deadline in seconds for a larger model, which takes a minute to load."""


CHECKS = {
    "machine": Check(probe_checks.machine, 60, 60),
    "doctor": Check(run_checks.doctor, 180, 180),
    "context": Check(probe_checks.context_memory, 60, 60),
    "four_bit": Check(probe_checks.four_bit, 60, 60),
    "triton_kernels": Check(probe_checks.triton_kernels, 90, 90),
    "varlen_attention": Check(probe_checks.varlen_attention, 60, 60),
    "out_of_memory": Check(probe_checks.out_of_memory, 60, 60),
    "step": Check(probe_checks.step, 90, 180),
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
FIRST = (
    *("machine", "doctor", "context", "four_bit", "triton_kernels", "varlen_attention", "out_of_memory"),
    *("loop", "float16", "resume"),
)
"""Checks to run first on an unknown GPU. They take about five minutes with a model of 0.5b."""
_DRY_RUN_S = 560.0
"""Deadline in seconds on a CPU, where the load of the machine determines the time."""


def deadline_s(name: str, size: str) -> float:
    """Return the seconds that a check may take with a model of this size."""
    check = CHECKS[name]
    if size == "tiny":
        return _DRY_RUN_S
    return check.large_seconds if size == "8b" else check.seconds


def main() -> int:
    """Run the check and write its outcome; return 0 whatever the outcome is."""
    name, context_file, outcome_file = sys.argv[1:]
    outcome = outcome_of(CHECKS[name], CheckContext.read(Path(context_file)))
    draft = Path(f"{outcome_file}.draft")
    draft.write_text(json.dumps(asdict(outcome), default=str))
    draft.rename(outcome_file)
    return 0


def outcome_of(check: Check, context: CheckContext) -> Outcome:
    """Run a check and return its outcome. Any exception is a failure."""
    try:
        return check.make(context)
    except CheckSkipped as why:
        return Outcome("skipped", str(why))
    except Exception as error:
        traceback.print_exc()
        return Outcome("failed", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main())
