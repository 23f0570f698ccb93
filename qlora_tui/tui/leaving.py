"""Leaving the app: what continues without it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.status import ACTIVE, read_status

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp


def leave(app: QloraApp, run: RunDir | None) -> None:
    """Leave at once, since nothing is lost.

    The terminal then shows how to come back to ``run``, where it is active, or to the active run.
    """
    app.exit(message=_farewell(run if run is not None and _is_active(run) else app.system_status.active))


def _is_active(run: RunDir) -> bool:
    return read_status(run).state in ACTIVE


def _farewell(run: RunDir | None) -> str | None:
    if run is None or not _is_active(run):
        return None
    return f"{run.id} continues. Run `qlora-tui attach {shlex.quote(run.id)}` to come back to it."
