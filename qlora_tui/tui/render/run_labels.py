"""The sign, color and time labels of a run, the same on every screen."""

from __future__ import annotations

import time

from qlora_tui.formatting import format_duration
from qlora_tui.runs.defects import ResultDefect
from qlora_tui.runs.status import State

SIGNS: dict[State, tuple[str, str]] = {
    "queued": ("◌", "dim"),
    "starting": ("●", "$primary"),
    "running": ("●", "$primary"),
    "finished": ("✓", "$success"),
    "failed": ("✗", "$error"),
    "stopped": ("■", "$warning"),
    "paused": ("‖", "$warning"),
    "lost": ("?", "$error"),
    "unreadable": ("?", "$error"),
    "gone": ("✗", "$error"),
}
"""(sign, color) by state; the word is always shown too."""


def result_label(state: State, defect: ResultDefect | None) -> tuple[str, str, str]:
    """(sign, word, color) of a run's state, or of what is wrong with its result."""
    if defect is not None:
        return "!", defect.word, "$error"
    sign, style = SIGNS[state]
    return sign, state, style


def format_ago(at: float, now: float) -> str:
    """``at 03:12, 4 h ago``; the day beside it when it was another."""
    moment, today = time.localtime(at), time.localtime(now)
    day = "" if moment[:3] == today[:3] else time.strftime("%d %b ", moment)
    return f"at {day}{time.strftime('%H:%M', moment)}, {format_duration(max(0.0, now - at))} ago"
