"""What is worth telling of a run that is over: it finished, or it failed (a loss that is NaN ends a run so).

What the user asked for, stopping and pausing, is no news; nor is a failure that the runner mends by itself.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from qlora_tui.formatting import format_float
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import last_event
from qlora_tui.runs.events import Failed, Finished
from qlora_tui.runs.retry import next_plan
from qlora_tui.runs.view import RunView

_STEPS = 64


class RunNotification(Struct, frozen=True, kw_only=True):
    """The body of a webhook's request: no path, no address, nothing of the data."""

    event: Literal["finished", "failed"]
    run: str
    """Its id."""
    name: str
    text: str
    """All of it in a sentence: ``tickets is finished: best loss 1.21 at step 640.``"""
    step: int
    total_steps: int
    best_loss: float | None
    """Lowest validation loss; None where none was measured."""


def notification_for(run: RunDir) -> RunNotification | None:
    """The news of a run; None where there is none."""
    ending = last_event(run.events_path)
    if not isinstance(ending, Finished | Failed) or next_plan(run, ending) is not None:
        return None
    view, _ = RunView.from_sample(run, _STEPS)
    best = view.best
    if isinstance(ending, Failed):
        text = f"{run.name} failed: {ending.title}."
    else:
        reached = "" if best is None else f": best loss {format_float(best.loss, 3)} at step {best.step:,}"
        text = f"{run.name} is finished{reached}."
    return RunNotification(
        event="finished" if isinstance(ending, Finished) else "failed",
        run=run.id,
        name=run.name,
        text=text,
        step=view.step,
        total_steps=view.total_steps,
        best_loss=None if best is None else best.loss,
    )
