"""Notifications about ended runs: a run finished or failed (a NaN loss ends a run as failed).

Stops and pauses, which the user requested, are not reported; nor is a failure that the runner retries.
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
    """Body of a webhook's request: no paths, no addresses, nothing from the data."""

    event: Literal["finished", "failed"]
    run: str
    """The run's id."""
    name: str
    text: str
    """The message in a sentence: ``tickets is finished: best validation loss 1.21 at step 640.``"""
    step: int
    total_steps: int
    best_loss: float | None
    """Lowest validation loss; None if none was measured."""


def notification_for(run: RunDir) -> RunNotification | None:
    """Return the notification about a run; None if there is nothing to report."""
    ending = last_event(run.events_path)
    if not isinstance(ending, Finished | Failed) or next_plan(run, ending) is not None:
        return None
    view, _ = RunView.from_sample(run, _STEPS)
    best = view.best
    if isinstance(ending, Failed):
        text = f"{run.name} failed: {ending.title}."
    else:
        reached = (
            ""
            if best is None
            else f": best validation loss {format_float(best.loss, 3)} at step {best.step:,}"
        )
        if view.loss_to_beat is not None:
            reached += f", worse than before training ({format_float(view.loss_to_beat, 3)})"
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
