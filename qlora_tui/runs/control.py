"""Requests to a running trainer: one file in ``control/`` per request.

A request file is complete when it appears, because it is renamed into place. The trainer deletes the file
when it accepts the request.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
from msgspec import Struct

from qlora_tui.decoding import decode_json
from qlora_tui.errors import UsageError, disk_problems
from qlora_tui.files import atomic_write, list_folder, open_regular
from qlora_tui.remote.calls import changes_box
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.holds import Hold
from qlora_tui.runs.process import ProcessIdentity
from qlora_tui.runs.status import ACTIVE, read_status

Kind: TypeAlias = Literal[
    "stop",
    "stop_now",
    "pause",
    "pause_now",
    "checkpoint",
    "evaluate",
    "sample",
    "set_learning_rate",
    "finish_epoch",
]


ENDINGS: tuple[Kind, ...] = ("stop", "stop_now", "pause", "pause_now", "finish_epoch")
"""Requests that end the run. Those with ``_now`` do not wait for the end of the step in progress."""


class ControlRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request to a trainer."""

    kind: Kind
    value: float | None = None
    """The requested learning rate, for ``set_learning_rate``."""
    hold: Hold | None = None
    """Reason for a pause that the runner requests; None if the user requests the pause."""


_DECODER = msgspec.json.Decoder(ControlRequest)
_LARGEST_BYTES = 4096


@changes_box
@disk_problems()
def send_request(run: RunDir, kind: Kind, value: float | None = None, *, hold: Hold | None = None) -> None:
    """Send a request to the trainer of ``run``. Raises UserError if no trainer can act on it."""
    status = read_status(run)
    if status.state not in ACTIVE:
        raise UsageError(
            "The run is not running",
            what=f"{run.id} is {status.state}, so no trainer can carry out the request.",
            fix="`qlora-tui runs` shows which runs are running.",
        )
    if kind == "sample" and not run.recipe().training.sample_prompts:
        raise UsageError(
            "Nothing to sample",
            what=f"The recipe of {run.id} has no sample prompts.",
            fix="Set training.sample_prompts in the recipe of the next run, or chat with a checkpoint.",
        )
    name = f"{time.time_ns():020d}-{os.getpid()}-{kind}.json"
    content = msgspec.json.encode(ControlRequest(kind=kind, value=value, hold=hold))
    try:
        # Do not create parent folders, so that a run that was just deleted does not reappear.
        run.control_dir.mkdir(mode=0o700, exist_ok=True)
        atomic_write(run.control_dir / name, content)
    except OSError:
        # A stop needs no file, because SIGTERM means the same. In a starting run, the status names the runner
        # instead.
        if kind not in ("stop", "stop_now") or status.state != "running" or not terminate(status.process):
            raise


def terminate(process: ProcessIdentity | None) -> bool:
    """Send SIGTERM to exactly this process; return False if it cannot be reached from here."""
    if process is None:
        return False
    with process.opened() as handle, suppress(OSError):
        if handle is not None:
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            return True
    return False


def pending_ending(run: RunDir) -> Kind | None:
    """Return the newest unaccepted request that would end the run; None if there is none."""
    names = sorted(path.stem for path in list_folder(run.control_dir) if path.suffix == ".json")
    kinds = [name.rpartition("-")[2] for name in names]
    return next((kind for name in reversed(kinds) for kind in ENDINGS if kind == name), None)


def take_requests(run: RunDir) -> list[ControlRequest]:
    """Return all waiting requests, oldest first, and delete their files.

    A JSON file that is not a valid request is reported in the trainer's log, and deleted if possible. Other
    files are ignored. A request that cannot be deleted is skipped, because it would otherwise be accepted
    again at every step.
    """
    requests = []
    for path in list_folder(run.control_dir):
        if path.suffix != ".json":
            continue
        try:
            request = _read(path)
            path.unlink()
            requests.append(request)
        except (OSError, msgspec.MsgspecError) as error:
            # This goes to the trainer's log, where the author of the request can find why nothing happened.
            print(f"{path.name}: not a request that this version understands: {error}", file=sys.stderr)
            with suppress(OSError):
                path.unlink()
    return requests


def _read(path: Path) -> ControlRequest:
    """Read one request. Raises OSError or msgspec.DecodeError if the file is not a valid request."""
    # A symbolic link could point anywhere.
    with os.fdopen(open_regular(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return decode_json(file.read(_LARGEST_BYTES), _DECODER)
