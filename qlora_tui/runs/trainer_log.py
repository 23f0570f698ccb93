"""The end of a trainer's log: what is left of an attempt that ended without an event.

Read by :mod:`qlora_tui.runs.outcomes`. The log holds the output of all attempts at a run, and may be of any
length: only its end is read.
"""

from __future__ import annotations

from qlora_tui.gpu.cuda_errors import sentence_in_log
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import read_from

_LOG_BYTES = 1 << 16
_LOG_LINES = 3
"""Lines of the log to quote."""


def log_size(run: RunDir) -> int:
    """Return the size of the log in bytes; 0 without a log."""
    try:
        return run.log_path.stat().st_size
    except OSError:
        return 0


def quote_log_end(run: RunDir) -> str:
    """Return the last lines of the log on one line, for a message."""
    lines = _last_lines(run, 0)
    if lines is None:
        return "(no log)"
    return " / ".join(lines[-_LOG_LINES:]) or "(empty)"


def last_cuda_line(run: RunDir, log_from: int) -> str:
    """Return the line with which a library ended the trainer for an error of CUDA; empty without one.

    Args:
        run: The run, whose trainer has exited.
        log_from: Size of the log when the trainer was started: earlier attempts do not count.
    """
    lines = _last_lines(run, log_from) or []
    return next((line for line in reversed(lines) if sentence_in_log(line)), "")


def _last_lines(run: RunDir, log_from: int) -> list[str] | None:
    try:
        size = run.log_path.stat().st_size
        begin = max(log_from, size - _LOG_BYTES)
        end = read_from(run.log_path, begin, _LOG_BYTES)
    except OSError:
        return None
    return end.decode(errors="replace").splitlines()
