"""The engine's log file, shared by client and server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from qlora_tui.paths import state_dir

_ENOUGH_BYTES = 1 << 20


def log_path() -> Path:
    """Path of the output of the engine and its libraries."""
    return state_dir() / "engine.log"


def truncated_log() -> Path:
    """Return the log's path, after emptying a log that is too large."""
    path = log_path()
    if path.exists() and path.stat().st_size > _ENOUGH_BYTES:
        path.write_bytes(b"")
    return path


def open_log() -> IO[bytes]:
    """Open the log for appending, or the null device: an unwritable log must not stop the engine."""
    try:
        return truncated_log().open("ab")
    except OSError:
        return Path(os.devnull).open("ab")
