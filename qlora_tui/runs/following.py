"""A run's events as they come, to its end: what ``train``, ``attach`` and ``demo`` wait on."""

from __future__ import annotations

import time
from collections.abc import Iterator

from qlora_tui.runs.events import AnyEvent
from qlora_tui.runs.status import ACTIVE
from qlora_tui.runs.view import RunView

POLL_S = 0.25


def followed(view: RunView) -> Iterator[AnyEvent]:
    """Every event the view has not told yet, until the run is over.

    ``view.ending`` then says how it ended; None, with ``view.status``, that it is lost or cannot be read.
    """
    while True:
        yield from view.fresh()
        state = view.status.state
        if view.ending is not None and state != "queued" and state not in ACTIVE:
            return
        if state in ("lost", "unreadable", "gone"):
            return
        time.sleep(POLL_S)
