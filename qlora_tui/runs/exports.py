"""Exports that run in the background, each with a folder in the run's ``exports/``.

``request.json`` says what to write, and ``status.json`` how far the export is. The export's process holds
``lock`` (:mod:`qlora_tui.export.export_job`) and writes its output to ``log``. Loads no torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.decoding import decode_json, read_json
from qlora_tui.errors import UserError, disk_problems
from qlora_tui.files import atomic_write, list_folder, private_dir, read_regular
from qlora_tui.locks import is_locked
from qlora_tui.process_end import ended_early
from qlora_tui.publishing import delete_unfinished, discard
from qlora_tui.remote.calls import changes_box, current
from qlora_tui.runs.control import terminate
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.process import ProcessIdentity, detached_environ
from qlora_tui.worker import last_lines, start_detached

Form: TypeAlias = Literal["gguf", "ollama", "merge", "adapter", "hub-adapter", "hub-merged", "hub-gguf"]
"""``adapter``: the adapter's folder, for vLLM; ``hub-``: an upload to the Hub."""
COMPARED_TOKENS = 4_096
"""Default of the number of trained tokens at which predictions are compared; docs/export.md explains it."""
ExportState: TypeAlias = Literal["running", "finished", "failed", "canceled"]


_NAMES: dict[Form, str] = {
    "merge": "merged model",
    "adapter": "adapter folder",
    "ollama": "Ollama model",
    "hub-adapter": "adapter on the Hub",
    "hub-merged": "merged model on the Hub",
    "hub-gguf": "GGUF on the Hub",
}


class ExportRequest(Struct, frozen=True, kw_only=True):
    """A request for an export."""

    form: Form
    out: str
    """Output file or folder, model name in Ollama, or Hub repository."""
    file_type: str = ""
    """GGUF file type, several types separated by commas, or ``auto``."""
    checkpoint: int | None = None
    """Step of a checkpoint; None for the final adapter."""
    within: float | None = None
    """Maximum acceptable mean KL divergence of a GGUF file, in nats."""
    compared_tokens: int = COMPARED_TOKENS
    """Maximum number of trained tokens at which predictions are compared."""
    base: Literal["best", "original", "dequantized"] = "best"
    """Base weights of a merged model."""
    folder: str = ""
    """Folder for the files of a model for Ollama; empty for a folder in ``~/models``."""
    replace_model: bool = False
    """Whether to replace an existing model of this name in Ollama."""
    is_public: bool = False
    """Whether a new repository is public."""


