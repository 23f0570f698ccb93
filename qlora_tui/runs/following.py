"""A run's events as they come, to its end: what ``train``, ``attach`` and ``demo`` wait on."""

from __future__ import annotations

import time
from collections.abc import Iterator

from qlora_tui.runs.events import AnyEvent
from qlora_tui.runs.status import ACTIVE
from qlora_tui.runs.view import RunView

POLL_S = 0.25


def followed(view: RunView) -> Iterator[AnyEvent]:
    """Yield every event that the view has not read yet, until the run is over.

    ``view.ending`` is then how it ended, or None, where only ``view.status`` says so: a run that is lost or
    unreadable, or whose last event was never written or is damaged.
    """
    settled_before = False
    while True:
        yield from view.fresh()
        state = view.status.state
        settled = state != "queued" and state not in ACTIVE
        # Resuming appends Queued a moment before it changes the status, so an ending may be missing once.
        if state in ("lost", "unreadable", "gone") or (settled and (view.ending or settled_before)):
            return
        settled_before = settled
        time.sleep(POLL_S)
