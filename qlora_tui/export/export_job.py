"""The process of a background export: ``python -m qlora_tui.export.export_job FOLDER``.

``FOLDER`` is described in :mod:`qlora_tui.runs.exports`. SIGTERM cancels the export.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from msgspec.structs import replace

from qlora_tui.chat.chat_sources import choose_adapter, run_source
from qlora_tui.errors import UserError
from qlora_tui.export.forms import export_form
from qlora_tui.gpu.torch_env import configure_torch_env
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.exports import (
    ExportRequest,
    ExportStatus,
    lock_path,
    read_request,
    write_export_status,
)
from qlora_tui.runs.locks import locked
from qlora_tui.runs.process import process_identity

_STATUS_INTERVAL_S = 0.2
"""Shortest time between two statuses, in seconds."""


class _Canceled(BaseException):
    """SIGTERM arrived. Not an Exception, so that nothing on the way handles it."""


def run_job(folder: Path) -> None:
    """Do the export in a folder and record how it ends."""
    signal.signal(signal.SIGTERM, _cancel)
    with locked(lock_path(folder)) as lock:
        if lock is None:
            return
        now = time.time()
        status = ExportStatus(
            state="running", at=now, began=now, process=process_identity(), activity="Starting"
        )
        write_export_status(folder, status)
        try:
            status = _export(read_request(folder), RunDir(folder.parents[1]), _reporter(folder, status))
        except _Canceled:
            status = ExportStatus(state="canceled", at=time.time())
        except UserError as error:
            status = ExportStatus(state="failed", at=time.time(), problem=str(error))
        except BaseException as error:
            problem = f"Internal error: {error!r}. The log has the details."
            write_export_status(folder, ExportStatus(state="failed", at=time.time(), problem=problem))
            raise
        write_export_status(folder, status)


def _export(request: ExportRequest, run: RunDir, on_status: Callable[[str], None]) -> ExportStatus:
    configure_torch_env()
    source = run_source(run)
    adapter_name = choose_adapter(source, checkpoint=request.checkpoint)
    written = export_form(run, request, source, adapter_name, on_status)
    return ExportStatus(
        state="finished",
        at=time.time(),
        paths=written.paths,
        bytes=written.bytes,
        file_type=written.file_type,
        summary=written.summary,
        command=written.command,
    )


def _reporter(folder: Path, status: ExportStatus) -> Callable[[str], None]:
    last = 0.0

    def report(words: str) -> None:
        nonlocal last
        print(words, flush=True)
        now = time.monotonic()
        if now - last >= _STATUS_INTERVAL_S:
            last = now
            write_export_status(folder, replace(status, at=time.time(), activity=words))

    return report


def _cancel(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Canceled


if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