class ExportStatus(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The content of ``status.json``."""

    state: ExportState
    at: float
    """Unix time of this status."""
    began: float = 0.0
    """Unix time at which the process started."""
    process: ProcessIdentity | None = None
    note: str = ""
    """A sentence about anything unusual in this export."""
    activity: str = ""
    """What the export does now, or did last."""
    paths: tuple[str, ...] = ()
    """The files or folder that were written. Also set if the export was canceled right after they were
    written.
    """
    bytes: int = 0
    file_type: str = ""
    """GGUF type of the file. With ``auto``, the chosen type."""
    summary: str = ""
    """What was written and how it was checked, in sentences."""
    verdict: str = ""
    """How close the result is to the adapter, in a few words; empty if nothing was compared."""
    command: str = ""
    """The command that runs the result."""
    problem: str = ""
    """What went wrong, why, and what the user can do."""


class Export(Struct, frozen=True):
    """One background export."""

    folder: Path
    request: ExportRequest
    status: ExportStatus

    @property
    def name(self) -> str:
        """What the export writes, in a few words."""
        return _NAMES.get(self.request.form) or self.status.file_type or self.request.file_type


_REQUESTS = msgspec.json.Decoder(ExportRequest)
_STATUSES = msgspec.json.Decoder(ExportStatus)


@changes_box
@disk_problems()
def start_export(run: RunDir, request: ExportRequest) -> Export:
    """Start an export in a process that outlives this one. Raises UserError."""
    folder = _new_folder(run)
    atomic_write(folder / "request.json", msgspec.json.encode(request))
    status = ExportStatus(state="running", at=time.time(), activity="Starting")
    write_export_status(folder, status)
    with (folder / "log").open("wb") as log:
        start_detached(
            "qlora_tui.export.export_job:run_job",
            folder,
            stdout=subprocess.DEVNULL,
            stderr=log,
            environ=detached_environ(),
        )
    return Export(folder, request, status)


@changes_box
@disk_problems()
def delete_export(export: Export) -> None:
    """Delete the record of an ended export and any incomplete files, but not its result. Raises UserError."""
    delete_unfinished()
    discard(export.folder)


@changes_box
def restart_export(run: RunDir, export: Export) -> Export:
    """Start a failed or canceled export again, in place of the earlier one. Raises UserError."""
    again = start_export(run, export.request)
    # If the earlier record cannot be deleted, it only remains as a line in a list.
    with suppress(OSError):
        discard(export.folder)
    return again


def read_exports(run: RunDir) -> list[Export]:
    """Return the run's exports, newest first, without unreadable ones."""
    folders = reversed(list_folder(exports_dir(run)))
    return [export for folder in folders if (export := _read(folder)) is not None]


def is_exported(run: RunDir) -> bool:
    """Return whether a process exports the run, including exports whose files cannot be read."""
    if any(export.status.state == "running" for export in read_exports(run)):
        return True
    return any(is_locked(lock_path(folder)) for folder in unreadable_exports(run))


def unreadable_exports(run: RunDir) -> list[Path]:
    """Return the folders of exports that no list shows because their files cannot be read."""
    readable = {export.folder for export in read_exports(run)}
    try:
        return sorted(path for path in exports_dir(run).iterdir() if path.is_dir() and path not in readable)
    except OSError:
        return []


def read_request(folder: Path) -> ExportRequest:
    """Return the request in an export's folder. Raises OSError and msgspec.MsgspecError."""
    return decode_json(read_regular(folder / "request.json"), _REQUESTS)


def write_export_status(folder: Path, status: ExportStatus) -> None:
    """Replace an export's status. Raises OSError."""
    atomic_write(folder / "status.json", msgspec.json.encode(status))


@changes_box
def cancel_export(export: Export) -> None:
    """Request that an export stops. Raises UserError if the request cannot be made."""
    process = export.status.process
    if export.status.state != "running":
        return
    if process is None or not terminate(process):
        raise UserError(
            "The export could not be canceled",
            what="The export process has not started yet, or is running on another machine.",
            fix="Try again in a moment.",
        )


def output_path(request: ExportRequest) -> Path | None:
    """Return the file or folder that an export writes; None for an upload."""
    if request.form.startswith("hub-"):
        return None
    if request.form == "ollama":
        return Path(request.folder) if request.folder else ollama_folder(request.out)
    return Path(request.out)


def ollama_folder(name: str, parent: Path | None = None) -> Path:
    """Return the folder for the files of a model in Ollama; by default it is in ``~/models``."""
    return (parent or Path.home() / "models") / f"{ollama_file_stem(name)}-ollama"


def ollama_file_stem(name: str) -> str:
    """Return the model's Ollama name in a form that file names can begin with."""
    return re.sub("[/:]", "-", name)


def leave_gpu_to_runs() -> str:
    """Hide the GPU from this process if runs need it, so that no run fails for lack of memory.

    Must be called before torch is loaded. Returns the reason in a sentence; empty if there is no GPU or no
    run.
    """
    # Queueing and deleting runs import this module and do not need the estimate that this import loads.
    from qlora_tui.runs.doctor import read_machine

    machine = read_machine()
    if machine.gpu is None or not (machine.active or machine.waiting):
        return ""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    user = f"{machine.active} is training on" if machine.active else f"{machine.waiting[0]} waits for"
    return f"The export computes on the CPU, which takes longer: {user} the GPU."


def exports_dir(run: RunDir) -> Path:
    """Return the folder of a run's exports."""
    return run.path / "exports"


def lock_path(folder: Path) -> Path:
    """Return the path of the lock that an export's process holds."""
    return folder / "lock"


def _new_folder(run: RunDir) -> Path:
    parent = private_dir(exports_dir(run))
    number = 1 + max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0)
    while True:
        folder = parent / f"{number:04d}"
        try:
            folder.mkdir(mode=0o700)
            return folder
        except FileExistsError:
            number += 1


def _read(folder: Path) -> Export | None:
    request, status = read_json(folder / "request.json", _REQUESTS), _read_status(folder)
    # The locks of exports on a remote box are not on this machine.
    is_here = current() is None
    if status is not None and status.state == "running" and is_here and is_locked(lock_path(folder)) is False:
        is_new = status.process is None and time.time() - status.at < _START_S
        # Otherwise the export has ended regularly, or has just begun.
        before, status = status, status if is_new else _read_status(folder)
        if status == before and not is_new:
            status = replace(before, state="failed", problem=str(_killed(before, folder / "log")))
    return None if request is None or status is None else Export(folder, request, status)


def _killed(status: ExportStatus, log: Path) -> UserError:
    """Return the error for an export whose process has ended without recording how."""
    process, title = status.process, "The export ended early"
    if process is not None and process.is_from_this_host and not process.is_from_this_boot:
        what = "The machine was restarted during the export."
        return UserError(title, what=what, fix="Start the export again.")
    output = last_line = ""
    with suppress(OSError), log.open("rb") as stream:
        output, last_line = last_lines(stream, _LAST_LINES), last_lines(stream, 1)
    if process is None or "Traceback" in output:
        # It was not killed: an error occurred where no result could be recorded, such as on a full disk.
        return UserError(
            title,
            what="The process that exports ended without recording a result.",
            why=last_line,
            fix=f"Start the export again. The output of the process is in {log}.",
        )
    return ended_early(title, "The process that exports", None, log=log)


def _read_status(folder: Path) -> ExportStatus | None:
    return read_json(folder / "status.json", _STATUSES)


_LAST_LINES = 200
"""Lines at the end of an export's log in which an error is searched."""
_START_S = 30.0
"""Seconds that a new process may take to lock its file."""
