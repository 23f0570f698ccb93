"""The process of a background export, which outlives the process that starts it.

:mod:`qlora_tui.runs.exports` describes its folder. SIGTERM cancels the export.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from msgspec.structs import replace

from qlora_tui.chat.chat_sources import choose_adapter, run_source
from qlora_tui.errors import INTERNAL_ERROR, UserError
from qlora_tui.export.unfinished_files import export_problems
from qlora_tui.gpu.torch_env import configure_torch_env, faster_imports
from qlora_tui.locks import PATIENCE_S, locked
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.exports import (
    ExportRequest,
    ExportStatus,
    leave_gpu_to_runs,
    lock_path,
    output_path,
    read_request,
    write_export_status,
)
from qlora_tui.runs.process import process_identity


class _Canceled(BaseException):
    """SIGTERM arrived. Not a subclass of Exception, so that no handler on the way catches it."""


def run_job(folder: Path) -> None:
    """Perform the export that ``folder`` describes, and record how it ends."""
    with locked(lock_path(folder), patience_s=PATIENCE_S) as lock:
        if lock is None:
            print("Another process is already running this export.")
            return
        request = read_request(folder)
        out = output_path(request)
        existed = out is not None and os.path.lexists(out)
        try:
            try:
                signal.signal(signal.SIGTERM, _cancel)
                status = _export(request, folder)
            finally:
                # The rest records how the export ended and must not be interrupted.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
        except _Canceled:
            # If the file or folder exists, the cancel came too late to prevent it.
            paths = (str(out),) if out is not None and not existed and os.path.lexists(out) else ()
            status = ExportStatus(state="canceled", at=time.time(), paths=paths)
        except UserError as error:
            status = ExportStatus(state="failed", at=time.time(), problem=str(error))
        except BaseException as error:
            problem = f"{INTERNAL_ERROR}: {error!r}. The log has the details."
            write_export_status(folder, ExportStatus(state="failed", at=time.time(), problem=problem))
            raise
        write_export_status(folder, status)


def _export(request: ExportRequest, folder: Path) -> ExportStatus:
    now = time.time()
    status = ExportStatus(
        state="running",
        at=now,
        began=now,
        process=process_identity(),
        activity="Starting",
        note=leave_gpu_to_runs(),
    )
    write_export_status(folder, status)
    configure_torch_env()
    # Imported here because loading torch takes seconds, and a cancel must not wait for it.
    with faster_imports():
        from qlora_tui.export.forms import export_form

    with export_problems():
        run = RunDir(folder.parents[1])
        source = run_source(run)
        adapter_name = choose_adapter(source, checkpoint=request.checkpoint)
        written = export_form(run, request, source, adapter_name, _reporter(folder, status))
    return ExportStatus(
        state="failed" if written.problem else "finished",
        at=time.time(),
        note=status.note,
        paths=tuple(written.sizes),
        bytes=written.bytes,
        file_type=written.file_type,
        summary=written.summary,
        verdict=written.verdict,
        command=written.command,
        problem=written.problem,
    )


def _reporter(folder: Path, status: ExportStatus) -> Callable[[str], None]:
    def report(words: str) -> None:
        print(words, flush=True)
        # If the run's disk is full or the run was deleted, the export itself may still succeed.
        with suppress(OSError):
            write_export_status(folder, replace(status, at=time.time(), activity=words))

    return report


def _cancel(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Canceled
