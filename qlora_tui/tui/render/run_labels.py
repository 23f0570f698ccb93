"""The sign, color and time labels of a run, the same on every screen."""

from __future__ import annotations

import time

from qlora_tui.formatting import format_duration, format_float
from qlora_tui.runs.defects import ResultDefect
from qlora_tui.runs.run_summary import RunSummary
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
BEST = "★"
"""The sign of the best evaluation."""


def result_label(state: State, defect: ResultDefect | None) -> tuple[str, str, str]:
    """(sign, word, color) of a run's state, or of what is wrong with its result."""
    if defect is not None:
        return "!", defect.word, "$error"
    sign, style = SIGNS[state]
    return sign, state, style


def best_words(summary: RunSummary) -> str:
    """``★ best validation 2.78 at 60``: the loss and its step; empty where none was measured."""
    if summary.best is None:
        return ""
    loss, step = summary.best
    name = "best" if summary.loss_to_beat is None else "lowest"
    return f"{BEST} {name} validation {format_float(loss, 3)} at {step:,}"


def no_steps_words(*, is_over: bool) -> str:
    """What stands in place of a graph of no steps. ``is_over``: whether the run has ended."""
    return "The run ended before its first step." if is_over else "No steps yet."


def format_ago(at: float, now: float) -> str:
    """``at 03:12, 4 h ago``; the day beside it when it was another."""
    moment, today = time.localtime(at), time.localtime(now)
    day = "" if moment[:3] == today[:3] else time.strftime("%d %b ", moment)
    return f"at {day}{time.strftime('%H:%M', moment)}, {format_duration(max(0.0, now - at))} ago"
