"""Events of a run as they arrive, until it ends: what ``train``, ``attach`` and ``demo`` wait on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from qlora_tui.errors import UserError
from qlora_tui.locks import is_locked
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import read_from
from qlora_tui.runs.events import AnyEvent
from qlora_tui.runs.spawn import ensure_runner, runner_lock_path, runner_log_path
from qlora_tui.runs.status import ACTIVE
from qlora_tui.runs.view import RunView

POLL_S = 0.25
_LOG_BYTES = 1 << 16
GRACE_S = 10.0
"""Time in seconds that a runner may take to start, and to make way for the next."""


def follow_events(
    view: RunView, on_status: Callable[[str], None] = lambda detail: None
) -> Iterator[AnyEvent]:
    """Yield every event that the view has not read yet, until the run is over.

    Afterwards ``view.ending`` is how it ended, or None if only ``view.status`` knows: for a run that is lost
    or unreadable, or whose last event was never written or is damaged. Raises UserError for a queued run that
    no runner takes.

    ``on_status`` gets a sentence about a trainer that may send no events for long: it is suspended, does not
    respond, or runs on another machine. It also gets one about a suspended runner.
    """
    settled_before = False
    runner = _RunnerMonitor(view.run)
    reported = waited_for = ""
    while True:
        yield from view.iter_new()
        state = view.status.state
        settled = state != "queued" and state not in ACTIVE
        # Resuming appends Queued shortly before it changes the status, so an ending may be missing once.
        if state in ("lost", "unreadable", "gone") or (settled and (view.ending or settled_before)):
            return
        settled_before = settled
        # The text before a colon stays the same; the text after it may be an age.
        detail = view.status.detail if state == "queued" or state in ACTIVE else ""
        if detail.partition(":")[0] != reported:
            on_status(detail or f"The {waited_for} responds again.")
            reported = detail.partition(":")[0]
            waited_for = "runner" if state == "queued" else "trainer"
        if state == "queued":
            runner.check()
        time.sleep(POLL_S)


class _RunnerMonitor:
    """Makes sure that a queued run has a runner: it may have been killed, or be unable to work."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._missing_since: float | None = None
        self._tried = False

    def check(self) -> None:
        """Start a runner if none has been active for a while; raise UserError if that did not help."""
        now = time.monotonic()
        if is_locked(runner_lock_path()):
            self._missing_since = None
            return
        if self._missing_since is None:
            self._missing_since = now
        if now - self._missing_since < GRACE_S:
            return
        if self._tried:
            raise UserError(
                "No runner takes the run",
                what=f"{self._run.id} is queued, and the runner ended before it began.",
                why=_last_line(runner_log_path()),
                fix=f"{runner_log_path()} has the details; `qlora-tui attach {self._run.id}` tries again.",
            )
        ensure_runner()
        self._tried, self._missing_since = True, None


def _last_line(log: Path) -> str:
    try:
        begin = max(0, log.stat().st_size - _LOG_BYTES)
        lines = read_from(log, begin, _LOG_BYTES).decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((f"Its log ends: {line.strip()}" for line in reversed(lines) if line.strip()), "")
