"""Disk errors while the app is open: shown with what to do, and without a traceback."""

from __future__ import annotations

import time
from typing import Any

from textual.app import App
from textual.worker import WorkerFailed

from qlora_tui.errors import UserError, disk_problem

REPEAT_S = 30.0
"""Seconds before the same problem is reported again: what is done every second fails every second."""


class DiskFaults:
    """Handles disk errors, and no others."""

    def __init__(self) -> None:
        self._reported_at: dict[str, float] = {}
        self.ended_by: UserError | None = None
        """Why the app had to end: Textual ends the part of it in which a message fails."""

    def handle(self, app: App[Any], error: Exception) -> bool:
        """Report a disk error; return False for any other error.

        An error in a worker becomes a notification; one in a message handler ends the app.
        """
        if isinstance(error, WorkerFailed):
            return self.notify(app, error.error)
        problem = disk_problem(error) if isinstance(error, OSError) else None
        if problem is not None:
            self.ended_by = problem
            app.exit(return_code=problem.exit_code)
        return problem is not None

    def notify(self, app: App[Any], error: BaseException) -> bool:
        """Notify the user of a disk error, not too often; return False for any other error."""
        problem = disk_problem(error) if isinstance(error, OSError) else None
        if problem is None:
            return False
        if time.monotonic() - self._reported_at.get(problem.code, -REPEAT_S) >= REPEAT_S:
            self._reported_at[problem.code] = time.monotonic()
            app.notify(str(problem), severity="error", timeout=10)
        return True
