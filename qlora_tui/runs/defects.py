"""What is wrong with the result of a run that ended regularly; lists mark it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlora_tui.formatting import format_float
from qlora_tui.runs.status import State
from qlora_tui.runs.view import RunView

_ENDED_REGULARLY: tuple[State, ...] = ("finished", "stopped", "paused")

WORSE = "worse"
"""Word of a result whose validation loss is higher than before training."""


@dataclass(frozen=True)
class ResultDefect:
    """What is wrong with the result."""

    word: str
    """At most ten characters, for lists: ``NaN loss``, ``worse``."""
    sentence: str


def find_defect(view: RunView) -> ResultDefect | None:
    """Return what is wrong with the result of a run; None if nothing is, or it did not end regularly."""
    if view.status.state not in _ENDED_REGULARLY or view.loss is None:
        return None
    last = view.last_evaluation
    if math.isnan(view.loss) or (last is not None and last.loss is None):
        return ResultDefect("NaN loss", f"The loss is not a number{_nan_since(view)}.")
    before = view.loss_before_training
    if last is not None and last.step and last.loss is not None and before is not None and last.loss > before:
        return ResultDefect(
            WORSE,
            f"The validation loss is {format_float(last.loss, 3)} at step {last.step:,}; before training it "
            f"was {format_float(before, 3)}.",
        )
    return None


def _nan_since(view: RunView) -> str:
    """`` since step 90``; empty if no warning names the step."""
    step = next((health.step for health in view.health if health.kind == "nan_loss"), None)
    return "" if step is None else f" since step {step:,}"
