"""Where a run stands: ``status.json``, replaced whole, and what it means once its process is gone.

Written by whoever has the run: the one who queues it, the runner, the trainer; never by two at once.
"""

from __future__ import annotations

import time
from typing import Literal, TypeAlias

import msgspec
from msgspec import Struct, structs

from qlora_tui.decoding import Count, UnixTime, decode_json
from qlora_tui.files import atomic_write
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.events import Phase
from qlora_tui.runs.process import ProcessMark

State: TypeAlias = Literal[
    "queued", "starting", "running", "finished", "failed", "stopped", "paused", "lost", "unreadable", "gone"
]
"""The last three are never written: they are what a reader finds. ``gone``: not even its folder is there."""

ACTIVE: frozenset[State] = frozenset(("starting", "running"))
RESUMABLE: frozenset[State] = frozenset(("failed", "stopped", "paused", "lost"))


class Status(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The content of ``status.json``."""

    state: State
    at: UnixTime
    """Unix time of this writing: the heartbeat."""
    process: ProcessMark | None = None
    phase: Phase | None = None
    step: Count = 0
    total_steps: Count = 0
    loss: float | None = None
    detail: str = ""
    """One sentence: how it ended, or what it waits for."""

    def then(self, state: State, *, process: ProcessMark | None = None, detail: str = "") -> Status:
        """The next state, from now on; how far the run has come stays."""
        return structs.replace(self, state=state, at=time.time(), process=process, phase=None, detail=detail)


_DECODER = msgspec.json.Decoder(Status)


def write_status(run: RunDir, status: Status, *, durable: bool = False) -> None:
    """Replace ``status.json``; with ``durable`` it survives a power cut."""
    atomic_write(run.status_path, msgspec.json.encode(status), durable=durable)


def read_status(run: RunDir) -> Status:
    """The status as it is true now: an active run whose process is gone is ``lost``."""
    try:
        status = decode_json(run.status_path.read_bytes(), _DECODER)
    except FileNotFoundError:
        if not run.path.exists():
            return Status(state="gone", at=0.0, detail="The run was deleted: its folder is gone.")
        return Status(state="unreadable", at=0.0, detail="status.json is missing from the run's directory.")
    except (OSError, msgspec.MsgspecError) as error:
        return Status(state="unreadable", at=0.0, detail=f"status.json cannot be read: {error}.")
    if status.state not in ACTIVE or (status.process and status.process.is_alive()):
        return status
    restarted = status.process is not None and not status.process.is_from_this_boot()
    why = (
        "The machine was restarted while it ran."
        if restarted
        else "Its process is gone and left no word; it was probably killed."
    )
    return structs.replace(status, state="lost", detail=why)
