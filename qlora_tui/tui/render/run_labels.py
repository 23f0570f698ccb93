"""The sign, color and time labels of a run, the same on every screen."""

from __future__ import annotations

import time

from qlora_tui.formatting import format_duration
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


def format_ago(at: float, now: float) -> str:
    """``at 03:12, 4 h ago``; the day beside it when it was another."""
    moment, today = time.localtime(at), time.localtime(now)
    day = "" if moment[:3] == today[:3] else time.strftime("%d %b ", moment)
    return f"at {day}{time.strftime('%H:%M', moment)}, {format_duration(max(0.0, now - at))} ago"
