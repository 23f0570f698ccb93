"""Open the app in this terminal."""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING

from qlora_tui import paths
from qlora_tui.errors import EXIT_FAILURE, UserError
from qlora_tui.settings import load_settings

if TYPE_CHECKING:
    from qlora_tui.runs.directory import RunDir


def can_show_app() -> bool:
    """Whether this is a terminal that can move its cursor."""
    return _is_terminal() and os.environ.get("TERM") not in (None, "", "dumb")


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def open_app(*, gpu_gib: float | None = None, mouse: bool = True, run: RunDir | None = None) -> int:
    """Open the app and return its exit code once it is closed.

    Args:
        gpu_gib: Memory of the GPU to estimate for, in GiB, where it is not that of this machine.
        mouse: False leaves the mouse to the terminal.
        run: The run to watch; without one, Home is shown.

    Raises:
        UserError: This is not a terminal, or the disk could not be written.
    """
    # The app enables it again with its first frame: until then there is no garbage worth collecting.
    gc.disable()
    if not can_show_app():
        term = os.environ.get("TERM", "")
        raise UserError(
            "No terminal",
            what=f"This terminal cannot show the app: TERM is {term or 'empty'}."
            if _is_terminal()
            else "The app needs a terminal; this is not one.",
            fix="Use a command: `qlora-tui --help` lists them."
            + (" Or set TERM, to xterm-256color for example." if _is_terminal() else ""),
            exit_code=2,
        )
    import msgspec

    from qlora_tui.tui.app import QloraApp
    from qlora_tui.tui.line_filters import has_no_colors
    from qlora_tui.tui.process import capture_stderr

    settings = load_settings()
    if gpu_gib:
        settings = msgspec.structs.replace(settings, gpu_memory_gib=gpu_gib)
    log = paths.log_path()
    with capture_stderr(log):
        app = QloraApp(settings, watched_run=run)
        app.no_color = app.no_color or has_no_colors()
        app.run(mouse=settings.mouse and mouse)
    if app.disk_faults.ended_by is not None:
        raise app.disk_faults.ended_by
    if app.return_code == EXIT_FAILURE:
        print(f"qlora-tui: The app crashed.\n  Details: {log}", file=sys.stderr)
    return app.return_code or 0
