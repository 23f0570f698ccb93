"""Reads the events of a run."""

from __future__ import annotations

from typing import TypeVar

from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventTail
from qlora_tui.runs.events import AnyEvent, Event, Step
from qlora_tui.runs.view import RunView

AnEvent = TypeVar("AnEvent", bound=Event)


def events(run: RunDir) -> list[AnyEvent]:
    """Every event of a run."""
    return list(EventTail(run.events_path).drain())


def events_of(run: RunDir, kind: type[AnEvent]) -> list[AnEvent]:
    """Every event of one kind."""
    return [event for event in events(run) if isinstance(event, kind)]


def losses(run: RunDir) -> dict[int, float]:
    """The loss of each step, as a reader sees it: what was done again counts once."""
    view = RunView(run)
    view.refresh()
    return dict(zip(view.series.step, view.series.loss, strict=True))


def last_step(run: RunDir) -> int:
    """The last step in the events; 0 before the first."""
    steps = events_of(run, Step)
    return steps[-1].step if steps else 0
