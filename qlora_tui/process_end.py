"""How a process ended, in words: its signal or exit code, the likely cause, and what to do."""

from __future__ import annotations

import signal
from pathlib import Path

from qlora_tui.errors import UserError


def how_ended(exit_code: int) -> str:
    """Return how a process ended, as a predicate: ``was killed by SIGSEGV``, ``ended with exit code 3``.

    Args:
        exit_code: As in ``subprocess``: negative for a signal.
    """
    if exit_code > 0:
        return f"ended with exit code {exit_code}"
    if exit_code == 0:
        return "ended without a result"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        # Python has no individual names for real-time signals.
        return f"was killed by signal {-exit_code}"


def ended_early(
    title: str,
    subject: str,
    exit_code: int | None,
    *,
    last_words: str = "",
    fix: str = "Try again.",
    log: Path | None = None,
) -> UserError:
    """Return the error for a process that ended without reporting a reason.

    A process that was killed by SIGKILL most likely ran out of memory: the kernel's out-of-memory killer uses
    this signal.

    Args:
        title: Title of the error.
        subject: Name of the process, such as ``The process that downloads org/model``.
        exit_code: As in ``subprocess``: negative for a signal. None if it is unknown, because the process was
            not a child of this one, and nothing indicates another cause than a signal.
        last_words: Last output of the process, which is shown as the cause unless memory ran out.
        fix: What to do; if memory ran out, after other programs are closed.
        log: The file with the output of the process; None if there is no such file.
    """
    how = "was killed" if exit_code is None else how_ended(exit_code)
    ran_out_of_memory = exit_code in (None, -signal.SIGKILL)
    if ran_out_of_memory:
        fix = f"Close other programs. {fix}"
    return UserError(
        title,
        what=f"{subject} {how}.",
        why="The machine most likely ran out of memory." if ran_out_of_memory else last_words,
        fix=f"{fix} The last output of the process is in {log}." if log else fix,
    )
